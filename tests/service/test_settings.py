from pathlib import Path

import pytest
from pydantic import ValidationError

from model import bundle
from service.settings import Settings, explain


def test_the_environment_sets_and_arguments_overrule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCORD_PORT", "9001")
    monkeypatch.setenv("CONCORD_MAX_ITEMS", "4")
    assert Settings().port == 9001
    settings = Settings(port=9002)
    assert (settings.port, settings.max_items) == (9002, 4)


def test_by_default_only_this_machine_is_served() -> None:
    assert Settings().host == "127.0.0.1"


def test_bad_settings_are_explained_one_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCORD_PORT", "eighty")
    monkeypatch.setenv("CONCORD_DEVICE", "tpu")
    with pytest.raises(ValidationError) as caught:
        Settings()
    port, device = sorted(explain(caught.value).splitlines(), reverse=True)
    assert port.startswith("CONCORD_PORT=eighty: Input should be a valid integer")
    assert device.startswith("CONCORD_DEVICE=tpu: ")
    assert all(allowed in device for allowed in ("auto", "cpu", "cuda"))


def test_a_request_that_no_queue_could_hold_is_no_setting() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(max_items=9, max_queue_items=8)
    assert "max_items=9" in explain(caught.value)


def test_the_bundle_is_a_built_in_name_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().bundle_path() == bundle.builtin("digits")
    assert Settings(bundle=str(tmp_path)).bundle_path() == tmp_path
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Settings(bundle="here").bundle_path() == Path("here")
    with pytest.raises(bundle.BundleError, match="digits"):
        Settings(bundle="letters").bundle_path()
