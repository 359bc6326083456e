"""A served model over HTTP: readiness, the circuit breaker, faults of the graphs, deadlines and capacity."""

import ctypes
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from concord.model import bundle
from concord.model.runtime import Posterior, Runtime
from concord.model.runtime.refinement_table import RefinementTable
from concord.service.inference import served_model
from tests.support.metrics import scrape
from tests.support.runtimes import GatedRuntime
from tests.support.server import Serve
from tests.support.waiting import wait_for

REQUEST = {"inputs": [{"word": "one"}]}


@pytest.fixture
def wrong_golden(runtime: Runtime, tmp_path: Path) -> Runtime:
    """A bundle that verifies, but whose results differ from its golden examples."""
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


@pytest.fixture
def gated(runtime: Runtime) -> GatedRuntime:
    return GatedRuntime(runtime.bundle, threads=1)


def fail(*_: Any) -> None:
    raise RuntimeError("the graph is broken")


def work(*_: Any) -> None:
    """Do nothing before the graph runs."""


def failing_checks(client: httpx.Client, path: str) -> list[str]:
    """Return the names of the checks that fail, without the model's."""
    response = client.get(path)
    names = [name.rpartition("/")[2] for name, result in response.json()["checks"].items() if result != "ok"]
    assert response.status_code == (503 if names else 200)
    return names


def test_model_whose_golden_examples_differ_is_not_ready(serve: Serve, wrong_golden: Runtime) -> None:
    with serve(wrong_golden) as client:
        assert failing_checks(client, "/readyz") == ["golden"]
        assert client.get("/livez").status_code == 200
        rejected = client.post("/embed", json=REQUEST)
        assert (rejected.status_code, rejected.json()["code"]) == (503, "not_ready")
        assert int(rejected.headers["retry-after"]) >= 1
        assert client.get("/v1/models").json()["data"][0]["state"] == "failing"
        assert "concord_ready 0.0" in client.get("/metrics").text


def test_model_that_fails_on_an_absent_modality_is_not_ready(serve: Serve, runtime: Runtime) -> None:
    """The golden examples may all be complete, but most requests are not."""

    class NeedsFirstModality(Runtime):
        def encode(self, inputs: Any, present: Any) -> Posterior:
            if not present[:, 0].any():
                raise RuntimeError("no rows to take")
            return super().encode(inputs, present)

    with serve(NeedsFirstModality(runtime.bundle, threads=1)) as client:
        assert failing_checks(client, "/readyz") == ["warmed"]
        assert client.post("/embed", json=REQUEST).json()["code"] == "not_ready"


def test_graph_error_fails_its_batch_and_not_the_next(serve: Serve, gated: GatedRuntime) -> None:
    with serve(gated) as client:
        gated.before_encode = fail
        failed = client.post("/embed", json=REQUEST)
        assert (failed.status_code, failed.json()["code"]) == (503, "engine_failed")
        assert int(failed.headers["retry-after"]) >= 1
        assert "broken" not in failed.text
        gated.before_encode = work
        assert client.post("/embed", json=REQUEST).status_code == 200
        assert failing_checks(client, "/readyz") == []


def test_circuit_opens_after_failures_and_closes_when_the_model_works(serve: Serve, gated: GatedRuntime) -> None:
    with serve(gated, circuit_failures=3, circuit_probe_ms=200) as client:
        gated.before_encode = fail
        for _ in range(3):
            assert client.post("/embed", json=REQUEST).json()["code"] == "engine_failed"
        wait_for(lambda: failing_checks(client, "/readyz") == ["circuit"])
        assert failing_checks(client, "/livez") == [], "the thread beats, and a restart would not help"
        assert client.get("/v1/models").json()["data"][0]["state"] == "failing"
        assert "concord_ready 0.0" in client.get("/metrics").text
        runs_before = len(gated.batches)
        gated.close()
        gated.wait_until_entered()  # the next self-test is held inside the graph: a request that waited for it would not return
        runs_held = len(gated.batches)
        for _ in range(10):
            rejected = client.post("/embed", json=REQUEST)
            assert (rejected.status_code, rejected.json()["code"]) == (503, "engine_failed")
            assert rejected.json()["retry_after_ms"] == 200
        assert len(gated.batches) == runs_held, "a rejected request ran"
        gated.open()
        wait_for(lambda: len(gated.batches) >= runs_held + 2, message="the self-tests stopped")
        assert set(gated.batches[runs_before:]) == {1}
        gated.before_encode = work
        wait_for(lambda: failing_checks(client, "/readyz") == [])
        assert client.post("/embed", json=REQUEST).status_code == 200


