"""The training loop: stage after stage, resumable from checkpoints."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from concord.model.modality import Modality
from concord.training.checkpoint import Position, Run
from concord.training.config import Config
from concord.training.data.dataset import Batch, Dataset
from concord.training.device import describe, is_out_of_memory, on_device, precision, resolve_device
from concord.training.distributed import Noise, ProcessGroup, local_world_size
from concord.training.errors import ConfigError, DivergenceError, RunError
from concord.training.forecast import Forecast, duration
from concord.training.machine import freed_memory_kept, peak_memory_bytes
from concord.training.models import MODELS
from concord.training.progress import Progress
from concord.training.trainable import Stage, TrainableModel, WholeBatch

LOG_STEPS = 50
CHECKPOINT_STEPS = 200
CHECKPOINT_SECONDS = 60.0
"""Longest time between two checkpoints, unless one step takes longer."""
WARMUP_STEPS = 100
SINGLE_PROCESS = ProcessGroup()
_VALIDATION_STREAM = 4
"""Separates the noise of validation from that of the batches of a stage and of its companion."""
_FUSED = frozenset({"cpu", "cuda", "mps"})
"""Devices that have the fused kernel of AdamW."""


def build(config: Config, modalities: Sequence[Modality]) -> TrainableModel:
    """Return the untrained model of a configuration, on its device. Its weights follow from the configuration's seed.

    Args:
        modalities: with the statistics of the training rows filled in, as in ``Dataset.modalities``.
    """
    torch.manual_seed(config.seed)
    model = MODELS[config.model].from_config(modalities, config)
    device = resolve_device(config.device)
    # On a CPU only networks without group normalisation: of channels-last memory it takes up to 15 times as long there.
    for part in [model] if device.type != "cpu" else [] if config.network.blocks else [model.decoders]:
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in PyTorch's stubs
    return model.to(device)


def adamw(model: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> torch.optim.AdamW:
    """Return the optimiser of all weights. Its fused kernel takes about a third of the time of the other ones on the CPU."""
    parameters = list(model.parameters())
    fused = parameters[0].device.type in _FUSED
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimiser of the same weights, which may come from another device.

    Weights are in channels-last memory on some devices only, and fused kernels require that moments lie as their weight does.
    """
    optimizer.load_state_dict(state)
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if moment.shape == weight.shape:
                moments[name] = torch.empty_like(weight).copy_(moment)


@freed_memory_kept()
def fit(
    config: Config,
    data: Dataset,
    run: Run,
    progress: Progress,
    group: ProcessGroup = SINGLE_PROCESS,
    forecast: Forecast | None = None,
) -> TrainableModel:
    """Train all stages, from the checkpoint of the run if it has one, and return the model.

    The same configuration and data give the same numbers, with and without interruptions. Another number of processes changes
    rounding only.

    Args:
        group: the processes that train together. All of them call this function. Rank zero writes to the run.
        forecast: of the time that the stages take, see ``estimate``. With it, progress shows the time left.

    Raises:
        ConfigError: a batch cannot be split evenly between the processes.
        RunError: the checkpoint is of a model of another shape.
        DivergenceError: a loss or a weight is not finite. The last checkpoint is older.
    """
    group.validate(config)
    torch.set_num_threads(config.threads_per_process(local_world_size()))
    training_rows, validation = data.hold_out(config.validation.rows) if config.validation.rows else (data, None)
    training_rows = training_rows.balanced(config.data.subset_balance)
    model = build(config, data.modalities)
    stages = model.stages(config)
    position, optimizer_state, window, best = Position(), None, Window(), Best()
    if checkpoint := run.resume() if group.is_rank_zero else run.checkpoint():
        position, state = checkpoint
        _load_weights(model, state, run)
        optimizer_state = state["optimizer"]
        # Checkpoints of version 0.1 have no window: they ended one. Later ones did not count its steps.
        window = Window(**{"steps": position.step % LOG_STEPS, **state.get("window", {})})
        best = Best(**state.get("best", {}))
        progress.say(f"continuing at stage {position.stage + 1} of {len(stages)}, step {position.step}")
    device = resolve_device(config.device)
    progress.say(describe(config, device))
    training = _Training(config, training_rows, validation, run, progress, group, forecast, model, device)
    for index in range(position.stage, len(stages)):
        stage = stages[index]
        first_step = position.step if index == position.stage else 0
        if first_step == 0:
            stage.begin()
        settings = stage.settings
        optimizer = adamw(model, settings.learning_rate, float(settings.weight_decay))
        if optimizer_state is not None:
            load_optimizer_state(optimizer, optimizer_state)
            optimizer_state = None
        is_continued = index == position.stage
        training.fit_stage(
            stage, index, optimizer, first_step, window if is_continued else Window(), best if is_continued else Best()
        )
        training.save(Position(index + 1))
    return model.eval()


