import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from concord.training import config_file
from concord.training.config import Config, Hub
from concord.training.errors import ConfigError
from tests.training.test_config import SMALL

CONFIGS = Path(config_file.__file__).parent / "configs"
RESULTS = Path(config_file.__file__).parent / "results"
# Computed by version 0.1. Folders of runs and results files contain these hashes, so they must not change.
HASHES = {
    "ablations/all-alike.toml": "246927746a345ab929e44192998e589e14b29be4c9958075e8b6031e3978b7f9",
    "ablations/beta-1.toml": "a0815c1797500e4114c4d3f22888f702c4c24da130f55fff28257ba2a71cf371",
    "ablations/beta-3-unrefined.toml": "f9eeafad03f1fd826207f4f897b64c96d89e86d01db926996c7b04c2e666f494",
    "ablations/beta-3.toml": "a467492bf4f27bb6e3a7f89f3d95add22ebeca38109b8b4b7c407f686e0b9d3a",
    "ablations/birds-features-contrast-neither.toml": "f23a95101a3e34bbac3231445968eca3647d6723308568e8690d628ebd7334ae",
    "ablations/birds-features-contrast-unaligned.toml": "a42243439d2165377d1f3c3763fe4f686df24f317ca5edd36b01f26828eb4f30",
    "ablations/birds-features-contrast-unrefined.toml": "ffaf80fc751ff6d7e952dd8602b767b0fabb911c78b260cd9750cbb541598d90",
    "ablations/blocks.toml": "1553c26f24335a59e1024fc62ec72ba92fd03d1b946ef607d4dd2aec7463ef74",
    "ablations/blurring.toml": "5d97ee04f9b0f23d8eded99337478c3ff3c4da0b0cd4e20d3d5b22431eb6d79b",
    "ablations/contrast-100.toml": "7441a2a74013adad2f6fdb3bc9ec34f9b8507c965f3ca6fe17f5c2f96c0674d5",
    "ablations/contrast-30.toml": "fdb3ff61e28a69835beec507d589a9cbbc77bc9def0970c36ffba6c5fd835af5",
    "ablations/contrast.toml": "5c0efc2b8e759d3bde9852a536400a96d3bff709b5cef670f8dc2d4363a74e70",
    "ablations/eight-steps.toml": "b81194230e1c2301a5d7cef19376c790e21f279000256012b9f28c9e74b36654",
    "ablations/fashion-neither.toml": "48143c96154c2aeb50ea594b25ff6173b3e261eb23ebe04f0deb2f88b768d59e",
    "ablations/fashion-unaligned.toml": "d6b1b07cd32b022a53eb9b91fd43d20780d8bd9c2ad2682bc51d9d15a3a7a00f",
    "ablations/fashion-unrefined.toml": "54ce0b575ce20a9e93da2868389314cd0a1e048abb48a816d8b20eaf4e6dd600",
    "ablations/flickr8k-neither.toml": "94e2689ca24f40c8c15f0c362b3d6ed6c7e0651ccd1f62cc79178bd4dbccd8a6",
    "ablations/flickr8k-unaligned.toml": "cb9c95b35be9f9aac6852827ae45f8edac2fcf59badc626c0496d75efedc8454",
    "ablations/flickr8k-unrefined.toml": "3c2e8a11bffddfdd783248523a2214bc78e028177b853ede50343acae76a3f68",
    "ablations/forward.toml": "c61b9161894a65723c3e64c3fe157406cf925f516005b3576e63bbba56707ab3",
    "ablations/four-steps.toml": "3bbe8f7fd56c190fcc06ff32203d86cb68b8d2f616d5947883f7e5fe3571286c",
    "ablations/full-spread.toml": "4b42dba0254d443653872abe376fc5ef6758c6f860e23b92d47c6a0a9923675c",
    "ablations/gaussian.toml": "0017807b6bde6d2bb191ac16daf79a1aa6d0b9a7cce2a1d40c740591618c12e6",
    "ablations/half-width.toml": "e7f24b978f1dd92d952bd74732ed6ce57101edeae210d0ddbfefee6682a90a4f",
    "ablations/high-beta.toml": "6b69111c7e2a865b23e386981cc3ae07021eb2e507778336e3c879c65b93a0ef",
    "ablations/information.toml": "e52ae623d219c9675fe1cd20809eb8533c98e298817e2411485cb1f69d8bb6ec",
    "ablations/latent-16.toml": "d279ec21be5f14b79f598675d09b4cfa576fc7771f2e6c53c5664455d8d90da6",
    "ablations/latent-8-unrefined.toml": "d385f27233fd17f5b49ce50ba4376d7a92aadc29492bcd1cc3d6007c23e0956a",
    "ablations/latent-8.toml": "0c291514bb8ae9504373513239f06ef8588a08cf0cda31ea8bde34edaeff27cd",
    "ablations/less-pull.toml": "c868f8dea9fd2b329d8006c165e02cf1a96578a8fd00b23106e2fa154a48667b",
    "ablations/low-beta.toml": "139c371f73ca1547e214d64ee5b83c10e7f66d61a4543374c6fb3be664e9ebf2",
    "ablations/narrow-unrefined.toml": "c88a79033953f9571f47b3cd591a6f471c6ee1b52e33f1635fd898604bac49be",
    "ablations/narrow.toml": "d7d99122f4e8fd9bdd11bd1d3ef8f4de41b265f2850e3dcfa7d7c22dbb370e03",
    "ablations/neither.toml": "1778d95ccdecb85741a4fb37afbb06bcb37036bf0c28fe6c86049f92235d0c30",
    "ablations/no-prior.toml": "89a951c6e248893b7a76d724061fad9e328dfe88f186cb90367830aeb35aa972",
    "ablations/no-pull.toml": "24158584eb5da6e393bc4789e5ca2332e69b544d9134d6c02f7cd90c241a068c",
    "ablations/no-reconstruction.toml": "a25257a49fbd857095ffcccdd09c76874badb793535399afe4f28d4993ee8a0c",
    "ablations/one-step.toml": "b834de07e0832917c86a07b2aebdeda77e7e294ef79d2e5faf3518fef775325d",
    "ablations/product.toml": "2343fe1fc2407e696b64a6bf3fc62fb60352c136ad0e9ce5f973d358cedfb8b4",
    "ablations/reverse.toml": "65bd1df44326c82f46d10fb8560f9eab4243f25a008c6840b1f03c36cb77c0b0",
    "ablations/sixteen-steps.toml": "064dc529b909f304870474e2089ade484699603dc708e4232c186d1a42412b68",
    "ablations/spread-09.toml": "4afae12cf36937e63a8c486917b5637d7177f06748e79fc1f6ef240015caefc6",
    "ablations/two-steps.toml": "62a38d3d8eb378bbf610084f5bd9b888a9b59b34f9ba905999c138a2e2d4d4c4",
    "ablations/unaligned.toml": "bdf175472fea44547a29419f1b4646d3a6c6afd8de683ea6ade969d9eab14d13",
    "ablations/unrefined.toml": "b39a2c90e97a4d32a8d06b16979f9022ffade8aef14946b15a823209ca1a7a17",
    "ablations/version-4.toml": "5a955b9bfcf1f6f558707170eed0d92a920da030b79404da332970561388547b",
    "ablations/version-5.toml": "4b22bf14771138e4e6d436412026da199727a2b513843c1db0007540063781c4",
    "ablations/version-6.toml": "c3b3412ed10e600aff64e84eab3a0e0d6f76ec29758bacfdb287f25c4f5c7bb3",
    "ablations/weak-contrast.toml": "c219ec1e83226afd7b519db88017da9bc512206906f5808b70ae757a9f0c20c7",
    "ablations/wide.toml": "a35c67c3649253a326a91270abb5f8673973df5f8ff91549b5d6e15a889c00af",
    "baselines/mvae.toml": "1f48894c70eec78278fef9ffaa49133e4c995dbdbdc478c18dcf264a8afa495b",
    "baselines/mvtcae-beta-3.toml": "0a697e122545e5faf9d5a8fb9e10992f79da17d4b5ecc8c439ca4e8ca9faec09",
    "baselines/mvtcae.toml": "e732a9174014b26ace01b6fcb6b693ede28241096056852881e22257a1f2a130",
    "birds-blocks.toml": "311937ebae4aea4b724d6f639983adaa4bda373af03ab63fb56d8707348ae9d5",
    "birds-captions.toml": "ade76d079eb3425898b4910a145173e4b2d3a7b49daccde0be5b7a310557a08d",
    "birds-complete.toml": "a030318edce62ed2fcf13d8dce3d29e23a0f303bc90778d99ad979a1b8fac45e",
    "birds-encoded.toml": "1c7ff32e7abc30a3218f8ee4d1cbcc1c7ec1c1609ad60e45507b755d80ec3abf",
    "birds-features-contrast.toml": "6023f2fef1d9760e395a724f2fecca6f3f76cee05e1e244c57219fcde5e97e52",
    "birds-features-plain.toml": "dd65863f9c1f72b391547f3080dacbf36c8d717fa2277eda61ae8c83f24e3a7f",
    "birds-features.toml": "0f4aba9750fb4384f104523ea1251cd548c7829e078c38d64e74e8b97f02aeb8",
    "birds-learned-scale.toml": "091064e949ae7be9e026a1f058c95769077a1308b0d14d90bc32660eb0012a45",
    "birds.toml": "d3bb47edff243618133bb5477dc603bf0c6cf83b27ba00bcb79c7ea3a252d10a",
    "digits-sound.toml": "8afea9c2e7e4d96f3d00f8279cc9dd53214a9ceef465bcad343ef604ccc298b5",
    "digits-svhn.toml": "75c45b1dd4c5ecd7c67afd8a10884f823ca4c9271bfd6bc1c2e1de9f4bcaf5ee",
    "digits.toml": "714001511b0c56cd2a8a5993633fd5f51b1c265149f25e831189d894f940a051",
    "emoji.toml": "843bceb4d925494e1ec18308ab15e2f5ff82449ea18c5ffcd882f376479c7265",
    "fashion-blocks.toml": "1f958de5f900d9d062631b758d325c2fa8ab1c8381fce242af38d7c1b1e2ae09",
    "fashion-encoded.toml": "e6a8d8eb7dc14e6b2bfd8232ff7a75ba0f373183306d24bfe00f6270fc72cd43",
    "fashion-learned-scale.toml": "bd1f46f58f0d1c0b7a24e05ea9fbe32302dc511efd0c41121e1e1a136028cd5e",
    "fashion-mixture.toml": "8efa0f2fdb0c804fecc0de8b8845b679146e8f321cc61903ab9f33ffdeeb5ce5",
    "fashion-pictures.toml": "77e540353a189955ed3f79678d9fa0e92250b8e6a9088047bb4353d70b074378",
    "fashion-titles.toml": "a593875c871002d0a0481ff7c77261b4e882c5048f3950c452fa18007d2f97f5",
    "fashion.toml": "8a7519e1d698067e9ac0f88207cf4550f23f62e308eed46f410e9c695dd0bcd1",
    "flickr8k-captions.toml": "25f87f5b48f15cc5bad9481841a366f380ec5cfdb51b836a50319dcc20853e5a",
    "flickr8k-pixels.toml": "4793ca9d212e8b7baafdb1695bd5654078501b94fd08b36c0f1b5eeab7f6a508",
    "flickr8k.toml": "62b31c3e2ce38ecd5d43045838507dc9c99b3729708630d4130ae2784b74ea54",
}


