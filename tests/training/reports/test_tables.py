"""Tables and charts of results files, and the documents that contain them."""

import json
import shlex
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from concord.model import bundle
from concord.training.reports.charts import scores_figure
from concord.training.reports.summary import average, finished_rows, rename_old_keys, row_scores
from concord.training.reports.tables import (
    SUMMARY,
    comparison_table,
    results_table,
    rows_table,
    steps_table,
    summary_table,
    texts_table,
    write_comparisons,
    write_methods,
    write_requests,
    write_rows,
    write_sentences,
    write_teachers,
)

README = "# Text\n<!-- comparison -->\nold\n<!-- /comparison -->\nmore\n"


def row(model: str, seed: int, photo: float, **changes: Any) -> dict[str, Any]:
    return {
        "model": model,
        "seed": seed,
        "status": "done",
        "probe": {"digit": 0.9, "photo": photo, "digit+photo": 1.0, "joint": 1.0},
        "coherence": {
            "cross": {"digit": {"photo": 0.5}, "photo": {"digit": 0.7}, "digit+photo": {"word": 0.8}},
            "cross_means": {"digit": {"photo": 0.6}, "photo": {"digit": 0.9}, "digit+photo": {"word": 1.0}},
            "joint": 0.3,
        },
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
    without_refinement = {"gap": None, "gap_closed": None, "refined": None}
    return {
        "name": "tiny-40",
        "command": "concord compare tiny.toml",
        "budget": {"rows_per_epoch": 4000, "epochs": 3, "reduced": True},
        "test_rows": 2000,
        "rows": [
            row("mmvae", 0, 0.7, **without_refinement),
            row("concord", 0, 0.8),
            row("concord", 1, 0.9),
            {"model": "jnf", "seed": 0, "status": "failed", "error": "killed"},
        ],
    }


def test_row_scores_are_means_over_sources_and_targets() -> None:
    assert row_scores(row("concord", 0, 0.8)) == pytest.approx(
        {
            "probe": 0.85,
            "probe_two": 1.0,
            "coherence_one": 0.6,
            "coherence_more": 0.8,
            "means_one": 0.75,
            "means_more": 1.0,
            "coherence_joint": 0.3,
            "frechet": 15.0,
            "cosine": 0.6,
            "gap_closed": 0.66,
            "log_likelihood": -1234.5,
            "log_likelihood_best": None,
            "minutes": 1.5,
        }
    )
    assert row_scores(row("concord", 0, 0.8, log_likelihood={"joint": -9.0, "best": -7.0}))["log_likelihood_best"] == -7


def test_rename_old_keys_accepts_metrics_of_older_runs() -> None:
    renamed = rename_old_keys({"judges": {"digit": 0.9}, "probe": {"digit": 0.8}})
    assert renamed == {"classifier_accuracy": {"digit": 0.9}, "probe": {"digit": 0.8}}
    assert list(renamed) == ["classifier_accuracy", "probe"]
    assert rename_old_keys(renamed) == renamed


def test_results_table_of_builtin_bundle_has_classifier_accuracy() -> None:
    """The manifest has the key of older versions."""
    manifest = bundle.read(bundle.builtin(bundle.DEFAULT_BUNDLE)).manifest
    accuracy = rename_old_keys(manifest.metrics)["classifier_accuracy"]
    shares = ", ".join(f"{share:.3f} of the real {name}s" for name, share in accuracy.items())
    assert f"The frozen classifiers label {shares} correctly." in results_table(manifest)


def test_results_table_of_builtin_bundle_compares_steps_of_the_same_samples() -> None:
    """Coherence before and after refinement is measured with one set of samples, that of the table with another."""
    manifest = bundle.read(bundle.builtin(bundle.DEFAULT_BUNDLE)).manifest
    by_step = manifest.metrics["refined"]["coherence"]
    text = results_table(manifest)
    assert f"change the mean from one modality from {by_step[0]:.3f} to {by_step[4]:.3f}." in text


def test_average_is_over_seeds_and_none_for_missing_scores(content: dict[str, Any]) -> None:
    models = dict(finished_rows(content))
    assert list(models) == ["concord", "mmvae"]
    assert average(models["concord"], "probe") == pytest.approx((0.875, statistics.stdev((0.85, 0.9))))
    assert average(models["mmvae"], "probe") == (pytest.approx(0.8), None)
    assert average(models["mmvae"], "gap_closed") == (None, None)


def test_comparison_table_has_means_deviations_and_bold_best(content: dict[str, Any]) -> None:
    table = comparison_table(content)
    assert "3 epochs of 4,000 training rows for every model (a reduced budget), 2,000 test rows, seeds 0, 1" in table
    assert "```sh\nconcord compare tiny.toml\n```" in table
    assert "| model | probe ↑ | of two ↑ | coherence of means, from one ↑ | of means, from more ↑ |" in table
    concord, mmvae = (
        next(line for line in table.splitlines() if line.startswith(f"| {name} |")) for name in ("Concord", "MMVAE")
    )
    assert concord.startswith(
        "| Concord | **0.875 ± 0.035** | 1.000 ± 0.000 | 0.750 ± 0.000 |"
    )  # not bold: the means are the same
    assert "| 66% ± 0% |" in concord  # not bold: no other model has a value
    assert mmvae.startswith("| MMVAE | 0.800 | 1.000 | 0.750 |")
    assert mmvae.endswith("|  | -1,234 | 1.5 |")  # never bold
    assert "Not in the table: JNF with seed 0 (failed)." in table


def test_comparison_table_leaves_out_a_column_without_scores(content: dict[str, Any]) -> None:
    assert "best proposal" not in comparison_table(content)
    for each in content["rows"]:
        each["log_likelihood"] = {"joint": -1234.5, "best": -1200.0}
    assert "| log p(X) ↑ | log p(X), best proposal ↑ | minutes ↓ |" in comparison_table(content)
    assert "| -1,234 | -1,200 | 1.5 |" in comparison_table(content)


def test_comparison_table_wraps_a_long_command(content: dict[str, Any]) -> None:
    files = " ".join(f"training/configs/ablations/variant-{n}.toml" for n in range(8))
    command = f"concord compare {files} " + " ".join(f"--option-{n} value" for n in range(9))
    lines = comparison_table({**content, "command": command}).splitlines()
    block = lines[lines.index("```sh") + 1 : lines.index("```")]
    assert len(block) > 1
    assert max(map(len, block)) <= 120
    assert not any(line.lstrip().startswith("value") for line in block), "an option is split from its value"
    assert shlex.split("\n".join(block).replace("\\\n", "")) == command.split()


def test_summary_table_has_a_row_per_score_and_bold_best(content: dict[str, Any]) -> None:
    content["rows"].append(row("concord", 0, 1.0, variant="tiny-other"))
    lines = summary_table(content).splitlines()
    assert lines[0] == "| | Concord | MMVAE |", "no variant"
    assert len(lines) == 2 + len(SUMMARY)
    assert lines[2].endswith("| **0.875** | 0.800 |")
    assert lines[3].startswith("| the same of two modalities ↑ | **1.000** |")
    assert lines[8].startswith("| Fréchet distance (FD) of generated images ↓ | **15.0** | **15.0** |")


def test_comparison_table_lists_variants_after_the_models(content: dict[str, Any], tmp_path: Path) -> None:
    content["rows"].insert(0, row("concord", 0, 0.6, variant="tiny-reversed"))
    content["rows"].append({"model": "concord", "variant": "tiny-other", "seed": 1, "status": "failed"})
    assert [name for name, _ in finished_rows(content)] == ["concord", "mmvae", "tiny-reversed"]
    lines = comparison_table(content).splitlines()
    assert next(line for line in lines if "tiny-reversed" in line).startswith("| tiny-reversed | 0.750 | 1.000 | 0.750 |")
    assert next(line for line in lines if line.startswith("| Concord |")).startswith("| Concord | **0.875 ± 0.035** |")
    assert lines[-1] == "Not in the table: JNF with seed 0 (failed), tiny-other with seed 1 (failed)."
    readme = tmp_path / "README.md"
    readme.write_text("<!-- ablations -->\n<!-- /ablations -->\n")
    (tmp_path / "tiny-40.json").write_text(json.dumps(content))
    assert write_comparisons(readme, tmp_path, "ablations")
    assert "| tiny-reversed |" in readme.read_text()


def test_write_comparisons_writes_section_and_reproducible_charts(content: dict[str, Any], tmp_path: Path) -> None:
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
        with Image.open(chart) as image:
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    text = readme.read_text()
    assert text.startswith("# Text\n<!-- comparison -->\n`tiny-40`")
    assert text.endswith("<!-- /comparison -->\nmore\n")
    assert "[scores](results/tiny-40-scores.png), [refinement]" in text  # relative to the document
    before = [chart.read_bytes() for chart in charts]
    write_comparisons(readme, results)
    assert [chart.read_bytes() for chart in charts] == before
    assert readme.read_text() == text


def test_scores_figure_has_a_point_for_each_score_and_circles_the_best(content: dict[str, Any]) -> None:
    content["rows"][0]["frechet"] = {"digit": {"photo": 8.0}}
    panels = scores_figure(content).axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["Concord", "MMVAE"]
    points, best = zip(*[[list(zip(*line.get_data(), strict=True)) for line in panel.lines] for panel in panels], strict=True)
    assert [[score for score, _ in panel] for panel in points] == [
        pytest.approx(pair) for pair in ([0.875, 0.8], [0.75, 0.75], [15.0, 8.0])
    ]
    assert best == ([(pytest.approx(0.875), 0)], [(pytest.approx(0.75), 0)], [(pytest.approx(8.0), 1)])
    assert [panel.xaxis_inverted() for panel in panels] == [False, False, True]
    assert panels[0].transData.transform(points[0][0])[1] > panels[0].transData.transform(points[0][1])[1]


def test_write_comparisons_lists_full_budget_before_reduced_one(content: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    for name in ("tiny-40", "tiny"):
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, "name": name}))
    write_comparisons(readme, tmp_path)
    assert 0 < readme.read_text().index("`tiny`") < readme.read_text().index("`tiny-40`")


