"""Frozen encoders in ONNX Runtime: pooling, batches, and graphs that cannot be fed."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from concord.model.codec.errors import DEFAULT_LIMITS
from concord.model.encoder import EncoderDescription, EncoderFiles
from concord.model.modality import EncodedModality, Modality
from concord.model.runtime import Runtime
from concord.model.runtime.device import Device
from concord.model.runtime.frozen import CPU_ROWS, FrozenEncoder, open_files
from tests.support.encoders import FEATURES, SIDE, WORDS, write_image_encoder, write_text_encoder
from tests.support.graphs import write_bundle


def opened(graph: Path, **changes: Any) -> FrozenEncoder:
    description = EncoderDescription.model_validate_json((graph.parent / "encoder.json").read_bytes())
    tokenizer = graph.parent / "tokenizer.json"
    files = EncoderFiles(
        "e", description.model_copy(update=changes), graph, tokenizer if tokenizer.exists() else None, FEATURES, ""
    )
    return open_files(files, Device(), threads=1)


def table(graph: Path) -> np.ndarray:
    """Vector of each word."""
    return np.tanh(onnx.numpy_helper.to_array(onnx.load(graph).graph.initializer[0]))


def tokens(encoder: FrozenEncoder, text: str) -> Any:
    return encoder.preprocessor.tokens(text, "cut", DEFAULT_LIMITS)


def test_pooling_and_length_equal_their_formulas(tmp_path: Path) -> None:
    graph = write_text_encoder(tmp_path)
    vectors = table(graph)[[WORDS.index(word) for word in ("[CLS]", "red", "cup", "[SEP]")]]
    for pooling, expected in (("mean", vectors.mean(axis=0)), ("first", vectors[0])):
        for normalize in (False, True):
            encoder = opened(graph, pooling=pooling, normalize=normalize)
            wanted = expected / np.linalg.norm(expected) if normalize else expected
            np.testing.assert_allclose(encoder.features([tokens(encoder, "red cup")])[0], wanted, rtol=1e-5)


def test_rows_keep_their_order_and_padding_has_no_effect(tmp_path: Path) -> None:
    encoder = opened(write_text_encoder(tmp_path))
    inputs = [tokens(encoder, " ".join(["red", "blue", "lamp"][: 1 + row % 3] * (1 + row % 2))) for row in range(3 * CPU_ROWS)]
    together = encoder.features(inputs)
    for row, one in enumerate(inputs):
        np.testing.assert_allclose(encoder.features([one])[0], together[row], rtol=1e-5, atol=1e-6)


def test_feature_of_several_texts_is_the_mean_of_theirs_in_any_order(tmp_path: Path) -> None:
    encoder = opened(write_text_encoder(tmp_path))
    texts = ["red cup", "a fine new lamp", "plate", "blue", "green chair"]
    features = encoder.features([tokens(encoder, text) for text in texts])
    several = [encoder.preprocessor.texts(list(order), "cut", DEFAULT_LIMITS) for order in (texts, texts[::-1], texts[:2])]
    one = tokens(encoder, "red cup")
    found = encoder.features([one, *several])
    np.testing.assert_allclose(found[1], features.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[2], found[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[3], features[:2].mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[0], features[0], rtol=1e-5, atol=1e-6)
    assert np.linalg.norm(found[1]) < 0.99, "the mean of normalised features is not normalised again"


def test_pixels_are_normalised_as_described(tmp_path: Path) -> None:
    graph = write_image_encoder(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE)).astype(np.uint8)
    plain = opened(graph)
    network = onnx.load(graph)
    session = plain.session
    normalised = ((pixels / 255 - 0.5) / 0.25).astype(np.float32)
    (expected,) = session.run(None, {network.graph.input[0].name: normalised[None]})
    np.testing.assert_allclose(plain.features([pixels])[0], expected[0], rtol=1e-4, atol=1e-5)


def test_pictures_run_at_fixed_sizes_each_in_its_session_with_the_same_features(tmp_path: Path) -> None:
    graph = write_image_encoder(tmp_path)
    runs: list[tuple[int, int]] = []

    class Recording(onnxruntime.InferenceSession):
        def run(self, output_names: Any, input_feed: Any, *arguments: Any) -> Any:
            runs.append((id(self), len(next(iter(input_feed.values())))))
            return super().run(output_names, input_feed, *arguments)

    def session() -> onnxruntime.InferenceSession:
        return Recording(graph, providers=["CPUExecutionProvider"])

    description = EncoderDescription.model_validate_json((graph.parent / "encoder.json").read_bytes())
    fixed = FrozenEncoder(description, session, sizes=(1, 4, 8))
    pictures = list(np.random.default_rng(0).integers(0, 256, (11, 3, SIDE, SIDE), dtype=np.uint8))
    np.testing.assert_allclose(fixed.features(pictures), opened(graph).features(pictures), rtol=1e-5)
    fixed.features(pictures[:1])
    assert [size for _, size in runs] == [8, 4, 1]
    assert len({number for number, _ in runs}) == 3


def test_golden_texts_are_cut_where_requests_are_refused(tmp_path: Path, tiny_facts: dict[str, Any]) -> None:
    """The generated texts of a bundle are longer than the window of this encoder. The name of one begins with the other's."""
    description = EncoderDescription.model_validate_json(
        (write_text_encoder(tmp_path / "texts").parent / "encoder.json").read_bytes()
    )
    folder = tmp_path / "texts"
    files = [
        EncoderFiles(name, description, folder / "model.onnx", folder / "tokenizer.json", FEATURES, "") for name in ("e", "e.b")
    ]
    statistics = {"size": FEATURES, "mean": (0.0,) * FEATURES, "std": (1.0,) * FEATURES}
    modalities: list[Modality] = [
        EncodedModality(name=name, kind="text", encoder=encoder, **statistics) for name, encoder in (("a", "e"), ("b", "e.b"))
    ]
    runtime = Runtime(write_bundle(tmp_path / "bundle", modalities, tiny_facts, encoders=files), threads=1)
    assert runtime.replay_golden() < 1e-5


