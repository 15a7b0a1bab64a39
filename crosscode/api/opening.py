"""`crosscode.open`."""

from __future__ import annotations

from pathlib import Path

from crosscode.api.run import Run


def open(path: str | Path) -> Run:
    """The run directory at `path`, finished or not.

    ```python
    run = crosscode.open("runs/demo")
    run.model, run.summary, run.evaluate(), run.report()
    run.latents("some text"), run.top(12), run.logits(12), run.table()
    ```

    Raises:
        InputError: no run there.
    """
    return Run(path)
