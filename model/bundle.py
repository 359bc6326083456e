"""The artifact: a folder that training writes and the service runs.

::

    manifest.json          format, modalities, graphs, hashes, provenance, metrics
    encode.onnx            modalities and their presence -> aligned posterior
    refine.onnx            one refinement step, the gradient of the objective inside
    decode-<modality>.onnx z -> the modality
    weights.safetensors    every network; the graphs point into it, so no number is stored twice
    golden.npz             inputs with the answers the graphs gave when they were exported
    map.npz                optional: posterior means of rows to find one's bearings by, with their labels
    README.md              the model card

Nothing in a bundle can run code: no pickle, standard ONNX operators alone, no file outside the folder.
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

from model.exchange import put_in_place
from model.manifest import FORMAT, MAX_FILE_BYTES, FileEntry, Manifest, oldest_format
from model.modality import unlearned

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
GOLDEN = "golden.npz"
MAP = "map.npz"
CARD = "README.md"
ALLOWED_DOMAINS = frozenset({"", "ai.onnx"})
BUILTIN_FOLDER = Path(__file__).parent / "bundles"
DEFAULT_BUNDLE = "digits"


class BundleError(Exception):
    """A bundle that must not be served. The message names the file and says what to do."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    path: Path
    manifest: Manifest
    sha256: str
    """Of the manifest, which holds the hash of every other file: one number for the whole bundle."""

    def content(self, name: str) -> bytes:
        """One file. Verified each time it is read, so that no change on disk ever reaches who uses it.

        Raises:
            BundleError: it is not what the manifest says.
        """
        content, entry = _read_bytes(self.path, name), self.manifest.files[name]
        if len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
            raise BundleError(
                f"{self.path / name}: {len(content)} bytes do not match the manifest's {entry.bytes} bytes and sha256 "
                f"{entry.sha256[:12]}…: the file was changed or cut short. Copy or export the bundle again"
            )
        return content


def builtin(name: str) -> Path:
    """Folder of a bundle that ships with the package.

    Raises:
        BundleError: no such bundle; names those that exist.
    """
    names = sorted(p.parent.name for p in BUILTIN_FOLDER.glob(f"*/{MANIFEST}"))
    if name not in names:
        raise BundleError(f"no built-in bundle {name!r}: there are {names}. Give the path of a bundle's folder instead")
    return BUILTIN_FOLDER / name


def read(path: Path) -> Bundle:
    """Read and verify a bundle: format, names, sizes, hashes, operators.

    Raises:
        BundleError: anything that keeps the bundle from being served.
    """
    raw = _read_bytes(path, MANIFEST)
    manifest = _parse_manifest(path, raw)
    found = Bundle(path=path, manifest=manifest, sha256=hashlib.sha256(raw).hexdigest())
    graphs = manifest.graphs.names
    for name in manifest.files:
        content = found.content(name)
        if name in graphs:
            _check_graph(path / name, content)
    return found


def write(path: Path, facts: Mapping[str, Any], files: Iterable[Path], card: str) -> Bundle:
    """Write a bundle in one step: a reader sees the old folder or the new one, never a part.

    Args:
        path: the bundle's folder; an older bundle there is replaced, anything else is refused.
        facts: the manifest's fields but ``format`` and ``files``.
        files: graphs, weights and golden examples, copied under their own names.
        card: the model card, Markdown.

    Raises:
        BundleError: ``path`` holds something else than a bundle, or the result does not verify.
    """
    if path.exists() and not (path / MANIFEST).is_file():
        raise BundleError(f"{path}: exists and is no bundle. Choose another folder or remove it")
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
            del fields["graphs"]["draw"]  # older readers do not know the field
        text = json.dumps(fields, indent=1, ensure_ascii=False)
        _write_durably(staging / MANIFEST, text.encode() + b"\n")
        read(staging)
        staging.chmod(0o755)
        put_in_place(staging, path)
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
        raise BundleError(f"{path / MANIFEST}: names no format number: this is no bundle's manifest")
    if number > FORMAT:
        raise BundleError(f"{path}: the bundle has format {number}, this version reads up to {FORMAT}. Install a newer concord")
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise BundleError(f"{path / MANIFEST}: {error}") from error
    for modality in manifest.modalities:
        if field := unlearned(modality):
            raise BundleError(f"{path / MANIFEST}: modality {modality.name} has no {field}")
    names = [m.name for m in manifest.modalities]
    if len(set(names)) != len(names):
        raise BundleError(f"{path / MANIFEST}: a modality is described twice: {names}")
    if set(manifest.graphs.decode) != set(names) or set(manifest.weights) != set(names):
        raise BundleError(f"{path / MANIFEST}: graphs and weights must name exactly the modalities {names}")
    missing = {*manifest.graphs.names, WEIGHTS, GOLDEN} - set(manifest.files)
    if missing:
        raise BundleError(f"{path / MANIFEST}: no hash for {sorted(missing)}")
    return manifest


def _read_bytes(folder: Path, name: str) -> bytes:
    file = folder / name
    try:
        if Path(name).name != name or "\0" in name or file.is_symlink():
            raise BundleError(f"{folder}: {name!r} leads out of the bundle: only plain file names are allowed")
        if file.exists() and not file.is_file():
            raise BundleError(f"{file}: is no file. A bundle holds plain files only")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise BundleError(f"{file}: larger than {MAX_FILE_BYTES} bytes")
        return file.read_bytes()
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror}). A bundle is a folder with a {MANIFEST}") from error


def _check_graph(file: Path, content: bytes) -> None:
    """Standard operators only, and no tensor from any file but the bundle's weights."""
    try:
        graph = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf raises its own class, which is not public
        raise BundleError(f"{file}: not an ONNX graph") from error
    if graph.functions:
        raise BundleError(f"{file}: holds function definitions, which no bundle needs")
    used = {opset.domain for opset in graph.opset_import} | {node.domain for node in graph.graph.node}
    if used - ALLOWED_DOMAINS:
        raise BundleError(
            f"{file}: uses operators of {sorted(used - ALLOWED_DOMAINS)}; only standard ONNX operators are allowed"
        )
    for node in graph.graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise BundleError(f"{file}: holds control flow ({node.op_type}), which no bundle needs")
    for tensor in _tensors(graph.graph):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value != WEIGHTS:
                raise BundleError(f"{file}: reads tensors from {entry.value!r}; only {WEIGHTS} is allowed")


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a graph without control flow can hold."""
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    sparse = [*graph.sparse_initializer, *(s for a in attributes for s in (a.sparse_tensor, *a.sparse_tensors))]
    yield from graph.initializer
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _write_durably(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
