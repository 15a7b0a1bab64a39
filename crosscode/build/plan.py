"""What a run would take on several GPUs, before there are any: bytes are counted in a step on tensors without content, times
are predicted from peaks of the hardware.

Axes: B tokens · M models · P hookpoints · D width · Xi/Xo input/output crosscoding dims · R latents of one rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from crosscode_kernels import Backend
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from crosscode.build.experiment import build_constraints, build_model, build_objective, check_parts
from crosscode.build.foresight import dtype_bytes, foreseen_widths, run_dtype, skeletons_of, weight_bytes
from crosscode.config.experiment import ExperimentConfig
from crosscode.config.language_models import LanguageModelConfig
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.shuffle import DEFAULT_CAPACITY
from crosscode.errors import InputError
from crosscode.evaluation.heldout import HeldoutSums
from crosscode.evaluation.raw_model import RawModel
from crosscode.models.architecture import split_for
from crosscode.models.base import BaseCrosscoder, ForwardResult
from crosscode.parallel.group import PaperGroup
from crosscode.parallel.refusals import problems_of_teams, refusal
from crosscode.parallel.training import shard_
from crosscode.trainers.accumulation import BatchInParts
from crosscode.trainers.figures import BatchFigures
from crosscode.trainers.firing import FiringTracker
from crosscode.trainers.forward import ForwardPass
from crosscode.trainers.graphs import forms, why_not
from crosscode.trainers.optimizers import OPTIMIZERS
from crosscode.trainers.whole_batch import tracks_batches


class Gpu(NamedTuple):
    """Peaks, per second: bytes of its memory, operations in 16 bits, TF32 and float32, bytes to GPUs of its node and to other
    nodes; and bytes of memory."""

    name: str
    bandwidth: float
    flops_16: float
    flops_tf32: float
    flops_32: float
    link: float
    network: float
    memory: float


GPUS = {
    "h100": Gpu("H100 SXM", 3.35e12, 989e12, 494e12, 67e12, 450e9, 50e9, 80e9),
    "h200": Gpu("H200 SXM", 4.8e12, 989e12, 494e12, 67e12, 450e9, 50e9, 141e9),
    "a100": Gpu("A100 80GB", 2.04e12, 312e12, 156e12, 19.5e12, 300e9, 25e9, 80e9),
    "mi300x": Gpu("MI300X", 5.3e12, 1307e12, 653e12, 163e12, 448e9, 50e9, 192e9),
}
OF_NODE = 8
"""GPUs of a node."""
OF_PRODUCTS, OF_MODEL, OF_MEMORY, OF_LINK = 0.7, 0.5, 0.85, 0.8
"""Assumed: what a large product reaches of the peak, a language model's forward pass, streaming kernels, a collective."""
SECONDS_A_CALL = 1e-5
"""Assumed: what a collective takes beside its bytes, for each doubling of the ranks."""


COUNTED = "torch"
"""The backend whose ops are counted: the only one that runs on tensors without content."""


@dataclass(frozen=True)
class Plan:
    """Of one rank of `ranks`. `refused`: why this many cannot train it; then nothing else is known."""

    ranks: int
    refused: str | None = None
    memory: dict[str, float] | None = None
    """bytes, by what holds them; counted"""
    sent: dict[str, float] | None = None
    """bytes a step, of the harvest's share and of the step itself, counted; of language models that ranks hold together,
    predicted"""
    besides: dict[str, float] | None = None
    """bytes of what is not in every step; counted"""
    seconds: dict[str, float] | None = None
    """a step, by what they go to; predicted"""

    @property
    def dominant(self) -> str:
        return max(self.seconds or {"": 0.0}, key=lambda name: (self.seconds or {})[name])


def plan(config: ExperimentConfig, ranks: Sequence[int], gpu: Gpu) -> list[Plan]:
    """For each number of ranks.

    Raises:
        InputError: the config's language models cannot be looked at.
    """
    if not config.language_models:
        raise InputError("language_models: a plan needs at least one, whose configuration tells the width")
    found = skeletons_of(config)
    models = [model for model in found if model is not None]
    if len(models) < len(found):
        raise InputError(
            "language_models: a GGUF file has no configuration apart from its weights, so nothing can be planned"
        )
    split_for(config.crosscoder.type).check(*config.n_positions())
    widths_MP = foreseen_widths(models, config.hookpoints)
    check_parts(config, widths_MP)
    width = max(model.d_model for model in models) if widths_MP is None else widths_MP.widest
    return [_plan(config, models, width, n, gpu) for n in ranks]


