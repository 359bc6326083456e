"""Devices: every training step runs on a device that is not the CPU, with the numbers of the CPU. Errors of absent devices.

The device is a simulated one, or the GPU: ``CONCORD_TEST_DEVICE=cuda pytest tests/training/device_in_own_process.py``.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import pytest
import torch

from concord.model.modality import CategoricalModality, TextModality, VectorModality
from concord.training import device, fit
from concord.training.checkpoint import Position, Run
from concord.training.config import Config, Contrast, Data, Model, Network, Source
from concord.training.data import dataset
from concord.training.data.dataset import Batch, Dataset
from concord.training.distributed import Noise
from concord.training.errors import ConfigError, RunError
from concord.training.evaluation.evaluate import evaluate
from concord.training.evaluation.texts import evaluate_texts
from concord.training.models import MODELS
from concord.training.progress import Progress
from tests.support.simulated_device import SimulatedTensor, register

STAGE = {"epochs": 1, "batch_size": 15, "learning_rate": 0.01}
ON_GPU = os.environ.get("CONCORD_TEST_DEVICE") == "cuda"
RTOL = 1e-4 if ON_GPU else 1e-5
simulated = pytest.mark.skipif(ON_GPU, reason="is about the simulated device")


@pytest.fixture(scope="module")
def sim() -> torch.device:
    if not ON_GPU:
        return register()
    torch.backends.cudnn.allow_tf32 = False  # products in float32, to be compared with the CPU
    return torch.device("cuda", 0)


@pytest.fixture
def _on_sim(sim: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``device = "cuda"`` be the simulated device."""
    if ON_GPU:
        return
    resolve = device.resolve_device
    for module in (device, fit):
        monkeypatch.setattr(module, "resolve_device", lambda name: sim if name == "cuda" else resolve(name))


@pytest.fixture(scope="module")
def config(make_config: Any) -> Config:
    stages = {"joint": STAGE, "refiner": {**STAGE, "steps": 1}, "align": STAGE, "refresh": STAGE, "flow": STAGE}
    config: Config = make_config(**stages, validation={"rows": 12})
    return config


@pytest.fixture(scope="module")
def rows(config: Config) -> Dataset:
    return dataset.load(config, "train")


def losses(config: Config, rows: Dataset, target: torch.device) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Return loss and gradients of the first step of every stage."""
    torch.manual_seed(0)
    model = MODELS[config.model].from_config(rows.modalities, config).to(target).train()
    batch = next(rows.batches(0, 15, 0))
    batch.present[::3, 0] = False
    results = {}
    for stage in model.stages(config):
        stage.begin()
        model.zero_grad(set_to_none=True)
        loss, _ = stage(batch.to(target), Noise(1, len(batch), device=target))
        loss.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        results[stage.name] = (loss.item(), gradients)
    return results


@pytest.mark.parametrize(("name", "share"), [*((name, 1.0) for name in get_args(Model)), ("concord", 0.5)])
def test_every_stage_of_every_model_runs_on_another_device_with_the_numbers_of_the_cpu(
    config: Config, rows: Dataset, sim: torch.device, name: str, share: float
) -> None:
    refiner = config.refiner.model_copy(update={"share": share})
    contrast = Contrast.model_validate({**STAGE, "prediction": 1.0})
    settings = config.model_copy(update={"model": name, "refiner": refiner, "contrast": contrast})
    expected = losses(settings, rows, torch.device("cpu"))
    actual = losses(settings, rows, sim)
    assert expected.keys() == actual.keys()
    for stage, (loss, gradients) in expected.items():
        assert actual[stage][0] == pytest.approx(loss, rel=RTOL), stage
        assert gradients.keys() <= actual[stage][1].keys()  # a network without rows has no gradient on the CPU, zeros elsewhere
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(actual[stage][1][parameter], gradient, rtol=100 * RTOL, atol=RTOL / 10 * largest)


@simulated
def test_tensor_that_is_left_on_the_cpu_is_an_error(sim: torch.device) -> None:
    on_device = torch.ones(3, device=sim)
    assert isinstance(on_device, SimulatedTensor)
    assert (on_device * torch.tensor(2.0)).sum().item() == 6  # scalars may be on the CPU, as on a GPU
    with pytest.raises(RuntimeError, match="same device"):
        on_device + torch.zeros(3)


@pytest.mark.usefixtures("_on_sim")
def test_run_continues_on_another_device_and_back(
    config: Config, rows: Dataset, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run starts on the CPU, continues on the other device in the middle of a stage, and ends on the CPU."""
    monkeypatch.setattr(fit, "CHECKPOINT_STEPS", 1)
    progress = Progress(quiet=True)
    whole = Run(tmp_path / "whole", config)
    fit.fit(config, rows, whole, progress)

    class StoppingRun(Run):
        stop: tuple[int, int] = (-1, -1)

        def save(self, position: Position, state: Any) -> None:
            super().save(position, state)
            if (position.stage, position.step) == self.stop:
                raise KeyboardInterrupt

    for stop, name in [((1, 2), "cpu"), ((2, 2), "cuda"), ((3, 1), "cuda")]:
        settings = config.override(device=name)
        run = StoppingRun(tmp_path / "moved", settings)
        run.stop = stop
        with pytest.raises(KeyboardInterrupt):
            fit.fit(settings, rows, run, progress)
    moved = Run(tmp_path / "moved", config.override(device="cpu"))
    fit.fit(config.override(device="cpu"), rows, moved, progress)
    assert [line["elbo"] for line in moved.metrics() if "elbo" in line] == pytest.approx(
        [line["elbo"] for line in whole.metrics() if "elbo" in line], rel=1e-3
    )


