"""The files of another library as a saved model, or as a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crosscode.build.around import open_around, values_around, write_run_around
from crosscode.build.heldout import AnyExperiment
from crosscode.build.run import compare_language_models, model_metadata
from crosscode.build.schema import check_config
from crosscode.config.reading import read_trusted
from crosscode.errors import InputError
from crosscode.files import check_can_be_made, check_is_no_link, check_may_be_filled
from crosscode.interop.format import FORMATS
from crosscode.interop.reading import read, recognise
from crosscode.models import BaseCrosscoder

log = logging.getLogger("crosscode")


def import_model(
    path: Path, name: str | None, out: Path, config: str | None = None, trust_remote_code: bool = False
) -> Iterator[str]:
    """Write what is at `path` into the new folder `out`; lines that say what.

    Raises:
        InputError: no or another format, something that ours cannot be, a folder that is there, or a config whose
            activations are of other dimensions.
    """
    check_may_be_filled(out, "out")
    check_can_be_made(out, "out")
    check_is_no_link(out)
    if (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"out = {str(out)!r}: is there already; name a new folder")
    values = None if config is None else read_trusted(config, trust_remote_code)
    found = recognise(path) if name is None else FORMATS.build({"type": name})
    if found is None:
        raise InputError(
            f"import {str(path)!r}: is of no format that is known ({', '.join(FORMATS)})"
            if path.exists()
            else f"import {str(path)!r}: no such file or folder"
        )
    model = read(path, found)
    if values is not None:
        yield from _as_run(model, values, out)
        return
    model.save(out)
    yield f"model       {out}  {model!r}"


def _as_run(model: BaseCrosscoder, config: Mapping[str, Any], out: Path) -> Iterator[str]:
    values = values_around(config, model, out)
    experiment = open_around(values, model)
    _check_is_of(model, experiment)
    result = write_run_around(check_config(values), model, experiment, "import")
    yield f"run         {out}"
    for name, value in result.fvu_by_position.items():
        yield f"FVU         {value:.4f}  {name}"
    yield f"L0          {result.l0:.1f}"


def _check_is_of(model: BaseCrosscoder, experiment: AnyExperiment) -> None:
    """What our own export left beside the files must be true of the config; what others' say may have other names."""
    now = model_metadata(experiment)
    before, hooks = model.metadata.get("language_models") or [], model.metadata.get("hookpoints")
    is_own = any("fingerprint" in each for each in before)
    if hooks and hooks != now["hookpoints"]:
        said = f"hookpoints = {now['hookpoints']}: the model's files say {hooks}"
        if is_own:
            raise InputError(said)
        log.warning("%s", said)
    if is_own:
        compare_language_models(before, now["language_models"], "the model")
