"""Is it right on this device? Every op against float64 and against itself; a training step of every recipe that must not wait
for the device; steps captured as graphs.

Axes: B tokens · I flattened input dims · L latents · N stored entries.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import static_cases
import static_tensors
import torch
from bare_step import Case, Step, batch, make_params
from crosscode_kernels import Backend, DenseLatents, OpSet, SparseLatents, available_backends, resolve_backend
from crosscode_kernels.fused_adam import FusedAdam
from crosscode_kernels.row_sparse_adam import clip_grad_norm_
from gpu_device import Gpu, median_ms
from op_cases import OPS, Inputs, call, output
from torch import Tensor

Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALLOWED = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}
"""Largest error, relative to the largest value."""
SIZES = {
    "odd": Case("topk", B=67, I=37, O=34, L=303, k=3),
    "ones": Case("topk", B=1, I=1, O=1, L=1, k=1, segments=1),
    "real": Case("topk", B=1024, I=2304, O=2304, L=16384, k=64),
}
QUICK = {"odd": Case("topk", B=5, I=7, O=6, L=33, k=3)}
FLOAT32_ONLY = ("dead_recon_loss",)
"""Which latents are chosen does not show in the result, and in 16 bits near ties are chosen otherwise than in float64."""


def backends(gpu: Gpu, dtype: torch.dtype) -> list[str]:
    """What runs on the device, but for the reference; in a dry run the first alone, Triton's interpreter."""
    found = available_backends(gpu.device, dtype)
    names = [status.name for status in found if status.available and status.name != "reference"]
    return names[:1] if gpu.device == "cpu" else names


def error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


# ---- ops


def ops_against_float64(gpu: Gpu, quick: bool) -> Iterator[Row]:
    """A row for each op, backend, dtype and size."""
    for size, case in (QUICK if quick else SIZES).items():
        for dtype_name, dtype in islice(DTYPES.items(), 1 if gpu.device == "cpu" else None):
            for backend in backends(gpu, dtype):
                ops = resolve_backend(backend, gpu.device, dtype)  # pyright: ignore[reportArgumentType]
                inputs = Inputs(case, ops, gpu.device, dtype, seed=0)
                for name in OPS:
                    row = {"op": name, "backend": backend, "dtype": dtype_name, "size": size}
                    yield row | _judged(name, ops, inputs, dtype_name)
                del inputs
                gpu.free()


def _judged(name: str, ops: OpSet, inputs: Inputs, dtype: str) -> Row:
    try:
        same = _same_twice(name, ops, inputs)
        if name in FLOAT32_ONLY and dtype != "float32":
            return {"same_bits": same, "ok": same}
        errors = _errors(name, ops, inputs)
    except Exception as error:
        return {"error": error_text(error), "ok": False}
    worst = max(errors, key=lambda part: errors[part])
    ok = same and errors[worst] <= ALLOWED[dtype]  # false with a NaN
    return {"worst": worst, "error_of_largest": errors[worst], "same_bits": same, "ok": ok}


