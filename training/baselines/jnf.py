"""JNF (Senellart et al. 2023): a joint VAE, frozen, then a conditional normalising flow q(z | x_m) for each modality."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from model.modality import Modality
from model.vae.gaussian import sample, standard_like
from model.vae.generative import Arrays
from model.vae.networks import encoder, initialise
from model.vae.posterior import SetEncoder
from training.baselines.flow import ConditionalFlow
from training.baselines.hmc import hamiltonian
from training.data import Batch
from training.posteriors import GaussianPosterior, Posterior, Rival, log_prior

COUPLINGS = 8
MOVES = 20  # of a chain that samples a product of flows
MEAN_SAMPLES = 4  # a flow's mean has no closed form


class JNF(Rival):
    """Stage 1: the ELBO of the joint encoder. Stage 2: sum_m E_{q(z | X)}[log q(z | x_m)], for the flows alone.

    A complete row is answered by the joint encoder, a single modality by its flow, and what lies between by
    p(z)^(1 - |S|) prod_m q(z | x_m), sampled by Hamiltonian Monte Carlo as in the paper. Flows are affine couplings in place of
    masked autoregressive ones: as quick to sample as to evaluate.
    """

    def __init__(
        self, modalities: Sequence[Modality], *, latent: int, features: int, hidden: int, width: int, beta: float
    ) -> None:
        super().__init__(modalities, latent=latent, beta=beta)
        self.joint = SetEncoder(modalities, latent=latent, features=features, hidden=hidden, width=width)
        self.build_decoders(hidden=hidden, width=width)
        self.trunks = nn.ModuleDict({m.name: encoder(m, features, width) for m in modalities})
        for trunk in self.trunks.values():
            initialise(trunk)
        flow = {"latent": latent, "features": features, "hidden": hidden, "couplings": COUPLINGS}
        self._flows = nn.ModuleDict({m.name: ConditionalFlow(**flow) for m in modalities})

    @property
    def flows(self) -> dict[str, ConditionalFlow]:
        """By modality."""
        return cast(dict[str, ConditionalFlow], dict(self._flows.items()))

    def posteriors(self, arrays: Arrays, masks: Sequence[Bool[Tensor, "batch modality"]]) -> list[Posterior]:
        features = self.joint.features(arrays)
        contexts = {name: trunk(arrays[name]) for name, trunk in self.trunks.items()}
        found: list[Posterior] = []
        for seen in masks:
            joint = GaussianPosterior(self.joint.fuse(features, seen))
            found.append(joint if seen.all() else ProductOfFlows(self.flows, contexts, seen, joint))
        return found

    def joint_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 1."""
        q = self.joint(batch.arrays, batch.present)
        noise = torch.randn(len(batch.present), 1, self.latent, generator=generator)
        elbo = self.objective(batch.arrays, batch.present, q, standard_like(q), noise).mean()
        return -elbo, {"elbo": elbo}

    def flow_loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Stage 2: nothing but trunks and flows learns."""
        with torch.no_grad():
            q = self.joint(batch.arrays, batch.present)
            z = sample(q, torch.randn(len(batch.present), 1, self.latent, generator=generator))
        total = torch.zeros(())
        for index, (name, flow) in enumerate(self.flows.items()):
            context = self.trunks[name](batch.arrays[name]).float()
            with torch.autocast("cpu", enabled=False):  # eight couplings in a row want their digits
                density = flow.log_density(z, context)[:, 0]
            total = total + torch.where(batch.present[:, index], density, torch.zeros_like(density)).mean()
        return -total, {"log_density": total}


class ProductOfFlows:
    """p(z)^(1 - |S|) prod_{m in S} q(z | x_m), S being what each row has seen; ``joint`` for the rows that have seen all."""

    def __init__(
        self,
        flows: dict[str, ConditionalFlow],
        contexts: dict[str, Tensor],
        seen: Bool[Tensor, "batch modality"],
        joint: GaussianPosterior,
    ) -> None:
        self.flows, self.contexts, self.seen, self.joint = flows, contexts, seen, joint

    @property
    def mean(self) -> Tensor:
        return self.sample(MEAN_SAMPLES, torch.Generator().manual_seed(0)).mean(1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Of a row with several modalities, not all: the state of Hamiltonian chains that start from one of its flows."""
        z = torch.randn(len(self.seen), count, self.joint.mean.shape[1], generator=generator)  # nothing seen: the prior
        start = (torch.rand(self.seen.shape, generator=generator) * self.seen).argmax(1)
        for index, (name, flow) in enumerate(self.flows.items()):
            rows = self.seen[:, index] & (start == index)
            z[rows] = flow.sample(z[rows], self.contexts[name][rows]).detach()
        if (several := self.seen.sum(1) > 1).any():
            contexts = {name: context[several].detach() for name, context in self.contexts.items()}

            def target(at: Tensor) -> Tensor:
                return _log_product(self.flows, contexts, self.seen[several], at)

            z[several] = hamiltonian(target, z[several], generator, steps=MOVES)
        complete = self.seen.all(1)
        return torch.where(complete.view(-1, 1, 1), self.joint.sample(count, generator), z)

    def log_density(self, z: Float[Tensor, "batch sample latent"]) -> Tensor:
        complete = self.seen.all(1)
        if bool(((self.seen.sum(1) > 1) & ~complete).any()):
            raise NotImplementedError("the density of a product of flows is known up to a factor only")
        alone = _log_product(self.flows, self.contexts, self.seen, z)
        return torch.where(complete.unsqueeze(1), self.joint.log_density(z), alone)


def _log_product(flows: dict[str, ConditionalFlow], contexts: dict[str, Tensor], seen: Tensor, z: Tensor) -> Tensor:
    total = (1 - seen.sum(1)).unsqueeze(1) * log_prior(z)
    for index, (name, flow) in enumerate(flows.items()):
        if (rows := seen[:, index]).any():
            total = total + torch.where(rows.unsqueeze(1), flow.log_density(z, contexts[name]), 0.0)
    return total
