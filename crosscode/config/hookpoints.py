"""What names of hookpoints say."""

from __future__ import annotations

import re


def layer_of(hookpoint: str) -> int | None:
    """The layer that a TransformerLens name or a module path says."""
    found = re.match(r"blocks\.(\d+)\.|.*\b(?:layers|h)\.(\d+)\b|.*?\.(\d+)(?:\.|$)", hookpoint)
    return None if found is None else int(found[found.lastindex or 0])
