"""The scaling figure."""

from pathlib import Path

import pytest
from PIL import Image

from concord.model import bundle
from tests.benchmarks import untrained
from tests.benchmarks.scaling import plot


@pytest.mark.slow
def test_untrained_bundle_has_the_latent_size_and_the_modalities_that_were_asked_for(tmp_path: Path) -> None:
    untrained.main(latent=5, modalities=2, folder=tmp_path / "bundle")
    manifest = bundle.read(tmp_path / "bundle").manifest
    assert (manifest.latent, [m.name for m in manifest.modalities]) == (5, ["digit", "photo"])


def test_plot_writes_a_figure_with_all_panels(tmp_path: Path) -> None:
    rates = {"encode": 100.0, "step": 10.0}
    points = {
        name: [{"x": x, **rates, "resident_mb": 90.0 * x} for x in (1, 2, 4)] for name in ("batch", "latent", "modalities")
    }
    points["steps"] = [{"x": steps, "rows_per_s": 10.0 / (1 + steps), "resident_mb": 100.0} for steps in (0, 10)]
    worker = {"photo_rps": 100.0, "word_rps": 200.0, "resident_mb": 200.0}
    workers = {str(count): [{**worker, "workers": count, "cores": min(count, 2)}] for count in (1, 2, 4)}
    with Image.open(plot(points, {}, tmp_path)) as picture:
        without = picture.size[0]
    with Image.open(plot(points, workers, tmp_path)) as picture:
        assert picture.size[0] > without, "a panel of workers"
        assert picture.size[0] > 1000
        assert len(set(picture.convert("L").tobytes())) > 10
