"""POST /v1/embeddings: what OpenAI's clients send and expect, over the same calls as POST /embed."""

import reprlib
import time
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from model.modality import TextModality
from service import answers, body
from service.calls import Call, Charge, Item, Reader, options_of
from service.engine import Work
from service.errors import Fault, Problem
from service.routes import answer, deadline, decode, run
from service.schemas import EmbeddingsAnswer, EmbeddingsOptions, EmbedOptions
from service.serving import Serving

router = APIRouter()


@router.post("/v1/embeddings", response_model=EmbeddingsAnswer, summary="Embed, as OpenAI's clients ask for it")
async def embeddings(request: Request) -> Response:
    """A string goes to the bundle's text modality; an object names the modalities that it has, as an input of /embed does.
    The mean of the aligned posterior comes back."""
    serving: Serving = request.app.state.serving
    async with deadline(request, serving):
        serving.require_ready()
        content = await body.read_json(request)
        call, decode_seconds = await decode(
            serving, lambda: read(serving.reader, serving.manifest.latent, content, request.state.charge)
        )
        works = [Work(item.row, 0, item.index) for item in call.items if isinstance(item, Item)]
        results = await run(request, serving, call, works)
        started = time.perf_counter()
        told = answers.embeddings(serving.manifest, call.options.encoding_format, results)
        serving.metrics.stage("serialize", time.perf_counter() - started)
    return answer(request, told, results, decode_seconds)


def read(reader: Reader, latent: int, content: bytes, charge: Charge) -> Call[EmbedOptions]:
    """The call that a body in OpenAI's form stands for.

    Raises:
        Problem: as ``Reader.read``; or ``dimensions`` is not ``latent``, a string has no modality to go to, or ``input`` holds
            token ids.
    """
    fields = body.parse_object(content, "the body", reader.most_values)
    values = fields.pop("input", None)
    values = reader.listed([values] if isinstance(values, str) else values, "/input")
    asked = options_of(EmbeddingsOptions, fields)
    if asked.dimensions not in (None, latent):
        detail = f"received {asked.dimensions}; this model's embeddings have {latent} dimensions and are not cut short"
        raise Problem.of([Fault("/dimensions", "out_of_range", detail)])
    texts = [modality.name for modality in reader.modalities if isinstance(modality, TextModality)]
    faults = [fault for index, value in enumerate(values) if (fault := _fault(f"/input/{index}", value, texts))]
    if faults:
        raise Problem.of(faults)
    charge(len(values))
    items = reader.items([{texts[0]: value} if isinstance(value, str) else value for value in values], "/input")
    return Call(EmbedOptions(model=asked.model, encoding_format=asked.encoding_format), items)


def _fault(here: str, value: object, texts: Sequence[str]) -> Fault | None:
    if isinstance(value, dict):
        return None
    if not isinstance(value, str):
        told = "token ids are not taken" if isinstance(value, int | list) else f"received {reprlib.repr(value)}"
        return Fault(here, "invalid_value", f"{told}: send a string, or an object with a value for each modality")
    if len(texts) == 1:
        return None
    why = f"this model has several modalities of text: {', '.join(texts)}" if texts else "this model has no modality of text"
    return Fault(here, "invalid_value", f"{why}. Send an object with a value for each modality instead of a string")