def load(folder: Path, text: str) -> Config:
    file = folder / "run.toml"
    file.write_text(text)
    return config_file.read(file)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_configuration_with_a_byte_order_mark_is_the_same(tmp_path: Path, newline: str) -> None:
    """As some editors on Windows save it, also of a configuration that it extends."""
    (tmp_path / "base.toml").write_bytes(f"\ufeff{SMALL}".replace("\n", newline).encode())
    (tmp_path / "run.toml").write_bytes(f'\ufeffextends = "base.toml"{newline}'.encode())
    assert config_file.read(tmp_path / "run.toml") == load(tmp_path, SMALL)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda file: file.stem)
def test_shipped_configuration_loads(file: Path) -> None:
    loaded = config_file.read(file)
    assert loaded.name == file.stem
    assert f"concord fit training/configs/{file.name}" in file.read_text()


@pytest.mark.parametrize("name", HASHES)
def test_sha256_of_shipped_configuration_is_unchanged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert config_file.read(CONFIGS / name).sha256 == HASHES[name]
    assert not caplog.records, "shipped configurations use no deprecated key"


def test_every_shipped_configuration_has_a_known_sha256() -> None:
    assert {str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.toml")} == HASHES.keys()


@pytest.mark.parametrize(
    ("results", "config", "rows_per_epoch"),
    [
        ("digits.json", "digits.toml", None),
        ("digits-10000.json", "digits.toml", 10_000),
        ("digits-version-4.json", "ablations/version-4.toml", None),
        ("digits-version-4-2000.json", "ablations/version-4.toml", 2000),
    ],
)
def test_sha256_of_published_results_is_unchanged(results: str, config: str, rows_per_epoch: int | None) -> None:
    """Of Concord and of the baselines, whose hash leaves out settings of Concord."""
    settings = config_file.read(CONFIGS / config).override(rows_per_epoch=rows_per_epoch)
    content = json.loads((RESULTS / results).read_text())
    assert content["config_sha256"] == settings.sha256
    assert content["rows"]
    for row in content["rows"]:
        variant = row.get("variant", "").removeprefix("digits-")
        folder = CONFIGS / ("ablations" if row["model"] == "concord" else "baselines")
        own = config_file.read(folder / f"{variant}.toml") if variant else settings
        own = own.model_copy(update={"model": row["model"]})
        assert row["config_sha256"] == own.override(seed=row["seed"], rows_per_epoch=rows_per_epoch).sha256


def test_digits_configuration_has_its_modalities_and_sources() -> None:
    digits = config_file.read(CONFIGS / "digits.toml")
    assert [m.name for m in digits.modalities] == ["digit", "photo", "word"]
    assert digits.data.sources[1].train == "mnist-m-train.parquet"
    assert digits.data.random_offset == ("word",)


def test_source_on_the_hub_loads() -> None:
    place = config_file.read(CONFIGS / "digits-svhn.toml").data.sources[1].train
    assert place == Hub(hub="ufldl-stanford/svhn", config="cropped_digits", split="train")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'name = "small"',
            'name = "small"\nseeds = 1',
            r"  seeds: unknown key: did you mean 'seed'\? Allowed: align, contrast, data, device, flow, gallery, joint",
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
        ('kind = "text"', 'kind = "txt"', r"modalities\[1\]: kind must be image, audio, text, .*, received 'txt'"),
        (
            'kind = "text"',
            'kind = "text"\nencoder = "e"',
            r"modalities\[1\]\.length: unknown key: .*Allowed: encoder, kind, lik",
        ),
        ('" abc"', '" aa"', r"modalities\[1\]: the alphabet names a character twice"),
        ('name = "word"', 'name = "digit"', r"\[\[modalities\]\] has a duplicate name: \['digit', 'digit'\]"),
        ('word = "label"', 'words = "label"', r"columns name \['words'\], the modalities are \['digit', 'word'\]"),
        (', word = "label"', "", r"each modality needs exactly one column among \[\[data\.sources\]\]: word has 0"),
        (
            'pairing = "row"',
            'pairing = "row"\naverage_texts = ["word"]',
            r"average_texts names \['word'\], the text modalities with an encoder are \[\]",
        ),
        ('pairing = "row"', 'pairing = "row"\nrandom_offset = ["digit"]', r"random_offset names \['digit'\].*\['word'\]"),
        ('pairing = "row"', 'pairing = "row"\nrandom_flip = ["word"]', r"random_flip names \['word'\].*\['digit'\]"),
        ('pairing = "row"', 'pairing = "row"\nrandom_shift = { word = 2 }', r"random_shift names \['word'\].*\['digit'\]"),
        (
            'pairing = "row"',
            'pairing = "row"\nrandom_contrast = { word = 0.5 }',
            r"random_contrast names \['word'\].* audio .*\[\]",
        ),
        ("[[data.sources]]", "[gallery.sound]\n[[data.sources]]", r"\[gallery\] names \['sound'\], the modalities are"),
        ("[[data.sources]]", "[gallery.digit]\nside = 8\n[[data.sources]]", r"gallery\.digit\.side: .* 16, received 8"),
        ("[[data.sources]]", "[gallery.digit]\nrow = 8\n[[data.sources]]", r"gallery\.digit\.row: .*did you mean 'rows'"),
        (
            'kind = "text"\nlength = 8\nalphabet = " abc"\n',
            'kind = "categorical"\n[gallery.word]\nvalues = true\n',
            r"\[gallery\] has values of \['word'\], which only pictures and texts can have: \['digit'\]",
        ),
        ('"row"', '"class"', r'data\.pairing = "class" needs a label column in every'),
        ('name = "small"', "name = small", r"run\.toml: not TOML \(Invalid value.*line 2"),
    ],
)
def test_error_names_its_place_and_what_is_allowed(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert load(tmp_path, SMALL).name == "small"
    broken = SMALL.replace(old, new, 1)
    if broken == SMALL:
        pytest.fail(f"{old!r} is not in the configuration")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, broken)


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, SMALL.replace("height = 28", "height = 0").replace("length = 8", "length = -1"))
    assert "modalities[0].height" in str(caught.value)
    assert "modalities[1].length" in str(caught.value)


