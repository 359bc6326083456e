"""Metrics of the linear baselines, on the test rows and with the metrics of the model."""

from typing import Any

import numpy as np
from jaxtyping import Float

from concord.model.modality import BinaryModality, CategoricalModality
from concord.training.baselines.linear import Affine, features, logistic, tuned_cca, tuned_ridge
from concord.training.data.dataset import Dataset
from concord.training.evaluation.cross_modal import CrossModalRows, Rows, rows_needed
from concord.training.progress import Progress

LINEAR_ROWS = 50_000
"""Largest number of training rows that a baseline is fitted to."""
_BATCH_ROWS = 500


def evaluate_linear(train: Dataset, test: Dataset, dimensions: int, progress: Progress) -> dict[str, Any]:
    """Return ``retrieval`` by canonical correlation analysis, ``classes`` by logistic and the others by ridge regression.

    Names and rows are those of ``evaluate_cross_modal``. Retrieval is by a single modality only. A metric is omitted if no
    training row has both modalities.

    Args:
        dimensions: of the common space of two modalities.
    """
    modalities = test.modalities
    training, testing = _Features.read(train, LINEAR_ROWS), _Features.read(test, rows_needed(test), shuffle=False)
    maps: dict[frozenset[str], dict[str, Affine]] = {}
    names = [m.name for m in modalities]
    attributes = {m.name for m in modalities if isinstance(m, BinaryModality)}
    classes = {m.name: m.categories for m in modalities if isinstance(m, CategoricalModality)}

    def embed(query: str, gallery: str, _: Rows) -> tuple[np.ndarray, np.ndarray] | None:
        pair = frozenset((query, gallery))
        if query not in names:
            return None
        if pair not in maps:
            rows = training.of.rows(query, gallery)
            if len(rows) < 2:
                return None
            of_query, of_gallery = tuned_cca(training.by_name[query][rows], training.by_name[gallery][rows], dimensions)
            maps[pair] = {query: of_query, gallery: of_gallery}
        return maps[pair][query](testing.by_name[query]), maps[pair][gallery](testing.by_name[gallery])

    def predict(target: str, source: str, rows: Rows) -> np.ndarray | None:
        known = training.of.rows(source, target)
        if len(known) < 2:
            return None
        inputs, of_test = training.inputs(source, target)[known], testing.inputs(source, target)[rows]
        if target in classes:
            values = training.of.values[target][known, 0]
            return logistic(inputs, values, classes[target])(of_test)
        predicted = tuned_ridge(inputs, training.by_name[target][known])(of_test)
        return np.clip(predicted, 0, 1) if target in attributes else predicted

    with progress.stage("linear baselines", 2) as advance:
        retrieval = testing.of.retrieval(embed)
        advance(1, {})
        metrics = {"retrieval": retrieval, **testing.of.predictions(predict)}
        advance(2, {})
    return {name: values for name, values in metrics.items() if values}


class _Features:
    """The features of rows: zeros where a modality is absent."""

    def __init__(self, rows: CrossModalRows, by_name: dict[str, Float[np.ndarray, "row feature"]]) -> None:
        self.of, self.by_name = rows, by_name

    @classmethod
    def read(cls, data: Dataset, limit: int, *, shuffle: bool = True) -> "_Features":
        """Return the features of about ``limit`` rows of a split: a random choice if it has more, or the first ones."""
        parts: dict[str, list[np.ndarray]] = {m.name: [] for m in data.modalities}
        values: dict[str, list[np.ndarray]] = {m.name: [] for m in data.modalities}
        masks: list[np.ndarray] = []
        for batch in data.batches(0, _BATCH_ROWS, 0, shuffle=shuffle and len(data) > limit, average=True):
            if sum(map(len, masks)) >= limit:
                break
            masks.append(batch.present.numpy())
            for index, modality in enumerate(data.modalities):
                array = batch.arrays[modality.name].numpy()
                values[modality.name].append(array)
                parts[modality.name].append(features(modality, array) * masks[-1][:, index : index + 1])
        joined = {name: np.concatenate(arrays) for name, arrays in values.items()}
        rows = CrossModalRows(data.modalities, joined, np.concatenate(masks))
        return cls(rows, {name: np.concatenate(arrays) for name, arrays in parts.items()})

    def inputs(self, source: str, target: str) -> Float[np.ndarray, "row feature"]:
        """Return the features of a source: of one modality, or of all but the target and which of them each row has."""
        if source in self.by_name:
            return self.by_name[source]
        others = [name for name in self.by_name if name != target]
        indices = [index for index, name in enumerate(self.by_name) if name != target]
        return np.concatenate([*(self.by_name[name] for name in others), self.of.present[:, indices]], axis=1, dtype=np.float32)
