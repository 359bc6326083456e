import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from training import config
from training.config import Config

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


def made(text: str) -> Config:
    return Config.model_validate(tomllib.loads(text))


def test_rows_of_several_sources_cannot_be_paired_by_row() -> None:
    with pytest.raises(ValidationError, match=r'"row" takes the rows of one source, received 2.*pair by "class"'):
        made(DIGITS.replace('"class"', '"row"', 1))


def test_one_column_a_modality_over_all_sources() -> None:
    with pytest.raises(ValidationError, match=r"exactly one column .*: word has 2"):
        made(DIGITS.replace('photo = "image"', 'photo = "image", word = "label"'))


def test_the_hash_is_of_the_meaning() -> None:
    plain = made(SMALL)
    assert made("# a comment\nseed = 0\n" + SMALL).sha256 == plain.sha256
    turned = SMALL.replace('digit = "image", word = "label"', 'word = "label", digit = "image"')
    assert turned != SMALL
    assert made(turned).sha256 == plain.sha256
    assert made('version = "9"\n' + SMALL).sha256 == plain.sha256
    assert made("seed = 1\n" + SMALL).sha256 != plain.sha256
    assert made(SMALL.replace("length = 8", "length = 9")).sha256 != plain.sha256


def test_what_only_ours_has_is_not_in_the_hash_of_a_rival() -> None:
    rival = SMALL.replace("name =", 'model = "mvae"\nname =', 1)
    for own in ("[align]\nseveral = 1\n", "[refiner]\nsteps = 8\n", "[refresh]\nepochs = 1\n", "[flow]\nepochs = 1\n"):
        assert made(rival + own).epochs == made(rival).epochs
        assert made(rival + own).sha256 == made(rival).sha256
        assert made(SMALL + own).sha256 != made(SMALL).sha256
    for shared in ("[align]\nepochs = 7\n", "[joint]\nbatch_size = 7\n", "[objective]\nbeta = 2\n"):
        assert made(rival + shared).sha256 != made(rival).sha256


def test_a_loaded_configuration_cannot_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        made(SMALL).seed = 3  # type: ignore[misc]


def test_students_without_a_teacher_have_something_to_learn() -> None:
    assert made(SMALL + '[align]\ndivergence = "none"\n').align.reconstruction > 0
    with pytest.raises(ValidationError, match=r"divergence = \"none\" leaves students to reconstruct"):
        made(SMALL + '[align]\ndivergence = "none"\nreconstruction = 0\n')


def test_options_of_ablations_leave_the_hash_of_what_does_not_use_them() -> None:
    said = SMALL + '[network]\nfusion = "set"\n[align]\ndivergence = "forward"\n'
    assert made(said).sha256 == made(SMALL).sha256
    for turned in ('[network]\nfusion = "product"\n', '[align]\ndivergence = "reverse"\n', "[refiner]\nsteps = 0\n"):
        assert made(SMALL + turned).sha256 != made(SMALL).sha256
