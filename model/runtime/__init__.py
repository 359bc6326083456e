"""A bundle in ONNX Runtime: encode, refine, sample and decode NumPy arrays, without torch."""

import functools
import io
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from jaxtyping import Bool, Float32, Int64, Shaped
from numpy.typing import NDArray

from concord.model import bundle, codec
from concord.model.bundle.manifest import graph_input
from concord.model.codec import Preprocessor, standardise
from concord.model.codec.frozen import EncoderInput
from concord.model.gallery import Gallery
from concord.model.modality import EncodedModality, Modality, TextModality
from concord.model.runtime.bound_run import can_capture
from concord.model.runtime.branch_absent import branch_absent
from concord.model.runtime.device import ERRORS, CudaError, Device, choose_device
from concord.model.runtime.fixed_batches import FixedBatches, batch_sizes
from concord.model.runtime.frozen import FrozenEncoder, encoder_sizes
from concord.model.runtime.refinement_table import ANCHOR, POSTERIOR, RESULT, SLOTS, RefinementTable, table, with_tables
from concord.model.runtime.skip_absent import skip_absent
from concord.model.token_sampling import NextToken, sample_tokens, token_log_probabilities

VERSION: str = onnxruntime.__version__
"""Version of ONNX Runtime."""
STEP_ROWS = 16
"""Rows of a refinement step on each thread of a CPU. More take as long for each row, and keep more memory."""
Inputs = Mapping[str, Shaped[np.ndarray, "batch ..."]]


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian over z for each row: mean and natural logarithm of the variance, each (batch, latent)."""

    mean: Float32[np.ndarray, "batch latent"]
    log_var: Float32[np.ndarray, "batch latent"]

    @property
    def parameters(self) -> Float32[np.ndarray, "batch parameters"]:
        """Mean and log variance in one row, (batch, 2 · latent)."""
        return np.concatenate([self.mean, self.log_var], axis=1)


class Runtime:
    """The graphs of one bundle. Methods are stateless and thread-safe, but a refinement table belongs to one thread.

    Rows of a batch do not affect each other.

    Args:
        opened: a verified bundle.
        device: ``cpu``, ``cuda``, ``cuda:N`` for the GPU with number N, or ``auto``: CUDA if it runs one row, else the CPU.
        threads: CPU threads of one operator. 0: as ``Device.threads`` chooses.
        gpu_memory_mb, tf32, cuda_graphs: as in ``Device``.
        max_batch: most rows of one run that are usual.
        fixed_batches: whether graphs run at the sizes ``batch_sizes(max_batch)`` only. None: on a GPU.

    Raises:
        bundle.BundleError: ONNX Runtime cannot load a graph, ``cuda`` is not available, or a modality needs a package that is
            not installed; or a gallery is damaged.

    Attributes:
        galleries: training examples by modality.
    """

    def __init__(
        self,
        opened: bundle.Bundle,
        *,
        device: str = "cpu",
        threads: int = 0,
        gpu_memory_mb: int = 0,
        tf32: bool = False,
        cuda_graphs: bool = False,
        max_batch: int = 64,
        fixed_batches: bool | None = None,
    ) -> None:
        manifest = opened.manifest
        try:
            codec.check_installed(manifest.modalities)
        except ImportError as error:
            raise bundle.BundleError(f"{opened.path}: {error}") from error
        self.bundle = opened
        self.modalities: tuple[Modality, ...] = tuple(manifest.modalities)
        self._sequences = {
            m.name: m for m in self.modalities if isinstance(m, TextModality) and m.likelihood == "autoregressive"
        }
        self.latent = manifest.latent
        self.galleries = self._open_galleries()
        self.noise_samples = manifest.refinement.samples
        self.device = choose_device(device, memory_mb=gpu_memory_mb, tf32=tf32, graphs=cuda_graphs)
        self._max_batch, self._fixed_batches = max_batch, fixed_batches
        try:
            self._open_graphs(threads)
            if device == "auto" and not self.device.is_cpu:
                self._try_device()
        except CudaError as error:
            if device != "auto":
                raise
            logging.getLogger(__name__).warning("%s; using the CPU instead", error)
            self.device = Device()
            self._open_graphs(threads)

    @classmethod
    def load(cls, path: Path, **options: Any) -> "Runtime":
        """Read and verify the bundle in the folder ``path``, then open it with the keyword arguments of ``Runtime``.

        Raises:
            bundle.BundleError: as ``bundle.read`` and ``Runtime``.
        """
        return cls(bundle.read(path), **options)

    @property
    def preprocessors(self) -> dict[str, Preprocessor]:
        """Of the modalities with a frozen encoder, by modality."""
        return {name: encoder.preprocessor for name, encoder in self.encoders.items()}

    def features(self, modality: str, inputs: Sequence[EncoderInput]) -> Float32[np.ndarray, "batch size"]:
        """Standardised feature vectors of a modality with a frozen encoder, as ``encode`` takes them.

        Args:
            inputs: what the preprocessor of the modality returns. At least one.
        """
        (described,) = (m for m in self.modalities if m.name == modality)
        assert isinstance(described, EncodedModality)
        return standardise(described, self.encoders[modality].features(inputs).astype(np.float64))

    def encode(self, inputs: Inputs, present: Bool[np.ndarray, "batch modality"]) -> Posterior:
        """Aligned posterior q(z | x_S) of each row. S is the set of modalities that the row has.

        Args:
            inputs: array (batch, *shape) of every modality by name. Values of absent modalities have no effect.
            present: mask (batch, modality), columns in the order of ``self.modalities``. At least one is true per row.
        """
        mean, log_var = self._encode.run(["mean", "log_var"], {**_feed(inputs), "present": present})
        return Posterior(mean, log_var)

    def refine(
        self,
        inputs: Inputs,
        present: Bool[np.ndarray, "batch modality"],
        posterior: Posterior,
        anchor: Posterior,
        noise: Float32[np.ndarray, "batch sample latent"],
    ) -> tuple[Posterior, Float32[np.ndarray, " batch"]]:
        """One refinement step of each row.

        The objective is E_q[sum over present m of w_m log p(x_m | z)] - beta KL(q || anchor), in weighted nats, estimated with
        ``noise``. With all modalities present and the prior N(0, I) as anchor it is the multimodal ELBO.

        Args:
            inputs, present: as ``encode``.
            posterior: q at the start of the step.
            anchor: the prior for complete rows; for incomplete rows the posterior before the first step.
            noise: standard normal. Use the same noise in every step, so that the objectives can be compared.

        Returns:
            the next posterior, and the objective of ``posterior`` (not of the next one), (batch,), to be maximised.
        """
        rows = len(present)
        slots = np.arange(rows) % (self.batch_sizes[-1] if self._is_fixed else rows)  # of its batch
        feed = {**self.table_rows(inputs, present, posterior.parameters, anchor.parameters, noise), SLOTS: slots}
        (result,) = self._refine.run([RESULT], feed)
        return Posterior(result[:, : self.latent], result[:, self.latent : -1]), result[:, -1]

    def table_rows(
        self,
        inputs: Inputs,
        present: Bool[np.ndarray, "batch modality"],
        posterior: Float32[np.ndarray, "batch parameters"],
        anchor: Float32[np.ndarray, "batch parameters"],
        noise: Float32[np.ndarray, "batch sample latent"],
    ) -> dict[str, Shaped[np.ndarray, "batch ..."]]:
        """Return the arguments of ``refine`` by the name of their table.

        Args:
            posterior, anchor: mean and log variance in one row, (batch, 2 · latent).
        """
        return {
            **{table(name): array for name, array in _feed(inputs).items()},
            table("present"): present,
            table("noise"): noise,
            POSTERIOR: posterior,
            ANCHOR: anchor,
        }

    def refinement_table(self, capacity: int) -> RefinementTable:
        """Return an empty table for ``capacity`` rows under refinement, whose arrays ``table_rows`` returns."""
        file = self.bundle.manifest.graphs.refine
        fixed = self.fixed_graphs.get(file)
        return RefinementTable(self._sessions[file], self.device, capacity, fixed, capture=file in self.captured_graphs)

    def step(
        self, held: RefinementTable, slots: Sequence[int]
    ) -> tuple[Float32[np.ndarray, "batch parameters"], Float32[np.ndarray, " batch"]]:
        """``refine`` for rows of a table, see ``RefinementTable.step``."""
        return held.step(slots)

    def sample(self, posterior: Posterior, noise: Float32[np.ndarray, "batch latent"]) -> Float32[np.ndarray, "batch latent"]:
        """One sample z of each row's posterior, aligned or refined: through the bundle's flow if there is one, else Gaussian.

        Args:
            noise: standard normal.
        """
        if self._sample is None:
            return np.asarray(posterior.mean + np.exp(posterior.log_var / 2) * noise)
        feed = {"mean": posterior.mean, "log_var": posterior.log_var, "noise": noise}
        return np.asarray(self._sample.run(["z"], feed)[0])

    def decode(self, modality: str, z: Float32[np.ndarray, "batch latent"]) -> Shaped[np.ndarray, "batch ..."]:
        """Expected value of one modality given z.

        Returns:
            image (batch, channels, height, width) in [0, 1]; vector (batch, size), standardised; probabilities of attributes
            (batch, size) or classes (batch, class); log-probabilities of text tokens (batch, length, token); with the
            ``autoregressive`` likelihood ids of text tokens (batch, length), each the most likely one.
        """
        if modality in self._sequences:
            zeros = np.zeros(len(z), np.float32)
            return self.sample_text(modality, z, np.zeros((len(z), self._sequences[modality].length), np.float32), zeros, zeros)
        return np.asarray(self._decode[modality].run(["value"], {"z": z})[0])

    def sample_text(
        self,
        modality: str,
        z: Float32[np.ndarray, "batch latent"],
        noise: Float32[np.ndarray, "batch length"],
        temperature: Float32[np.ndarray, " batch"],
        top_p: Float32[np.ndarray, " batch"],
    ) -> Int64[np.ndarray, "batch length"]:
        """Token ids of one text for each z. The modality is one of ``autoregressive``.

        Args:
            noise, temperature, top_p: as ``token_sampling.sample_tokens``.

        Raises:
            FloatingPointError: the decoder returned NaN.
        """
        return sample_tokens(self._sequences[modality], self._next_token(modality, z), noise, temperature, top_p)

    @property
    def autoregressive(self) -> Mapping[str, TextModality]:
        """Texts with the autoregressive likelihood, by name."""
        return self._sequences

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes at which memory is allocated and kernels are prepared: all of them if they are fixed, else the extremes."""
        return batch_sizes(self._max_batch) if self._is_fixed else tuple(sorted({1, self._max_batch}))

    def warm_up(self, rows: int) -> None:
        """Run every graph once on blank rows: to allocate memory, and as a self-test that no input can break.

        ``rows`` complete rows of zeros are encoded, refined (at most ``step_rows``), sampled and decoded, and encoded from each
        modality alone: graphs take another path for absent modalities.

        Raises:
            FloatingPointError: a result is not finite.
            Exception: any error of a graph.
        """
        for encoder in dict.fromkeys(self.encoders.values()):  # two modalities may share one
            encoder.features(encoder.blank(rows))
        inputs = {m.name: np.zeros((rows, *m.shape), dtype=m.dtype) for m in self.modalities}
        for unimodal in np.eye(len(self.modalities), dtype=bool):
            _require_finite(self.encode(inputs, np.repeat(unimodal[np.newaxis], rows, axis=0)))
        present = np.ones((rows, len(self.modalities)), dtype=bool)
        posterior = _require_finite(self.encode(inputs, present))
        noise = np.zeros((rows, self.noise_samples, self.latent), dtype=np.float32)
        anchor = Posterior(np.zeros_like(posterior.mean), np.zeros_like(posterior.log_var))
        first = slice(0, self.step_rows)
        self.refine(
            {name: array[first] for name, array in inputs.items()},
            present[first],
            Posterior(posterior.mean[first], posterior.log_var[first]),
            Posterior(anchor.mean[first], anchor.log_var[first]),
            noise[first],
        )
        if not np.isfinite(self.sample(posterior, noise[:, 0])).all():
            raise FloatingPointError("samples of the posterior are not finite")
        for modality in self.modalities:
            if np.isnan(self.decode(modality.name, posterior.mean)).any():
                raise FloatingPointError(f"the decoder of {modality.name} returned NaN")

    def blank_step(self, rows: int) -> Callable[[], object]:
        """Return a function that runs one refinement step of complete rows of zeros in a table, to be timed."""
        inputs = {m.name: np.zeros((rows, *m.shape), dtype=m.dtype) for m in self.modalities}
        present = np.ones((rows, len(self.modalities)), dtype=bool)
        posterior = np.zeros((rows, 2 * self.latent), dtype=np.float32)
        noise = np.zeros((rows, self.noise_samples, self.latent), dtype=np.float32)
        held = self.refinement_table(rows)
        slots = held.take(self.table_rows(inputs, present, posterior, posterior, noise))
        return lambda: self.step(held, slots)

    def nodes_by_provider(self) -> dict[str, Counter[str]]:
        """Return the number of nodes that each execution provider runs, by graph file."""
        return {
            file: Counter(part.ep_name for part in session.get_provider_graph_assignment_info() for _ in part.get_nodes())
            for file, session in self._sessions.items()
        }

    def replay_golden(self, tolerance: float | None = None) -> float:
        """Run the bundle's golden examples and compare the outputs with those of the PyTorch model at export.

        Args:
            tolerance: largest allowed difference, relative as below. None: that of the device.

        Returns:
            the largest absolute difference of any output, divided by the largest absolute value of that output (at least 1).

        Raises:
            bundle.BundleError: the difference exceeds ``tolerance``, so this machine computes other results than the exporter,
                or a graph no longer runs on the device.
        """
        tolerance = self.device.tolerance if tolerance is None else tolerance
        self._require_device()
        with np.load(io.BytesIO(self.bundle.content(bundle.GOLDEN)), allow_pickle=False) as archive:
            golden = {key: archive[key] for key in archive.files}
        inputs = {m.name: golden[f"input.{m.name}"] for m in self.modalities}
        encoded = self.encode(inputs, golden["present"])
        start = Posterior(golden["mean"], golden["log_var"])
        anchor = Posterior(golden["anchor_mean"], golden["anchor_log_var"])
        refined, objective = self.refine(inputs, golden["present"], start, anchor, golden["noise"])
        outputs: dict[str, np.ndarray[Any, Any]] = {
            "mean": encoded.mean,
            "log_var": encoded.log_var,
            "next_mean": refined.mean,
            "next_log_var": refined.log_var,
            "objective": objective,
            **({"drawn": self.sample(start, golden["noise"][:, 0])} if "drawn" in golden else {}),
            **{f"value.{m.name}": self._golden_value(m.name, golden) for m in self.modalities},
            **self._golden_features(golden),
        }
        differences = [
            np.max(np.abs(output - golden[key])) / max(1.0, float(np.max(np.abs(golden[key]))))
            for key, output in outputs.items()
        ]
        difference = float(np.max(differences))  # NaN if any is NaN, unlike Python's max
        if not difference <= tolerance:  # NaN must fail too
            raise bundle.BundleError(
                f"{self.bundle.path}: golden examples differ by {difference:.2g} (allowed {tolerance:g}) on {self.device}. "
                "Use the versions of ONNX Runtime and concord that exported the bundle, or export it again"
            )
        return difference

    def _next_token(self, modality: str, z: Float32[np.ndarray, "batch latent"]) -> NextToken:
        """The graph of one token, with its state."""
        graph, state = self._decode[modality], np.zeros((len(z), *self._state_shapes[modality]), np.float32)

        def next_token(previous: NDArray[Any], position: int) -> NDArray[Any]:
            nonlocal state
            feed = {"z": z, "token": previous, "position": np.full(len(z), position, np.int64), "state": state}
            scores, state = graph.run(["log_probabilities", "next_state"], feed)
            return np.asarray(scores)

        return next_token

    def _golden_value(self, modality: str, golden: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """What the golden examples have as ``value.<modality>``."""
        if modality not in self._sequences:
            return self.decode(modality, golden["mean"])
        return token_log_probabilities(
            self._sequences[modality], self._next_token(modality, golden["mean"]), golden[f"input.{modality}"]
        )

    @property
    def _encoded(self) -> list[EncodedModality]:
        return [modality for modality in self.modalities if isinstance(modality, EncodedModality)]

    def _golden_features(self, golden: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Features of the golden files, see ``bundle.GOLDEN_FILE``."""
        features = {}
        for modality in {m.encoder: m for m in self._encoded}.values():
            encoder, name = self.encoders[modality.name], f"{bundle.GOLDEN_FILE}.{modality.encoder}"
            files = [golden[key].tobytes() for key in sorted(golden) if key.rpartition(".")[0] == name]
            inputs = [encoder.preprocessor.golden_input(content) for content in files]
            features[f"features.{modality.encoder}"] = encoder.features(inputs)
        return features

    def _open_galleries(self) -> dict[str, Gallery]:
        """Training examples by modality."""
        galleries = {}
        for name, facts in self.bundle.manifest.galleries.items():
            try:
                gallery = Gallery.from_bytes(self.bundle.content(facts.file), self.latent)
            except ValueError as error:
                raise bundle.BundleError(f"{self.bundle.path / facts.file}: {error}") from error
            if (len(gallery.ids), gallery.has_values) != (facts.rows, facts.values):
                raise bundle.BundleError(f"{self.bundle.path / facts.file}: does not fit the manifest. Export the bundle again")
            galleries[name] = gallery
        return galleries

    def _open_graphs(self, threads: int) -> None:
        graphs = self.bundle.manifest.graphs
        options = onnxruntime.SessionOptions()
        # ONNX Runtime's default counts the cores of the host, not those that a container may use.
        threads = self.device.threads(threads, len(graphs.names) + len(self.bundle.manifest.encoders))
        options.intra_op_num_threads = threads
        self.step_rows = min(self._max_batch, STEP_ROWS * threads) if self.device.is_cpu else self._max_batch
        """Most rows of one refinement step that are usual."""
        options.inter_op_num_threads = 1
        # On a CPU, where batches have any size, the plans for all sizes together would keep more memory and save no time.
        options.enable_mem_pattern = not self.device.is_cpu
        if self.device.is_cpu:
            _register_shared_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
        else:
            options.log_severity_level = ERRORS
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # for ``nodes_by_provider``
        # Otherwise ONNX Runtime maps the weights file, and the process dies if that file is truncated.
        weights = self.bundle.content(bundle.WEIGHTS)
        options.add_external_initializers_from_files_in_memory([bundle.WEIGHTS], [weights], [len(weights)])
        names = [graph_input(m.name) for m in self.modalities]
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}
        self.captured_graphs: set[str] = set()
        """Files of the graphs whose runs are captured as CUDA graphs."""
        self.fixed_graphs: dict[str, FixedBatches] = {}
        """The graphs that run at fixed batch sizes, by file, with the numbers of their runs and padding rows."""
        self._encode = self._open_graph(graphs.encode, options, lambda graph: skip_absent(graph, names))
        tables = [table(name) for name in names]
        self._refine = self._open_graph(
            graphs.refine, options, lambda graph: branch_absent(graph, weights, tables), first=with_tables
        )
        self._sample = self._open_graph(graphs.draw, options) if graphs.draw else None
        self._decode = {name: self._open_graph(file, options) for name, file in graphs.decode.items()}
        self._state_shapes = {
            name: next(value.shape[1:] for value in self._sessions[graphs.decode[name]].get_inputs() if value.name == "state")
            for name in self._sequences
        }
        shared = {m.encoder: self._open_encoder(m.encoder, options) for m in self._encoded}
        self.encoders = {m.name: shared[m.encoder] for m in self._encoded}

    @property
    def _is_fixed(self) -> bool:
        return not self.device.is_cpu if self._fixed_batches is None else self._fixed_batches

    def _open_graph(self, name: str, *arguments: Any, **passes: Any) -> "FixedBatches | onnxruntime.InferenceSession":
        """Open a session, see ``_open_session``, and keep it by its file."""
        capture = self.device.graphs and self._is_fixed
        session = self._sessions[name] = self._open_session(name, *arguments, **passes, capture=capture)
        if not self._is_fixed:
            return session
        capture_on = self.device if name in self.captured_graphs else None
        graph = self.fixed_graphs[name] = FixedBatches(session, self.batch_sizes, capture_on=capture_on)
        return graph

    def _open_encoder(self, name: str, options: onnxruntime.SessionOptions) -> FrozenEncoder:
        encoder = self.bundle.manifest.encoders[name]
        tokenizer = None if encoder.tokenizer is None else self.bundle.content(encoder.tokenizer)

        def open_session() -> onnxruntime.InferenceSession:
            session = self._sessions[encoder.graph] = self._open_session(encoder.graph, options)
            return session

        try:
            return FrozenEncoder(encoder, open_session, tokenizer, encoder_sizes(self.device))
        except ValueError as error:
            raise bundle.BundleError(f"{self.bundle.path / encoder.graph}: {error}") from error

    def _open_session(
        self,
        name: str,
        options: onnxruntime.SessionOptions,
        cpu_pass: Callable[[bytes], bytes] = lambda graph: graph,
        *,
        first: Callable[[bytes], bytes] = lambda graph: graph,
        capture: bool = False,
    ) -> onnxruntime.InferenceSession:
        """A session of one graph.

        Args:
            cpu_pass: graph pass for the CPU. It is not used on a GPU, because sizes and branches that depend on data force the
                GPU to wait for the CPU.
            first: graph pass before that, on every device.
            capture: open it for CUDA graphs if possible. All runs must then be bound: others would replay the wrong graph.
        """
        try:
            content = first(self.bundle.content(name))
            if self.device.is_cpu:
                content = cpu_pass(content)
            elif capture and can_capture(content):
                captured = self._open_capturing(name, content, options)
                if captured is not None:
                    return captured
            # With its fallback, ONNX Runtime would replace the session by one on the CPU after an error, for good and silently.
            session = onnxruntime.InferenceSession(content, options, providers=self.device.providers, enable_fallback=0)
        except bundle.BundleError:
            raise
        except Exception as error:  # the exception classes of ONNX Runtime are private
            message = f"{self.bundle.path / name}: ONNX Runtime cannot load the graph ({type(error).__name__}: {error})"
            raise (bundle.BundleError if self.device.is_cpu else CudaError)(message) from error
        if not self._is_on_device(session):
            raise CudaError("ONNX Runtime could not start CUDAExecutionProvider: its CUDA libraries or the driver are missing")
        return session

    def _open_capturing(
        self, name: str, content: bytes, options: onnxruntime.SessionOptions
    ) -> onnxruntime.InferenceSession | None:
        """A session whose runs are captured as CUDA graphs. None if ONNX Runtime refuses, as for a node on the CPU."""
        try:
            session = onnxruntime.InferenceSession(
                content, options, providers=self.device.capturing_providers, enable_fallback=0
            )
        except Exception as error:  # the exception classes of ONNX Runtime are private
            logging.getLogger(__name__).warning("%s runs without CUDA graphs: %s", self.bundle.path / name, error)
            return None
        if not self._is_on_device(session):
            return None
        self.captured_graphs.add(name)
        return session

    def _is_on_device(self, session: onnxruntime.InferenceSession) -> bool:
        return bool(session.get_providers()[0] == f"{self.device.kind.upper()}ExecutionProvider")

    def _require_device(self) -> None:
        if not all(map(self._is_on_device, self._sessions.values())):
            raise bundle.BundleError(f"{self.bundle.path}: a graph runs on another device than {self.device}")

    def _try_device(self) -> None:
        """Run one row: some libraries of CUDA are looked for at the first run only."""
        try:
            self.warm_up(1)
        except Exception as error:
            raise CudaError(f"the graphs open on {self.device} and do not run there ({error})") from error


@functools.cache
def _register_shared_arena() -> None:
    """Register one memory arena for all graphs of this process. Otherwise each graph keeps what it needed at most, and they
    run one after the other."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    strategy = {"arena_extend_strategy": 1}  # by what is requested, not by powers of two
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(strategy))


def _require_finite(posterior: Posterior) -> Posterior:
    if not (np.isfinite(posterior.mean).all() and np.isfinite(posterior.log_var).all()):
        raise FloatingPointError("the encoder returned numbers that are not finite")
    return posterior


def _feed(inputs: Inputs) -> Inputs:
    return {graph_input(name): array for name, array in inputs.items()}
