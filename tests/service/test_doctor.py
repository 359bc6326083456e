"""concord doctor: what it finds here, and what it says of drivers and GPUs that a program named nvidia-smi describes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from concord.model.bundle import BundleError
from concord.model.installation import install_command
from concord.model.runtime import Runtime, device
from concord.service import doctor
from concord.service.settings import Settings
from tests.support.server import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "concord.service", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env={"PATH": "/bin", **environment})


def failures(settings: Settings) -> dict[str, str]:
    return {finding.check: str(finding) for finding in doctor.examine(settings) if not finding.ok}


def test_doctor_of_the_built_in_bundle_finds_nothing_wrong() -> None:
    text = run(CONCORD_DEVICE="cpu")
    assert (text.returncode, text.stderr) == (0, "")
    checks = [line.split()[1] for line in text.stdout.splitlines()]
    assert all(line.startswith("ok ") for line in text.stdout.splitlines())
    assert set(checks) == {"onnxruntime", "cores", "bundle", "device", "threads", "graph", "golden", "refine", "memory"}
    assert checks.count("graph") == 6, "every graph"
    output = json.loads(run("--json", CONCORD_DEVICE="cpu").stdout)
    assert output["ok"]
    assert len(output["findings"]) == len(checks)


@pytest.mark.skipif(device.cuda_is_installed(), reason="CUDA is installed")
def test_doctor_without_the_device_says_what_is_missing_and_exits_with_1() -> None:
    text = run(CONCORD_DEVICE="cuda")
    assert text.returncode == 1
    failed = {line.split()[1]: line for line in text.stdout.splitlines() if line.startswith("FAIL")}
    assert install_command("gpu") in failed["onnxruntime"]
    assert "start the container with --gpus" in failed["driver"]
    assert "this installation of ONNX Runtime only has" in failed["device"]
    assert "golden" not in text.stdout, "no check after the device"


def test_doctor_of_a_bundle_that_is_not_there_says_so() -> None:
    output = run("--json", "--bundle", "/nowhere")
    assert output.returncode == 1
    (failed,) = (finding for finding in json.loads(output.stdout)["findings"] if not finding["ok"])
    assert failed["check"] == "bundle"
    assert "/nowhere/manifest.json: cannot be read" in failed["found"]


def test_golden_examples_that_differ_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def differ(_: Runtime) -> float:
        raise BundleError("golden examples differ by 0.0018")

    monkeypatch.setattr(Runtime, "replay_golden", differ)
    failed = failures(Settings(device="cpu"))
    assert list(failed) == ["golden"]
    assert "differ by 0.0018. This device computes other results" in failed["golden"]


@pytest.mark.parametrize(
    ("line", "failed"),
    [
        ("NVIDIA H100 80GB HBM3, 580.82.07, 9.0, 81559, 4, Disabled", {}),
        ("NVIDIA RTX PRO 6000, 580.82.07, 12.0, 97887, 4, [N/A]", {}),
        ("NVIDIA L4, 550.54.15, 8.9, 23034, 4, [N/A]", {"driver": "Install NVIDIA's driver 580 or newer"}),
        ("NVIDIA B200, 580.82.07, 10.0, 183359, 4, Disabled", {"gpu 0": "use another GPU, or CONCORD_DEVICE=cpu"}),
        ("Tesla V100-SXM2-16GB, 580.82.07, 7.0, 16384, 4, [N/A]", {"gpu 0": "ONNX Runtime has kernels for 7.5, 8.0"}),
    ],
)
def test_drivers_and_gpus_are_compared_with_what_onnx_runtime_needs(
    line: str, failed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    found = {finding.check: finding for finding in doctor._gpus(required=True)}
    assert set(found) == {"driver", "gpu 0"}
    assert {check for check, finding in found.items() if not finding.ok} == set(failed)
    for check, remedy in failed.items():
        assert remedy in str(found[check])


def test_driver_that_does_not_respond_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    (finding,) = doctor._gpus(required=True)
    assert "Driver/library version mismatch. Install NVIDIA's driver" in str(finding)
