"""Every graph run once on rows that nobody sent: to allocate memory before the first request, and to tell a model that fails
from rows that make it fail."""

import numpy as np

from model.runtime import Posterior, Runtime


def exercise(runtime: Runtime, rows: int) -> None:
    """Encode, refine, draw and decode ``rows`` rows of zeros that are complete, and encode them with each modality alone: what
    is absent may go another way through the graph.

    Raises:
        FloatingPointError: an answer that is not finite.
        Exception: whatever a graph raises.
    """
    inputs = {m.name: np.zeros((rows, *m.shape), dtype=m.dtype) for m in runtime.modalities}
    for alone in np.eye(len(runtime.modalities), dtype=bool):
        _encode(runtime, inputs, np.repeat(alone[np.newaxis], rows, axis=0))
    present = np.ones((rows, len(runtime.modalities)), dtype=bool)
    posterior = _encode(runtime, inputs, present)
    noise = np.zeros((rows, runtime.samples, runtime.latent), dtype=np.float32)
    anchor = Posterior(np.zeros_like(posterior.mean), np.zeros_like(posterior.log_var))
    runtime.refine(inputs, present, posterior, anchor, noise)
    if not np.isfinite(runtime.draw(posterior, noise[:, 0])).all():
        raise FloatingPointError("samples of the posterior are numbers that are not finite")
    for modality in runtime.modalities:
        if np.isnan(runtime.decode(modality.name, posterior.mean)).any():
            raise FloatingPointError(f"the decoder of {modality.name} answered with numbers that are not finite")


def _encode(runtime: Runtime, inputs: dict[str, np.ndarray], present: np.ndarray) -> Posterior:
    posterior = runtime.encode(inputs, present)
    if not (np.isfinite(posterior.mean).all() and np.isfinite(posterior.log_var).all()):
        raise FloatingPointError("the encoder answered with numbers that are not finite")
    return posterior