def test_input_that_breaks_the_model_does_not_open_the_circuit(
    serve: Serve, gated: GatedRuntime, values: dict[str, str]
) -> None:
    """The self-test on blank rows passes, so the fault is in the input."""
    with serve(gated, circuit_failures=2) as client:

        def fail_on_words(inputs: Any, _: Any) -> None:
            if inputs["word"].any():
                raise RuntimeError("this word")

        gated.before_encode = fail_on_words
        for _ in range(8):
            assert client.post("/embed", json=REQUEST).json()["code"] == "engine_failed"
            assert failing_checks(client, "/readyz") == []
            assert client.post("/embed", json={"inputs": [{"digit": values["digit"]}]}).status_code == 200


@pytest.mark.parametrize("busy", [False, True])
def test_death_of_the_inference_thread_fails_requests_and_liveness(serve: Serve, gated: GatedRuntime, busy: bool) -> None:
    """SystemExit is raised in the real thread, while it is idle or inside a graph."""
    threads_before = set(threading.enumerate())
    with serve(gated) as client, ThreadPoolExecutor(8) as pool:
        gated.close()
        requests = [pool.submit(client.post, "/embed", json=REQUEST) for _ in range(8 if busy else 0)]
        if busy:
            gated.wait_until_entered()
        (thread,) = (thread for thread in set(threading.enumerate()) - threads_before if thread.name == "inference")
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        gated.open()
        for request in requests:
            response = request.result()
            assert (response.status_code, response.json()["code"]) == (503, "engine_failed")
        wait_for(lambda: failing_checks(client, "/livez") == ["inference"])
        (check,) = client.get("/livez").json()["checks"].values()
        assert check == "the inference thread has ended", "noticed at once, not by an old heartbeat"
        assert set(failing_checks(client, "/readyz")) == {"inference", "circuit"}
        late = client.post("/embed", json=REQUEST)
        assert (late.status_code, late.json()["code"]) == (503, "engine_failed")


def test_stuck_graph_fails_liveness_and_deadlines_still_hold(serve: Serve, gated: GatedRuntime) -> None:
    with serve(gated, heartbeat_ms=1000) as client, ThreadPoolExecutor(3) as pool:
        leave = threading.Event()
        gated.before_encode = lambda *_: sleep_in_c_until(leave)
        stuck = [pool.submit(client.post, "/embed", json=REQUEST, headers={"X-Request-Timeout-Ms": "800"}) for _ in range(3)]
        wait_for(lambda: failing_checks(client, "/livez") == ["inference"], seconds=30)  # 30 times the heartbeat limit
        assert failing_checks(client, "/readyz") == ["inference"]
        for request in stuck:
            assert request.result().json()["code"] == "deadline_passed"
        leave.set()
        wait_for(lambda: failing_checks(client, "/readyz") == [])
        assert client.post("/embed", json=REQUEST).status_code == 200


def sleep_in_c_until(leave: threading.Event) -> None:
    """Block in calls of C, as a stuck graph does: no Python code runs inside them."""
    while not leave.is_set():
        ctypes.CDLL(None).usleep(100_000)


def test_out_of_memory_halves_the_batches_and_fails_no_request(serve: Serve, gated: GatedRuntime) -> None:
    def limit_memory(rows: int) -> None:
        def check(_: Any, present: Any) -> None:
            if len(present) > rows:
                raise RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 123456")

        gated.before_encode = check

    with serve(gated, max_batch=32) as client:
        limit_memory(10)
        gated.batches.clear()
        for expected in ([32, 16, 8, 8, 16, 8, 8], [8, 8, 8, 8]):
            response = client.post("/embed", json={"inputs": [{"word": "one"}] * 32})
            assert response.status_code == 200
            assert gated.batches == expected
            gated.batches.clear()
        limit_memory(0)  # not even one row fits
        response = client.post("/embed", json=REQUEST)
        assert (response.status_code, response.json()["code"]) == (503, "engine_failed")
        gated.before_encode = work
        assert client.post("/embed", json=REQUEST).status_code == 200


