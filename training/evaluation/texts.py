"""Metrics of the texts that a model generates, and of how much information z has about a text."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from concord.model.codec.text import tokens_from_array
from concord.model.modality import TextModality
from concord.training.data.dataset import Dataset
from concord.training.evaluation.metrics import texts
from concord.training.objectives import every_subset, figure_name
from concord.training.trainable import TrainableModel

TEXT_ROWS = 500
"""Test rows from which texts are generated, and test rows whose texts are predicted, at most."""
_BATCH_ROWS = 250


def evaluate_texts(model: TrainableModel, train: Dataset, test: Dataset) -> dict[str, Any]:
    """Return ``texts``: {text modality: {source: metrics}}, from every single modality and from all others (``others``).

    Generated texts, one of each of the first ``rows`` test rows with the source. z is a sample of the posterior at temperature
    1, and each token the most likely one: ``known_pairs``, the share of pairs of adjacent tokens that occur in training texts;
    ``distinct``, the number of different texts divided by ``rows``; ``repeats``, the share of tokens that repeat the one before
    them; ``tokens``, the mean number of tokens.

    Texts of the first ``predicted_rows`` test rows with source and text: ``nats``, the mean of -log p(token | z and, with the
    autoregressive likelihood, the tokens before it) per token, for one sample z; ``nats_shuffled``, with the z of another row.
    Their difference is the information of z about a token. ``nats`` from the text itself is that of its reconstruction.
    """
    names = [m.name for m in model.modalities]
    singles = every_subset(len(names))[: len(names)]
    found: dict[str, Any] = {}
    for target, modality in enumerate(model.modalities):
        if not isinstance(modality, TextModality):
            continue
        known = texts.pairs_of_texts(modality, np.asarray(train.columns[modality.name].values, dtype=np.int64))
        sources = dict(zip(names, singles, strict=True))
        if len(names) > 2:
            sources[figure_name("others", names)] = ~singles[target]
        for source, mask in sources.items():
            with torch.no_grad():
                z, observed_z, observed = _sampled_rows(model, test, target, mask)
            metrics: dict[str, Any] = {}
            if len(z):
                generated = _generate(model, modality, z)
                metrics = {
                    "rows": len(generated),
                    "known_pairs": texts.known_pairs(modality, generated, known),
                    "distinct": texts.distinct(generated),
                    "repeats": texts.repeats(generated),
                    "tokens": float(np.mean([len(text) for text in generated])),
                }
            if len(observed) > 1:
                count = texts.token_counts(modality, observed.cpu().numpy()).sum()
                metrics["predicted_rows"] = len(observed)
                for name, of_rows in (("nats", observed_z), ("nats_shuffled", observed_z.roll(1, 0))):
                    metrics[name] = -model.text_log_likelihood(modality.name, observed, of_rows).sum().item() / int(count)
            if metrics:
                found.setdefault(modality.name, {})[source] = metrics
    return {"texts": found} if found else {}


def _sampled_rows(
    model: TrainableModel, test: Dataset, target: int, mask: Bool[Tensor, " modality"]
) -> tuple[Float[Tensor, "row latent"], Float[Tensor, "observed latent"], Int64[Tensor, "observed length"]]:
    """Return a sample of the posterior of a subset for the first rows that have one of its modalities; and samples and texts of
    the first rows that have the target too."""
    generator = torch.Generator().manual_seed(0)
    modality = model.modalities[target]
    samples: list[Tensor] = []
    observed_samples: list[Tensor] = []
    observed: list[Tensor] = []
    for batch in test.batches(0, _BATCH_ROWS, 0, shuffle=False):
        present = batch.present & mask
        (posterior,) = model.posteriors(batch.arrays, [present])
        z = posterior.sample(1, generator)[:, 0]
        has_source = present.any(1)
        has_both = has_source & batch.present[:, target]
        samples.append(z[has_source])
        observed_samples.append(z[has_both])
        observed.append(batch.arrays[modality.name][has_both])
        if min(sum(map(len, samples)), sum(map(len, observed))) >= TEXT_ROWS:
            break
    return (
        torch.cat(samples)[:TEXT_ROWS],
        torch.cat(observed_samples)[:TEXT_ROWS],
        torch.cat(observed)[:TEXT_ROWS],
    )


def _generate(model: TrainableModel, modality: TextModality, z: Float[Tensor, "row latent"]) -> list[texts.Tokens]:
    """Return the tokens of the most likely text of each z."""
    with torch.no_grad():
        values = [value for part in torch.split(z, _BATCH_ROWS) for value in model.decode(modality.name, part).cpu().numpy()]
    return [texts.written(modality, tokens_from_array(modality, value)) for value in values]
