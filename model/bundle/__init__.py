"""A bundle: the folder that training writes and the service runs.

::

    manifest.json          format, modalities, graphs, hashes, provenance, metrics
    encode.onnx            modalities and mask -> aligned posterior
    refine.onnx            one refinement step, including the gradient of the objective
    decode-<modality>.onnx z -> the modality
    draw.onnx              optional: posterior and noise -> a sample z, for models with a flow
    weights.safetensors    weights of all networks; the graphs refer to this file, so no weight is stored twice
    encoder-<name>.onnx    optional: a frozen encoder of pictures or texts, with its weights
    tokenizer-<name>.json  optional: the tokenizer of a frozen encoder of texts
    gallery-<modality>.npz optional: training examples of a modality, see ``model.gallery``
    golden.npz             golden examples: inputs, and the outputs of the PyTorch model at export
    map.npz                optional: reference embeddings, the posterior means of labelled rows, for a map of the latent space
    README.md              the model card

A bundle cannot run code: it has no pickle, and its graphs use standard ONNX operators only. Its files may be symbolic links, as
in model caches: a file outside the folder is used only if it has the size and the hash that the manifest records. A manifest
may be a link too; if it is not valid, the error quotes nothing of it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from pydantic import ValidationError

from concord.model.bundle.atomic import replace_folder
from concord.model.bundle.manifest import FORMAT, MAX_FILE_BYTES, FileEntry, Manifest, oldest_format
from concord.model.encoder import MAX_TOKENIZER_BYTES
from concord.model.modality import EncodedModality, missing_statistics

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
GOLDEN = "golden.npz"
GOLDEN_FILE = "file"
"""Golden examples of a frozen encoder: ``file.<encoder>.<number>``, the bytes of a picture or a text, and their
``features.<encoder>`` (number, size), before standardisation."""
MAP = "map.npz"
CARD = "README.md"
ALLOWED_DOMAINS = frozenset({"", "ai.onnx"})
BUILTIN_FOLDER = Path(__file__).parent.parent / "bundles"
DEFAULT_BUNDLE = "digits"
SOUND_BUNDLE = "digits-sound"
"""Needs the packages of kind ``audio``, and so is served only if it is named."""


class BundleError(Exception):
    """A bundle that cannot be read, verified or run. The message names the file and says what to do."""


class NewerFormatError(BundleError):
    """A bundle of a format that this version does not know."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    path: Path
    manifest: Manifest
    sha256: str
    """SHA-256 of the manifest. It identifies the bundle, because the manifest holds the hash of every other file."""

    def content(self, name: str) -> bytes:
        """Bytes of one file. The hash is checked at each read, because the file may have changed on disk since ``read``.

        Args:
            name: file name, one of ``manifest.files``.

        Raises:
            BundleError: the file cannot be read, or its size or hash differ from the manifest.
        """
        content, entry = _read_bytes(self.path, name), self.manifest.files[name]
        if len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
            if (self.path / name).is_symlink():
                raise BundleError(
                    f"{self.path / name}: is a symbolic link to a file that does not match the manifest's {entry.bytes} bytes "
                    f"and sha256 {entry.sha256[:12]}…. Link to the file that was exported with the bundle, or copy it"
                )
            raise BundleError(
                f"{self.path / name}: {len(content)} bytes do not match the manifest's {entry.bytes} bytes and sha256 "
                f"{entry.sha256[:12]}…: the file was changed or cut short. Copy or export the bundle again"
            )
        return content


def builtin(name: str) -> Path:
    """Folder of a bundle that is part of the package.

    Raises:
        BundleError: there is no bundle of that name. The message lists the names.
    """
    names = sorted(p.parent.name for p in BUILTIN_FOLDER.glob(f"*/{MANIFEST}"))
    if name not in names:
        raise BundleError(f"no built-in bundle {name!r}: choose one of {names}, or give the path of a bundle's folder")
    return BUILTIN_FOLDER / name


def read(path: Path) -> Bundle:
    """Read and verify a bundle: format, file names, sizes, hashes, operators.

    Raises:
        BundleError: the bundle cannot be read or does not pass a check.
    """
    raw = _read_bytes(path, MANIFEST)
    try:
        manifest = _parse_manifest(path, raw)
    except BundleError as error:
        if not (path / MANIFEST).is_symlink() or isinstance(error, NewerFormatError):
            raise
        # The manifest has no recorded hash: its error could quote any file that this process may read.
        raise BundleError(f"{path / MANIFEST}: is a symbolic link to a file that is not a valid manifest") from None
    bundle = Bundle(path=path, manifest=manifest, sha256=hashlib.sha256(raw).hexdigest())
    graphs, encoders = manifest.graphs.names, {encoder.graph for encoder in manifest.encoders.values()}
    for name in manifest.files:
        content = bundle.content(name)
        if name in graphs:
            check_graph(path / name, content)
        elif name in encoders:
            check_graph(path / name, content, weights=None)
    return bundle