def change(graph: Path, edit: Any) -> Path:
    model = onnx.load(graph)
    edit(model.graph)
    onnx.save(model, graph)
    return graph


def fix_axis(axis: int, size: int) -> Any:
    def edit(graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output):
            if axis < len(value.type.tensor_type.shape.dim):
                value.type.tensor_type.shape.dim[axis].dim_value = size

    return edit


def rename(graph: onnx.GraphProto) -> None:
    graph.input[0].name = graph.node[0].input[1] = "words"


def add_input(graph: onnx.GraphProto) -> None:
    graph.input.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, [1]))


@pytest.mark.parametrize(
    ("write", "edit", "description", "message"),
    [
        (write_image_encoder, fix_axis(0, 1), {}, "fixed shape .* dynamic batch axis"),
        (write_image_encoder, fix_axis(2, 99), {}, r"one input, float32 \(batch, 3, 16, 16\)"),
        (write_image_encoder, add_input, {}, "one input"),
        (write_image_encoder, None, {"output": "logits"}, r"no output 'logits', its outputs are \['feature'\]"),
        (write_text_encoder, fix_axis(1, 7), {}, "dynamic axes of batch and tokens"),
        (write_text_encoder, rename, {}, "has the inputs words.*input_ids, attention_mask"),
    ],
)
def test_graph_that_cannot_be_fed_says_why(
    tmp_path: Path, write: Any, edit: Any, description: dict[str, Any], message: str
) -> None:
    graph = write(tmp_path)
    with pytest.raises(ValueError, match=message):
        opened(change(graph, edit) if edit else graph, **description)


def test_output_that_needs_another_pooling_says_so(tmp_path: Path) -> None:
    encoder = opened(write_text_encoder(tmp_path), pooling="none")
    with pytest.raises(ValueError, match=r"shape \[1, 3, 12\] with pooling 'none'"):
        encoder.features([tokens(encoder, "red")])


def test_feature_that_is_not_finite_raises(tmp_path: Path) -> None:
    graph = write_image_encoder(tmp_path)
    encoder = opened(
        change(
            graph,
            lambda g: g.initializer[0].CopyFrom(
                onnx.numpy_helper.from_array(np.full((FEATURES, 3, 4, 4), np.nan, np.float32), "kernel")
            ),
        )
    )
    with pytest.raises(FloatingPointError):
        encoder.features(encoder.blank(1))
