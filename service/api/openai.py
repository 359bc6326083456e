"""POST /v1/embeddings: requests and responses in the shape of OpenAI's clients, with the same results as POST /embed."""

import reprlib
from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter, Request, Response

from concord.model.modality import is_text
from concord.service.api import body, responses
from concord.service.api.requests import RawRequest, RequestParser, parse_options, parse_with
from concord.service.api.routes import deadline, respond, run, serializing
from concord.service.api.schemas import EmbeddingsAnswer, EmbeddingsOptions, EmbedOptions
from concord.service.errors import Fault, Problem
from concord.service.inference.jobs import InferenceJob

COMMAS_PER_TEXT = 128

router = APIRouter()


@router.post("/v1/embeddings", response_model=EmbeddingsAnswer, summary="Embed, as OpenAI's clients ask for it")
async def embeddings(request: Request) -> Response:
    """A string goes to the bundle's text modality; an object names the modalities that it has, as an input of /embed does.
    The mean of the aligned posterior comes back."""
    async with deadline(request):
        content = await body.read_json(request)
        max_texts = request.app.state.settings.max_texts
        parsed = await parse_with(request, len(content), lambda max_values: load(content, max_values, max_texts))
        jobs = [InferenceJob(item.row, 0, item.index) for item in parsed.accepted]
        model, results = await run(request, parsed, jobs)
        with serializing(request):
            write = partial(responses.embeddings, model.manifest, parsed.options.encoding_format, results)
            many = len(results) > request.app.state.settings.max_items
            response = await request.app.state.parse_pool.in_thread(write) if many else write()
    return respond(request, response, results, parsed.parse_seconds)


def load(content: bytes, max_values: int, max_texts: int) -> RawRequest[EmbedOptions]:
    """The request that a body in OpenAI's form stands for.

    Args:
        max_values: see ``parse_object``.
        max_texts: most items, if all of them are strings.

    Raises:
        Problem: not a JSON object, or invalid options. Raised by ``items``: ``dimensions`` is not the model's latent size, a
            string has no modality to go to, or ``input`` holds token ids.
    """
    fields = body.parse_object(content, "the body", max_values + COMMAS_PER_TEXT * max_texts)
    inputs = fields.pop("input", None)
    options = parse_options(EmbeddingsOptions, fields)

    def items(parser: RequestParser) -> Sequence[object]:
        only_texts = isinstance(inputs, list) and all(isinstance(value, str) for value in inputs)
        most = max(max_texts, parser.max_items) if only_texts else parser.max_items
        values = parser.check_length([inputs] if isinstance(inputs, str | dict) else inputs, "/input", most)
        if options.dimensions not in (None, parser.latent):
            detail = (
                f"received {options.dimensions}; this model's embeddings have {parser.latent} dimensions and are not cut short"
            )
            raise Problem.from_faults([Fault("/dimensions", "out_of_range", detail)])
        texts = [modality.name for modality in parser.modalities if is_text(modality)]
        faults = [fault for index, value in enumerate(values) if (fault := _fault(f"/input/{index}", value, texts))]
        if faults:
            raise Problem.from_faults(faults)
        return [{texts[0]: value} if isinstance(value, str) else value for value in values]

    return RawRequest(EmbedOptions(model=options.model, encoding_format=options.encoding_format), "/input", items)


def _fault(pointer: str, value: object, texts: Sequence[str]) -> Fault | None:
    if isinstance(value, dict):
        return None
    if not isinstance(value, str):
        reason = "token ids are not accepted" if isinstance(value, int | list) else f"received {reprlib.repr(value)}"
        return Fault(pointer, "invalid_value", f"{reason}: send a string, or an object with a value for each modality")
    if len(texts) == 1:
        return None
    reason = f"this model has several text modalities: {', '.join(texts)}" if texts else "this model has no text modality"
    return Fault(pointer, "invalid_value", f"{reason}. Send an object with a value for each modality instead of a string")
