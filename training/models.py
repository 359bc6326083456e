"""The models that a configuration can name."""

from concord.training.baselines.contrastive import Contrastive
from concord.training.baselines.jmvae import JMVAE
from concord.training.baselines.jnf import JNF
from concord.training.baselines.mmvae import MMVAE
from concord.training.baselines.mopoe import MoPoE
from concord.training.baselines.mvae import MVAE
from concord.training.baselines.mvtcae import MVTCAE
from concord.training.concord import Concord
from concord.training.config import Model
from concord.training.trainable import TrainableModel

MODELS: dict[Model, type[TrainableModel]] = {
    "concord": Concord,
    "jmvae": JMVAE,
    "mvae": MVAE,
    "mmvae": MMVAE,
    "mopoe": MoPoE,
    "mvtcae": MVTCAE,
    "jnf": JNF,
    "contrastive": Contrastive,
}
