"""The reference of the configuration file."""

import re

from concord.training.config import Config
from concord.training.reports.config_reference import OF_IMAGES, OF_MODALITIES, OF_STAGES, TABLES, config_reference


def keys_below(heading: str) -> list[str]:
    parts = config_reference().split("\n\n")
    return re.findall(r"^\| `(\w+)`", parts[parts.index(f"{heading}:") + 1], re.MULTILINE)


def test_config_reference_has_every_key_of_every_table() -> None:
    """Each key of a table is below its heading, below the heading that all kinds share, or a table itself."""
    nested = {"modalities", "data", "sources", "network", "objective", "joint", "refiner", "contrast"}
    nested |= {"align", "refresh", "flow", "validation", "gallery"}
    for heading, (model, shared) in TABLES.items():
        assert set(shared) <= {*OF_MODALITIES, *OF_IMAGES, *OF_STAGES, "epochs"}
        assert set(keys_below(heading)) == set(model.model_fields) - set(shared) - nested, heading


def test_config_reference_has_the_keys_of_every_kind_of_modality_once() -> None:
    (shared,) = [heading for heading in TABLES if heading.startswith("Every `[[modalities]]`")]
    assert keys_below(shared) == ["name", "weight"]
    for heading, (model, _) in TABLES.items():
        if heading.startswith("`[[modalities]]`"):
            assert sorted([*keys_below(shared), "kind", *keys_below(heading)]) == sorted(model.model_fields), heading


def test_config_reference_segmentation_has_the_default_of_a_configuration() -> None:
    (line,) = [line for line in config_reference().splitlines() if line.startswith("| `segmentation` |")]
    assert line.split(" | ")[2] == '`"unicode"`'


def test_config_reference_has_a_table_for_every_model_of_the_configuration() -> None:
    models = {model for model, _ in TABLES.values()}
    nested = Config.model_json_schema()["$defs"]
    assert {model.__name__ for model in models} >= set(nested)


def test_config_reference_shows_values_default_and_meaning() -> None:
    lines = config_reference().splitlines()
    assert (
        "| `learning_rate` | number > 0 | `0.001` | Peak learning rate: linear warm-up, then cosine decay to zero. |" in lines
    )
    assert any(
        line.startswith('| `divergence` | `"forward"`, `"reverse"`, `"both"`, `"none"` | `"forward"` |') for line in lines
    )
    assert any(line.startswith("| `held_out` | number > 0 and ≤ 0.5 |  |") for line in lines)
    assert any(line.startswith("| `channels` | integer, 1 to 64 | required |") for line in lines)
    assert any(line.startswith("| `samples` | integer ≥ 2, a multiple of 2 | `2` |") for line in lines)
    assert any(line.startswith("| `columns` | table of text or list of text | required |") for line in lines)
    rows = [line for line in lines if line.startswith("| `")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows), "an unescaped bar would make another column"


def test_config_reference_describes_every_key() -> None:
    """``likelihood`` and ``kind`` say enough by their values."""
    undescribed = [row for row in config_reference().splitlines() if row.endswith("|  |")]
    assert all(re.match(r"\| `(likelihood|kind)`", row) for row in undescribed), undescribed
