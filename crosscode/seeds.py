"""Seeds of streams that belong together, and numbers that a text decides.

Runs are resumed with the same streams: no formula here, and no caller's `base`, may change.
"""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *numbers: int, base: int = 1_000_003) -> int:
    """The seed of the stream that `numbers` (an epoch, a part, a window) name below `seed`."""
    for number in numbers:
        seed = seed * base + number
    return seed % 2**64  # what a generator of PyTorch takes


def number_of(text: str) -> int:
    """A number in [0, 2^64) that looks random and depends on the text alone."""
    content = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
