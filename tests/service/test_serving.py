import contextlib
import ctypes
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from model import bundle
from model.runtime import Posterior, Runtime

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


def test_a_graph_that_fails_for_want_of_a_modality_keeps_the_service_from_being_ready(serve: Serve, runtime: Runtime) -> None:
    """Golden examples may all be complete. Most requests are not."""

    class Demanding(Runtime):
        def encode(self, inputs: Any, present: Any) -> Posterior:
            if not present[:, 0].any():
                raise RuntimeError("no rows to take")
            return super().encode(inputs, present)

    with serve(Demanding(runtime.bundle, threads=1)) as client:
        assert failing(client, "/readyz") == ["warmed"]
        assert client.post("/embed", json=WORD).json()["code"] == "not_ready"


class Faulty(Runtime):
    """The real graphs, with a fault before them that a test switches on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fault: Callable[[int], None] = lambda _: None
        self.batches: list[int] = []

    def encode(self, inputs: Any, present: Any) -> Posterior:
        self.batches.append(len(present))
        self.fault(len(present))
        return super().encode(inputs, present)


@pytest.fixture
def faulty(runtime: Runtime) -> Faulty:
    return Faulty(runtime.bundle, threads=1)


def broken(_: int) -> None:
    raise RuntimeError("the graph is broken")


WORD = {"inputs": [{"word": "one"}]}


def wait_for(condition: Callable[[], bool], seconds: float) -> float:
    """How long it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "this never came true"
        time.sleep(0.01)
    return time.monotonic() - started


def failing(client: httpx.Client, path: str) -> list[str]:
    """Names of the checks that fail, without the model's."""
    response = client.get(path)
    checks = response.json()["checks"]
    names = [name.rpartition("/")[2] for name, answer in checks.items() if answer != "ok"]
    assert response.status_code == (503 if names else 200)
    return names


def test_a_fault_fails_its_batch_and_the_next_is_fine(serve: Serve, faulty: Faulty) -> None:
    with serve(faulty) as client:
        faulty.fault = broken
        failed = client.post("/embed", json=WORD)
        assert (failed.status_code, failed.json()["code"]) == (503, "engine_failed")
        assert int(failed.headers["retry-after"]) >= 1
        assert "broken" not in failed.text
        faulty.fault = lambda _: None
        assert client.post("/embed", json=WORD).status_code == 200
        assert failing(client, "/readyz") == []


def test_faults_in_a_row_open_the_circuit_until_the_model_works(serve: Serve, faulty: Faulty) -> None:
    with serve(faulty, circuit_failures=3, circuit_probe_ms=200) as client:
        faulty.fault = broken
        for _ in range(3):
            assert client.post("/embed", json=WORD).json()["code"] == "engine_failed"
        wait_for(lambda: failing(client, "/readyz") == ["circuit"], 2)
        assert failing(client, "/livez") == [], "a restart would not help at once, and the thread beats"
        assert client.get("/v1/models").json()["data"][0]["state"] == "failing"
        assert "concord_ready 0.0" in client.get("/metrics").text
        run = len(faulty.batches)
        waits = []
        for _ in range(10):
            refused = client.post("/embed", json=WORD)
            assert (refused.status_code, refused.json()["code"]) == (503, "engine_failed")
            assert refused.json()["retry_after_ms"] == 200
            waits.append(refused.elapsed.total_seconds())
        assert statistics.median(waits) < 0.1, "refused at once, and not after the next probe"
        probes = len(faulty.batches) - run
        assert set(faulty.batches[run:]) <= {1}
        assert probes <= 10, "what is refused does not run"
        faulty.fault = lambda _: None
        wait_for(lambda: failing(client, "/readyz") == [], 2)
        assert client.post("/embed", json=WORD).status_code == 200


def test_what_only_one_client_breaks_does_not_open_the_circuit(serve: Serve, faulty: Faulty, values: dict[str, str]) -> None:
    """Rows that nobody sent come through, so the fault is in what was sent."""
    with serve(faulty, circuit_failures=2) as client:
        encode = faulty.encode

        def poisoned(inputs: Any, present: Any) -> Posterior:
            if inputs["word"].any():
                raise RuntimeError("this word")
            return encode(inputs, present)

        faulty.encode = poisoned  # type: ignore[method-assign]
        for _ in range(8):
            assert client.post("/embed", json=WORD).json()["code"] == "engine_failed"
            assert failing(client, "/readyz") == []
            assert client.post("/embed", json={"inputs": [{"digit": values["digit"]}]}).status_code == 200


