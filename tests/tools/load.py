"""Long load tests of a service process: ``python -m tests.tools.load COMMAND``. Results are printed as JSON.

Commands: overload, soak, sigterm, reload, kill, poison, disconnect.
"""

import asyncio
import contextlib
import json
import math
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import uvloop

from concord.model import bundle
from concord.service.workers.supervisor import STABLE_SECONDS
from tests.support.bundles import cut_short, write_copy
from tests.support.images import noise_image, to_base64
from tests.support.server import Service, running, running_on_other_cores
from tests.support.traffic import (
    Connections,
    TimedResponse,
    closed_loop,
    count_statuses,
    get,
    mixed_requests,
    open_loop,
    post,
    quantiles,
)

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CLIENTS = 32
LATE_SECONDS = 0.2
"""After the end of a process, until which its connections may break."""
Seconds = Annotated[float, typer.Option(help="Duration of each load in seconds.")]


@cli.command()
def overload(seconds: Seconds = 60.0, steps: int = 16, workers: int = 1) -> None:
    """Send twice and ten times the peak rate of the service, and measure its recovery."""
    with running_on_other_cores(CONCORD_WORKERS=str(workers), CONCORD_READY_SHARE="1") as service:
        _print(measure_overload(service, mixed_requests(steps=steps), (2, 10), seconds))


async def measure_overload(
    service: Service, requests: list[bytes], multiples: tuple[int, ...], seconds: float
) -> dict[str, Any]:
    """Return what happens to requests at each multiple of the peak rate.

    ``retry_after_ms`` is the range of the values in rejections. Both times of recovery count from the last request:
    ``recovered_after_s`` until a request without refinement succeeds, ``settled_after_s`` until a request with refinement takes
    at most twice its time without load.
    """
    async with Connections(service.port) as connections:
        peak = await closed_loop(connections, requests, CLIENTS, min(seconds, 15.0))
        results: dict[str, Any] = {"peak_per_second": round(peak, 1), "resident_mb": service.resident_bytes() >> 20}
        without_load = sorted([(await connections.send(requests[1])).seconds for _ in range(5)])[2]
        for multiple in multiples:
            load = asyncio.create_task(open_loop(connections, requests, multiple * peak, seconds))
            await asyncio.sleep(seconds)
            recovered = await _seconds_until(connections, requests[0], math.inf)
            settled = recovered + await _seconds_until(connections, requests[1], 2 * without_load)
            responses = await load
            accepted = [response for response in responses if response.status == 200]
            rejected = [response for response in responses if response.status == 503]
            end = max(response.due + response.seconds for response in responses)
            duration = end - min(response.due for response in responses)
            waits = [json.loads(response.body)["retry_after_ms"] for response in rejected]
            results[f"{multiple}x"] = {
                "outcomes": count_statuses(responses),
                "accepted_ms": quantiles(accepted),
                "rejected_ms": quantiles(rejected),
                "rejected_in_10_ms": round(await asyncio.to_thread(_rejected_in_10_ms, service), 4),
                "retry_after_ms": [min(waits, default=0), max(waits, default=0)],
                "goodput_of_peak": round(len(accepted) / duration / peak, 3),
                "recovered_after_s": round(recovered, 3),
                "settled_after_s": round(settled, 3),
                "resident_mb": service.resident_bytes() >> 20,
            }
        return results


async def _seconds_until(connections: Connections, request: bytes, seconds: float) -> float:
    """Repeat a request until it succeeds within ``seconds``. Return the time this took."""
    began = time.monotonic()
    while (response := await connections.send(request)).status != 200 or response.seconds > seconds:
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def _rejected_in_10_ms(service: Service) -> float:
    """Return the share of rejections within 10 ms, measured by the service.

    The times of the load generator include its own delays.
    """
    name = "concord_request_duration_seconds"
    routes = ("/embed", "/cross-generate")
    fast = sum(service.metric(f"{name}_bucket", le="0.01", route=route, status="503") for route in routes)
    count = sum(service.metric(f"{name}_count", route=route, status="503") for route in routes)
    return fast / max(1.0, count)


