"""What is absent never shows: the posterior of every subset depends on that subset alone."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.modality import Modality
from model.vae.gaussian import LOG_VAR_RANGE
from model.vae.multimodal import MultimodalVAE

SUBSETS = [mask for mask in itertools.product([True, False], repeat=4) if any(mask)]
ROWS = 3


@pytest.fixture(scope="module", params=["set", "product"])
def tiny_vae(request: Any, tiny_modalities: tuple[Modality, ...], make_vae: Any) -> MultimodalVAE:
    vae = make_vae(tiny_modalities, fusion=request.param)
    return vae if request.param == "set" else sure(vae)


def sure(vae: MultimodalVAE) -> MultimodalVAE:
    """With experts that all know something: one that gives the prior back would leave no trace in a product."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for head in vae.aligned.heads.values():
            mean, log_var = head[-1].bias.chunk(2)
            nn.init.normal_(mean, std=0.2)
            nn.init.constant_(log_var, -1.0)
    return vae


def spoiled(arrays: dict[str, Tensor], names: list[str], filler: float) -> dict[str, Tensor]:
    """The arrays with every value of some modalities replaced."""
    return {
        name: torch.full_like(x, 10**9 if x.dtype == torch.int64 else filler) if name in names else x
        for name, x in arrays.items()
    }


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda mask: "".join("01"[bit] for bit in mask))
@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e30, -1.0])
def test_fillers_never_leak(tiny_vae: MultimodalVAE, make_rows, subset: tuple[bool, ...], filler: float) -> None:
    arrays, present = make_rows(tiny_vae.modalities, ROWS), torch.tensor([subset] * ROWS)
    absent = [m.name for m, bit in zip(tiny_vae.modalities, subset, strict=True) if not bit]
    expected = tiny_vae.aligned(arrays, present)
    found = tiny_vae.aligned(spoiled(arrays, absent, filler), present)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.log_var, expected.log_var)


def test_rows_of_one_batch_have_subsets_of_their_own(tiny_vae: MultimodalVAE, make_rows) -> None:
    arrays, present = make_rows(tiny_vae.modalities, len(SUBSETS)), torch.tensor(SUBSETS)
    together = tiny_vae.aligned(arrays, present)
    for i in range(len(SUBSETS)):
        alone = tiny_vae.aligned({name: x[i : i + 1] for name, x in arrays.items()}, present[i : i + 1])
        torch.testing.assert_close(alone.mean[0], together.mean[i])
        torch.testing.assert_close(alone.log_var[0], together.log_var[i])


@pytest.mark.parametrize("modality", range(4))
def test_what_is_present_counts(tiny_vae: MultimodalVAE, make_rows, modality: int) -> None:
    arrays, others = make_rows(tiny_vae.modalities, ROWS), make_rows(tiny_vae.modalities, ROWS, seed=1)
    present = torch.zeros(ROWS, 4, dtype=torch.bool)
    present[:, modality] = True
    name = tiny_vae.modalities[modality].name
    changed = {**arrays, name: others[name]}
    assert not torch.equal(tiny_vae.aligned(arrays, present).mean, tiny_vae.aligned(changed, present).mean)


def test_absence_is_told_from_zeros(tiny_vae: MultimodalVAE, tiny_modalities: tuple[Modality, ...], make_rows) -> None:
    zeros = {name: torch.zeros_like(x) for name, x in make_rows(tiny_modalities, 1).items()}
    means = [tiny_vae.aligned(zeros, torch.tensor([subset])).mean for subset in SUBSETS]
    assert len(torch.unique(torch.cat(means), dim=0)) == len(SUBSETS)


def test_features_fused_are_the_whole(tiny_vae: MultimodalVAE, make_rows) -> None:
    """What training uses to see many subsets at the price of one pass through the trunks."""
    arrays, present = make_rows(tiny_vae.modalities, ROWS), torch.tensor([SUBSETS[4]] * ROWS)
    features = tiny_vae.aligned.features(arrays)
    assert features.shape[:2] == (ROWS, 4)
    assert torch.equal(tiny_vae.aligned.features(arrays, present)[present], features[present])
    assert torch.equal(tiny_vae.aligned.fuse(features, present).mean, tiny_vae.aligned(arrays, present).mean)


def test_the_variance_is_bounded(tiny_vae: MultimodalVAE, make_rows) -> None:
    arrays = {name: x * 1000 for name, x in make_rows(tiny_vae.modalities, ROWS).items()}
    log_var = tiny_vae.aligned(arrays, torch.ones(ROWS, 4, dtype=torch.bool)).log_var
    assert log_var.min() >= LOG_VAR_RANGE[0]
    assert log_var.max() <= LOG_VAR_RANGE[1]


def test_experts_multiply_with_the_spare_priors_divided_out(tiny_modalities, make_vae, make_rows) -> None:
    vae, arrays = sure(make_vae(tiny_modalities, fusion="product")), make_rows(tiny_modalities, ROWS)
    several = vae.aligned(arrays, torch.tensor([[True, False, True, True]] * ROWS))
    experts = [vae.aligned(arrays, torch.arange(4).expand(ROWS, 4) == m) for m in (0, 2, 3)]
    precision = sum((-q.log_var).exp() for q in experts) - 2
    assert precision.min() > 1
    torch.testing.assert_close(several.log_var, -precision.log())
    torch.testing.assert_close(several.mean, sum(q.mean * (-q.log_var).exp() for q in experts) / precision)


@pytest.mark.parametrize("fusion", ["set", "product"])
def test_aligned_encoders_begin_with_what_the_joint_one_says_of_single_modalities(
    tiny_modalities, make_vae, make_rows, fusion: str
) -> None:
    vae, arrays = make_vae(tiny_modalities, fusion=fusion), make_rows(tiny_modalities, ROWS)
    vae.aligned.begin_as(vae.joint)
    for m in range(4):
        alone = torch.arange(4).expand(ROWS, 4) == m
        for found, expected in zip(vae.aligned(arrays, alone), vae.joint(arrays, alone), strict=True):
            torch.testing.assert_close(found, expected)
