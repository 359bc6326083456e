"""Tables and charts say what the results file says, and nothing is written while there is none."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.charts import scores_figure
from training.report import comparison_table, rows_table, write_comparisons, write_rows, write_teachers
from training.scores import average, finished, scores

README = "# Text\n<!-- comparison -->\nold\n<!-- /comparison -->\nmore\n"


def row(model: str, seed: int, photo: float, **changes: Any) -> dict[str, Any]:
    return {
        "model": model,
        "seed": seed,
        "status": "done",
        "probe": {"digit": 0.9, "photo": photo, "digit+photo": 1.0, "joint": 1.0},
        "coherence": {"cross": {"digit": {"photo": 0.5}, "photo": {"digit": 0.7}, "digit+photo": {"word": 0.8}}, "joint": 0.3},
        "frechet": {"digit": {"photo": 10.0}, "photo": {"digit": 20.0}, "prior": {"photo": 99.0}},
        "cosine": {"digit": {"matched": 0.8, "shuffled": 0.1}, "photo": {"matched": 0.6, "shuffled": 0.1}},
        "gap": {"elbo_by_step": [-10.0, -8.0, -7.5], "elbo_adam": -7.0, "closed_by_step": [0, 0.66, 0.83]},
        "gap_closed": 0.66,
        "refined": {"coherence": [0.6, 0.7, 0.71], "milliseconds_per_step": 2.0},
        "log_likelihood": {"joint": -1234.5},
        "seconds": 90,
        **changes,
    }


@pytest.fixture
def content() -> dict[str, Any]:
    rival = {"gap": None, "gap_closed": None, "refined": None}
    return {
        "name": "tiny-40",
        "command": "python -m training compare tiny.toml",
        "budget": {"rows_per_epoch": 4000, "epochs": 3, "reduced": True},
        "test_rows": 2000,
        "rows": [
            row("mmvae", 0, 0.7, **rival),
            row("concord", 0, 0.8),
            row("concord", 1, 0.9),
            {"model": "jnf", "seed": 0, "status": "failed", "error": "killed"},
        ],
    }


def test_scores_are_means_of_their_kind() -> None:
    assert scores(row("concord", 0, 0.8)) == pytest.approx(
        {
            "probe": 0.85,
            "coherence_one": 0.6,
            "coherence_more": 0.8,
            "coherence_joint": 0.3,
            "frechet": 15.0,
            "cosine": 0.6,
            "gap_closed": 0.66,
            "log_likelihood": -1234.5,
            "minutes": 1.5,
        }
    )


def test_seeds_are_averaged_and_what_one_lacks_is_left_open(content: dict[str, Any]) -> None:
    models = dict(finished(content))
    assert list(models) == ["concord", "mmvae"]
    assert average(models["concord"], "probe") == pytest.approx((0.875, statistics.stdev((0.85, 0.9))))
    assert average(models["mmvae"], "probe") == (pytest.approx(0.8), None)
    assert average(models["mmvae"], "gap_closed") == (None, None)


def test_the_table(content: dict[str, Any]) -> None:
    table = comparison_table(content)
    assert "3 epochs of 4,000 training rows for every model (a reduced budget), 2,000 test rows, seeds 0, 1" in table
    assert "`python -m training compare tiny.toml`" in table
    concord, mmvae = (
        next(line for line in table.splitlines() if line.startswith(f"| {name} |")) for name in ("Concord", "MMVAE")
    )
    assert concord.startswith("| Concord | **0.875 ± 0.035** | **0.600 ± 0.000** |")
    assert "| 66% ± 0% |" in concord  # nobody else has any
    assert mmvae.startswith("| MMVAE | 0.800 | **0.600** |")
    assert mmvae.endswith("|  | **-1,234** | **1.5** |")
    assert "Not in the table: JNF with seed 0 (failed)." in table


def test_variants_stand_behind_the_models_by_their_own_names(content: dict[str, Any], tmp_path: Path) -> None:
    content["rows"].insert(0, row("concord", 0, 0.6, variant="tiny-reversed"))
    content["rows"].append({"model": "concord", "variant": "tiny-other", "seed": 1, "status": "failed"})
    assert [name for name, _ in finished(content)] == ["concord", "mmvae", "tiny-reversed"]
    lines = comparison_table(content).splitlines()
    assert next(line for line in lines if "tiny-reversed" in line).startswith("| tiny-reversed | 0.750 | **0.600** |")
    assert next(line for line in lines if line.startswith("| Concord |")).startswith("| Concord | **0.875 ± 0.035** |")
    assert lines[-1] == "Not in the table: JNF with seed 0 (failed), tiny-other with seed 1 (failed)."
    readme = tmp_path / "README.md"
    readme.write_text("<!-- ablations -->\n<!-- /ablations -->\n")
    (tmp_path / "tiny-40.json").write_text(json.dumps(content))
    assert write_comparisons(readme, tmp_path, "ablations")
    assert "| tiny-reversed |" in readme.read_text()


def test_readme_and_charts(content: dict[str, Any], tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(README)
    results.mkdir()
    assert write_comparisons(readme, results) == []
    assert readme.read_text() == README
    (results / "tiny-40.json").write_text(json.dumps(content))
    charts = write_comparisons(readme, results)
    assert [chart.name for chart in charts] == ["tiny-40-scores.png", "tiny-40-refinement.png"]
    for chart in charts:
        assert chart.stat().st_size < 200_000
        with Image.open(chart) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    text = readme.read_text()
    assert text.startswith("# Text\n<!-- comparison -->\n`tiny-40`")
    assert text.endswith("<!-- /comparison -->\nmore\n")
    assert f"[scores]({results.as_posix()}/tiny-40-scores.png), [refinement]" in text
    before = [chart.read_bytes() for chart in charts]
    write_comparisons(readme, results)
    assert [chart.read_bytes() for chart in charts] == before
    assert readme.read_text() == text


def test_bars_are_as_long_as_the_scores(content: dict[str, Any]) -> None:
    panels = scores_figure(content).axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["Concord", "MMVAE"]
    lengths = [[bar.get_width() for bar in panel.patches] for panel in panels]
    assert lengths == [pytest.approx(pair) for pair in ([0.875, 0.8], [0.6, 0.6], [0.8, 0.8], [0.3, 0.3])]
    top, bottom = panels[0].patches
    assert panels[0].transData.transform(top.get_xy())[1] > panels[0].transData.transform(bottom.get_xy())[1]


def test_the_whole_budget_comes_before_a_reduced_one(content: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    for name in ("tiny-40", "tiny"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, "name": name}))
    write_comparisons(readme, tmp_path)
    assert 0 < readme.read_text().index("`tiny`") < readme.read_text().index("`tiny-40`")


def test_a_model_that_does_not_refine_has_no_such_chart(content: dict[str, Any], tmp_path: Path) -> None:
    content["rows"] = content["rows"][:1]
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "tiny-40.json").write_text(json.dumps(content))
    assert [chart.name for chart in write_comparisons(tmp_path / "README.md", tmp_path)] == ["tiny-40-scores.png"]


def test_a_readme_without_markers_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "tiny-40.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks the markers <!-- comparison -->"):
        write_comparisons(tmp_path / "README.md", tmp_path)


def test_all_rows_beside_complete_ones(tmp_path: Path) -> None:
    def evaluation(quality: float) -> dict[str, Any]:
        found = {"rows": 50, "map": quality, "chance": 0.1, "f1": quality / 2, "f1_chance": 0.2}
        retrieval = {"photo": {"caption": {"rows": 40, "recall@1": 0.0, "recall@10": quality}}}
        return {"attributes": {"traits": {"photo": found}}, "retrieval": retrieval, "training": {"seconds": 60}}

    table = rows_table(evaluation(0.8), evaluation(0.6))
    assert "| traits from photo, mean average precision | 50 | 0.800 | 0.600 | 0.100 |" in table
    assert "| traits from photo, F1 | 50 | 0.400 | 0.300 | 0.200 |" in table
    assert "| caption by photo, recall@10 | 40 | 0.800 | 0.600 | 0.250 |" in table
    readme = tmp_path / "README.md"
    readme.write_text("<!-- birds -->\nold\n<!-- /birds -->\n")
    write_rows(readme, tmp_path)
    assert "old" in readme.read_text()
    for name in ("all", "complete"):
        (tmp_path / f"{name}.json").write_text(json.dumps(evaluation(0.5)))
    write_rows(readme, tmp_path)
    assert "recall@10" in readme.read_text()
    assert "old" not in readme.read_text()


def test_teachers_are_compared_seed_by_seed(tmp_path: Path) -> None:
    def evaluation(quality: float) -> dict[str, Any]:
        found = {"rows": 50, "map": quality, "chance": 0.1, "f1": 0.3, "f1_chance": 0.2}
        retrieval = {"photo": {"caption": {"rows": 40, "recall@1": 0.0, "recall@10": 0.5}}}
        return {
            "attributes": {"traits": {"photo": found}},
            "retrieval": retrieval,
            "probe": {"photo": 0.7},
            "refinement": {"elbo_joint": -100 * quality, "elbo_before": -200.0},
            "training": {"seconds": 60},
        }

    readme = tmp_path / "README.md"
    readme.write_text("<!-- features -->\nold\n<!-- /features -->\n")
    write_teachers(readme, tmp_path)
    assert "old" in readme.read_text()
    for seed, (refined, plain) in enumerate([(0.5, 0.3), (0.7, 0.6)]):
        (tmp_path / f"refined-{seed}.json").write_text(json.dumps(evaluation(refined)))
        (tmp_path / f"plain-{seed}.json").write_text(json.dumps(evaluation(plain)))
    write_teachers(readme, tmp_path)
    told = readme.read_text()
    row = "| traits from photo, mean average precision (by chance 0.100) | 0.600 ± 0.141 | 0.450 ± 0.212 | +0.150 ± 0.071 |"
    assert row in told
    assert "| ELBO of the joint posterior, weighted nats | -60.0 ± 14.1 | -45.0 ± 21.2 | -15.0 ± 7.1 |" in told
    assert "| caption by photo, recall@10 (by chance 0.250) | 0.500 ± 0.000 | 0.500 ± 0.000 | +0.000 ± 0.000 |" in told
    assert "2 seeds each" in told
