"""Bundles: damaged or malicious ones raise an error that names the file; writes are atomic."""

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
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concord.model import bundle
from concord.model.bundle import MANIFEST, WEIGHTS, BundleError, read, write
from concord.model.bundle.manifest import FORMAT, MAX_FILE_BYTES
from tests.support.server import ROOT

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
    """A copy of the tiny bundle to damage."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "damaged"))


def change_manifest(folder: Path, change: Change) -> None:
    """Rewrite the manifest after ``change`` has edited its fields."""
    fields = json.loads((folder / MANIFEST).read_text())
    change(fields)
    (folder / MANIFEST).write_text(json.dumps(fields))


def update_hash(folder: Path, name: str) -> None:
    """Write the file's current hash to the manifest, as an attacker could."""
    content = (folder / name).read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    change_manifest(folder, lambda fields: fields["files"].update({name: entry}))


def change_graph(folder: Path, name: str, change: Callable[[onnx.ModelProto], object]) -> None:
    """Rewrite a graph and its hash."""
    graph = onnx.load(folder / name, load_external_data=False)
    change(graph)
    (folder / name).write_bytes(graph.SerializeToString())
    update_hash(folder, name)


def test_read_written_bundle_is_equal(tiny_bundle: bundle.Bundle, folder: Path) -> None:
    copy = read(folder)
    assert copy.manifest == tiny_bundle.manifest
    assert copy.sha256 == tiny_bundle.sha256 == hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    assert sorted(copy.manifest.files) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, 0.5, -1])
def test_read_one_changed_byte_raises(folder: Path, name: str, position: float) -> None:
    content = bytearray((folder / name).read_bytes())
    content[int(position * len(content)) if position > 0 else int(position)] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name}.*changed or cut short"):
        read(folder)


@pytest.mark.parametrize("name", FILES)
def test_read_truncated_or_missing_file_raises(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    with pytest.raises(BundleError, match=f"{name}.*changed or cut short"):
        read(folder)
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"{name}: cannot be read"):
        read(folder)


def test_read_too_large_file_raises_without_reading_it(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, MAX_FILE_BYTES + 1)  # sparse: it takes no space on disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BundleError, match="larger than"):
        read(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "kilobytes"


def test_bundle_sha256_changes_with_the_manifest(folder: Path) -> None:
    before = read(folder).sha256
    change_manifest(folder, lambda fields: fields.update(version="2"))
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
        (
            lambda f: f["metrics"].update(recommended_steps="4"),
            "recommended_steps must be an integer of at least 0, received '4'",
        ),
        (lambda f: f["metrics"].update(recommended_steps=-1), "recommended_steps must be an integer"),
        (lambda f: f["metrics"].update(recommended_steps=True), "recommended_steps must be an integer"),
        (lambda f: f["modalities"][1].update(alphabet=""), "modality text has no alphabet"),
        (lambda f: f["modalities"].append(f["modalities"][0]), "listed twice"),
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
def test_read_invalid_manifest_raises(folder: Path, change: Change, message: str) -> None:
    change_manifest(folder, change)
    with pytest.raises(BundleError, match=message) as caught:
        read(folder)
    assert folder.name in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"format": [1]}'])
def test_read_malformed_manifest_raises(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=MANIFEST):
        read(folder)


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from paths(inner, (*path, key))


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda s: st.lists(s, max_size=2))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON)
def test_read_any_value_in_manifest_raises_nothing_but_bundle_error(
    tiny_bundle: bundle.Bundle, folder: Path, data: st.DataObject, value: Any
) -> None:
    fields = json.loads((tiny_bundle.path / MANIFEST).read_text())
    *path, last = data.draw(st.sampled_from(list(paths(fields))))
    target = fields
    for key in path:
        target = target[key]
    target[last] = value
    (folder / MANIFEST).write_text(json.dumps(fields))
    with contextlib.suppress(BundleError):
        read(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "inner/file", "..", ".", "", "a\0b", "x" * 300])
def test_read_file_name_outside_the_bundle_raises(folder: Path, name: str) -> None:
    """Even if the hash matches."""
    (folder.parent / "secret").write_text("secret")
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text("secret")
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "bytes": 6}
    change_manifest(folder, lambda fields: fields["files"].update({name: entry}))
    with pytest.raises(BundleError) as caught:
        read(folder)
    assert folder.name in str(caught.value)


