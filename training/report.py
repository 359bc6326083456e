"""Published figures, written where they are read from what was measured: the README's tables."""

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.manifest import Manifest
from training.scores import average, coherence, finished, name_of, title_of

COLUMNS = {
    "probe": ("probe", "{:.3f}"),
    "coherence_one": ("coherence from one", "{:.3f}"),
    "coherence_more": ("from more", "{:.3f}"),
    "coherence_joint": ("from the prior", "{:.3f}"),
    "frechet": ("FD", "{:.1f}"),
    "cosine": ("cosine", "{:.3f}"),
    "gap_closed": ("gap closed", "{:.0%}"),
    "log_likelihood": ("log p(X)", "{:,.0f}"),
    "minutes": ("minutes", "{:.1f}"),
}
LOWER_IS_BETTER = {"frechet", "minutes"}


def results_table(manifest: Manifest) -> str:
    """Markdown of a bundle's figures on the test split.

    Raises:
        KeyError: the bundle was exported without the figures of ``evaluate``.
    """
    metrics: dict[str, Any] = manifest.metrics
    probe: dict[str, float] = metrics["probe"]
    training = metrics["training"]
    lines = ["| embedding of | linear probe, 500 points |", "| --- | --- |"]
    lines += [f"| {name.replace('+', ' + ')} | {value:.3f} |" for name, value in probe.items() if name != "joint"]
    lines += [f"| all, by the joint encoder that training starts from | {probe['joint']:.3f} |", ""]
    if "coherence" in metrics:
        lines += [*_coherence_table(metrics), ""]
    lines += _refinement_table(metrics)
    minutes, gigabytes = training["seconds"] / 60, training["peak_memory_bytes"] / 2**30
    lines.append(f"Training took {minutes:.0f} minutes and {gigabytes:.1f} GiB, on a CPU.")
    return "\n".join(lines)


def _coherence_table(metrics: Mapping[str, Any]) -> list[str]:
    """Coherence by source and target, and what it comes to."""
    cross, sure = metrics["coherence"]["cross"], metrics["judges"]
    targets = [name for name in cross if any(name in of for of in cross.values())]
    lines = [
        f"| coherence of one sample, from | {' | '.join(f'into {t}' for t in targets)} |",
        f"| --- |{' --- |' * len(targets)}",
    ]
    for source, of in cross.items():
        cells = [f"{of[target]:.3f}" if target in of else "" for target in targets]
        lines.append(f"| {source.replace('+', ' + ')} | {' | '.join(cells)} |")
    one, more = (coherence(metrics, several=several) for several in (False, True))
    refined = metrics["refined"]["coherence"][metrics["refinement"]["steps"]]
    bounds = ", ".join(f"{share:.3f} of the real {name}s" for name, share in sure.items())
    told = f"Mean over single sources {one:.3f}, over pairs {more:.3f}; over single sources after request-time refinement "
    told += f"{refined:.3f}. The judges read {bounds} right."
    return [*lines, "", told]


def _refinement_table(metrics: Mapping[str, Any]) -> list[str]:
    """The ELBO by step, and for how many rows it rises."""
    refinement = metrics["refinement"]
    by_step = refinement["elbo_by_step"]
    shown = [step for step in (0, 1, 2, 4, 8) if step < len(by_step)]
    return [
        f"| refinement of complete rows | {' | '.join(f'step {step}' for step in shown)} |",
        f"| --- |{' --- |' * len(shown)}",
        f"| mean ELBO, weighted nats | {' | '.join(f'{by_step[step]:.1f}' for step in shown)} |",
        "",
        f"{refinement['steps']} steps raise the ELBO of {refinement['raised']:.1%} of the {metrics['test_rows']:,} test rows; "
        f"judged with fresh noise, of {refinement['raised_fresh_noise']:.1%}, from {refinement['elbo_before']:.1f} to "
        f"{refinement['elbo_after']:.1f} on average.",
        "",
    ]


