"""Decoder of texts that predicts each token from the tokens before it and z: a causal transformer.

    log p(x | z) = sum_t log p(x_t | x_1 ... x_{t-1}, z), up to and including the end of the text

Given a text, all positions are computed in one pass ("teacher forcing"), so the ELBO and its gradient cost one pass, as
with every other decoder. To generate a text, ``step`` computes one token at a time and keeps what it needs of earlier ones.

Sources: Vaswani et al. 2017 (attention), Xiong et al. 2020 (normalisation before each layer), Bowman et al. 2016 (a VAE whose
decoder reads its own words).
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from concord.model.modality import TextModality
from concord.model.vae.masked import is_tracing
from concord.model.vae.token_likelihood import token_log_likelihood

FEATURES = 128
"""Numbers of a token's vector."""
BLOCKS, HEADS = 2, 4
EMBEDDING_SCALE = 0.1
"""Standard deviation of the initial vectors. The output layer has the same weights, so logits start small."""


class SequenceDecoder(nn.Module):
    """log p(tokens | z) in one pass, and the next token's log-probabilities step by step.

    Token ``end``, the number after the last token of the modality, stands before the first token and after the last one.
    Padding after the end has no probability.

    Args:
        modality: the text.
        latent: size of z.
        hidden: size of the hidden layer between z and the vector that is added to every token.
    """

    def __init__(self, modality: TextModality, latent: int, hidden: int) -> None:
        super().__init__()
        self.length, self.end = modality.length, modality.categories
        self.context = nn.Sequential(nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, FEATURES))
        self.tokens = nn.Embedding(self.end + 1, FEATURES)
        self.positions = nn.Embedding(self.length, FEATURES)
        self.blocks = nn.ModuleList(_Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(FEATURES)
        self.bias = nn.Parameter(torch.zeros(self.end + 1))

    def initialise(self) -> None:
        """Initialise all weights. The last layers of the residual branches start small (Radford et al. 2019)."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
                nn.init.zeros_(layer.bias)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=EMBEDDING_SCALE)
        for block in self.blocks:
            assert isinstance(block, _Block)
            for last in (block.merge, block.outer):
                nn.init.normal_(last.weight, std=1 / math.sqrt(2 * BLOCKS * last.in_features))

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Shape of the state of one row: keys and values of every block at every position."""
        return 2 * BLOCKS, self.length, FEATURES

    @property
    def axes(self) -> frozenset[int]:
        """Sizes of all axes but the batch."""
        return frozenset((*self.state_shape, HEADS, FEATURES // HEADS))

    def token_log_likelihoods(
        self,
        z: Float[Tensor, "batch latent"],
        tokens: Int[Tensor, "batch length"],
        context: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length"]:
        """Return log p(x_t | x_1 ... x_{t-1}, z) of each token in nats: 0 after the end.

        The end itself counts as a token, unless the text fills the whole length.

        Args:
            tokens: observed ids. Those of absent rows may be out of range.
            context: the tokens that later ones are predicted from, with ``end`` in place of hidden ones. None: ``tokens``.
        """
        context = (tokens if context is None else context).clamp(0, self.end)
        tokens = tokens.clamp(0, self.end - 1)
        positions = torch.arange(self.length, device=tokens.device)
        lengths = ((tokens != 0) * (positions + 1)).amax(1, keepdim=True)
        targets = torch.where(positions == lengths, torch.full_like(tokens, self.end), tokens)
        before = torch.cat((torch.full_like(tokens[:, :1], self.end), context[:, :-1]), dim=1)
        # Linear layers get matrices: PyTorch cannot trace the gradient of others with a symbolic batch size.
        hidden = (self.tokens(before) + self.positions.weight + self.context(z).unsqueeze(1)).flatten(0, 1)
        for block in self.blocks:
            hidden = block(hidden, positions <= positions.unsqueeze(1))
        hidden, targets = self.norm(hidden), targets.flatten()
        if is_tracing(z):
            terms = self._traced_terms(hidden.float(), targets)
        else:
            terms = token_log_likelihood(hidden, self.tokens.weight, self.bias, targets)
        terms = terms.view(tokens.shape)
        return torch.where(positions <= lengths, terms, torch.zeros_like(terms))

    def step(
        self,
        z: Float[Tensor, "batch latent"],
        token: Int[Tensor, " batch"],
        position: Int[Tensor, " batch"],
        state: Float[Tensor, "batch part length feature"],
    ) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch part length feature"]]:
        """Return the log-probabilities of the next token, the last of which is the end, and the next state.

        Args:
            token: the previous token; ``end`` before the first one.
            position: number of tokens before the next one.
            state: zeros before the first token, then what the last step returned, see ``state_shape``.
        """
        hidden = self.tokens(token) + self.positions(position) + self.context(z)
        positions = torch.arange(self.length, device=z.device)
        is_new = (positions == position.unsqueeze(1)).unsqueeze(2)
        visible = (positions <= position.unsqueeze(1)).unsqueeze(1)
        parts = []
        for index, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            query, *new = (part.unsqueeze(1) for part in block.project(hidden))
            key, value = (torch.where(is_new, part, state[:, 2 * index + offset]) for offset, part in enumerate(new))
            parts += [key, value]
            hidden = block.finish(hidden, attend(query, key, value, visible).flatten(0, 1))
        logits = nn.functional.linear(self.norm(hidden), self.tokens.weight, self.bias)
        return torch.log_softmax(logits, dim=-1), torch.stack(parts, dim=1)

    def _traced_terms(self, hidden: Float[Tensor, "row feature"], targets: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """The log-probabilities of the targets, in operations that can be exported with their gradient."""
        logits = nn.functional.linear(hidden, self.tokens.weight, self.bias)
        largest = logits.detach().amax(-1, keepdim=True)
        normaliser = largest.squeeze(-1) + torch.log(torch.exp(logits - largest).sum(-1))
        # One logit of each position, without one-hot vectors of the size of the vocabulary.
        observed: Tensor = (hidden * self.tokens(targets)).sum(-1) + self.bias[targets]
        return observed - normaliser


class _Block(nn.Module):
    """Causal self-attention, then two fully connected layers, each added to its input. A row is one position of one text."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.norm = nn.LayerNorm(FEATURES), nn.LayerNorm(FEATURES)
        self.projections = nn.Linear(FEATURES, 3 * FEATURES)
        self.merge = nn.Linear(FEATURES, FEATURES)
        self.inner, self.outer = nn.Linear(FEATURES, 4 * FEATURES), nn.Linear(4 * FEATURES, FEATURES)

    def project(self, hidden: Float[Tensor, "row feature"]) -> tuple[Tensor, ...]:
        """Return query, key and value, each in the shape of the input."""
        projected: Tensor = self.projections(self.attention_norm(hidden))
        return projected.chunk(3, dim=-1)

    def finish(
        self, hidden: Float[Tensor, "row feature"], attended: Float[Tensor, "row feature"]
    ) -> Float[Tensor, "row feature"]:
        """Return the output of the block, given that of the attention."""
        hidden = hidden + self.merge(attended)
        added: Tensor = self.outer(nn.functional.silu(self.inner(self.norm(hidden))))
        return added + hidden

    def forward(
        self, hidden: Float[Tensor, "row feature"], visible: Bool[Tensor, "length length"]
    ) -> Float[Tensor, "row feature"]:
        query, key, value = (part.reshape(-1, len(visible), FEATURES) for part in self.project(hidden))
        return self.finish(hidden, attend(query, key, value, visible).flatten(0, 1))


def attend(
    query: Float[Tensor, "batch query feature"],
    key: Float[Tensor, "batch length feature"],
    value: Float[Tensor, "batch length feature"],
    visible: Bool[Tensor, "*batch query length"],
) -> Float[Tensor, "batch query feature"]:
    """Attention of ``HEADS`` heads (Vaswani et al. 2017, section 3.2).

    Args:
        visible: which positions each query attends to.
    """
    queries, keys, values = (
        part.reshape(-1, part.shape[1], HEADS, FEATURES // HEADS).transpose(1, 2).flatten(0, 1) for part in (query, key, value)
    )  # (batch x head, position, feature)
    scores = torch.bmm(queries, keys.transpose(1, 2)) / math.sqrt(FEATURES // HEADS)
    scores = scores.reshape(-1, HEADS, *scores.shape[1:])
    scores = torch.where(visible.unsqueeze(-3), scores, torch.full_like(scores, -torch.inf))
    attended = torch.bmm(torch.softmax(scores, dim=-1).flatten(0, 1), values)
    merged: Tensor = attended.reshape(-1, HEADS, *attended.shape[1:]).transpose(1, 2).flatten(2)
    return merged
