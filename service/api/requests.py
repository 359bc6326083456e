"""Request bodies turned into options and rows. Every error in a request is found here, before anything is queued."""

import contextlib
import reprlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from concord.model import codec
from concord.model.encoder import ImagePreprocessing
from concord.model.modality import AudioModality, EncodedModality, Modality, is_picture, is_text
from concord.service.api.body import OPTIONS_PART, Form, parse_object, read
from concord.service.api.parse_pool import ParsePool, StillWanted
from concord.service.api.schemas import CallOptions
from concord.service.errors import Fault, Problem
from concord.service.inference.registry import ModelRegistry, UnknownModel
from concord.service.inference.served_model import ServedModel
from concord.service.request_state import state_of
from concord.service.settings import Settings

MAX_ID_CHARACTERS = 128
INLINE_BYTES = 8 << 10
"""Bodies up to this size are parsed on the event loop if that is quick: a thread hop costs more than parsing."""
INLINE_ITEMS = 4
INLINE_PIXELS = 128 * 128
"""A picture of this size is parsed in a tenth of a millisecond, in any of its formats."""
_SHOWN_FAULTS = 8
_MAX_OPTIONS = 64
_SPARE_VALUES = 10_000
MAX_WHOLE = 2**53
"""Above it a JSON number may have lost digits on its way."""

Charge = Callable[[int], None]
"""Called with the number of items before they are parsed; raises Problem if the caller's quota does not allow so many."""


class WouldBlock(Exception):  # noqa: N818
    """Parsing takes longer than the event loop may wait."""


O = TypeVar("O", bound=CallOptions)  # noqa: E741
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class ParsedItem:
    """One item of a request. ``row`` holds the modalities that are present, in the bundle's order."""

    index: int
    id: str | None
    row: dict[str, NDArray[Any]]
    images: int
    text_characters: int


@dataclass(frozen=True)
class RejectedItem:
    """One item without a result."""

    index: int
    id: str | None
    problem: Problem


@dataclass(frozen=True)
class ParsedRequest(Generic[O]):
    """``items`` stand in the order of the request."""

    model: ServedModel
    options: O
    items: list[ParsedItem | RejectedItem]
    parse_seconds: float = 0.0
    """Waiting for a thread included."""

    @cached_property
    def accepted(self) -> list[ParsedItem]:
        return [item for item in self.items if isinstance(item, ParsedItem)]

    @cached_property
    def rejected(self) -> list[RejectedItem]:
        return [item for item in self.items if isinstance(item, RejectedItem)]


@dataclass(frozen=True)
class RawRequest(Generic[O]):
    """Options, which name the model, and items that are not parsed yet."""

    options: O
    pointer: str
    """JSON pointer to the items in the body."""
    items: Callable[["RequestParser"], Sequence[object]]
    """The items, once the model is known. Raises Problem if they do not fit it."""


async def parse(request: Request, options: type[O]) -> ParsedRequest[O]:
    """Read and parse a request to /embed or /cross-generate.

    Raises:
        Problem: no valid request. An error in one item is in its place in ``items``.
    """
    settings: Settings = request.app.state.settings
    content = await read(request, settings.max_body_bytes)
    query = request.query_params.multi_items() if request.scope["query_string"] else ()
    return await parse_with(request, len(content), lambda max_values: load(content, query, options, max_values))


