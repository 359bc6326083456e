"""Published figures, written where they are read from what was measured: the README's results table."""

import re
from pathlib import Path
from typing import Any

from model.bundle import Manifest

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def results_table(manifest: Manifest) -> str:
    """Markdown of a bundle's figures on the test split.

    Raises:
        KeyError: the bundle was exported without the figures of ``evaluate``.
    """
    metrics: dict[str, Any] = manifest.metrics
    probe: dict[str, float] = metrics["probe"]
    refinement, training = metrics["refinement"], metrics["training"]
    lines = ["| embedding of | linear probe, 500 points |", "| --- | --- |"]
    lines += [f"| {name.replace('+', ' + ')} | {value:.3f} |" for name, value in probe.items() if name != "joint"]
    lines += [f"| all, by the joint encoder that training starts from | {probe['joint']:.3f} |", ""]
    by_step = refinement["elbo_by_step"]
    shown = [step for step in (0, 1, 2, 4, 8) if step < len(by_step)]
    lines += [
        f"| refinement of complete rows | {' | '.join(f'step {step}' for step in shown)} |",
        f"| --- |{' --- |' * len(shown)}",
        f"| mean ELBO, weighted nats | {' | '.join(f'{by_step[step]:.1f}' for step in shown)} |",
        "",
        f"{refinement['steps']} steps raise the ELBO of {refinement['raised']:.1%} of the {metrics['test_rows']:,} test rows; "
        f"judged with fresh noise, of {refinement['raised_fresh_noise']:.1%}, from {refinement['elbo_before']:.1f} to "
        f"{refinement['elbo_after']:.1f} on average. Training took {training['seconds'] / 60:.0f} minutes on 2 CPU cores and "
        f"{training['peak_memory_bytes'] / 2**30:.1f} GiB.",
    ]
    return "\n".join(lines)


def write_results(readme: Path, manifest: Manifest) -> None:
    """Put the table between the README's markers.

    Raises:
        ValueError: the README has no such markers.
    """
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme}: lacks the markers {BEGIN} and {END}")
    table = f"{BEGIN}\n{results_table(manifest)}\n{END}"
    readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: table, text, flags=re.DOTALL), encoding="utf-8")