def load(config: Config, modalities: Sequence[Modality], run: Run) -> TrainableModel | None:
    """Return the trained model of a run. None: the run has not finished.

    Args:
        modalities: as in ``build``.
    """
    checkpoint = run.checkpoint()
    if checkpoint is None:
        return None
    position, state = checkpoint
    model = build(config, modalities)
    if position.stage < len(model.stages(config)):
        return None
    _load_weights(model, state, run)
    return model.eval()


def _load_weights(model: TrainableModel, state: dict[str, Any], run: Run) -> None:
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise RunError(
            f"{run.path}: its checkpoint has weights of other shapes than the model of this configuration and data ({error}). "
            "Restore the data, name another folder with --out, or start over with --fresh"
        ) from error


@dataclass
class Window:
    """The steps since the last line of the log. Kept in the checkpoint, so that a resumed run logs the same means."""

    seconds: float = 0.0
    """Spent on these steps before the interruption."""
    waited: float = 0.0
    """Seconds that steps waited for their rows."""
    sums: dict[str, float] = field(default_factory=dict)
    """Of the figures over these steps, by name."""
    steps: int = 0

    def add(self, figures: Mapping[str, float]) -> None:
        """Add the figures of a step."""
        self.steps += 1
        for name, figure in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + figure

    def means(self) -> dict[str, float]:
        """Return the rounded means of the figures over the steps."""
        return {name: round(total / self.steps, 4) for name, total in self.sums.items()}


