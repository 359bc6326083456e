"""The choice of beta on held-out rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from concord.training.reports.held_out import SHARED, choices_table, choose_beta, variants_table, write_choices


def content(beta: float, **models: tuple[float, float, float]) -> dict[str, Any]:
    """Return a results file with one seed: probe, coherence of means and Fréchet distance of each model."""
    rows = [
        {
            "model": model,
            "seed": 0,
            "status": "done",
            "probe": {"a": probe, "b": probe, "a+b": 1.0},
            "coherence": {
                "cross": {"a": {"b": 0.5}, "a+b": {"c": 1.0}},
                "cross_means": {"a": {"b": coherence}, "a+b": {"c": 1.0}},
                "joint": 0.1,
            },
            "frechet": {"a": {"b": distance}},
            "cosine": {"a": {"matched": 1.0, "shuffled": 0.0}},
            "seconds": 60,
        }
        for model, (probe, coherence, distance) in models.items()
    ]
    shared = {
        "budget": {"epochs": 1},
        "test_rows": 8,
        "held_out": 8,
        "data": [{"file": "a"}],
        "classifier_accuracy": {"a": 0.9},
    }
    return {"beta": beta, **shared, "rows": rows}


GRID = [
    content(10.0, concord=(0.9, 0.8, 30.0), mvae=(0.7, 0.2, 60.0)),
    content(1.0, concord=(0.8, 0.95, 20.0), mvae=(0.6, 0.28, 70.0), jnf=(0.9, 0.9, 10.0)),
]


def test_beta_has_the_highest_mean_of_probe_and_coherence() -> None:
    assert choose_beta(GRID) == {"concord": 1.0, "mvae": 10.0}, "JNF has only one beta"


def test_files_that_cannot_be_compared_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"one file for each beta, received the betas \[10.0, 10.0\]"):
        choose_beta([GRID[0], GRID[0]])
    for field in SHARED:
        with pytest.raises(ValueError, match=f"files with other {field}"):
            choose_beta([GRID[0], {**GRID[1], field: "another"}])
    other_seed = [{**row, "seed": 1} for row in GRID[1]["rows"]]
    with pytest.raises(ValueError, match="concord: every beta needs the same seeds"):
        choose_beta([GRID[0], {**GRID[1], "rows": other_seed}])


def test_lower_distance_decides_between_equal_betas() -> None:
    best, equal, worse = (0.5, 0.509, 3.0), (0.5, 0.501, 2.0), (0.5, 0.498, 1.0)
    grid = [content(beta, mvae=scores) for beta, scores in ((1.0, best), (3.0, equal), (10.0, worse))]
    assert choose_beta(grid) == {"mvae": 3.0}
    assert choose_beta([grid[0], grid[2]]) == {"mvae": 1.0}


def test_lower_beta_is_chosen_if_two_have_the_same_scores() -> None:
    assert choose_beta([content(10.0, mvae=(0.5, 0.5, 1.0)), content(9.0, mvae=(0.5, 0.5, 1.0))]) == {"mvae": 9.0}


def test_table_has_every_beta_and_the_chosen_one_in_bold() -> None:
    assert choices_table(GRID).splitlines() == [
        "| model | β | seeds | probe ↑ | coherence of means, from one ↑ | coherence of samples, from one ↑ | FD ↓ |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| Concord | **1** | 0 | 0.800 | 0.950 | 0.500 | 20.0 |",
        "| Concord | 10 | 0 | 0.900 | 0.800 | 0.500 | 30.0 |",
        "| MVAE | 1 | 0 | 0.600 | 0.280 | 0.500 | 70.0 |",
        "| MVAE | **10** | 0 | 0.700 | 0.200 | 0.500 | 60.0 |",
        "",
        "Not in the table, since a beta is missing: JNF.",
    ]


def test_table_is_written_from_the_files_of_a_folder(tmp_path: Path) -> None:
    readme = tmp_path / "digits.md"
    readme.write_text("before <!-- held-out --> old <!-- /held-out --> after\n")
    write_choices(readme, tmp_path / "none")
    assert " old " in readme.read_text()
    for number, part in enumerate(GRID):
        (tmp_path / f"{number}.json").write_text(json.dumps(part))
    write_choices(readme, tmp_path)
    assert choices_table(GRID) in readme.read_text()


def test_variants_of_a_configuration_have_a_separate_table(tmp_path: Path) -> None:
    (variant,) = content(1.0, concord=(0.85, 0.9, 10.0))["rows"]
    varied = {**GRID[1], "name": "tiny", "rows": [*GRID[1]["rows"], {**variant, "variant": "sharp"}]}
    assert choices_table([GRID[0], varied]) == choices_table(GRID), "variants have no part in the choice of beta"
    assert variants_table(varied).splitlines()[2:] == [
        "| Concord | 0 | 0.800 | 0.950 | 0.500 | 1.000 | 0.100 | 20.0 | 1.000 |",
        "| sharp | 0 | 0.850 | 0.900 | 0.500 | 1.000 | 0.100 | 10.0 | 1.000 |",
    ]
    readme = tmp_path / "digits.md"
    readme.write_text("<!-- held-out --><!-- /held-out -->")
    for number, part in enumerate((GRID[0], varied)):
        (tmp_path / f"{number}.json").write_text(json.dumps(part))
    write_choices(readme, tmp_path)
    assert f"`tiny`:\n\n{variants_table(varied)}" in readme.read_text()
    assert readme.read_text().count("| configuration |") == 1