async def parse_with(request: Request, size: int, load: Callable[[int], RawRequest[O]]) -> ParsedRequest[O]:
    """Parse a body on the event loop if that is quick, else in a thread; all items in one call, for a hop costs more than one.

    Args:
        size: of the body, in bytes.
        load: the raw request, given the most values that its body may hold.

    Raises:
        Problem: as ``parse``.
    """
    app = request.app.state
    registry: ModelRegistry = app.registry
    parsers: Parsers = app.parsers
    pool: ParsePool = app.parse_pool
    state = state_of(request.scope)

    def work(wanted: StillWanted, *, allow_blocking: bool = True) -> ParsedRequest[O]:
        raw = load(parsers.max_values(registry))
        model = choose(registry, raw.options.model)
        parser = parsers.of(model)
        charge = partial(state.charge, blocking=allow_blocking)
        items = parser.parse_items(raw.items(parser), raw.pointer, charge, wanted, allow_blocking=allow_blocking)
        return ParsedRequest(model, raw.options, items, time.perf_counter() - started)

    started = time.perf_counter()
    if size <= INLINE_BYTES:
        with contextlib.suppress(WouldBlock, BlockingIOError):
            return work(lambda: True, allow_blocking=False)
    return await pool.parse(work)


def choose(registry: ModelRegistry, name: str | None) -> ServedModel:
    """The model of this name.

    Raises:
        Problem: 404, there is none.
    """
    try:
        return registry.choose(name)
    except UnknownModel as error:
        raise Problem("unknown_model", str(error)) from error


def load(body: bytes | Form, query: Sequence[tuple[str, str]], options: type[O], max_values: int) -> RawRequest[O]:
    """The part of parsing that needs no model, so that the options can name one.

    Args:
        query: the query's parameters; each may name an option (``refine.steps=4``). The body takes precedence.
        max_values: see ``parse_object``.

    Raises:
        Problem: not a JSON object, or invalid options.
    """
    if isinstance(body, Form):
        fields = parse_object(body.options or b"{}", f"part {OPTIONS_PART!r}", _SPARE_VALUES)
        if "inputs" in fields:
            raise Problem.from_faults([Fault("/inputs", "invalid_value", "a form's parts are its one input: leave inputs out")])
        inputs: object = body
    else:
        fields = parse_object(body, "the body", max_values)
        inputs = fields.pop("inputs", None)
    merged, steps = _merge_options(options, query, fields)

    def items(parser: RequestParser) -> Sequence[object]:
        parser.check_steps(steps)
        if isinstance(inputs, Form):
            return [parser.from_form(inputs.item)]
        return parser.check_length([inputs] if isinstance(inputs, dict) else inputs, "/inputs")

    return RawRequest(merged, "/inputs", items)


