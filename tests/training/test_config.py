import logging
import os
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from concord.training import config
from concord.training.config import Config

DIGITS = (Path(config.__file__).parent / "configs" / "digits.toml").read_text()
SMALL = """
name = "small"
[[modalities]]
name = "digit"
kind = "image"
channels = 1
height = 28
width = 28
[[modalities]]
name = "word"
kind = "text"
length = 8
alphabet = " abc"
[data]
pairing = "row"
[[data.sources]]
train = "train.parquet"
test = "test.parquet"
columns = { digit = "image", word = "label" }
licence = "none"
"""


def parse(text: str) -> Config:
    return Config.model_validate(tomllib.loads(text))


def test_row_pairing_of_several_sources_is_rejected() -> None:
    with pytest.raises(ValidationError, match=r'"row" takes the rows of one source, received 2.*pair by "class"'):
        parse(DIGITS.replace('"class"', '"row"', 1))


def test_modality_with_two_columns_is_rejected() -> None:
    with pytest.raises(ValidationError, match=r"exactly one column .*: word has 2"):
        parse(DIGITS.replace('photo = "image"', 'photo = "image", word = "label"'))


def test_sha256_depends_on_the_meaning_only() -> None:
    plain = parse(SMALL)
    assert parse("# a comment\nseed = 0\n" + SMALL).sha256 == plain.sha256
    reordered = SMALL.replace('digit = "image", word = "label"', 'word = "label", digit = "image"')
    assert reordered != SMALL
    assert parse(reordered).sha256 == plain.sha256
    assert parse('version = "9"\n' + SMALL).sha256 == plain.sha256
    assert parse("seed = 1\n" + SMALL).sha256 != plain.sha256
    assert parse(SMALL.replace("length = 8", "length = 9")).sha256 != plain.sha256


def test_sha256_of_a_baseline_ignores_settings_of_concord() -> None:
    baseline = SMALL.replace("name =", 'model = "mvae"\nname =', 1)
    for setting in (
        "[align]\nmultimodal_weight = 1\n",
        "[align]\njmvae_weight = 1\n",
        "[refiner]\nsteps = 8\n",
        "[refresh]\nepochs = 1\n",
        "[flow]\nepochs = 1\n",
    ):
        assert parse(baseline + setting).epochs == parse(baseline).epochs
        assert parse(baseline + setting).sha256 == parse(baseline).sha256
        assert parse(SMALL + setting).sha256 != parse(SMALL).sha256
    for shared in ("[align]\nepochs = 7\n", "[joint]\nbatch_size = 7\n", "[objective]\nbeta = 2\n"):
        assert parse(baseline + shared).sha256 != parse(baseline).sha256


def test_sha256_does_not_change_with_unused_options() -> None:
    explicit = SMALL + '[network]\nfusion = "set"\n[align]\ndivergence = "forward"\n'
    assert parse(explicit).sha256 == parse(SMALL).sha256
    for changed in ('[network]\nfusion = "product"\n', '[align]\ndivergence = "reverse"\n', "[refiner]\nsteps = 0\n"):
        assert parse(SMALL + changed).sha256 != parse(SMALL).sha256


def test_deprecated_keys_are_accepted_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        old = parse(SMALL + "[align]\nseveral = 0.5\npull = 0.25\n")
    assert (old.align.multimodal_weight, old.align.jmvae_weight) == (0.5, 0.25)
    assert [record.getMessage() for record in caplog.records] == [
        "configuration: align.several is deprecated: rename it to align.multimodal_weight",
        "configuration: align.pull is deprecated: rename it to align.jmvae_weight",
    ]
    caplog.clear()
    new = parse(SMALL + "[align]\nmultimodal_weight = 0.5\njmvae_weight = 0.25\n")
    assert not caplog.records
    assert new == old
    assert new.sha256 == old.sha256


@pytest.mark.parametrize(("old", "new"), [("several", "multimodal_weight"), ("pull", "jmvae_weight")])
def test_deprecated_key_with_its_new_name_is_rejected(old: str, new: str) -> None:
    message = rf"align\.{old} is the deprecated name of align\.{new}, both are given: remove align\.{old}"
    with pytest.raises(ValidationError, match=message):
        parse(SMALL + f"[align]\n{old} = 0.5\n{new} = 0.5\n")


def test_override_is_the_configuration_with_the_values_in_the_file() -> None:
    text = SMALL + "[joint]\nepochs = 10\n[refresh]\nepochs = 2\n"
    written = SMALL.replace('pairing = "row"', 'pairing = "row"\nrows_per_epoch = 500')
    written = "seed = 7\n" + written + "".join(f"[{name}]\nepochs = 1\n" for name in ("joint", "refiner", "align", "refresh"))
    overridden = parse(text).override(seed=7, epochs=1, rows_per_epoch=500)
    assert overridden == parse(written)
    assert overridden.sha256 == parse(written).sha256 != parse(text).sha256
    assert overridden.flow.epochs == 0, "a stage that the configuration leaves out stays out"
    assert parse(text).override() == parse(text)


def test_gallery_does_not_change_the_hash_of_a_run() -> None:
    """A finished run can be exported with a gallery."""
    assert parse(SMALL + '[gallery.digit]\nids = "sku"\nvalues = true\n').sha256 == parse(SMALL).sha256


@pytest.mark.parametrize(
    ("variable", "processes", "expected"),
    [("1", 1, 1), ("1", 2, None), ("2", 2, 2), (" 3 , 2", 1, 3), ("", 1, None), ("-1", 1, None), ("²", 1, None)],
)
def test_threads_are_those_of_the_environment_if_it_names_some(
    monkeypatch: pytest.MonkeyPatch, variable: str, processes: int, expected: int | None
) -> None:
    """torchrun sets OMP_NUM_THREADS to 1 in each of several processes."""
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert parse(SMALL).threads_per_process(processes) == (expected or 16 // processes)
    assert parse("threads = 5\n" + SMALL).threads_per_process(processes) == 5


def test_loaded_configuration_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse(SMALL).seed = 3  # type: ignore[misc]


def test_alignment_without_teacher_needs_reconstruction() -> None:
    assert parse(SMALL + '[align]\ndivergence = "none"\n').align.reconstruction > 0
    with pytest.raises(ValidationError, match=r"divergence = \"none\" trains students by reconstruction only"):
        parse(SMALL + '[align]\ndivergence = "none"\nreconstruction = 0\n')
