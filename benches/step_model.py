"""What a training step of the Triton backend moves, as the trainer runs it: its ops (`traffic_model.py`), and what PyTorch and
the optimizer do besides. A prediction.

Weights are float32 whatever the products are in. `tests/benches/test_step_model.py` counts the bytes of a real trainer's steps
and compares.

Axes: B tokens · I, O flattened input and output dims · L latents · N stored entries.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from crosscode_kernels.triton_common import heuristics as h
from static_tensors import Case
from traffic_model import FP32, INDEX, Device, Model, Term


class Run(NamedTuple):
    """Options of `train` that change what a step moves. `dead`: latents that AuxK decodes; with none dead it costs nothing."""

    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    fused: bool = False
    moments: torch.dtype = torch.float32
    row_sparse: bool = False
    dead: int = 0
    k_aux: int = 512

    def __str__(self) -> str:
        options = [str(self.dtype).removeprefix("torch.")]
        options += [name for name in ("tf32", "fused", "row_sparse") if getattr(self, name)]
        options += ["moments in bfloat16"] if self.moments == torch.bfloat16 else []
        return ", ".join(options + ([f"{self.dead} dead, k_aux {self.k_aux}"] if self.dead else []))


def card(device: Device, run: Run) -> Device:
    """The device as PyTorch's setting for float32 products has it."""
    return device._replace(flops_32=device.flops_16 / 2) if run.tf32 else device


def topk_step(case: Case, run: Run, device: Device) -> list[Term]:
    """What a TopK training step runs, in order."""
    model = Model(case, run.dtype, device)
    wide = Model(case, torch.float32, device)
    n_weights = model.L * (model.I + model.O)
    terms = [
        casts(n_weights, model.e, run), model.preacts(), model.row_select(), chunks(model), firing(model),
        model.latent_order(), model.decode(True), wide.recon_backward() if model.e < FP32 else model.recon_backward(),
        model.decode_backward(deferred=run.fused), *([] if run.fused else [model.encode_backward()]),
    ]  # fmt: skip
    if run.dead:
        terms += auxk(model, run)
    return [*terms, *(fused_optimizer(model, run) if run.fused else optimizer(n_weights, run))]


def casts(n_weights: int, e: int, run: Run) -> Term:
    """Both weights on their way to 16 bits, both gradients on their way back; a fused optimizer writes the one and wants none of
    the other."""
    bytes_ = 0 if run.fused or e == FP32 else 2 * (FP32 + e) * n_weights
    return Term("casts of weights and gradients", 0, bytes_, bytes_)


def chunks(model: Model) -> Term:
    """Candidates of each chunk of latents, written, joined and selected from; a chunk alone is no chunk."""
    n = math.ceil(model.L / h.preacts_at_a_time(model.B, model.L))
    bytes_ = 5 * n * model.entries if n > 1 else 0
    return Term("candidates of chunks", 0, bytes_, bytes_)


def firing(model: Model) -> Term:
    """Counts by latent, and for how many tokens each has been silent."""
    bytes_ = model.N * INDEX + model.L * (INDEX + 4 * 8)
    return Term("firing counts", 0, bytes_, bytes_)


def auxk(model: Model, run: Run) -> list[Term]:
    """The dead latents' own encode, selection, decode, loss and gradients."""
    case = model.case._replace(n_latents=run.dead, k=min(run.k_aux, run.dead))
    dead, wide = Model(case, model.dtype, model.device), Model(case, torch.float32, model.device)
    backward = [dead.decode_backward(deferred=run.fused), *([] if run.fused else [dead.encode_backward()])]
    sums = 0 if run.fused else 3 * model.L * (model.I + model.O) * model.e  # gradients of all rows, added to the others
    return [
        dead.preacts()._replace(name="AuxK: dead-row GEMM"), dead.row_select()._replace(name="AuxK: top-k"),
        dead.decode(False)._replace(name="AuxK: decode"), wide.recon()._replace(name="AuxK: loss"),
        wide.recon_backward()._replace(name="AuxK: loss backward"),
        *(term._replace(name=f"AuxK: {term.name}") for term in backward),
        Term("AuxK: gradients added", 0, sums, sums),
    ]  # fmt: skip


def optimizer(n_weights: int, run: Run) -> list[Term]:
    """PyTorch's: the norm reads gradients; Adam, into which clipping is folded, reads and writes parameter, both moments, and the
    gradient, which it leaves clipped."""
    norm, adam = n_weights * FP32, 8 * n_weights * FP32
    return [Term("gradient norm", 0, norm, norm), Term("Adam", 0, adam, adam)]


def fused_optimizer(model: Model, run: Run) -> list[Term]:
    """Two walks over the entries of each row: for the norm, and for Adam. Rows of the tokens come from the cache."""
    walks = [Model(model.case, model.dtype, model.device)]
    if run.dead:
        case = model.case._replace(n_latents=run.dead, k=min(run.k_aux, run.dead))
        walks.append(Model(case, model.dtype, model.device))
    n_weights, touched = model.L * (model.I + model.O), model.touched if run.row_sparse else model.L
    moved = touched * (model.I + model.O)
    moments = (1 if run.row_sparse else 2) * 2 * run.moments.itemsize
    copy = model.e if model.e < FP32 else 0
    streamed = moved * (2 * FP32 + moments + copy) + 2 * model.L * INDEX
    constants = (("N_SUMS", str(len(walks))), ("HAS_DENSE", "False"))
    terms = []
    for name, kernel, bytes_ in (
        ("norm of sums", "_row_norms_kernel", 2 * model.L * FP32), ("sums and Adam", "_adam_rows_kernel", streamed),
    ):  # fmt: skip
        flops, fewest, again, works = 0.0, bytes_, 0.0, []
        for walk in walks:
            for width in (model.I, model.O):
                flops += 2 * walk.N * width + (12 * n_weights / len(walks) / 2 if "Adam" in name else 0)
                fewest += walk.B * width * walk.e + walk.N * 3 * INDEX
                again += walk.rows_again(width)
                works.append(walk.gathers(width, outer=kernel, of_outer=constants))
        total = works[0]._replace(
            asked=sum(work.asked for work in works), waits=sum(work.waits for work in works),
            around=touched * math.ceil((model.I + model.O) / h.segment_config(model.B, model.I, model.e).BLOCK_O),
        )  # fmt: skip
        terms.append(Term(name, flops, fewest, fewest + again, total))
    return terms
