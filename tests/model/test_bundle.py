"""What must not be served is refused by name, and a write shows whole or not at all."""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import bundle
from model.bundle import MANIFEST, WEIGHTS, BundleError, read, write
from model.manifest import FORMAT, MAX_FILE_BYTES

ROOT = Path(bundle.__file__).parent.parent
FILES = [
    "encode.onnx",
    "refine.onnx",
    "decode-image.onnx",
    "decode-text.onnx",
    "decode-vector.onnx",
    "decode-binary.onnx",
    WEIGHTS,
    bundle.GOLDEN,
]
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tiny_bundle: bundle.Bundle, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "spoiled"))


def restate(folder: Path, change: Change) -> None:
    """Change the manifest."""
    fields = json.loads((folder / MANIFEST).read_text())
    change(fields)
    (folder / MANIFEST).write_text(json.dumps(fields))


def reseal(folder: Path, name: str) -> None:
    """Bring the manifest's hash of a file in line with its content: an attacker can do that too."""
    content = (folder / name).read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    restate(folder, lambda fields: fields["files"].update({name: entry}))


def redraw(folder: Path, name: str, change: Callable[[onnx.ModelProto], object]) -> None:
    """Change a graph, hash included."""
    graph = onnx.load(folder / name, load_external_data=False)
    change(graph)
    (folder / name).write_bytes(graph.SerializeToString())
    reseal(folder, name)


def test_a_bundle_reads_as_it_was_written(tiny_bundle: bundle.Bundle, folder: Path) -> None:
    again = read(folder)
    assert again.manifest == tiny_bundle.manifest
    assert again.sha256 == tiny_bundle.sha256 == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert sorted(again.manifest.files) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, -1])
def test_one_changed_byte_is_refused(folder: Path, name: str, place: float) -> None:
    content = bytearray((folder / name).read_bytes())
    content[int(place * len(content)) if place > 0 else int(place)] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}.*changed or cut short"):
        read(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_or_missing_is_refused(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    with pytest.raises(BundleError, match=f"{name}.*changed or cut short"):
        read(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: cannot be read"):
        read(folder)


def test_a_file_of_more_than_any_bundle_holds_is_not_read(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, MAX_FILE_BYTES + 1)  # a hole: it fills no disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BundleError, match="larger than"):
        read(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_every_changed_byte_of_the_manifest_changes_the_bundles_number(folder: Path) -> None:
    before = read(folder).sha256
    restate(folder, lambda fields: fields.update(version="2"))
    assert read(folder).sha256 != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(format=FORMAT + 1), "Install a newer concord"),
        (lambda f: f.update(format=0), "format"),
        (lambda f: f.update(format="1"), "no format number"),
        (lambda f: f.pop("format"), "no format number"),
        (lambda f: f.update(surprise=1), "surprise"),
        (lambda f: f["refinement"].update(surprise=1), "refinement.surprise"),
        (lambda f: f["modalities"][0].update(surprise=1), "surprise"),
        (lambda f: f.pop("provenance"), "provenance"),
        (lambda f: f.update(name="../up"), "name"),
        (lambda f: f.update(beta=-1), "beta"),
        (lambda f: f["modalities"][1].update(alphabet=""), "modality text has no alphabet"),
        (lambda f: f["modalities"].append(f["modalities"][0]), "described twice"),
        (lambda f: f["modalities"].pop(), "exactly the modalities"),
        (lambda f: f["weights"].pop("text"), "exactly the modalities"),
        (lambda f: f["graphs"]["decode"].update(more="encode.onnx"), "exactly the modalities"),
        (lambda f: f["files"].pop(WEIGHTS), f"no hash for .*{WEIGHTS}"),
        (lambda f: f["files"].pop(bundle.GOLDEN), f"no hash for .*{bundle.GOLDEN}"),
        (lambda f: f["files"].pop("decode-text.onnx"), "no hash for .*decode-text.onnx"),
        (lambda f: f["graphs"].update(encode="../encode.onnx"), "no hash for .*encode.onnx"),
        (lambda f: f["files"][WEIGHTS].update(sha256="0" * 63), "sha256"),
        (lambda f: f["files"][WEIGHTS].update(bytes=MAX_FILE_BYTES + 1), "bytes"),
    ],
)
def test_a_lying_manifest_is_refused(folder: Path, change: Change, message: str) -> None:
    restate(folder, change)
    with pytest.raises(BundleError, match=message) as refusal:
        read(folder)
    assert folder.name in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"format": [1]}'])
def test_what_is_no_manifest_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=MANIFEST):
        read(folder)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda s: st.lists(s, max_size=2))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_any_value_anywhere_is_read_or_refused(
    tiny_bundle: bundle.Bundle, folder: Path, data: st.DataObject, value: Any
) -> None:
    """Never another exception."""
    fields = json.loads((tiny_bundle.path / MANIFEST).read_text())
    *path, last = data.draw(st.sampled_from(list(places(fields))))
    target = fields
    for key in path:
        target = target[key]
    target[last] = value
    (folder / MANIFEST).write_text(json.dumps(fields))
    with contextlib.suppress(BundleError):
        read(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "inner/file", "..", ".", "", "a\0b", "x" * 300])
def test_a_name_that_leads_elsewhere_is_refused(folder: Path, name: str) -> None:
    """Even where the hash would match."""
    (folder.parent / "secret").write_text("secret")
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text("secret")
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "bytes": 6}
    restate(folder, lambda fields: fields["files"].update({name: entry}))
    with pytest.raises(BundleError) as refusal:
        read(folder)
    assert folder.name in str(refusal.value)


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "encode.onnx"])
def test_a_symbolic_link_is_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(BundleError, match=f"{name}.*leads out of the bundle"):
        read(folder)


