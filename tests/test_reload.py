"""Bundles that are exchanged while a service runs, as an operator does it: another folder in the place, SIGHUP or waiting."""

import asyncio
import signal
import time
from pathlib import Path

import pytest

from tests.copies import cut_short, write_copy
from tests.load import reload_under_load
from tests.server import running


def test_exchanges_under_load_fail_no_request(tmp_path: Path) -> None:
    """``python -m tests.load reload`` does this 50 times."""
    place = write_copy(tmp_path / "served", version="start").path
    with running("--bundle", str(place), CONCORD_WATCH_SECONDS="0") as service:
        told = asyncio.run(reload_under_load(service, place, count=6, rate=20.0))
    assert told["reloads"] == 6
    assert set(told["outcomes"]) == {"200"}, told
    assert max(told["resident_mb"]) - told["resident_mb"][0] < 100, "one more bundle's worth while they are exchanged"


def test_a_folder_of_bundles_is_watched(tmp_path: Path) -> None:
    write_copy(tmp_path / "first", version="1.0")
    with running(CONCORD_BUNDLES=str(tmp_path), CONCORD_WATCH_SECONDS="0.1") as service:
        write_copy(tmp_path / "second", version="2.0")
        service.wait_for(lambda: service.client.get("/v1/models/digits@2.0").status_code == 200, 30)
        versions = [service.embed(model=name).json()["model_version"] for name in ("digits", "digits@1.0", "digits@2.0")]
        assert versions == ["2.0", "1.0", "2.0"]
        cut_short(tmp_path / "second")
        service.wait_for(lambda: service.client.get("/v1/models/digits@2.0").json()["state"] == "failed", 30)
        assert service.client.get("/readyz").status_code == 200
        assert service.embed().json()["model_version"] == "2.0"
        reasons = [line["reason"] for line in service.lines() if line["event"].startswith("bundle not loaded")]
        assert any("weights.safetensors" in reason for reason in reasons)
        assert str(tmp_path) not in service.client.get("/v1/models").text
        write_copy(tmp_path / "second", version="2.1")
        service.wait_for(lambda: service.client.get("/v1/models/digits").json()["version"] == "2.1", 30)


@pytest.mark.parametrize("wait", [0.0, 0.2])
def test_sigterm_in_the_middle_of_an_exchange_ends_it(tmp_path: Path, wait: float) -> None:
    place = write_copy(tmp_path / "served", version="1.0").path
    with running("--bundle", str(place), CONCORD_WATCH_SECONDS="0") as service:
        write_copy(place, version="2.0")
        service.process.send_signal(signal.SIGHUP)
        time.sleep(wait)
        service.client.close()
        assert service.stop(signal.SIGTERM) == 0
        assert service.process.stderr is not None
        assert "Traceback" not in service.process.stderr.read() + str(service.lines())