@pytest.mark.usefixtures("_on_sim")
def test_evaluation_on_another_device_gives_the_figures_of_the_cpu(config: Config, rows: Dataset) -> None:
    figures = []
    for name in ("cpu", "cuda"):
        settings = config.override(device=name)
        model = fit.build(settings, rows.modalities)
        with device.EvaluationDevice(target := device.resolve_device(name)):
            figures.append(evaluate(settings, model, rows.to(target), rows.to(target), Progress(quiet=True)))
    assert figures[1]["refinement"]["elbo_after"] == pytest.approx(figures[0]["refinement"]["elbo_after"], rel=1e-4)
    assert figures[1].keys() == figures[0].keys()


@pytest.mark.usefixtures("_on_sim")
def test_evaluation_of_sentences_on_another_device_gives_the_figures_of_the_cpu(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    columns = {
        "vector": generator.standard_normal((60, 3)).tolist(),
        "caption": [[f"a {noun} bird", f"the bird is {noun}"] for noun in generator.choice(["red", "blue"], 60)],
        "kind": generator.choice(["x", "y"], 60).tolist(),
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    source = Source(train="rows.parquet", held_out=0.4, columns={name: name for name in columns}, licence="none")
    caption = TextModality(name="caption", length=6, unit="word", likelihood="autoregressive")
    settings = Config(
        name="tiny",
        modalities=(VectorModality(name="vector", size=3), caption, CategoricalModality(name="kind")),
        data=Data(folder=tmp_path, pairing="row", sources=(source,)),
        network=Network(latent=4, features=16, width=1, hidden=32),
    )
    train, test = dataset.load(settings, "train"), dataset.load(settings, "test")
    figures = []
    for name in ("cpu", "cuda"):
        model = fit.build(settings, train.modalities)
        with device.EvaluationDevice(target := device.resolve_device(name)), torch.no_grad():
            found = evaluate_texts(model.to(target).eval(), train.to(target), test.to(target))
        figures.append(found["texts"]["caption"]["vector"])
    assert figures[1]["classes"]["kind"] == figures[0]["classes"]["kind"]
    for metric in ("cider", "cider_nearest", "nats", "nats_shuffled"):
        assert figures[1][metric] == pytest.approx(figures[0][metric], rel=1e-4)


@pytest.mark.usefixtures("_on_sim")
def test_full_device_memory_names_batch_and_remedy_and_keeps_the_run(
    config: Config, rows: Dataset, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        if ON_GPU:
            torch.empty(1 << 45, device="cuda")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run = Run(tmp_path, config)
    with monkeypatch.context() as patch:
        patch.setattr("concord.training.stages.alignment_divergences", fail)
        with pytest.raises(RunError, match=r"stage align: .* 15 rows at once.*accumulate = 2 under \[align\]"):
            fit.fit(config, rows, run, Progress(quiet=True))
    halved = config.model_copy(update={"align": config.align.model_copy(update={"accumulate": 3})})
    again = Run(tmp_path, halved)  # is not rejected as another run
    assert again.checkpoint()[0] == Position(2, 0)  # type: ignore[index]
    fit.fit(halved, rows, again, Progress(quiet=True))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU, and CONCORD_TEST_DEVICE=cuda")
def test_bfloat16_on_a_gpu_gives_nearly_the_loss_of_float32(config: Config, rows: Dataset, tmp_path: Any) -> None:
    elbos = []
    for precision in ("float32", "bfloat16"):
        settings = config.model_copy(update={"precision": precision, "device": "cuda"})
        run = Run(tmp_path / precision, settings)
        fit.fit(settings, rows, run, Progress(quiet=True))
        elbos.append([line["elbo"] for line in run.metrics() if "elbo" in line])
        assert f"products in {precision}" in device.describe(settings, torch.device("cuda", 0))
    assert elbos[1] != elbos[0]
    assert elbos[1] == pytest.approx(elbos[0], rel=0.05)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_absent_device_is_rejected_with_what_was_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf'device is "{name}".*(PyTorch).*"auto" or "cpu"'):
        device.resolve_device(name)
    assert device.resolve_device("auto") == torch.device("cpu")


def test_cuda_device_of_a_process_is_that_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.resolve_device("cuda") == device.resolve_device("auto") == torch.device("cuda", 1)
    assert device.resolve_device("cuda:0") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="each process has its own GPU"):
        device.resolve_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="GPU 2, but PyTorch finds 2"):
        device.resolve_device("cuda")


def test_emulated_bfloat16_is_replaced_by_float32_and_said(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, settings = torch.device("cpu"), config.model_copy(update={"precision": "bfloat16"})
    for flags, dtype, line in ([], torch.float32, "would be emulated"), (["amx_bf16"], torch.bfloat16, "in bfloat16"):
        monkeypatch.setattr(device, "bfloat16_flags", lambda flags=flags: flags)
        with device.precision(settings, cpu):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        assert line in device.describe(settings, cpu)


def test_rows_are_read_ahead_on_another_device_in_order_and_errors_are_raised(sim: torch.device) -> None:
    def numbered(count: int) -> Iterator[Batch]:
        for number in range(count):
            yield Batch({"x": torch.full((2, 1), float(number))}, torch.ones(2, 1, dtype=torch.bool), None)
        raise ValueError("disk")

    read = device.on_device(numbered(3), sim)
    batches = [next(read) for _ in range(3)]
    assert [batch.arrays["x"].max().item() for batch in batches] == [0, 1, 2]
    assert all(batch.present.device == sim for batch in batches)
    with pytest.raises(ValueError, match="disk"):
        next(read)
    abandoned = device.on_device(numbered(100), sim)
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name == "concord-rows"]
