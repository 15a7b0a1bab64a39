"""Seeds of streams that belong together."""

from __future__ import annotations


def derived_seed(seed: int, *numbers: int, base: int = 1_000_003) -> int:
    """The seed of the stream that `numbers` (an epoch, a part, a window) name below `seed`.

    Runs are resumed with the same streams: neither the formula nor a caller's `base` may change.
    """
    for number in numbers:
        seed = seed * base + number
    return seed
