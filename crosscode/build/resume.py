"""Where a run goes on, and whether it may: its newest whole checkpoint, and the config that stands in its folder, which
somebody may have changed since."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from crosscode.build.schema import check_config, dump_config, load_own_config
from crosscode.config.experiment import ExperimentConfig
from crosscode.config.nested import flatten
from crosscode.config.reading import load_yaml
from crosscode.errors import InputError
from crosscode.formats import today
from crosscode.models.checkpoint import read_config
from crosscode.runs.checkpoints import Checkpoints
from crosscode.runs.directory import RunDirectory, open_run
from crosscode.runs.run_files import is_half_replaced

log = logging.getLogger("crosscode")

# Patterns of dotted fields; what no pattern names must stay as it was.
NO_EFFECT_ON_WEIGHTS = (
    "name", "run_dir", "overwrite", "finetune_from", "crosscoder.init.*", "evaluation.*",
    "data.n_tokens_for_norm_estimate", "data.equal_models", "train.log_every", "train.histogram_every",
    "train.checkpoint_every", "train.keep_*", "train.max_shard_size", "train.max_skipped_steps",
    "train.wandb_project", "train.tensorboard",
    "data.prefetch", "data.token_workers", "data.cache.shard_mb", "parallel.timeout",
)  # fmt: skip
ROUNDING = (
    "backend", "sparse_below", "device", "train.grad_accumulation", "train.tf32", "train.compile", "train.cuda_graph",
    "language_models.*.device*", "language_models.*.attn_implementation", "parallel.*",
)  # fmt: skip
OTHER_RUN = (
    "objective.*", "constraints.*", "train.n_tokens", "train.clip_grad_norm", "train.precision",
    "train.dead_after_tokens",
)  # fmt: skip
# Which language model it is stands in the checkpoint as a fingerprint of its weights, wherever the files are now.
CHECKED_BY_FINGERPRINT = (
    "language_models.*.path", "language_models.*.revision", "language_models.*.gguf_file",
    "language_models.*.trust_remote_code", "language_models.*.adapter", "language_models.*.adapter_revision",
)  # fmt: skip
MOVED = (
    "data.source.path", "data.heldout.path", "data.*.parts.*.source.path", "data.cache.path", "data.stores.*.path", "data.join.*",
    "data.source.files.*.path", "data.source.heldout_files.*.path", "data.*.prompts.path", "data.*.folder", "data.*.model.*",
)  # fmt: skip


@dataclass(frozen=True)
class ResumePoint:
    """A run, its config as it stands, and the step of its newest whole checkpoint (None: it has none yet)."""

    run: RunDirectory
    config: ExperimentConfig
    step: int | None

    @classmethod
    def find(cls, path: str | Path, trust_remote_code: bool = False) -> ResumePoint:
        """Reads every byte of the newest checkpoint, for its checksums, but loads no model. `trust_remote_code`: as of
        `load_own_config`.

        Raises:
            InputError: no run there, links in it, all checkpoints damaged, or a config that was changed too much.
        """
        run = RunDirectory(path)
        if is_half_replaced(run.path):
            run.check_not_held()
            run.recover()
        run = open_run(path)
        run.check_not_held()
        config = load_own_config(run.config_file, trust_remote_code)
        step = Checkpoints(run).newest_whole()
        if step is not None:
            before = read_config(run.checkpoint(step))["metadata"].get("config")
            if before is not None:
                # What it lacks is newer than it is, and means the default.
                then = check_config(today(before, str(run.checkpoint(step))))
                check_changes(config_values(then), config_values(config))
        return cls(run, config, step)


def config_values(config: ExperimentConfig) -> dict[str, Any]:
    """A config as checkpoints keep it, to tell what has changed when a run goes on."""
    return load_yaml(dump_config(config), "config")


def check_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say what a changed field means for the rest of the run.

    Args:
        before: the resolved config as it was when the checkpoint was written.
        now: as it is.

    Raises:
        InputError: a field that decides the model, the optimizer or the stream of activations.
    """
    for field, (old, new) in sorted(changes(before, now)):
        change = f"resume: {field} was {old!r} when the checkpoint was written and is {new!r} now"
        if matches(field, (*NO_EFFECT_ON_WEIGHTS, *CHECKED_BY_FINGERPRINT)):
            log.info("%s: it holds from here on, and leaves the weights as they would have been", change)
        elif matches(field, MOVED):
            log.warning("%s: the run goes on to the bit if the same is there", change)
        elif matches(field, ROUNDING):
            log.warning("%s: the run goes on, equal up to rounding but not to the bit", change)
        elif matches(field, OTHER_RUN):
            log.warning("%s: the run goes on with the new value, as neither config alone would have trained it", change)
        else:
            raise InputError(
                f"{change}, but decides the model, its optimizer or the order of the data: put it back, or begin a "
                "new run with finetune_from"
            )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    old, new = dict(flatten(before)), dict(flatten(now))
    for field in old.keys() | new.keys():
        # A field that only one of them has is absent in the other: None, as where it is off.
        if old.get(field) != new.get(field):
            yield field, (old.get(field), new.get(field))


def matches(field: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(field, pattern) for pattern in patterns)
