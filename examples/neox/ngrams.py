"""What counting alone predicts: how often tokens come up, and after which token.

A model that predicts no better than these has learned nothing of what a model is for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_narrow.blocks import Blocks
from llm_narrow.measure import DocumentSums, TokenResults, sums_of


@dataclass(frozen=True)
class Bigram:
    """Counts of pairs, interpolated with how many tokens each token comes after.

    pairs:    before * rows + token of every pair that came up, sorted, int64
    counts:   how often it did
    totals:   how often each token stood before another, (rows,)
    kinds:    how many different tokens stood after each, (rows,)
    below:    what is taken where a pair is unknown, (rows,), sums to 1
    discount: taken from each count
    """

    pairs: Tensor
    counts: Tensor
    totals: Tensor
    kinds: Tensor
    below: Tensor
    discount: float

    def probability(self, before: Tensor, token: Tensor) -> Tensor:
        """The probability of each token after the one before it, of one shape, float64."""
        wanted = before * len(self.below) + token
        at = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        count = self.counts[at].double() * (self.pairs[at] == wanted)
        total = self.totals[before].double()
        own = (count - self.discount).clamp(min=0)
        rest = self.discount * self.kinds[before].double()
        known = (own + rest * self.below[token]) / total.clamp(min=1)
        return torch.where(total > 0, known, self.below[token])


def unigram(tokens: Tensor, rows: int) -> Tensor:
    """The share of each token in the blocks, (rows,) float64, one added to every count."""
    counted = tokens.flatten().long().bincount(minlength=rows).double() + 1
    return counted / counted.sum()


def bigram(tokens: Tensor, rows: int) -> Bigram:
    """Interpolated Kneser-Ney (Kneser and Ney 1995) of the pairs within blocks (n, length).

    The discount is n1 / (n1 + 2 n2) of pairs seen once and twice (Ney, Essen and Kneser 1994). One
    is added to the number of tokens that each token comes after, so that none has probability 0.
    """
    before, after = tokens[:, :-1].flatten().long(), tokens[:, 1:].flatten().long()
    pairs, counts = torch.unique(before * rows + after, return_counts=True)
    once, twice = (int((counts == n).sum()) for n in (1, 2))
    after_kinds = (pairs % rows).bincount(minlength=rows).double() + 1
    return Bigram(
        pairs, counts, before.bincount(minlength=rows),
        (pairs // rows).bincount(minlength=rows), after_kinds / after_kinds.sum(),
        discount=once / (once + 2 * twice) if once else 0.0,
    )  # fmt: skip


def sums(blocks: Blocks, predicted: Tensor | Bigram) -> DocumentSums:
    """What a unigram, (rows,), or a bigram makes of the blocks, by document; hits are not told."""
    tokens = blocks.tokens.long()
    if isinstance(predicted, Bigram):
        probability = predicted.probability(tokens[:, :-1], tokens[:, 1:])
    else:
        probability = predicted[tokens[:, 1:]]
    nats = -probability.log()
    return sums_of(TokenResults(nats, torch.zeros_like(nats, dtype=torch.bool)), blocks)
