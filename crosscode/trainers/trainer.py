"""The training loop.

Axes: B tokens · M models · P hookpoints · D width · L latents.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from crosscode_kernels.row_sparse_adam import clip_grad_norm_, grad_norm
from torch import Tensor

from crosscode.errors import Interrupted
from crosscode.evaluation.evaluation import EvaluationResult
from crosscode.models.base import BaseCrosscoder
from crosscode.models.checkpoint import write_model
from crosscode.models.split import Split
from crosscode.objectives.base import Objective
from crosscode.runs.checkpoints import CheckpointNotSaved, Checkpoints, saving
from crosscode.runs.directory import RunDirectory
from crosscode.runs.histograms import latent_histograms
from crosscode.runs.loggers import Logger
from crosscode.runs.metrics import Metrics
from crosscode.runs.random_state import random_state, set_random_state
from crosscode.runs.state import read_state, write_state
from crosscode.trainers.constraints import Constraint
from crosscode.trainers.faults import FiniteGuard
from crosscode.trainers.figures import BatchFigures
from crosscode.trainers.firing import FiringTracker
from crosscode.trainers.interruption import StopSignals
from crosscode.trainers.optimizers.base import OptimizerRecipe
from crosscode.trainers.phases import Phases, peak_memory_gib
from crosscode.trainers.progress import Progress
from crosscode.trainers.settings import ActivationSource, Evaluate, TrainerSettings
from crosscode.trainers.step import TrainingStep

log = logging.getLogger("crosscode")


class Trainer:
    """Trains one model on one stream of activations and writes a run directory. Composed, never subclassed."""

    def __init__(
        self,
        model: BaseCrosscoder,
        data: ActivationSource,
        split: Split,
        objective: Objective,
        optimizer: OptimizerRecipe,
        settings: TrainerSettings,
        run: RunDirectory,
        loggers: Sequence[Logger],
        *,
        position_names: Sequence[str],
        constraints: Sequence[Constraint] = (),
        evaluate: Evaluate | None = None,
        metadata: dict[str, Any] | None = None,
        progress: bool = True,
    ):
        objective.check_model(model)
        self.model, self.data, self.split = model, data, split
        self.recipe, self.settings, self.run = optimizer, settings, run
        self.constraints, self.position_names = constraints, list(position_names)
        self._evaluate_model, self.metadata = evaluate, metadata or {}
        self.optimizer = optimizer.build(model)
        self.firing = FiringTracker(model.n_latents).to(model.device)
        self.forward_backward = TrainingStep(
            model, split, objective, self.firing, settings.precision, settings.grad_accumulation, settings.compile
        )
        self.guard = FiniteGuard(model.device, settings.max_skipped_steps)
        self.checkpoints = Checkpoints(run, settings.keep_last, settings.keep_every)
        self.phases = Phases(model.device)
        self.metrics = Metrics(loggers)
        self.progress = Progress(settings.n_steps, enabled=progress)
        self.step = self.tokens = 0
        self.seconds_before = 0.0
        self._saved_step = -1

    # ---- the loop

    def train(self) -> EvaluationResult | None:
        """Run to the last step; write metrics, checkpoints, `final/` and the summary; return held-out figures.

        Raises:
            Interrupted: a signal came; the run is saved.
            NonFiniteLoss, OutOfMemory, CheckpointNotSaved: with what to do about it.
        """
        matmuls = self.settings.precision.matmuls()
        with StopSignals() as stop, self.run.held(), matmuls, self.progress, closing(self.data):
            batches = iter(self.data)
            self.start()
            while self.step < self.settings.n_steps:
                with self.phases("harvest"):
                    acts_BMPD = next(batches, None)
                if acts_BMPD is None:
                    log.warning("the data ended at step %d of %d: training stops", self.step, self.settings.n_steps)
                    self.save_checkpoint()
                    break
                self.train_step(acts_BMPD)
                if stop.received:
                    self.leave(stop.received)
            return self.finish()

    def start(self) -> None:
        """Before the first step, and before the first after a resume."""
        self.model.train()
        self.recipe.start_training(self.optimizer)
        self.progress.start(self.step)

    def train_step(self, acts_BMPD: Tensor) -> None:
        """One update, and whatever is due after it."""
        figures = BatchFigures(self.model.out_dims) if self._is_due(self.settings.log_every, self.step + 1) else None
        with self.phases("step"):
            self._set_learning_rate()
            loss = self.forward_backward(
                acts_BMPD, self.step, self.settings.n_steps, figures.observe if figures else None
            )
            for constraint in self.constraints:
                constraint.after_backward(self.model)
            grad_norm = self._clip()
            self.guard.before_optimizer(self.step, loss.weighted_parts(), grad_norm, self.optimizer, self.model)
            self.optimizer.step()
            for constraint in self.constraints:
                constraint.after_step(self.model)
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += acts_BMPD.shape[0]
        self.progress.advance(self.metrics.last)
        if figures is not None:
            self.guard.check(self.checkpoints.newest_name())
            self._log({**figures.values(loss, self.position_names), **self._facts(grad_norm)})
        if self._is_due(self.settings.histogram_every, self.step):
            self.metrics.log_histograms(self.step, latent_histograms(self.model, self.firing.take_density_L()))
        if self._is_due(self.settings.evaluate_every, self.step) and self.step < self.settings.n_steps:
            self.evaluate()
        if self._is_due(self.settings.checkpoint_every or self.settings.n_steps, self.step):
            self._save_or_warn()

    def save_and_close(self) -> None:
        """Leave a run that can be resumed."""
        if self._saved_step != self.step:
            self.save_checkpoint()
        self.metrics.close()

    def leave(self, signal_name: str) -> None:
        """Save and raise `Interrupted`."""
        self.save_and_close()
        raise Interrupted(
            f"stopped by {signal_name} after step {self.step} of {self.settings.n_steps}; "
            f"continue with: crosscode train --resume {self.run.path}"
        )

    def finish(self) -> EvaluationResult | None:
        """Fold the scaling in, write `final/`, evaluate."""
        self.recipe.start_evaluation(self.optimizer)
        for constraint in self.constraints:
            constraint.after_step(self.model)
        self.model.eval()
        self.model.fold_activation_scaling_into_weights_(*self.split.scaling(self.data.scaling_MP))
        with saving("the trained model", f"free some space, then: crosscode train --resume {self.run.path}"):
            self.model.save(self.run.final, self.metadata)
        evaluation = self._evaluate(None)
        if evaluation is not None:
            self.run.write_evaluation(evaluation.to_json())
        self.metrics.close()
        return evaluation

    # ---- parts of a step

    def _is_due(self, every: int | None, step: int) -> bool:
        return every is not None and (step % every == 0 or step == self.settings.n_steps)

    def _set_learning_rate(self) -> None:
        factor = self.recipe.lr_factor(self.step, self.settings.n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _clip(self) -> Tensor:
        """The gradient norm before clipping, on the device."""
        limit = self.settings.clip_grad_norm
        if limit is not None:
            return clip_grad_norm_(self.model.parameters(), limit, self.optimizer)
        return grad_norm(self.model.parameters())

    # ---- what is reported

    def _facts(self, grad_norm: Tensor) -> dict[str, Any]:
        return {
            "dead_fraction": self.firing.dead_fraction(self.settings.dead_after_tokens).item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm.item(),
            "skipped_steps": self.guard.n_skipped,
            "tokens_per_s": self.tokens_per_s,
            "elapsed_s": self.seconds,
            **self.phases.take_means(),
            **peak_memory_gib(self.model.device),
        }

    @property
    def seconds(self) -> float:
        """Spent on training steps and their activations, over all parts of a resumed run."""
        return self.seconds_before + self.phases.total_s["harvest"] + self.phases.total_s["step"]

    @property
    def tokens_per_s(self) -> float:
        """Tokens trained on per second, harvest included, evaluation and checkpoints not."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def _log(self, metrics: dict[str, Any]) -> None:
        self.metrics.log({"step": self.step, "tokens": self.tokens, **metrics})

    def evaluate(self) -> None:
        """Held-out figures of the model as it is, into the metrics."""
        self.recipe.start_evaluation(self.optimizer)
        self._evaluate(self.data.scaling_MP)
        self.recipe.start_training(self.optimizer)

    def _evaluate(self, scaling_MP: Tensor | None) -> EvaluationResult | None:
        if self._evaluate_model is None:
            return None
        with self.phases("eval"), self.progress.during("evaluate"):
            evaluation = self._evaluate_model(self.model, scaling_MP)
        self._log(evaluation.as_metrics())
        return evaluation

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the model."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "metrics": self.metrics.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "firing": dict(self.firing.state_dict()),
            "guard": self.guard.state_dict(),
            "data": self.data.state_dict(),
            "random": random_state(),
        }

    def save_checkpoint(self) -> None:
        """`checkpoints/step_N/`: the unfolded model and the trainer's state, whole or not there.

        Raises:
            NonFiniteLoss: something is wrong with the last steps: nothing is saved over what was good.
            CheckpointNotSaved: the disk refuses.
        """
        self.guard.check(self.checkpoints.newest_name())

        def write(folder: Path) -> None:
            write_model(self.model, folder, self.metadata)
            write_state(folder, self.state_dict())

        self.checkpoints.save(self.step, write)
        self._saved_step = self.step

    def _save_or_warn(self) -> None:
        """Training goes on where a checkpoint cannot be written: the disk may have room again for the next one."""
        try:
            self.save_checkpoint()
        except CheckpointNotSaved as error:
            if self.step == self.settings.n_steps:
                raise
            log.warning("%s; training goes on", error)

    def restore(self, step: int | None) -> None:
        """Continue from `checkpoints/step_N/`, which must be whole (`Checkpoints.newest_whole`); None: from step 0."""
        if step is not None:
            self._load_checkpoint(step)
        self.metrics.rewind(self.step)

    def _load_checkpoint(self, step: int) -> None:
        folder = self.run.checkpoint(step)
        saved = type(self.model).load(folder, backend=self.model.backend, device=self.model.device)
        self.model.load_state_dict(saved.state_dict())
        state = read_state(folder)
        self.step, self.tokens, self.seconds_before = state["step"], state["tokens"], state["seconds"]
        self.metrics.load_state_dict(state["metrics"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.firing.load_state_dict(state["firing"])
        self.guard.load_state_dict(state["guard"])
        self.data.load_state_dict(state["data"])
        set_random_state(state["random"])
        self._saved_step = step
