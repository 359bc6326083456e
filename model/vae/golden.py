"""Inputs with the answers that the model gives, for graphs to be checked against."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.runtime import Posterior, Runtime
from model.vae.gaussian import antithetic, served_anchor
from model.vae.multimodal import MultimodalVAE

Arrays = Mapping[str, Tensor]
SUBSET_STRIDE = 101  # divides 2^M - 1 for no M up to 8, so that steps of it meet every subset


def golden_examples(vae: MultimodalVAE, examples: Arrays, samples: int) -> dict[str, Any]:
    """Inputs with the answers that PyTorch gives: what every opened bundle is checked against.

    Rows take their subsets in turn, all of them first; where there are fewer rows than subsets, these are of every size.
    Fillers of absent slots are not zero, so that a leak shows.

    Args:
        examples: complete rows (batch, *shape) by modality.
        samples: noise samples of the refinement step, an even number (antithetic pairs).

    Returns:
        arrays by name: ``input.<modality>``, ``present`` (batch, modality) and ``noise`` (batch, sample, latent); the aligned
        posterior ``mean`` and ``log_var``, what it is held to (``anchor_``) and one step after it (``next_``), each (batch,
        latent); ``objective`` (batch,) in nats; ``value.<modality>`` decoded from the mean, and ``drawn`` (batch, latent), one
        sample, where there is a flow.
    """
    rows = len(next(iter(examples.values())))
    count = len(vae.modalities)
    stride = 1 if rows >= 2**count - 1 else SUBSET_STRIDE
    subsets = [s * stride % (2**count - 1) for s in range(rows)]
    present = torch.tensor([[bool((2**count - 1 - s) >> m & 1) for m in range(count)] for s in subsets])
    generator = torch.Generator().manual_seed(0)
    noise = antithetic(torch.randn(rows, samples // 2, vae.latent, generator=generator))
    with torch.no_grad():
        start = vae.aligned(examples, present)
        anchor = served_anchor(start, present)
        refined, objective = vae.refine_step(examples, present, start, anchor, noise)
        values = {f"value.{m.name}": vae.decode(m.name, start.mean) for m in vae.modalities}
        if vae.flow is not None:
            values["drawn"] = vae.draw(start, noise[:, :1])[:, 0]
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


def parity(vae: MultimodalVAE, runtime: Runtime, examples: Arrays) -> float:
    """Largest difference between the graphs and the model over one encode, one refinement step and one sample, relative to the
    largest value of each answer. For batch sizes and inputs of the caller's choice."""
    golden = golden_examples(vae, examples, runtime.samples)
    inputs = {m.name: golden[f"input.{m.name}"] for m in vae.modalities}
    encoded = runtime.encode(inputs, golden["present"])
    refined, objective = runtime.refine(
        inputs,
        golden["present"],
        Posterior(golden["mean"], golden["log_var"]),
        Posterior(golden["anchor_mean"], golden["anchor_log_var"]),
        golden["noise"],
    )
    pairs = {
        "mean": encoded.mean,
        "log_var": encoded.log_var,
        "next_mean": refined.mean,
        "next_log_var": refined.log_var,
        "objective": objective,
    }
    if "drawn" in golden:
        start = Posterior(golden["mean"], golden["log_var"])
        pairs["drawn"] = runtime.draw(start, np.ascontiguousarray(golden["noise"][:, 0]))
    differences = [
        np.max(np.abs(answer - golden[key])) / max(1.0, float(np.max(np.abs(golden[key])))) for key, answer in pairs.items()
    ]
    return float(np.max(differences))  # NaN if any is, which Python's max would pass over
