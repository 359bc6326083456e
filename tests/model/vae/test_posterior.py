"""Encoders: the posterior given a subset of modalities depends on this subset only."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from concord.model.modality import Modality
from concord.model.vae.gaussian import LOG_VAR_RANGE
from concord.model.vae.multimodal import MultimodalVAE

SUBSETS = [mask for mask in itertools.product([True, False], repeat=4) if any(mask)]
ROWS = 3


@pytest.fixture(scope="module", params=["set", "product"])
def tiny_vae(request: Any, tiny_modalities: tuple[Modality, ...], make_vae: Any) -> MultimodalVAE:
    vae = make_vae(tiny_modalities, fusion=request.param)
    return vae if request.param == "set" else with_confident_experts(vae)


def with_confident_experts(vae: MultimodalVAE) -> MultimodalVAE:
    """Make all experts narrower than the prior. An expert equal to the prior would have no effect on a product."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for head in vae.aligned.heads.values():
            mean, log_var = head[-1].bias.chunk(2)
            nn.init.normal_(mean, std=0.2)
            nn.init.constant_(log_var, -1.0)
    return vae


def with_filler(arrays: dict[str, Tensor], names: list[str], filler: float) -> dict[str, Tensor]:
    """The arrays with all values of the modalities ``names`` replaced by filler."""
    return {
        name: torch.full_like(x, 10**9 if x.dtype == torch.int64 else filler) if name in names else x
        for name, x in arrays.items()
    }


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda mask: "".join("01"[bit] for bit in mask))
@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e30, -1.0])
def test_aligned_filler_of_absent_modalities_has_no_effect(
    tiny_vae: MultimodalVAE, make_rows, subset: tuple[bool, ...], filler: float
) -> None:
    arrays, present = make_rows(tiny_vae.modalities, ROWS), torch.tensor([subset] * ROWS)
    absent = [m.name for m, bit in zip(tiny_vae.modalities, subset, strict=True) if not bit]
    expected = tiny_vae.aligned(arrays, present)
    actual = tiny_vae.aligned(with_filler(arrays, absent, filler), present)
    assert torch.equal(actual.mean, expected.mean)
    assert torch.equal(actual.log_var, expected.log_var)


def test_aligned_rows_with_different_subsets_do_not_depend_on_the_batch(tiny_vae: MultimodalVAE, make_rows) -> None:
    arrays, present = make_rows(tiny_vae.modalities, len(SUBSETS)), torch.tensor(SUBSETS)
    batch = tiny_vae.aligned(arrays, present)
    for i in range(len(SUBSETS)):
        single = tiny_vae.aligned({name: x[i : i + 1] for name, x in arrays.items()}, present[i : i + 1])
        torch.testing.assert_close(single.mean[0], batch.mean[i])
        torch.testing.assert_close(single.log_var[0], batch.log_var[i])


@pytest.mark.parametrize("modality", range(4))
def test_aligned_depends_on_each_present_modality(tiny_vae: MultimodalVAE, make_rows, modality: int) -> None:
    arrays, others = make_rows(tiny_vae.modalities, ROWS), make_rows(tiny_vae.modalities, ROWS, seed=1)
    present = torch.zeros(ROWS, 4, dtype=torch.bool)
    present[:, modality] = True
    name = tiny_vae.modalities[modality].name
    changed = {**arrays, name: others[name]}
    assert not torch.equal(tiny_vae.aligned(arrays, present).mean, tiny_vae.aligned(changed, present).mean)


def test_aligned_distinguishes_absent_modalities_from_zeros(
    tiny_vae: MultimodalVAE, tiny_modalities: tuple[Modality, ...], make_rows
) -> None:
    zeros = {name: torch.zeros_like(x) for name, x in make_rows(tiny_modalities, 1).items()}
    means = [tiny_vae.aligned(zeros, torch.tensor([subset])).mean for subset in SUBSETS]
    assert len(torch.unique(torch.cat(means), dim=0)) == len(SUBSETS)


def test_fuse_of_features_equals_forward(tiny_vae: MultimodalVAE, make_rows) -> None:
    """Training computes the features once and fuses them for many subsets."""
    arrays, present = make_rows(tiny_vae.modalities, ROWS), torch.tensor([SUBSETS[4]] * ROWS)
    features = tiny_vae.aligned.features(arrays)
    assert features.shape[:2] == (ROWS, 4)
    assert torch.equal(tiny_vae.aligned.features(arrays, present)[present], features[present])
    assert torch.equal(tiny_vae.aligned.fuse(features, present).mean, tiny_vae.aligned(arrays, present).mean)


def test_fuse_each_equals_fuse_of_every_mask(tiny_vae: MultimodalVAE, make_rows) -> None:
    arrays, rows = make_rows(tiny_vae.modalities, ROWS), torch.tensor([[True, True, True, True], *SUBSETS[5:7]])
    masks = rows & torch.tensor([*SUBSETS, (False,) * 4]).unsqueeze(1)
    aligned = copy.deepcopy(tiny_vae.aligned).requires_grad_()
    features = torch.where(rows.unsqueeze(-1), aligned.features(arrays).detach(), float("nan")).requires_grad_()
    inputs = [features, *aligned.parameters()]
    results = []
    for posteriors in (aligned.fuse_each(features, masks), [aligned.fuse(features, mask) for mask in masks]):
        values = torch.stack([torch.cat(tuple(posterior), dim=1) for posterior in posteriors])
        upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
        results.append([values, *torch.autograd.grad(values, inputs, upstream, materialize_grads=True)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_aligned_log_variance_is_bounded(tiny_vae: MultimodalVAE, make_rows) -> None:
    arrays = {name: x * 1000 for name, x in make_rows(tiny_vae.modalities, ROWS).items()}
    log_var = tiny_vae.aligned(arrays, torch.ones(ROWS, 4, dtype=torch.bool)).log_var
    assert log_var.min() >= LOG_VAR_RANGE[0]
    assert log_var.max() <= LOG_VAR_RANGE[1]


def test_product_encoder_multiplies_experts_and_divides_by_priors(tiny_modalities, make_vae, make_rows) -> None:
    vae, arrays = with_confident_experts(make_vae(tiny_modalities, fusion="product")), make_rows(tiny_modalities, ROWS)
    q = vae.aligned(arrays, torch.tensor([[True, False, True, True]] * ROWS))
    experts = [vae.aligned(arrays, torch.arange(4).expand(ROWS, 4) == m) for m in (0, 2, 3)]
    precision = sum((-expert.log_var).exp() for expert in experts) - 2
    assert precision.min() > 1
    torch.testing.assert_close(q.log_var, -precision.log())
    torch.testing.assert_close(q.mean, sum(expert.mean * (-expert.log_var).exp() for expert in experts) / precision)


@pytest.mark.parametrize("fusion", ["set", "product"])
def test_initialise_from_joint_encoder_gives_equal_unimodal_posteriors(
    tiny_modalities, make_vae, make_rows, fusion: str
) -> None:
    vae, arrays = make_vae(tiny_modalities, fusion=fusion), make_rows(tiny_modalities, ROWS)
    vae.aligned.initialise_from(vae.joint)
    for m in range(4):
        present = torch.arange(4).expand(ROWS, 4) == m
        for actual, expected in zip(vae.aligned(arrays, present), vae.joint(arrays, present), strict=True):
            torch.testing.assert_close(actual, expected)
