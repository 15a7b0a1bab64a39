"""The training loop.

Axes: B tokens · M models · P hookpoints · D width · L latents.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing, suppress
from typing import Any

from torch import Tensor

from crosscode.config.experiment import TrainConfig
from crosscode.errors import Interrupted
from crosscode.evaluation.heldout import Evaluate, EvaluationResult
from crosscode.evaluation.precision import float32_products
from crosscode.models.base import BaseCrosscoder
from crosscode.models.split import Split
from crosscode.objectives.base import Loss, Objective
from crosscode.runs.checkpoints import Checkpoints, saving
from crosscode.runs.directory import RunDirectory
from crosscode.runs.histograms import latent_histograms
from crosscode.runs.loggers import Logger
from crosscode.runs.metrics import Metrics
from crosscode.runs.random_state import RandomState
from crosscode.stopping import Stopped, StopSignals, interruptible
from crosscode.trainers.callbacks import Callback, Callbacks
from crosscode.trainers.compiled import compile_errors_in_one_line
from crosscode.trainers.constraints import Constraint, constrain, constraints_for
from crosscode.trainers.faults import FiniteGuard
from crosscode.trainers.figures import BatchFigures, training_metrics
from crosscode.trainers.firing import FiringTracker
from crosscode.trainers.forward import ForwardPass
from crosscode.trainers.graphs import Capture, StepGraphs, capture_on, why_not
from crosscode.trainers.opening import check_parts, check_ready, first_batch, next_batch, open_runs
from crosscode.trainers.optimizers import OPTIMIZERS
from crosscode.trainers.phases import Phases
from crosscode.trainers.progress import Progress
from crosscode.trainers.recent import RecentActivations
from crosscode.trainers.resampling import resample_if_due
from crosscode.trainers.rules import warn_of_changes
from crosscode.trainers.saver import Saver
from crosscode.trainers.source import ActivationSource, as_source
from crosscode.trainers.summary import summary
from crosscode.trainers.update import Numbers, Update

log = logging.getLogger("crosscode")


class Trainer:
    """Trains one model on one stream of activations and writes a run directory. Composed, never subclassed.

    Args:
        model: initialised, on the device on which it is to be trained.
        data: batches `acts_BMPD` on that device; may lack what `as_source` says.
        split: how activations become the model's input and target.
        objective: what is minimised.
        loggers: where metrics go.
        progress: show how far it is.
        position_names: one for each position of the model's output.
        evaluate: gives held-out figures, every `evaluate_every` steps and at the end.
        n_steps: length of the run, in place of `config.n_steps`.
        metadata: kept beside the weights.
        constraints: besides those that the model implies.
        callbacks: see `Callback`.
        capture: what makes graphs of steps; default: the CUDA device, where `config.cuda_graph` says so.

    Raises:
        InputError: what does not fit together, before anything is written.
    """

    def __init__(
        self,
        model: BaseCrosscoder,
        data: ActivationSource | Iterable[Tensor],
        split: Split,
        objective: Objective,
        config: TrainConfig,
        run: RunDirectory,
        loggers: Sequence[Logger],
        *,
        position_names: Sequence[str],
        constraints: Sequence[Constraint] = (),
        evaluate: Evaluate | None = None,
        evaluate_every: int | None = None,
        n_steps: int | None = None,
        metadata: dict[str, Any] | None = None,
        progress: bool = True,
        callbacks: Sequence[Callback] = (),
        capture: Capture | None = None,
    ):
        check_parts(model, objective, position_names)
        self.model, self.data, self.split, self.objective = model, (data := as_source(data)), split, objective
        self.config, self.run, self.constraints = config, run, constraints_for(model, constraints)
        self.evaluate, self.evaluate_every, self.n_steps = evaluate, evaluate_every, n_steps or config.n_steps
        self.position_names, self.metadata = list(position_names), metadata or {}
        self.firing, self.guard = FiringTracker(model.n_latents), FiniteGuard(model.device, config.max_skipped_steps)
        self.forward = ForwardPass(model, objective, self.firing.to(model.device), config)
        self.optimizer_plan = OPTIMIZERS.build(config.optimizer)
        capture = capture or capture_on(config, model.device)
        if capture is not None and (reason := why_not(self.forward, self.constraints, self.optimizer_plan)):
            log.warning("train.cuda_graph: no step of this run is captured: %s", reason)
            capture = None
        self.optimizer_plan.lr_on_device |= capture is not None
        self.optimizer = self.optimizer_plan.build(model)
        self.update = Update(self.forward, self.constraints, self.guard, self.optimizer)
        self.graphs = None if capture is None else StepGraphs(self.update, split, capture)
        self.checkpoints = Checkpoints(run, config.keep_last, config.keep_every)
        self.phases, self.metrics = Phases(model.device), Metrics(loggers)
        self.progress, self.callbacks = Progress(self.n_steps, enabled=progress), Callbacks(callbacks)
        self.step, self.tokens, self._evaluation_due, self._resumed = 0, 0, False, False
        parts = {"metrics": self.metrics, "optimizer": self.optimizer, "firing": self.firing, "guard": self.guard}
        parts |= {"data": data, "random": RandomState(), **({"objective": objective} if objective.state_dict() else {})}
        self.recent = RecentActivations(model, config.grad_accumulation)
        self.saver = Saver(
            self.checkpoints, model, self.metadata, lambda: split.scaling(data.scaling_MP), self.recent, parts,
            lambda: self.optimizer_plan.evaluated(self.optimizer, lambda: constrain(self.constraints, model)),
            config.max_shard_size,
        )  # fmt: skip

    # ---- the loop

    def train(self) -> EvaluationResult | None:
        """Run to the last step; write metrics, checkpoints, `final/` and the summary; return held-out figures.

        Raises:
            Interrupted: a signal came; the run is saved. Before a new run begins the signal has its usual effect instead.
            NonFiniteLoss, OutOfMemory, CheckpointNotSaved: with what to do about it.
        """
        products = float32_products(tf32=self.config.tf32)
        with StopSignals() as stop, products, self.progress, closing(self.data), ExitStack() as opened:
            try:
                batches, acts_BMPD = first_batch([self], self.data, self.step)
            except Stopped:
                raise self._interrupted(stop) if self._resumed else Stopped from None
            open_runs([self], opened)
            self.start()
            while self.step < self.n_steps and not self._evaluation_due:
                if acts_BMPD is None:
                    log.warning("the data ended at step %d of %d: training stops", self.step, self.n_steps)
                    self.save_checkpoint()
                    break
                self.train_step(acts_BMPD)
                try:
                    acts_BMPD = next_batch([self], batches, self.step)
                except Stopped:
                    break
            with suppress(Stopped):
                if not stop.received:
                    return self.finish()
            self.save_and_close()
            raise self._interrupted(stop)

    def open(self) -> None:
        """Make the run directory, or clear it up where the run goes on, and begin to log. The run must be held."""
        check_ready(self.model, *self.split.scaling(self.data.scaling_MP))
        self.run.begin()
        self.metrics.open()
        if self._resumed:
            self.metrics.rewind(self.step)
        self.callbacks.start(self)

    def start(self) -> None:
        """Before the first step, and before the first after a resume."""
        self.model.train()
        self.optimizer_plan.start_training(self.optimizer)
        self.progress.start(self.step)
        if self._evaluation_due:
            self._evaluate_in_training()

    def train_step(self, acts_BMPD: Tensor) -> None:
        """One update, and whatever is due after it."""
        figures = BatchFigures(self.model.out_dims) if self._is_due(self.config.log_every, self.step + 1) else None
        with self.phases("step"), compile_errors_in_one_line():
            self.optimizer_plan.set_learning_rate(self.optimizer, self.step, self.n_steps)
            self.model.before_step(self.step, self.n_steps)
            numbers = Numbers(self.step, self.objective.coefficients(self.step, self.n_steps))
            input_BXiDi, target_BXoDo = self.split.activations(acts_BMPD)
            self.recent.add(input_BXiDi)
            self.forward.announce(len(acts_BMPD))
            loss = grad_norm = None
            if figures is not None or self.graphs is None or not self.graphs(acts_BMPD, numbers):
                observers = [figures.observe] if figures is not None else []
                loss, grad_norm = self.update(input_BXiDi, target_BXoDo, numbers, observers)
            if self.graphs is not None:
                self.graphs.done()
            self.objective.after_step(self.firing.l0, self.step, self.n_steps)
            self.step, self.tokens = self.step + 1, self.tokens + acts_BMPD.shape[0]
            resample_if_due(self, input_BXiDi, target_BXoDo)
        self.callbacks.step(self)
        self.progress.advance(self.metrics.last, self.callbacks.names)
        if figures is not None and loss is not None and grad_norm is not None:
            self._log_training(figures, loss, grad_norm)
        if self._is_due(self.config.histogram_every, self.step):
            self.metrics.log_histograms(self.step, latent_histograms(self.model, self.firing.take_density_L()))
        if self._is_due(self.evaluate_every, self.step) and self.step < self.n_steps:
            self._evaluate_in_training()
        if self._is_due(self.config.checkpoint_every or self.n_steps, self.step):
            self.save_checkpoint(or_warn=self.step < self.n_steps)
        if self.callbacks.failure is not None and self.step < self.n_steps:
            self.save_and_close()

    def save_and_close(self) -> None:
        """Leave a run that can be resumed."""
        if self.saver.saved_step != self.step:
            self.save_checkpoint()
        self.metrics.close()
        self.callbacks.raise_failure(self.step, self.run.path)

    def finish(self) -> EvaluationResult | None:
        """Fold the scaling in, write `final/`, evaluate, write `summary.json`."""
        self.graphs = None  # and the memory that they keep
        self.optimizer_plan.start_evaluation(self.optimizer)
        constrain(self.constraints, self.model)
        self.recent.settle_()
        self.model.eval()
        self.model.fold_activation_scaling_into_weights_(*self.split.scaling(self.data.scaling_MP))
        self.run.drop_figures()
        with saving("the trained model", f"free some space, then: crosscode train --resume {self.run.path}"):
            self.model.save(self.run.final, self.metadata, max_shard_size=self.config.max_shard_size)
        self.callbacks.checkpoint(self, self.run.final)
        self.run.drop_put_by()
        if (evaluation := self._evaluate(None)) is not None:
            self.run.write_evaluation(evaluation.to_json())
        self.metrics.close()
        beside = (self.metrics, self.position_names, evaluation, self.callbacks.names)
        self.run.write_summary(figures := summary(self.model, self.counts(), *beside))
        self.objective.warn_if_missed(figures["l0"])
        if evaluation is not None:
            evaluation.check_finite()
        self.callbacks.raise_failure(self.step, self.run.path)
        return evaluation

    def _interrupted(self, stop: StopSignals) -> Interrupted:
        return stop.interrupted(self.step, self.n_steps, f"crosscode train --resume {self.run.path}")

    def _is_due(self, every: int | None, step: int) -> bool:
        return every is not None and (step % every == 0 or step == self.n_steps)

    def _log_training(self, figures: BatchFigures, loss: Loss, grad_norm: Tensor) -> None:
        self.guard.check(self.checkpoints.newest_name())  # values are read from the device from here on
        self._log(training_metrics(self, figures.values(loss, self.position_names), grad_norm))

    def counts(self) -> dict[str, float]:
        """Steps, tokens, and the seconds that they and their harvest took, over all parts of a resumed run."""
        return {"step": self.step, "tokens": self.tokens, "seconds": self.phases.training_s}

    def _log(self, metrics: dict[str, Any]) -> None:
        self.metrics.log(self.callbacks.join({"step": self.step, "tokens": self.tokens, **metrics}))

    def _evaluate_in_training(self) -> None:
        self.optimizer_plan.start_evaluation(self.optimizer)
        self._evaluation_due = True
        with suppress(Stopped):  # the loop looks whether a signal came; what it ended is done when the run goes on
            self._evaluate(self.data.scaling_MP)
            self._evaluation_due = False
        self.optimizer_plan.start_training(self.optimizer)

    def _evaluate(self, scaling_MP: Tensor | None) -> EvaluationResult | None:
        """Held-out figures of the model as it is, into the metrics."""
        if self.evaluate is None:
            return None
        with self.phases("eval"), self.progress.during("evaluate"), interruptible():
            evaluation = self.evaluate(self.model, scaling_MP)
            self.callbacks.evaluate(self, evaluation)
        if scaling_MP is not None and (problems := evaluation.problems()):
            log.warning("step %d: %s", self.step, problems)
        self._log(evaluation.as_metrics())
        return evaluation

    def save_checkpoint(self, *, or_warn: bool = False) -> None:
        """`checkpoints/step_N/`, whole or not there.

        Raises:
            NonFiniteLoss: something is wrong with the last steps: nothing is saved over what was good.
            CheckpointNotSaved: the disk refuses (`or_warn`: say so, and go on).
        """
        self.guard.check(self.checkpoints.newest_name())
        self.saver.save({**self.counts(), "evaluation_due": self._evaluation_due}, or_warn=or_warn)
        if self.saver.saved_step == self.step:
            self.callbacks.checkpoint(self, self.run.checkpoint(self.step))

    def restore(self, step: int | None) -> None:
        """Continue from `checkpoints/step_N/`, which must be whole (`Checkpoints.newest_whole`); None: from step 0."""
        if step is not None:
            state = self.saver.load(step)
            self.step, self.tokens, self.phases.training_s_before = state["step"], state["tokens"], state["seconds"]
            self._evaluation_due = state.get("evaluation_due", False)
            warn_of_changes(state["rules"], self.model)
        self._resumed = True
