"""A network of CLIP's shape with random weights, saved as on the Hugging Face hub. Needs the package transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from concord.model.codec.errors import DEFAULT_LIMITS
from concord.model.runtime.device import Device
from concord.model.runtime.frozen import open_files
from concord.training.encoders.find import find_encoder
from concord.training.errors import ConfigError

transformers = pytest.importorskip("transformers")

WORDS = ("!", "red", "blue", "cup", "<|startoftext|>", "<|endoftext|>")
SIDE, SIZE = 32, 10
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder and the network."""
    import torch  # noqa: PLC0415
    from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: PLC0415

    folder = tmp_path_factory.mktemp("hub") / "clip-random"
    text = {
        **LAYERS,
        "vocab_size": len(WORDS),
        "max_position_embeddings": 8,
        "bos_token_id": 4,
        "eos_token_id": 5,
        "pad_token_id": 1,
    }
    vision = {**LAYERS, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(0)
    network = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=SIZE)
    ).eval()
    network.save_pretrained(folder)
    crop = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True}
    facts = {**crop, "resample": 3, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{WORDS[4]} $A {WORDS[5]}", special_tokens=[(WORDS[4], 4), (WORDS[5], 5)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder, network


def tensor(features: Any) -> np.ndarray:
    return np.asarray((features if hasattr(features, "numpy") else features.pooler_output).detach().numpy())


def test_both_towers_of_a_folder_equal_the_network(clip: tuple[Path, Any], tmp_path: Path) -> None:
    import torch  # noqa: PLC0415

    folder, network = clip
    files = find_encoder(str(folder), "image", tmp_path)
    encoder = open_files(files, Device(), threads=1)
    assert (files.name, files.size) == ("clip-random-image", SIZE)
    noise = np.random.default_rng(0).integers(0, 256, (50, 40, 3)).astype(np.uint8)
    pixels = encoder.preprocessor.pixels(Image.fromarray(noise), DEFAULT_LIMITS)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]))
    expected = tensor(network.get_image_features(pixel_values=torch.from_numpy((pixels / np.float32(255) - mean) / std)[None]))
    np.testing.assert_allclose(encoder.features([pixels]), expected, rtol=1e-4, atol=1e-4)

    files = find_encoder(str(folder), "text", tmp_path)
    encoder = open_files(files, Device(), threads=1)
    assert (files.name, files.size) == ("clip-random-text", SIZE)
    texts = ["red cup", "a very blue cup cup cup cup cup"]
    tokens = [encoder.preprocessor.tokens(text, "cut", DEFAULT_LIMITS) for text in texts]
    assert [len(ids) for ids in tokens] == [4, 8]
    for ids, features in zip(tokens, encoder.features(tokens), strict=True):
        expected = tensor(network.get_text_features(input_ids=torch.from_numpy(ids[None].astype(np.int64))))
        np.testing.assert_allclose(features, expected[0], rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_match_the_configuration_are_rejected(clip: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file  # noqa: PLC0415

    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in clip[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 weights.*visual_projection\.weight: they do not match config\.json"):
        find_encoder(str(folder), "image", tmp_path / "cache")