@cli.command()
def soak(minutes: float = 30.0, share: float = 0.7, every: float = 10.0) -> None:
    """Send a share of the peak rate, with new words in every request. Memory, threads and descriptors must not grow."""
    requests = mixed_requests(count=4096)

    async def measure(service: Service) -> dict[str, Any]:
        connections = Connections(service.port)
        peak = await closed_loop(connections, requests, CLIENTS, min(15.0, 30 * minutes))
        series: list[dict[str, float]] = []
        metric_series = _count_metric_series(service)
        began = time.monotonic()

        async def watch() -> None:
            while True:
                series.append(
                    {
                        "s": round(time.monotonic() - began, 1),
                        "resident_mb": round(service.resident_bytes() / 2**20, 1),
                        "threads": service.thread_count(),
                        "descriptors": service.descriptor_count(),
                    }
                )
                await asyncio.sleep(every)

        watcher = asyncio.create_task(watch())
        responses = await open_loop(connections, requests, share * peak, 60 * minutes)
        watcher.cancel()
        settled = series[len(series) // 5 :]
        growth = np.polyfit([p["s"] for p in settled], [p["resident_mb"] for p in settled], 1)[0] if len(settled) > 2 else 0.0
        half = min(response.due for response in responses) + 30 * minutes
        return {
            "peak_per_second": round(peak, 1),
            "outcomes": count_statuses(responses),
            "ms": quantiles(responses),
            "first_half_ms": quantiles([response for response in responses if response.due < half]),
            "second_half_ms": quantiles([response for response in responses if response.due >= half]),
            "resident_mb_per_hour": round(3600 * float(growth), 2),
            "series_of_metrics": [metric_series, _count_metric_series(service)],
            "series": series,
        }

    with running_on_other_cores() as service:
        _print(measure(service))


@cli.command()
def sigterm(tries: int = 20, rate: float = 100.0, seconds: Seconds = 3.0, delay_ms: int = 1000, workers: int = 1) -> None:
    """Send SIGTERM under load, behind a load balancer that polls /readyz, and count lost requests."""
    results = [asyncio.run(sigterm_once(rate, seconds, delay_ms, workers)) for _ in range(tries)]
    clean = sum(result["status"] == 0 and set(result["outcomes"]) == {"200"} for result in results)
    print(json.dumps({"tries": tries, "clean": clean, "each": results}, indent=1))


async def sigterm_once(rate: float, seconds: float, delay_ms: int, workers: int = 1) -> dict[str, Any]:
    """Send requests until a load balancer would stop, over kept and new connections, with a SIGTERM after ``seconds``."""
    with running("--workers", str(workers), CONCORD_READY_SHARE="1", CONCORD_DRAIN_DELAY_MS=str(delay_ms)) as service:
        if workers > 1:
            service.wait_for_workers(workers)
        ready = True

        async def poll_readiness() -> None:
            nonlocal ready
            async with Connections(service.port) as probes:
                while ready:
                    ready = (await probes.send(get("/readyz"))).status == 200
                    await asyncio.sleep(delay_ms / 5000)

        async def terminate() -> None:
            await asyncio.sleep(seconds)
            service.process.send_signal(signal.SIGTERM)

        tasks = asyncio.create_task(poll_readiness()), asyncio.create_task(terminate())
        async with Connections(service.port) as connections:
            responses = await open_loop(connections, mixed_requests(), rate, 60.0, lambda: ready)
            await asyncio.gather(*tasks)
        status = await asyncio.to_thread(service.process.wait, 60)
        return {"outcomes": count_statuses(responses), "ms": quantiles(responses), "status": status}


@cli.command()
def reload(count: int = 50, rate: float = 50.0, workers: int = 1) -> None:
    """Replace the served bundle under load, by intact and truncated bundles in turn."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "served"
        shutil.copytree(bundle.builtin(bundle.DEFAULT_BUNDLE), path)
        with running("--workers", str(workers), "--bundle", str(path), CONCORD_WATCH_SECONDS="0") as service:
            if workers > 1:
                service.wait_for_workers(workers)
            _print(reload_under_load(service, path, count, rate))


async def reload_under_load(service: Service, path: Path, count: int, rate: float) -> dict[str, Any]:
    """Replace the bundle ``count`` times under load. A replacement is complete when /v1/models reports its result."""
    reloads = 0
    resident: list[int] = []

    async def replace_bundles() -> None:
        nonlocal reloads
        async with Connections(service.port) as connections:
            for number in range(count):
                intact = number % 2 == 0
                await asyncio.to_thread(replace_bundle, path, f"{number}.0", intact=intact)
                service.process.send_signal(signal.SIGHUP)
                expected = ("ready", f"{number}.0") if intact else ("failed", f"{number - 1}.0")
                async with asyncio.timeout(60):
                    while await model_state(connections) != expected:
                        await asyncio.sleep(0.02)
                reloads += 1
                resident.append(service.resident_bytes() >> 20)

    async def model_state(connections: Connections) -> tuple[str, str]:
        (model,) = json.loads((await connections.send(get("/v1/models"))).body)["data"]
        return model["state"], model["version"]

    replacing = asyncio.create_task(replace_bundles())
    async with Connections(service.port) as connections:
        responses = await open_loop(connections, mixed_requests(), rate, 3600.0, lambda: not replacing.done())
    await replacing
    return {
        "reloads": reloads,
        "outcomes": count_statuses(responses),
        "ms": quantiles(responses),
        "resident_mb": resident,
        "threads": service.thread_count(),
        "descriptors": service.descriptor_count(),
    }


def replace_bundle(path: Path, version: str, *, intact: bool) -> None:
    """Replace a bundle atomically by another version. Unless ``intact``, truncate its weights afterwards."""
    write_copy(path, version=version)
    if not intact:
        cut_short(path)


@cli.command()
def kill(tries: int = 20, rate: float = 20.0, workers: int = 2) -> None:
    """Kill a worker under load, and measure what is lost and how long the service has one worker less."""
    results = []
    with running("--workers", str(workers)) as service:
        service.wait_for_workers(workers)
        for _ in range(tries):
            time.sleep(STABLE_SECONDS)  # a worker that has just been started would be started again with a delay
            results.append(asyncio.run(kill_under_load(service, rate)))
    print(json.dumps(results, indent=1))


async def kill_under_load(service: Service, rate: float) -> dict[str, Any]:
    """Kill the first worker under load. Return the outcomes, the faults that came later than its end, and the seconds until it
    was replaced."""
    (number, pid), *_ = service.workers().items()
    killed = replaced = 0.0

    async def kill_and_wait() -> None:
        nonlocal killed, replaced
        await asyncio.sleep(0.5)
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        while service.workers()[number] == pid:
            await asyncio.sleep(0.02)
        replaced = time.monotonic()
        await asyncio.sleep(0.5)

    killing = asyncio.create_task(kill_and_wait())
    async with Connections(service.port) as connections:
        responses = await open_loop(connections, mixed_requests(), rate, 60.0, lambda: not killing.done())
        await killing
    late = [r for r in responses if r.status != 200 and r.due + r.seconds > killed + LATE_SECONDS]
    return {
        "outcomes": count_statuses(responses),
        "late_faults": len(late),
        "replaced_after_s": round(replaced - killed, 2),
        "ms": quantiles(responses),
    }


@cli.command()
def poison(rounds: int = 100) -> None:
    """Send sixteen requests at a time, one of them with a truncated image. The others must not fail."""
    with running() as service:
        _print(measure_poison(service, rounds))


async def measure_poison(service: Service, rounds: int) -> dict[str, Any]:
    invalid = post("/embed", {"inputs": [{"photo": to_base64(noise_image(0)[:200])}]})
    valid = mixed_requests(count=15)
    failed: list[TimedResponse] = []
    reported = 0
    async with Connections(service.port) as connections:
        for number in range(rounds):
            batch = [*valid[: number % 16], invalid, *valid[number % 16 :]]
            responses = await asyncio.gather(*(connections.send(request) for request in batch))
            of_invalid = responses.pop(number % 16)
            reported += of_invalid.status == 400 and json.loads(of_invalid.body)["errors"][0]["pointer"] == "/inputs/0/photo"
            failed += [response for response in responses if response.status != 200]
    return {"rounds": rounds, "valid_requests_failed": len(failed), "responses_400_with_pointer": reported}


@cli.command()
def disconnect(count: int = 10_000) -> None:
    """Close connections at every stage of a request. The service must not keep resources of them."""
    with running() as service:
        _print(measure_disconnects(service, count))


async def measure_disconnects(service: Service, count: int) -> dict[str, Any]:
    """Return the resources of the service before and after ``count`` clients disconnect, and how many it has counted."""
    complete = [post("/embed", {"inputs": [{"word": "seven"}] * 8, "refine": {"steps": steps}}) for steps in (0, 32)]
    # What a client sends, and the seconds until it disconnects.
    stages = [(complete[0][:50], 0.0), (complete[0][:-1], 0.002), (complete[0], 0.0), (complete[0], 0.004), (complete[1], 0.02)]

    async def disconnect_one(number: int) -> None:
        request, wait = stages[number % len(stages)]
        _, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(request)
        await asyncio.sleep(wait)
        if number % 2:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    def counted() -> float:
        """Return the requests that the service has rejected because of the disconnect, or completed."""
        rejected = service.metric("concord_rejections_total", reason="client_gone")
        return rejected + service.metric("concord_request_duration_seconds_count", route="/embed", status="200")

    async def state() -> tuple[int, int, int, float]:
        requests = await asyncio.to_thread(counted)
        return service.descriptor_count(), service.thread_count(), service.resident_bytes() >> 20, requests

    async def disconnect_all(count: int) -> None:
        for start in range(0, count, 20):
            await asyncio.gather(*(disconnect_one(number) for number in range(start, min(count, start + 20))))
        idle = 0
        async with asyncio.timeout(30):
            while idle < 5:  # the service notices the last disconnects with a delay
                idle = idle + 1 if await asyncio.to_thread(service.metric, "concord_requests_in_flight") == 1 else 0

    await disconnect_all(500)  # the first requests allocate resources that stay
    before = await state()
    await disconnect_all(count)
    after = await state()
    incomplete_heads = sum(number % len(stages) == 0 for number in range(count))  # never reach the application
    return {
        "disconnected": count,
        "counted": int(after[3] - before[3]) + incomplete_heads,
        "in_flight": service.metric("concord_requests_in_flight"),
        "queue_depth": service.metric("concord_queue_depth"),
        "descriptors": [before[0], after[0]],
        "threads": [before[1], after[1]],
        "resident_mb": [before[2], after[2]],
    }


def _count_metric_series(service: Service) -> int:
    return sum(not line.startswith("#") for line in service.client.get("/metrics").text.splitlines())


def _print(measurement: Any) -> None:
    """Run a measurement and print its result."""
    print(json.dumps(uvloop.run(measurement), indent=1))


if __name__ == "__main__":
    cli()