def _same_twice(name: str, ops: OpSet, inputs: Inputs) -> bool:
    def run() -> list[Tensor]:
        found = output(call(OPS[name], ops, inputs, False)).detach()
        return [found, *(call(OPS[name], ops, inputs, True) if OPS[name].leaves else ())]

    return all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers, latents dense."""
    exact = copy.copy(inputs)
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(exact, name, value.detach().double().requires_grad_(value.requires_grad))
    exact.dense = DenseLatents(exact.a_BL)
    exact.value = inputs.latents.to_dense().detach().double().requires_grad_()
    exact.latents = DenseLatents(exact.value)
    return exact


def _with(inputs: Inputs, **changes: Any) -> Inputs:
    changed = copy.copy(inputs)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _errors(name: str, ops: OpSet, inputs: Inputs) -> dict[str, float]:
    """Of results and gradients, relative to the largest value. Of an encoder, given what it selected; and `left out`: what better
    choices would have added to the sum of all values."""
    op, exact = OPS[name], in_float64(inputs)
    reference = resolve_backend("reference", exact.x_BI.device, torch.float64)
    mine, theirs = call(op, ops, inputs, False), call(op, reference, exact, False)
    grads = dict(zip(op.leaves, call(op, ops, inputs, True), strict=True)) if op.leaves else {}
    wanted = dict(zip(op.leaves, call(op, reference, exact, True), strict=True)) if op.leaves else {}
    found: dict[str, float] = {}
    if isinstance(mine, (SparseLatents, DenseLatents)):
        weight_L = exact.n_L.detach() if "by norm" in name else 1.0
        a_BL, best_BL = mine.to_dense().double(), theirs.to_dense()
        with torch.no_grad():
            h_BL = exact.x_BI @ exact.W_enc_LI.T + exact.b_enc_L
        kept_BL = (a_BL != 0).double()
        pairs = {"value": (a_BL, h_BL * kept_BL)}
        best, taken = ((latents_BL * weight_L).sum() for latents_BL in (best_BL, h_BL * kept_BL))
        found["left out"] = float(((best - taken) / best.abs().clamp(min=1e-9)).clamp(min=0))
        wanted |= {"W_enc_LI": kept_BL.T @ exact.x_BI.detach(), "b_enc_L": kept_BL.sum(0)}
        if "t_L" in grads:  # counts what lies in a window around the threshold: given these pre-activations
            own_BL = ops.preacts(inputs.x_BI, inputs.W_enc_LI, inputs.b_enc_L).detach().double()
            own = _with(exact, h_BL=own_BL.requires_grad_())
            wanted["t_L"] = call(OPS["jumprelu"], reference, own, True)[1]
    else:
        pairs = {"0": (output(mine), output(theirs))}
    for leaf, grad in grads.items():
        truth = wanted[leaf]
        if leaf == "value" and isinstance(inputs.latents, SparseLatents):
            stored_BL = replace(inputs.latents, value_N=torch.ones_like(grad)).to_dense() != 0
            grad, truth = replace(inputs.latents, value_N=grad).to_dense(), truth * stored_BL
        pairs[f"gradient of {leaf}"] = grad, truth
    for part, (one, other) in pairs.items():
        largest = float(other.abs().max()) if other.numel() else 0.0
        found[str(part)] = float((one.double() - other).abs().max()) / (largest or 1.0) if one.numel() else 0.0
    return found


# ---- optimizer


def fused_adam(gpu: Gpu, quick: bool) -> Iterator[Row]:
    """The kernels of `train.optimizer.fused` in each of their forms, against PyTorch's formulas in float32."""
    if "triton" not in backends(gpu, torch.float32):
        return
    for size, case in (QUICK if quick else SIZES).items():
        shape = static_tensors.Case(size, case.B, case.I, (case.O,), case.L, case.k)
        for dtype_name in ("float32",) if quick else ("float32", "bfloat16"):
            for kind in ("", "row-sparse", "bfloat16"):
                t = static_tensors.Tensors(shape, DTYPES[dtype_name], gpu.device)
                row: Row = {"kind": kind or "dense", "dtype": dtype_name, "size": size}
                try:
                    wanted, mine, again = (
                        static_cases.fused_adam(t, name, kind) for name in ("torch", "triton", "triton")
                    )
                    pairs = [(one.double(), other.double()) for one, other in zip(mine, wanted, strict=True)]
                    error = max(
                        float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)) for one, other in pairs
                    )
                    same = all(torch.equal(one, other) for one, other in zip(mine, again, strict=True))
                    # A sum that is rounded otherwise may send a bfloat16 the other way.
                    ok = same and error <= ALLOWED["bfloat16" if "bfloat16" in (kind, dtype_name) else "float32"]
                    timed = median_ms(gpu, lambda t=t, kind=kind: static_cases.fused_adam(t, "triton", kind))
                    yield row | {"error_of_largest": error, "same_bits": same, "ok": ok, **timed}
                except Exception as error:
                    yield row | {"ok": False, "error": error_text(error)}
                gpu.free()


# ---- training steps


def recipes_without_waiting(gpu: Gpu, quick: bool) -> Iterator[Row]:
    """A training step of every recipe, the second one with waiting for the device forbidden."""
    from tiny_recipes import make_trainer

    from crosscode.recipes import recipe_names

    for name in islice(recipe_names(), 1 if quick else None):
        for variant in variants(gpu):
            if variant != variant.partition(",")[0] and "sign_sgd" in name:
                continue
            row: Row = {"recipe": name, "backend": variant}
            backend, train = (
                variant.partition(",")[0],
                {"optimizer": OPTIMIZERS[variant]} if variant in OPTIMIZERS else {},
            )
            try:
                with tempfile.TemporaryDirectory() as folder:
                    trainer = make_trainer(name, Path(folder) / "run", backend, gpu.device, train=train)
                    trainer.start()
                    first, second = islice(trainer.data, 2)
                    trainer.train_step(first)
                    with gpu.no_waiting():
                        trainer.train_step(second)
                    gpu.synchronize()
                    finite = all(bool(weight.isfinite().all()) for weight in trainer.model.parameters())
                yield row | {"ok": finite}
            except Exception as error:
                yield row | {"ok": False, "error": error_text(error)}


SCHEMES = ("topk", "batch_topk", "groupmax", "l1", "jumprelu")


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "triton, fused": {"fused": True},
    "triton, fused, bfloat16 moments": {"fused": True, "moments": "bfloat16"},
}
"""Variants of Triton by fields of `train.optimizer`."""


def variants(gpu: Gpu) -> list[str]:
    """The backends, and Triton with its own optimizer."""
    names = backends(gpu, torch.float32)
    return [*names, *(OPTIMIZERS if "triton" in names else ())]


def make_variant(case: Case, variant: str, device: str, **adam: Any) -> tuple[Step, Tensor, Tensor]:
    """`make_step` of one of `variants`, or of the reference; `adam` is for PyTorch's."""
    name: Any = variant.partition(",")[0]
    if variant not in OPTIMIZERS:
        return make_step(case, resolve_backend(name, device), device, **adam)
    step, x_BI, target_BO = make_step(case, OpSet(Backend("triton", ("deferred",))), device)
    lr = torch.tensor(5e-5, device=device)
    step.optimizer = FusedAdam(step.params.values(), lr, moments=DTYPES[OPTIMIZERS[variant].get("moments", "float32")])
    return step, x_BI, target_BO