def comparison_table(content: Mapping[str, Any]) -> str:
    """Markdown of a results file of ``compare``: means over seeds and standard deviations, the best mean of a column in bold,
    what was not measured left open."""
    budget, rows = content["budget"], content["rows"]
    size = f"{budget['rows_per_epoch']:,}" if budget["rows_per_epoch"] else "all"
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"`{content['name']}`: {budget['epochs']} epochs of {size} training rows for every model"
        f"{' (a reduced budget)' if budget['reduced'] else ''}, {content['test_rows']:,} test rows, "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}; `{content['command']}` wrote it.",
        "",
        f"| model | {' | '.join(title for title, _ in COLUMNS.values())} |",
        f"| --- |{' --- |' * len(COLUMNS)}",
    ]
    averages = {model: {score: average(done, score) for score in COLUMNS} for model, done in finished(content)}
    for model, found in averages.items():
        cells = []
        for score, (_, form) in COLUMNS.items():
            mean, std = found[score]
            cell = "" if mean is None else form.format(mean) + (f" ± {form.format(std)}" if std is not None else "")
            means = [value for other in averages.values() if (value := other[score][0]) is not None]
            best = min if score in LOWER_IS_BETTER else max
            cells.append(f"**{cell}**" if len(means) > 1 and mean == best(means) else cell)
        lines.append(f"| {title_of(model)} | {' | '.join(cells)} |")
    if wrong := [
        f"{title_of(name_of(row))} with seed {row['seed']} ({row['status']})" for row in rows if row["status"] != "done"
    ]:
        lines += ["", f"Not in the table: {', '.join(wrong)}."]
    return "\n".join(lines)


def rows_table(every: Mapping[str, Any], complete: Mapping[str, Any]) -> str:
    """Markdown of two evaluations on the same test rows: trained on all rows with what each has, and on the complete ones."""
    lines = ["| | test rows | all rows | complete rows | by chance |", "| --- | --- | --- | --- | --- |"]
    for name, sources in every["attributes"].items():
        for source, found in sources.items():
            other = complete["attributes"][name][source]
            for figure, title in (("map", "mean average precision"), ("f1", "F1")):
                chance = found["chance" if figure == "map" else "f1_chance"]
                cells = [f"{found['rows']:,}", f"{found[figure]:.3f}", f"{other[figure]:.3f}", f"{chance:.3f}"]
                lines.append(f"| {name} from {source}, {title} | {' | '.join(cells)} |")
    for query, galleries in every["retrieval"].items():
        for gallery, found in galleries.items():
            other, rows = complete["retrieval"][query][gallery], found["rows"]
            cells = [f"{rows:,}", f"{found['recall@10']:.3f}", f"{other['recall@10']:.3f}", f"{10 / rows:.3f}"]
            lines.append(f"| {gallery} by {query}, recall@10 | {' | '.join(cells)} |")
    minutes = " and ".join(f"{of['training']['seconds'] / 60:.0f}" for of in (every, complete))
    return "\n".join([*lines, "", f"Training took {minutes} minutes, on one CPU core."])