def test_missing_or_undecodable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read \(No such file"):
        config_file.read(tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: not TOML .*utf-8"):
        config_file.read(tmp_path / "latin.toml")


def test_extends_merges_tables_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(SMALL + "[joint]\nepochs = 3\nbatch_size = 7\n")
    extended = load(tmp_path, 'extends = "base.toml"\nname = "other"\n[joint]\nepochs = 5\n[data]\nrows = "complete"\n')
    assert extended.name == "other"
    assert extended.modalities == load(tmp_path, SMALL).modalities
    assert (extended.joint.epochs, extended.joint.batch_size) == (5, 7)
    assert (extended.data.rows, extended.data.pairing) == ("complete", "row")
    merged = SMALL.replace('"small"', '"other"').replace("[data]", '[data]\nrows = "complete"')
    assert extended.sha256 == load(tmp_path, merged + "[joint]\nepochs = 5\nbatch_size = 7\n").sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "run.toml"', r"run\.toml: extends itself, through run\.toml"),
        ('extends = "nowhere.toml"', r"nowhere\.toml: cannot be read"),
        ("extends = 3", r"run\.toml: extends: the name of another configuration is expected, received 3"),
    ],
)
def test_invalid_extends_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_deprecated_keys_are_renamed_in_each_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file with a new key can extend a file with the old one. The warning names the file."""
    (tmp_path / "base.toml").write_text(SMALL + "[align]\nseveral = 0.5\npull = 0.25\n")
    with caplog.at_level(logging.WARNING):
        extended = load(tmp_path, 'extends = "base.toml"\n[align]\nmultimodal_weight = 0.75\n')
    assert (extended.align.multimodal_weight, extended.align.jmvae_weight) == (0.75, 0.25)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'base.toml'}: align.several is deprecated: rename it to align.multimodal_weight",
        f"{tmp_path / 'base.toml'}: align.pull is deprecated: rename it to align.jmvae_weight",
    ]
    message = r"run\.toml: align\.pull is the deprecated name of align\.jmvae_weight, both are given: remove align\.pull"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, SMALL + "[align]\npull = 0.25\njmvae_weight = 0.25\n")


@given(text=st.text(max_size=200))
def test_arbitrary_text_is_rejected_as_configuration(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    with pytest.raises(ConfigError):  # 200 random characters are never a complete configuration
        load(tmp_path_factory.getbasetemp(), text.encode(errors="ignore").decode())


@given(
    key=st.sampled_from(["name", "seed", "data", "modalities", "network", "joint"]),
    value=st.sampled_from(["[1]", "[[]]", "{ x = 1 }", "1979-05-27", "nan", "'?'"]),
)
def test_arbitrary_wrong_value_is_rejected_with_its_place(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=rf"\n  {key}[.:\[]"):
        load(tmp_path_factory.getbasetemp(), f"{key} = {value}\n")
