from pathlib import Path

import pytest
from pydantic import ValidationError

from concord.model import bundle
from concord.service.settings import Settings, explain


def test_settings_arguments_take_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCORD_PORT", "9001")
    monkeypatch.setenv("CONCORD_MAX_ITEMS", "4")
    assert Settings().port == 9001
    settings = Settings(port=9002)
    assert (settings.port, settings.max_items) == (9002, 4)


def test_settings_default_host_is_loopback() -> None:
    assert Settings().host == "127.0.0.1"


def test_explain_has_one_line_for_each_invalid_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONCORD_PORT", "eighty")
    monkeypatch.setenv("CONCORD_DEVICE", "tpu")
    with pytest.raises(ValidationError) as caught:
        Settings()
    port, device = sorted(explain(caught.value).splitlines(), reverse=True)
    assert port.startswith("CONCORD_PORT=eighty: Input should be a valid integer")
    assert device.startswith("CONCORD_DEVICE=tpu: ")
    assert all(allowed in device for allowed in ("auto", "cpu", "cuda"))


def test_settings_port_of_kubernetes_service_links_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes sets it for a service that is called concord."""
    monkeypatch.setenv("CONCORD_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert explain(caught.value).startswith("CONCORD_PORT=tcp://10.0.0.1:8000: Input should be a valid integer")


def test_settings_with_more_items_than_the_queue_holds_are_invalid() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(max_items=9, max_queue_items=8)
    assert "max_items=9" in explain(caught.value)


def test_bundle_path_accepts_a_built_in_name_or_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().bundle_path() == bundle.builtin("digits")
    assert Settings(bundle=str(tmp_path)).bundle_path() == tmp_path
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Settings(bundle="here").bundle_path() == Path("here")
    with pytest.raises(bundle.BundleError, match="digits"):
        Settings(bundle="letters").bundle_path()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_settings_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"CONCORD_{name.upper()}", "")
    assert getattr(Settings(), name) == Settings.model_fields[name].default
