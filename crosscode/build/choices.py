"""Which variant of a computation is the fastest on this machine at a run's own sizes: tried out once, before a new run begins.

What is found is written into the run's config, which its checkpoints hold too: a run that goes on keeps it, and a run from that
config repeats to the bit. What the config says already is not tried. Variants give the same numbers up to rounding.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · K kept per token.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import torch
from crosscode_kernels import Backend, OpSet
from crosscode_kernels.backend import SPARSE_BELOW, resolve
from crosscode_kernels.row_sparse_adam import RowSparseAdam, clip_grad_norm_
from torch import Tensor

from crosscode.build.data import available_device
from crosscode.build.experiment import build_constraints, build_model, build_objective
from crosscode.config.experiment import ExperimentConfig
from crosscode.evaluation.precision import float32_products
from crosscode.models.architecture import split_for
from crosscode.models.base import BaseCrosscoder
from crosscode.trainers.faults import FiniteGuard
from crosscode.trainers.firing import FiringTracker
from crosscode.trainers.forward import ForwardPass
from crosscode.trainers.graphs import N_WARM_UP, Capture, CudaCapture, StepGraphs, why_not
from crosscode.trainers.optimizers import OPTIMIZERS
from crosscode.trainers.update import Numbers, Update

log = logging.getLogger("crosscode")

WORTH_TRYING = 1 << 32
"""Multiplications of one encode: below, a step is so short that no choice matters."""
CLEARLY = 0.97
"""What a variant may take, of the time of the plainer one, to be chosen."""
DENSITIES = (0.03, 0.1)
MOST = 0.25
"""Shares of active latents at which sparse products are timed; no share beyond `MOST` is said to be worth it."""
MOST_TO_CAPTURE = 1 << 36
"""Multiplications of one encode: above, a GPU takes longer for a step than its launches take, and trying costs memory."""

Clock = Callable[[], float]


def with_choices(
    config: ExperimentConfig, width: int, *, model_is_given: bool = False, clock: Clock = time.perf_counter
) -> ExperimentConfig:
    """The config with what it leaves to us filled in: `backend`, `sparse_below` and `train.optimizer.row_sparse`, where they are
    "auto" or null and a choice is there (on a CPU, in float32, at sizes where it matters), and `train.cuda_graph` on a CUDA
    device. A model that is given has made its own."""
    device, optimizer = available_device(config.device), OPTIMIZERS.build(config.train.optimizer)
    row_sparse = optimizer.row_sparse
    backend = resolve(config.backend, device)
    changes: dict[str, Any] = {}
    may_try = (
        not model_is_given and backend.name == "torch" and device.type == "cpu" and config.train.precision == "float32"
    )
    with torch.device("meta"):
        model = build_model(config, width).parts[0]
    if may_try and config.train.batch_size * model.W_enc_LXiDi.numel() >= WORTH_TRYING:
        trial = Trial(model, config.train.batch_size, clock)
        if config.backend == "auto" and model.activation_fn.is_screened:
            changes["backend"] = str(trial.screened_or_not())
        if config.sparse_below is None and model.activation_fn.may_be_either:
            changes["sparse_below"] = trial.sparse_below()
        if row_sparse == "auto" and _may_be_row_sparse(config, model):
            row_sparse = trial.row_sparse(float(optimizer.betas[1]))
    if row_sparse == "auto":
        row_sparse = False
        log.info(
            "train.optimizer.row_sparse auto: False (no k, too small, on a GPU, or a constraint needs whole gradients)"
        )
    if row_sparse != optimizer.row_sparse:
        chosen = optimizer.config.model_copy(update={"row_sparse": row_sparse})
        changes["train"] = config.train.model_copy(update={"optimizer": chosen})
    if config.train.cuda_graph == "auto":
        chosen, small = False, config.train.batch_size * model.W_enc_LXiDi.numel() <= MOST_TO_CAPTURE
        if device.type == "cuda" and small and not model_is_given:

            def waiting() -> float:
                torch.cuda.synchronize(device)
                return clock()

            chosen = captured(config.model_copy(update=changes), width, device, CudaCapture(device), waiting)
        log.info("train.cuda_graph auto: %s", chosen)
        changes["train"] = changes.get("train", config.train).model_copy(update={"cuda_graph": chosen})
    return config.model_copy(update=changes)


def _may_be_row_sparse(config: ExperimentConfig, model: BaseCrosscoder) -> bool:
    """Whether it is known how many latents will be active, and nothing needs whole gradients."""
    with torch.device("meta"):
        return model.activation_fn.keeps_k and all(one.takes_row_sparse for one in build_constraints(config, model))


def captured(config: ExperimentConfig, width: int, device: torch.device, capture: Capture, clock: Clock) -> bool:
    """Whether the run's own step is faster as a CUDA graph. It trains a model of random weights on random activations."""
    generator, train = torch.Generator().manual_seed(0), config.train
    model = build_model(config, width).to(device).train()
    own = {param for activation in model.activation_fns for param in activation.parameters()}
    with torch.no_grad():
        for param in model.parameters():
            if param not in own:
                param.copy_(torch.randn(param.shape, generator=generator).mul_(param[0].numel() ** -0.5))
    objective, firing = build_objective(config), FiringTracker(model.n_latents).to(device)
    forward, constraints = ForwardPass(model, objective, firing, train), build_constraints(config, model)
    plan, split = OPTIMIZERS.build(train.optimizer), split_for(config.crosscoder.type)
    if reason := why_not(forward, constraints, plan):
        log.info("train.cuda_graph auto: not tried: %s", reason)
        return False
    plan.lr_on_device = True
    optimizer = plan.build(model)
    plan.start_training(optimizer)
    model.before_step(train.n_steps, train.n_steps)  # annealing is over
    update = Update(forward, constraints, FiniteGuard(device, train.max_skipped_steps), optimizer)
    graphs, numbers = StepGraphs(update, split, capture), Numbers(0, objective.coefficients(0, train.n_steps))
    acts_BMPD = torch.randn(train.batch_size, *config.n_positions(), width, generator=generator).to(device)
    forward.announce(train.batch_size)

    def launched() -> None:
        update(*split.activations(acts_BMPD), numbers)
        graphs.done()

    def replayed() -> None:
        graphs(acts_BMPD, numbers)
        graphs.done()

    with float32_products(tf32=train.tf32):
        for _ in range(N_WARM_UP + 1):
            replayed()
        if not graphs.n_graphs:
            return False
        seconds = faster(f"step of {config.name}", {"launched": launched, "as a CUDA graph": replayed}, clock)
    return seconds["as a CUDA graph"] < CLEARLY * seconds["launched"]