def _plan(config: ExperimentConfig, models: Sequence[LanguageModel], width: int, ranks: int, gpu: Gpu) -> Plan:
    if why := refusal(config, ranks) if ranks > 1 else next(problems_of_teams(config, 1), None):
        return Plan(ranks, why)
    group = PaperGroup(ranks)
    try:
        counted = counted_step(config, width, group)
    except InputError as error:
        return Plan(ranks, str(error))
    harvest = config.data.harvest_batch_size * config.data.sequence_length
    M, P = config.n_positions()
    vector, B = M * P * width, config.train.batch_size
    stored = dtype_bytes(config.data.activation_dtype)
    gathered = (ranks - 1) * -(-config.data.harvest_batch_size // ranks) * config.data.sequence_length * vector * stored
    together = config.parallel.model
    sent = {"harvest": gathered * B / harvest, "step": float(counted.step)}
    if together > 1:  # two sums over the ranks that hold it for each block, of what its attention and MLP give
        pairs = zip(config.language_models, models, strict=True)
        n_bytes = sum(2 * _used_layers(config, of) * of.d_model * _bytes(lm, of) for lm, of in pairs)
        sent["language models"] = 2 * (together - 1) / ranks * B * n_bytes
    model, n_calls = counted.model, counted.n_calls
    buffer = config.data.shuffle_buffer_size
    optimizer = OPTIMIZERS.build(config.train.optimizer)
    grads, states = optimizer.grads_per_weight(model), optimizer.states_per_weight
    n_held = sum(param.numel() for param in model.parameters())
    memory = {
        "language models": (max if config.parallel.apart else sum)(
            weight_bytes(lm, of, together) for lm, of in zip(config.language_models, models, strict=True)
        ),
        "coder": 4.0 * n_held * (1 + grads + states),
        "batch": counted.kept + 2 * 4.0 * B * vector + harvest * vector * stored,
        "shuffle buffer": float((DEFAULT_CAPACITY if buffer is None else buffer) * vector * stored),
    }
    if counted.n_graphs:  # of each what a step makes, beside what the steps that run as ever keep
        memory["captured steps"] = counted.n_graphs * (counted.kept + 4.0 * grads * n_held) + 4.0 * B * vector
    if ranks > 1:  # each has the whole weights once before it keeps its rows
        whole = sum(4.0 * part.n_latents * _row_numel(part) for part in model.parts)
        memory["start"] = max(0.0, whole + 4.0 * n_held - memory["coder"] - memory["batch"])
    seconds = _of_products(config, model, ranks, gpu)
    seconds["optimizer"] = 4.0 * n_held * (2 + grads + 2 * states) / (OF_MEMORY * gpu.bandwidth)
    link = OF_LINK * (gpu.link if ranks <= OF_NODE else gpu.network)
    seconds["exchange"] = sent["step"] / link + n_calls * SECONDS_A_CALL * math.log2(ranks)
    seconds["harvest"] = sum(
        2 * _used_weights(config, of) * B / ranks / (OF_MODEL * _flops(gpu, _bytes(lm, of)))
        for lm, of in zip(config.language_models, models, strict=True)
    ) + (sent["harvest"] + sent.get("language models", 0.0)) / link  # fmt: skip
    besides = {
        "figures of a logged step": float(counted.figures),
        "held-out batch of as many tokens": float(counted.evaluation),
    }
    return Plan(ranks, None, memory, sent, besides, seconds)


class Counted(NamedTuple):
    """Of one rank."""

    model: BaseCrosscoder
    """with its rows"""
    kept: float
    """bytes that are kept for backward at once"""
    n_calls: int
    """collectives of a step"""
    step: int
    """bytes that are sent for a step"""
    figures: int
    """bytes that a logged step sends besides"""
    evaluation: int
    """bytes that are sent for a held-out batch of as many tokens"""
    n_graphs: int
    """kinds of steps that may be captured as CUDA graphs, over the whole run"""


def counted_step(
    config: ExperimentConfig, width: int, group: PaperGroup, dtype: torch.dtype = torch.float32
) -> Counted:
    """A step on the meta device, with dead latents where a term is about them, and a batch of an evaluation."""
    kept = [0.0]
    """of each part of the batch"""

    def count(tensor: Tensor) -> Tensor:
        kept[-1] += 0 if isinstance(tensor, torch.nn.Parameter) else tensor.nbytes
        return tensor

    with torch.device("meta"):
        model = build_model(config, width).to(dtype)
        for part in {model, *model.parts}:
            part.backend = Backend(COUNTED)
        if group.size > 1:
            shard_(model, group)
        firing, objective = FiringTracker(model.n_latents), build_objective(config)
        firing.longest_silence = lambda n_tokens: 1 << 62
        forward = ForwardPass(model, objective, firing, config.train.model_copy(update={"compile": False}))
        acts_BMPD = torch.zeros(config.train.batch_size, *config.n_positions(), width, dtype=dtype)
        model.before_step(config.train.n_steps, config.train.n_steps)  # annealing is over
        split, results = split_for(config.crosscoder.type), list[tuple[Tensor, ForwardResult]]()
        input_BXiDi, target_BXoDo = split.activations(acts_BMPD)

        def observe(target: Tensor, result: ForwardResult) -> None:
            kept.append(0.0)
            results.append((target, result))

        coefficients = objective.coefficients(0, config.train.n_steps)

        def step() -> None:
            forward.announce(config.train.batch_size)
            with saved_tensors_hooks(count, lambda tensor: tensor):
                if config.train.grad_accumulation > 1:
                    in_parts = BatchInParts(forward, config.train.grad_accumulation)
                    in_parts.backward(input_BXiDi, target_BXoDo, coefficients, [observe])
                else:
                    result, terms = forward(input_BXiDi, target_BXoDo)
                    objective.weigh(terms, coefficients).total.backward()
                    observe(target_BXoDo, result)
                    if tracks_batches(model):
                        model.after_step(result.latents)
            norms_P = torch.stack([param.new_zeros(()) for param in model.parameters()])
            model.ops.total_norm(norms_P, list(model.parameters()))

        def log() -> None:
            for shown in results:
                BatchFigures(model.out_dims).observe(*shown)

        def evaluate() -> None:
            with torch.no_grad(), RawModel(model, split, None) as raw_model:
                HeldoutSums(model, {}).add(raw_model, acts_BMPD, None)

        def sent_by(call: Callable[[], None]) -> int:
            before = group.bytes_sent
            call()
            return group.bytes_sent - before

        of_step, n_calls = sent_by(step), group.n_calls
        return Counted(model, max(kept), n_calls, of_step, sent_by(log), sent_by(evaluate), _n_graphs(config, forward))


def _n_graphs(config: ExperimentConfig, forward: ForwardPass) -> int:
    constraints, optimizer = build_constraints(config, forward.model), OPTIMIZERS.build(config.train.optimizer)
    if not config.train.cuda_graph or why_not(forward, constraints, optimizer):
        return 0
    return len({forms(forward.objective, silence, config.train.dead_after_tokens) for silence in (0, 1 << 62)})


def _row_numel(part: BaseCrosscoder) -> int:
    """Weights of one latent."""
    return part.W_enc_LXiDi[0].numel() + part.W_dec_LXoDo[0].numel()


def _of_products(config: ExperimentConfig, model: BaseCrosscoder, ranks: int, gpu: Gpu) -> dict[str, float]:
    """Encoder and decoder, forward and backward; what keeps k latents has sparse products behind its encoder."""
    B, flops, seconds = config.train.batch_size, OF_PRODUCTS * _flops(gpu, 4, tf32=config.train.tf32), 0.0
    moved = 0.0
    for part in model.parts:
        R, k = -(-part.n_latents // ranks), part.activation_fn.k if part.activation_fn.is_sparse else None
        n_in, n_out = part.W_enc_LXiDi[0].numel(), part.W_dec_LXoDo[0].numel()
        seconds += 2 * B * n_in * R / flops
        moved += 4.0 * (B * n_in + R * n_in + 3 * B * R)  # pre-activations are written, and read twice to select
        if k is None:
            seconds += 2 * B * R * (n_in + 3 * n_out) / flops
        else:
            moved += 4.0 * B * k / ranks * (n_in + 3 * n_out) + 4.0 * B * n_out * 6
    return {"products": seconds, "memory traffic": moved / (OF_MEMORY * gpu.bandwidth)}


def _flops(gpu: Gpu, n_bytes: int, *, tf32: bool = False) -> float:
    return gpu.flops_16 if n_bytes <= 2 else gpu.flops_tf32 if tf32 else gpu.flops_32


def _bytes(config: LanguageModelConfig, model: LanguageModel) -> int:
    """Of a number of a run."""
    return dtype_bytes(run_dtype(config, model))


def _used_layers(config: ExperimentConfig, model: LanguageModel) -> int:
    """Blocks up to the last hookpoint, where names tell it."""
    layers = [int(found[1]) + 1 for name in config.hookpoints if (found := re.search(r"\.(\d+)(\.|$)", name))]
    whole = len(layers) < len(config.hookpoints)
    return model.n_layers if whole else min(model.n_layers, max(layers))


def _used_weights(config: ExperimentConfig, model: LanguageModel) -> float:
    share = _used_layers(config, model) / model.n_layers
    n_embedding = model.model.get_input_embeddings().weight.numel()
    return share * (sum(weight.numel() for weight in model.model.parameters()) - n_embedding)
