"""The rivals, on equal terms: same trunks and heads, decoders, latent size, likelihoods, weights, beta, optimiser, seeds and
number of epochs as ours. What differs is the posterior of a subset and the objective, each in a module of its own.
"""

from collections.abc import Callable

from torch import Generator, Tensor

from model.vae.generative import Generative
from training import config
from training.baselines.jmvae import JMVAE
from training.baselines.jnf import JNF
from training.baselines.mmvae import MMVAE
from training.baselines.mopoe import MoPoE
from training.baselines.mvae import MVAE
from training.baselines.mvtcae import MVTCAE
from training.baselines.rival import ExpertRival
from training.data import Batch
from training.stages import Loss, Stage

MODELS: dict[str, type[ExpertRival] | type[JNF]] = {
    "jmvae": JMVAE,
    "mvae": MVAE,
    "mmvae": MMVAE,
    "mopoe": MoPoE,
    "mvtcae": MVTCAE,
    "jnf": JNF,
}


def stages(rival: Generative, settings: config.Config) -> list[Stage]:
    """One stage with the epochs of all of ours; of JNF's two, the joint VAE has half of them and the flows the rest."""
    joint, align, epochs = settings.joint, settings.align, settings.epochs
    if isinstance(rival, JNF):
        first = joint.model_copy(update={"epochs": epochs // 2})
        second = align.model_copy(update={"epochs": epochs - epochs // 2})
        return [Stage("joint", first, _whole(rival.joint_loss)), Stage("flows", second, _whole(rival.flow_loss))]
    assert isinstance(rival, ExpertRival)
    return [Stage("joint", joint.model_copy(update={"epochs": epochs}), _whole(rival.loss))]


def _whole(loss: Callable[[Batch, Generator], tuple[Tensor, dict[str, Tensor]]]) -> Loss:
    return lambda batch, noise: loss(batch, noise.generator)
