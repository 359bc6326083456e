"""Where a frozen encoder comes from: a folder, an ONNX file, an installed package, or the Hugging Face hub.

It becomes three files in the cache: ``graph.onnx``, ``tokenizer.json`` of an encoder of texts, and
``encoder.json``, its description. The entry is checked when it is made, and reused as long as the source is the same.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from pydantic import ValidationError

from concord.model.bundle import BundleError, check_graph
from concord.model.bundle.manifest import MAX_FILE_BYTES
from concord.model.encoder import EncoderDescription, EncoderFiles
from concord.model.modality import propose_name
from concord.training.encoders.hugging_face import convert_folder, describe_folder, download, is_dual
from concord.training.encoders.lock import locked
from concord.training.encoders.packages import PACKAGES
from concord.training.errors import ConfigError

GRAPH, TOKENIZER, DESCRIPTION = "graph.onnx", "tokenizer.json", "encoder.json"
_FORMAT = 1
_log = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FORMS = (
    "An encoder is the path of an ONNX file or of a folder (an ONNX file with encoder.json, or a Hugging Face model with "
    "safetensors), owner/name of the Hugging Face hub, or one of "
)


@dataclass(frozen=True)
class _Source:
    """An encoder that is not in the cache yet.

    Attributes:
        name: in a bundle.
        identity: changes whenever the files that ``write`` would write may change.
        write: writes graph and tokenizer into a folder and returns the description.
    """

    name: str
    identity: str
    write: Callable[[Path], EncoderDescription]


def find_encoder(spec: str, kind: str, cache: Path) -> EncoderFiles:
    """Return the files of an encoder.

    Args:
        spec: ``encoder`` of the modality. Paths are relative to the working directory.
        kind: of the modality: image or text.
        cache: folder in which the files are kept.

    Raises:
        ConfigError: there is no such encoder, it cannot be reached, or it is not an encoder of values of this kind. The message
            says what to do.
    """
    source = _source(spec, kind)
    entry = cache / "encoders" / f"{source.name}-{hashlib.sha256(f'{_FORMAT} {source.identity}'.encode()).hexdigest()[:16]}"
    if not (entry / DESCRIPTION).exists():
        with locked(entry.with_name(f"{entry.name}.lock")):
            if not (entry / DESCRIPTION).exists():  # another process has not prepared it while this one waited
                _prepare(spec, source, kind, entry)
    return read_files(entry, source.name)


def _prepare(spec: str, source: _Source, kind: str, entry: Path) -> None:
    """Write the files of an encoder into a folder, in one step."""
    _log.info("%s: preparing the frozen encoder, once", spec)
    unfinished = Path(tempfile.mkdtemp(prefix=".partial-", dir=entry.parent))
    try:
        description = _checked(spec, source, kind, unfinished)
        (unfinished / DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        unfinished.chmod(0o755)
        unfinished.replace(entry)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_files(entry: Path, name: str) -> EncoderFiles:
    """Return the encoder in a folder that ``find_encoder`` or ``copy_files`` wrote.

    Raises:
        ConfigError: the folder is damaged.
    """
    try:
        facts = json.loads((entry / DESCRIPTION).read_text(encoding="utf-8"))
        size = facts.pop("size")
        description = EncoderDescription.model_validate(facts)
        tokenizer = entry / TOKENIZER if (entry / TOKENIZER).exists() else None
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for file in (entry / GRAPH, tokenizer):
            digest.update(b"" if file is None else hashlib.sha256(file.read_bytes()).digest())
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{entry}: a damaged encoder ({error}). Remove the folder and run fit again") from error
    return EncoderFiles(name, description, entry / GRAPH, tokenizer, size, digest.hexdigest())


def copy_files(files: EncoderFiles, folder: Path) -> None:
    """Copy an encoder into a folder, as hard links where possible."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in (files.graph, files.tokenizer, files.graph.parent / DESCRIPTION):
        if source is not None:
            target = folder / source.name
            target.unlink(missing_ok=True)
            try:
                os.link(source, target)
            except OSError:  # another file system, or one without links
                shutil.copyfile(source, target)


def _source(spec: str, kind: str) -> _Source:
    if spec in PACKAGES:
        return _package(spec, kind)
    path = Path(spec)
    if path.exists():
        return _local(path, kind)
    if _HUB_NAME.fullmatch(spec):
        return _local(download(spec), kind, name=spec.rpartition("/")[2], origin=f"https://huggingface.co/{spec}")
    raise ConfigError(f"encoder {spec!r}: there is no such file, folder or package. {_FORMS}{', '.join(PACKAGES)}")


def _package(spec: str, kind: str) -> _Source:
    package = PACKAGES[spec]
    if package.kind != kind:
        raise ConfigError(f"encoder {spec!r}: is a network of {package.kind}s, the modality is of kind {kind}")
    if not package.is_installed:
        raise ConfigError(f"encoder {spec!r}: its packages are not installed. Run: {package.command}")
    return _Source(spec, f"{spec} {package.versions()}", package.write)


