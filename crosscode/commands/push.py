"""`crosscode push`: a model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from crosscode.commands.parts.command import Command
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError

TEXT = """upload a trained model to the Hugging Face hub
RUN is a run directory or the folder of a saved model. What goes up: the model, the config, figures, the report and a card;
--dry-run shows it. You must be logged in there (`hf auth login`, or HF_TOKEN). Of --features, what `crosscode features --to
circuit-tracer` wrote goes beside the model, and what --to dataset wrote into a data set of its own, USER/NAME-latents."""


class Options(ConfigModel):
    words: list[str] = Field(title="RUN USER/NAME")
    """the run, and the repository, which is made if there is none"""
    private: bool = False
    """make it a private one"""
    license: str | None = None
    """its licence, as the hub names it, such as mit"""
    features: Path | None = Field(default=None, title="DIR")
    """a folder that `crosscode features --to circuit-tracer` or `--to dataset` wrote"""
    dry_run: bool = False
    """upload nothing: show the files and the card"""


def run(options: Options) -> None:
    if len(options.words) != 2:
        raise InputError("push: usage: crosscode push RUN USER/NAME")
    quiet_libraries()
    from crosscode.interop.feature_files import DATASET_FILES, features_kind
    from crosscode.interop.format import ABOUT
    from crosscode.interop.hub import CARD, contents, push
    from crosscode.trainers.warm_start import find_model

    source, name = options.words
    if (Path(source) / ABOUT).is_file():
        raise InputError(f"RUN = {source!r}: is an export to another library; push its run, or `crosscode import` it")
    folder = find_model(source, "RUN")
    is_run = (Path(source) / "config.yaml").is_file() and folder.parent in (Path(source), Path(source) / "checkpoints")
    beside = options.features if options.features and features_kind(options.features) == "circuit-tracer" else None
    goes: list[tuple[str, str, dict[str, Path | str]]] = [
        ("model", name, contents(folder, Path(source) if is_run else None, name, options.license, beside))
    ]
    if options.features and beside is None:
        goes.append(("dataset", f"{name}-latents", {file: options.features / file for file in DATASET_FILES}))
    for kind, repo, files in goes:
        if not options.dry_run:
            print(push(repo, files, private=options.private, kind=kind))
            continue
        print(f"{kind} {repo}")
        for file, content in files.items():
            size = len(content.encode()) if isinstance(content, str) else content.stat().st_size
            print(f"{size:>12,}  {file}")
        card = files[CARD]
        print(f"\n{card if isinstance(card, str) else card.read_text(encoding='utf-8')}")


COMMAND = Command(TEXT, run, Options, positional="words")
