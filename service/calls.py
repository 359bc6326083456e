"""A call: the body of a request turned into options and rows. Runs in a worker thread; whatever is wrong is found here."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from model import codec
from model.modality import ImageModality, Modality, TextModality
from service.body import OPTIONS_PART, Form, parse_object
from service.errors import Fault, Problem
from service.schemas import CallOptions

MAX_ID_CHARACTERS = 128
QUICK_ITEMS = 4
QUICK_PIXELS = 128 * 128
"""Of a picture that is decoded in a tenth of a millisecond, however it was made."""
_SHOWN_FAULTS = 8
_MOST_FIELDS = 64
_SPARE_VALUES = 10_000

Charge = Callable[[int], None]
"""Told the number of items before they are decoded; raises Problem where the caller may not have so many."""
Wanted = Callable[[], bool]
"""Whether anybody still waits for the answer."""

O = TypeVar("O", bound=CallOptions)  # noqa: E741
M = TypeVar("M", bound=BaseModel)


class SlowError(Exception):
    """There is more to decode than the event loop may wait for."""


@dataclass(frozen=True)
class Item:
    """One sample, decoded. ``row`` holds the modalities that are present, in the bundle's order."""

    index: int
    id: str | None
    row: dict[str, NDArray[Any]]
    images: int
    text_characters: int


@dataclass(frozen=True)
class Rejected:
    """One sample that gets no result."""

    index: int
    id: str | None
    problem: Problem


@dataclass(frozen=True)
class Call(Generic[O]):
    """``items`` stand in the order of the request."""

    options: O
    items: list[Item | Rejected]


@dataclass(frozen=True)
class Asked(Generic[O]):
    """What a body asks for. ``inputs`` are what stands in its place, not looked at yet, or a form's one sample. ``most_steps``
    is the largest number of refinement steps that the query or the body names."""

    options: O
    inputs: object
    most_steps: int


def parse(body: bytes | Form, query: Sequence[tuple[str, str]], options: type[O], most_values: int) -> Asked[O]:
    """What needs no bundle, so that the options can name one.

    Args:
        query: the query's parameters; each may name an option (``refine.steps=4``), which the body overrules.
        most_values: as ``parse_object`` has it.

    Raises:
        Problem: no JSON object, or the options are wrong.
    """
    if isinstance(body, Form):
        fields = parse_object(body.options or b"{}", f"part {OPTIONS_PART!r}", _SPARE_VALUES)
        if "inputs" in fields:
            raise Problem.of([Fault("/inputs", "invalid_value", "a form's parts are its one input: leave inputs out")])
        inputs: object = body
    else:
        fields = parse_object(body, "the body", most_values)
        inputs = fields.pop("inputs", None)
    merged, most_steps = _options(options, query, fields)
    return Asked(merged, inputs, most_steps)


