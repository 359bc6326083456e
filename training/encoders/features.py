"""Features of frozen encoders, computed once and kept on disk.

A feature belongs to the bytes of a picture or a text and to the encoder: its graph, its tokenizer, its preprocessing and the
versions of the libraries that prepare values. So it is computed once for all runs, also if their configurations differ.

The file of an encoder is a sequence of records of equal length, each with a checksum. A batch of records is appended in one
write. Whenever the process is killed, at most one batch is lost, and what a cut record left is removed.
"""

import contextlib
import hashlib
import importlib.metadata
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL
from jaxtyping import Float32
from numpy.typing import NDArray
from PIL import Image

from concord.model.codec.errors import Limits
from concord.model.codec.frozen import EncoderInput, Prepared, Preprocessor
from concord.model.encoder import EncoderFiles, TextPreprocessing
from concord.model.modality import EncodedModality
from concord.training.config import Config
from concord.training.encoders.find import find_encoder
from concord.training.encoders.lock import locked
from concord.training.errors import ConfigError

if TYPE_CHECKING:
    from concord.model.runtime.frozen import FrozenEncoder

DEFAULT_CACHE = Path("runs/cache")
"""Folder of encoders and features if the configuration names no ``cache``."""
BATCH_ROWS = 64
"""Rows that are computed and stored together."""
_log = logging.getLogger(__name__)


