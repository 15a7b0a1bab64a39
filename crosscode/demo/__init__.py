"""The embedded small language models and what made them."""

from importlib.resources import files
from pathlib import Path

from crosscode.errors import InputError

DEMO_MODELS = ("base", "tuned", "planted")


def demo_model_path(name: str) -> Path:
    """Folder of an embedded language model, an ordinary `transformers` checkpoint with its tokenizer.

    Args:
        name: "base" (trained on Python sources), "tuned" (the base fine-tuned on the Python manual) or "planted" (the base
            fine-tuned on its own text with a made-up statement in a few percent of it, see `crosscode.demo.plants`).

    Raises:
        InputError: unknown name, or the package was installed without its data.
    """
    if name not in DEMO_MODELS:
        raise InputError(f"name: {name!r} is no demo model, must be one of {', '.join(DEMO_MODELS)}")
    folder = Path(str(files("crosscode.demo").joinpath("models", name)))
    if not (folder / "config.json").is_file():
        raise InputError(f"name: demo model {name!r} is missing at {folder}, reinstall crosscode with its package data")
    return folder
