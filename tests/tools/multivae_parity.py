"""Compares MVTCAE and JMVAE with their implementations in the library MultiVae (Senellart et al. 2023), on the same networks.

    pip install --target FOLDER --no-deps multivae==1.0.3 pythae==0.1.2 nltk regex     # without dependencies: no second PyTorch
    PYTHONPATH=FOLDER python -m tests.tools.multivae_parity training/configs/digits.toml --data <folder of the Parquet files>

trains MVTCAE three times per seed, on the same rows and from the same weights: with the library, here, and here with the noise
of the library. It prints the figures as a table. Words have no offset and a likelihood per character, since the library has no
other likelihood of texts.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from concord.model.modality import ImageModality, Modality, TextModality
from concord.training import config_file
from concord.training.baselines import jmvae, mvtcae
from concord.training.baselines.baseline import ExpertBaseline
from concord.training.baselines.jmvae import JMVAE
from concord.training.config import Config
from concord.training.data import dataset
from concord.training.data.dataset import Batch
from concord.training.evaluation.metrics.coherence import cross_coherence
from concord.training.evaluation.metrics.frozen_classifier import FrozenClassifier, frozen_classifiers
from concord.training.evaluation.metrics.probe import linear_probe
from concord.training.fit import build
from concord.training.objectives import every_subset
from concord.training.progress import Progress

ROWS, TEST_ROWS, BATCH_SIZE, EPOCHS, LEARNING_RATE = 3000, 1000, 64, 6, 1e-3
IMPLEMENTATIONS = ("concord", "multivae", "concord with the noise of multivae")


class _Placeholder(ModuleType):
    """Replaces torchvision, which the data sets of the library import and its models do not use."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def wrap_model(model: ExpertBaseline) -> Any:
    """Return the library's model of the same name, with the encoders and decoders of ``model``: the same tensors, no copies.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        names = ("", ".transforms", ".datasets", ".datasets.utils", ".utils", ".models")
        sys.modules.update({f"torchvision{name}": _Placeholder(f"torchvision{name}") for name in names})
    models, nn = importlib.import_module("multivae.models"), importlib.import_module("multivae.models.nn.base_architectures")
    output = importlib.import_module("pythae.models.base.base_utils").ModelOutput
    torch.distributions.Distribution.set_default_validate_args(False)  # their Bernoulli would reject grey pixels

    class Encoder(nn.BaseEncoder):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.inner, self.latent_dim = name, model.experts[name], model.latent

        def forward(self, x: Any) -> Any:
            values = x["tokens"] if isinstance(x, dict) else x
            q = self.inner({self.name: values}, torch.ones(len(values), 1, dtype=torch.bool))
            return output(embedding=q.mean, log_covariance=q.log_var)

    class JointEncoder(nn.BaseJointEncoder):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner, self.latent_dim = inner, model.latent

        def forward(self, x: Any) -> Any:
            arrays = {name: value["tokens"] if isinstance(value, dict) else value for name, value in x.items()}
            q = self.inner(arrays, torch.ones(len(next(iter(arrays.values()))), len(arrays), dtype=torch.bool))
            return output(embedding=q.mean, log_covariance=q.log_var)

    class Decoder(nn.BaseDecoder):
        def __init__(self, name: str, squashed: bool) -> None:
            super().__init__()
            self.inner, self.squashed, self.latent_dim = model.decoders[name], squashed, model.latent

        def forward(self, z: Tensor) -> Any:
            raw = self.inner(z)
            return output(reconstruction=torch.sigmoid(raw) if self.squashed else raw)

    settings: dict[str, Any] = {
        "n_modalities": len(model.modalities),
        "latent_dim": model.latent,
        "input_dims": {m.name: m.shape for m in model.modalities},
        "uses_likelihood_rescaling": True,
        "rescale_factors": dict(model.weights),
        "decoders_dist": {m.name: m.likelihood for m in model.modalities},
        "decoder_dist_params": {m.name: {"scale": m.scale} for m in model.modalities if m.likelihood == "laplace"},
        "beta": model.beta,
    }
    # Texts first: their JMVAE uses the length of the last modality's value as the number of rows, and a text is a dictionary.
    order = sorted(model.modalities, key=lambda m: not isinstance(m, TextModality))
    encoders = {m.name: Encoder(m.name) for m in order}
    decoders = {m.name: Decoder(m.name, m.likelihood == "laplace") for m in order}
    if isinstance(model, JMVAE):
        # Their alpha is the whole weight of the experts' KL, jmvae.ALPHA is a factor of beta.
        config = models.JMVAEConfig(**settings, alpha=jmvae.ALPHA * model.beta, warmup=0)
        return models.JMVAE(config, encoders, decoders, JointEncoder(model.joint))
    return models.MVTCAE(models.MVTCAEConfig(**settings, alpha=mvtcae.ALPHA), encoders, decoders)


def wrap_rows(arrays: dict[str, Tensor]) -> Any:
    """Return complete rows in the type of the library."""
    rows = importlib.import_module("multivae.data.datasets.base").MultimodalBaseDataset
    return rows({n: {"tokens": x} if x.dtype == torch.int64 else x for n, x in arrays.items()})


def fixed_rows(rows: dataset.Dataset, count: int) -> Batch:
    """Return random rows, the same pairs for every epoch and implementation."""
    return next(rows.batches(0, count, 0, shuffle=True))


def train(model: torch.nn.Module, loss: Callable[[Batch], Tensor], rows: Batch, seed: int, progress: Progress) -> None:
    """Train a model. Loop, batches and schedule are the same for all implementations."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0)
    order = torch.Generator().manual_seed(seed)
    steps = EPOCHS * (len(rows) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
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
        yield from shuffled[: rows // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE)


Encode = Callable[[Tensor, bool], Tensor]
"""Mask of a subset, and whether to return the mean instead of a sample -> z of every row."""


def evaluate(
    model: ExpertBaseline,
    encoders: tuple[Encode, Encode],
    loss: float,
    classifiers: dict[str, FrozenClassifier],
    rows: tuple[Batch, Batch],
) -> dict[str, float]:
    """Return the figures of the trained networks.

    Args:
        encoders: of one implementation, for the training rows and for the test rows.
        rows: training rows and test rows.
    """
    (train_rows, test_rows), names = rows, [m.name for m in model.modalities]
    figures = {"loss": loss}
    assert train_rows.labels is not None
    assert test_rows.labels is not None
    hits = []
    for mask in every_subset(len(names)):
        subset = "+".join(name for name, bit in zip(names, mask.tolist(), strict=True) if bit)
        means = [encode(mask, True).numpy() for encode in encoders]
        figures[f"probe of {subset}"] = linear_probe(means[0], train_rows.labels.numpy(), means[1], test_rows.labels.numpy())
        if mask.sum() == 1:
            z = encoders[1](mask, False)
            hits += [cross_coherence(model, classifiers, t, z, test_rows.labels) for t in names if t != subset]
    figures["coherence from one"] = torch.cat(hits).float().mean().item()
    return figures


def run(
    settings: Config,
    seed: int,
    implementation: str,
    rows: tuple[Batch, Batch],
    modalities: Sequence[Modality],
    classifiers: dict[str, FrozenClassifier],
) -> dict[str, float]:
    """Train MVTCAE with one of ``IMPLEMENTATIONS`` and return its figures."""
    model = build(settings.model_copy(update={"model": "mvtcae", "seed": seed}), modalities)
    assert isinstance(model, ExpertBaseline)
    progress = Progress()
    torch.manual_seed(1000 + seed)  # the library samples its noise with the global generator
    noise = torch.Generator().manual_seed(2000 + seed)
    if implementation == "concord with the noise of multivae":
        normal = torch.distributions.Normal(0.0, 1.0)
        model.noise = lambda batch, _: normal.rsample((len(batch), model.latent)).unsqueeze(1)  # type: ignore[method-assign]
    if implementation == "multivae":
        wrapped = wrap_model(model)
        train(wrapped, lambda batch: wrapped(wrap_rows(dict(batch.arrays))).loss, rows[0], seed, progress)
        names = [m.name for m in model.modalities]

        def encode(batch: Batch, mask: Tensor, mean: bool) -> Tensor:
            subset = [name for name, bit in zip(names, mask.tolist(), strict=True) if bit]
            z: Tensor = wrapped.encode(wrap_rows(dict(batch.arrays)), subset, return_mean=mean).z
            return z
    else:
        train(model, lambda batch: model.loss(batch, noise)[0], rows[0], seed, progress)

        def encode(batch: Batch, mask: Tensor, mean: bool) -> Tensor:
            (q,) = model.posteriors(batch.arrays, [batch.present & mask])
            return q.mean if mean else q.sample(1, noise)[:, 0]

    with torch.no_grad():
        test_rows = rows[1]
        if implementation == "multivae":
            loss = wrapped(wrap_rows(dict(test_rows.arrays))).loss
        else:
            loss = model.loss(test_rows, noise)[0]
        encoders: Any = tuple(lambda mask, mean, batch=batch: encode(batch, mask, mean) for batch in rows)
        return evaluate(model, encoders, loss.item(), classifiers, rows)


def comparable(settings: Config) -> Config:
    """Return the configuration with likelihoods that both implementations have, without random offsets, in float32."""
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
    parser.add_argument("--classifiers", type=Path, default=Path("runs/multivae-parity"), help="folder of the classifiers")
    parser.add_argument("--out", type=Path, help="JSON file for the figures of every run")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error(f"--seeds: received {arguments.seeds}, at least 2 are needed for a standard deviation")
    settings = comparable(config_file.read(arguments.config))
    torch.set_num_threads(settings.thread_count)
    training, test = (dataset.load(settings, split, arguments.data) for split in ("train", "test"))
    rows = fixed_rows(training, ROWS), fixed_rows(test, TEST_ROWS)
    classifiers = frozen_classifiers(settings, training, arguments.classifiers, Progress())
    results: dict[str, list[dict[str, float]]] = {name: [] for name in IMPLEMENTATIONS}
    for seed in range(arguments.seeds):
        for name, runs in results.items():
            runs.append(run(settings, seed, name, rows, training.modalities, classifiers))
            print(name, seed, runs[-1], file=sys.stderr, flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print("| | Concord | MultiVae | difference | with its noise |\n| --- | --- | --- | --- | --- |")
    for figure in results["concord"][0]:
        concord, multivae, same_noise = ([run[figure] for run in runs] for runs in results.values())
        form = "{:.2f}" if figure == "loss" else "{:.3f}"
        differences = [[a - b for a, b in zip(values, multivae, strict=True)] for values in (concord, same_noise)]
        columns = [concord, multivae, *differences]
        cells = [f"{form.format(statistics.fmean(v))} ± {form.format(statistics.stdev(v))}" for v in columns]
        print(f"| {figure} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
