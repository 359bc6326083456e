import pytest
import torch

from training.metrics.cosine import cosine


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_equal_up_to_length() -> None:
    rows = torch.randn(500, 40, generator=seeded())
    matched, control = cosine(3 * rows, rows, seeded())
    assert matched == pytest.approx(1)
    assert abs(control) < 5 / (500 * 40) ** 0.5  # independent directions


def test_what_all_rows_share_shows_in_the_control() -> None:
    rows = torch.randn(500, 40, generator=seeded()) * 0.1 + 1
    matched, control = cosine(rows, rows, seeded())
    assert matched == pytest.approx(1)
    assert 0.98 < control < 0.995


def test_no_row_meets_itself() -> None:
    assert cosine(torch.eye(7), torch.eye(7), seeded())[1] == 0
    assert cosine(torch.eye(2), -torch.eye(2), seeded()) == (-1, 0)


def test_one_row_has_no_control() -> None:
    with pytest.raises(ValueError, match="two rows or more, received 1"):
        cosine(torch.ones(1, 2), torch.ones(1, 2), seeded())