@dataclass(frozen=True)
class RequestParser:
    """Parses the items of requests to one model."""

    modalities: tuple[Modality, ...]
    latent: int
    limits: codec.Limits
    max_items: int
    max_refine_steps: int
    preprocessors: Mapping[str, codec.Preprocessor] = field(default_factory=dict)
    """Of the modalities with a frozen encoder, by modality."""

    @cached_property
    def max_values(self) -> int:
        """A valid body has at most so many commas: those of numbers, attributes and the characters of texts and ids."""
        per_item = _MAX_OPTIONS + MAX_ID_CHARACTERS
        for modality in self.modalities:
            if is_text(modality):
                per_item += self.limits.text_characters
            if isinstance(modality, EncodedModality) or not (
                is_text(modality) or is_picture(modality) or isinstance(modality, AudioModality)
            ):
                per_item += modality.shape[0]
        return _SPARE_VALUES + self.max_items * per_item

    def check_length(self, values: object, pointer: str, most: int | None = None) -> list[object]:
        """``values``, if they are a list of allowed length.

        Args:
            most: allowed length; None: ``max_items``.

        Raises:
            Problem: they are not; ``pointer`` is their place in the body.
        """
        most = most or self.max_items
        if isinstance(values, list) and 1 <= len(values) <= most:
            return values
        received = f"{len(values)} of them" if isinstance(values, list) else reprlib.repr(values)
        detail = f"a list of 1 to {most} items is expected, received {received}"
        raise Problem.from_faults([Fault(pointer, "invalid_value", detail)])

    def check_steps(self, steps: int) -> None:
        """Raises Problem if a request may not refine by so many steps."""
        if steps > self.max_refine_steps:
            detail = f"{steps} steps; at most {self.max_refine_steps} are allowed"
            raise Problem.from_faults([Fault("/refine/steps", "out_of_range", detail)])

    def parse_items(
        self,
        values: Sequence[object],
        pointer: str,
        charge: Charge = lambda _: None,
        wanted: StillWanted = lambda: True,
        *,
        allow_blocking: bool = True,
    ) -> list[ParsedItem | RejectedItem]:
        """Each item parsed, or rejected with its errors.

        Args:
            pointer: of the list in the body.
            allow_blocking: False parses only what is quick.

        Raises:
            Problem: the quota is spent, or the client is gone: a request may hold pictures for ten seconds' work.
            WouldBlock: it takes longer than the event loop may wait; nothing was charged.
        """
        if not allow_blocking:
            items = self._parse_inline(values, pointer)
            charge(len(values))
            return items
        charge(len(values))
        items = []
        for index, value in enumerate(values):
            if not wanted():
                raise Problem("client_gone", "the client closed the connection")
            items.append(self._parse_item(index, value, f"{pointer}/{index}", self.limits))
        return items

    def from_form(self, item: Mapping[str, str | bytes]) -> dict[str, str | bytes]:
        """The item of a form. A part that is not a file holds what JSON would hold: base64 for a picture or a sound, else the
        content of the file."""
        as_text = {"id"} | {m.name for m in self.modalities if codec.media_types(m)}
        return {
            name: value.encode() if isinstance(value, str) and name not in as_text else value for name, value in item.items()
        }

    @cached_property
    def _slow(self) -> frozenset[str]:
        """Modalities whose smallest values take milliseconds: sounds, and pictures that are enlarged for a frozen encoder."""
        frames = {name: found.description.preprocessing for name, found in self.preprocessors.items()}
        enlarged = {
            name
            for name, frame in frames.items()
            if isinstance(frame, ImagePreprocessing) and frame.height * frame.width > INLINE_PIXELS
        }
        return frozenset(enlarged | {m.name for m in self.modalities if isinstance(m, AudioModality)})

    @cached_property
    def _inline_limits(self) -> codec.Limits:
        return replace(self.limits, image_pixels=min(INLINE_PIXELS, self.limits.image_pixels))

    def _parse_inline(self, values: Sequence[object], pointer: str) -> list[ParsedItem | RejectedItem]:
        if len(values) > INLINE_ITEMS or any(isinstance(value, dict) and self._slow & value.keys() for value in values):
            raise WouldBlock
        limits = self._inline_limits
        items = [self._parse_item(index, value, f"{pointer}/{index}", limits) for index, value in enumerate(values)]
        for item in items:
            if isinstance(item, RejectedItem) and any(fault.code == "too_large" for fault in item.problem.faults):
                raise WouldBlock
        return items

    def _parse_item(self, index: int, value: object, pointer: str, limits: codec.Limits) -> ParsedItem | RejectedItem:
        if not isinstance(value, dict):
            detail = f"an item is an object with a value for each modality, received {reprlib.repr(value)}"
            return RejectedItem(index, None, Problem.from_faults([Fault(pointer, "invalid_value", detail)]))
        name = value.get("id")
        faults = []
        if isinstance(name, int | float) and not isinstance(name, bool) and abs(name) <= MAX_WHOLE and name == int(name):
            name = str(int(name))
        if name is not None and not (isinstance(name, str) and len(name) <= MAX_ID_CHARACTERS):
            detail = f"an id is a string of at most {MAX_ID_CHARACTERS} characters, or a whole number"
            faults.append(Fault(f"{pointer}/id", "invalid_value", detail))
            name = None
        known = {m.name: m for m in self.modalities}
        unknown = [key for key in value if key not in known and key != "id"]
        faults += [
            Fault(f"{pointer}/{_token(key)}", "unknown_modality", f"no modality of this name: there are {', '.join(known)}")
            for key in unknown[:_SHOWN_FAULTS]
        ]
        given = [(m, value[m.name]) for m in self.modalities if value.get(m.name) is not None]
        if not given and not faults:
            faults.append(Fault(pointer, "empty_subset", f"no modality is given: send at least one of {', '.join(known)}"))
        row, images, characters = {}, 0, 0
        for modality, content in given:
            try:
                row[modality.name] = _parse_value(modality, content, limits, self.preprocessors.get(modality.name))
            except codec.CodecError as error:
                faults.append(Fault(f"{pointer}/{modality.name}{error.pointer}", error.code, error.detail))
                continue
            has_features = isinstance(modality, EncodedModality) and not codec.is_input(row[modality.name])
            images += is_picture(modality) and not has_features
            if is_text(modality) and not has_features:
                characters += _characters(content)
        if faults:
            return RejectedItem(index, name, Problem.from_faults(faults))
        return ParsedItem(index, name, row, images, characters)


