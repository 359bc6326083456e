"""Metrics of rows whose modalities belong together, for any method that embeds or predicts modalities."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from numpy.typing import NDArray
from torch import Tensor

from concord.model.modality import BinaryModality, CategoricalModality, Modality, VectorModality
from concord.training.data.dataset import Dataset
from concord.training.evaluation.metrics.attributes import f1, mean_average_precision
from concord.training.evaluation.metrics.calibration import attribute_calibration, class_calibration
from concord.training.evaluation.metrics.numbers import r2
from concord.training.evaluation.metrics.retrieval import ranks, recall_at
from concord.training.objectives import DISTINCT, figure_name

RETRIEVAL_ROWS = 1000
"""Largest size of a gallery."""
PREDICTED_ROWS = 10_000
"""Test rows whose attributes, classes and vectors are predicted, at least."""

PREDICTION_SAMPLES = 32
"""Samples of a posterior over which decoded attributes and numbers are averaged."""

Rows = NDArray[np.intp]
Embed = Callable[[str, str, Rows], tuple[Float[np.ndarray, "row latent"], Float[np.ndarray, "row latent"]] | None]
"""(query, gallery, rows) -> embeddings of all rows of both. None: the method cannot embed them."""
Predict = Callable[[str, str, Rows], Float[np.ndarray, "row value"] | None]
"""(target, source, rows) -> probabilities or numbers of the target for these rows. None: the method cannot predict them."""


@dataclass(frozen=True)
class CrossModalRows:
    """The values of test rows."""

    modalities: Sequence[Modality]
    values: dict[str, Shaped[np.ndarray, "row ..."]]
    present: Bool[np.ndarray, "row modality"]

    def sources(self, target: str) -> dict[str, str]:
        """Return what a modality can be predicted from: every other one, and all others together, by name in metrics."""
        names = [m.name for m in self.modalities]
        others = {name: name for name in names if name != target}
        return others | ({f"all but {target}": figure_name("others", names)} if len(others) > 1 else {})

    def rows(self, source: str, target: str) -> Rows:
        """Return the rows that have the target and at least one modality of the source."""
        names = [m.name for m in self.modalities]
        has_target = self.present[:, names.index(target)]
        is_source = np.array([name == source or (source == f"all but {target}" and name != target) for name in names])
        return np.flatnonzero(has_target & self.present[:, is_source].any(1))

    def galleries(self) -> Iterator[tuple[str, str, Rows]]:
        """Iterate over queries, galleries, and the first rows that have both, ``RETRIEVAL_ROWS`` at most."""
        names = [m.name for m in self.modalities]
        several = [(f"all but {name}", name) for name in names] if len(names) > 2 else []
        for query, gallery in [*itertools.permutations(names, 2), *several]:
            yield query, gallery, self.rows(query, gallery)[:RETRIEVAL_ROWS]

    def retrieval(self, embed: Embed) -> dict[str, dict[str, Any]]:
        """Return {query: {gallery: {rows, recall@k, median_rank}}}."""
        metrics: dict[str, dict[str, Any]] = {}
        for query, gallery, rows in self.galleries():
            if len(rows) < 2 or not are_distinct(self.values[gallery][rows]):
                continue
            if (embeddings := embed(query, gallery, rows)) is not None:
                one, other = (part[rows] for part in embeddings)
                recalls = {f"recall@{k}": recall for k, recall in recall_at(one, other).items()}
                figures = {"rows": len(rows), **recalls, "median_rank": float(np.median(ranks(one, other)))}
                metrics.setdefault(self.sources(gallery)[query], {})[gallery] = figures
        return metrics

    def predictions(self, predict: Predict) -> dict[str, dict[str, Any]]:
        """Return ``attributes``, ``classes`` and ``numbers``, each {target: {source: metrics}}.

        Calibration is that of classes and attributes, see ``calibration``.
        """
        metrics: dict[str, dict[str, Any]] = {"attributes": {}, "classes": {}, "numbers": {}}
        for modality in self.modalities:
            if not isinstance(modality, BinaryModality | CategoricalModality | VectorModality):
                continue
            for source, title in self.sources(modality.name).items():
                rows = self.rows(source, modality.name)
                predicted = predict(modality.name, source, rows) if len(rows) else None
                if predicted is None:
                    continue
                kind, scores = _scores(modality, self.values[modality.name][rows], predicted)
                if scores:
                    metrics[kind].setdefault(modality.name, {})[title] = {"rows": len(rows), **scores}
        return metrics


def are_distinct(values: Shaped[np.ndarray, "row ..."]) -> bool:
    """Whether rows can be searched by these values: at least the share ``DISTINCT`` of them is distinct."""
    return len({value.tobytes() for value in values}) >= DISTINCT * len(values)


def hashes(array: Shaped[Tensor, "row ..."]) -> Int64[Tensor, "row 1"]:
    """Return a hash of each row, to compare rows without keeping them."""
    return torch.tensor([[hash(row.tobytes())] for row in array.numpy()], dtype=torch.int64).reshape(-1, 1)


def rows_needed(test: Dataset) -> int:
    """Return the number of test rows, from the first one on, that retrieval and predictions use."""
    present = np.stack([test.columns[m.name].present for m in test.modalities], axis=1)
    galleries = CrossModalRows(test.modalities, {}, present).galleries()
    last = max((int(rows[-1]) for _, _, rows in galleries if len(rows)), default=-1)
    predicts = any(isinstance(m, BinaryModality | CategoricalModality | VectorModality) for m in test.modalities)
    return min(len(test), max(last + 1, PREDICTED_ROWS if predicts else 0))


def _scores(
    modality: Modality, truth: Shaped[np.ndarray, "row ..."], predicted: Float[np.ndarray, "row value"]
) -> tuple[str, dict[str, float]]:
    """Return the name of the table of a modality's kind, and the metrics. They are empty if the truth does not vary."""
    if isinstance(modality, BinaryModality):
        precision = mean_average_precision(truth, predicted)
        if precision is None:
            return "attributes", {}
        scores = {"map": precision[0], "chance": precision[1], "f1": f1(truth, predicted)}
        scores["f1_chance"] = f1(truth, np.broadcast_to(truth.mean(axis=0), truth.shape))
        return "attributes", scores | attribute_calibration(truth, predicted)
    if isinstance(modality, CategoricalModality):
        classes = truth[:, 0]
        majority = np.bincount(classes).max() / len(classes)
        scores = {"accuracy": float(np.mean(predicted.argmax(1) == classes)), "majority": float(majority)}
        return "classes", scores | class_calibration(classes, predicted)
    value = r2(truth, predicted)
    return "numbers", {} if value is None else {"r2": value}
