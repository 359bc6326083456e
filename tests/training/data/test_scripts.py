"""Texts of any script, from a Parquet file to tokens: the inferred schema, the learned vocabulary, the tokens of captions."""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from concord.model import codec
from concord.model.codec.text import text_from_tokens
from concord.model.modality import Modality, TextModality
from concord.training import config_file
from concord.training.cli import app
from concord.training.data.preprocessing import fit_preprocessing

CAPTIONS = {  # three captions that differ in marks only, or are written without spaces; whether they are
    "Hindi": (("लाल दिन", "लाल दान", "लाल दीन"), False),
    "Persian": (("کتاب می\u200cرود", "کتاب میرود", "کتاب نمی\u200cرود"), False),
    "Hebrew": (("סֵפֶר גדול", "סַפָּר גדול", "סָפַר גדול"), False),
    "Yoruba": (("ọkọ́ dúdú", "ọkọ̀ dúdú", "ọkọ dúdú"), False),
    "Chinese": (("男士黑色休闲跑步运动鞋", "女士白色休闲跑步运动鞋", "儿童红色休闲跑步运动鞋"), True),
    "Japanese": (("黒いランニングシューズです", "白いランニングシューズです", "赤いランニングシューズです"), True),
    "Thai": (("รองเท้าวิ่งสีดำ", "รองเท้าวิ่งสีขาว", "รองเท้าวิ่งสีแดง"), True),
    "Khmer": (("ស្បែកជើងរត់ពណ៌ខ្មៅ", "ស្បែកជើងរត់ពណ៌ស", "ស្បែកជើងរត់ពណ៌ក្រហម"), True),
    "Burmese": (("အနက်ရောင်ပြေးဖိနပ်", "အဖြူရောင်ပြေးဖိနပ်", "အနီရောင်ပြေးဖိနပ်"), True),
}


def write_table(folder: Path, **columns: list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "shop.parquet")
    done = CliRunner().invoke(app, ["init", str(folder / "shop.parquet"), "--out", str(folder / "shop.toml")])
    assert done.exit_code == 0, done.output
    return folder / "shop.toml"


def learned(configuration: Path) -> dict[str, Modality]:
    config = config_file.read(configuration)
    return fit_preprocessing(config, configuration.parent / (config.data.folder or ""))[0]


@pytest.mark.slow
@pytest.mark.parametrize(("captions", "unspaced"), CAPTIONS.values(), ids=CAPTIONS)
def test_captions_of_every_script_keep_their_differences(tmp_path: Path, captions: tuple[str, ...], unspaced: bool) -> None:
    generator = np.random.default_rng(0)
    texts = [f"{captions[row % 3]} {row}" for row in range(60)]
    configuration = write_table(tmp_path, caption=texts, size=generator.random(60).tolist())
    title = learned(configuration)["caption"]
    assert isinstance(title, TextModality)
    assert (title.unit, title.segmentation) == ("word", "unicode")
    assert ("each character is a word" in configuration.read_text()) == unspaced
    rows = [codec.parse(title, caption) for caption in captions]
    assert len({row.tobytes() for row in rows}) == 3
    for caption, row in zip(captions, rows, strict=True):
        assert title.unknown_token not in row
        assert text_from_tokens(title, row) == caption
    if unspaced:
        assert all(np.count_nonzero(row) >= 5 for row in rows)


def test_short_names_without_spaces_are_classes(tmp_path: Path) -> None:
    names = ["男士运动鞋", "女士运动鞋", "童鞋"]
    columns: dict[str, list[object]] = {"kind": [names[row % 3] for row in range(60)], "size": [row / 7 for row in range(60)]}
    modality = learned(write_table(tmp_path, **columns))["kind"]
    assert modality.kind == "categorical"


def test_segmentation_of_the_configuration_is_kept(tmp_path: Path) -> None:
    texts = [f"लाल दिन {row % 3}" for row in range(60)]
    configuration = write_table(tmp_path, caption=texts, size=[row / 7 for row in range(60)])
    sha256 = config_file.read(configuration).sha256
    configuration.write_text(configuration.read_text().replace('unit = "word"', 'unit = "word"\nsegmentation = "letters"'))
    title = learned(configuration)["caption"]
    assert isinstance(title, TextModality)
    assert (title.segmentation, title.vocabulary[:3]) == ("letters", ("द", "न", "ल"))
    assert config_file.read(configuration).sha256 == sha256


def test_explicit_vocabulary_is_read_by_the_unicode_rule(tmp_path: Path) -> None:
    texts = [f"लाल दिन {row % 3}" for row in range(60)]
    configuration = write_table(tmp_path, caption=texts, size=[row / 7 for row in range(60)])
    configuration.write_text(configuration.read_text().replace('unit = "word"', 'unit = "word"\nvocabulary = ["दिन", "लाल"]'))
    assert codec.parse(learned(configuration)["caption"], "लाल दिन").tolist() == [3, 2, 0]