LOST = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=x"


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each time that the process would have ended."""
    ends: list[None] = []
    monkeypatch.setattr(served_model, "exit_soon", lambda: ends.append(None))
    return ends


def lose_device(*_: Any) -> None:
    raise RuntimeError(LOST)


def test_lost_device_fails_liveness_and_ends_the_process_after_few_runs(
    serve: Serve, gated: GatedRuntime, exits: list[None]
) -> None:
    """Every further call of CUDA would fail in the same way. A batch is not run in parts to find the row that is to blame."""
    with serve(gated) as client:
        gated.before_encode = lose_device
        gated.batches.clear()
        response = client.post("/embed", json={"inputs": [{"word": "one"}] * 32})
        assert (response.status_code, response.json()["code"]) == (503, "engine_failed")
        assert "retry-after" in response.headers
        assert gated.batches == [32, 1], "the batch, and one blank row"
        wait_for(lambda: failing_checks(client, "/livez") == ["inference"])
        assert list(client.get("/livez").json()["checks"].values()) == ["the device is lost"]
        assert client.post("/embed", json=REQUEST).status_code == 503
        assert exits == [None]
        assert scrape(client, "concord_device_errors_total", kind="lost") == 1


def test_error_that_only_looks_like_a_lost_device_fails_its_row(serve: Serve, gated: GatedRuntime, exits: list[None]) -> None:
    with serve(gated) as client:

        def fail_on_words(inputs: Any, _: Any) -> None:
            if inputs["word"].any():
                raise RuntimeError(LOST)

        gated.before_encode = fail_on_words
        assert client.post("/embed", json=REQUEST).json()["code"] == "engine_failed"
        assert failing_checks(client, "/livez") == []
        assert not exits
        assert scrape(client, "concord_device_errors_total", kind="other") == 1
        assert scrape(client, "concord_device_errors_total", kind="lost") == 0


def test_device_that_is_lost_at_start_ends_the_process(serve: Serve, gated: GatedRuntime, exits: list[None]) -> None:
    gated.before_encode = lose_device
    with serve(gated) as client:
        assert failing_checks(client, "/livez") == ["inference"]
        assert exits == [None]


def test_model_is_prepared_in_the_inference_thread(serve: Serve, gated: GatedRuntime) -> None:
    """CUDA's libraries keep their state for each thread."""
    threads: set[str] = set()
    gated.before_encode = lambda *_: threads.add(threading.current_thread().name)
    with serve(gated):
        assert threads == {"inference"}


def test_every_batch_size_runs_before_the_first_request(serve: Serve, runtime: Runtime) -> None:
    """Steps too: at its first run a size allocates memory, and on a GPU it may be recorded."""
    fixed = GatedRuntime(runtime.bundle, threads=1, max_batch=5, fixed_batches=True)
    tables: list[RefinementTable] = []
    make_table = fixed.refinement_table
    fixed.refinement_table = lambda capacity: tables.append(make_table(capacity)) or tables[-1]  # type: ignore[func-returns-value]
    with serve(fixed, max_batch=5):
        assert set(fixed.batches) >= {1, 4, 5}
        (table,) = tables
        assert set(table._runs) == {1, 4, 5}
        assert table.free == 512


def test_request_whose_deadline_passes_in_the_queue_is_never_run(serve: Serve, gated: GatedRuntime) -> None:
    with serve(gated) as client, ThreadPoolExecutor(1) as pool:
        gated.close()
        first = pool.submit(client.post, "/embed", json=REQUEST)
        gated.wait_until_entered()
        gated.batches.clear()
        late = client.post("/embed", json={"inputs": [{"word": "two"}] * 5}, headers={"X-Request-Timeout-Ms": "50"})
        assert (late.status_code, late.json()["code"]) == (504, "deadline_passed")
        assert "concord_queue_depth 0.0" in client.get("/metrics").text
        gated.open()
        assert first.result().status_code == 200
        assert client.post("/embed", json=REQUEST).status_code == 200
        assert gated.batches == [1], "the late request ran"


@pytest.mark.slow
def test_budget_returns_the_best_posterior_before_the_deadline(serve: Serve, runtime: Runtime) -> None:
    class SlowRuntime(Runtime):
        """64 steps take at least 3.8 s."""

        def step(self, *args: Any) -> Any:
            time.sleep(0.06)
            return super().step(*args)

    with serve(SlowRuntime(runtime.bundle, threads=1)) as client:
        request = {**REQUEST, "refine": {"steps": 64, "budget_ms": 10_000}}
        response = client.post("/embed", json=request, headers={"X-Request-Timeout-Ms": "3000"})
        refinement = response.json()["data"][0]["refinement"]
        assert (refinement["stopped"], refinement["after"] >= refinement["before"]) == ("budget", True)
        assert 1 <= refinement["steps"] < 64
        request["refine"]["budget_ms"] = None
        assert client.post("/embed", json=request, headers={"X-Request-Timeout-Ms": "1000"}).status_code == 504