def _local(path: Path, kind: str, *, name: str | None = None, origin: str | None = None) -> _Source:
    folder = path if path.is_dir() else path.parent
    graph = path if path.is_file() else _graph_in(path)
    title = propose_name(name or (path.stem if path.is_file() else path.resolve().name), "encoder").replace("_", "-")
    given = _read_description(path)
    if graph is not None:
        described = given or describe_folder(folder, kind)
        if described is None:
            raise ConfigError(f"{graph}: {DESCRIPTION} is missing in its folder, which says how a {kind} becomes its input")
        files = [graph, *sorted(graph.parent.glob(f"{graph.name}*data")), *_tokenizers(folder)]
        return _Source(title, _identity(described, files), partial(_copy_graph, graph, folder, described))
    if (folder / "config.json").exists() and sorted(folder.glob("*.safetensors")):
        described = given or describe_folder(folder, kind)
        if described is None:
            raise ConfigError(f"{folder}: has no tokenizer.json or preprocessor_config.json, so it is no network of {kind}s")
        if origin:
            described = described.model_copy(update={"origin": origin})
        title = f"{title}-{kind}" if is_dual(folder) else title
        files = [folder / "config.json", *sorted(folder.glob("*.safetensors")), *_tokenizers(folder)]
        return _Source(title, f"{kind} {_identity(described, files)}", partial(convert_folder, folder, described))
    raise ConfigError(
        f"{path}: holds no encoder. A folder has an ONNX file and {DESCRIPTION}, or the config.json and *.safetensors of a "
        "Hugging Face model"
    )


def _graph_in(folder: Path) -> Path | None:
    """The ONNX file of a folder: the only one, model.onnx, or that in the subfolder onnx."""
    found = sorted(folder.glob("*.onnx"))
    if len(found) == 1:
        return found[0]
    return next((file for file in (folder / "model.onnx", folder / "onnx" / "model.onnx") if file.exists()), None)


def _tokenizers(folder: Path) -> list[Path]:
    return [file for file in (folder / TOKENIZER,) if file.exists()]


def _read_description(path: Path) -> EncoderDescription | None:
    """The description of a folder, or of an ONNX file: ``<name>.json`` or ``encoder.json`` next to it."""
    for file in (path / DESCRIPTION,) if path.is_dir() else (path.with_suffix(".json"), path.parent / DESCRIPTION):
        if file.exists():
            try:
                return EncoderDescription.model_validate_json(file.read_bytes())
            except (ValidationError, OSError) as error:
                raise ConfigError(f"{file}: is no description of an encoder: {error}") from error
    return None


def _identity(description: EncoderDescription, files: list[Path]) -> str:
    """Hash of a description and the contents of files."""
    digest = hashlib.sha256(description.model_dump_json().encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _copy_graph(graph: Path, folder: Path, description: EncoderDescription, target: Path) -> EncoderDescription:
    """Write a graph as one file, with its weights and without functions."""
    try:
        model = onnx.inliner.inline_local_functions(onnx.load(graph))
        if model.ByteSize() > MAX_FILE_BYTES:
            raise ConfigError(f"{graph}: has {model.ByteSize():,} bytes with its weights, {MAX_FILE_BYTES:,} are allowed")
        (target / GRAPH).write_bytes(model.SerializeToString())
    except ConfigError:
        raise
    except Exception as error:  # protobuf's exception is not public, and weights may be missing or cut short
        raise ConfigError(f"{graph}: cannot be read with its weights ({error}). Copy or export it again") from error
    for file in _tokenizers(folder):
        shutil.copyfile(file, target / TOKENIZER)
    return description


def _checked(spec: str, source: _Source, kind: str, folder: Path) -> dict[str, Any]:
    """Write the files of an encoder, run it, and return its description with the size of its features.

    Raises:
        ConfigError: it is not an encoder that can be run here and in a bundle.
    """
    from concord.model.runtime.device import Device  # noqa: PLC0415 - encoders in the cache need no ONNX Runtime
    from concord.model.runtime.frozen import open_files  # noqa: PLC0415

    description = source.write(folder)
    preprocessing = description.preprocessing
    if preprocessing.kind != kind:
        raise ConfigError(f"encoder {spec!r}: is a network of {preprocessing.kind}s, the modality is of kind {kind}")
    tokenizer = folder / TOKENIZER if preprocessing.kind == "text" else None
    if tokenizer is not None and not tokenizer.exists():
        raise ConfigError(f"encoder {spec!r}: has no {TOKENIZER}. Save the fast tokenizer of the network next to it")
    try:
        check_graph(folder / GRAPH, (folder / GRAPH).read_bytes(), weights=None)
        files = EncoderFiles(source.name, description, folder / GRAPH, tokenizer, size=1, sha256="")
        encoder = open_files(files, Device(), threads=1)
        features = [encoder.features(encoder.blank(rows)) for rows in (1, 3)]
    except ImportError as error:
        raise ConfigError(f"encoder {spec!r}: needs the package tokenizers. Install it") from error
    except (BundleError, ValueError, FloatingPointError) as error:
        raise ConfigError(f"encoder {spec!r}: {error}") from error
    except Exception as error:  # the exception classes of ONNX Runtime are private
        raise ConfigError(f"encoder {spec!r}: its graph does not run ({error})") from error
    if [len(rows) for rows in features] != [1, 3] or not np.allclose(features[0][0], features[1][2], atol=1e-3, rtol=1e-3):
        raise ConfigError(
            f"encoder {spec!r}: mixes the rows of a batch. Export it with a dynamic batch axis, in evaluation mode"
        )
    if tokenizer is None:
        (folder / TOKENIZER).unlink(missing_ok=True)
    return {**description.model_dump(mode="json"), "size": features[0].shape[1]}


def installed() -> Iterator[tuple[str, str]]:
    """Iterate over the kind and the name of each encoder whose packages are installed."""
    yield from ((package.kind, name) for name, package in PACKAGES.items() if package.is_installed)
