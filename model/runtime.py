"""A bundle opened in ONNX Runtime: encode, refine, draw, decode on NumPy arrays. Needs no torch."""

import io
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
from jaxtyping import Bool, Float32, Shaped

from model import bundle
from model.branching import branch_absent
from model.modality import Modality
from model.skipping import skip_absent

VERSION: str = onnxruntime.__version__
"""Of ONNX Runtime."""
Device = Literal["auto", "cpu", "cuda"]
Inputs = Mapping[str, Shaped[np.ndarray, "batch ..."]]


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over z for each row. ``log_var`` is the natural logarithm of the variance."""

    mean: Float32[np.ndarray, "batch latent"]
    log_var: Float32[np.ndarray, "batch latent"]


class _CudaError(bundle.BundleError):
    """CUDA is installed and does not start."""


class Runtime:
    """The graphs of one bundle. Calls are stateless and thread-safe; rows of a batch never affect each other.

    Args:
        opened: a verified bundle.
        device: ``cpu``; ``cuda``, which fails where it cannot be had; or ``auto``, CUDA where it can be had, else the CPU.
        threads: of each operator on the CPU. 0: one for each core this process may use.

    Raises:
        bundle.BundleError: a graph that ONNX Runtime refuses, or CUDA asked for and absent.
    """

    def __init__(self, opened: bundle.Bundle, *, device: Device = "cpu", threads: int = 0) -> None:
        manifest = opened.manifest
        self.bundle = opened
        self.modalities: tuple[Modality, ...] = tuple(manifest.modalities)
        self.latent = manifest.latent
        self.samples = manifest.refinement.samples
        self.device = _choose_device(device)
        try:
            self._open_all(threads)
        except _CudaError as error:
            if device != "auto":
                raise
            logging.getLogger(__name__).warning("%s; running on the CPU", error)
            self.device = "cpu"
            self._open_all(threads)

    @classmethod
    def load(cls, path: Path, *, device: Device = "cpu", threads: int = 0) -> "Runtime":
        """Verify the bundle in ``path`` and open it."""
        return cls(bundle.read(path), device=device, threads=threads)

    def encode(self, inputs: Inputs, present: Bool[np.ndarray, "batch modality"]) -> Posterior:
        """Aligned posterior q(z | x_S) of each row, S being the modalities that ``present`` marks.

        Args:
            inputs: every modality's array (batch, *shape); what stands in absent slots is never read.
            present: columns in the order of ``self.modalities``; at least one true a row.
        """
        mean, log_var = self._encode.run(["mean", "log_var"], {**inputs, "present": present})
        return Posterior(mean, log_var)

    def refine(
        self,
        inputs: Inputs,
        present: Bool[np.ndarray, "batch modality"],
        posterior: Posterior,
        anchor: Posterior,
        noise: Float32[np.ndarray, "batch sample latent"],
    ) -> tuple[Posterior, Float32[np.ndarray, " batch"]]:
        """One refinement step of each row, and the objective at the posterior that came in.

        The objective is E_q[sum over present m of w_m log p(x_m | z)] - beta KL(q || anchor), in weighted nats, estimated with
        ``noise``. With every modality present and the prior N(0, I) as anchor it is the multimodal ELBO; with some missing,
        anchor the posterior to where it started.

        Args:
            noise: standard normal, (batch, self.samples, latent). Kept fixed over steps, objectives can be compared.
        """
        feed = {
            **inputs,
            "present": present,
            "mean": posterior.mean,
            "log_var": posterior.log_var,
            "anchor_mean": anchor.mean,
            "anchor_log_var": anchor.log_var,
            "noise": noise,
        }
        mean, log_var, objective = self._refine.run(["next_mean", "next_log_var", "objective"], feed)
        return Posterior(mean, log_var), objective

    def draw(self, posterior: Posterior, noise: Float32[np.ndarray, "batch latent"]) -> Float32[np.ndarray, "batch latent"]:
        """One sample of each row's posterior, aligned or refined, from standard normal noise: of the Gaussian, or through the
        bundle's flow."""
        if self._draw is None:
            return np.asarray(posterior.mean + np.exp(posterior.log_var / 2) * noise)
        feed = {"mean": posterior.mean, "log_var": posterior.log_var, "noise": noise}
        return np.asarray(self._draw.run(["z"], feed)[0])

    def decode(self, modality: str, z: Float32[np.ndarray, "batch latent"]) -> Shaped[np.ndarray, "batch ..."]:
        """What the decoder expects of one modality: image in [0, 1], vector, attribute probabilities, or for text the
        logarithm of each character's probability, (batch, length, alphabet)."""
        return np.asarray(self._decode[modality].run(["value"], {"z": z})[0])

    def replay_golden(self, tolerance: float = 1e-3) -> float:
        """Run the bundle's golden examples and compare with the answers of the export.

        Returns:
            the largest difference, each relative to the largest value of its answer.

        Raises:
            bundle.BundleError: the difference exceeds ``tolerance``: this machine computes something else than the exporter.
        """
        with np.load(io.BytesIO(self.bundle.content(bundle.GOLDEN)), allow_pickle=False) as archive:
            golden = {key: archive[key] for key in archive.files}
        inputs = {m.name: golden[f"input.{m.name}"] for m in self.modalities}
        encoded = self.encode(inputs, golden["present"])
        start = Posterior(golden["mean"], golden["log_var"])
        anchor = Posterior(golden["anchor_mean"], golden["anchor_log_var"])
        refined, objective = self.refine(inputs, golden["present"], start, anchor, golden["noise"])
        answers: dict[str, np.ndarray[Any, Any]] = {
            "mean": encoded.mean,
            "log_var": encoded.log_var,
            "next_mean": refined.mean,
            "next_log_var": refined.log_var,
            "objective": objective,
            **({"drawn": self.draw(start, golden["noise"][:, 0])} if "drawn" in golden else {}),
            **{f"value.{m.name}": self.decode(m.name, golden["mean"]) for m in self.modalities},
        }
        differences = [
            np.max(np.abs(answer - golden[key])) / max(1.0, float(np.max(np.abs(golden[key]))))
            for key, answer in answers.items()
        ]
        difference = float(np.max(differences))  # Python's max would pass over a NaN
        if not difference <= tolerance:  # NaN must fail too
            raise bundle.BundleError(
                f"{self.bundle.path}: golden examples differ by {difference:.2g} (allowed {tolerance:g}) on {self.device}"
            )
        return difference

    def _open_all(self, threads: int) -> None:
        graphs = self.bundle.manifest.graphs
        options = onnxruntime.SessionOptions()
        # ONNX Runtime's own default counts the host's cores, not those that a container may use.
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Left to find the weights itself, it maps the file, and dies when somebody cuts that short.
        weights = self.bundle.content(bundle.WEIGHTS)
        options.add_external_initializers_from_files_in_memory([bundle.WEIGHTS], [weights], [len(weights)])
        names = [m.name for m in self.modalities]
        self._encode = self._open(graphs.encode, options, lambda graph: skip_absent(graph, names))
        self._refine = self._open(graphs.refine, options, lambda graph: branch_absent(graph, weights, names))
        self._draw = self._open(graphs.draw, options) if graphs.draw else None
        self._decode = {name: self._open(file, options) for name, file in graphs.decode.items()}

    def _open(
        self, name: str, options: onnxruntime.SessionOptions, for_cpu: Callable[[bytes], bytes] = lambda graph: graph
    ) -> onnxruntime.InferenceSession:
        """A session of one graph.

        Args:
            for_cpu: changes the graph. Not on a GPU, which what depends on the data would hold up.
        """
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if self.device == "cuda" else ["CPUExecutionProvider"]
        try:
            content = self.bundle.content(name)
            if self.device == "cpu":
                content = for_cpu(content)
            session = onnxruntime.InferenceSession(content, options, providers=providers)
        except bundle.BundleError:
            raise
        except Exception as error:  # ONNX Runtime's own exception classes are private
            raise bundle.BundleError(
                f"{self.bundle.path / name}: ONNX Runtime refuses the graph ({type(error).__name__}: {error})"
            ) from error
        if session.get_providers()[0] != providers[0]:
            raise _CudaError(f"ONNX Runtime could not start {providers[0]}: its CUDA libraries or the driver are missing")
        return session


def _choose_device(device: Device) -> Literal["cpu", "cuda"]:
    available = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if available and device != "cpu":
        onnxruntime.preload_dlls()  # CUDA and cuDNN come as wheels beside this package
    if device == "cuda" and not available:
        raise bundle.BundleError(
            "CUDA was asked for, and this installation of ONNX Runtime has only "
            f"{onnxruntime.get_available_providers()}. Install the gpu extra, or choose device cpu or auto"
        )
    return "cuda" if available and device != "cpu" else "cpu"