def test_write_comparisons_without_refinement_has_no_refinement_chart(content: dict[str, Any], tmp_path: Path) -> None:
    content["rows"] = content["rows"][:1]
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "tiny-40.json").write_text(json.dumps(content))
    assert [chart.name for chart in write_comparisons(tmp_path / "README.md", tmp_path)] == ["tiny-40-scores.png"]


def test_write_comparisons_readme_without_markers_is_rejected(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("text")
    (tmp_path / "tiny-40.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="the markers <!-- comparison --> and <!-- /comparison --> are missing"):
        write_comparisons(tmp_path / "README.md", tmp_path)


def test_rows_table_compares_all_rows_with_complete_rows(tmp_path: Path) -> None:
    def evaluation(quality: float) -> dict[str, Any]:
        attributes = {"rows": 50, "map": quality, "chance": 0.1, "f1": quality / 2, "f1_chance": 0.2}
        retrieval = {"photo": {"caption": {"rows": 40, "recall@1": 0.0, "recall@10": quality}}}
        return {"attributes": {"traits": {"photo": attributes}}, "retrieval": retrieval, "training": {"seconds": 60}}

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


def test_teachers_table_compares_equal_seeds(tmp_path: Path) -> None:
    def evaluation(quality: float) -> dict[str, Any]:
        attributes = {"rows": 50, "map": quality, "chance": 0.1, "f1": 0.3, "f1_chance": 0.2}
        retrieval = {"photo": {"caption": {"rows": 40, "recall@1": 0.0, "recall@10": 0.5}}}
        return {
            "attributes": {"traits": {"photo": attributes}},
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
    text = readme.read_text()
    line = "| traits from photo, mean average precision (chance level 0.100) | 0.600 ± 0.141 | 0.450 ± 0.212 | +0.150 ± 0.071 |"
    assert line in text
    assert "| ELBO of the joint posterior, weighted nats | -60.0 ± 14.1 | -45.0 ± 21.2 | -15.0 ± 7.1 |" in text
    assert "| caption by photo, recall@10 (chance level 0.250) | 0.500 ± 0.000 | 0.500 ± 0.000 | +0.000 ± 0.000 |" in text
    assert "2 seeds each" in text


def test_methods_table_has_the_best_mean_of_each_row_bold(tmp_path: Path) -> None:
    def evaluation(recall: float, accuracy: float) -> dict[str, Any]:
        return {
            "retrieval": {name: {"photo": {"rows": 400, "recall@10": recall}} for name in ("title", "kind")},
            "classes": {"kind": {"title": {"rows": 500, "accuracy": accuracy, "majority": 0.25}}},
            "training": {"seconds": 120.0},
        }

    readme, folder = tmp_path / "README.md", tmp_path / "shop"
    folder.mkdir()
    readme.write_text("<!-- shop -->\nold\n<!-- /shop -->\n")
    write_methods(readme, folder)
    assert "old" in readme.read_text()
    linear = {name: part for name, part in evaluation(0.5, 0.9).items() if name != "training"}
    for name, content in (
        ("concord-0", {**evaluation(0.6, 0.7), "probe": {"title": 0.8, "kind": 0.9, "title+kind": 0.9}}),
        ("concord-1", {**evaluation(0.8, 0.9), "probe": {"title": 0.6}}),
        ("contrastive-0", {**evaluation(0.65, 0.3), "linear": linear}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    write_methods(readme, folder)
    lines = readme.read_text().splitlines()
    assert "| ↑ | rows | chance | Concord | Contrastive | linear |" in lines
    assert "| photo by title, recall@10 | 400 | 0.025 | **0.700 ± 0.141** | 0.650 | 0.500 |" in lines
    assert "| kind from title, accuracy | 500 | 0.250 | 0.800 ± 0.141 | 0.300 | **0.900** |" in lines
    assert "| probe of title |  |  | 0.700 ± 0.141 |  |  |" in lines, "the only model with this score is not bold"
    assert len(lines) == 9, "no rows of a class as the source"
    assert (
        "Seeds: Concord: 0, 1; Contrastive: 0. Training of Concord took 2 minutes, on a CPU that had other jobs too." in lines
    )


def of_requests(accuracy: float, recommended: int | None = None) -> dict[str, Any]:
    """Figures of requests, in which 8 steps add 0.2 to the accuracy."""
    accuracies = {"kind": [accuracy] * 4 + [accuracy + 0.1], "size": [accuracy] * 4 + [accuracy + 0.3]}
    present = {"1": {"accuracy": accuracies}, "2": {"log_likelihood": {"kind": [-2.0, -1.5, -1.5, -1.5, -1.5]}}}
    found: dict[str, Any] = {"requests": {"rows": 500, "steps": [0, 1, 2, 4, 8], "present": present}}
    if recommended is not None:
        found["requests"]["held_out"] = {"rows": 400}
        found["recommended_steps"] = recommended
    return found


def test_steps_table_has_a_row_for_each_kind_of_request_and_the_recommended_steps() -> None:
    lines = steps_table([of_requests(0.4, 1), {"refinement": {}}, of_requests(0.6, 8)]).splitlines()
    assert lines == [
        "| steps against quality of requests ↑ | step 0 | step 1 | step 2 | step 4 | step 8 |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| accuracy of classes, from 1 modality |{' 0.500 ± 0.141 |' * 4} 0.700 ± 0.141 |",
        f"| log-likelihood, nats, from 2 modalities | -2.0 ± 0.0 |{' -1.5 ± 0.0 |' * 4}",
        "",
        "Recommended: 1 step, by 400 training rows that were held out. "
        "Recommended: 8 steps, by 400 training rows that were held out.",
    ]
    assert "Recommended" not in steps_table([of_requests(0.5)])


def test_steps_table_without_figures_is_empty_and_changes_no_section() -> None:
    assert steps_table([{"refinement": {}}]) == ""
    manifest = bundle.read(bundle.builtin(bundle.DEFAULT_BUNDLE)).manifest
    metrics = {name: figures for name, figures in manifest.metrics.items() if name != "requests"}
    assert "steps against quality" not in results_table(manifest.model_copy(update={"metrics": metrics}))
    measured = manifest.model_copy(update={"metrics": {**metrics, **of_requests(0.5, 2)}})
    assert steps_table([of_requests(0.5, 2)]) in results_table(measured)


def test_write_requests_writes_the_runs_that_have_figures_of_requests(tmp_path: Path) -> None:
    readme, folders = tmp_path / "README.md", [tmp_path / name for name in ("shop", "birds", "none")]
    readme.write_text("<!-- requests -->\n<!-- /requests -->\n")
    write_requests(readme, folders)
    assert readme.read_text() == "<!-- requests -->\n<!-- /requests -->\n"
    for folder in folders[:2]:
        folder.mkdir()
        (folder / "contrastive-0.json").write_text("{}")
        (folder / "concord-0.json").write_text(json.dumps({"refinement": {}}))
    runs = [of_requests(0.4), of_requests(0.6)]
    for seed, run in enumerate(runs, start=1):
        (folders[0] / f"concord-{seed}.json").write_text(json.dumps(run))
    write_requests(readme, folders)
    assert readme.read_text() == f"<!-- requests -->\n`shop`, seeds 1, 2:\n\n{steps_table(runs)}\n<!-- /requests -->\n"


def of_texts(cider: float) -> dict[str, Any]:
    generated = {"rows": 500, "known_pairs": 0.9, "distinct": 0.5, "repeats": 0.0, "tokens": 9.0}
    classes = {"kind": {"rows": 500, "accuracy": 0.75, "agreement": 0.8, "own_texts": 0.95}}
    mean = {**generated, "cider": 2 * cider, "classes": classes}
    sampled = {**generated, "temperature": 0.3, "distinct": 0.75, "known_pairs": 0.875, "cider": cider / 2, "classes": classes}
    scores = {"cider": cider, "cider_shuffled": 0.25, "cider_nearest": 0.5}
    photo = {**generated, **scores, "of_mean": mean, "sampled": sampled, "classes": classes}
    itself = {**generated, "known_pairs": None, "of_mean": generated, "predicted_rows": 400, "nats": 2.5, "nats_shuffled": 3.0}
    return {"texts": {"caption": {"photo": photo, "caption": itself}}}


def test_texts_table_has_a_column_for_each_source_and_the_ratio_to_the_nearest_training_row() -> None:
    lines = texts_table([of_texts(0.3), of_texts(0.5)]).splitlines()
    assert lines[0] == "| caption | from photo | from caption |"
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:4]] for cells in (line.split("|") for line in lines[2:])}
    assert rows["pairs of tokens that training texts have ↑"] == ["0.900 ± 0.000", ""]
    assert rows["nats per token that z is worth ↑"] == ["", "0.500 ± 0.000"]
    assert rows["CIDEr-D ↑"] == ["0.400 ± 0.141", ""]
    assert rows["CIDEr-D with the mean of z ↑"] == ["0.800 ± 0.283", ""]
    assert rows["distinct texts, tokens sampled at temperature 0.3 ↑"] == ["0.750 ± 0.000", ""]
    assert rows["pairs of tokens that training texts have, tokens sampled at temperature 0.3 ↑"] == ["0.875 ± 0.000", ""]
    assert rows["CIDEr-D, tokens sampled at temperature 0.3 ↑"] == ["0.200 ± 0.071", ""]
    assert rows["CIDEr-D given z of another row"] == ["0.250 ± 0.000", ""]
    assert rows["CIDEr-D by that of the nearest training row ↑"] == ["0.800 ± 0.283", ""]
    assert rows["kind: text of the row's class ↑"] == ["0.750 ± 0.000", ""]
    assert rows["kind: text of the class generated with it ↑"] == ["0.800 ± 0.000", ""]


def test_write_sentences_writes_the_folders_that_have_results(tmp_path: Path) -> None:
    readme, folders = tmp_path / "README.md", [tmp_path / "birds", tmp_path / "shop"]
    readme.write_text("<!-- sentences -->\n<!-- /sentences -->\n")
    write_sentences(readme, folders)
    assert readme.read_text() == "<!-- sentences -->\n<!-- /sentences -->\n"
    folders[1].mkdir()
    (folders[1] / "concord-3.json").write_text(json.dumps(of_texts(0.3)))
    write_sentences(readme, folders)
    assert "[shop](../configs/shop.toml), seed 3:\n\n| caption | from photo |" in readme.read_text()
    assert "birds" not in readme.read_text()
