"""Metrics of the texts that a model generates, and of how much information z has about a text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from concord.model.codec.text import tokens_from_array
from concord.model.modality import CategoricalModality, TextModality
from concord.training.baselines.linear import features
from concord.training.data.dataset import Batch, Dataset
from concord.training.evaluation.metrics import texts
from concord.training.evaluation.metrics.cider import CiderD
from concord.training.evaluation.metrics.texts import Words
from concord.training.evaluation.metrics.words_classifier import fit_words_classifier
from concord.training.objectives import DISTINCT, every_subset, figure_name
from concord.training.trainable import TrainableModel

TEXT_ROWS = 500
"""Test rows from which texts are generated, and test rows whose texts are predicted, at most."""
TRAINING_ROWS = 50_000
"""Training rows, from the first one on, that are compared with test rows and to whose texts classifiers are fitted, at most."""
SAMPLING_TEMPERATURE = 0.3
"""Of the tokens of ``sampled``: captions of Flickr8k then differ from row to row, and CIDEr-D hardly falls."""
_BATCH_ROWS = 250

Classify = Callable[[Sequence[Words]], Int64[np.ndarray, " text"]]


def evaluate_texts(model: TrainableModel, train: Dataset, test: Dataset) -> dict[str, Any]:
    """Return ``texts``: {text modality: {source: metrics}}, from every single modality and from all others (``others``).

    Generated texts, one of each of the first ``rows`` test rows with the source. z is a sample of the posterior at temperature
    1, and each token the most likely one: ``known_pairs``, the share of pairs of adjacent tokens that occur in training texts;
    ``distinct``, the number of different texts divided by ``rows``; ``repeats``, the share of tokens that repeat the one before
    them; ``tokens``, the mean number of tokens.

    ``classes``: {categorical modality: {rows, accuracy, own_texts, agreement}}, with the autoregressive likelihood. Generated
    texts get the class of a logistic regression on the words of training texts, see ``fit_words_classifier``. ``accuracy`` is
    the share of texts with the class of the row, ``own_texts`` that of the rows' own texts, and ``agreement`` the share of
    texts with the class that the model generates from the same z.

    Texts of the first ``predicted_rows`` test rows with source and text: ``nats``, the mean of -log p(token | z and, with the
    autoregressive likelihood, the tokens before it) per token, for one sample z; ``nats_shuffled``, with the z of another row.
    Their difference is the information of z about a token. ``nats`` from the text itself is that of its reconstruction.

    ``cider``: mean CIDEr-D of texts that are generated from these rows, where all texts of a row are its references. Omitted
    if the source is the text itself, or if texts have less than two words. ``cider_shuffled``: of the texts that are generated
    from another row: what a text scores that says nothing of its source. ``cider_nearest``: of the texts of the training
    row whose value of the source is most similar, the mean over them. Similarity is the cosine of ``linear.features``. Omitted
    for texts and classes as source, and if few of the values are distinct.

    ``of_mean``: the metrics of generated texts where z is the mean of the posterior. ``sampled``, with the autoregressive
    likelihood: where tokens are sampled at ``SAMPLING_TEMPERATURE``, as ``text.temperature`` of a request does.
    """
    names = [m.name for m in model.modalities]
    singles = every_subset(len(names))[: len(names)]
    read = cache(lambda: _TrainingRows.read(train))
    found: dict[str, Any] = {}
    for target, modality in enumerate(model.modalities):
        if not isinstance(modality, TextModality):
            continue
        known = texts.pairs_of_texts(modality, np.asarray(train.columns[modality.name].values, dtype=np.int64))
        classifiers = _fit_classifiers(modality, train, read) if modality.likelihood == "autoregressive" else {}
        of_text = _TextMetrics(model, modality, known, classifiers)
        references = [[texts.words(modality, tokens) for tokens in own] for own in test.texts(modality.name)]
        sources = dict(zip(names, singles, strict=True))
        if len(names) > 2:
            sources[figure_name("others", names)] = ~singles[target]
        for source, mask in sources.items():
            rows = _encode(model, test, target, mask)
            own = [references[row] for row in rows.numbers[rows.observed]]
            has_sentences = source != modality.name and len(own) > 0 and np.mean([len(text) for r in own for text in r]) >= 2
            cider = CiderD(own) if has_sentences else None
            metrics: dict[str, Any] = {}
            if len(rows.numbers):
                metrics = of_text.generated(rows, rows.z, cider)
                metrics["of_mean"] = of_text.generated(rows, rows.mean, cider)
                if modality.likelihood == "autoregressive":
                    of_sampled = of_text.generated(rows, rows.z, cider, SAMPLING_TEMPERATURE)
                    metrics["sampled"] = {"temperature": SAMPLING_TEMPERATURE, **of_sampled}
            if len(own) > 1:
                metrics |= of_text.predicted(rows)
            if cider and (nearest := read().nearest_texts(source, rows.batch.arrays.get(source), rows.observed, modality)):
                metrics["cider_nearest"] = _nearest_score(cider, nearest)
            if metrics:
                found.setdefault(modality.name, {})[source] = metrics
    return {"texts": found} if found else {}


@dataclass(frozen=True)
class _SourceRows:
    """Test rows that have a source, with its posterior."""

    numbers: Int64[np.ndarray, " row"]
    """In the order of ``Dataset.batches`` without ``shuffle``."""
    batch: Batch
    z: Float[Tensor, "row latent"]
    """A sample of the posterior."""
    mean: Float[Tensor, "row latent"]
    observed: Int64[np.ndarray, " observed"]
    """Indices of the first of these rows that have the target too."""


def _encode(model: TrainableModel, test: Dataset, target: int, mask: Bool[Tensor, " modality"]) -> _SourceRows:
    """Return the first rows that have one of the modalities of a subset: ``TEXT_ROWS``, or so many that have the target too."""
    generator = torch.Generator().manual_seed(0)
    parts: list[tuple[Batch, Tensor, Tensor, Tensor]] = []
    start, chosen, observed = 0, 0, 0
    for batch in test.batches(0, _BATCH_ROWS, 0, shuffle=False):
        present = batch.present & mask
        with torch.no_grad():
            (posterior,) = model.posteriors(batch.arrays, [present])
            z = posterior.sample(1, generator)[:, 0]
        rows = present.any(1)
        parts.append((batch.take(rows), rows.nonzero().flatten() + start, z[rows], posterior.mean[rows]))
        start += len(batch)
        chosen, observed = chosen + int(rows.sum()), observed + int((rows & batch.present[:, target]).sum())
        if min(chosen, observed) >= TEXT_ROWS:
            break
    batches, numbers, samples, means = zip(*parts, strict=True)
    present = torch.cat([batch.present for batch in batches])
    arrays = {name: torch.cat([batch.arrays[name] for batch in batches]) for name in batches[0].arrays}
    has_target = present[:, target].nonzero().flatten()[:TEXT_ROWS].cpu().numpy()
    return _SourceRows(
        torch.cat(numbers).cpu().numpy(), Batch(arrays, present, None), torch.cat(samples), torch.cat(means), has_target
    )


@dataclass(frozen=True)
class _TextMetrics:
    """Metrics of one text modality."""

    model: TrainableModel
    modality: TextModality
    known: frozenset[int]
    """Pairs of tokens of training texts."""
    classifiers: dict[str, Classify]
    """Of its texts, by categorical modality."""

    def generated(
        self, rows: _SourceRows, z: Float[Tensor, "row latent"], cider: CiderD | None, temperature: float = 0.0
    ) -> dict[str, Any]:
        """Return the metrics of the texts given z whose tokens are sampled at a temperature. 0: the most likely ones."""
        count = min(TEXT_ROWS, len(z))
        needed = np.union1d(np.arange(count), rows.observed)
        tokens = self._texts(z[needed], temperature)  # of the first rows, then of observed ones
        first = [texts.written(self.modality, text) for text in tokens[:count]]
        metrics: dict[str, Any] = {
            "rows": count,
            "known_pairs": texts.known_pairs(self.modality, first, self.known),
            "distinct": texts.distinct(first),
            "repeats": texts.repeats(first),
            "tokens": float(np.mean([len(text) for text in first])),
        }
        if cider:
            places = np.searchsorted(needed, rows.observed)
            words = [texts.words(self.modality, tokens[place]) for place in places]
            metrics["cider"] = float(cider(words).mean())
            metrics["cider_shuffled"] = float(cider([*words[1:], *words[:1]]).mean())
        if classes := self._classes(rows, z[:count], tokens[:count]):
            metrics["classes"] = classes
        return metrics

    def predicted(self, rows: _SourceRows) -> dict[str, Any]:
        """Return the nats of the rows' own texts."""
        own, z = rows.batch.arrays[self.modality.name][rows.observed], rows.z[rows.observed]
        tokens = int(texts.token_counts(self.modality, own.cpu().numpy()).sum())
        metrics: dict[str, Any] = {"predicted_rows": len(own)}
        for name, of_rows in (("nats", z), ("nats_shuffled", z.roll(1, 0))):
            with torch.no_grad():
                metrics[name] = -self.model.text_log_likelihood(self.modality.name, own, of_rows).sum().item() / tokens
        return metrics

    def _texts(self, z: Float[Tensor, "row latent"], temperature: float) -> list[Int64[np.ndarray, " length"]]:
        name, generator = self.modality.name, torch.Generator().manual_seed(0)
        found: list[Int64[np.ndarray, " length"]] = []
        for part in torch.split(z, _BATCH_ROWS):
            if temperature:
                noise = torch.rand(len(part), self.modality.length, generator=generator)
                values = self.model.sample_text(name, part, noise, temperature=temperature)
            else:
                with torch.no_grad():
                    values = self.model.decode(name, part)
            found += [tokens_from_array(self.modality, value) for value in values.cpu().numpy()]
        return found

    def _classes(
        self, rows: _SourceRows, z: Float[Tensor, "row latent"], tokens: Sequence[Int64[np.ndarray, " length"]]
    ) -> dict[str, Any]:
        """Return ``classes`` of ``evaluate_texts`` for the first rows."""
        names = [m.name for m in self.model.modalities]
        own = rows.batch.arrays[self.modality.name].cpu().numpy()
        has_text = rows.batch.present[:, names.index(self.modality.name)].cpu().numpy()
        metrics: dict[str, Any] = {}
        for name, classify in self.classifiers.items():
            has_class = rows.batch.present[: len(z), names.index(name)].cpu().numpy()
            if not has_class.any():
                continue
            classes = rows.batch.arrays[name][: len(z)].flatten().cpu().numpy()
            of_texts = classify([texts.words(self.modality, text) for text in tokens])
            with torch.no_grad():
                generated = self.model.decode(name, z).flatten(1).argmax(1).cpu().numpy()
            metrics[name] = {
                "rows": int(has_class.sum()),
                "accuracy": float((of_texts == classes)[has_class].mean()),
                "agreement": float((of_texts == generated).mean()),
            }
            both = np.flatnonzero(has_class & has_text[: len(z)])
            if len(both):
                of_own = classify([texts.words(self.modality, own[row]) for row in both])
                metrics[name]["own_texts"] = float((of_own == classes[both]).mean())
        return metrics