def faster(what: str, variants: Mapping[str, Callable[[], Any]], clock: Clock, n_repeats: int = 5) -> dict[str, float]:
    """Median seconds of each variant, in turns; said in the log."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(n_repeats + 1):
        for name, call in variants.items():
            start = clock()
            call()
            if repeat:
                found[name].append(clock() - start)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    log.info("%s: %s", what, ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in medians.items()))
    return medians


class Trial:
    """Random tensors of a run's sizes, and training steps on them."""

    def __init__(self, model: BaseCrosscoder, n_tokens: int, clock: Clock) -> None:
        generator = torch.Generator().manual_seed(0)
        n_latents, n_in = model.n_latents, model.W_enc_LXiDi[0].numel()
        self.clock, self.activation = clock, model.activation_fn
        self.widths = [model.d_out] * (model.W_dec_LXoDo[0].numel() // model.d_out)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.x_BI, self.target_BO = draw(n_tokens, n_in), draw(n_tokens, sum(self.widths))
        self.W_enc_LI = (draw(n_latents, n_in) * n_in**-0.5).requires_grad_()
        self.W_dec_LO = (draw(n_latents, sum(self.widths)) * 0.01).requires_grad_()
        self.b_enc_L = torch.zeros(n_latents, requires_grad=True)
        self.b_dec_O = torch.zeros(sum(self.widths), requires_grad=True)
        self.weights = [self.W_enc_LI, self.b_enc_L, self.W_dec_LO, self.b_dec_O]
        self.sizes = f"B={n_tokens}, I={n_in}, L={n_latents}"

    def screened_or_not(self) -> Backend:
        """Backend "torch" or "torch:screened", for the encode of TopK."""
        variants = [Backend("torch"), Backend("torch", ("screened",))]

        def encode(backend: Backend) -> Callable[[], Any]:
            ops = OpSet(backend)
            return torch.no_grad()(lambda: self._encode_k(ops))

        seconds = faster(f"encode at {self.sizes}", {str(one): encode(one) for one in variants}, self.clock)
        plain, screened = variants
        chosen = screened if seconds[str(screened)] < CLEARLY * seconds[str(plain)] else plain
        log.info("backend auto: %s", chosen)
        return chosen

    def sparse_below(self) -> float:
        """The share of active latents at which sparse products take as long as dense ones."""
        seconds = {}
        for share in DENSITIES:
            with torch.no_grad():
                self.b_enc_L.fill_(NormalDist().inv_cdf(share))  # pre-activations are normal numbers of variance 1
            kinds = {"dense": 0.0, "sparse": 1.0} if share == DENSITIES[0] else {"sparse": 1.0}
            calls = {
                name: self._relu_step(OpSet(Backend("torch", sparse_below=below))) for name, below in kinds.items()
            }
            found = faster(f"step at {self.sizes}, {share:.1%} active", calls, self.clock, n_repeats=3)
            seconds |= {share if name == "sparse" else name: value for name, value in found.items()}
        chosen = crossing(seconds["dense"], [(share, seconds[share]) for share in DENSITIES])
        log.info("sparse_below: %s (it was %s before it was measured)", chosen, SPARSE_BELOW)
        return chosen

    def row_sparse(self, beta2: float) -> bool:
        """Whether a step with row-sparse Adam is faster than one with fused Adam."""
        steps = {}
        for name, options in (("fused Adam", ()), ("row-sparse Adam", ("rows",))):
            optimizer = (
                RowSparseAdam(self.weights, lr=0.0, beta2=beta2)
                if options
                else torch.optim.Adam(self.weights, 0.0, (0.0, beta2), fused=True)
            )
            steps[name] = self._k_step(OpSet(Backend("torch", options)), optimizer)
        seconds = faster(f"step at {self.sizes}", steps, self.clock)
        chosen = seconds["row-sparse Adam"] < CLEARLY * seconds["fused Adam"]
        log.info("train.optimizer.row_sparse auto: %s", chosen)
        return chosen

    def _encode_k(self, ops: OpSet) -> Any:
        return ops.encode_topk(self.x_BI, self.W_enc_LI, self.b_enc_L, self.activation.current_k)

    def _backward(self, ops: OpSet, latents: Any) -> None:
        for weight in self.weights:
            weight.grad = None
        ops.decode_recon_loss(latents, self.W_dec_LO, self.b_dec_O, self.target_BO, self.widths).loss.backward()

    def _relu_step(self, ops: OpSet) -> Callable[[], None]:
        ops.backend.said["encode_relu"] = "sparse" if ops.backend.sparse_below else "dense"  # it need not say so
        return lambda: self._backward(ops, ops.encode_relu(self.x_BI, self.W_enc_LI, self.b_enc_L))

    def _k_step(self, ops: OpSet, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        def step() -> None:
            self._backward(ops, self._encode_k(ops))
            clip_grad_norm_(self.weights, 1.0, optimizer)
            optimizer.step()

        return step


def crossing(dense: float, sparse: list[tuple[float, float]]) -> float:
    """Where a line through two (share, seconds) reaches `dense`; from 0 to `MOST`."""
    (share, seconds), (other_share, other_seconds) = sparse
    slope = (other_seconds - seconds) / (other_share - share)
    if slope <= 0:
        return MOST if seconds < dense else 0.0
    return round(min(max(share + (dense - seconds) / slope, 0.0), MOST), 4)
