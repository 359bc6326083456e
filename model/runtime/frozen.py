"""A frozen encoder in ONNX Runtime: pictures or texts -> feature vectors. Training and serving use this class."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from jaxtyping import Float32
from numpy.typing import NDArray

from concord.model.codec.frozen import EncoderInput, Preprocessor, separated
from concord.model.encoder import (
    MASK,
    TOKEN_TYPES,
    TOKENS,
    EncoderDescription,
    EncoderFiles,
    ImagePreprocessing,
    TextPreprocessing,
)
from concord.model.runtime.device import Device

CPU_ROWS = 4
"""Rows of one run on a CPU. More are not faster there, and their activations would fill the memory."""
GPU_ROWS = 32
"""Rows of one run on a GPU."""
GPU_SIZES = (1, 4, 16, GPU_ROWS)
"""Pictures of one run on a GPU, padded. cuDNN plans a convolution anew when its batch size changes, in about 2 ms for each, so
each size has its own session."""
_TEXT_INPUTS = (TOKENS, MASK, TOKEN_TYPES)


class FrozenEncoder:
    """Computes feature vectors. Methods are thread-safe. A result depends on the other rows of its batch by rounding only.

    Args:
        open_session: returns the session of the graph.
        tokenizer: content of the tokenizer.json, of an encoder of texts.
        sizes: numbers of pictures of one run, ascending: others are padded. One number: any up to it. Texts need no padding,
            because no convolution reads them.

    Raises:
        ValueError: graph, tokenizer and description do not fit each other. The message says what to do.
    """

    def __init__(
        self,
        description: EncoderDescription,
        open_session: Callable[[], onnxruntime.InferenceSession],
        tokenizer: bytes | None = None,
        sizes: Sequence[int] = (CPU_ROWS,),
    ) -> None:
        self.description = description
        self.preprocessor = Preprocessor(description, tokenizer)
        self.session = open_session()
        self._max_rows = sizes[-1]
        is_fixed = len(sizes) > 1 and isinstance(description.preprocessing, ImagePreprocessing)
        self._fixed = {size: self.session if size == sizes[-1] else open_session() for size in sizes} if is_fixed else {}
        self._inputs = _check_inputs(description, self.session)
        outputs = [output.name for output in self.session.get_outputs()]
        self._output = description.output or outputs[0]
        if self._output not in outputs:
            raise ValueError(f"the graph has no output {self._output!r}, its outputs are {outputs}: correct output")

    def features(self, inputs: Sequence[EncoderInput]) -> Float32[np.ndarray, "row size"]:
        """Feature vector of each row: the mean of those of its texts, if it has several.

        Args:
            inputs: what the preprocessor returns. At least one.

        Raises:
            FloatingPointError: a feature is not finite.
            ValueError: the graph's output cannot be pooled to one vector for each row.
        """
        values = [separated(value) for value in inputs]
        flat = [one for several in values for one in several]
        order = sorted(range(len(flat)), key=lambda row: flat[row].shape[-1])  # texts of similar length need least padding
        starts = range(0, len(order), self._max_rows)
        parts = [self._run([flat[row] for row in order[start : start + self._max_rows]]) for start in starts]
        features = np.empty((len(flat), parts[0].shape[1]), dtype=np.float32)
        features[order] = np.concatenate(parts)
        if len(flat) > len(values):
            counts = np.array([len(several) for several in values])
            sums = np.add.reduceat(features, np.cumsum(counts) - counts, axis=0)
            features = np.asarray(sums / counts[:, None], dtype=np.float32)
        if not np.isfinite(features).all():
            raise FloatingPointError("the frozen encoder returned numbers that are not finite")
        return features

    def blank(self, rows: int) -> list[EncoderInput]:
        """Inputs for a self-test: black pictures, or texts as long as the network reads, which take the most memory.

        Args:
            rows: number of inputs. At most those of one run are returned, because more take no more memory.
        """
        rows = min(rows, self._max_rows)
        preprocessing = self.description.preprocessing
        if isinstance(preprocessing, ImagePreprocessing):
            return [np.zeros((3, preprocessing.height, preprocessing.width), dtype=np.uint8)] * rows
        return [np.full(preprocessing.length, preprocessing.pad, dtype=np.int32)] * rows

    def _run(self, inputs: Sequence[EncoderInput]) -> Float32[np.ndarray, "row size"]:
        feed: dict[str, NDArray[Any]]
        mask: NDArray[np.bool_] | None = None
        preprocessing = self.description.preprocessing
        if isinstance(preprocessing, TextPreprocessing):
            feed, mask = _pad(inputs, preprocessing.pad)
        else:
            # In place: a batch takes megabytes.
            pixels = np.stack(inputs).astype(np.float32)
            pixels /= np.float32(255)
            pixels -= np.array(preprocessing.mean, dtype=np.float32)[:, None, None]
            pixels /= np.array(preprocessing.std, dtype=np.float32)[:, None, None]
            feed = {self._inputs[0]: pixels}
        session = self.session
        if self._fixed:
            size = next(size for size in self._fixed if size >= len(inputs))
            session = self._fixed[size]
            feed = {
                name: np.concatenate([rows, np.repeat(rows[:1], size - len(inputs), axis=0)]) for name, rows in feed.items()
            }
        (output,) = session.run([self._output], {name: feed[name] for name in self._inputs})
        features = self._pool(np.asarray(output)[: len(inputs)], mask)
        if self.description.normalize:
            features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.float32(1e-12))
        return np.asarray(features, dtype=np.float32)

    def _pool(self, output: NDArray[np.floating], mask: NDArray[np.bool_] | None) -> NDArray[np.floating]:
        pooling = self.description.pooling
        if pooling == "none" and output.ndim == 2:
            return output
        if output.ndim == 4:
            output = output.reshape(*output.shape[:2], -1).transpose(0, 2, 1)  # height and width are positions
        if pooling == "none" or output.ndim != 3:
            raise ValueError(
                f"the graph's output has the shape {list(output.shape)} with pooling {pooling!r}: a vector for each row needs "
                'pooling = "none" with (batch, size), or "mean" or "first" with more axes'
            )
        if pooling == "first":
            return np.asarray(output[:, 0])
        if mask is None:
            return np.asarray(output.mean(axis=1))
        weights = mask[:, :, None].astype(np.float32)
        return np.asarray((output * weights).sum(axis=1) / weights.sum(axis=1))


def open_files(files: EncoderFiles, device: Device, threads: int) -> FrozenEncoder:
    """Open the files of an encoder.

    Raises:
        ValueError: as ``FrozenEncoder``, or ONNX Runtime cannot load the graph.
    """

    def session() -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return onnxruntime.InferenceSession(
                files.graph.read_bytes(), options, providers=device.providers, enable_fallback=0
            )
        except Exception as error:  # the exception classes of ONNX Runtime are private
            raise ValueError(f"ONNX Runtime cannot load the graph ({error})") from error

    tokenizer = None if files.tokenizer is None else files.tokenizer.read_bytes()
    return FrozenEncoder(files.description, session, tokenizer, encoder_sizes(device))


def encoder_sizes(device: Device) -> tuple[int, ...]:
    """Return the sizes at which frozen encoders run on a device, see ``FrozenEncoder``."""
    return (CPU_ROWS,) if device.is_cpu else GPU_SIZES


def run_once(graph: Path, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Outputs of a graph on the CPU.

    Args:
        feed: values by name. Those that the graph does not have are left out.
    """
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})
    return outputs


