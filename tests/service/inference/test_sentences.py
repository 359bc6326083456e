"""Texts of an autoregressive decoder depend on their own row, seed and options only."""

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any

import httpx
import numpy as np
import pytest

from concord.model import bundle
from concord.model.codec import render
from concord.model.runtime import Runtime
from concord.service.inference.engine import Engine
from concord.service.inference.jobs import InferenceJob, InferenceResult, QueueFull, RefinementLimits
from concord.service.inference.refinement import Stream, noise, token_noise
from concord.service.inference.scheduler import NullObserver, Row, Scheduler
from tests.support.runtimes import GatedRuntime

CAPTION = 1
"""Position of the modality in the bundle."""


@pytest.fixture(scope="module")
def sentences(sentence_bundle: bundle.Bundle) -> Runtime:
    return Runtime(sentence_bundle, threads=1)


def run(runtime: Runtime, *jobs: InferenceJob, max_batch: int = 64) -> list[InferenceResult]:
    scheduler = Scheduler(runtime, max_batch=max_batch, observer=NullObserver())
    rows = [Row(job, monotonic()) for job in jobs]
    for start in range(0, len(rows), max_batch):
        scheduler.add(rows[start : start + max_batch])
    while scheduler.active:
        scheduler.step()
    results = [row.result for row in rows]
    assert all(isinstance(result, InferenceResult) for result in results), results
    return results  # type: ignore[return-value]


def make_job(index: int = 0, seed: int = 7, samples: int = 3, **options: Any) -> InferenceJob:
    image = np.random.default_rng(index).random((1, 8, 8), dtype=np.float32)
    return InferenceJob({"image": image}, seed, index, targets=("caption", "code"), num_samples=samples, **options)


def test_texts_are_those_of_the_noise_of_their_row(sentences: Runtime) -> None:
    job = make_job(index=4, text_temperature=0.8, top_p=0.9)
    (result,) = run(sentences, job)
    z = result.mean + np.exp(result.log_var / 2) * noise(7, 4, Stream.GENERATE, 3, sentences.latent)
    options = np.full(3, 0.8, np.float32), np.full(3, 0.9, np.float32)
    expected = sentences.sample_text("caption", z.astype(np.float32), token_noise(7, 4, CAPTION, 3, 7), *options)
    np.testing.assert_array_equal(result.generated["caption"], expected)


