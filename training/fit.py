"""The training loop: stage after stage, resumable at any step."""

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.vae.generative import Generative
from model.vae.multimodal import MultimodalVAE
from training import baselines
from training.checkpoint import Position, Run
from training.config import Config
from training.data import Batch, Dataset
from training.parallel import Noise, Team, neighbours
from training.progress import Progress
from training.stages import Stage, stages

LOG_STEPS = 50
CHECKPOINT_STEPS = 200  # a multiple of LOG_STEPS, so that a resumed run logs the same means
WARMUP_STEPS = 100
ALONE = Team()


class DivergenceError(Exception):
    """The loss, or a weight, is no longer a number."""


def build(config: Config, data: Dataset) -> Generative:
    """The untrained model of a configuration, its weights drawn from the configuration's seed."""
    torch.manual_seed(config.seed)
    network = config.network
    ours = config.model == "concord"
    couplings = config.flow.couplings if config.flow.epochs else 0
    own = partial(MultimodalVAE, fusion=network.fusion, couplings=couplings, spread=config.flow.spread)
    kind = own if ours else baselines.MODELS[config.model]
    vae = kind(
        data.modalities,
        latent=network.latent,
        features=network.features,
        hidden=network.hidden,
        width=network.width,
        beta=config.objective.beta,
    )
    return vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # missing in PyTorch's stubs


def fit(config: Config, data: Dataset, run: Run, progress: Progress, team: Team = ALONE) -> Generative:
    """Train all stages, from the run's checkpoint if it has one. The same configuration and data give the same numbers,
    interrupted or not; other numbers of processes give the same but for rounding.

    Args:
        team: the processes that train together. All of them call this; the one that leads writes to the run.

    Raises:
        ConfigError: the batches cannot be shared between so many processes.
        DivergenceError: a loss or a weight that is not finite; the last checkpoint is from before it.
    """
    team.check(config)
    torch.set_num_threads(config.threads or max(1, config.thread_count // neighbours()))
    vae = build(config, data)
    plan = _plan(vae, config)
    position, optimizer_state = Position(), None
    if saved := run.resume() if team.leads else run.checkpoint():
        position, state = saved
        vae.load_state_dict(state["model"])
        optimizer_state = state["optimizer"]
        progress.say(f"continuing at stage {position.stage + 1} of {len(plan)}, step {position.step}")
    for index in range(position.stage, len(plan)):
        first = position.step if index == position.stage else 0
        if plan[index].name == "align" and first == 0 and isinstance(vae, MultimodalVAE):
            vae.aligned.begin_as(vae.joint)  # the trunks already see; what is new is to do with less
        settings = plan[index].settings
        optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        if optimizer_state is not None:
            optimizer.load_state_dict(optimizer_state)
            optimizer_state = None
        _fit_stage(config, data, run, progress, team, vae, optimizer, plan[index], index, first)
        _save(run, team, Position(index + 1), vae, None)
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
    team: Team,
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
            optimizer.zero_grad(set_to_none=True)
            figures = _slopes(config, team, vae, stage, batch, _seed(config.seed, index, step, 1))
            if not math.isfinite(value := figures.pop("loss")):
                raise DivergenceError(f"stage {stage.name}, step {step}: the loss is {value}. Lower {stage.name}.learning_rate")
            optimizer.step()
            for name, figure in figures.items():
                sums[name] = sums.get(name, 0.0) + figure
            done = step + 1
            if team.leads and (done % LOG_STEPS == 0 or done == total):
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
                _save(run, team, Position(index, done), vae, optimizer.state_dict())


def _slopes(config: Config, team: Team, vae: Generative, stage: Stage, batch: Batch, seed: int) -> dict[str, float]:
    """Leave the gradients of the whole batch's loss, share by share. Returns the figures of the stage, and the loss."""
    found: dict[str, Tensor] = {}
    for share in team.shares(len(batch), stage.settings.accumulate):
        with _precision(config):
            loss, figures = stage.loss(batch.take(share), Noise(seed, len(batch), share))
        weight = (share.stop - share.start) / len(batch)
        (loss * weight).backward()
        for name, figure in {**figures, "loss": loss}.items():
            found[name] = found.get(name, 0.0) + figure.detach() * weight
    sums = team.add_up(vae.parameters(), torch.stack(list(found.values())))
    return dict(zip(found, sums.tolist(), strict=True))


def _save(run: Run, team: Team, position: Position, vae: Generative, optimizer: dict[str, Any] | None) -> None:
    broken = [name for name, value in vae.state_dict().items() if not bool(value.isfinite().all())]
    if broken:  # a finite loss may have an infinite slope: a checkpoint of that would never recover
        raise DivergenceError(f"{position}: {broken[0]} is no longer finite. Lower the stage's learning_rate")
    if team.leads:
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
