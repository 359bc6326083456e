"""Golden examples: inputs with the outputs of the PyTorch model, to check graphs against."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from concord.model.bundle import GOLDEN_FILE
from concord.model.encoder import EncoderFiles, ImagePreprocessing
from concord.model.runtime import Posterior, Runtime
from concord.model.runtime.device import Device
from concord.model.runtime.frozen import open_files
from concord.model.vae.gaussian import antithetic, refinement_anchor
from concord.model.vae.multimodal import MultimodalVAE
from concord.model.vae.sequence_decoder import SequenceDecoder

Arrays = Mapping[str, Tensor]
_GOLDEN_TEXTS = ("A small red bird sits on a branch.", "2 caf\u00e9s, na\u00efve \u2014 \u6771\u4eac", "x")
SUBSET_STRIDE = 101  # coprime to 2^M - 1 for every M <= 12, so that steps of this size visit every subset


def golden_examples(vae: MultimodalVAE, examples: Arrays, samples: int) -> dict[str, Any]:
    """Inputs and the outputs of the PyTorch model. The graphs are checked against them at export and when a bundle is opened.

    Each row has the next subset of modalities. If there are fewer rows than subsets, the rows have subsets of all sizes. Values
    of absent modalities are not zero, so that the check fails if they affect an output.

    Args:
        examples: complete rows (batch, *shape) by modality.
        samples: noise samples of the refinement step, an even number (antithetic pairs).

    Returns:
        arrays by name:

            - inputs: ``input.<modality>`` (batch, *shape), ``present`` (batch, modality), ``noise`` (batch, sample, latent),
            - ``mean`` and ``log_var``, the aligned posterior; ``anchor_mean`` and ``anchor_log_var``, the anchor of refinement;
              ``next_mean`` and ``next_log_var``, the posterior after one step: each (batch, latent),
            - ``objective`` (batch,), in weighted nats,
            - ``value.<modality>``, decoded from the mean; of a text with the autoregressive likelihood (batch, length), the
              log-probabilities of the tokens of ``input.<modality>`` given the mean, which rounding changes little,
            - ``drawn`` (batch, latent), a sample of the posterior, if the model has a flow.
    """
    rows = len(next(iter(examples.values())))
    count = len(vae.modalities)
    nonempty = 2**count - 1
    stride = 1 if rows >= nonempty else SUBSET_STRIDE
    subsets = [nonempty - row * stride % nonempty for row in range(rows)]  # from all modalities downwards, as bit sets
    present = torch.tensor([[bool(subset >> m & 1) for m in range(count)] for subset in subsets])
    generator = torch.Generator().manual_seed(0)
    noise = antithetic(torch.randn(rows, samples // 2, vae.latent, generator=generator))
    with torch.no_grad():
        start = vae.aligned(examples, present)
        anchor = refinement_anchor(start, present)
        refined, objective = vae.refine_step(examples, present, start, anchor, noise)
        values = {f"value.{m.name}": _value(vae, m.name, start.mean, examples[m.name]) for m in vae.modalities}
        if vae.flow is not None:
            values["drawn"] = vae.sample(start, noise[:, :1])[:, 0]
    tensors = {
        **{f"input.{name}": array for name, array in examples.items()},
        "present": present,
        "noise": noise,
        "mean": start.mean,
        "log_var": start.log_var,
        "anchor_mean": anchor.mean,
        "anchor_log_var": anchor.log_var,
        "next_mean": refined.mean,
        "next_log_var": refined.log_var,
        "objective": objective,
        **values,
    }
    return {key: tensor.numpy() for key, tensor in tensors.items()}


def _value(vae: MultimodalVAE, name: str, z: Tensor, x: Tensor) -> Tensor:
    network = vae.decoders[name]
    return network.token_log_likelihoods(z, x) if isinstance(network, SequenceDecoder) else vae.decode(name, z)


def golden_files(encoders: Sequence[EncoderFiles]) -> dict[str, Any]:
    """Files and their features, which the check of a bundle computes again: pictures as PNG and JPEG, or texts.

    They are generated, not taken from the data, so that a bundle holds no file of it.

    Returns:
        arrays by name, see ``bundle.GOLDEN_FILE``.
    """
    arrays: dict[str, Any] = {}
    for files in encoders:
        encoder = open_files(files, Device(), threads=1)
        is_image = isinstance(files.description.preprocessing, ImagePreprocessing)
        contents = _golden_pictures() if is_image else [text.encode() for text in _GOLDEN_TEXTS]
        arrays |= {
            f"{GOLDEN_FILE}.{files.name}.{number}": np.frombuffer(content, np.uint8) for number, content in enumerate(contents)
        }
        arrays[f"features.{files.name}"] = encoder.features(
            [encoder.preprocessor.golden_input(content) for content in contents]
        )
    return arrays


def _golden_pictures() -> list[bytes]:
    """A gradient with noise, 300 x 200, once with transparency and once without."""
    generator = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 300) * np.ones((200, 1))
    levels = np.stack([ramp, ramp[:, ::-1], generator.uniform(0, 255, (200, 300)), 255 - ramp / 2], axis=2).astype(np.uint8)
    pictures = []
    for mode, file_format in (("RGBA", "PNG"), ("RGB", "JPEG")):
        file = BytesIO()
        Image.fromarray(np.ascontiguousarray(levels[..., : len(mode)])).save(file, file_format)
        pictures.append(file.getvalue())
    return pictures


def parity(vae: MultimodalVAE, runtime: Runtime, examples: Arrays) -> float:
    """Largest difference between the graphs and the PyTorch model over one encode, one refinement step and one sample.

    Args:
        examples: complete rows (batch, *shape) by modality, any number of them.

    Returns:
        the largest absolute difference of any output, divided by the largest absolute value of that output (at least 1).
    """
    golden = golden_examples(vae, examples, runtime.noise_samples)
    inputs = {m.name: golden[f"input.{m.name}"] for m in vae.modalities}
    encoded = runtime.encode(inputs, golden["present"])
    refined, objective = runtime.refine(
        inputs,
        golden["present"],
        Posterior(golden["mean"], golden["log_var"]),
        Posterior(golden["anchor_mean"], golden["anchor_log_var"]),
        golden["noise"],
    )
    outputs = {
        "mean": encoded.mean,
        "log_var": encoded.log_var,
        "next_mean": refined.mean,
        "next_log_var": refined.log_var,
        "objective": objective,
    }
    if "drawn" in golden:
        start = Posterior(golden["mean"], golden["log_var"])
        outputs["drawn"] = runtime.sample(start, np.ascontiguousarray(golden["noise"][:, 0]))
    differences = [
        np.max(np.abs(output - golden[key])) / max(1.0, float(np.max(np.abs(golden[key])))) for key, output in outputs.items()
    ]
    return float(np.max(differences))  # NaN if any is NaN, unlike Python's max