class FeatureFile:
    """The stored features of one encoder. One process appends at a time; any number may read.

    Args:
        path: of the file. It need not exist.
        size: numbers of a feature vector.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._record = np.dtype([("key", "u1", 32), ("is_cut", "u1"), ("feature", "<f4", size), ("checksum", "<u4")])
        self._rows: dict[bytes, tuple[NDArray[np.float32], bool]] = {}
        self._read_bytes = 0
        self._read()

    def get(self, key: bytes) -> tuple[Float32[np.ndarray, " size"], bool] | None:
        """Return a feature vector, and whether its text was cut. None: it is not stored."""
        return self._rows.get(key)

    def __len__(self) -> int:
        return len(self._rows)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process appends, then read what others have appended."""
        with locked(self._path) as stream:
            self._read()
            stream.truncate(self._read_bytes)  # part of a record, from a process that was killed
            yield

    def append(self, keys: list[bytes], features: Float32[np.ndarray, "row size"], are_cut: list[bool]) -> None:
        """Store feature vectors. Call it while the file is locked."""
        records = np.zeros(len(keys), self._record)
        records["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32)
        records["feature"], records["is_cut"] = features, are_cut
        records["checksum"] = [_checksum(record) for record in records]
        with self._path.open("ab") as stream:
            stream.write(records.tobytes())
        self._read_bytes += records.nbytes
        self._add(records)

    def _read(self) -> None:
        """Read the records that are new."""
        size = self._path.stat().st_size if self._path.exists() else 0
        count = (size - self._read_bytes) // self._record.itemsize
        if count <= 0:
            return
        records = np.memmap(self._path, self._record, "r", self._read_bytes, (count,))
        self._read_bytes += count * self._record.itemsize
        self._add(records)

    def _add(self, records: NDArray[Any]) -> None:
        damaged = 0
        for record in records:
            if int(record["checksum"]) == _checksum(record):
                self._rows[record["key"].tobytes()] = (record["feature"], bool(record["is_cut"]))
            else:
                damaged += 1
        if damaged:
            _log.warning("%s: %d features are damaged, they are computed again", self._path, damaged)


def _checksum(record: Any) -> int:
    return zlib.crc32(record.tobytes()[:-4])


class StoredFeatures(Preprocessor):
    """Prepares the values of one modality: returns their stored feature vectors. Not standardised.

    Attributes:
        files: of the encoder.
    """

    def __init__(self, files: EncoderFiles, cache: Path, device: str, threads: int, modality: str) -> None:
        super().__init__(files.description, None if files.tokenizer is None else files.tokenizer.read_bytes())
        self.files = files
        self._device, self._threads, self._modality = device, threads, modality
        versions = [importlib.metadata.version(name) for name in ("concord-mvae", "tokenizers")] + [PIL.__version__]
        identity = hashlib.sha256("\n".join([files.sha256, *versions]).encode()).hexdigest()
        self._stored = FeatureFile(cache / "features" / f"{files.name}-{identity[:16]}.bin", files.size)
        self._encoder: FrozenEncoder | None = None
        self._is_computing = False
        self._pending: dict[bytes, tuple[EncoderInput, bool]] = {}
        self._cut: set[bytes] = set()

    @property
    def notes(self) -> list[str]:
        """What the user should know of the values."""
        preprocessing = self.description.preprocessing
        if not self._cut or not isinstance(preprocessing, TextPreprocessing):
            return []
        return [
            f"{self._modality}: {len(self._cut):,} texts are cut to the {preprocessing.length} tokens that the encoder reads"
        ]

    def pixels(self, picture: bytes | Image.Image, limits: Limits) -> Prepared:
        content = picture if isinstance(picture, bytes) else f"{picture.mode} {picture.size}".encode() + picture.tobytes()
        key = hashlib.sha256(content).digest()
        known = self._stored.get(key)
        return known[0] if known is not None else self._feature(key, super().pixels(picture, limits), is_cut=False)

    def tokens(self, text: object, too_long: Literal["refuse", "cut"], limits: Limits) -> Prepared:
        key = hashlib.sha256(str(text).encode(errors="surrogatepass")).digest()
        known = self._stored.get(key) if isinstance(text, str) else None
        if known is None or (known[1] and too_long == "refuse"):
            tokens = super().tokens(text, too_long, limits)
            assert isinstance(text, str)
            return self._feature(key, tokens, is_cut=self.is_too_long(text))
        if known[1]:
            self._cut.add(key)
        return known[0]

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """A context in which features of values that are not stored are computed in batches. Zeros are returned for them."""
        with self._stored.locked():
            self._is_computing = True
            try:
                yield
                self._compute()
            finally:
                self._is_computing = False
                self._pending.clear()

    def _feature(self, key: bytes, prepared: Prepared, *, is_cut: bool) -> Prepared:
        if not self._is_computing:
            feature: Prepared = self._open().features([prepared])[0]
            return feature
        self._pending[key] = (prepared, is_cut)
        if len(self._pending) >= BATCH_ROWS:
            self._compute()
        return np.zeros(self.files.size, dtype=np.float32)

    def _compute(self) -> None:
        if self._pending:
            inputs, are_cut = zip(*self._pending.values(), strict=True)
            self._stored.append(list(self._pending), self._open().features(inputs), list(are_cut))
            self._pending.clear()

    def _open(self) -> "FrozenEncoder":
        if self._encoder is None:
            from concord.model.runtime.device import choose_device  # noqa: PLC0415 - stored features need no ONNX Runtime
            from concord.model.runtime.frozen import open_files  # noqa: PLC0415

            self._encoder = open_files(
                self.files, choose_device("auto" if self._device.startswith(("auto", "cuda")) else "cpu"), self._threads
            )
        return self._encoder


def open_features(config: Config, cache: Path) -> dict[str, StoredFeatures]:
    """Return the features of each modality with a frozen encoder, by modality.

    Args:
        cache: folder of encoders and features.

    Raises:
        ConfigError: an encoder cannot be found or used.
    """
    found: dict[str, StoredFeatures] = {}
    for modality in config.modalities:
        if isinstance(modality, EncodedModality):
            files = find_encoder(modality.encoder, modality.kind, cache)
            same = [other.files for other in found.values() if other.files.name == files.name]
            if any(other.sha256 != files.sha256 for other in same):
                raise ConfigError(f"two different encoders have the name {files.name}: rename the folder of one of them")
            if modality.size not in (0, files.size):
                raise ConfigError(
                    f"{modality.name}: its encoder computes {files.size} numbers, size is {modality.size}: remove it"
                )
            found[modality.name] = StoredFeatures(files, cache, config.device, config.thread_count, modality.name)
    return found
