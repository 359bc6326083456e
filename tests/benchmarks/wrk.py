"""wrk as a second load generator: it takes a fraction of the processor time of the Python one, which limits fast servers."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
local bodies = {%s}
local number = 0
request = function()
  number = number %% #bodies + 1
  return wrk.format(nil, nil, nil, bodies[number])
end
"""


def is_installed() -> bool:
    """Return whether wrk is on the PATH (Debian: ``apt-get install wrk``)."""
    return shutil.which("wrk") is not None


def closed_loop(
    port: int, path: str, bodies: Sequence[Mapping[str, object]], connections: int, seconds: float, cores: Sequence[int]
) -> tuple[float, float]:
    """Send requests as ``traffic.closed_loop`` does.

    Args:
        seconds: rounded up to whole seconds.
        cores: that wrk may use.

    Returns:
        responses of status 200 per second, and the processor seconds of wrk per second.

    Raises:
        AssertionError: a response has another status, or a connection failed.
    """
    whole = max(1, round(seconds + 0.499))
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "requests.lua"
        script.write_text(SCRIPT % ", ".join(f"[==[{json.dumps(body)}]==]" for body in bodies))
        command = ["taskset", "--cpu-list", ",".join(map(str, cores)), "wrk", "-t1", f"-c{connections}", f"-d{whole}"]
        before, began = os.times(), time.monotonic()
        out = subprocess.run(
            [*command, "--script", str(script), f"http://127.0.0.1:{port}{path}"], capture_output=True, check=True, text=True
        ).stdout
        after, took = os.times(), time.monotonic() - began
    assert "Non-2xx" not in out, out
    assert "Socket errors" not in out, out
    rate = re.search(r"Requests/sec:\s+([\d.]+)", out)
    assert rate, out
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return float(rate[1]), cpu / took
