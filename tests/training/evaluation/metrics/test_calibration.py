"""Calibration on cases whose result is known."""

import math

import numpy as np
import pytest
import torch

from concord.model.vae.gaussian import Gaussian
from concord.training.evaluation.metrics.calibration import (
    SMALLEST,
    attribute_calibration,
    calibration_error,
    class_calibration,
    coverage,
)


def test_calibration_error_of_calibrated_probabilities_is_zero() -> None:
    happened = np.arange(10) < 7
    assert calibration_error(np.full(10, 0.7), happened) == pytest.approx(0)
    assert calibration_error(happened.astype(float), happened) == 0


def test_calibration_error_is_the_mean_distance_over_the_rows() -> None:
    """Ten events of 0.9 of which six happen, thirty of 0.3 of which all happen."""
    probabilities = np.repeat([0.9, 0.3], [10, 30])
    happened = np.concatenate([np.arange(10) < 6, np.ones(30, dtype=bool)])
    assert calibration_error(probabilities, happened) == pytest.approx((10 * 0.3 + 30 * 0.7) / 40)


def test_calibration_error_without_events_raises() -> None:
    with pytest.raises(ValueError, match="needs predictions"):
        calibration_error(np.zeros(0), np.zeros(0, dtype=bool))


def test_class_calibration_of_known_probabilities() -> None:
    probabilities = np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1], [0.0, 0.0, 1.0]])
    figures = class_calibration(np.array([0, 1, 0]), probabilities)
    assert figures["log_loss"] == pytest.approx(-(math.log(0.8) + math.log(0.1) + math.log(SMALLEST)) / 3)
    assert figures["calibration_error"] == pytest.approx((abs(1.6 - 1) + 1) / 3)


def test_class_calibration_of_sampled_classes_is_their_entropy() -> None:
    generator = np.random.default_rng(0)
    truth = np.array([0.5, 0.3, 0.2])
    figures = class_calibration(generator.choice(3, 20_000, p=truth), np.tile(truth, (20_000, 1)))
    assert figures["log_loss"] == pytest.approx(-(truth * np.log(truth)).sum(), abs=0.02)
    assert figures["calibration_error"] < 0.02


def test_attribute_calibration_counts_absent_attributes_too() -> None:
    figures = attribute_calibration(np.array([[1.0, 0.0]]), np.array([[0.6, 0.1]]))
    assert figures["log_loss"] == pytest.approx(-(math.log(0.6) + math.log(0.9)) / 2)
    assert figures["calibration_error"] == pytest.approx((0.4 + 0.1) / 2)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, (0.5, 0.9)), (0.5, (0.264, 0.589)), (3.0, (0.957, 1.0))])
def test_coverage_of_a_student_with_the_right_mean(scale: float, expected: tuple[float, float]) -> None:
    """Nominal if the variances agree; lower for an overconfident student, higher for a broad one."""
    teacher = Gaussian(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.full((4, 3), math.log(0.25)))
    student = Gaussian(teacher.mean, teacher.log_var + 2 * math.log(scale))
    assert coverage(student, teacher).mean(1).tolist() == pytest.approx(expected, abs=1e-3)


def test_coverage_equals_the_share_of_samples_in_the_interval() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = (Gaussian(*torch.randn(2, 5, 2, generator=generator)) for _ in range(2))
    samples = teacher.mean + (0.5 * teacher.log_var).exp() * torch.randn(40_000, 5, 2, generator=generator)
    inside = (samples - student.mean).abs() < 1.6449 * (0.5 * student.log_var).exp()
    torch.testing.assert_close(coverage(student, teacher)[1], inside.float().mean((0, 2)), atol=0.01, rtol=0)


def test_coverage_of_an_exact_teacher_is_nominal_if_students_state_the_true_spread() -> None:
    """Teachers with small variances, spread around the student as the student says."""
    generator = torch.Generator().manual_seed(2)
    student = Gaussian(torch.zeros(20_000, 1), torch.zeros(20_000, 1))
    teacher = Gaussian(torch.randn(20_000, 1, generator=generator), torch.full((20_000, 1), -12.0))
    assert coverage(student, teacher).mean(1).tolist() == pytest.approx([0.5, 0.9], abs=0.01)