def test_a_pipe_does_not_stop_the_reader(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    with pytest.raises(BundleError, match=f"{WEIGHTS}: is no file"):
        read(folder)


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "none"
    if kind == "empty":
        path.mkdir()
    elif kind == "file":
        path.write_text("")
    with pytest.raises(BundleError, match=f"none.*{MANIFEST}"):
        read(path)


def subgraph() -> onnx.GraphProto:
    return onnx.helper.make_graph([], "branch", [], [])


def outside(name: str = "elsewhere.bin") -> onnx.TensorProto:
    """A tensor that claims to lie in another file."""
    tensor = onnx.numpy_helper.from_array(np.zeros(2, np.float32), "outside")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=name)
    return tensor


def sparse() -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=outside(), indices=onnx.numpy_helper.from_array(np.zeros(2, np.int64)), dims=[4])


@pytest.mark.parametrize("name", ["encode.onnx", "refine.onnx", "decode-binary.onnx"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.graph.node.add(op_type="Evil", domain="com.example"), r"com\.example.*only standard"),
        (lambda m: m.opset_import.add(domain="com.microsoft", version=1), r"com\.microsoft.*only standard"),
        (lambda m: m.functions.add(name="f", domain=""), "function definitions"),
        (lambda m: m.graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=subgraph())), "control flow .If"),
        (lambda m: m.graph.node.append(onnx.helper.make_node("Loop", [], ["y"], body=subgraph())), "control flow .Loop"),
        (lambda m: m.graph.initializer.append(outside("../../etc/passwd")), "reads tensors from '../../etc/passwd'"),
        (lambda m: m.graph.initializer.append(outside("/etc/passwd")), "reads tensors from '/etc/passwd'"),
        (lambda m: m.graph.node.append(onnx.helper.make_node("Constant", [], ["y"], value=outside())), "elsewhere.bin"),
        (lambda m: m.graph.node.append(onnx.helper.make_node("Constant", [], ["y"], sparse_value=sparse())), "elsewhere.bin"),
        (lambda m: m.graph.sparse_initializer.append(sparse()), "elsewhere.bin"),
    ],
)
def test_a_graph_that_could_do_more_is_refused(
    folder: Path, name: str, change: Callable[[onnx.ModelProto], object], message: str
) -> None:
    redraw(folder, name, change)
    with pytest.raises(BundleError, match=f"{name}.*{message}"):
        read(folder)


def test_what_is_no_graph_is_refused(folder: Path) -> None:
    (folder / "encode.onnx").write_bytes(b"\xffno graph")
    reseal(folder, "encode.onnx")
    with pytest.raises(BundleError, match=r"encode\.onnx: not an ONNX graph"):
        read(folder)


def test_builtin_bundles_go_by_name() -> None:
    for name in ("nothing", "../bundles", "", "digits/.."):
        with pytest.raises(BundleError, match="no built-in bundle"):
            bundle.builtin(name)


@pytest.fixture
def material(tiny_bundle: bundle.Bundle) -> dict[str, Any]:
    """Arguments of ``write``."""
    fields = tiny_bundle.manifest.model_dump(mode="json")
    facts = {key: value for key, value in fields.items() if key not in ("format", "files")}
    return {"facts": facts, "files": [tiny_bundle.path / name for name in FILES], "card": "card"}


def test_a_write_replaces_a_bundle_and_nothing_else(tmp_path: Path, material: dict[str, Any]) -> None:
    first = write(tmp_path / "b", **material)
    material["facts"]["version"] = "2"
    second = write(tmp_path / "b", **material)
    assert (first.manifest.version, second.manifest.version) == ("1", "2")
    assert read(tmp_path / "b") == second
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("too")
    for name in ("notes", "file"):
        with pytest.raises(BundleError, match=f"{name}: exists and is no bundle"):
            write(tmp_path / name, **material)
    assert (tmp_path / "notes" / "thesis.txt").exists()


def test_a_write_that_does_not_verify_leaves_the_old_bundle(tmp_path: Path, material: dict[str, Any]) -> None:
    before = write(tmp_path / "b", **material)
    bad = tmp_path / "encode.onnx"
    bad.write_bytes(b"\xffno graph")
    material["files"][0] = bad
    with pytest.raises(BundleError, match="not an ONNX graph"):
        write(tmp_path / "b", **material)
    assert read(tmp_path / "b") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "encode.onnx"]


def test_there_is_a_bundle_at_every_moment(tmp_path: Path, material: dict[str, Any]) -> None:
    write(tmp_path / "b", **material)
    done, missed = threading.Event(), []

    def look() -> None:
        while not done.is_set():
            if not (tmp_path / "b" / MANIFEST).exists():
                missed.append(time.monotonic())

    watcher = threading.Thread(target=look)
    watcher.start()
    for version in range(20):
        write(tmp_path / "b", {**material["facts"], "version": str(version)}, material["files"], "card")
    done.set()
    watcher.join()
    assert not missed


WRITER = """
import itertools, json, sys
from pathlib import Path
from model import bundle
path, material = Path(sys.argv[1]), json.loads(sys.argv[2])
for number in itertools.count():
    facts = {**material["facts"], "version": "old" if number % 2 else "new"}
    bundle.write(path, facts, map(Path, material["files"]), "card")
    print(number, flush=True)
"""


def test_a_killed_writer_leaves_the_old_bundle_or_the_new_one(tmp_path: Path, material: dict[str, Any]) -> None:
    path, dice = tmp_path / "b", random.Random(0)
    argument = json.dumps({"facts": material["facts"], "files": [str(file) for file in material["files"]]})
    versions = set()
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), argument], cwd=ROOT, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"0\n"
        time.sleep(dice.uniform(0, 0.2))
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        versions.add(read(path).manifest.version)
    assert versions <= {"old", "new"}
