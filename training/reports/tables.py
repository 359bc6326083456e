"""Markdown tables of measured results, and the documents that contain them."""

import json
import os
import re
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from concord.model.bundle.manifest import Manifest
from concord.training.evaluation.requests import recommendation, request_scores
from concord.training.reports.summary import (
    DISPLAY_NAMES,
    LOWER_IS_BETTER,
    NOT_RANKED,
    average,
    display_name,
    finished_rows,
    mean_coherence,
    rename_old_keys,
    row_name,
)

COLUMNS = {
    "probe": ("probe ↑", "{:.3f}"),
    "probe_two": ("of two ↑", "{:.3f}"),
    "means_one": ("coherence of means, from one ↑", "{:.3f}"),
    "means_more": ("of means, from more ↑", "{:.3f}"),
    "coherence_one": ("coherence of samples, from one ↑", "{:.3f}"),
    "coherence_more": ("of samples, from more ↑", "{:.3f}"),
    "coherence_joint": ("of samples of the prior ↑", "{:.3f}"),
    "frechet": ("FD ↓", "{:.1f}"),
    "cosine": ("cosine ↑", "{:.3f}"),
    "gap_closed": ("gap closed ↑", "{:.0%}"),
    "log_likelihood": ("log p(X) ↑", "{:,.0f}"),
    "log_likelihood_best": ("log p(X), best proposal ↑", "{:,.0f}"),
    "minutes": ("minutes ↓", "{:.1f}"),
}
"""Title, with ↑ where higher and ↓ where lower is better, and number format of each score."""


def results_table(manifest: Manifest) -> str:
    """Return Markdown tables of a bundle's metrics on the test split.

    Raises:
        KeyError: the bundle was exported without the metrics of ``evaluate``.
    """
    metrics = rename_old_keys(manifest.metrics)
    probe: dict[str, float] = metrics["probe"]
    training = metrics["training"]
    lines = ["| embedding of | probe ↑ |", "| --- | --- |"]
    lines += [f"| {name.replace('+', ' + ')} | {value:.3f} |" for name, value in probe.items() if name != "joint"]
    lines += [f"| all, by the joint encoder | {probe['joint']:.3f} |", ""]
    if "coherence" in metrics:
        lines += [*_coherence_table(metrics), ""]
    lines += _refinement_table(metrics)
    if steps := steps_table([metrics]):
        lines += [steps, ""]
    minutes, gigabytes = training["seconds"] / 60, training["peak_memory_bytes"] / 2**30
    lines.append(f"Training took {minutes:.0f} minutes and {gigabytes:.1f} GiB of memory, on a CPU.")
    return "\n".join(lines)


