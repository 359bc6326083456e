"""Small random networks in the form of frozen encoders: an ONNX file, its description and a tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from concord.model.encoder import EncoderDescription, EncoderFiles
from concord.model.modality import EncodedModality, Modality, VectorModality

FEATURES = 12
"""Numbers of a feature vector."""
SIDE = 16
WINDOW = 8
"""Tokens that the network of texts reads."""
WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "red",
    "green",
    "blue",
    "cup",
    "plate",
    "lamp",
    "chair",
    "fine",
    "plain",
    "new",
    "a",
)


def write_image_encoder(folder: Path, *, seed: int = 0, **description: Any) -> Path:
    """Write a convolution with a mean over positions. Its features tell colours and places apart."""
    generator = np.random.default_rng(seed)
    weights = {
        "kernel": generator.normal(size=(FEATURES, 3, 4, 4)).astype(np.float32) / 7,
        "axes": np.array([2, 3], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["pixels", "kernel"], ["maps"], strides=[4, 4]),
        helper.make_node("Relu", ["maps"], ["active"]),
        helper.make_node("ReduceMean", ["active", "axes"], ["feature"], keepdims=0),
    ]
    preprocessing = {"kind": "image", "height": SIDE, "width": SIDE, "mean": [0.5] * 3, "std": [0.25] * 3}
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])
    feature = helper.make_tensor_value_info("feature", TensorProto.FLOAT, ["batch", FEATURES])
    return _write(folder, nodes, [pixels], feature, weights, {"preprocessing": preprocessing, **description})


def write_text_encoder(folder: Path, *, seed: int = 0, **description: Any) -> Path:
    """Write an embedding of words, and their tokenizer. The graph returns the vector of each token."""
    table = np.random.default_rng(seed).normal(size=(len(WORDS), FEATURES)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
        helper.make_node("Tanh", ["vectors"], ["states"]),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    states = helper.make_tensor_value_info("states", TensorProto.FLOAT, ["batch", "tokens", FEATURES])
    facts = {"preprocessing": {"kind": "text", "length": WINDOW}, "pooling": "mean", "normalize": True, **description}
    file = _write(folder, nodes, [ids], states, {"table": table}, facts)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return file


def encoded_modalities(folder: Path) -> tuple[list[Modality], list[EncoderFiles]]:
    """Return two pictures of one encoder, a text of another one and a vector, and the files of the encoders."""
    graphs = {"image": write_image_encoder(folder / "photos"), "text": write_text_encoder(folder / "texts")}
    files = []
    for kind, graph in graphs.items():
        description = EncoderDescription.model_validate_json((graph.parent / "encoder.json").read_bytes())
        tokenizer = graph.parent / "tokenizer.json" if kind == "text" else None
        files.append(EncoderFiles(graph.parent.name, description, graph, tokenizer, FEATURES, ""))
    statistics = {"size": FEATURES, "mean": (0.1,) * FEATURES, "std": (0.5,) * FEATURES}
    modalities: list[Modality] = [
        EncodedModality(name="photo", kind="image", encoder="photos", **statistics),
        EncodedModality(name="back", kind="image", encoder="photos", **statistics),
        EncodedModality(name="title", kind="text", encoder="texts", too_long="cut", **statistics),
        VectorModality(name="price", size=1, mean=(0.0,), std=(1.0,)),
    ]
    return modalities, files


def _write(
    folder: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    output: onnx.ValueInfoProto,
    weights: dict[str, np.ndarray],
    description: dict[str, Any],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "encoder", inputs, [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    (folder / "encoder.json").write_text(json.dumps(description))
    return folder / "model.onnx"
