"""A run that has a model: what is needed to look at it."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscode.build.experiment import open_experiment
from crosscode.build.heldout import AnyExperiment
from crosscode.build.resume import (
    CHECKED_BY_FINGERPRINT,
    MOVED,
    NO_EFFECT_ON_WEIGHTS,
    ROUNDING,
    changes,
    config_values,
    matches,
)
from crosscode.build.run import check_same_language_models
from crosscode.build.schema import check_config, load_own_config
from crosscode.config.experiment import ExperimentConfig
from crosscode.data.harvest.language_models import available_device
from crosscode.errors import InputError
from crosscode.evaluation.heldout import EvaluationResult, measure_reconstruction
from crosscode.formats import today
from crosscode.interop.hub import local
from crosscode.models.base import BaseCrosscoder
from crosscode.models.checkpoint import check_undamaged, read_config
from crosscode.parallel.group import is_first, joined
from crosscode.parallel.refusals import for_ranks
from crosscode.parallel.training import shard_
from crosscode.runs.directory import open_run
from crosscode.stored import Evaluation, read_json
from crosscode.trainers.progress import Progress
from crosscode.trainers.warm_start import find_model, load_folded
from crosscode.weight_files import has_weights

log = logging.getLogger("crosscode")


class FinishedRun:
    """What a run directory holds, or a repository USER/NAME on the hub, each part loaded when it is first asked for.
    `trust_remote_code`: as of `load_own_config`.

    Raises:
        InputError: no run there; later, where it holds no model yet.
    """

    def __init__(self, path: str | Path, trust_remote_code: bool = False):
        self.directory, self._trust_remote_code = open_run(local(path)), trust_remote_code
        self.path, self._seen = self.directory.path, self.directory.seen()
        self._is_checked = False

    @cached_property
    def config(self) -> ExperimentConfig:
        """The config, checked; `run_dir` is where the run is now."""
        config = load_own_config(self.directory.config_file, self._trust_remote_code)
        return for_ranks(config.model_copy(update={"run_dir": str(self.path)}), to_train=False)

    @property
    def is_over(self) -> bool:
        """Whether the trained model is there, rather than that of a checkpoint."""
        return self.model_folder == self.directory.final

    @property
    def model_folder(self) -> Path:
        """Of `final/`, or of the newest checkpoint."""
        return find_model(str(self.path), "run")

    def check_whole(self) -> None:
        """Raise `InputError` where the trained model is damaged, or figures beside it are of another one."""
        if self.directory.has_final():
            self.directory.check_final()
            check_undamaged(self.directory.final)
            self._is_checked = True

    @cached_property
    def model(self) -> BaseCrosscoder:
        """The trained model (of a run that is not over, that of its newest checkpoint), with scaling folded in: it takes
        raw activations. In eval mode, on the config's device; each of several processes has its own rows."""
        group, model = joined(), self._whole_model()
        if group is not None:
            shard_(model, group)
        return model

    def _whole_model(self) -> BaseCrosscoder:
        folder, device = self.model_folder, available_device(self.config.device)
        try:
            checked = self._is_checked and folder == self.directory.final
            return load_folded(folder, self.config.backend, device, checked=checked)
        except (InputError, OSError):
            if has_weights(folder):
                raise
        # A process that trains here has a newer checkpoint, and removed this one.
        return load_folded(self.model_folder, self.config.backend, device)

    @cached_property
    def experiment(self) -> AnyExperiment:
        """Held-out text and language models, or the rows that were held out.

        Raises:
            InputError: the config names others than the model was trained on.
        """
        check_is_its_own(self.config, self.model_folder)
        experiment = open_experiment(self.config, to_train=False)
        check_same_language_models(self.model_folder, experiment.language_model_facts())
        return experiment

    @cached_property
    def max_activation_L(self) -> Tensor:
        """Largest activation of each latent on held-out activations (float32), 0 where it never fires: from the run's own
        evaluation, or measured now."""
        stored = self.path / "evaluation.json"
        found = read_json(stored, Evaluation).get("max_activation_L") if self.is_over and stored.is_file() else None
        if found is None or len(found) != self.model.n_latents:
            experiment = self.experiment
            batches = experiment.heldout_activations()
            names = experiment.output_names()
            found = measure_reconstruction(self.model, batches, experiment.split, names).max_activation_L
        return torch.tensor(found, dtype=torch.float32)

    def evaluate(self, n_tokens: int | None = None, *, progress: bool = False) -> EvaluationResult:
        """Held-out figures. As configured they are kept in the run; on another number of activations they are not."""
        experiment, model = self.experiment, self.model
        progress &= is_first()
        with Progress(experiment.n_evaluated(n_tokens), what="evaluate", unit="token", enabled=progress) as shown:
            result = experiment.evaluate(model, n_tokens=n_tokens, through=shown.through)
        if n_tokens is not None and result.n_tokens < n_tokens:
            log.warning("n_tokens = %d: only %d are held out; the figures are of these", n_tokens, result.n_tokens)
        if n_tokens is None and is_first():
            self.keep(result.to_json())
        return result

    def keep(self, evaluation: dict[str, Any]) -> None:
        """In the run, where it may be written, no process is training it, and none has since this one began to look."""
        try:
            with self.directory.held():
                if self.directory.seen() != self._seen:
                    raise InputError("another process has worked on it meanwhile")
                self.directory.write_evaluation(evaluation)
        except (InputError, OSError) as error:
            log.warning("the figures are not kept in the run: %s", error)


def check_is_its_own(config: ExperimentConfig, folder: Path) -> None:
    """Whether a config, which somebody may have changed, is that of the saved model beside it. Whatever is another and
    decides weights or figures is said.

    Raises:
        InputError: another architecture, other hookpoints or language models.
    """
    before = read_config(folder)["metadata"].get("config")
    if before is None:
        return
    then, now = (config_values(one) for one in (check_config(today(before, str(folder))), config))
    fields = {
        "hookpoints": (then["hookpoints"], now["hookpoints"]),
        "crosscoder.type": (then["crosscoder"]["type"], now["crosscoder"]["type"]),
        "language_models": tuple(len(one["language_models"]) for one in (then, now)),
    }
    for name, (old, new) in fields.items():
        if old != new:
            raise InputError(
                f"config.yaml: {name} = {new!r}: the model in {str(folder)!r} was trained with {old!r}; put it back"
            )
    passed_over = (*NO_EFFECT_ON_WEIGHTS, *CHECKED_BY_FINGERPRINT, *MOVED, *ROUNDING)
    for name, (old, new) in sorted(changes(then, now)):
        if not matches(name, passed_over):
            log.warning("config.yaml: %s is %r; the model was trained with %r", name, new, old)
