"""Long runs against a service of their own: ``python -m tests.load overload``, soak, sigterm, reload, poison, leave. JSON."""

import asyncio
import base64
import contextlib
import json
import math
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import uvloop

from model import bundle
from tests.copies import cut_short, write_copy
from tests.server import Service, running, running_apart
from tests.traffic import Answer, Connections, closed, flow, get, mixed, outcomes, png, post, quantiles

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
CLIENTS = 32
Seconds = Annotated[float, typer.Option(help="Length of each part.")]


@cli.command()
def overload(seconds: Seconds = 60.0, steps: int = 16) -> None:
    """Two and ten times what the service can do, and how it is a moment later."""
    with running_apart() as service:
        _print(overloaded(service, mixed(steps=steps), (2, 10), seconds))


async def overloaded(service: Service, requests: list[bytes], times: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """What becomes of each multiple of the peak.

    ``retry_after_ms`` is what the refused were told. After the last was sent, ``recovered_after_s`` is when one more request
    without refinement has its answer, ``settled_after_s`` when one with it is answered within twice the time it takes alone.
    """
    async with Connections(service.port) as connections:
        peak = await closed(connections, requests, CLIENTS, min(seconds, 15.0))
        told: dict[str, Any] = {"peak_per_second": round(peak, 1), "resident_mb": service.resident() >> 20}
        alone = sorted([(await connections.ask(requests[1])).seconds for _ in range(5)])[2]
        for multiple in times:
            sending = asyncio.create_task(flow(connections, requests, multiple * peak, seconds))
            await asyncio.sleep(seconds)
            recovered = await _until(connections, requests[0], math.inf)
            settled = recovered + await _until(connections, requests[1], 2 * alone)
            answers = await sending
            accepted = [answer for answer in answers if answer.status == 200]
            refused = [answer for answer in answers if answer.status == 503]
            took = max(answer.due + answer.seconds for answer in answers) - min(answer.due for answer in answers)
            waits = [json.loads(answer.body)["retry_after_ms"] for answer in refused]
            told[f"{multiple}x"] = {
                "outcomes": outcomes(answers),
                "accepted_ms": quantiles(accepted),
                "rejected_ms": quantiles(refused),
                "rejected_in_10_ms": round(await asyncio.to_thread(_refused_in_10_ms, service), 4),
                "retry_after_ms": [min(waits, default=0), max(waits, default=0)],
                "goodput_of_peak": round(len(accepted) / took / peak, 3),
                "recovered_after_s": round(recovered, 3),
                "settled_after_s": round(settled, 3),
                "resident_mb": service.resident() >> 20,
            }
        return told


async def _until(connections: Connections, request: bytes, seconds: float) -> float:
    """Ask until it is answered within so many seconds. How long that took."""
    began = time.monotonic()
    while (answer := await connections.ask(request)).status != 200 or answer.seconds > seconds:
        await asyncio.sleep(0.02)
    return time.monotonic() - began


def _refused_in_10_ms(service: Service) -> float:
    """The share, by the service's own clock: what the generator sees has waited for the generator too."""
    name = "concord_request_duration_seconds"
    labels = [f'route="{route}",status="503"}}' for route in ("/embed", "/cross-generate")]
    fast, all_ = (sum(service.metric(f"{name}_{kind}{label}") for label in labels) for kind in ('bucket{le="0.01",', "count{"))
    return fast / max(1.0, all_)


@cli.command()
def soak(minutes: float = 30.0, share: float = 0.7, every: float = 10.0) -> None:
    """A share of what the service can do, with words never seen before; memory, threads and descriptors must stay."""
    requests = mixed(count=4096)

    async def measure(service: Service) -> dict[str, Any]:
        connections = Connections(service.port)
        peak = await closed(connections, requests, CLIENTS, min(15.0, 30 * minutes))
        series: list[dict[str, float]] = []
        labels = _series_of_metrics(service)
        began = time.monotonic()

        async def watch() -> None:
            while True:
                series.append(
                    {
                        "s": round(time.monotonic() - began, 1),
                        "resident_mb": round(service.resident() / 2**20, 1),
                        "threads": service.threads(),
                        "descriptors": service.descriptors(),
                    }
                )
                await asyncio.sleep(every)

        watching = asyncio.create_task(watch())
        answers = await flow(connections, requests, share * peak, 60 * minutes)
        watching.cancel()
        settled = series[len(series) // 5 :]
        slope = np.polyfit([p["s"] for p in settled], [p["resident_mb"] for p in settled], 1)[0] if len(settled) > 2 else 0.0
        half = min(a.due for a in answers) + 30 * minutes
        return {
            "peak_per_second": round(peak, 1),
            "outcomes": outcomes(answers),
            "ms": quantiles(answers),
            "first_half_ms": quantiles([a for a in answers if a.due < half]),
            "second_half_ms": quantiles([a for a in answers if a.due >= half]),
            "resident_mb_per_hour": round(3600 * float(slope), 2),
            "series_of_metrics": [labels, _series_of_metrics(service)],
            "series": series,
        }

    with running_apart() as service:
        _print(measure(service))


@cli.command()
def sigterm(tries: int = 20, rate: float = 100.0, seconds: Seconds = 3.0, delay_ms: int = 1000) -> None:
    """SIGTERM under load, behind a balancer that asks /readyz: what was lost?"""
    told = [asyncio.run(sigterm_once(rate, seconds, delay_ms)) for _ in range(tries)]
    clean = sum(one["status"] == 0 and set(one["outcomes"]) == {"200"} for one in told)
    print(json.dumps({"tries": tries, "clean": clean, "each": told}, indent=1))


async def sigterm_once(rate: float, seconds: float, delay_ms: int) -> dict[str, Any]:
    """Traffic until a balancer would send no more. Some connections are kept, some new."""
    with running(CONCORD_DRAIN_DELAY_MS=str(delay_ms)) as service:
        ready = True

        async def balance() -> None:
            nonlocal ready
            async with Connections(service.port) as probes:
                while ready:
                    ready = (await probes.ask(get("/readyz"))).status == 200
                    await asyncio.sleep(delay_ms / 5000)

        async def end() -> None:
            await asyncio.sleep(seconds)
            service.process.send_signal(signal.SIGTERM)

        balancing, ending = asyncio.create_task(balance()), asyncio.create_task(end())
        async with Connections(service.port) as connections:
            answers = await flow(connections, mixed(), rate, 60.0, lambda: ready)
            await asyncio.gather(balancing, ending)
        status = await asyncio.to_thread(service.process.wait, 60)
        return {"outcomes": outcomes(answers), "ms": quantiles(answers), "status": status}


@cli.command()
def reload(count: int = 50, rate: float = 50.0) -> None:
    """Good and corrupt bundles by turns, under load."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "served"
        shutil.copytree(bundle.builtin(bundle.DEFAULT_BUNDLE), place)
        with running("--bundle", str(place), CONCORD_WATCH_SECONDS="0") as service:
            _print(reload_under_load(service, place, count, rate))


async def reload_under_load(service: Service, place: Path, count: int, rate: float) -> dict[str, Any]:
    """A bundle that is put in place counts as seen when /v1/models says so."""
    seen = 0
    resident: list[int] = []

    async def exchange() -> None:
        nonlocal seen
        async with Connections(service.port) as connections:
            for number in range(count):
                good = number % 2 == 0
                await asyncio.to_thread(exchange_bundle, place, f"{number}.0", good)
                service.process.send_signal(signal.SIGHUP)
                expected = ("ready", f"{number}.0") if good else ("failed", f"{number - 1}.0")
                async with asyncio.timeout(60):
                    while await state(connections) != expected:
                        await asyncio.sleep(0.02)
                seen += 1
                resident.append(service.resident() >> 20)

    async def state(connections: Connections) -> tuple[str, str]:
        (model,) = json.loads((await connections.ask(get("/v1/models"))).body)["data"]
        return model["state"], model["version"]

    exchanging = asyncio.create_task(exchange())
    async with Connections(service.port) as connections:
        answers = await flow(connections, mixed(), rate, 3600.0, lambda: not exchanging.done())
    await exchanging
    return {
        "reloads": seen,
        "outcomes": outcomes(answers),
        "ms": quantiles(answers),
        "resident_mb": resident,
        "threads": service.threads(),
        "descriptors": service.descriptors(),
    }


def exchange_bundle(place: Path, version: str, good: bool) -> None:
    """Put another version in the place of a bundle, in one step; one that is not good is cut short then."""
    write_copy(place, version=version)
    if not good:
        cut_short(place)


@cli.command()
def poison(rounds: int = 100) -> None:
    """Sixteen requests at once, one of them with a picture that is cut short."""
    with running() as service:
        _print(poisoned(service, rounds))


async def poisoned(service: Service, rounds: int) -> dict[str, Any]:
    broken = post("/embed", {"inputs": [{"photo": base64.b64encode(png(0)[:200]).decode()}]})
    innocent = mixed(count=15)
    failed: list[Answer] = []
    pointed = 0
    async with Connections(service.port) as connections:
        for number in range(rounds):
            batch = [*innocent[: number % 16], broken, *innocent[number % 16 :]]
            answers = await asyncio.gather(*(connections.ask(request) for request in batch))
            guilty = answers.pop(number % 16)
            told = json.loads(guilty.body)
            pointed += guilty.status == 400 and told["errors"][0]["pointer"] == "/inputs/0/photo"
            failed += [answer for answer in answers if answer.status != 200]
    return {"rounds": rounds, "innocent_failures": len(failed), "answers_400_with_pointer": pointed}


@cli.command()
def leave(count: int = 10_000) -> None:
    """Clients that go away at every stage of a request: nothing may stay behind."""
    with running() as service:
        _print(left(service, count))


async def left(service: Service, count: int) -> dict[str, Any]:
    whole = [post("/embed", {"inputs": [{"word": "seven"}] * 8, "refine": {"steps": steps}}) for steps in (0, 32)]
    stages = [(whole[0][:50], 0.0), (whole[0][:-1], 0.002), (whole[0], 0.0), (whole[0], 0.004), (whole[1], 0.02)]
    counters = (
        'concord_rejections_total{reason="client_gone"}',
        'concord_request_duration_seconds_count{route="/embed",status="200"}',
    )

    async def one(number: int) -> None:
        request, wait = stages[number % len(stages)]
        _, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(request)
        await asyncio.sleep(wait)
        if number % 2:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def state() -> tuple[int, int, int, float]:
        told = await asyncio.to_thread(lambda: sum(service.metric(line) for line in counters))
        return service.descriptors(), service.threads(), service.resident() >> 20, told

    async def all_leave(count: int) -> None:
        for start in range(0, count, 20):
            await asyncio.gather(*(one(number) for number in range(start, min(count, start + 20))))
        quiet = 0
        async with asyncio.timeout(30):
            while quiet < 5:  # the last of them are seen a little later
                quiet = quiet + 1 if await asyncio.to_thread(service.metric, "concord_requests_in_flight") == 1 else 0

    await all_leave(500)  # what the first ones need stays
    before = await state()
    await all_leave(count)
    after = await state()
    heads = sum(number % len(stages) == 0 for number in range(count))  # which no application ever heard of
    return {
        "left": count,
        "counted_or_answered": int(after[3] - before[3]) + heads,
        "in_flight": service.metric("concord_requests_in_flight"),
        "queue_depth": service.metric("concord_queue_depth"),
        "descriptors": [before[0], after[0]],
        "threads": [before[1], after[1]],
        "resident_mb": [before[2], after[2]],
    }


def _series_of_metrics(service: Service) -> int:
    return sum(not line.startswith("#") for line in service.client.get("/metrics").text.splitlines())


def _print(measured: Any) -> None:
    print(json.dumps(uvloop.run(measured), indent=1))


if __name__ == "__main__":
    cli()
