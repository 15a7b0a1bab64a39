"""Work in forked processes. What one of them imports can be imported here as well, so that the next find it there: a run
imports for seconds and then trains for a tenth of one.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def in_child(work: Callable[[], int | None]) -> int:
    """Exit status of `work()` in a forked process; -9 where it was killed."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status if isinstance(status, int) else 0)
    _, how = os.waitpid(child, 0)
    return -os.WTERMSIG(how) if os.WIFSIGNALED(how) else os.WEXITSTATUS(how)


def in_child_with_imports(work: Callable[[], int | None], names: Path) -> int:
    """The same; then this process imports what that one has. `names`: a file for what that is."""

    def working() -> int | None:
        status = work()
        names.write_text(json.dumps(list(sys.modules)))
        return status

    status = in_child(working)
    for name in json.loads(names.read_text()):
        if name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)
    return status