@dataclass(frozen=True)
class Reader:
    """Reads calls for one bundle."""

    modalities: tuple[Modality, ...]
    limits: codec.Limits
    max_items: int
    max_refine_steps: int

    @property
    def most_values(self) -> int:
        """A body with more commas than this cannot be right: numbers, attributes and the characters of texts and ids."""
        of_item = _MOST_FIELDS + MAX_ID_CHARACTERS
        for modality in self.modalities:
            if isinstance(modality, TextModality):
                of_item += self.limits.text_characters
            elif not isinstance(modality, ImageModality):
                of_item += modality.shape[0]
        return _SPARE_VALUES + self.max_items * of_item

    def read(
        self, asked: Asked[O], charge: Charge = lambda _: None, wanted: Wanted = lambda: True, *, quickly: bool = False
    ) -> Call[O]:
        """Validate, decode.

        Args:
            quickly: or not at all; then nothing is charged.

        Raises:
            Problem: ``inputs`` is no list of allowed length, an option is too much, or nobody waits. What is wrong with an item
                is in its place in ``Call.items``.
            SlowError: it cannot be done quickly.
        """
        inputs = asked.inputs
        listed = self.listed([self._from_form(inputs.sample)] if isinstance(inputs, Form) else inputs, "/inputs")
        if asked.most_steps > self.max_refine_steps:
            detail = f"{asked.most_steps} steps; at most {self.max_refine_steps} are allowed"
            raise Problem.of([Fault("/refine/steps", "out_of_range", detail)])
        return Call(asked.options, self.items(listed, "/inputs", charge, wanted, quickly=quickly))

    def listed(self, values: object, here: str) -> list[object]:
        """``values``, if they are a list of allowed length.

        Raises:
            Problem: they are not; ``here`` is their place in the body, a JSON pointer.
        """
        if isinstance(values, list) and 1 <= len(values) <= self.max_items:
            return values
        received = f"{len(values)} of them" if isinstance(values, list) else reprlib.repr(values)
        detail = f"a list of 1 to {self.max_items} items is expected, received {received}"
        raise Problem.of([Fault(here, "invalid_value", detail)])

    def items(
        self, values: Sequence[object], here: str, charge: Charge, wanted: Wanted, *, quickly: bool = False
    ) -> list[Item | Rejected]:
        """Each decoded, or rejected with what is wrong with it.

        Raises:
            Problem: nobody waits any more. A request may hold pictures for ten seconds' work.
            SlowError: it cannot be done quickly; nothing was charged.
        """
        if quickly:
            items = self._quickly(values, here)
            charge(len(values))
            return items
        charge(len(values))
        items = []
        for index, value in enumerate(values):
            if not wanted():
                raise Problem("client_gone", "nobody waits for the answer")
            items.append(self._item(index, value, f"{here}/{index}", self.limits))
        return items

    def _quickly(self, values: Sequence[object], here: str) -> list[Item | Rejected]:
        if len(values) > QUICK_ITEMS:
            raise SlowError
        limits = replace(self.limits, image_pixels=min(QUICK_PIXELS, self.limits.image_pixels))
        items = [self._item(index, value, f"{here}/{index}", limits) for index, value in enumerate(values)]
        for item in items:
            if isinstance(item, Rejected) and any(fault.code == "too_large" for fault in item.problem.faults):
                raise SlowError
        return items

    def _from_form(self, sample: Mapping[str, str | bytes]) -> dict[str, str | bytes]:
        """A part that is no file holds what JSON would hold: base64 for a picture, else what the file would hold."""
        written = {"id"} | {m.name for m in self.modalities if isinstance(m, ImageModality) and m.in_files}
        return {
            name: value.encode() if isinstance(value, str) and name not in written else value for name, value in sample.items()
        }

    def _item(self, index: int, value: object, here: str, limits: codec.Limits) -> Item | Rejected:
        if not isinstance(value, dict):
            detail = f"an item is an object with a value for each modality, received {reprlib.repr(value)}"
            return Rejected(index, None, Problem.of([Fault(here, "invalid_value", detail)]))
        name = value.get("id")
        faults = []
        if name is not None and not (isinstance(name, str) and len(name) <= MAX_ID_CHARACTERS):
            faults.append(Fault(f"{here}/id", "invalid_value", f"an id is a string of at most {MAX_ID_CHARACTERS} characters"))
            name = None
        known = {m.name: m for m in self.modalities}
        unknown = [key for key in value if key not in known and key != "id"]
        faults += [
            Fault(f"{here}/{_token(key)}", "unknown_modality", f"no modality of this name: there are {', '.join(known)}")
            for key in unknown[:_SHOWN_FAULTS]
        ]
        given = [(m, value[m.name]) for m in self.modalities if value.get(m.name) is not None]
        if not given and not faults:
            faults.append(Fault(here, "empty_subset", f"no modality is given: send at least one of {', '.join(known)}"))
        row, images, characters = {}, 0, 0
        for modality, content in given:
            try:
                row[modality.name] = _decode(modality, content, limits)
            except codec.CodecError as error:
                faults.append(Fault(f"{here}/{modality.name}{error.pointer}", error.code, error.detail))
                continue
            images += isinstance(modality, ImageModality)
            if isinstance(modality, TextModality):
                characters += len(content.decode() if isinstance(content, bytes) else content)
        return Rejected(index, name, Problem.of(faults)) if faults else Item(index, name, row, images, characters)


def _decode(modality: Modality, content: object, limits: codec.Limits) -> NDArray[Any]:
    if isinstance(content, bytes):
        return np.asarray(codec.decode_bytes(modality, content, limits))
    return np.asarray(codec.decode(modality, content, limits))


def _options(model: type[O], query: Sequence[tuple[str, str]], fields: dict[str, Any]) -> tuple[O, int]:
    """The options, and the most refinement steps named: what the body overrules must be right too."""
    most_steps = 0
    if query:
        told = options_of(model, _nested(query, model), strict=False)
        most_steps = told.refine.steps
        asked = told.model_dump(exclude_unset=True)
        for name, value in fields.items():
            both = isinstance(value, dict) and isinstance(asked.get(name), dict)
            asked[name] = {**asked[name], **value} if both else value
        fields = asked
    merged = options_of(model, fields)
    return merged, max(most_steps, merged.refine.steps)


def options_of(model: type[M], fields: Mapping[str, Any], strict: bool = True) -> M:
    """The options that a body names.

    Args:
        strict: False takes strings for numbers: everything in a query is a string.

    Raises:
        Problem: 422, they are not the model's.
    """
    if len(fields) > _MOST_FIELDS:
        raise Problem("invalid_value", f"{len(fields)} options are named: there are {', '.join(model.model_fields)}")
    try:
        return model.model_validate(fields, strict=strict)
    except ValidationError as error:
        faults = [
            Fault(
                "".join(f"/{_token(str(part))}" for part in fault["loc"]),
                "invalid_value",
                f"no option of this name{'' if fault['loc'][1:] else ': there are ' + ', '.join(model.model_fields)}"
                if fault["type"] == "extra_forbidden"
                else f"{fault['msg']}; received {reprlib.repr(fault['input'])}",
            )
            for fault in error.errors(include_url=False, include_context=False)[:_SHOWN_FAULTS]
        ]
        raise Problem.of(faults) from error


def _nested(query: Sequence[tuple[str, str]], model: type[CallOptions]) -> dict[str, Any]:
    """``refine.steps=4`` as {"refine": {"steps": "4"}}; an option that is a list may be repeated."""
    nested: dict[str, Any] = {}
    for key, value in query:
        name, dot, rest = key.partition(".")
        if name == "targets" and "targets" in model.model_fields:
            nested.setdefault(name, []).append(value)
        elif dot and isinstance(nested.setdefault(name, {}), dict):
            nested[name][rest] = value
        else:
            nested[name] = value
    return nested


def _token(key: str) -> str:
    """A key within a JSON pointer (RFC 6901), cut short: a caller may send a key of megabytes."""
    return key[:64].replace("~", "~0").replace("/", "~1")
