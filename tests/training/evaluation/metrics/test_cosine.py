import pytest
import torch

from concord.training.evaluation.metrics.cosine import cosine


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_cosine_of_scaled_copies_is_one() -> None:
    rows = torch.randn(500, 40, generator=seeded())
    matched, control = cosine(3 * rows, rows, seeded())
    assert matched == pytest.approx(1)
    assert abs(control) < 5 / (500 * 40) ** 0.5  # independent directions


def test_cosine_control_shows_the_common_direction_of_rows() -> None:
    rows = torch.randn(500, 40, generator=seeded()) * 0.1 + 1
    matched, control = cosine(rows, rows, seeded())
    assert matched == pytest.approx(1)
    assert 0.98 < control < 0.995


def test_cosine_control_never_pairs_a_row_with_itself() -> None:
    assert cosine(torch.eye(7), torch.eye(7), seeded())[1] == 0
    assert cosine(torch.eye(2), -torch.eye(2), seeded()) == (-1, 0)


def test_cosine_of_one_row_is_rejected() -> None:
    with pytest.raises(ValueError, match="at least 2 rows, received 1"):
        cosine(torch.ones(1, 2), torch.ones(1, 2), seeded())
