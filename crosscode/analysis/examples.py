"""Where a latent fires: top activating examples and examples across its range, in one streaming pass.

Axes: N active entries · C candidates

An example is one position with its context window. Contexts are distinct in two ways: a latent has at most one top
example per sequence, and two examples of a latent never share the tokens right around the peak (texts repeat).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crosscode.analysis.encoded import EncodedBatch
from crosscode.analysis.example_pool import Entries, Example, ExamplePool, mix


class TopExamples:
    """Collects the `n` examples on which each latent is largest."""

    def __init__(self, n_latents: int, n: int = 8, left: int = 20, right: int = 11, n_readers: int = 0):
        self._pool = ExamplePool(n_latents, n, left, right, n_readers)

    def update(self, batch: EncodedBatch) -> None:
        entries = Entries(batch)
        order_N = np.lexsort((entries.position_N, -entries.value_N, entries.row_N, entries.latent_N))
        latent_N, row_N = entries.latent_N[order_N], entries.row_N[order_N]
        best_N = np.ones(len(order_N), bool)
        best_N[1:] = (latent_N[1:] != latent_N[:-1]) | (row_N[1:] != row_N[:-1])
        index_C = order_N[best_N]
        self._pool.offer(batch, entries, index_C, entries.value_N[index_C].astype(np.float64))

    def examples(self, latent: int) -> list[Example]:
        """Examples of a latent, strongest first; fewer than `n` where it fires in fewer places."""
        return [self._pool.example(number) for number in self._pool.of(latent)]


class QuantileExamples:
    """Collects a uniform sample of each latent's firings, to show it across its range and not only at the top.

    Every firing gets a random priority that depends on seed, latent and place alone; the highest are kept.
    """

    def __init__(
        self, n_latents: int, sample: int = 40, left: int = 20, right: int = 11, seed: int = 0, n_readers: int = 0
    ):
        self._pool = ExamplePool(n_latents, sample, left, right, n_readers)
        self._seed = seed

    def update(self, batch: EncodedBatch) -> None:
        entries = Entries(batch)
        place_N = (entries.row_N + batch.first_sequence) << 20 | entries.position_N
        priority_N = _uniform(entries.latent_N, place_N, self._seed)
        self._pool.offer(batch, entries, np.arange(len(priority_N)), priority_N)

    def examples(self, latent: int, n_quantiles: int = 4, per_quantile: int = 1) -> list[list[Example]]:
        """Examples by equal shares of the sampled firings, strongest share first; no two windows overlap."""
        numbers = self._pool.of(latent)
        sample = sorted(
            (-value, *place, i) for i, (value, *place) in zip(numbers, self._pool.places(numbers), strict=True)
        )
        taken: list[tuple[int, int]] = []
        width = self._pool.left + self._pool.right + 1

        def overlaps(sequence: int, position: int) -> bool:
            return any(other == sequence and abs(at - position) < width for other, at in taken)

        shares: list[list[Example]] = []
        for q in range(n_quantiles):
            share = sample[q * len(sample) // n_quantiles : (q + 1) * len(sample) // n_quantiles]
            chosen: list[tuple[float, int]] = []
            # from the middle of the share outwards: its typical strength comes first
            for at in sorted(range(len(share)), key=lambda at: abs(at - len(share) // 2)):
                value, sequence, position, number = share[at]
                if len(chosen) < per_quantile and not overlaps(sequence, position):
                    chosen.append((value, number))
                    taken.append((sequence, position))
            shares.append([self._pool.example(number) for _, number in sorted(chosen, key=lambda one: one[0])])
        return shares


def _uniform(latent_N: NDArray[np.int64], place_N: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Numbers in (0, 1) that depend on their arguments alone."""
    h_N = mix(mix(place_N.astype(np.uint64) + np.uint64(seed)) ^ mix(latent_N.astype(np.uint64) + np.uint64(1)))
    return ((h_N >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