def write(path: Path, facts: Mapping[str, Any], files: Iterable[Path], card: str) -> Bundle:
    """Write a bundle atomically: a reader sees the old folder or the complete new one.

    Args:
        path: the bundle's folder. A bundle that is already there is replaced.
        facts: the fields of the manifest except ``format`` and ``files``.
        files: graphs, weights, golden examples and other files. They are copied and keep their names.
        card: the model card, Markdown.

    Returns:
        the verified bundle at ``path``.

    Raises:
        BundleError: ``path`` exists and is not a bundle, or the new bundle does not pass the checks of ``read``. Nothing has
            changed at ``path``.
    """
    if path.exists() and not (path / MANIFEST).is_file():
        raise BundleError(f"{path}: exists and is not a bundle. Choose another folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        entries = {}
        for file in files:
            content = file.read_bytes()
            _write_durably(staging / file.name, content)
            entries[file.name] = FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        manifest = Manifest(format=oldest_format(facts), files=entries, **facts)
        _write_durably(staging / CARD, card.encode())
        fields = manifest.model_dump(mode="json")
        if manifest.graphs.draw is None:
            del fields["graphs"]["draw"]  # versions that read formats 1 and 2 reject unknown fields
        text = json.dumps(fields, indent=1, ensure_ascii=False)
        _write_durably(staging / MANIFEST, text.encode() + b"\n")
        read(staging)
        staging.chmod(0o755)
        replace_folder(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return read(path)


def _parse_manifest(path: Path, raw: bytes) -> Manifest:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path / MANIFEST}: not JSON ({error})") from error
    number = fields.get("format") if isinstance(fields, dict) else None
    if not isinstance(number, int):
        raise BundleError(f"{path / MANIFEST}: has no format number, so it is not the manifest of a bundle")
    if number > FORMAT:
        raise NewerFormatError(
            f"{path}: the bundle has format {number}, this version reads formats up to {FORMAT}. Install a newer concord"
        )
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise BundleError(f"{path / MANIFEST}: {error}") from error
    for modality in manifest.modalities:
        if field := missing_statistics(modality):
            raise BundleError(f"{path / MANIFEST}: modality {modality.name} has no {field}")
    names = [m.name for m in manifest.modalities]
    if len(set(names)) != len(names):
        raise BundleError(f"{path / MANIFEST}: a modality is listed twice: {names}")
    if set(manifest.graphs.decode) != set(names) or set(manifest.weights) != set(names):
        raise BundleError(f"{path / MANIFEST}: graphs.decode and weights must name exactly the modalities {names}")
    _check_encoders(path, manifest)
    if unknown := set(manifest.galleries) - set(names):
        raise BundleError(f"{path / MANIFEST}: galleries names {sorted(unknown)}, the modalities are {names}")
    galleries = {gallery.file for gallery in manifest.galleries.values()}
    missing = {*manifest.graphs.names, *manifest.encoder_files, *galleries, WEIGHTS, GOLDEN} - set(manifest.files)
    if missing:
        raise BundleError(f"{path / MANIFEST}: files has no hash for {sorted(missing)}")
    return manifest


def _check_encoders(path: Path, manifest: Manifest) -> None:
    """Raise BundleError if a modality does not fit the frozen encoder that it names, or a tokenizer is too large."""
    for modality in manifest.modalities:
        if not isinstance(modality, EncodedModality):
            continue
        encoder = manifest.encoders.get(modality.encoder)
        if encoder is None:
            raise BundleError(
                f"{path / MANIFEST}: modality {modality.name} has the encoder {modality.encoder!r}, which is missing"
            )
        if (encoder.preprocessing.kind, encoder.size) != (modality.kind, modality.size):
            raise BundleError(
                f"{path / MANIFEST}: the encoder {modality.encoder} computes {encoder.size} numbers of a value of kind "
                f"{encoder.preprocessing.kind}; modality {modality.name} has {modality.size} of kind {modality.kind}"
            )
    for encoder in manifest.encoders.values():
        entry = manifest.files.get(encoder.tokenizer or "")
        if entry is not None and entry.bytes > MAX_TOKENIZER_BYTES:
            raise BundleError(
                f"{path / MANIFEST}: {encoder.tokenizer} has {entry.bytes:,} bytes, {MAX_TOKENIZER_BYTES:,} are allowed"
            )


def _read_bytes(folder: Path, name: str) -> bytes:
    file = folder / name
    try:
        if Path(name).name != name or "\0" in name:
            raise BundleError(f"{folder}: {name!r} refers to a file outside the bundle: only plain file names are allowed")
        if file.exists() and not file.is_file():
            raise BundleError(f"{file}: is not a regular file. A bundle contains regular files only")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise BundleError(f"{file}: is larger than the allowed {MAX_FILE_BYTES} bytes")
        return file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}). A bundle is a folder with a {MANIFEST}") from error


def check_graph(file: Path, content: bytes, weights: str | None = WEIGHTS) -> onnx.ModelProto:
    """Parse a graph. Check that it uses standard operators only, and reads tensors from no file except the bundle's weights.

    Args:
        weights: name of the file that it may read tensors from. None: it contains all of them.

    Raises:
        BundleError: the graph does not pass.
    """
    try:
        graph = onnx.load_model_from_string(content)
    except Exception as error:  # the exception class of protobuf is not public
        raise BundleError(f"{file}: not an ONNX graph") from error
    if graph.functions:
        raise BundleError(f"{file}: contains function definitions, which are not allowed")
    used = {opset.domain for opset in graph.opset_import} | {node.domain for node in graph.graph.node}
    if used - ALLOWED_DOMAINS:
        raise BundleError(
            f"{file}: uses operators of {sorted(used - ALLOWED_DOMAINS)}; only standard ONNX operators are allowed"
        )
    for node in graph.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise BundleError(f"{file}: contains control flow ({node.op_type}), which is not allowed")
    for tensor in _tensors(graph.graph):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value != weights:
                raise BundleError(
                    f"{file}: reads tensors from {entry.value!r}; only {weights or 'the graph itself'} is allowed"
                )
    return graph


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """All tensors stored in a graph without control flow."""
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    sparse = [*graph.sparse_initializer, *(s for a in attributes for s in (a.sparse_tensor, *a.sparse_tensors))]
    yield from graph.initializer
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _write_durably(file: Path, content: bytes) -> None:
    """Write a file and wait until it is on disk."""
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