def make_step(case: Case, ops: OpSet, device: str, **adam: Any) -> tuple[Step, Tensor, Tensor]:
    """A training step as `train_step.py` has it, on the device, and a batch for it."""
    x_BI, target_BO = batch(case)
    params = make_params(case, x_BI)
    params = {name: tensor.detach().to(device).requires_grad_() for name, tensor in params.items()}
    optimizer = torch.optim.Adam(params.values(), 5e-5, **adam)
    return Step(case, ops, params, optimizer), x_BI.to(device), target_BO.to(device)


def graph_capture(gpu: Gpu, quick: bool) -> Iterator[Row]:
    """A whole step (forward, backward, clipping, Adam) captured and replayed: are its weights those of eager steps?"""
    sizes = {"B": 8, "I": 12, "O": 16, "L": 64, "k": 4} if quick else {"B": 256, "I": 768, "O": 768, "L": 4096, "k": 32}
    for scheme in SCHEMES[:1] if quick else SCHEMES:
        case = Case(scheme, **sizes, l0=16.0 if scheme in ("l1", "jumprelu") else 0.0)
        for variant in variants(gpu):
            row: Row = {"scheme": scheme, "backend": variant}
            try:
                weights, n_warm_up = [], 3 if gpu.device == "cuda" else 1
                for captures in (False, True):
                    adam = {"capturable": True} if gpu.device == "cuda" else {}
                    step, x_BI, target_BO = make_variant(case, variant, gpu.device, **adam)
                    run = _capturable(step, x_BI, target_BO)
                    if captures:
                        run = gpu.captured(run, n_warm_up)
                    for _ in range(1 if captures else n_warm_up + 1):
                        run()
                    gpu.synchronize()
                    weights.append([tensor.detach() for tensor in step.params.values()])
                same = all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
                yield row | {"ok": True, "same_bits": same}
            except Exception as error:
                yield row | {"ok": False, "error": error_text(error)}


def _capturable(step: Step, x_BI: Tensor, target_BO: Tensor) -> Any:
    def run() -> None:
        step.optimizer.zero_grad(set_to_none=True)
        step.forward(x_BI, target_BO).backward()
        fused = step.optimizer if isinstance(step.optimizer, FusedAdam) else None
        clip_grad_norm_(list(step.params.values()), 1.0, fused)
        step.optimizer.step()

    return run


N_CAPTURED, N_TIMED = 20, 100


def captured_training(gpu: Gpu, quick: bool) -> Iterator[Row]:
    """Tiny recipes, trained eagerly and captured: are weights and moments the same, and what does a step take?"""
    from tiny_recipes import BATCH, make_trainer

    from crosscode.recipes import recipe_names
    from crosscode.trainers.graphs import N_WARM_UP, StepGraphs, why_not

    n_steps = N_WARM_UP + 1 if quick else N_CAPTURED
    for name in islice((name for name in recipe_names() if "sign_sgd" not in name), 1 if quick else None):
        for variant in variants(gpu)[: 1 if quick else None]:
            row: Row = {"recipe": name, "backend": variant}
            optimizer = OPTIMIZERS.get(variant, {}) | {"lr_on_device": True}
            train = {"n_tokens": BATCH * (n_steps + N_TIMED), "optimizer": optimizer, "log_every": 50}
            states: list[list[Tensor]] = []
            try:
                for kind in ("eager", "captured"):
                    with tempfile.TemporaryDirectory() as folder:
                        trainer = make_trainer(
                            name, Path(folder) / "run", variant.partition(",")[0], gpu.device, train=train
                        )
                    if kind == "captured":
                        if reason := why_not(trainer.forward, trainer.constraints, trainer.optimizer_plan):
                            row["not captured"] = reason
                            break
                        trainer.graphs = StepGraphs(trainer.update, trainer.split, gpu.capture())
                    trainer.start()
                    for acts_BMPD in islice(trainer.data, n_steps):
                        trainer.train_step(acts_BMPD)
                    gpu.synchronize()
                    found = [*trainer.model.parameters(), *trainer.model.buffers()]
                    found += [value for state in trainer.optimizer.state.values() for value in state.values()]
                    states.append([tensor.detach().clone() for tensor in found])
                    step = partial(trainer.train_step, next(iter(trainer.data)))
                    row[f"{kind}_ms"] = median_ms(gpu, step)["ms"]
                    row["graphs"] = 0 if trainer.graphs is None else trainer.graphs.n_graphs
                if len(states) == 2:
                    row["same_bits"] = all(torch.equal(one, other) for one, other in zip(*states, strict=True))
                    # PyTorch's own ops may wait where Triton's kernels do not: then the trainer goes on without.
                    row["ok"] = row["same_bits"] and (row["graphs"] > 0 or variant == "torch")
                yield row
            except Exception as error:
                yield row | {"ok": False, "error": error_text(error)}
            gpu.free()
