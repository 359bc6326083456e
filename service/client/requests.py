"""What the client sends: the items and options of a call as a JSON body."""

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypedDict

from concord.client.values import escape, plain, to_json


class Item(Protocol):
    """A value for each modality that is present, and optionally an ``id``: a dict, or a row of a pandas DataFrame."""

    def items(self) -> Iterable[tuple[Any, Any]]: ...


class Refine(TypedDict, total=False):
    """As in the service's API."""

    steps: int
    tolerance: float
    budget_ms: float
    trace: bool


class TextSampling(TypedDict, total=False):
    """As in the service's API."""

    temperature: float
    top_p: float


class CallOptions(TypedDict, total=False):
    """As in the service's API; and ``timeout`` in seconds, which replaces the client's."""

    model: str
    seed: int
    refine: Refine
    on_error: Literal["fail", "partial"]
    timeout: float


class EmbedOptions(CallOptions, total=False):
    representation: Literal["mean", "sample", "mean_log_var"]
    normalize: bool


class GenerateOptions(CallOptions, total=False):
    targets: Sequence[str]
    num_samples: int
    latent: Literal["sample", "mean"]
    temperature: float
    text: TextSampling
    image: Literal["png", "webp", "raw"]
    audio: Literal["wav", "raw"]
    spectrogram: bool
    return_embedding: bool
    nearest: int


def body(inputs: Item | Iterable[Item], options: Mapping[str, Any]) -> bytes:
    """The JSON body of a call.

    Args:
        inputs: an item, several items, or a pandas DataFrame, whose rows are the items.

    Raises:
        OSError: a path cannot be read.
        ValueError: an array that is neither a picture nor a vector, or a number that is not finite.
        TypeError: a value of another type. All three name the place in the body, as the service's errors do.
    """
    fields = {name: plain(value, f"/{name}") for name, value in options.items()}
    items = [_item(item, f"/inputs/{index}") for index, item in enumerate(_items(inputs))]
    return json.dumps({"inputs": items, **fields}, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _items(inputs: Any) -> Iterable[Any]:
    if hasattr(inputs, "iterrows"):  # a DataFrame; iterrows would convert all of a row's numbers to one type
        rows: list[Any] = inputs.to_dict("records")
        return rows
    if hasattr(inputs, "items"):
        return [inputs]
    if isinstance(inputs, str | bytes) or not isinstance(inputs, Iterable):
        raise TypeError(f"/inputs: received {_described(inputs)}; inputs are an item, several items or a DataFrame of items")
    return inputs


def _item(item: Any, place: str) -> dict[str, Any]:
    if not hasattr(item, "items"):
        raise TypeError(
            f"{place}: received {_described(item)}; an item is a dict or a row of a DataFrame (of iterrows), with a value for "
            "each modality that is present"
        )
    fields = {}
    for name, value in item.items():
        if not isinstance(name, str):
            raise TypeError(f"{place}: received {_described(name)} as the name of a modality; names are strings")
        fields[name] = to_json(value, f"{place}/{escape(name)}")
    return fields


def _described(value: object) -> str:
    return f"{reprlib.repr(value)} of type {type(value).__name__}"
