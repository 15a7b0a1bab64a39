"""The runs of a sweep: all combinations of some fields' values, on one stream of activations."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crosscode.commands.parts.options import annotations_at, near_field
from crosscode.config.experiment import ExperimentConfig
from crosscode.config.reading import load_yaml
from crosscode.errors import InputError

OWN_SECTIONS = ("name", "run_dir", "overwrite", "backend", "crosscoder", "objective", "constraints", "finetune_from")
SHARED_OF_TRAIN = ("n_tokens", "batch_size")


@dataclass(frozen=True)
class GridPoint:
    """One run of a sweep."""

    label: str
    config: ExperimentConfig


def parse_grid(options: Sequence[str]) -> dict[str, list[Any]]:
    """`["train.optimizer.lr=1e-3,3e-4", ...]` -> values by dotted path."""
    grid: dict[str, list[Any]] = {}
    for option in options:
        path, separator, text = option.partition("=")
        path = path.replace("-", "_")
        if not separator or not path or not text:
            raise InputError(
                f"sweep: --grid {option!r}: expected FIELD=VALUE,VALUE,... such as train.optimizer.lr=1e-3"
            )
        if not annotations_at([ExperimentConfig], path.split(".")):
            near = near_field(path, [ExperimentConfig])
            raise InputError(f"sweep: --grid: unknown field {path!r}{f'; did you mean {near!r}?' if near else ''}")
        if path in grid:
            raise InputError(f"sweep: --grid names {path!r} twice")
        values = [_value(part) for part in text.split(",")]
        repeated = next((value for value in values if values.count(value) > 1), None)
        if repeated is not None:
            raise InputError(f"sweep: --grid {option!r}: names the value {repeated} twice")
        grid[path] = values
    if not grid:
        raise InputError("sweep: no --grid given; usage: crosscode sweep CONFIG.yaml --grid FIELD=VALUE,VALUE,...")
    return grid


def _value(text: str) -> Any:
    value = load_yaml(text, "sweep: --grid")
    if isinstance(value, str):  # YAML reads 1e-3 as a word
        try:
            return float(value)
        except ValueError:
            return value
    return value


def grid_points(values: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]) -> list[GridPoint]:
    """All combinations, checked, each with a folder of its own below the config's `run_dir`. A field with one value
    is set for all runs.

    Raises:
        InputError: a bad value, or a field that decides the stream of activations, which all runs share.
    """
    from crosscode.build.schema import check_config

    folder = check_config(values).run_path()
    varied = [path for path in grid if len(grid[path]) > 1]
    points: list[GridPoint] = []
    for combination in itertools.product(*grid.values()):
        changed = copy.deepcopy(dict(values))
        chosen = dict(zip(grid, combination, strict=True))
        for path, value in chosen.items():
            _set(changed, path, value)
        label = ",".join(f"{path.split('.')[-1]}={chosen[path]}" for path in varied) or "run"
        changed["run_dir"] = str(folder / label.replace("/", "_"))
        config = check_config(changed)
        if points:
            _check_shared(points[0].config, config)
        points.append(GridPoint(label, config))
    return points


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise InputError(f"sweep: --grid {path!r}: {name!r} is no section")
    values[last] = value


def _check_shared(first: ExperimentConfig, config: ExperimentConfig) -> None:
    one, two = first.model_dump(mode="json"), config.model_dump(mode="json")
    differ = [name for name in one if name not in (*OWN_SECTIONS, "train", "evaluation") and one[name] != two[name]]
    differ += [f"train.{name}" for name in SHARED_OF_TRAIN if one["train"][name] != two["train"][name]]
    if differ:
        raise InputError(f"sweep: {differ[0]} decides the activations, which all runs of a sweep share")
