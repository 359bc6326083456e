"""The tables of what refinement and the alignment change."""

import json
from pathlib import Path
from typing import Any

import pytest

from concord.training.reports import effects
from concord.training.reports.effects import (
    VARIANTS,
    effect_scores,
    effects_table,
    regimes_table,
    write_effects,
    write_regimes,
)

RESULTS = Path(__file__).parents[3] / "training" / "results" / "ablations"
NUMBERS = {"concord": 0.5, "unrefined": 0.4, "unaligned": 0.2, "neither": 0.25}


def evaluation(value: float) -> dict[str, Any]:
    return {
        "retrieval": {
            "photo": {"title": {"rows": 100, "recall@10": value}},
            "title": {"photo": {"rows": 100, "recall@10": value + 0.2}},
            "others": {"photo": {"rows": 100, "recall@10": 1.0}},
        },
        "classes": {"kind": {"title": {"rows": 100, "accuracy": value, "majority": 0.1}}},
        "numbers": {},
        "probe": {"photo": value, "title": value, "photo+title": 1.0, "joint": 1.0},
        "pictures": {"photo": {source: {"frechet_efficientnet": 100 * value} for source in ("photo", "title", "prior")}},
        "refinement": {"elbo_joint": 10 * value, "elbo_before": 5 * value},
        "requests": {"steps": [0, 1], "present": {"1": {"log_likelihood": {"photo": [value, 9.0], "title": [3 * value, 9.0]}}}},
    }


def test_scores_are_means_over_pairs_of_single_modalities() -> None:
    assert effect_scores(evaluation(0.5)) == {
        "recall@10 ↑": pytest.approx(0.6),
        "accuracy ↑": 0.5,
        "probe ↑": 0.5,
        "FD of pictures ↓": 50,
        "log-likelihood of what is absent, from one modality, nats ↑": 1.0,
        "ELBO of the joint posterior, weighted nats ↑": 5.0,
        "ELBO of the aligned posterior, weighted nats ↑": 2.5,
    }
    assert effect_scores({"retrieval": {}}) == {}


def test_differences_are_of_equal_seeds() -> None:
    runs = {
        name: [{"probe ↑": value + seed * (0.1 if name == "concord" else 0)} for seed in (0, 1)]
        for name, value in NUMBERS.items()
    }
    header, _, row = effects_table(runs).splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["Concord"] == "0.550"
    assert cells["refinement, with a teacher"] == "+0.150 ± 0.071"
    assert cells["refinement, without one"] == "-0.050 ± 0.000"
    assert cells["a teacher, with refinement |"] == "+0.350 ± 0.071 |"


def test_score_that_a_run_lacks_has_no_row() -> None:
    runs = {name: [{"probe ↑": 0.5, "recall@10 ↑": 0.5}] for name in VARIANTS}
    del runs["neither"][0]["probe ↑"]
    assert [line.split(" | ")[0] for line in effects_table(runs).splitlines()[2:]] == ["| recall@10 ↑"]


def test_tables_are_of_the_seeds_that_all_variants_have(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results" / "shop-2000"
    readme.write_text("<!-- effects -->\n<!-- /effects -->\n")
    folder.mkdir(parents=True)
    for name, value in NUMBERS.items():
        for seed in (0, 1, 2) if name == "concord" else (0, 2):
            file = f"concord-{seed}.json" if name == "concord" else f"shop-{name}-{seed}.json"
            (folder / file).write_text(json.dumps(evaluation(value)))
        if name == "unaligned":
            write_effects(readme, tmp_path / "results")
            assert "shop" not in readme.read_text(), "a variant is missing"
    write_effects(readme, tmp_path / "results")
    assert "`shop-2000`, seeds 0, 2:" in readme.read_text()
    assert "| probe ↑ | 0.500 | 0.400 | 0.200 | 0.250 | +0.100 ± 0.000 |" in readme.read_text()


def test_digits_are_read_from_the_rows_of_a_comparison(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- effects -->\n<!-- /effects -->\n")
    write_effects(readme, RESULTS)
    assert "coherence of samples, from one modality ↑" in readme.read_text()
    assert set(effects.DIGITS.values()) == set(VARIANTS)


def test_regimes_are_compared_over_the_seeds_that_both_have() -> None:
    def row(variant: str, seed: int, cosine: float, **changes: Any) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "status": "done",
            "frechet": {"title": {"photo": 8.0}},
            "coherence": {"cross": {"photo": {"title": 0.5}}, "joint": 0.5},
            "cosine": {"photo": {"matched": cosine, "shuffled": 0.0}},
            "gap_closed": None,
            "log_likelihood": {"joint": -2.0},
            "seconds": 60.0,
            **changes,
        }
        return {"model": "concord", "variant": variant, "seed": seed, **figures}

    rows = [
        row("digits-narrow", 0, 0.5),
        row("digits-narrow", 1, 0.75),
        row("digits-narrow", 2, 0.9),
        row("digits-narrow-unrefined", 0, 0.75),
        row("digits-narrow-unrefined", 1, 0.75),
        row("digits-narrow-unrefined", 2, 0.1, status="failed"),
        row("digits-latent-8", 0, 0.5),
    ]
    header, _, line = regimes_table(rows).splitlines()
    cells = dict(zip(header.split("|"), line.split("|"), strict=True))
    assert line.startswith("| `digits-narrow` | 0, 1 |")
    assert cells[" cosine ↑ "] == " -0.125 ± 0.177 "


def test_regimes_are_written_into_their_section(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- regimes -->\n<!-- /regimes -->\n")
    write_regimes(readme, RESULTS / "none.json")
    assert readme.read_text() == "<!-- regimes -->\n<!-- /regimes -->\n"
    write_regimes(readme, RESULTS / "digits-version-4-2000.json")
    assert "| `digits-gaussian` | 0, 1, 2 | +0.004 ± 0.004 |" in readme.read_text()
