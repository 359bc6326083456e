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
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from model.exchange import put_in_place
from model.modality import CategoricalModality, ImageModality, Modality, TextModality, unlearned

FORMAT = 3
"""The newest that is read. Written is the oldest that can tell of the bundle's modalities and graphs: 1 knows images of one or
three channels, texts of characters, vectors and attributes; 2 came with words, unknown characters, texts
that are cut or shifted, classes and any other image; 3 with samples that are not a Gaussian's."""
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
GOLDEN = "golden.npz"
MAP = "map.npz"
CARD = "README.md"
MAX_FILE_BYTES = 2 << 30
ALLOWED_DOMAINS = frozenset({"", "ai.onnx"})
BUILTIN_FOLDER = Path(__file__).parent / "bundles"
DEFAULT_BUNDLE = "digits"


class BundleError(Exception):
    """A bundle that must not be served. The message names the file and says what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Strict):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, le=MAX_FILE_BYTES)


class Graphs(_Strict):
    """File name of each graph."""

    encode: str
    refine: str
    decode: dict[str, str]
    draw: str | None = None
    """Gives samples of a posterior. None: they are those of the Gaussian."""


class RefinementFacts(_Strict):
    """What a caller of the refine graph must know."""

    samples: int = Field(ge=1)
    """Noise samples a row: the graph's ``noise`` is (batch, samples, latent)."""
    horizon: int = Field(ge=1)
    """Steps the refiner was trained for."""


class DataSource(_Strict):
    file: str
    sha256: str
    rows: int
    licence: str


class Provenance(_Strict):
    created: str
    code_revision: str
    config_sha256: str
    seed: int
    libraries: dict[str, str]
    data: list[DataSource]


class Manifest(_Strict):
    """What the service must know to use the graphs, and what a reader wants to know of their origin."""

    format: int = Field(ge=1)
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")
    version: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")
    modalities: list[Modality] = Field(min_length=2, max_length=8)
    latent: int = Field(ge=1)
    beta: float = Field(gt=0)
    """Weight of the KL term in the objective that refinement climbs."""
    weights: dict[str, float]
    """Likelihood weight of each modality in that objective."""
    graphs: Graphs
    refinement: RefinementFacts
    files: dict[str, FileEntry]
    """Every file the service reads, by name."""
    provenance: Provenance
    metrics: dict[str, Any]


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
    graphs = _graph_names(manifest)
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
        manifest = Manifest(format=_format(facts), files=entries, **facts)
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


def _format(facts: Mapping[str, Any]) -> int:
    told = [TypeAdapter(Modality).validate_python(fields) for fields in facts["modalities"]]
    drawn = Graphs.model_validate(facts["graphs"]).draw is not None
    return max([3 if drawn else 1, *map(_oldest_format, told)])


def _oldest_format(modality: Modality) -> int:
    if isinstance(modality, ImageModality):
        return 1 if modality.in_files else 2
    if isinstance(modality, TextModality):
        old = modality.unit == "character" and modality.likelihood == "categorical" and modality.too_long == "refuse"
        return 1 if old and modality.unknown_token is None else 2
    return 2 if isinstance(modality, CategoricalModality) else 1


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
    missing = {*_graph_names(manifest), WEIGHTS, GOLDEN} - set(manifest.files)
    if missing:
        raise BundleError(f"{path / MANIFEST}: no hash for {sorted(missing)}")
    return manifest


def _graph_names(manifest: Manifest) -> list[str]:
    graphs = manifest.graphs
    return [graphs.encode, graphs.refine, *graphs.decode.values(), *([graphs.draw] if graphs.draw else [])]


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
