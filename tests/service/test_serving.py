import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from model import bundle
from model.runtime import Runtime

Serve = Callable[..., contextlib.AbstractContextManager[httpx.Client]]


@pytest.fixture
def forgetful(runtime: Runtime, tmp_path: Path) -> Runtime:
    """A bundle that verifies, but computes something else than its golden examples say."""
    folder = tmp_path / "digits"
    shutil.copytree(runtime.bundle.path, folder)
    with np.load(folder / bundle.GOLDEN) as archive:
        golden = {key: archive[key] for key in archive.files}
    golden["next_mean"] += 0.1
    np.savez(folder / bundle.GOLDEN, **golden)
    manifest = runtime.bundle.manifest
    facts = {name: value for name, value in manifest if name not in {"format", "files"}}
    copies = tmp_path / "copies"
    shutil.copytree(folder, copies)
    shutil.rmtree(folder)
    written = bundle.write(folder, facts, [copies / name for name in manifest.files], "# A copy\n")
    return Runtime(written, device="cpu", threads=1)


def test_golden_examples_that_differ_keep_the_service_from_being_ready(serve: Serve, forgetful: Runtime) -> None:
    with serve(forgetful) as client:
        ready = client.get("/readyz")
        assert ready.status_code == 503
        checks = ready.json()["checks"]
        assert [name.partition("/")[2] for name, answer in checks.items() if answer != "ok"] == ["golden"]
        assert client.get("/livez").status_code == 200
        refused = client.post("/embed", json={"inputs": [{"word": "one"}]})
        assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/v1/models").json()["data"][0]["state"] == "failing"
        assert "concord_ready 0.0" in client.get("/metrics").text