def _pad(inputs: Sequence[EncoderInput], pad: int) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.bool_]]:
    """Tokens of equal length with their mask, by name of the graph's input, and the mask."""
    longest = max(len(tokens) for tokens in inputs)
    ids = np.full((len(inputs), longest), pad, dtype=np.int64)
    mask = np.zeros((len(inputs), longest), dtype=bool)
    for row, tokens in enumerate(inputs):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return {TOKENS: ids, MASK: mask.astype(np.int64), TOKEN_TYPES: np.zeros_like(ids)}, mask


def _check_inputs(description: EncoderDescription, session: onnxruntime.InferenceSession) -> list[str]:
    """Names of the graph's inputs.

    Raises:
        ValueError: they cannot be fed.
    """
    inputs = {value.name: (value.type, list(value.shape)) for value in session.get_inputs()}
    shown = ", ".join(f"{name}: {kind}{shape}" for name, (kind, shape) in inputs.items())
    preprocessing = description.preprocessing
    if isinstance(preprocessing, ImagePreprocessing):
        kind, shape = next(iter(inputs.values()))
        wanted = (3, preprocessing.height, preprocessing.width)
        fits = len(inputs) == 1 and len(shape) == 4 and kind == "tensor(float)"
        fits = fits and all(isinstance(size, str) or size in (None, want) for size, want in zip(shape[1:], wanted, strict=True))
        expected = f"one input, float32 (batch, 3, {preprocessing.height}, {preprocessing.width})"
    else:
        fits = TOKENS in inputs and set(inputs) <= set(_TEXT_INPUTS)
        fits = fits and all(kind == "tensor(int64)" and len(shape) == 2 for kind, shape in inputs.values())
        expected = f"the inputs {', '.join(_TEXT_INPUTS)} or the first of them, int64 (batch, tokens)"
    if not fits:
        raise ValueError(f"the graph has the inputs {shown}; an encoder of {preprocessing.kind}s has {expected}")
    for name, (_, shape) in inputs.items():
        dynamic = shape[:1] if isinstance(preprocessing, ImagePreprocessing) else shape
        if any(isinstance(size, int) for size in dynamic):
            axes = "batch axis" if isinstance(preprocessing, ImagePreprocessing) else "axes of batch and tokens"
            raise ValueError(f"the graph's input {name} has the fixed shape {shape}: export it with a dynamic {axes}")
    return list(inputs)