@pytest.mark.parametrize("busy", [False, True])
def test_when_the_inference_thread_is_killed_nobody_waits(serve: Serve, faulty: Faulty, busy: bool) -> None:
    """SystemExit is raised in the real thread, wherever it is."""
    others = set(threading.enumerate())
    with serve(faulty) as client, ThreadPoolExecutor(8) as pool:
        entered, leave = threading.Event(), threading.Event()

        def hold(_: int) -> None:
            entered.set()
            leave.wait(20)

        faulty.fault = hold
        asked = [pool.submit(client.post, "/embed", json=WORD) for _ in range(8 if busy else 0)]
        if busy:
            assert entered.wait(20)
        (thread,) = (thread for thread in set(threading.enumerate()) - others if thread.name == "inference")
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
        leave.set()
        for future in asked:
            answer = future.result(timeout=5)
            assert (answer.status_code, answer.json()["code"]) == (503, "engine_failed")
        assert wait_for(lambda: failing(client, "/livez") == ["inference"], 5) < 2
        assert set(failing(client, "/readyz")) == {"inference", "circuit"}
        late = client.post("/embed", json=WORD)
        assert (late.status_code, late.json()["code"]) == (503, "engine_failed")
        assert late.elapsed.total_seconds() < 0.5


def test_a_run_that_hangs_fails_liveness_and_deadlines_still_hold(serve: Serve, faulty: Faulty) -> None:
    with serve(faulty, heartbeat_ms=1000) as client, ThreadPoolExecutor(3) as pool:
        leave = threading.Event()
        faulty.fault = lambda _: libc_sleep_until(leave)
        stuck = [pool.submit(client.post, "/embed", json=WORD, headers={"X-Request-Timeout-Ms": "800"}) for _ in range(3)]
        assert wait_for(lambda: failing(client, "/livez") == ["inference"], 5) < 2.5
        assert failing(client, "/readyz") == ["inference"]
        for future in stuck:
            assert future.result(timeout=5).json()["code"] == "deadline_passed"
        leave.set()
        wait_for(lambda: failing(client, "/readyz") == [], 5)
        assert client.post("/embed", json=WORD).status_code == 200


def libc_sleep_until(leave: threading.Event) -> None:
    """Calls of C, as a stuck graph is one: Python gets no say inside."""
    while not leave.is_set():
        ctypes.CDLL(None).usleep(100_000)


def test_memory_that_runs_out_halves_the_batches_and_fails_nobody(serve: Serve, faulty: Faulty) -> None:
    with serve(faulty, max_batch=32) as client:

        def scarce(rows: int) -> None:
            if rows > 10:
                raise RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 123456")

        faulty.fault = scarce
        faulty.batches.clear()
        for expected in ([32, 16, 8, 8, 16, 8, 8], [8, 8, 8, 8]):
            answer = client.post("/embed", json={"inputs": [{"word": "one"}] * 32})
            assert answer.status_code == 200
            assert faulty.batches == expected
            faulty.batches.clear()
        faulty.fault = lambda rows: scarce(rows + 10)  # not even one row fits
        answer = client.post("/embed", json=WORD)
        assert (answer.status_code, answer.json()["code"]) == (503, "engine_failed")
        faulty.fault = lambda _: None
        assert client.post("/embed", json=WORD).status_code == 200


def test_a_deadline_that_passes_in_the_queue_costs_no_work(serve: Serve, faulty: Faulty) -> None:
    with serve(faulty) as client, ThreadPoolExecutor(1) as pool:
        entered, leave = threading.Event(), threading.Event()

        def hold(_: int) -> None:
            entered.set()
            leave.wait(20)

        faulty.fault = hold
        first = pool.submit(client.post, "/embed", json=WORD)
        assert entered.wait(20)
        faulty.batches.clear()
        late = client.post("/embed", json={"inputs": [{"word": "two"}] * 5}, headers={"X-Request-Timeout-Ms": "50"})
        assert (late.status_code, late.json()["code"]) == (504, "deadline_passed")
        assert "concord_queue_depth 0.0" in client.get("/metrics").text
        leave.set()
        assert first.result().status_code == 200
        assert client.post("/embed", json=WORD).status_code == 200
        assert faulty.batches == [1], "the five never ran"


def test_a_budget_answers_with_the_best_there_is_before_the_deadline(serve: Serve, runtime: Runtime) -> None:
    class Slow(Runtime):
        def refine(self, *args: Any) -> Any:
            time.sleep(0.05)
            return super().refine(*args)

    with serve(Slow(runtime.bundle, threads=1)) as client:
        asked = {**WORD, "refine": {"steps": 64, "budget_ms": 10_000}}
        answer = client.post("/embed", json=asked, headers={"X-Request-Timeout-Ms": "1000"})
        told = answer.json()["data"][0]["refinement"]
        assert (told["stopped"], told["after"] >= told["before"]) == ("budget", True)
        assert 1 <= told["steps"] < 64
        asked["refine"]["budget_ms"] = None
        assert client.post("/embed", json=asked, headers={"X-Request-Timeout-Ms": "1000"}).status_code == 504


