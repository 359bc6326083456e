"""Bundles that an operator replaces while a service runs, followed by SIGHUP or by waiting."""

import asyncio
import signal
import time
from pathlib import Path

import pytest

from tests.support.bundles import cut_short, write_copy
from tests.support.server import running
from tests.tools.load import reload_under_load


@pytest.mark.slow
def test_reload_under_load_fails_no_request(tmp_path: Path) -> None:
    """``python -m tests.tools.load reload`` does this 50 times."""
    folder = write_copy(tmp_path / "served", version="start").path
    with running("--bundle", str(folder), CONCORD_WATCH_SECONDS="0") as service:
        result = asyncio.run(reload_under_load(service, folder, count=6, rate=20.0))
    assert result["reloads"] == 6
    assert set(result["outcomes"]) == {"200"}, result
    assert max(result["resident_mb"]) - result["resident_mb"][0] < 100, "two bundles are held while one replaces the other"


@pytest.mark.slow
def test_watched_folder_of_bundles_serves_new_and_changed_ones(tmp_path: Path) -> None:
    write_copy(tmp_path / "first", version="1.0")
    with running(CONCORD_BUNDLES=str(tmp_path), CONCORD_WATCH_SECONDS="0.1") as service:
        write_copy(tmp_path / "second", version="2.0")
        service.wait_for(lambda: service.client.get("/v1/models/digits@2.0").status_code == 200)
        versions = [service.embed(model=name).json()["model_version"] for name in ("digits", "digits@1.0", "digits@2.0")]
        assert versions == ["2.0", "1.0", "2.0"]
        cut_short(tmp_path / "second")
        service.wait_for(lambda: service.client.get("/v1/models/digits@2.0").json()["state"] == "failed")
        assert service.client.get("/readyz").status_code == 200
        assert service.embed().json()["model_version"] == "2.0"
        reasons = [line["reason"] for line in service.log_lines() if line["event"].startswith("bundle not loaded")]
        assert any("weights.safetensors" in reason for reason in reasons)
        assert str(tmp_path) not in service.client.get("/v1/models").text
        write_copy(tmp_path / "second", version="2.1")
        service.wait_for(lambda: service.client.get("/v1/models/digits").json()["version"] == "2.1")


@pytest.mark.parametrize("wait", [0.0, 0.2])
def test_sigterm_during_a_reload_ends_the_service(tmp_path: Path, wait: float) -> None:
    """The signal arrives ``wait`` seconds after the reload begins: at different moments of it."""
    folder = write_copy(tmp_path / "served", version="1.0").path
    with running("--bundle", str(folder), CONCORD_WATCH_SECONDS="0") as service:
        write_copy(folder, version="2.0")
        service.process.send_signal(signal.SIGHUP)
        time.sleep(wait)
        service.client.close()
        assert service.stop(signal.SIGTERM) == 0
        assert service.process.stderr is not None
        assert "Traceback" not in service.process.stderr.read() + str(service.log_lines())
