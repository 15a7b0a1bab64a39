"""N-gram baselines for the embedded language models: interpolated modified Kneser-Ney, over bytes or tokens.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section 3 and its
equations for the three discounts. In short, for the highest order n with counts c, and a history h:

    p_n(w | h) = max(c(h w) - D(c(h w)), 0) / c(h .) + gamma(h) p_{n-1}(w | h without its first symbol)
    gamma(h)   = sum_w min(D(c(h w)), c(h w)) / c(h .)

Lower orders count distinct left neighbours in place of occurrences; below the unigram stands the uniform
distribution; a history that was never seen passes the lower order on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from crosscode.errors import InputError

Symbols = NDArray[np.integer]


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length, as sorted integer keys (the last symbol is the least significant digit)."""

    keys: NDArray[np.int64]
    discounted: NDArray[np.float64]
    histories: NDArray[np.int64]
    totals: NDArray[np.float64]
    left_over: NDArray[np.float64]

    @classmethod
    def of(cls, keys: NDArray[np.int64], counts: NDArray[np.int64], base: int) -> "_Order":
        discounted = np.maximum(counts - _discounts(counts)[np.minimum(counts, 3)], 0.0)
        histories, first = np.unique(keys // base, return_index=True)
        totals = np.add.reduceat(counts, first).astype(np.float64)
        return cls(keys, discounted, histories, totals, totals - np.add.reduceat(discounted, first))

    def refine(self, query: NDArray[np.int64], base: int, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probabilities of the n-grams in `query`, given those of the order below."""
        at, known = _find(self.keys, query)
        gain = np.where(known, self.discounted[at], 0.0)
        at, known = _find(self.histories, query // base)
        return np.where(known, (gain + self.left_over[at] * lower) / self.totals[at], lower)


def _discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """D(0) = 0, D(1), D(2), D(3 and more); half a count where the counts of counts are too few for the estimate."""
    n1, n2, n3, n4 = (int((counts == value).sum()) for value in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    estimate = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.clip(estimate, 0.0, [0.0, 1.0, 2.0, 3.0])


def _find(table: NDArray[np.int64], query: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    at = np.minimum(np.searchsorted(table, query), len(table) - 1)
    return at, table[at] == query


class NGramModel:
    """An interpolated modified Kneser-Ney model over the symbols 0 .. vocab_size - 1.

    Args:
        sequences: training sequences, one array of symbols a document; histories do not reach over documents.
        order: length of the longest n-grams; 5 conditions on four symbols, 1 on none.
        vocab_size: number of symbols; the probabilities after any history sum to 1 over them.

    Raises:
        InputError: no symbols, a symbol out of range, or n-grams that do not fit an integer of 63 bits.
    """

    def __init__(self, sequences: Sequence[Symbols], order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        # One more digit stands for "before the document".
        self._base = vocab_size + 1
        if order < 1 or self._base**order >= 2**63:
            raise InputError(f"order: {order} with vocab_size {vocab_size} must be >= 1 and fit 63 bits")
        windows = [self._windows(sequence) for sequence in sequences]
        if not sum(map(len, windows)):
            raise InputError("sequences: 0 symbols to train on, at least one is needed")
        keys, counts = np.unique(np.concatenate(windows), return_counts=True)
        orders = [_Order.of(keys, counts, self._base)]
        for length in range(order - 1, 0, -1):
            keys, counts = np.unique(keys % self._base**length, return_counts=True)
            orders.append(_Order.of(keys, counts, self._base))
        self._orders = orders[::-1]

    def _windows(self, sequence: Symbols) -> NDArray[np.int64]:
        """The key of the n-gram that ends at each symbol."""
        symbols = np.asarray(sequence, dtype=np.int64)
        if symbols.size and not (symbols.min() >= 0 and symbols.max() < self.vocab_size):
            raise InputError(
                f"sequences: symbols {symbols.min()}..{symbols.max()} must lie in 0..{self.vocab_size - 1}"
            )
        padded = np.concatenate([np.full(self.order - 1, self.vocab_size), symbols])
        keys = np.zeros(len(symbols), dtype=np.int64)
        for offset in range(self.order):
            keys = keys * self._base + padded[offset : offset + len(symbols)]
        return keys

    def probabilities(self, sequence: Symbols) -> NDArray[np.float64]:
        """The probability of each symbol of one document after those before it."""
        keys = self._windows(sequence)
        result = np.full(len(keys), 1.0 / self.vocab_size)
        for length, order in enumerate(self._orders, start=1):
            result = order.refine(keys % self._base**length, self._base, result)
        return result

    def bits(self, sequences: Sequence[Symbols]) -> float:
        """Total negative log2 likelihood."""
        return float(-sum(np.log2(self.probabilities(sequence)).sum() for sequence in sequences))


def as_bytes(texts: Sequence[str]) -> list[Symbols]:
    """The UTF-8 bytes of each text, as symbols."""
    return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


def as_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Symbols]:
    """The token ids of each text, without special tokens, as symbols."""
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray(row, dtype=np.int64) for row in rows]


def baseline_bits_per_byte(
    train: dict[str, list[str]], held_out: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, float]]:
    """Held-out bits per byte of unigram and 5-gram models over bytes and over tokens.

    Args:
        train: training texts by domain of evaluation: what the language model scored on that domain has seen.
        held_out: held-out texts by domain.
        tokenizer: the language models' tokenizer.

    Returns:
        `{baseline: {domain: bits per byte}}`.
    """
    result: dict[str, dict[str, float]] = {}
    for domain, texts in held_out.items():
        n_bytes = sum(len(text.encode()) for text in texts)
        units = {
            "bytes": (as_bytes(train[domain]), as_bytes(texts), 256),
            "tokens": (as_tokens(train[domain], tokenizer), as_tokens(texts, tokenizer), len(tokenizer)),
        }
        for unit, (seen, unseen, vocab_size) in units.items():
            for order, name in ((1, "unigram"), (5, "5gram")):
                bits = NGramModel(seen, order, vocab_size).bits(unseen)
                result.setdefault(f"{name}_{unit}", {})[domain] = round(bits / n_bytes, 4)
    return result