def test_diverging_refinement_is_reported_and_returns_the_start(serve: Serve, runtime: Runtime) -> None:
    class DivergingRuntime(Runtime):
        """Refinement diverges, once a test says so."""

        diverges = False

        def step(self, *args: Any) -> Any:
            posterior, objective = super().step(*args)
            return posterior + np.inf if self.diverges else posterior, objective

    diverging = DivergingRuntime(runtime.bundle, threads=1)
    with serve(diverging) as client:
        diverging.diverges = True
        start = client.post("/embed", json=REQUEST).json()["data"][0]["embedding"]
        response = client.post("/embed", json={**REQUEST, "refine": {"steps": 5, "trace": True}})
        (result,) = response.json()["data"]
        refinement = result["refinement"]
        assert (refinement["stopped"], refinement["steps"]) == ("diverged", 0)
        assert refinement["after"] == refinement["before"] == refinement["trace"][0]
        np.testing.assert_allclose(result["embedding"], start, atol=1e-6)
        assert scrape(client, "concord_refine_stops_total", reason="diverged") == 1


def test_large_numbers_are_accepted_up_to_the_limit(serve: Serve, tiny_bundle: bundle.Bundle) -> None:
    """Beyond it no encoder has a finite result. That would look like a fault of the model, and fail the other items."""
    with serve(Runtime(tiny_bundle, threads=1)) as client:
        for number, status in ((1e9, 200), (-1e9, 200), (1e10, 422), (3e38, 422)):
            inputs = [{"vector": [number] * 5}, {"text": "abc"}]
            for path in ("/embed", "/cross-generate"):
                response = client.post(path, json={"inputs": inputs, "refine": {"steps": 3}})
                assert response.status_code == status, response.text
        partial = client.post("/embed", json={"inputs": inputs, "on_error": "partial"}).json()["data"]
        assert partial[0]["error"]["code"] == "bad_vector"
        assert np.isfinite(partial[1]["embedding"]).all()
        assert failing_checks(client, "/readyz") == []


def test_retry_after_is_the_expected_time_of_the_jobs_held(serve: Serve, gated: GatedRuntime) -> None:
    row_seconds, requests, items = 0.01, 20, 8
    with serve(gated, max_queue_items=64) as client, ThreadPoolExecutor(2) as pool:
        gated.before_encode = lambda _, present: time.sleep(row_seconds * len(present))
        began = time.monotonic()
        for _ in range(requests):
            client.post("/embed", json={"inputs": [{"word": "one"}] * items}).raise_for_status()
        gated.close()
        held = [pool.submit(client.post, "/embed", json={"inputs": [{"word": "one"}] * 32}) for _ in range(2)]
        gated.wait_until_entered()  # the engine has accounted for the runs before this one
        measured_row_seconds = (time.monotonic() - began) / (requests * items)
        wait_for(lambda: scrape(client, "concord_queue_depth") == 32)
        rejected = client.post("/embed", json=REQUEST)
        assert rejected.json()["code"] == "queue_full"
        milliseconds = rejected.json()["retry_after_ms"]
        # The lower bound is certain. The engine's average weights recent runs up to 1.23 times as much as the plain average.
        assert 64 * 1000 * row_seconds <= milliseconds <= 1.25 * 64 * 1000 * measured_row_seconds
        assert int(rejected.headers["retry-after"]) == -(-milliseconds // 1000)
        gated.before_encode = work
        gated.open()
        assert [request.result().status_code for request in held] == [200, 200]
        assert client.post("/embed", json=REQUEST).status_code == 200


def test_many_rows_of_one_client_do_not_delay_another(serve: Serve, runtime: Runtime) -> None:
    """Four connections send long refinements of 32 items. Single items without refinement finish between their steps."""

    class SteppedRuntime(Runtime):
        """A refinement step waits for a permit."""

        permits = threading.Semaphore(1000)

        def step(self, *args: Any) -> Any:
            assert self.permits.acquire(timeout=60)
            return super().step(*args)

    stepped = SteppedRuntime(runtime.bundle, threads=1)
    with serve(stepped, max_batch=32) as client, ThreadPoolExecutor(9) as pool:
        stepped.permits = threading.Semaphore(0)
        large = {"inputs": [{"word": "one"}] * 32, "refine": {"steps": 12}}
        held = [pool.submit(client.post, "/embed", json=large) for _ in range(4)]
        wait_for(lambda: scrape(client, "concord_queue_depth") == 96)
        single = [pool.submit(client.post, "/embed", json=REQUEST) for _ in range(5)]
        wait_for(lambda: scrape(client, "concord_queue_depth") == 101)
        stepped.permits.release(4)  # one for each 32 items that arrived before; all steps together need at least 48
        assert {request.result().status_code for request in single} == {200}
        assert not any(request.done() for request in held)
        stepped.permits.release(10_000)
        assert {request.result().status_code for request in held} == {200}
