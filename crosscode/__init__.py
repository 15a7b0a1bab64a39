"""crosscode: train crosscoders, cross-layer transcoders and SAEs on language model activations.

    run = crosscode.train(acts, {"type": "sae", "n_latents": 4096, "activation": {"type": "topk", "k": 32}}, run_dir="runs/a")
    run.model, run.summary, run.evaluate(), run.report()

`help(crosscode.train)` says more; `dir(crosscode)` lists all public names. They are loaded when they are first asked for:
`import crosscode` alone touches no network and no torch.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any


@cache
def _homes() -> dict[str, tuple[str, str]]:
    """Module and name there of each public name, as the stub beside this file has them for type checkers."""
    import ast
    from importlib.resources import files

    tree = ast.parse(files(__name__).joinpath("__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (node.module or "", alias.name) for node in imports for alias in node.names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("crosscode")
    if name == "__all__":
        return sorted(_homes().keys() - {"open"})  # which `import *` must not put in the place of Python's own
    if name.startswith("__") or name not in _homes():
        raise AttributeError(f"module 'crosscode' has no attribute {name!r}")
    module, name_there = _homes()[name]
    return getattr(import_module(module), name_there)


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *_homes(), "__version__"})
