"""The training loop: stage after stage, resumable at any step."""

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from model.vae.generative import Generative
from model.vae.multimodal import MultimodalVAE
from training import baselines
from training.checkpoint import Position, Run
from training.config import Config
from training.data import Dataset
from training.progress import Progress
from training.stages import Stage, stages

LOG_STEPS = 50
CHECKPOINT_STEPS = 200  # a multiple of LOG_STEPS, so that a resumed run logs the same means
WARMUP_STEPS = 100


class DivergenceError(Exception):
    """The loss, or a weight, is no longer a number."""


def build(config: Config, data: Dataset) -> Generative:
    """The untrained model of a configuration, its weights drawn from the configuration's seed."""
    torch.manual_seed(config.seed)
    network = config.network
    kind = MultimodalVAE if config.model == "concord" else baselines.MODELS[config.model]
    vae = kind(
        data.modalities,
        latent=network.latent,
        features=network.features,
        hidden=network.hidden,
        width=network.width,
        beta=config.objective.beta,
    )
    return vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # missing in PyTorch's stubs


def fit(config: Config, data: Dataset, run: Run, progress: Progress) -> Generative:
    """Train all stages, from the run's checkpoint if it has one. The same configuration and data give the same numbers,
    interrupted or not.

    Raises:
        DivergenceError: a loss or a weight that is not finite; the last checkpoint is from before it.
    """
    torch.set_num_threads(config.thread_count)
    vae = build(config, data)
    plan = _plan(vae, config)
    position, optimizer_state = Position(), None
    if saved := run.resume():
        position, state = saved
        vae.load_state_dict(state["model"])
        optimizer_state = state["optimizer"]
        progress.say(f"continuing at stage {position.stage + 1} of {len(plan)}, step {position.step}")
    for index in range(position.stage, len(plan)):
        first = position.step if index == position.stage else 0
        if plan[index].name == "align" and first == 0 and isinstance(vae, MultimodalVAE):
            vae.aligned.load_state_dict(vae.joint.state_dict())  # the trunks already see; what is new is to do with less
        settings = plan[index].settings
        optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
            optimizer_state = None
        _fit_stage(config, data, run, progress, vae, optimizer, plan[index], index, first)
        _save(run, Position(index + 1), vae, None)
    return vae.eval()


def load(config: Config, data: Dataset, run: Run) -> Generative | None:
    """The trained model of a run, or None when it has not finished."""
    saved = run.checkpoint()
    if saved is None or saved[0].stage < len(_plan(vae := build(config, data), config)):
        return None
    vae.load_state_dict(saved[1]["model"])
    return vae.eval()


def _plan(vae: Generative, config: Config) -> list[Stage]:
    return stages(vae, config) if isinstance(vae, MultimodalVAE) else baselines.stages(vae, config)


def _fit_stage(
    config: Config,
    data: Dataset,
    run: Run,
    progress: Progress,
    vae: Generative,
    optimizer: torch.optim.Optimizer,
    stage: Stage,
    index: int,
    first: int,
) -> None:
    settings = stage.settings
    per_epoch = data.steps_per_epoch(settings.batch_size)
    total = settings.epochs * per_epoch
    sums: dict[str, float] = {}
    since = time.perf_counter()
    vae.train()
    with progress.stage(stage.name, total, first) as advance:
        for step in range(first, total):
            if step == first or step % per_epoch == 0:
                seed = _seed(config.seed, index, step // per_epoch, 0)
                batches = data.batches(step // per_epoch, settings.batch_size, seed % 2**31, start=step % per_epoch)
            batch = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(step, total)
            generator = torch.Generator().manual_seed(_seed(config.seed, index, step, 1))
            with _precision(config):
                loss, figures = stage.loss(batch, generator)
            if not math.isfinite(value := loss.item()):
                raise DivergenceError(f"stage {stage.name}, step {step}: the loss is {value}. Lower {stage.name}.learning_rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            for name, figure in figures.items():
                sums[name] = sums.get(name, 0.0) + figure.item()
            done = step + 1
            if done % LOG_STEPS == 0 or done == total:
                window = (done - 1) % LOG_STEPS + 1
                elapsed, since = time.perf_counter() - since, time.perf_counter()
                means = {name: round(total_ / window, 4) for name, total_ in sums.items()}
                sums = {}
                speed = round(window * settings.batch_size / elapsed, 1)
                run.log(
                    {
                        "stage": stage.name,
                        "stage_index": index,
                        "step": done,
                        "epoch": done / per_epoch,
                        **means,
                        "seconds": round(elapsed, 3),
                        "examples_per_second": speed,
                        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                    }
                )
                advance(done, {**means, "rows/s": speed})
            if done % CHECKPOINT_STEPS == 0 and done < total:
                _save(run, Position(index, done), vae, optimizer.state_dict())


def _save(run: Run, position: Position, vae: Generative, optimizer: dict[str, Any] | None) -> None:
    broken = [name for name, value in vae.state_dict().items() if not bool(value.isfinite().all())]
    if broken:  # a finite loss may have an infinite slope: a checkpoint of that would never recover
        raise DivergenceError(f"{position}: {broken[0]} is no longer finite. Lower the stage's learning_rate")
    run.save(position, {"model": vae.state_dict(), "optimizer": optimizer})


def _schedule(step: int, total: int) -> float:
    """Share of the highest learning rate: a linear rise, then half a cosine."""
    warmup = min(WARMUP_STEPS, max(1, total // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _seed(*parts: int) -> int:
    """A seed of its own for every stream of random numbers, far from every other."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def _precision(config: Config) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
        yield