def move_to_cache(folder: Path) -> Path:
    """Move every file to another folder under the name of its hash, and leave relative links, as model caches do."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        blob = file.rename(blobs / hashlib.sha256(file.read_bytes()).hexdigest())
        file.symlink_to(Path("..") / "blobs" / blob.name)
    return blobs


def test_read_folder_of_symbolic_links_gives_the_same_bundle(tiny_bundle: bundle.Bundle, folder: Path) -> None:
    move_to_cache(folder)
    linked = read(folder)
    assert (linked.manifest, linked.sha256) == (tiny_bundle.manifest, tiny_bundle.sha256)
    assert linked.content(WEIGHTS) == tiny_bundle.content(WEIGHTS)


@pytest.mark.parametrize("name", FILES)
def test_read_symbolic_link_to_another_file_raises(folder: Path, name: str) -> None:
    """A file outside the bundle is used neither at the start nor later."""
    opened = read(folder)
    (folder.parent / "secret").write_bytes(b"secret")
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / "secret")
    for read_file in (lambda: read(folder), lambda: opened.content(name)):
        with pytest.raises(BundleError, match=f"{name}: is a symbolic link to a file that does not match") as caught:
            read_file()
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("content", ["secret", '{"secret": 1}', '{"format": 1, "secret": "secret"}', '{"format": "secret"}'])
def test_read_manifest_link_to_another_file_raises_without_quoting_it(folder: Path, content: str) -> None:
    (folder.parent / "other").write_text(content)
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).symlink_to(folder.parent / "other")
    with pytest.raises(BundleError, match=f"{MANIFEST}: is a symbolic link to a file that is not a valid manifest") as caught:
        read(folder)
    shown = "".join(traceback.format_exception(caught.value))
    assert "secret" not in shown


def test_read_manifest_link_to_a_newer_format_says_so(folder: Path) -> None:
    change_manifest(folder, lambda fields: fields.update(format=FORMAT + 1))
    move_to_cache(folder)
    with pytest.raises(BundleError, match="Install a newer concord"):
        read(folder)


@pytest.mark.parametrize("target", ["nowhere", "encode.onnx", "/dev/zero", ".."])
def test_read_symbolic_link_to_no_regular_file_raises(folder: Path, target: str) -> None:
    (folder / "encode.onnx").unlink()
    (folder / "encode.onnx").symlink_to(target)  # itself, for one of them
    with pytest.raises(BundleError, match=r"encode\.onnx: (cannot be read|is not a regular file)"):
        read(folder)


def test_read_named_pipe_raises_without_blocking(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    with pytest.raises(BundleError, match=f"{WEIGHTS}: is not a regular file"):
        read(folder)


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_read_path_without_bundle_raises(tmp_path: Path, kind: str) -> None:
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
    """A tensor that refers to another file."""
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
def test_read_graph_with_forbidden_content_raises(
    folder: Path, name: str, change: Callable[[onnx.ModelProto], object], message: str
) -> None:
    change_graph(folder, name, change)
    with pytest.raises(BundleError, match=f"{name}.*{message}"):
        read(folder)


def test_read_malformed_graph_raises(folder: Path) -> None:
    (folder / "encode.onnx").write_bytes(b"\xffno graph")
    update_hash(folder, "encode.onnx")
    with pytest.raises(BundleError, match=r"encode\.onnx: not an ONNX graph"):
        read(folder)


def test_builtin_unknown_name_raises() -> None:
    for name in ("nothing", "../bundles", "", "digits/.."):
        with pytest.raises(BundleError, match="no built-in bundle"):
            bundle.builtin(name)


@pytest.fixture
def arguments(tiny_bundle: bundle.Bundle) -> dict[str, Any]:
    """Arguments of ``write``."""
    fields = tiny_bundle.manifest.model_dump(mode="json")
    facts = {key: value for key, value in fields.items() if key not in ("format", "files")}
    return {"facts": facts, "files": [tiny_bundle.path / name for name in FILES], "card": "card"}


def test_recommended_steps_need_no_newer_format(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Versions that do not know them read the bundle too."""
    before = write(tmp_path / "b", **arguments).manifest
    arguments["facts"]["metrics"]["recommended_steps"] = 4
    manifest = write(tmp_path / "b", **arguments).manifest
    assert (before.recommended_steps, manifest.recommended_steps) == (None, 4)
    assert manifest.format == before.format


def test_write_replaces_a_bundle_but_no_other_file_or_folder(tmp_path: Path, arguments: dict[str, Any]) -> None:
    first = write(tmp_path / "b", **arguments)
    arguments["facts"]["version"] = "2"
    second = write(tmp_path / "b", **arguments)
    assert (first.manifest.version, second.manifest.version) == ("1", "2")
    assert read(tmp_path / "b") == second
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("too")
    for name in ("notes", "file"):
        with pytest.raises(BundleError, match=f"{name}: exists and is not a bundle"):
            write(tmp_path / name, **arguments)
    assert (tmp_path / "notes" / "thesis.txt").exists()


def test_write_invalid_bundle_raises_and_keeps_the_old_bundle(tmp_path: Path, arguments: dict[str, Any]) -> None:
    before = write(tmp_path / "b", **arguments)
    invalid = tmp_path / "encode.onnx"
    invalid.write_bytes(b"\xffno graph")
    arguments["files"][0] = invalid
    with pytest.raises(BundleError, match="not an ONNX graph"):
        write(tmp_path / "b", **arguments)
    assert read(tmp_path / "b") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "encode.onnx"]


@pytest.mark.slow
def test_write_repeated_bundle_exists_at_every_moment(tmp_path: Path, arguments: dict[str, Any]) -> None:
    write(tmp_path / "b", **arguments)
    done, missing = threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            if not (tmp_path / "b" / MANIFEST).exists():
                missing.append(time.monotonic())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for version in range(20):
        write(tmp_path / "b", {**arguments["facts"], "version": str(version)}, arguments["files"], "card")
    done.set()
    watcher.join()
    assert not missing


WRITER = """
import itertools, json, sys
from pathlib import Path
from concord.model import bundle
path, arguments = Path(sys.argv[1]), json.loads(sys.argv[2])
for number in itertools.count():
    facts = {**arguments["facts"], "version": "old" if number % 2 else "new"}
    bundle.write(path, facts, map(Path, arguments["files"]), "card")
    print(number, flush=True)
"""


@pytest.mark.slow
def test_write_killed_process_leaves_the_old_or_the_new_bundle(tmp_path: Path, arguments: dict[str, Any]) -> None:
    path, generator = tmp_path / "b", random.Random(0)
    argument = json.dumps({"facts": arguments["facts"], "files": [str(file) for file in arguments["files"]]})
    versions = set()
    for _ in range(8):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), argument], cwd=ROOT, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"0\n"
        time.sleep(generator.uniform(0, 0.2))
        writer.send_signal(signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        versions.add(read(path).manifest.version)
    assert versions <= {"old", "new"}
