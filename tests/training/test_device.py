"""Devices. PyTorch takes a backend in Python only before the first backward pass of a process: these tests have their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import ROOT

TESTS = Path(__file__).with_name("device_in_own_process.py")


@pytest.mark.slow
def test_training_and_evaluation_on_devices() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS)]
    tests = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert tests.returncode == 0, tests.stdout
    assert " passed" in tests.stdout
