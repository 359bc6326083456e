"""A bundle with an autoregressive text: its graphs equal the model, in likelihood, gradient and samples with given noise."""

from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from concord.model import bundle
from concord.model.codec import render
from concord.model.runtime import Posterior, Runtime
from concord.model.runtime.branch_absent import branch_absent
from concord.model.vae.export import PARITY_TOLERANCE
from concord.model.vae.export.graphs import _convert
from concord.model.vae.export.tracing import trace
from concord.model.vae.gaussian import Gaussian
from concord.model.vae.multimodal import MultimodalVAE

ROWS = 9
SUBSETS = [mask for mask in product([True, False], repeat=3) if any(mask)]


@pytest.fixture(scope="module", params=[False, True], ids=["any size", "fixed sizes"])
def runtime(sentence_bundle: bundle.Bundle, request: pytest.FixtureRequest) -> Runtime:
    return Runtime(sentence_bundle, threads=1, fixed_batches=request.param, max_batch=4)


def noise(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, length), dtype=np.float32)


def latents(vae: MultimodalVAE, rows: int = ROWS) -> np.ndarray:
    return 2 * np.random.default_rng(1).standard_normal((rows, vae.latent), dtype=np.float32)


def options(rows: int, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    return np.full(rows, temperature, np.float32), np.full(rows, top_p, np.float32)


def test_bundle_has_format_6_and_repeats_its_golden_examples(sentence_bundle: bundle.Bundle, runtime: Runtime) -> None:
    assert sentence_bundle.manifest.format == 6
    assert runtime.replay_golden() <= PARITY_TOLERANCE
    runtime.warm_up(2)


def test_decode_graph_has_no_control_flow(sentence_bundle: bundle.Bundle) -> None:
    graph = onnx.load_model_from_string(sentence_bundle.content(sentence_bundle.manifest.graphs.decode["caption"])).graph
    assert not {"If", "Loop", "Scan"} & {node.op_type for node in graph.node}
    assert [value.name for value in graph.input] == ["z", "token", "position", "state"]


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda mask: "".join("01"[bit] for bit in mask))
def test_refinement_step_equals_the_model_for_every_subset(
    sentence_vae: MultimodalVAE, runtime: Runtime, sentence_rows: Any, subset: tuple[bool, ...]
) -> None:
    generator, present = torch.Generator().manual_seed(0), torch.tensor([subset] * 14)
    mean, log_var, anchor_mean, anchor_log_var = (
        0.5 * torch.randn(14, sentence_vae.latent, generator=generator) for _ in range(4)
    )
    eps = torch.randn(14, 2, sentence_vae.latent, generator=generator)
    expected, value = sentence_vae.refine_step(
        sentence_rows, present, Gaussian(mean, log_var), Gaussian(anchor_mean, anchor_log_var), eps
    )
    q, anchor = Posterior(mean.numpy(), log_var.numpy()), Posterior(anchor_mean.numpy(), anchor_log_var.numpy())
    inputs = {name: array.numpy() for name, array in sentence_rows.items()}
    refined, objective = runtime.refine(inputs, present.numpy(), q, anchor, eps.numpy())
    for actual, wanted in ((refined.mean, expected.mean), (refined.log_var, expected.log_var), (objective, value)):
        scale = max(1.0, float(wanted.abs().max()))
        np.testing.assert_allclose(actual / scale, wanted.numpy() / scale, atol=PARITY_TOLERANCE)


def test_refine_graph_skips_the_decoders_of_absent_texts(sentence_bundle: bundle.Bundle) -> None:
    names = [m.name for m in sentence_bundle.manifest.modalities]
    changed = branch_absent(sentence_bundle.content("refine.onnx"), sentence_bundle.content(bundle.WEIGHTS), names)
    branches = [node for node in onnx.load_model_from_string(changed).graph.node if node.op_type == "If"]
    assert len(branches) == len(names)


@pytest.mark.parametrize("name", ["caption", "code"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.0, 1.0), (0.7, 0.8)])
def test_samples_with_given_noise_equal_those_of_the_model(
    sentence_vae: MultimodalVAE, runtime: Runtime, name: str, temperature: float, top_p: float
) -> None:
    (modality,) = (m for m in sentence_vae.modalities if m.name == name)
    z, u = latents(sentence_vae), noise(ROWS, *modality.shape)
    expected = sentence_vae.sample_text(
        name, torch.from_numpy(z), torch.from_numpy(u), temperature=temperature, top_p=top_p
    ).numpy()
    np.testing.assert_array_equal(runtime.sample_text(name, z, u, *options(ROWS, temperature, top_p)), expected)
    if temperature == 0:
        np.testing.assert_array_equal(runtime.decode(name, z), expected)
        np.testing.assert_array_equal(sentence_vae.decode(name, torch.from_numpy(z)).numpy(), expected)
    assert all(render(modality, row)["text"] for row in expected)


def test_text_does_not_depend_on_other_rows_of_the_batch(sentence_vae: MultimodalVAE, runtime: Runtime) -> None:
    z, u = latents(sentence_vae, 64), noise(64, 7)
    together = runtime.sample_text("caption", z, u, *options(64, 1.0, 0.95))
    for row in range(64):
        part = slice(row, row + 1)
        np.testing.assert_array_equal(
            runtime.sample_text("caption", z[part], u[part], *options(1, 1.0, 0.95))[0], together[row]
        )
    assert len(np.unique(together, axis=0)) > 30


def test_gradient_of_the_log_likelihood_equals_that_of_the_model(sentence_vae: MultimodalVAE, sentence_rows: Any) -> None:
    """The graph of log p(text | z) and its gradient by z, without the refiner, whose response could hide a difference."""
    name = "caption"

    def gradient(z: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def total(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            log_likelihood = sentence_vae.text_log_likelihood(name, tokens, z)
            return log_likelihood.sum(), log_likelihood

        of_z, log_likelihood = torch.func.grad(total, has_aux=True)(z)
        return log_likelihood, of_z

    z, tokens = torch.from_numpy(latents(sentence_vae, 14)), sentence_rows[name]
    rows = next(size for size in range(3, 99) if size not in {*sentence_vae.decoders[name].axes, *z.shape, *tokens.shape})
    program = trace(gradient, (z[:1].repeat(rows, 1), tokens[:1].repeat(rows, 1)))
    graph = _convert(program, ["z", "tokens"], ["log_likelihood", "gradient"])
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"z": z.numpy(), "tokens": tokens.numpy()})
    for actual, wanted in zip(found, gradient(z, tokens), strict=True):
        scale = float(wanted.abs().max())
        assert scale > 0.1
        np.testing.assert_allclose(actual / scale, wanted.numpy() / scale, atol=PARITY_TOLERANCE)


def test_objective_has_the_log_likelihood_of_the_text(
    sentence_vae: MultimodalVAE, runtime: Runtime, sentence_rows: Any
) -> None:
    present = np.array([[False, True, False]] * 14)
    q = Posterior(np.zeros((14, sentence_vae.latent), np.float32), np.full((14, sentence_vae.latent), -20, np.float32))
    inputs = {name: array.numpy() for name, array in sentence_rows.items()}
    _, objective = runtime.refine(inputs, present, q, q, np.zeros((14, 2, sentence_vae.latent), np.float32))
    network: Any = sentence_vae.decoders["caption"]
    expected = sentence_vae.weights["caption"] * network.token_log_likelihoods(
        torch.zeros(14, sentence_vae.latent), sentence_rows["caption"]
    ).sum(1)
    np.testing.assert_allclose(objective, expected.numpy(), rtol=1e-4)
