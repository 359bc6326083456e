"""Text <-> subwords: byte pair encoding of UTF-8 bytes, as the ``tokenizers`` library computes it.

Subword 1 to 256 are the bytes, in the library's notation for them; the others are the results of the merges, in their order. So
the merges define everything, every text has subwords, and nothing is unknown.

Sources: Sennrich, Haddow & Birch 2016 (byte pair encoding), Radford et al. 2019 (of bytes).
"""

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from concord.model.modality import BYTES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Merges = tuple[str, ...]
"""Each one two subwords with a space between them, the most frequent pair first."""


def encode(merges: Merges, text: str) -> list[int]:
    """Return the numbers of the subwords of a text, from 1 on."""
    return [number + 1 for number in _tokenizer(merges).encode(text).ids]


def decode(merges: Merges, subwords: Sequence[int]) -> str:
    """Return the text of subwords. Bytes that are no UTF-8 are left out."""
    text: str = _tokenizer(merges).decode([number - 1 for number in subwords])
    return text.replace("\ufffd", "")


def learn(texts: Iterable[str], size: int) -> Merges:
    """Return the merges of pairs that occur at least twice in texts.

    Args:
        size: number of subwords, with the ``BYTES``.
    """
    from tokenizers import pre_tokenizers, trainers  # noqa: PLC0415 - takes long to import, and few models need it

    tokenizer = _tokenizer(())
    trainer = trainers.BpeTrainer(
        vocab_size=max(size, BYTES),
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    learned = type(tokenizer).from_str(tokenizer.to_str())
    learned.train_from_iterator(texts, trainer)
    return tuple(" ".join(pair) for pair in json.loads(learned.to_str())["model"]["merges"])


@lru_cache(maxsize=64)
def _tokenizer(merges: Merges) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    pairs = [(pair[0], pair[1]) for pair in (merge.split(" ") for merge in merges)]
    vocabulary = {byte: number for number, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for first, second in pairs:
        vocabulary.setdefault(first + second, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