def teachers_table(refined: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of evaluations of several seeds each, the same ones in this order: encoders taught by the refined posterior, and
    by the joint posterior as it comes. Means and standard deviations, and those of the differences seed by seed."""
    lines = ["| | taught by the refined posterior | by the joint posterior | difference |", "| --- | --- | --- | --- |"]
    figures = [_by_title(one) for one in refined]
    others = [_by_title(one) for one in plain]
    for title in figures[0]:
        pairs = [(one[title], other[title]) for one, other in zip(figures, others, strict=True)]
        form = "{:.1f}" if "nats" in title else "{:.3f}"
        cells = [_spread([pair[0] for pair in pairs], form), _spread([pair[1] for pair in pairs], form)]
        lines.append(f"| {title} | {' | '.join(cells)} | {_spread([a - b for a, b in pairs], form.replace(':', ':+'))} |")
    seconds = [one["training"]["seconds"] for one in (*refined, *plain)]
    took = f"{len(refined)} seeds each; a training took {statistics.median(seconds):.0f} seconds, in the median."
    return "\n".join([*lines, "", took])


def _spread(values: Sequence[float], form: str) -> str:
    return f"{form.format(statistics.fmean(values))} ± {form.replace('+', '').format(statistics.stdev(values))}"


def _by_title(evaluation: Mapping[str, Any]) -> dict[str, float]:
    told = {}
    for name, sources in evaluation["attributes"].items():
        for source, found in sources.items():
            told[f"{name} from {source}, mean average precision (by chance {found['chance']:.3f})"] = found["map"]
    for query, galleries in evaluation["retrieval"].items():
        for gallery, found in galleries.items():
            told[f"{gallery} by {query}, recall@10 (by chance {10 / found['rows']:.3f})"] = found["recall@10"]
    told |= {f"probe of {name}": value for name, value in evaluation["probe"].items()}
    refinement = evaluation["refinement"]
    told["ELBO of the joint posterior, weighted nats"] = refinement["elbo_joint"]
    told["ELBO of the aligned posterior, weighted nats"] = refinement["elbo_before"]
    return told


def write_teachers(readme: Path, folder: Path) -> None:
    """Put the table of ``folder``'s refined-<seed>.json and plain-<seed>.json, of ``evaluate``, between the README's markers;
    nothing where they are not there.

    Raises:
        ValueError: the README has no such markers.
    """
    seeds = sorted(file.stem.removeprefix("refined-") for file in folder.glob("refined-*.json"))
    if len(seeds) > 1:
        runs = [[json.loads((folder / f"{name}-{seed}.json").read_text()) for seed in seeds] for name in ("refined", "plain")]
        _write_section(readme, "features", teachers_table(*runs))


def write_rows(readme: Path, folder: Path) -> None:
    """Put the table of ``folder``'s all.json and complete.json, of ``evaluate``, between the README's markers; nothing where
    they are not there.

    Raises:
        ValueError: the README has no such markers.
    """
    files = [folder / f"{name}.json" for name in ("all", "complete")]
    if all(file.exists() for file in files):
        _write_section(readme, "birds", rows_table(*(json.loads(file.read_text()) for file in files)))


def write_comparisons(readme: Path, results: Path, section: str = "comparison") -> list[Path]:
    """Put the tables of all results files into a section of the README and draw their charts beside them; returns the charts.

    Nothing is written while there are no results.

    Raises:
        ValueError: the README has no markers for them.
    """
    contents = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"), key=lambda file: file.stem)]
    if not contents:
        return []
    from training.charts import draw_charts  # noqa: PLC0415 - matplotlib comes with the extra dev alone

    charts = []
    sections = []
    for content in contents:
        charts += draw_charts(content, results)
        named = ["scores", "refinement", *(f"grid-{name}" for name, _ in finished(content))]
        pictures = {name: results / f"{content['name']}-{name}.png" for name in named}
        shown = [f"[{name}]({picture.as_posix()})" for name, picture in pictures.items() if picture.exists()]
        sections.append("\n".join([comparison_table(content), "", f"Pictures: {', '.join(shown)}."]))
    _write_section(readme, section, "\n\n".join(sections))
    return charts


def write_results(readme: Path, manifest: Manifest) -> None:
    """Put the table of the built-in bundle between the README's markers.

    Raises:
        ValueError: the README has no such markers.
    """
    _write_section(readme, "results", results_table(manifest))


def _write_section(readme: Path, name: str, content: str) -> None:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = readme.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{readme}: lacks the markers {begin} and {end}")
    section = f"{begin}\n{content}\n{end}"
    readme.write_text(re.sub(f"{begin}.*{end}", lambda _: section, text, flags=re.DOTALL), encoding="utf-8")
