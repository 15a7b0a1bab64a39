"""Updates as CUDA graphs: what an update launches is recorded once and launched again as one, which helps where a step takes
less time than its launches (small models).

A replay knows nothing of Python: numbers that change from step to step lie in memory of the device and are written there before
it, whatever follows from a number in another way makes another graph (`LossTerm.form`) or is not captured at all. Who is not
known to keep to that is named in the log, and the run goes on without.

Axes: B tokens · M models · P hookpoints · D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from crosscode_kernels import copies
from torch import Tensor, cuda

from crosscode.config.experiment import TrainConfig
from crosscode.errors import InputError, first_line
from crosscode.models.split import Split
from crosscode.objectives.base import Objective
from crosscode.trainers.constraints import Constraint
from crosscode.trainers.forward import ForwardPass
from crosscode.trainers.optimizers import OptimizerPlan
from crosscode.trainers.update import Numbers, Update

log = logging.getLogger("crosscode")
T = TypeVar("T")

N_WARM_UP = 3
"""Updates of each kind before the one that is captured: what the first ones make (moments, tuned launches) is there then."""


class Capture(Protocol):
    """How a device records what a function launches."""

    def aside(self, call: Callable[[], T]) -> T:
        """Call it where captures are made."""
        ...

    def capture(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record it without running it: the result, and what runs it and fills the result's tensors."""
        ...