@dataclass(frozen=True)
class _TrainingRows:
    """Training rows, at most ``TRAINING_ROWS``."""

    data: Dataset
    present: dict[str, Bool[np.ndarray, " row"]]
    features: dict[str, Float[np.ndarray, "row feature"]]
    """Of all modalities but texts and classes."""
    classes: dict[str, Int64[np.ndarray, " row"]]

    @classmethod
    def read(cls, data: Dataset) -> "_TrainingRows":
        """Read them."""
        masks: list[np.ndarray] = []
        values: dict[str, list[np.ndarray]] = {m.name: [] for m in data.modalities if not isinstance(m, TextModality)}
        for batch in data.batches(0, _BATCH_ROWS, 0, shuffle=False):
            if sum(map(len, masks)) >= TRAINING_ROWS:
                break
            masks.append(batch.present.cpu().numpy())
            for modality in data.modalities:
                array = batch.arrays[modality.name].cpu().numpy()
                if isinstance(modality, CategoricalModality):
                    values[modality.name].append(array[:, 0])
                elif not isinstance(modality, TextModality):
                    values[modality.name].append(features(modality, array))
        present = dict(zip((m.name for m in data.modalities), np.concatenate(masks).T, strict=True))
        joined = {name: np.concatenate(parts) for name, parts in values.items()}
        classes = {m.name: joined.pop(m.name) for m in data.modalities if isinstance(m, CategoricalModality)}
        return cls(data, present, joined, classes)

    def nearest_texts(
        self, source: str, values: Tensor | None, rows: Int64[np.ndarray, " row"], target: TextModality
    ) -> list[list[Words]] | None:
        """Return the texts of the training row whose value of ``source`` is most similar, for each of ``rows``.

        Args:
            values: of the source.

        Returns:
            None if the source has no features, if its values are not distinct, or if no training row has source and target.
        """
        if source not in self.features or values is None:
            return None
        known = np.flatnonzero(self.present[source] & self.present[target.name])
        (modality,) = (m for m in self.data.modalities if m.name == source)
        queries = features(modality, values[torch.from_numpy(rows).to(values.device)].cpu().numpy())
        if not len(known) or len({query.tobytes() for query in queries}) < DISTINCT * len(queries):
            return None
        gallery = self.features[source][known]
        center = gallery.mean(0)
        one, other = (part - center for part in (queries, gallery))
        similarity = one @ (other / np.maximum(np.linalg.norm(other, axis=1, keepdims=True), 1e-12)).T
        of_rows = self.data.texts(target.name)
        return [[texts.words(target, text) for text in of_rows[known[row]]] for row in similarity.argmax(1)]


def _fit_classifiers(modality: TextModality, train: Dataset, read: Callable[[], _TrainingRows]) -> dict[str, Classify]:
    """Return a classifier of texts for each categorical modality that has at least two classes in training rows with a text."""
    if not any(isinstance(m, CategoricalModality) for m in train.modalities):
        return {}
    rows, classifiers, of_rows = read(), dict[str, Classify](), train.texts(modality.name)
    for name, classes in rows.classes.items():
        known = np.flatnonzero(rows.present[name] & rows.present[modality.name])
        if len(np.unique(classes[known])) > 1:
            words = [texts.words(modality, of_rows[row][0]) for row in known]
            classifiers[name] = fit_words_classifier(words, classes[known])
    return classifiers


def _nearest_score(cider: CiderD, nearest: Sequence[Sequence[Words]]) -> float:
    """Return the mean score of the texts of the nearest training rows. Unknown words of a text equal no other word."""
    known = [[tuple(word if word != texts.UNKNOWN_WORD else object() for word in text) for text in own] for own in nearest]
    most = max(map(len, known))
    scores = [cider([own[number % len(own)] for own in known]) for number in range(most)]
    return float(np.mean(scores))
