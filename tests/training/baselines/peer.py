"""MVTCAE and JMVAE of the library MultiVae (Senellart et al. 2023) around our networks, beside our own.

    pip install --target FOLDER --no-deps multivae==1.0.3 pythae==0.1.2 nltk regex     # nothing that would bring another torch
    PYTHONPATH=FOLDER python -m tests.training.baselines.peer training/configs/digits.toml --data <folder of the Parquet files>

trains MVTCAE by either implementation on the same rows, from the same weights, each with noise of its own and ours once more
with the library's, and prints what comes out as a table. Words stand at one place and are scored character by character: the
library knows no other likelihood of texts.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.modality import ImageModality, TextModality
from training import config_file, data
from training.baselines import jmvae, mvtcae
from training.baselines.jmvae import JMVAE
from training.baselines.rival import ExpertRival
from training.config import Config
from training.data import Batch
from training.fit import build
from training.metrics.coherence import cross_coherence
from training.metrics.judge import Judge, judges
from training.metrics.probe import linear_probe
from training.objectives import every_subset
from training.posteriors import posteriors
from training.progress import Progress

ROWS, TEST_ROWS, BATCH, EPOCHS, RATE = 3000, 1000, 64, 6, 1e-3


class _Unused(ModuleType):
    """In the place of torchvision, which the library's data sets import, and its models do not use."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def wrap(rival: ExpertRival) -> Any:
    """The library's model of the same name, with the encoders and decoders of ``rival``: the same tensors, no copies.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        names = ("", ".transforms", ".datasets", ".datasets.utils", ".utils", ".models")
        sys.modules.update({f"torchvision{name}": _Unused(f"torchvision{name}") for name in names})
    models, nn = importlib.import_module("multivae.models"), importlib.import_module("multivae.models.nn.base_architectures")
    output = importlib.import_module("pythae.models.base.base_utils").ModelOutput
    torch.distributions.Distribution.set_default_validate_args(False)  # grey is no outcome of their Bernoulli

    class Encoder(nn.BaseEncoder):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.inner, self.latent_dim = name, rival.experts[name], rival.latent

        def forward(self, x: Any) -> Any:
            values = x["tokens"] if isinstance(x, dict) else x
            q = self.inner({self.name: values}, torch.ones(len(values), 1, dtype=torch.bool))
            return output(embedding=q.mean, log_covariance=q.log_var)

    class JointEncoder(nn.BaseJointEncoder):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.latent_dim = inner, rival.latent

        def forward(self, x: Any) -> Any:
            arrays = {name: value["tokens"] if isinstance(value, dict) else value for name, value in x.items()}
            q = self.inner(arrays, torch.ones(len(next(iter(arrays.values()))), len(arrays), dtype=torch.bool))
            return output(embedding=q.mean, log_covariance=q.log_var)

    class Decoder(nn.BaseDecoder):
        def __init__(self, name: str, squashed: bool) -> None:
            super().__init__()
            self.inner, self.squashed, self.latent_dim = rival.decoders[name], squashed, rival.latent

        def forward(self, z: Tensor) -> Any:
            raw = self.inner(z)
            return output(reconstruction=torch.sigmoid(raw) if self.squashed else raw)

    told: dict[str, Any] = {
        "n_modalities": len(rival.modalities),
        "latent_dim": rival.latent,
        "input_dims": {m.name: m.shape for m in rival.modalities},
        "uses_likelihood_rescaling": True,
        "rescale_factors": dict(rival.weights),
        "decoders_dist": {m.name: m.likelihood for m in rival.modalities},
        "decoder_dist_params": {m.name: {"scale": m.scale} for m in rival.modalities if m.likelihood == "laplace"},
        "beta": rival.beta,
    }
    # Texts first: their JMVAE takes the length of the last modality's value for the number of rows, and a text is a dictionary.
    order = sorted(rival.modalities, key=lambda m: not isinstance(m, TextModality))
    encoders = {m.name: Encoder(m.name) for m in order}
    decoders = {m.name: Decoder(m.name, m.likelihood == "laplace") for m in order}
    if isinstance(rival, JMVAE):
        # Their alpha weighs the experts' KL beside beta, ours on top of it.
        settings = models.JMVAEConfig(**told, alpha=jmvae.ALPHA * rival.beta, warmup=0)
        return models.JMVAE(settings, encoders, decoders, JointEncoder(rival.joint))
    return models.MVTCAE(models.MVTCAEConfig(**told, alpha=mvtcae.ALPHA), encoders, decoders)


def wrap_rows(arrays: dict[str, Tensor]) -> Any:
    """Complete rows as the library takes them."""
    rows = importlib.import_module("multivae.data.datasets.base").MultimodalBaseDataset
    return rows({n: {"tokens": x} if x.dtype == torch.int64 else x for n, x in arrays.items()})


def fixed_rows(rows: data.Dataset, count: int) -> Batch:
    """The same pairs for every epoch and implementation."""
    return next(rows.batches(0, count, 0, shuffle=True))


def train(model: torch.nn.Module, loss: Callable[[Batch], Tensor], rows: Batch, seed: int, progress: Progress) -> None:
    """The same loop, batches and schedule for both."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    order = torch.Generator().manual_seed(seed)
    steps = EPOCHS * (len(rows) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    model.train()
    with progress.stage("train", steps) as advance:
        for step, chosen in enumerate(_batches(len(rows), order), start=1):
            optimizer.zero_grad(set_to_none=True)
            value = loss(Batch({n: x[chosen] for n, x in rows.arrays.items()}, rows.present[chosen], None))
            value.backward()
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                advance(step, {"loss": value.item()})
    model.eval()


def _batches(rows: int, order: torch.Generator) -> Iterator[Tensor]:
    for _ in range(EPOCHS):
        shuffled = torch.randperm(rows, generator=order)
        yield from shuffled[: rows // BATCH * BATCH].split(BATCH)


Encode = Callable[[Tensor, bool], Tensor]
"""A subset's mask, and whether the mean is asked for instead of a sample -> z of every row."""


def figures(
    rival: ExpertRival, encoders: tuple[Encode, Encode], loss: float, who: dict[str, Judge], rows: tuple[Batch, Batch]
) -> dict[str, float]:
    """Of the trained networks, by what one implementation encodes of the training and of the test rows."""
    (pool, test), names = rows, [m.name for m in rival.modalities]
    found = {"loss": loss}
    assert pool.labels is not None
    assert test.labels is not None
    hits = []
    for mask in every_subset(len(names)):
        subset = "+".join(name for name, bit in zip(names, mask.tolist(), strict=True) if bit)
        means = [encode(mask, True).numpy() for encode in encoders]
        found[f"probe of {subset}"] = linear_probe(means[0], pool.labels.numpy(), means[1], test.labels.numpy())
        if mask.sum() == 1:
            z = encoders[1](mask, False)
            hits += [cross_coherence(rival, who, t, z, test.labels) for t in names if t != subset]
    found["coherence from one"] = torch.cat(hits).float().mean().item()
    return found


def run(
    settings: Config,
    seed: int,
    how: str,
    rows: tuple[Batch, Batch],
    modalities: data.Dataset,
    who: dict[str, Judge],
) -> dict[str, float]:
    """Train MVTCAE and measure it, by one implementation.

    Args:
        how: ``theirs``, ``ours``, or ``alike``: ours with the numbers that the library draws.
    """
    rival = build(settings.model_copy(update={"model": "mvtcae", "seed": seed}), modalities)
    assert isinstance(rival, ExpertRival)
    progress = Progress()
    torch.manual_seed(1000 + seed)  # noise of the library, which takes it from the global generator
    noise = torch.Generator().manual_seed(2000 + seed)
    if how == "alike":
        normal = torch.distributions.Normal(0.0, 1.0)
        rival.noise = lambda batch, _: normal.rsample((len(batch), rival.latent)).unsqueeze(1)  # type: ignore[method-assign]
    if how == "theirs":
        peer = wrap(rival)
        train(peer, lambda batch: peer(wrap_rows(dict(batch.arrays))).loss, rows[0], seed, progress)
        names = [m.name for m in rival.modalities]

        def encode(batch: Batch, mask: Tensor, mean: bool) -> Tensor:
            seen = [name for name, bit in zip(names, mask.tolist(), strict=True) if bit]
            z: Tensor = peer.encode(wrap_rows(dict(batch.arrays)), seen, return_mean=mean).z
            return z
    else:
        train(rival, lambda batch: rival.loss(batch, noise)[0], rows[0], seed, progress)

        def encode(batch: Batch, mask: Tensor, mean: bool) -> Tensor:
            (q,) = posteriors(rival, batch.arrays, [batch.present & mask])
            return q.mean if mean else q.sample(1, noise)[:, 0]

    with torch.no_grad():
        test = rows[1]
        loss = peer(wrap_rows(dict(test.arrays))).loss if how == "theirs" else rival.loss(test, noise)[0]
        pair: Any = tuple(lambda mask, mean, batch=batch: encode(batch, mask, mean) for batch in rows)
        return figures(rival, pair, loss.item(), who, rows)


def comparable(settings: Config) -> Config:
    """With likelihoods and noise that both know, in full precision."""
    plain = tuple(
        m.model_copy(update={"likelihood": "categorical"}) if isinstance(m, TextModality) else m for m in settings.modalities
    )
    assert all(isinstance(m, ImageModality | TextModality) for m in plain)
    return settings.model_copy(
        update={"modalities": plain, "data": settings.data.model_copy(update={"random_offset": ()}), "precision": "float32"}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judges", type=Path, default=Path("runs/peer"), help="where the judges of coherence are kept")
    parser.add_argument("--out", type=Path, help="JSON file for the figures of every run")
    asked = parser.parse_args()
    if asked.seeds < 2:
        parser.error(f"--seeds: two are the least that spread, received {asked.seeds}")
    settings = comparable(config_file.read(asked.config))
    torch.set_num_threads(settings.thread_count)
    training, test = data.load(settings, "train", asked.data), data.load(settings, "test", asked.data)
    rows = fixed_rows(training, ROWS), fixed_rows(test, TEST_ROWS)
    who = judges(settings, training, asked.judges, Progress())
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": [], "alike": []}
    for seed in range(asked.seeds):
        for name, runs in found.items():
            runs.append(run(settings, seed, name, rows, training, who))
            print(name, seed, runs[-1], file=sys.stderr, flush=True)
            if asked.out:
                asked.out.write_text(json.dumps(found, indent=1) + "\n")
    print("| | ours | MultiVae | difference | with its noise |\n| --- | --- | --- | --- | --- |")
    for figure in found["ours"][0]:
        ours, theirs, alike = ([run[figure] for run in runs] for runs in found.values())
        form = "{:.2f}" if figure == "loss" else "{:.3f}"
        columns = [ours, theirs, *([a - b for a, b in zip(values, theirs, strict=True)] for values in (ours, alike))]
        cells = [f"{form.format(statistics.fmean(v))} ± {form.format(statistics.stdev(v))}" for v in columns]
        print(f"| {figure} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