class CudaCapture:
    """On a stream of its own. Each graph has its own memory: it is launched in any order, and goes when it will."""

    def __init__(self, device: torch.device):
        self.stream = cuda.Stream(device)

    def aside(self, call: Callable[[], T]) -> T:
        self.stream.wait_stream(cuda.current_stream())
        with cuda.stream(self.stream):
            result = call()
        cuda.current_stream().wait_stream(self.stream)
        return result

    def capture(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        graph = cuda.CUDAGraph()
        # Another thread may harvest meanwhile, and allocate.
        with cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = call()
        return result, graph.replay


class _NumbersInMemory:
    """Scalars at fixed places, of which those that changed are written: the launch carries the number, so that nothing of the
    host must outlive it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._known: dict[str, float] = {}
        self._tensors: dict[str, Tensor] = {}

    def write(self, numbers: Numbers) -> Numbers:
        for name, value in {"": numbers.step, **numbers.coefficients}.items():  # terms have names
            if name not in self._tensors:
                dtype = torch.float64 if name else torch.int64
                self._tensors[name] = torch.zeros((), dtype=dtype, device=self._device)
            elif self._known[name] == value:
                continue
            self._tensors[name].fill_(value)
            self._known[name] = float(value)
        return Numbers(self._tensors[""], {name: self._tensors[name] for name in numbers.coefficients})


@dataclass
class _Kind:
    """Updates that launch the same."""

    n_done: int = 0
    replay: Callable[[], None] | None = None


class StepGraphs:
    """Does updates by replaying them, one graph for each kind.

    A batch is copied to a fixed place. Updates before a capture are those of the run, done eagerly; a capture runs nothing.
    What another than an update did to the weights is seen by their versions: graphs are then captured anew.
    """

    def __init__(self, update: Update, split: Split, capture: Capture):
        self.update, self.split, self.device = update, split, capture
        self._numbers = _NumbersInMemory(update.model.device)
        self._acts_BMPD: Tensor | None = None
        self._kinds: dict[tuple[Any, ...], _Kind] = {}
        self._weights: list[tuple[int, int]] | None = None
        self._said: set[str] = set()
        self._failed = False

    def __call__(self, acts_BMPD: Tensor, numbers: Numbers) -> bool:
        """Do an update on a batch, if it can be done here; else nothing."""
        if self._failed or not self._can_now(acts_BMPD):
            return False
        if self._acts_BMPD is None:
            self._acts_BMPD = torch.empty_like(acts_BMPD)
        if self._weights is not None and self._weights != self._weights_now():
            self._kinds.clear()
        self._acts_BMPD.copy_(acts_BMPD)
        form = forms(self.update.objective, self.update.forward.longest_silence, self.update.config.dead_after_tokens)
        in_memory, kind = self._numbers.write(numbers), self._kinds.setdefault(form, _Kind())

        def call() -> Any:
            assert self._acts_BMPD is not None
            return self.update(*self.split.activations(self._acts_BMPD), in_memory)

        if kind.replay is None and kind.n_done >= N_WARM_UP:
            kind.replay = self._captured(call)
        if self._failed:
            return False
        self.device.aside(call) if kind.replay is None else kind.replay()
        kind.n_done += 1
        return True

    @property
    def n_graphs(self) -> int:
        """How many there are now."""
        return sum(kind.replay is not None for kind in self._kinds.values())

    def done(self) -> None:
        """Behind each update, whoever did it: the weights are as updates leave them."""
        self._weights = self._weights_now()

    def _captured(self, call: Callable[[], Any]) -> Callable[[], None] | None:
        try:
            return self.device.capture(call)[1]
        except RuntimeError as error:
            said = "train.cuda_graph: the step cannot be captured (%s): the run goes on without"
            log.warning(said, first_line(error))
        self._failed = True
        self._kinds.clear()
        self.update.optimizer.zero_grad(set_to_none=True)
        for param in self.update.model.parameters():
            copies.forget(param)  # nothing has filled them
        return None

    def _weights_now(self) -> list[tuple[int, int]]:
        """Where they lie, and versions of those of which 16-bit copies may be kept: a graph may write and read one, and does not
        know that it is stale."""
        return [(p.data_ptr(), p._version if p.dim() > 1 else 0) for p in self.update.model.parameters()]

    def _can_now(self, acts_BMPD: Tensor) -> bool:
        """Whether this step can be part of a graph, as others of the run; why not is said once."""
        kept, reason = self._acts_BMPD, None
        if any(activation.is_annealing for activation in self.update.model.activation_fns):
            reason = "while crosscoder.activation.k_start falls to k"
        elif kept is not None and (kept.shape, kept.dtype) != (acts_BMPD.shape, acts_BMPD.dtype):
            reason = f"of batches of another size, such as {len(acts_BMPD)}"
        if reason is not None and reason not in self._said:
            self._said.add(reason)
            log.info("train.cuda_graph: steps are not captured %s", reason)
        return reason is None


def capture_on(train: TrainConfig, device: torch.device) -> Capture | None:
    """What records on this device, where `train.cuda_graph` is True; None: it is not ("auto": nobody has tried it out).

    Raises:
        InputError: no CUDA device.
    """
    if train.cuda_graph is not True:
        return None
    check_device(train, device)
    return CudaCapture(device)


def check_device(train: TrainConfig, device: torch.device) -> None:
    """Raise `InputError` where graphs are asked for and the device has none."""
    if train.cuda_graph is True and device.type != "cuda":
        raise InputError(
            f"train.cuda_graph = True: needs a CUDA device, got {device.type!r}; set train.cuda_graph: auto, or false"
        )


def why_not(forward: ForwardPass, constraints: Sequence[Constraint], plan: OptimizerPlan) -> str | None:
    """What a run has that keeps its steps from being captured."""
    model, config = forward.model, forward.config
    if config.compile:
        return "train.compile = True"
    if config.log_every == 1:
        return "train.log_every = 1, and a step whose figures are logged never is"
    if config.grad_accumulation > 1:
        return f"train.grad_accumulation = {config.grad_accumulation}"
    if any(getattr(param, "holds_own_rows", False) for param in model.parameters()):
        return "several processes"
    if not plan.can_be_captured(model):
        return f"train.optimizer {type(plan).__name__}"
    parts: Sequence[Any] = (model, *model.parts, *model.activation_fns, *constraints)
    terms = {f"objective.{name}": term for name, (term, _) in forward.objective.terms.items()}
    for name, one in [*((type(part).__name__, part) for part in parts), *terms.items()]:
        if not _says_so(one):
            return name
    return None


def forms(objective: Objective, longest_silence: int | None, dead_after_tokens: int) -> tuple[Any, ...]:
    """`LossTerm.form` of each term: steps that differ in it are graphs of their own."""
    return tuple(term.form(longest_silence, dead_after_tokens) for term, _ in objective.terms.values())


def _says_so(one: Any) -> bool:
    """A subclass of one that can be captured need not be such, so that each class says it of itself."""
    return bool((vars(type(one)) | vars(one)).get("capturable", False))