def test_refinement_that_diverges_is_told_and_the_aligned_posterior_kept(serve: Serve, runtime: Runtime) -> None:
    class Unsteady(Runtime):
        """Every step leads nowhere, once the golden examples are through."""

        steady = True

        def refine(self, *given: Any) -> Any:
            posterior, objective = super().refine(*given)
            return posterior if self.steady else Posterior(posterior.mean + np.inf, posterior.log_var), objective

    unsteady = Unsteady(runtime.bundle, threads=1)
    with serve(unsteady) as client:
        unsteady.steady = False
        aligned = client.post("/embed", json=WORD).json()["data"][0]["embedding"]
        answer = client.post("/embed", json={**WORD, "refine": {"steps": 5, "trace": True}})
        (told,) = answer.json()["data"]
        assert (told["refinement"]["stopped"], told["refinement"]["steps"]) == ("diverged", 0)
        assert told["refinement"]["after"] == told["refinement"]["before"] == told["refinement"]["trace"][0]
        np.testing.assert_allclose(told["embedding"], aligned, atol=1e-6)
        assert 'concord_refine_stops_total{reason="diverged"} 1.0' in client.get("/metrics").text


def test_numbers_at_the_end_of_the_range_get_an_answer_and_beyond_a_reason(serve: Serve, tiny_bundle: bundle.Bundle) -> None:
    """What no encoder has a finite answer to would look like a fault of the model, and fail its neighbours in the request."""
    with serve(Runtime(tiny_bundle, threads=1)) as client:
        for number, status in ((1e9, 200), (-1e9, 200), (1e10, 422), (3e38, 422)):
            inputs = [{"vector": [number] * 5}, {"text": "abc"}]
            for path in ("/embed", "/cross-generate"):
                answer = client.post(path, json={"inputs": inputs, "refine": {"steps": 3}})
                assert answer.status_code == status, answer.text
        partial = client.post("/embed", json={"inputs": inputs, "on_error": "partial"}).json()["data"]
        assert partial[0]["error"]["code"] == "bad_vector"
        assert np.isfinite(partial[1]["embedding"]).all()
        assert failing(client, "/readyz") == []


def test_the_wait_that_is_told_is_that_of_the_work_held(serve: Serve, faulty: Faulty) -> None:
    with serve(faulty, max_queue_items=64) as client, ThreadPoolExecutor(2) as pool:
        faulty.fault = lambda rows: time.sleep(0.02 * rows)
        eight = {"inputs": [{"word": "one"}] * 8}
        slowest = max(client.post("/embed", json=eight).elapsed.total_seconds() for _ in range(20))  # the pace is an average
        leave = threading.Event()
        faulty.fault = lambda _: leave.wait(20) and None
        held = [pool.submit(client.post, "/embed", json={"inputs": [{"word": "one"}] * 32}) for _ in range(2)]
        wait_for(lambda: "concord_queue_depth 32.0" in client.get("/metrics").text, 20)
        refused = client.post("/embed", json=WORD)
        assert refused.json()["code"] == "queue_full"
        milliseconds = refused.json()["retry_after_ms"]
        assert 64 * 20 <= milliseconds <= 64 * 1000 * slowest / 8, "64 items of 20 ms each, or what they really took"
        assert int(refused.headers["retry-after"]) == -(-milliseconds // 1000)
        leave.set()
        assert [future.result().status_code for future in held] == [200, 200]
        assert client.post("/embed", json=WORD).status_code == 200


def test_many_rows_of_one_client_do_not_shut_out_another(serve: Serve, runtime: Runtime) -> None:
    """Long refinements of 32 items from four connections; single items without refinement come through between their steps."""

    class Stepwise(Runtime):
        """A step of refinement needs leave."""

        leave = threading.Semaphore(1000)

        def refine(self, *given: Any) -> Any:
            assert self.leave.acquire(timeout=20)
            return super().refine(*given)

    stepwise = Stepwise(runtime.bundle, threads=1)
    with serve(stepwise, max_batch=32) as client, ThreadPoolExecutor(9) as pool:
        stepwise.leave = threading.Semaphore(0)
        greedy = {"inputs": [{"word": "one"}] * 32, "refine": {"steps": 12}}
        held = [pool.submit(client.post, "/embed", json=greedy) for _ in range(4)]
        wait_for(lambda: "concord_queue_depth 96.0" in client.get("/metrics").text, 20)
        single = [pool.submit(client.post, "/embed", json=WORD) for _ in range(5)]
        wait_for(lambda: "concord_queue_depth 101.0" in client.get("/metrics").text, 20)
        stepwise.leave.release(4)  # of 48 steps and more: one for each 32 items that came before
        assert {future.result(timeout=20).status_code for future in single} == {200}
        assert not any(future.done() for future in held)
        stepwise.leave.release(10_000)
        assert {future.result().status_code for future in held} == {200}
