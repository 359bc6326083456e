"""Frozen encoders in the format of the Hugging Face hub: a folder with config.json, safetensors, and a tokenizer or a
preprocessor.

Code of a repository is never run. The networks are those of the package ``transformers``, which is only needed to convert one.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from concord.model.encoder import EncoderDescription, ImagePreprocessing, TextPreprocessing
from concord.training.errors import ConfigError

PATTERNS = ("*.json", "*/config.json", "*.safetensors", "*.txt", "*.model", "README.md")
"""Files that are downloaded. No pickles and no code."""
_RESAMPLING: dict[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
_MAX_LENGTH = 8192


def download(name: str) -> Path:
    """Download a repository of the hub, or find it in the hub's cache.

    Raises:
        ConfigError: the hub cannot be reached, or there is no such repository.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - takes time that other sources do without

    try:
        return Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except Exception as error:  # the hub's client raises many classes
        folder = name.rpartition("/")[2]
        raise ConfigError(
            f"encoder {name!r}: cannot be downloaded from the Hugging Face hub ({type(error).__name__}: {error}). Check the "
            f"name and the connection. Or download it on another machine (hf download {name} --local-dir {folder}), copy the "
            f'folder here, and set encoder = "{folder}"'
        ) from error


def describe_folder(folder: Path, kind: str) -> EncoderDescription | None:
    """Return the description of a network of pictures or texts from the files of its folder. None: it is no such network.

    Raises:
        ConfigError: the files are damaged, or ask for a preprocessing that is not supported.
    """
    config, file = _read(folder / "config.json"), folder / "preprocessor_config.json"
    is_known = (folder / "tokenizer.json").exists() if kind == "text" else file.exists()
    if not is_known:
        return None
    origin = str(config.get("_name_or_path") or folder.resolve().name)
    try:
        if kind == "image":
            pooling = "none" if is_dual(folder) else "first" if config.get("num_attention_heads") else "mean"
            return EncoderDescription(
                preprocessing=_image(_read(file)), pooling=pooling, licence=_licence(folder), origin=origin
            )
        pooling = "none" if is_dual(folder) else _text_pooling(folder)
        normalize = any("Normalize" in str(module.get("type")) for module in _read_list(folder / "modules.json"))
        text = _text(folder, config)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder}: its preprocessing is not supported ({error}). Write encoder.json into the folder"
        ) from error
    return EncoderDescription(preprocessing=text, pooling=pooling, normalize=normalize, licence=_licence(folder), origin=origin)


def is_dual(folder: Path) -> bool:
    """Whether the network has an encoder of pictures and one of texts, as CLIP and SigLIP have."""
    config = _read(folder / "config.json")
    return "vision_config" in config and "text_config" in config


