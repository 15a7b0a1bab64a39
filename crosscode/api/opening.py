"""`crosscode.open`."""

from __future__ import annotations

from pathlib import Path

from crosscode.api.run import Run


def open(path: str | Path, *, trust_remote_code: bool = False) -> Run:
    """The run directory at `path`, finished or not.

    ```python
    run = crosscode.open("runs/demo")
    run.model, run.summary, run.evaluate(), run.report()
    run.latents("some text"), run.top(12), run.logits(12), run.table()
    ```

    Args:
        trust_remote_code: let the run's language models run code of their own, where its config says so.

    Raises:
        InputError: no run there.
    """
    return Run(path, trust_remote_code)