def _coherence_table(metrics: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table of coherence by source and target, and a sentence with the means."""
    cross = metrics["coherence"]["cross"]
    targets = [name for name in cross if any(name in by_target for by_target in cross.values())]
    lines = [
        f"| coherence ↑, generated from | {' | '.join(targets)} |",
        f"| --- |{' --- |' * len(targets)}",
    ]
    for source, by_target in cross.items():
        cells = [f"{by_target[target]:.3f}" if target in by_target else "" for target in targets]
        lines.append(f"| {source.replace('+', ' + ')} | {' | '.join(cells)} |")
    one, more = (mean_coherence(metrics, multimodal=multimodal) for multimodal in (False, True))
    by_step, steps = metrics["refined"]["coherence"], metrics["refinement"]["steps"]
    accuracy = ", ".join(f"{share:.3f} of the real {name}s" for name, share in metrics["classifier_accuracy"].items())
    means = f"Mean from one modality {one:.3f}, from more {more:.3f}. The frozen classifiers label {accuracy} correctly."
    refined = f"{steps} steps of refinement at request time change the mean from one modality from {by_step[0]:.3f} to "
    refined += f"{by_step[steps]:.3f}. (Step 0 differs from the {one:.3f} above because it is measured with other samples.)"
    return [*lines, "", means, "", refined]


def _refinement_table(metrics: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table of the ELBO by step, and a sentence with the share of rows that improve."""
    refinement = metrics["refinement"]
    by_step, rows = refinement["elbo_by_step"], refinement.get("rows", metrics["test_rows"])
    shown = [step for step in (0, 1, 2, 4, 8) if step < len(by_step)]
    return [
        f"| refinement of complete rows ↑ | {' | '.join(f'step {step}' for step in shown)} |",
        f"| --- |{' --- |' * len(shown)}",
        f"| mean ELBO, weighted nats | {' | '.join(f'{by_step[step]:.1f}' for step in shown)} |",
        "",
        f"{refinement['steps']} steps raise the ELBO of {refinement['raised']:.1%} of the {rows:,} test rows; "
        f"estimated with new noise, of {refinement['raised_fresh_noise']:.1%}, from {refinement['elbo_before']:.1f} to "
        f"{refinement['elbo_after']:.1f} on average.",
        "",
    ]


def steps_table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the figures of requests by number of refinement steps, and a sentence on the recommended one.

    Cells are means over seeds and standard deviations. The text is empty if no evaluation has these figures.

    Args:
        evaluations: of one model with several seeds. Those without these figures, of earlier versions, are left out.
    """
    measured = [evaluation for evaluation in evaluations if "requests" in evaluation]
    if not measured:
        return ""
    steps = measured[0]["requests"]["steps"]
    scores = [request_scores(evaluation) for evaluation in measured]
    lines = [
        f"| steps against quality of requests ↑ | {' | '.join(f'step {step}' for step in steps)} |",
        f"| --- |{' --- |' * len(steps)}",
    ]
    for title in scores[0]:
        number_format = "{:.1f}" if "nats" in title else "{:.3f}"
        by_step = zip(*(of_seed[title] for of_seed in scores if title in of_seed), strict=True)
        lines.append(f"| {title} | {' | '.join(mean_and_std(values, number_format) for values in by_step)} |")
    sentences = dict.fromkeys(filter(None, map(recommendation, measured)))
    return "\n".join([*lines, *(["", " ".join(sentences)] if sentences else [])])


SUMMARY = ("probe", "probe_two", "means_one", "means_more", "coherence_one", "coherence_more", "frechet", "log_likelihood")
SUMMARY_TITLES = {
    "probe": "accuracy of a linear probe on the embedding of one modality ↑",
    "probe_two": "the same of two modalities ↑",
    "means_one": "coherence of values decoded from the mean, from one modality ↑",
    "means_more": "the same from two modalities ↑",
    "coherence_one": "coherence of values decoded from a sample, from one modality ↑",
    "coherence_more": "the same from two modalities ↑",
    "frechet": "Fréchet distance (FD) of generated images ↓",
    "log_likelihood": "lower bound of log p(X), nats, too loose to rank ↑",
}


def summary_table(content: Mapping[str, Any]) -> str:
    """Return a short Markdown table of a results file of ``compare``: a row per score, a column per model, the best bold.

    Variants that are not in ``DISPLAY_NAMES`` are left out.
    """
    models = [(name, rows) for name, rows in finished_rows(content) if name in DISPLAY_NAMES]
    lines = [f"| | {' | '.join(display_name(name) for name, _ in models)} |", f"| --- |{' --- |' * len(models)}"]
    for score in SUMMARY:
        means = [average(rows, score)[0] for _, rows in models]
        measured = [mean for mean in means if mean is not None]
        if not measured:
            continue
        best = (min if score in LOWER_IS_BETTER else max)(measured)
        number_format = COLUMNS[score][1]
        cells = ["" if mean is None else number_format.format(mean) for mean in means]
        ranked = score not in NOT_RANKED
        bold = [f"**{cell}**" if ranked and mean == best else cell for cell, mean in zip(cells, means, strict=True)]
        lines.append(f"| {SUMMARY_TITLES[score]} | {' | '.join(bold)} |")
    return "\n".join(lines)


def comparison_table(content: Mapping[str, Any]) -> str:
    """Return a Markdown table of a results file of ``compare``.

    Cells are means over seeds and standard deviations. The best mean of a column is bold, except in the columns of
    ``NOT_RANKED``. A cell is empty if a seed lacks the score. A column without any score is left out.
    """
    budget, rows = content["budget"], content["rows"]
    size = f"{budget['rows_per_epoch']:,}" if budget["rows_per_epoch"] else "all"
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"`{content['name']}`: {budget['epochs']} epochs of {size} training rows for every model"
        f"{' (a reduced budget)' if budget['reduced'] else ''}, {content['test_rows']:,} test rows, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}.",
        "",
        "```sh",
        *_wrap(content["command"]),
        "```",
        "",
    ]
    averages = {model: {score: average(done, score) for score in COLUMNS} for model, done in finished_rows(content)}
    columns = {score: column for score, column in COLUMNS.items() if any(of[score][0] is not None for of in averages.values())}
    lines += [
        f"| model | {' | '.join(title for title, _ in columns.values())} |",
        f"| --- |{' --- |' * len(columns)}",
    ]
    for model, scores in averages.items():
        cells = []
        for score, (_, number_format) in columns.items():
            mean, std = scores[score]
            deviation = f" ± {number_format.format(std)}" if std is not None else ""
            cell = "" if mean is None else number_format.format(mean) + deviation
            means = [value for other in averages.values() if (value := other[score][0]) is not None]
            best = min if score in LOWER_IS_BETTER else max
            ranked = len(set(means)) > 1 and score not in NOT_RANKED
            cells.append(f"**{cell}**" if ranked and mean == best(means) else cell)
        lines.append(f"| {display_name(model)} | {' | '.join(cells)} |")
    if unfinished := [
        f"{display_name(row_name(row))} with seed {row['seed']} ({row['status']})" for row in rows if row["status"] != "done"
    ]:
        lines += ["", f"Not in the table: {', '.join(unfinished)}."]
    return "\n".join(lines)


def _wrap(command: str) -> list[str]:
    """Return the lines of a shell command. An option and its value stay on one line."""
    joined = re.sub(r"(--[\w-]+) (?!-)", "\\1\0", command)
    lines = textwrap.wrap(joined, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") + " \\" * (line is not lines[-1]) for line in lines]


def rows_table(every: Mapping[str, Any], complete: Mapping[str, Any]) -> str:
    """Return a Markdown table of two evaluations on the same test rows.

    Args:
        every: of a model trained on all rows, with the modalities that each row has.
        complete: of a model trained on the complete rows.
    """
    lines = ["| score ↑ | test rows | trained on all rows | on complete rows | chance level |", f"|{' --- |' * 5}"]
    for name, sources in every["attributes"].items():
        for source, metrics in sources.items():
            other = complete["attributes"][name][source]
            for metric, title in (("map", "mean average precision"), ("f1", "F1")):
                chance = metrics["chance" if metric == "map" else "f1_chance"]
                cells = [f"{metrics['rows']:,}", f"{metrics[metric]:.3f}", f"{other[metric]:.3f}", f"{chance:.3f}"]
                lines.append(f"| {name} from {source}, {title} | {' | '.join(cells)} |")
    for query, galleries in every["retrieval"].items():
        for gallery, metrics in galleries.items():
            other, rows = complete["retrieval"][query][gallery], metrics["rows"]
            cells = [f"{rows:,}", f"{metrics['recall@10']:.3f}", f"{other['recall@10']:.3f}", f"{10 / rows:.3f}"]
            lines.append(f"| {gallery} by {query}, recall@10 | {' | '.join(cells)} |")
    minutes = " and ".join(f"{evaluation['training']['seconds'] / 60:.0f}" for evaluation in (every, complete))
    return "\n".join([*lines, "", f"One seed. Training took {minutes} minutes, on one CPU core."])


def teachers_table(refined: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table that compares the two teachers of the aligned encoders.

    Cells are means over seeds and standard deviations. The last column does the same for the differences of equal seeds.

    Args:
        refined: evaluations of models with the refined posterior as teacher, one per seed.
        plain: the same with the unrefined joint posterior as teacher, for the same seeds in the same order.
    """
    lines = ["| score ↑ | teacher: refined posterior | teacher: joint posterior | difference |", "| --- | --- | --- | --- |"]
    refined_scores = [_scores_by_title(evaluation) for evaluation in refined]
    plain_scores = [_scores_by_title(evaluation) for evaluation in plain]
    for title in refined_scores[0]:
        pairs = [(one[title], other[title]) for one, other in zip(refined_scores, plain_scores, strict=True)]
        number_format = "{:.1f}" if "nats" in title else "{:.3f}"
        cells = [
            mean_and_std([one for one, _ in pairs], number_format),
            mean_and_std([other for _, other in pairs], number_format),
            mean_and_std([one - other for one, other in pairs], number_format.replace(":", ":+")),
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    seconds = [evaluation["training"]["seconds"] for evaluation in (*refined, *plain)]
    note = f"{len(refined)} seeds each. The median training time is {statistics.median(seconds):.0f} seconds, on a CPU."
    return "\n".join([*lines, "", note])


def mean_and_std(values: Sequence[float], number_format: str) -> str:
    """Return the mean, and with several values their standard deviation."""
    if len(values) == 1:
        return number_format.format(values[0])
    std = number_format.replace("+", "").format(statistics.stdev(values))
    return f"{number_format.format(statistics.fmean(values))} ± {std}"


def _scores_by_title(evaluation: Mapping[str, Any]) -> dict[str, float]:
    scores = {}
    for name, sources in evaluation["attributes"].items():
        for source, metrics in sources.items():
            scores[f"{name} from {source}, mean average precision (chance level {metrics['chance']:.3f})"] = metrics["map"]
    for query, galleries in evaluation["retrieval"].items():
        for gallery, metrics in galleries.items():
            scores[f"{gallery} by {query}, recall@10 (chance level {10 / metrics['rows']:.3f})"] = metrics["recall@10"]
    scores |= {f"probe of {name}": value for name, value in evaluation["probe"].items()}
    refinement = evaluation["refinement"]
    scores["ELBO of the joint posterior, weighted nats"] = refinement["elbo_joint"]
    scores["ELBO of the aligned posterior, weighted nats"] = refinement["elbo_before"]
    return scores


def methods_table(evaluations: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """Return a Markdown table of several models on the same test rows, with the linear baselines as the last column.

    Cells are means over seeds and standard deviations. The best mean of a row is bold if there are several.

    Args:
        evaluations: by model and seed. An evaluation with the linear baselines has them under ``linear``.
    """
    runs = {name: list(by_seed.values()) for name, by_seed in evaluations.items()}
    linear = next((run["linear"] for model in runs.values() for run in model if "linear" in run), None)
    scores = {display_name(name): [pair_scores(run) for run in model] for name, model in runs.items()}
    if linear is not None:
        scores["linear"] = [pair_scores(linear)]
    lines = [f"| ↑ | rows | chance | {' | '.join(scores)} |", f"| --- | --- | --- |{' --- |' * len(scores)}"]
    for title, (_, rows, chance) in next(iter(scores.values()))[0].items():
        means = {}
        cells = {}
        for name, by_seed in scores.items():
            values = [found[title][0] for found in by_seed if title in found]
            if len(values) == len(by_seed):
                means[name] = statistics.fmean(values)
                cells[name] = mean_and_std(values, "{:.3f}")
        best = max(means.values())
        is_best = {name: len(means) > 1 and mean == best for name, mean in means.items()}
        row = [f"**{cells[name]}**" if is_best.get(name) else cells.get(name, "") for name in scores]
        lines.append(f"| {title} | {rows} | {chance} | {' | '.join(row)} |")
    seeds = "; ".join(f"{display_name(name)}: {', '.join(map(str, sorted(by_seed)))}" for name, by_seed in evaluations.items())
    minutes = [run["training"]["seconds"] / 60 for run in next(iter(runs.values()))]
    note = (
        f"Seeds: {seeds}. Training of {display_name(next(iter(runs)))} took {statistics.median(minutes):.0f} minutes, on a CPU"
    )
    return "\n".join([*lines, "", f"{note} that had other jobs too."])


def pair_scores(evaluation: Mapping[str, Any]) -> dict[str, tuple[float, str, str]]:
    """Return value, number of rows and chance level of each score of an evaluation, by title.

    Without scores of what a class says of other modalities, and without probes of several modalities.
    """
    scores: dict[str, tuple[float, str, str]] = {}
    classes = evaluation.get("classes", {})
    for query, galleries in evaluation.get("retrieval", {}).items():
        for gallery, found in galleries.items() if query not in classes else ():
            chance = f"{10 / found['rows']:.3f}"
            scores[f"{gallery} by {query}, recall@10"] = (found["recall@10"], f"{found['rows']:,}", chance)
    for kind, metric, name, level in (
        ("attributes", "map", "mean average precision", "chance"),
        ("classes", "accuracy", "accuracy", "majority"),
        ("numbers", "r2", "R²", ""),
    ):
        for target, sources in evaluation.get(kind, {}).items():
            for source, found in sources.items():
                if source not in classes:
                    chance = f"{found[level]:.3f}" if level else "0.000"
                    scores[f"{target} from {source}, {name}"] = (found[metric], f"{found['rows']:,}", chance)
    probe = {name: value for name, value in evaluation.get("probe", {}).items() if "+" not in name and name not in classes}
    return scores | {f"probe of {name}": (value, "", "") for name, value in probe.items()}


def texts_table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of the texts that a model generates, with a column for each source.

    Cells are means over seeds and standard deviations. A row is empty where a source has no such score.

    Args:
        evaluations: of the same configuration, one per seed.
    """
    tables = [_text_scores(sources) for sources in zip(*(run["texts"].values() for run in evaluations), strict=True)]
    blocks = []
    for name, table in zip(evaluations[0]["texts"], tables, strict=True):
        sources = list(dict.fromkeys(source for row in table.values() for source in row))
        lines = [f"| {name} | {' | '.join(f'from {source}' for source in sources)} |", f"| --- |{' --- |' * len(sources)}"]
        for title, row in table.items():
            cells = [mean_and_std(row[source], "{:.3f}") if source in row else "" for source in sources]
            lines.append(f"| {title} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _text_scores(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the values of each score of a text by source, one for each run: {title: {source: values}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for by_source in runs:
        for source, values in by_source.items():
            for title, value in _text_values(values):
                found.setdefault(title, {}).setdefault(source, []).append(value)
    return found


def _text_values(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield title and value of each score."""
    at_temperature = f"tokens sampled at temperature {values['sampled']['temperature']:g}" if "sampled" in values else ""
    if "rows" in values:
        if values["known_pairs"] is not None:
            yield "pairs of tokens that training texts have ↑", values["known_pairs"]
        yield "distinct texts ↑", values["distinct"]
    if "sampled" in values:
        yield f"distinct texts, {at_temperature} ↑", values["sampled"]["distinct"]
        yield f"pairs of tokens that training texts have, {at_temperature} ↑", values["sampled"]["known_pairs"]
    if "nats" in values:
        yield "nats per token ↓", values["nats"]
        yield "nats per token that z is worth ↑", values["nats_shuffled"] - values["nats"]
    if "cider" in values:
        yield "CIDEr-D ↑", values["cider"]
        yield "CIDEr-D with the mean of z ↑", values["of_mean"]["cider"]
        if "sampled" in values:
            yield f"CIDEr-D, {at_temperature} ↑", values["sampled"]["cider"]
    if "cider_shuffled" in values:
        yield "CIDEr-D given z of another row", values["cider_shuffled"]
    if values.get("cider_nearest"):
        yield "CIDEr-D of the nearest training row", values["cider_nearest"]
        yield "CIDEr-D by that of the nearest training row ↑", values["cider"] / values["cider_nearest"]
    for name, classes in values.get("classes", {}).items():
        yield f"{name}: text of the row's class ↑", classes["accuracy"]
        yield f"{name}: with the mean of z ↑", values["of_mean"]["classes"][name]["accuracy"]
        yield f"{name}: text of the class generated with it ↑", classes["agreement"]
        if "own_texts" in classes:
            yield f"{name}: the row's text", classes["own_texts"]


def write_sentences(readme: Path, folders: Sequence[Path]) -> None:
    """Write the tables of the texts of each folder's concord-<seed>.json into the section ``sentences`` of the README.

    The files are evaluations of ``evaluate``. Without any the README stays unchanged.

    Raises:
        ValueError: the README lacks the markers.
    """
    blocks = []
    for folder in folders:
        files = sorted(folder.glob("concord-*.json"))
        if files:
            runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            blocks += [f"[{folder.name}](../configs/{folder.name}.toml), {_seeds(files)}:", texts_table(runs)]
    if blocks:
        write_section(readme, "sentences", "\n\n".join(blocks))


def write_requests(readme: Path, folders: Sequence[Path]) -> None:
    """Write the tables of requests of each folder's concord-<seed>.json into the section ``requests`` of the README.

    The files are evaluations of ``evaluate``. Files of earlier versions, and of models that do not refine, have no figures of
    requests. Without any the README stays unchanged.

    Raises:
        ValueError: the README lacks the markers.
    """
    blocks = []
    for folder in folders:
        runs = {file: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("concord-*.json"))}
        measured = {file: run for file, run in runs.items() if "requests" in run}
        if measured:
            blocks += [f"`{folder.name}`, {_seeds(list(measured))}:", steps_table(list(measured.values()))]
    if blocks:
        write_section(readme, "requests", "\n\n".join(blocks))


def _seeds(files: Sequence[Path]) -> str:
    """Return the seeds of files <model>-<seed>.json in words."""
    seeds = ", ".join(file.stem.rpartition("-")[2] for file in files)
    return f"seed{'s' if len(files) > 1 else ''} {seeds}"


def write_methods(readme: Path, folder: Path) -> None:
    """Write the table of ``folder``'s <model>-<seed>.json between the markers of the README that have the folder's name.

    The files are evaluations of ``evaluate``. Without them the README stays unchanged.

    Raises:
        ValueError: the README lacks the markers.
    """
    evaluations: dict[str, dict[int, Any]] = {}
    for name in DISPLAY_NAMES:
        for file in sorted(folder.glob(f"{name}-*.json")):
            seed = int(file.stem.removeprefix(f"{name}-"))
            evaluations.setdefault(name, {})[seed] = json.loads(file.read_text(encoding="utf-8"))
    if evaluations:
        write_section(readme, folder.name, methods_table(evaluations))


def write_teachers(readme: Path, folder: Path) -> None:
    """Write the table of ``folder``'s refined-<seed>.json and plain-<seed>.json between the markers of the README.

    The files are evaluations of ``evaluate``. Without them the README stays unchanged.

    Raises:
        ValueError: the README lacks the markers.
    """
    seeds = sorted(file.stem.removeprefix("refined-") for file in folder.glob("refined-*.json"))
    if len(seeds) > 1:
        runs = [[json.loads((folder / f"{name}-{seed}.json").read_text()) for seed in seeds] for name in ("refined", "plain")]
        write_section(readme, "features", teachers_table(*runs))


def write_rows(readme: Path, folder: Path) -> None:
    """Write the table of ``folder``'s all.json and complete.json between the markers of the README.

    The files are evaluations of ``evaluate``. Without them the README stays unchanged.

    Raises:
        ValueError: the README lacks the markers.
    """
    files = [folder / f"{name}.json" for name in ("all", "complete")]
    if all(file.exists() for file in files):
        write_section(readme, "birds", rows_table(*(json.loads(file.read_text()) for file in files)))


def write_comparisons(readme: Path, results: Path, section: str = "comparison") -> list[Path]:
    """Write the tables of all results files into a section of the README, and their charts next to the results files.

    Files of held-out rows are left out: they are for choices, not for reports. Without results files nothing is written.

    Returns:
        the files of the charts.

    Raises:
        ValueError: the README lacks the markers of the section.
    """
    contents = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"), key=lambda file: file.stem)]
    contents = [content for content in contents if content.get("held_out") is None]
    if not contents:
        return []
    from concord.training.reports.charts import write_charts  # noqa: PLC0415 - only the extra dev installs matplotlib

    charts = []
    sections = []
    for content in contents:
        charts += write_charts(content, results)
        names = ["scores", "refinement", *(f"grid-{name}" for name, _ in finished_rows(content))]
        images = {name: results / f"{content['name']}-{name}.png" for name in names}
        links = [f"[{name}]({os.path.relpath(image, readme.parent)})" for name, image in images.items() if image.exists()]
        sections.append("\n".join([comparison_table(content), "", f"Images: {', '.join(links)}."]))
    write_section(readme, section, "\n\n".join(sections))
    return charts


def write_section(readme: Path, name: str, content: str) -> None:
    """Replace the text between the markers <!-- name --> and <!-- /name --> of a document.

    Raises:
        ValueError: the document lacks the markers.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = readme.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{readme}: the markers {begin} and {end} are missing")
    section = f"{begin}\n{content}\n{end}"
    readme.write_text(re.sub(f"{begin}.*{end}", lambda _: section, text, flags=re.DOTALL), encoding="utf-8")