def convert_folder(folder: Path, description: EncoderDescription, target: Path) -> EncoderDescription:
    """Write ``graph.onnx`` and ``tokenizer.json`` of a network.

    Raises:
        ConfigError: ``transformers`` is missing or does not know the network, or its weights do not match its configuration.
    """
    try:
        import torch  # noqa: PLC0415 - takes seconds that cached encoders do without
        from transformers import AutoModel  # noqa: PLC0415 - optional package
        from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

        from concord.training.encoders.convert import write_graph  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"{folder}: a Hugging Face model needs the package transformers. Run: pip install --no-deps transformers"
        ) from error

    class Network(torch.nn.Module):
        def __init__(self, network: Any) -> None:
            super().__init__()
            self.network = network

        def forward(self, values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            if mask is None:
                method, feed = "get_image_features", {"pixel_values": values}
            else:
                method, feed = "get_text_features", {"input_ids": values, "attention_mask": mask}
            output = getattr(self.network, method)(**feed) if hasattr(self.network, method) else self.network(**feed)
            if isinstance(output, torch.Tensor):
                return output
            features: torch.Tensor = output.pooler_output if description.pooling == "none" else output.last_hidden_state
            return features

    disable_progress_bar()
    try:
        loaded, report = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, attn_implementation="eager", output_loading_info=True
        )
    except Exception as error:  # transformers raises many classes
        raise ConfigError(f"{folder}: transformers cannot load the network ({type(error).__name__}: {error})") from error
    if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name):
        raise ConfigError(
            f"{folder}: its safetensors lack {len(missing)} weights of the network, the first is {missing[0]}: they do not "
            "match config.json. Download the folder again"
        )
    preprocessing = description.preprocessing
    network, generator = Network(loaded.eval()), torch.Generator().manual_seed(0)
    if isinstance(preprocessing, ImagePreprocessing):
        pixels = torch.randn(2, 3, preprocessing.height, preprocessing.width, generator=generator)
        write_graph(network, [pixels], target)
        return description
    config = _read(folder / "config.json")
    vocabulary = int(config.get("text_config", config)["vocab_size"])
    tokens = torch.randint(0, vocabulary, (2, min(9, preprocessing.length)), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, tokens.shape[1] // 2 :] = 0
    write_graph(network, [tokens, mask], target, preprocessing.length)
    shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
    return description


def _image(facts: dict[str, Any]) -> ImagePreprocessing:
    size, crop = facts.get("size", 224), facts.get("crop_size")
    side = size if isinstance(size, int) else size.get("shortest_edge")
    full = (int(size["height"]), int(size["width"])) if isinstance(size, dict) and "height" in size else None
    if facts.get("do_center_crop") and crop is not None:
        height, width = (crop, crop) if isinstance(crop, int) else (int(crop["height"]), int(crop["width"]))
        side = side if side is not None else full and min(full)
        resize, stretch = (None if side == min(height, width) else side), False
    elif full is not None:
        (height, width), resize, stretch = full, None, True
    else:
        height, width, resize, stretch = int(side), int(side), None, False
    if facts.get("rescale_factor", 1 / 255) != 1 / 255 and abs(facts["rescale_factor"] * 255 - 1) > 1e-6:
        raise ValueError(f"rescale_factor is {facts['rescale_factor']}, 1/255 is supported")
    statistics = {}
    if facts.get("do_normalize", True) and facts.get("image_mean") is not None:
        statistics = {"mean": tuple(facts["image_mean"]), "std": tuple(facts["image_std"])}
    resampling = _RESAMPLING.get(facts.get("resample", 3), "bicubic")
    return ImagePreprocessing(height=height, width=width, resize=resize, stretch=stretch, resampling=resampling, **statistics)


def _text(folder: Path, config: dict[str, Any]) -> TextPreprocessing:
    config = config.get("text_config") or config
    lengths = [
        _read(folder / "sentence_bert_config.json").get("max_seq_length"),
        _read(folder / "tokenizer_config.json").get("model_max_length"),
        config.get("max_position_embeddings"),
    ]
    length = min(int(found) for found in lengths if found is not None and 0 < found <= 1e9)
    if config.get("model_type") in ("roberta", "xlm-roberta", "mpnet"):  # their positions begin after that of the padding
        length = min(length, int(config["max_position_embeddings"]) - 2)
    return TextPreprocessing(length=min(length, _MAX_LENGTH), pad=int(config.get("pad_token_id") or 0))


def _text_pooling(folder: Path) -> Literal["mean", "first"]:
    """As sentence-transformers says, else the mean."""
    return "first" if _read(folder / "1_Pooling" / "config.json").get("pooling_mode_cls_token") else "mean"


def _licence(folder: Path) -> str:
    """As the head of the model card says."""
    card = folder / "README.md"
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()[:40] if card.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("license:")), "not stated")


def _read(file: Path) -> dict[str, Any]:
    content = _read_json(file)
    return content if isinstance(content, dict) else {}


def _read_list(file: Path) -> list[dict[str, Any]]:
    content = _read_json(file)
    return [one for one in content if isinstance(one, dict)] if isinstance(content, list) else []


def _read_json(file: Path) -> object:
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
