"""The picture of how it scales."""

from pathlib import Path

from PIL import Image

from tests.benchmarks.scaling import draw


def test_a_picture_of_the_four(tmp_path: Path) -> None:
    rates = {"encode": 100.0, "step": 10.0}
    points = {
        name: [{"x": x, **rates, "resident_mb": 90.0 * x} for x in (1, 2, 4)] for name in ("batch", "latent", "modalities")
    }
    points["steps"] = [{"x": steps, "rows_per_s": 10.0 / (1 + steps), "resident_mb": 100.0} for steps in (0, 10)]
    with Image.open(draw(points, tmp_path)) as picture:
        assert picture.size[0] > 1000
        assert len(set(picture.convert("L").tobytes())) > 10
