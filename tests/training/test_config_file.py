from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.test_config import SMALL
from training import config_file
from training.config import Config, ConfigError, Hub

CONFIGS = Path(config_file.__file__).parent / "configs"


def load(folder: Path, text: str) -> Config:
    file = folder / "run.toml"
    file.write_text(text)
    return config_file.read(file)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.stem)
def test_every_shipped_configuration_loads(file: Path) -> None:
    loaded = config_file.read(file)
    assert loaded.name == file.stem
    assert f"python -m training fit training/configs/{file.name}" in file.read_text()


def test_digits_holds_what_its_file_says() -> None:
    digits = config_file.read(CONFIGS / "digits.toml")
    assert [m.name for m in digits.modalities] == ["digit", "photo", "word"]
    assert digits.data.sources[1].train == "mnist-m-train.parquet"
    assert digits.data.random_offset == ("word",)


def test_a_source_may_stand_on_the_hub() -> None:
    place = config_file.read(CONFIGS / "digits-svhn.toml").data.sources[1].train
    assert place == Hub(hub="ufldl-stanford/svhn", config="cropped_digits", split="train")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'name = "small"',
            'name = "small"\nseeds = 1',
            r"  seeds: unknown key: did you mean 'seed'\? Allowed: align, data, flow, joint",
        ),
        ("height = 28", "height = 28\nhieght = 2", r"modalities\[0\]\.hieght: unknown key: did you mean 'height'\?"),
        (
            "length = 8",
            "length = 8\nzzz = 2",
            r"modalities\[1\]\.zzz: unknown key: Allowed: alphabet, kind, length, likelihood",
        ),
        ("licence", "license", r"data\.sources\[0\]\.license: unknown key: did you mean 'licence'\?"),
        (
            '"train.parquet"',
            '{ hub = "a/b", splt = "x" }',
            r"data\.sources\[0\]\.train\.splt: unknown key: did you mean 'split'\?",
        ),
        ('"train.parquet"', "3", r"data\.sources\[0\]\.train: Input should be a valid string, received 3"),
        ("[data]", "[joint]\nlearning_rte = 1\n[data]", r"joint\.learning_rte: unknown key: did you mean 'learning_rate'\?"),
        ("[data]", "[joint]\nlearning_rate = 0\n[data]", r"joint\.learning_rate: Input should be greater than 0, received 0"),
        (
            "[data]",
            "[joint]\nlearning_rate = inf\n[data]",
            r"joint\.learning_rate: Input should be a finite number, received inf",
        ),
        ('"row"', '"rows"', r"data\.pairing: Input should be 'row' or 'class', received 'rows'"),
        ('pairing = "row"', "", r"data\.pairing: Field required"),
        ("channels = 1", "channels = 0", r"modalities\[0\]\.channels: Input should be greater than or equal to 1, received 0"),
        ('kind = "text"', 'kind = "txt"', r"modalities\[1\]: .*'txt'.*'image', 'text', 'vector', 'binary'"),
        ('" abc"', '" aa"', r"modalities\[1\]: the alphabet names a character twice"),
        ('name = "word"', 'name = "digit"', r"\[\[modalities\]\] names one twice: \['digit', 'digit'\]"),
        ('word = "label"', 'words = "label"', r"columns name \['words'\], the modalities are \['digit', 'word'\]"),
        (', word = "label"', "", r"each modality needs exactly one column among \[\[data\.sources\]\]: word has 0"),
        ('pairing = "row"', 'pairing = "row"\nrandom_offset = ["digit"]', r"random_offset names \['digit'\].*\['word'\]"),
        ('pairing = "row"', 'pairing = "row"\nrandom_flip = ["word"]', r"random_flip names \['word'\].*\['digit'\]"),
        ('pairing = "row"', 'pairing = "row"\nrandom_shift = { word = 2 }', r"random_shift names \['word'\].*\['digit'\]"),
        ('"row"', '"class"', r'data\.pairing = "class" needs a label column in every'),
        ('name = "small"', "name = small", r"run\.toml: not TOML \(Invalid value.*line 2"),
    ],
)
def test_mistakes_are_named_with_their_place_and_what_is_allowed(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert load(tmp_path, SMALL).name == "small"
    broken = SMALL.replace(old, new, 1)
    if broken == SMALL:
        pytest.fail(f"{old!r} is not in the configuration")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, broken)


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, SMALL.replace("height = 28", "height = 0").replace("length = 8", "length = -1"))
    assert "modalities[0].height" in str(caught.value)
    assert "modalities[1].length" in str(caught.value)


def test_a_missing_or_garbled_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read \(No such file"):
        config_file.read(tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: not TOML .*utf-8"):
        config_file.read(tmp_path / "latin.toml")


def test_a_configuration_says_how_it_differs_from_another(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(SMALL + "[joint]\nepochs = 3\nbatch_size = 7\n")
    small = load(tmp_path, 'extends = "base.toml"\nname = "other"\n[joint]\nepochs = 5\n[data]\nrows = "complete"\n')
    assert small.name == "other"
    assert small.modalities == load(tmp_path, SMALL).modalities
    assert (small.joint.epochs, small.joint.batch_size) == (5, 7)
    assert (small.data.rows, small.data.pairing) == ("complete", "row")
    whole = SMALL.replace('"small"', '"other"').replace("[data]", '[data]\nrows = "complete"')
    assert small.sha256 == load(tmp_path, whole + "[joint]\nepochs = 5\nbatch_size = 7\n").sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "run.toml"', r"run\.toml: extends itself, by way of run\.toml"),
        ('extends = "nowhere.toml"', r"nowhere\.toml: cannot be read"),
        ("extends = 3", r"run\.toml: extends: the name of another configuration is expected, received 3"),
    ],
)
def test_what_cannot_be_extended_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


@given(text=st.text(max_size=200))
def test_any_text_loads_or_is_refused_in_words(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    with pytest.raises(ConfigError):  # no such text holds a whole configuration
        load(tmp_path_factory.getbasetemp(), text.encode(errors="ignore").decode())


@given(
    key=st.sampled_from(["name", "seed", "data", "modalities", "network", "joint"]),
    value=st.sampled_from(["[1]", "[[]]", "{ x = 1 }", "1979-05-27", "nan", "'?'"]),
)
def test_any_wrong_value_is_refused_with_its_place(tmp_path_factory: pytest.TempPathFactory, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"\n  {key}[.:\[]"):
        load(tmp_path_factory.getbasetemp(), f"{key} = {value}\n")
