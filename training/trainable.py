"""The interface of a model that can be trained, evaluated and compared: Concord and the baselines implement it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from concord.model.modality import Modality
from concord.model.vae import gaussian
from concord.model.vae.gaussian import Gaussian
from concord.model.vae.generative import Arrays, Generative
from concord.model.vae.multimodal import MultimodalVAE
from concord.model.vae.networks import NetworkSizes
from concord.training import config
from concord.training.data.dataset import Batch, Dataset
from concord.training.distributed import Noise
from concord.training.posteriors import Posterior, log_prior


class WholeBatch(NamedTuple):
    """The batch that a micro-batch is a part of, for losses that compare rows with each other."""

    batch: Batch
    embeddings: Float[Tensor, "row ..."]
    """Of every row, from ``Stage.embed``, without gradient."""
    micro_batch: slice


@dataclass(frozen=True)
class Stage(ABC):
    """One stage of training: a loss and its settings."""

    name: ClassVar[str]
    settings: config.Stage

    @abstractmethod
    def __call__(self, batch: Batch, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, and figures to log.

        Args:
            batch: rows, the whole batch or a micro-batch.
            noise: random numbers for these rows.

        Returns:
            The scalar to minimise, and scalars in (weighted) nats by name. All are means over the rows, so those of
            micro-batches can be averaged.
        """

    def score(self, loss: Tensor, figures: Mapping[str, Tensor]) -> Tensor:
        """Return the objective by which validation compares weights, from the result of a call. Higher is better."""
        del figures
        return -loss

    def begin(self) -> None:  # noqa: B027 - most stages have nothing to prepare
        """Prepare the model. Called once, before the first step of the stage."""

    def rows(self, data: Dataset) -> Dataset:
        """Return the training rows of this stage. Most stages train on all rows."""
        return data

    @property
    def companion(self) -> "Stage | None":
        """A stage whose loss, on a separate batch, is added to the loss of each step. None: most stages have none."""
        return None

    def embed(self, batch: Batch, noise: Noise) -> Tensor | None:
        """Return what the loss of other rows needs of these rows: an array for each. None: losses of rows are independent."""
        del batch, noise
        return None

    def within(self, whole: WholeBatch) -> "Stage":
        """Return this stage for one micro-batch of a batch. Only for stages with embeddings, see ``embed``.

        The mean of the losses over the micro-batches has the value and the gradient of the loss of the whole batch.
        """
        raise NotImplementedError(f"the loss of {self.name} compares no rows with each other: {len(whole.embeddings)} rows")


class TrainableModel(Generative, ABC):
    """A generative model with posteriors of subsets and with training stages."""

    refines: ClassVar[bool] = False
    """Whether ``refine_step`` improves a posterior."""
    exportable: ClassVar[bool] = False
    """Whether a bundle can hold the model."""

    @classmethod
    @abstractmethod
    def from_config(cls, modalities: Sequence[Modality], settings: config.Config) -> "TrainableModel":
        """Return an untrained model. Its weights come from torch's global generator."""

    @abstractmethod
    def stages(self, settings: config.Config) -> list[Stage]:
        """Return the stages of training in their order."""

    @abstractmethod
    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        """Return q(z | x_S) for each mask, where S are the modalities that the mask marks in each row.

        The networks of the modalities run once for all masks.
        """

    def joint_posterior(self, arrays: Arrays, present: Bool[Tensor, "batch modality"]) -> Gaussian | None:
        """Return the posterior of the joint encoder that is the teacher in training. None: the model has no teacher."""
        del arrays, present
        return None

    def refine_step(
        self,
        arrays: Arrays,
        present: Bool[Tensor, "batch modality"],
        posterior: Gaussian,
        anchor: Gaussian,
        noise: Float[Tensor, "batch sample latent"],
    ) -> tuple[Gaussian, Float[Tensor, " batch"]]:
        """Return the posterior after one refinement step, and the objective before it.

        A model without a refiner returns the posterior unchanged.
        """
        return posterior, self.objective(arrays, present, posterior, anchor, noise)

    def refinement_path(
        self, batch: Batch, start: Gaussian, anchor: Gaussian, steps: int, samples: int, generator: torch.Generator
    ) -> list[Gaussian]:
        """Return the posteriors lambda_0 ... lambda_steps of refinement, as the service refines.

        A model without a refiner returns lambda_0 only and samples no noise.

        Args:
            batch: rows with the modalities that the refinement may use.
            start: lambda_0.
            anchor: second argument of the KL term: the prior for complete rows, ``start`` for incomplete rows.
            steps: number of steps.
            samples: noise samples, an even number (antithetic pairs), the same for all steps.
            generator: of the noise.
        """
        del batch, anchor, steps, samples, generator
        return [start]

    def sample(self, posterior: Gaussian, noise: Float[Tensor, "batch sample latent"]) -> Float[Tensor, "batch sample latent"]:
        """Return samples of a Gaussian posterior from standard normal noise."""
        return gaussian.sample(posterior, noise)

    def sample_prior(self, noise: Float[Tensor, "row latent"]) -> Float[Tensor, "row latent"]:
        """Return z of new rows of which nothing is known, from standard normal noise."""
        return noise

    def log_prior(self, z: Float[Tensor, "batch sample latent"]) -> Float[Tensor, "batch sample"]:
        """Return the log density of the samples of ``sample_prior``, in nats."""
        return log_prior(z)

    def bundle_model(self) -> MultimodalVAE:
        """Return the networks of the bundle of an exportable model.

        Raises:
            TypeError: the model is not exportable.
        """
        raise TypeError(f"{type(self).__name__} cannot be exported")


def network_sizes(network: config.Network) -> NetworkSizes:
    """Return the sizes of the networks of a model."""
    return NetworkSizes(
        latent=network.latent,
        features=network.features,
        hidden=network.hidden,
        width=network.width,
        blocks=network.blocks,
        shallow=network.encoders == "shallow",
    )
