"""The checks of the token loader's arguments, made before anything is read."""

from __future__ import annotations

from typing import Any

from crosscode.errors import InputError


def check_token_arguments(arguments: dict[str, Any]) -> None:
    """Raise InputError for the first argument of `TokenSequenceLoader` that is out of range."""
    choices = {
        "bos": ("sequence", "document", "none"),
        "separator": ("eos", "none"),
        "split": ("all", "train", "validation"),
        "template_tokens": ("keep", "mask"),
    }
    for name, allowed in choices.items():
        if arguments[name] not in allowed:
            raise InputError(f"{name}: {arguments[name]!r} is not one of {', '.join(allowed)}")
    for name, least in {"sequence_length": 2, "batch_size": 1, "n_workers": 0}.items():
        if arguments[name] < least:
            raise InputError(f"{name}: {arguments[name]} is below {least}")
    if arguments["epochs"] is not None and arguments["epochs"] < 1:
        raise InputError(f"epochs: {arguments['epochs']} should be at least 1, or none for endless")
    fraction = arguments["validation_fraction"]
    if not 0 <= fraction < 1 or (fraction == 0 and arguments["split"] == "validation"):
        raise InputError(f"validation_fraction: {fraction} should be above 0 and below 1")
    index, count = arguments["worker"]
    if not 0 <= index < count:
        raise InputError(f"worker: {arguments['worker']} should be (index, count) with 0 <= index < count")
