"""What is said where torch.compile fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from crosscode.errors import InputError


@contextmanager
def compile_errors_in_one_line() -> Iterator[None]:
    """Around the forward and the backward of a compiled function: the backward may be compiled as late as it runs."""
    try:
        yield
    except RuntimeError as error:
        # Imported here alone: it takes seconds, and most runs compile nothing.
        from torch._dynamo.exc import TorchDynamoException

        if not isinstance(error, TorchDynamoException):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"train.compile = true: torch.compile fails here ({reason}); set train.compile: false"
        ) from error
