"""POST /v1/embeddings: what OpenAI's clients send and expect, over the same calls as POST /embed."""

import reprlib
import time
from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from model.modality import TextModality
from service import answers, body
from service.bundles import Bundles
from service.calls import Call, Charge, Item, Reader, Wanted, options_of
from service.engine import Work
from service.errors import Fault, Problem
from service.routes import answer, deadline, run
from service.schemas import EmbeddingsAnswer, EmbeddingsOptions, EmbedOptions
from service.serving import Serving

router = APIRouter()


@router.post("/v1/embeddings", response_model=EmbeddingsAnswer, summary="Embed, as OpenAI's clients ask for it")
async def embeddings(request: Request) -> Response:
    """A string goes to the bundle's text modality; an object names the modalities that it has, as an input of /embed does.
    The mean of the aligned posterior comes back."""
    bundles: Bundles = request.app.state.bundles
    async with deadline(request, bundles.settings):
        bundles.admit()
        content = await body.read_json(request)

        def chosen(wanted: Wanted, quickly: bool) -> tuple[Serving, Call[EmbedOptions]]:
            asked, inputs = parse(content, bundles.most_values)
            serving = bundles.choose(asked.model)
            serving.admit()
            latent, charge = serving.manifest.latent, request.state.charge
            return serving, read(serving.reader, latent, asked, inputs, charge, wanted, quickly=quickly)

        (serving, call), decode_seconds = await bundles.decoding.decode(chosen, len(content))
        works = [Work(item.row, 0, item.index) for item in call.items if isinstance(item, Item)]
        manifest, results = await run(request, bundles, serving, call, works)
        started = time.perf_counter()
        told = answers.embeddings(manifest, call.options.encoding_format, results)
        bundles.metrics.stage("serialize", time.perf_counter() - started)
    return answer(request, told, results, decode_seconds)


def parse(content: bytes, most_values: int) -> tuple[EmbeddingsOptions, object]:
    """The options, and what stands as ``input``.

    Raises:
        Problem: no JSON object, or the options are wrong.
    """
    fields = body.parse_object(content, "the body", most_values)
    inputs = fields.pop("input", None)
    return options_of(EmbeddingsOptions, fields), inputs


def read(
    reader: Reader,
    latent: int,
    asked: EmbeddingsOptions,
    inputs: object,
    charge: Charge = lambda _: None,
    wanted: Wanted = lambda: True,
    *,
    quickly: bool = False,
) -> Call[EmbedOptions]:
    """The call that a body in OpenAI's form stands for.

    Raises:
        Problem: as ``Reader.read``; or ``dimensions`` is not ``latent``, a string has no modality to go to, or ``input`` holds
            token ids.
    """
    values = reader.listed([inputs] if isinstance(inputs, str) else inputs, "/input")
    if asked.dimensions not in (None, latent):
        detail = f"received {asked.dimensions}; this model's embeddings have {latent} dimensions and are not cut short"
        raise Problem.of([Fault("/dimensions", "out_of_range", detail)])
    texts = [modality.name for modality in reader.modalities if isinstance(modality, TextModality)]
    faults = [fault for index, value in enumerate(values) if (fault := _fault(f"/input/{index}", value, texts))]
    if faults:
        raise Problem.of(faults)
    rows = [{texts[0]: value} if isinstance(value, str) else value for value in values]
    items = reader.items(rows, "/input", charge, wanted, quickly=quickly)
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