@dataclass
class Best:
    """The best weights of a stage on the validation rows. Kept in the checkpoint."""

    score: float = -math.inf
    """See ``Stage.score``."""
    epoch: int = 0
    """After which they were reached. 0: no epoch has ended."""
    weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Training:
    """What all stages of a training share."""

    config: Config
    data: Dataset
    validation: Dataset | None
    run: Run
    progress: Progress
    group: ProcessGroup
    forecast: Forecast | None
    model: TrainableModel
    device: torch.device

    def _batches(self, stage: Stage, index: int, stream: int = 0) -> "_Batches":
        return _Batches(self.config.seed, stage, index, stage.rows(self.data), self.device, stream)

    def fit_stage(
        self, stage: Stage, index: int, optimizer: torch.optim.Optimizer, first_step: int, window: Window, best: Best
    ) -> None:
        """Train one stage, from ``first_step`` on. With validation rows, the model ends with the best weights."""
        settings, group, patience = stage.settings, self.group, self.config.validation.patience
        batches = self._batches(stage, index)
        per_epoch, steps = batches.per_epoch, settings.epochs * batches.per_epoch
        companion = self._batches(stage.companion, index, stream=2) if stage.companion else None
        began = saved = step_end = time.perf_counter()
        window_start, slowest = began - window.seconds, 0.0
        self.model.train()
        with self.progress.stage(stage.name, steps, first_step) as advance:
            for step in range(first_step, steps):
                for parameters in optimizer.param_groups:
                    parameters["lr"] = settings.learning_rate * _learning_rate_factor(step, steps)
                optimizer.zero_grad(set_to_none=True)
                began_waiting = time.perf_counter()
                parts = [part.step(step) for part in (batches, companion) if part]
                window.waited += time.perf_counter() - began_waiting
                figures = self._step(parts)
                if not math.isfinite(loss := figures.pop("loss")):
                    raise DivergenceError(
                        f"stage {stage.name}, step {step}: the loss is {loss}. Lower {stage.name}.learning_rate"
                    )
                optimizer.step()
                done = step + 1
                slowest, step_end = max(slowest, time.perf_counter() - step_end), time.perf_counter()
                window.add(figures)
                elapsed = step_end - window_start
                means, speed = window.means(), round(window.steps * settings.batch_size / elapsed, 1)
                is_validated = self.validation is not None and done % per_epoch == 0
                if is_validated:
                    score = self._validate(stage, index)
                    means["validation"] = round(score, 4)
                    if score > best.score:
                        best = Best(score, done // per_epoch, {n: w.clone() for n, w in self.model.state_dict().items()})
                advance(
                    done, {**means, "rows/s": speed, **self._time_left(index, done, (step_end - began) / (done - first_step))}
                )
                if done % LOG_STEPS == 0 or done == steps or is_validated:
                    waiting = round(window.waited / elapsed, 4)
                    self._log(stage, index, done, done / per_epoch, means, elapsed, speed, waiting)
                    window, step_end = Window(), time.perf_counter()  # without the time of the validation
                    window_start = step_end
                if is_validated and patience is not None and done // per_epoch - best.epoch >= patience:
                    break
                # The next checkpoint would be late if it waited for another step as long as the longest one.
                is_due = group.is_rank_zero and step_end - saved + slowest > CHECKPOINT_SECONDS
                if (done % CHECKPOINT_STEPS == 0 or is_due) and done < steps:
                    window.seconds, saved = step_end - window_start, step_end
                    self.save(Position(index, done), optimizer.state_dict(), window, best)
        if best.weights:
            self.progress.say(f"{stage.name}: the weights are those after epoch {best.epoch}, validation {best.score:.4f}")
            self.model.load_state_dict(best.weights)

    def _validate(self, stage: Stage, index: int) -> float:
        """Return the mean score of the validation rows, with the same noise after each epoch.

        The batches have the size of those of training, so their losses compare as many rows, and the result is the same for any
        number of micro-batches and, without shards, of processes, up to rounding. Nothing keeps gradients, so this needs less
        memory than a step.

        Raises:
            ConfigError: the stage uses none of the validation rows.
        """
        assert self.validation is not None
        rows, settings = stage.rows(self.validation), stage.settings
        total = torch.zeros(2, dtype=torch.float64)  # sum of the scores, number of rows
        for number, batch in enumerate(rows.batches(0, settings.batch_size, 0, shuffle=False)):
            if not rows.shard and number % self.group.size != self.group.rank:
                continue  # of another process
            seed = _seed(self.config.seed, index, number, _VALIDATION_STREAM)
            part = _Part(stage, batch.to(self.device), seed, len(batch), 0)
            alone = ProcessGroup()  # the other processes have other batches
            with torch.no_grad():
                for share, loss, figures in self._losses(part, alone, min(settings.accumulate, len(batch))):
                    score = share * stage.score(loss, figures).item()
                    total += len(batch) * torch.tensor([score, share], dtype=torch.float64)
        score, count = self.group.sum(total.float().to(self.device)).cpu().tolist()
        if not count:
            raise ConfigError(
                f"stage {stage.name}: none of the {len(self.validation)} held-out rows has two modalities, so none can be "
                "compared. Increase validation.rows"
            )
        return float(score / count)

    def save(
        self,
        position: Position,
        optimizer: dict[str, Any] | None = None,
        window: Window | None = None,
        best: Best | None = None,
    ) -> None:
        """Replace the checkpoint.

        Raises:
            DivergenceError: a weight is not finite.
        """
        weights = self.model.state_dict()
        broken = [name for name, value in weights.items() if not bool(value.isfinite().all())]
        if broken:  # possible after a finite loss with an infinite gradient; a run could not recover from it
            raise DivergenceError(
                f"the weight {broken[0]} is no longer finite (on reaching stage {position.stage + 1}, step {position.step}). "
                "Lower the learning_rate of the stage"
            )
        if self.group.is_rank_zero:
            state = {"model": weights, "optimizer": optimizer, "window": asdict(window or Window())}
            if best is not None and best.weights:
                state["best"] = vars(best)
            self.run.save(position, tree_map_only(Tensor, Tensor.cpu, state))

    def _step(self, parts: Sequence["_Part"]) -> dict[str, float]:
        """Return the result of ``_backward``.

        Raises:
            RunError: the memory of the device is full. The last checkpoint is intact.
        """
        try:
            return self._backward(parts)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            part = max(parts, key=lambda part: part.size // part.stage.settings.accumulate)
            name, accumulate = part.stage.name, part.stage.settings.accumulate
            rows = -(-part.size // (self.group.size * accumulate))
            raise RunError(
                f"stage {name}: the memory of {self.device} is full with {rows} rows at once, of a batch of {part.size} "
                f"({error}). Set accumulate = {2 * accumulate} under [{name}], which halves them and changes rounding only. "
                "The same command then continues from the last checkpoint"
            ) from error

    def _backward(self, parts: Sequence["_Part"]) -> dict[str, float]:
        """Compute the gradients of the sum of the parts' losses. Return this sum and the figures of all parts."""
        means: dict[str, Tensor] = {}
        for part in parts:
            for name, mean in self._backward_part(part).items():
                means[name] = means.get(name, 0.0) + mean
        sums = self.group.all_reduce(self.model.parameters(), torch.stack(list(means.values())))
        return dict(zip(means, sums.cpu().tolist(), strict=True))

    def _backward_part(self, part: "_Part") -> dict[str, Tensor]:
        """Add the gradients of a batch's loss, one micro-batch after another. Return this process's part of the means."""
        means: dict[str, Tensor] = {}
        for share, loss, figures in self._losses(part, self.group, part.stage.settings.accumulate):
            (loss * share).backward()  # type: ignore[no-untyped-call]
            for name, figure in {**figures, "loss": loss}.items():
                means[name] = means.get(name, 0.0) + figure.detach() * share
        return means

    def _losses(
        self, part: "_Part", group: ProcessGroup, accumulate: int
    ) -> Iterator[tuple[float, Tensor, Mapping[str, Tensor]]]:
        """Yield for each micro-batch its share of the rows of the batch, its loss and the figures of the loss.

        Args:
            part: the batch.
            group: processes among which the batch is split.
            accumulate: micro-batches of each of them.
        """
        stage, micro_batches = part.stage, group.micro_batches(part.size, accumulate)
        embeddings = self._embeddings(part, group, micro_batches)
        for micro_batch in micro_batches:
            with precision(self.config, self.device):
                within = stage if embeddings is None else stage.within(WholeBatch(part.batch, embeddings, micro_batch))
                loss, figures = within(part.take(micro_batch), Noise(part.seed, part.size, micro_batch, self.device))
            yield (micro_batch.stop - micro_batch.start) / part.size, loss, figures

    def _embeddings(self, part: "_Part", group: ProcessGroup, micro_batches: Sequence[slice]) -> Tensor | None:
        """Return ``Stage.embed`` of the whole batch, without gradient. None: a loss needs its own rows only."""
        if micro_batches == [slice(0, part.size)]:
            return None
        found = []
        for micro_batch in micro_batches:
            with torch.no_grad(), precision(self.config, self.device):
                rows = part.stage.embed(part.take(micro_batch), Noise(part.seed, part.size, micro_batch, self.device))
            if rows is None:
                return None
            found.append((micro_batch, rows))
        return group.gather(found, part.size)

    def _time_left(self, stage: int, step: int, step_seconds: float) -> dict[str, str]:
        left = self.forecast.seconds_left(stage, step, step_seconds) if self.forecast else 0.0
        return {"training left": duration(left)} if left else {}

    def _log(
        self,
        stage: Stage,
        index: int,
        step: int,
        epoch: float,
        means: Mapping[str, float],
        seconds: float,
        speed: float,
        waiting: float,
    ) -> None:
        if self.group.is_rank_zero:
            self.run.log(
                {
                    "stage": stage.name,
                    "stage_index": index,
                    "step": step,
                    "epoch": epoch,
                    **means,
                    "seconds": round(seconds, 3),
                    "examples_per_second": speed,
                    "waiting_share": waiting,
                    "peak_memory_bytes": peak_memory_bytes(),
                }
            )


class _Part(NamedTuple):
    """A term of the loss of one step."""

    stage: Stage
    batch: Batch
    """The whole batch, or with shards the rows of this process."""
    seed: int
    """Of the noise."""
    size: int
    """Rows of the whole batch."""
    first: int
    """Index in the whole batch of the first row of ``batch``."""

    def take(self, micro_batch: slice) -> Batch:
        """Return a micro-batch, given its rows in the whole batch."""
        return self.batch.take(slice(micro_batch.start - self.first, micro_batch.stop - self.first))


class _Batches:
    """The batches of a stage, step by step. They depend on the step only, so a resumed run continues exactly.

    Args:
        seed: of the configuration.
        stage: whose settings have the batch size.
        index: of the stage in training.
        data: rows of the stage.
        device: of the batches.
        stream: first of two numbers that separate its random numbers from those of other batches of the stage.
    """

    def __init__(self, seed: int, stage: Stage, index: int, data: Dataset, device: torch.device, stream: int = 0) -> None:
        self._seed, self._stage, self._index, self._data, self._stream = seed, stage, index, data, stream
        self._device = device
        self.per_epoch = data.steps_per_epoch(stage.settings.batch_size)
        self._batches: Iterator[Batch] = iter(())
        self._next: int | None = None

    def step(self, step: int) -> _Part:
        """Return the part of a step. Faster for the step after the last one."""
        epoch, first = divmod(step, self.per_epoch)
        if step != self._next or first == 0:
            seed = _seed(self._seed, self._index, epoch, self._stream)
            read = self._data.batches(epoch, self._stage.settings.batch_size, seed % 2**31, start=first)
            self._batches = on_device(read, self._device)
        self._next = step + 1
        batch, seed, shard = next(self._batches), _seed(self._seed, self._index, step, self._stream + 1), self._data.shard
        size, first = (shard.size * len(batch), shard.rank * len(batch)) if shard else (len(batch), 0)
        return _Part(self._stage, batch, seed, size, first)


def _learning_rate_factor(step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of its peak: linear warm-up, then cosine decay."""
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _seed(*parts: int) -> int:
    """Return an independent seed for each stream of random numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