class Parsers:
    """The parser of each served model, made once."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._parsers: WeakKeyDictionary[ServedModel, RequestParser] = WeakKeyDictionary()

    def of(self, model: ServedModel) -> RequestParser:
        """The parser of one model."""
        parser = self._parsers.get(model)
        if parser is None:
            settings = self._settings
            limits = codec.Limits(image_pixels=settings.max_pixels, audio_seconds=float(settings.max_audio_seconds))
            runtime = model.runtime
            most = (settings.max_items, settings.max_refine_steps)
            parser = RequestParser(runtime.modalities, runtime.latent, limits, *most, runtime.preprocessors)
            self._parsers[model] = parser
        return parser

    def max_values(self, registry: ModelRegistry) -> int:
        """A body with more commas than this is valid for no model."""
        return max(self.of(model).max_values for model in registry.models)


def parse_options(model: type[M], fields: Mapping[str, Any], strict: bool = True) -> M:
    """The options in a body.

    Args:
        strict: False accepts strings for numbers: everything in a query is a string.

    Raises:
        Problem: 422, an option is unknown or its value is not allowed.
    """
    if not fields:
        if model not in _DEFAULTS:
            _DEFAULTS[model] = model()
        return cast(M, _DEFAULTS[model])
    if len(fields) > _MAX_OPTIONS:
        raise Problem("invalid_value", f"{len(fields)} options are given: there are {', '.join(model.model_fields)}")
    try:
        return model.model_validate(_without_nulls(fields), strict=strict)
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
        raise Problem.from_faults(faults) from error


_DEFAULTS: dict[type[BaseModel], Any] = {}
"""Options are frozen, so all requests without any share them."""


def _without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
    """null is the same as left out: clients and proxies send it for options that they do not set."""
    return {
        name: _without_nulls(value) if isinstance(value, dict) else value for name, value in fields.items() if value is not None
    }


def _parse_value(
    modality: Modality, content: object, limits: codec.Limits, preprocessor: codec.Preprocessor | None
) -> NDArray[Any]:
    if isinstance(content, bytes):
        return np.asarray(codec.parse_bytes(modality, content, limits, preprocessor))
    return np.asarray(codec.parse(modality, content, limits, preprocessor))


def _characters(text: object) -> int:
    """Characters of a text that was parsed, or of a list of texts in total."""
    texts = text if isinstance(text, list) else [text.decode() if isinstance(text, bytes) else text]
    return sum(map(len, texts))


def _merge_options(model: type[O], query: Sequence[tuple[str, str]], fields: dict[str, Any]) -> tuple[O, int]:
    """The options of query and body, and the most refinement steps in either: what the body overrides must be valid too."""
    steps = 0
    if query:
        from_query = parse_options(model, _nested(query, model), strict=False)
        steps = from_query.refine.steps
        merged = from_query.model_dump(exclude_unset=True)
        for name, value in fields.items():
            both = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = {**merged[name], **value} if both else value
        fields = merged
    options = parse_options(model, fields)
    return options, max(steps, options.refine.steps)


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
    """A key within a JSON pointer (RFC 6901), cut short: a client may send a key of megabytes."""
    return key[:64].replace("~", "~0").replace("/", "~1")