def test_text_of_a_row_does_not_depend_on_the_rest_of_the_batch(sentences: Runtime) -> None:
    jobs = [
        make_job(
            index,
            seed=index % 3,
            samples=1 + index % 4,
            text_temperature=(0.0, 1.0, 0.7)[index % 3],
            top_p=(0.3, 0.6, 1.0)[index // 3 % 3],
        )
        for index in range(24)
    ]
    jobs[5:10] = [
        InferenceJob(job.row, job.seed, job.index, refine=RefinementLimits(steps=2), targets=("caption",), text_temperature=1.0)
        for job in jobs[5:10]
    ]
    together, in_parts = run(sentences, *jobs), run(sentences, *jobs, max_batch=5)
    for job, first, second in zip(jobs, together, in_parts, strict=True):
        (alone,) = run(sentences, job)
        for name in job.targets:
            np.testing.assert_array_equal(first.generated[name], alone.generated[name])
            np.testing.assert_array_equal(second.generated[name], alone.generated[name])


def test_without_a_temperature_the_most_likely_words_are_generated(sentences: Runtime) -> None:
    first, second = run(sentences, make_job(latent="mean")), run(sentences, make_job(seed=8, latent="mean"))
    np.testing.assert_array_equal(first[0].generated["caption"], second[0].generated["caption"])
    np.testing.assert_array_equal(first[0].generated["caption"], sentences.decode("caption", first[0].mean[None].repeat(3, 0)))


def test_seeds_and_samples_have_different_words(sentences: Runtime) -> None:
    first, second = (
        run(sentences, make_job(seed=seed, samples=8, latent="mean", text_temperature=1.0))[0].generated["caption"]
        for seed in (1, 2)
    )
    assert len(np.unique(first, axis=0)) > 4
    assert (first != second).any()


def test_token_noise_is_uniform_and_differs_by_row_and_modality() -> None:
    values = token_noise(3, 5, 1, 200, 30)
    assert 0 <= values.min() < 0.01
    assert 0.99 < values.max() < 1
    np.testing.assert_array_equal(token_noise(3, 5, 1, 2, 30), values[:2])  # more samples do not change the first ones
    for other in (token_noise(4, 5, 1, 1, 30), token_noise(3, 6, 1, 1, 30), token_noise(3, 5, 2, 1, 30)):
        assert abs(np.corrcoef(other[0], values[0])[0, 1]) < 0.6
        assert (other[0] != values[0]).all()


def test_token_noise_of_a_seed_is_the_same_in_every_process() -> None:
    """These values are a promise: the same request and seed give the same text after a restart, and in every replica."""
    expected = [0.9289916753768921, 0.11233794689178467, 0.3122023940086365, 0.3329662084579468]
    assert token_noise(3, 5, 1, 1, 4).tolist() == [expected]


def test_runs_of_a_text_count_every_token(sentences: Runtime) -> None:
    lengths = {name: text.length for name, text in sentences.autoregressive.items()}
    job = make_job(samples=3)
    expected = 1 + 3 * (sentences.autoregressive["caption"].length + sentences.autoregressive["code"].length)
    scheduler = Scheduler(sentences, max_batch=32, observer=NullObserver())
    scheduler.add([Row(job, monotonic())])
    assert scheduler.runs == job.runs(lengths) == expected, "the time of a waiting request is estimated from both"


def test_expected_wait_of_texts_is_that_of_all_their_tokens(sentence_bundle: bundle.Bundle) -> None:
    """The engine learns its pace from rows that pass one graph: 5 ms. Then it holds a row whose texts take many passes."""
    gated = GatedRuntime(sentence_bundle, threads=1)
    gated.before_encode = lambda _, present: time.sleep(0.005 * len(present))
    lengths = {name: text.length for name, text in gated.autoregressive.items()}
    texts = make_job(samples=40)

    async def expected_milliseconds() -> int:
        engine = Engine(gated, max_wait=0.05)
        engine.start()
        try:
            await engine.submit([InferenceJob(make_job().row, 0, index) for index in range(60)])
            gated.close()
            task = asyncio.create_task(engine.submit([texts]))
            await asyncio.to_thread(gated.wait_until_entered)
            rejection = engine.check_capacity()
            gated.open()
            await task
        finally:
            await asyncio.to_thread(engine.stop)
        assert isinstance(rejection, QueueFull)
        return rejection.retry_after_ms

    milliseconds = asyncio.run(expected_milliseconds())
    assert texts.runs(lengths) > 400
    assert milliseconds >= 5 * texts.runs(lengths)


def test_cross_generate_route_samples_words_by_its_options(
    sentences: Runtime, serve: Callable[..., AbstractContextManager[httpx.Client]]
) -> None:
    with serve(sentences) as client:

        def texts(path: str = "/cross-generate", **options: Any) -> list[str]:
            body = {"inputs": {"code": "xyz"}, "targets": ["caption"], "num_samples": 6, "latent": "mean", **options}
            response = client.post(path, json=body)
            assert response.status_code == 200, response.text
            return [value["text"] for value in response.json()["data"][0]["generated"]["caption"]]

        assert len(set(texts())) == 1
        sampled = texts(text={"temperature": 1.0}, seed=3)
        assert len(set(sampled)) > 2
        assert texts(text={"temperature": 1.0}, seed=3) == sampled
        assert texts("/cross-generate?text.temperature=1", seed=3) == sampled
        assert texts(text={"temperature": 1.0}, seed=4) != sampled
        assert texts(text={"temperature": 1.0, "top_p": 1e-6}) == texts()
        assert texts(text=None) == texts()
        response = client.post("/cross-generate", json={"inputs": {"code": "x"}, "text": {"temperature": -1}})
        assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/text/temperature")
        words = set(sentences.autoregressive["caption"].vocabulary)
        assert all(text and set(text.split()) <= words for text in sampled)


def test_rendered_text_is_that_of_the_token_ids(sentences: Runtime) -> None:
    caption = sentences.autoregressive["caption"]
    assert render(caption, np.array([2, 3, 5, 0, 0, 0, 0])) == {"text": "a red bird"}
    assert render(sentences.autoregressive["code"], np.array([1, 0, 2, 0, 0])) == {"text": "x y"}
