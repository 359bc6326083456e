import math
from typing import Any

import pytest
from pydantic import ValidationError

from concord.service.api.schemas import EmbedOptions, GenerateOptions


def test_options_have_defaults() -> None:
    options = EmbedOptions.model_validate({})
    assert (options.representation, options.encoding_format, options.normalize, options.seed) == ("mean", "float", False, 0)
    assert (options.refine.steps, options.refine.trace, options.on_error) == (0, False, "fail")
    generate = GenerateOptions.model_validate({})
    assert (generate.targets, generate.num_samples, generate.latent, generate.temperature) == (None, 1, "sample", 1.0)
    assert (generate.text.temperature, generate.text.top_p) == (0.0, 1.0)
    assert (generate.output.image, generate.output.text, generate.return_embedding) == ("png", "string", False)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": True},
        {"seed": 1.5},
        {"seed": 1e300},
        {"num_samples": "1"},
        {"seed": 2**63},
        {"normalize": 1},
        {"refine": {"steps": -1}},
        {"refine": {"steps": "10"}},
        {"refine": {"tolerance": -0.1}},
        {"refine": {"tolerance": math.inf}},
        {"refine": {"budget_ms": math.nan}},
        {"refine": {"lr": 0.1}},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"targets": "photo"},
        {"targets": ["x"] * 65},
        {"output": {"text": "tokens"}},
        {"text": {"temperature": -0.1}},
        {"text": {"temperature": 11}},
        {"text": {"top_p": 0}},
        {"text": {"top_p": 1.01}},
        {"text": 0.5},
        {"model": "m" * 129},
    ],
)
def test_option_of_wrong_type_or_range_is_invalid(options: dict[str, Any]) -> None:
    model = EmbedOptions if set(options) <= set(EmbedOptions.model_fields) else GenerateOptions
    with pytest.raises(ValidationError):
        model.model_validate(options)


def test_float_without_a_fraction_is_read_as_an_integer() -> None:
    options = EmbedOptions.model_validate({"seed": 3.0, "refine": {"steps": 2.0}})
    assert (type(options.seed), options.seed, options.refine.steps) == (int, 3, 2)


def test_option_ranges_include_their_ends() -> None:
    EmbedOptions.model_validate({"seed": 2**63 - 1, "refine": {"steps": 0, "tolerance": 0, "budget_ms": 0.001}})
    GenerateOptions.model_validate({"temperature": 0, "num_samples": 1})
    GenerateOptions.model_validate({"temperature": 10})
