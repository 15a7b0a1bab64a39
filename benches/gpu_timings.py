"""How fast is it on this device? Ops and whole steps, against dense PyTorch and against other libraries; a whole run.

All times are of one process each, by the device's own clock, on rotated inputs. Predictions are the traffic model's
(`traffic_model.py`): bytes and FLOPs over peaks, never measured.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · K active latents of a token.
"""

from __future__ import annotations

import importlib
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import static_tensors
import torch
from bare_step import Case, Step
from crosscode_kernels import OpSet, resolve_backend
from gpu_checks import DTYPES, OPTIMIZERS, Row, backends, error_text, make_variant, variants
from gpu_device import Gpu, median_ms
from op_cases import OPS, Inputs, Op, call
from static_traffic import step_ms
from step_model import Run
from torch import Tensor
from traffic_model import DEVICES, Device, Model

OP_CASE = Case("topk", B=4096, I=4608, O=4608, L=16384, k=64)
STEPS = {
    "TopK crosscoder, L=16384": OP_CASE,
    "TopK crosscoder, L=131072": Case("topk", B=4096, I=4608, O=4608, L=131072, k=64),
    "BatchTopK crosscoder, L=16384": Case("batch_topk", B=4096, I=4608, O=4608, L=16384, k=64),
    "TopK SAE, L=24576": Case("topk", B=8192, I=768, O=768, L=24576, k=32, segments=1),
    "cross-layer transcoder, 6 outputs": Case("topk", B=4096, I=768, O=6 * 768, L=16384, k=32, segments=6),
    "JumpReLU crosscoder, L0 60": Case("jumprelu", B=4096, I=4608, O=4608, L=16384, l0=60),
    "L1 crosscoder, L0 60": Case("l1", B=4096, I=4608, O=4608, L=16384, l0=60),
}
QUICK_CASE = Case("topk", B=4, I=12, O=16, L=64, k=4)
PREDICTED: dict[str, Callable[[Model], list[Any]]] = {
    "encode_topk": lambda m: [m.preacts(), m.row_select()],
    "encode_batch_topk": lambda m: [m.preacts(), m.batch_select()],
    "encode_groupmax": lambda m: [m.preacts(), m.groupmax()],
    "sparse_decode": lambda m: [m.decode(False)],
    "decode_recon_loss": lambda m: [m.decode(True)],
    "decoder_norms": lambda m: [m.norms()],
    "recon_loss": lambda m: [m.recon()],
    "jumprelu": lambda m: [m.jumprelu()],
    "weighted_l1": lambda m: [m.sparse_penalty()],
    "weighted_tanh": lambda m: [m.sparse_penalty()],
}
"""What the traffic model knows of an op's forward."""


def model_device(gpu: Gpu) -> Device | None:
    """The card in the traffic model, if it is there; a dry run takes the first."""
    if gpu.device == "cpu":
        return DEVICES[0]
    return next((device for device in DEVICES if device.name.split()[0] in gpu.name()), None)


def _static(case: Case) -> static_tensors.Case:
    return static_tensors.Case("gpu", case.B, case.I, (case.O // case.segments,) * case.segments, case.L, case.k)


def op_times(gpu: Gpu, quick: bool) -> Iterator[Row]:
    """Every op of every backend, forward and with backward; `reference` is dense PyTorch."""
    case, card = QUICK_CASE if quick else OP_CASE, model_device(gpu)
    for dtype_name in ("float32",) if quick else ("bfloat16", "float32"):
        dtype = DTYPES[dtype_name]
        for backend in [*backends(gpu, dtype), "reference"]:
            ops = resolve_backend(backend, gpu.device, dtype)  # pyright: ignore[reportArgumentType]
            batches = itertools.cycle([Inputs(case, ops, gpu.device, dtype, seed) for seed in range(1 if quick else 4)])
            for name, op in OPS.items():
                for backward in (False, True) if op.leaves else (False,):
                    row: Row = {"op": name, "backend": backend, "dtype": dtype_name, "backward": backward}
                    row |= _op_time(gpu, partial(_next_call, op, ops, batches, backward))
                    if card and name in PREDICTED and not backward and backend != "reference":
                        terms = PREDICTED[name](Model(_static(case), dtype, card))
                        row["predicted_ms"] = 1e3 * sum(term.seconds(card, dtype.itemsize) for term in terms)
                    yield row
            del batches
            gpu.free()


def _next_call(op: Op, ops: OpSet, batches: Iterator[Inputs], backward: bool) -> Any:
    return call(op, ops, next(batches), backward)


def _op_time(gpu: Gpu, run: Callable[[], Any]) -> Row:
    try:
        return median_ms(gpu, run) | {"peak_mib": gpu.peak_mib(run)}
    except Exception as error:
        return {"error": error_text(error)}


def step_times(gpu: Gpu, quick: bool) -> Iterator[Row]:
    """Forward, backward, clipping and Adam (PyTorch's fused one, or ours) on float32 weights, with and without bfloat16 autocast.
    `dense`: the reference; `dense, compiled`: its forward and backward by torch.compile. None computes a gradient of x."""
    for name, case in ({"quick": QUICK_CASE} if quick else STEPS).items():
        for autocast in (True,) if quick else (False, True):
            for variant in [*variants(gpu), "dense", "dense, compiled"]:
                row: Row = {"step": name, "variant": variant, "autocast": autocast}
                yield row | _step(gpu, quick, case, variant, autocast)
                gpu.free()


def dense_forward(step: Step) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a TopK or BatchTopK step in plain dense PyTorch, without breaks in its graph; of others the reference's."""
    case, p = step.case, step.params
    if case.scheme not in ("topk", "batch_topk"):
        return step.forward

    def forward(x_BI: Tensor, target_BO: Tensor) -> Tensor:
        a_BL = torch.nn.functional.linear(x_BI, p["W_enc_LI"], p["b_enc_L"]).relu()
        rows_RL = a_BL if case.scheme == "topk" else a_BL.view(1, -1)
        kept = rows_RL.topk(case.k * (a_BL.numel() // (rows_RL.shape[0] * case.L)), sorted=False)
        a_BL = torch.zeros_like(rows_RL).scatter(1, kept.indices, kept.values).view_as(a_BL)
        y_BO = torch.nn.functional.linear(a_BL, p["W_dec_LO"].T, p["b_dec_O"])
        return (y_BO.float() - target_BO).square().sum(1).mean()

    return forward


def _step(gpu: Gpu, quick: bool, case: Case, variant: str, autocast: bool) -> Row:
    name = "reference" if variant.startswith("dense") else variant
    try:
        step, x_BI, target_BO = make_variant(case, name, gpu.device, fused=True)
        step.clock = lambda: 0.0  # its parts are not timed, and no clock breaks a graph
        inner = step.forward
        if "compiled" in variant:
            inner = torch.compile(dense_forward(step), backend="eager" if quick else "inductor")
        cast = torch.autocast(gpu.device, torch.bfloat16) if autocast else nullcontext()

        def forward(x_BI: Tensor, target_BO: Tensor) -> Tensor:
            with cast:
                return inner(x_BI, target_BO)

        step.forward = forward  # type: ignore[method-assign]
        found: Row = median_ms(gpu, lambda: step.run(x_BI, target_BO))
        found |= {
            "peak_mib": gpu.peak_mib(lambda: step.run(x_BI, target_BO)),
            "tokens_per_s": 1e3 * case.B / found["ms"],
        }
        card = model_device(gpu)
        if card and case.scheme == "topk" and variant.startswith("triton"):
            own = OPTIMIZERS.get(variant, {})
            run = Run(torch.bfloat16 if autocast else torch.float32, fused=bool(own))
            run = run._replace(moments=DTYPES[own.get("moments", "float32")])
            found["predicted_ms"] = step_ms(_static(case), run, card)
        return found
    except Exception as error:
        return {"error": error_text(error)}


# ---- other libraries


def _sparsify() -> Callable[..., Tensor]:
    decode = importlib.import_module("sparsify.utils").decoder_impl

    def loss(idx_BK: Tensor, value_BK: Tensor, W_dec_LO: Tensor, b_dec_O: Tensor, target_BO: Tensor) -> Tensor:
        return (decode(idx_BK, value_BK, W_dec_LO) + b_dec_O - target_BO).square().mean()

    return loss


def _flexsae() -> Callable[..., Tensor]:
    loss = importlib.import_module("flex_sae").triton_topk_sae_loss
    return lambda idx_BK, value_BK, W_LO, b_O, target_BO: loss(idx_BK, W_LO, value_BK, b_O, target_BO)


def _dense() -> Callable[..., Tensor]:
    def loss(idx_BK: Tensor, value_BK: Tensor, W_dec_LO: Tensor, b_dec_O: Tensor, target_BO: Tensor) -> Tensor:
        a_BL = torch.zeros(idx_BK.shape[0], W_dec_LO.shape[0], device=W_dec_LO.device, dtype=W_dec_LO.dtype)
        return (a_BL.scatter(1, idx_BK, value_BK) @ W_dec_LO + b_dec_O - target_BO).square().mean()

    return loss


def _ours(gpu: Gpu, dtype: torch.dtype) -> Callable[..., Tensor]:
    from crosscode_kernels import SparseLatents

    ops = resolve_backend("auto" if gpu.device == "cuda" else "triton", gpu.device, dtype)

    def loss(idx_BK: Tensor, value_BK: Tensor, W_dec_LO: Tensor, b_dec_O: Tensor, target_BO: Tensor) -> Tensor:
        n_tokens, k = idx_BK.shape
        row_ptr_B1 = torch.arange(n_tokens + 1, device=idx_BK.device, dtype=torch.int32) * k
        latents = SparseLatents(row_ptr_B1, idx_BK.int().view(-1), value_BK.reshape(-1), W_dec_LO.shape[0])
        recon = ops.decode_recon_loss(latents, W_dec_LO, b_dec_O, target_BO, [W_dec_LO.shape[1]])
        return recon.loss / W_dec_LO.shape[1]

    return loss


def _forward_and_backward(
    loss: Callable[..., Tensor], idx_BK: Tensor, leaves: list[Tensor], target_BO: Tensor
) -> Tensor:
    value = loss(idx_BK, *leaves, target_BO)
    torch.autograd.grad(value, leaves)
    return value


def other_libraries(gpu: Gpu, quick: bool) -> Iterator[Row]:
    """Decoder and loss of a TopK SAE, forward and backward, as flexsae publishes it (L=65536, D=2304): the same loss from all?"""
    n_tokens, n_latents, width = (5, 40, 16) if quick else (2048, 65536, 2304)
    for dtype_name in ("float32",) if quick else ("float32", "bfloat16"):
        dtype = DTYPES[dtype_name]
        makers = {"crosscode": partial(_ours, gpu, dtype), "dense": _dense, "sparsify": _sparsify, "flexsae": _flexsae}
        for k in (4,) if quick else (32, 64, 128):
            generator = torch.Generator().manual_seed(0)
            idx_BK = torch.rand(n_tokens, n_latents, generator=generator).topk(k).indices.to(gpu.device)
            drawn = [torch.randn(shape, generator=generator).to(gpu.device, dtype) for shape in
                     ((n_tokens, k), (n_latents, width), (width,), (n_tokens, width))]  # fmt: skip
            value_BK, W_LO, b_O, target_BO = drawn
            leaves = [leaf.requires_grad_() for leaf in (value_BK.abs_(), W_LO, b_O)]
            for library, make in makers.items():
                row: Row = {"library": library, "dtype": dtype_name, "k": k}
                try:
                    run = partial(_forward_and_backward, make(), idx_BK, leaves, target_BO)
                    row |= {"loss": float(run().detach()), **median_ms(gpu, run), "peak_mib": gpu.peak_mib(run)}
                except ImportError as error:
                    row["error"] = f"not importable: {error}"
                except Exception as error:
                    row["error"] = error_text(error)
                yield row
            gpu.free()


# ---- a whole run


def whole_run(gpu: Gpu, quick: bool) -> Iterator[Row]:
    """The recipe `demo` (embedded language models), harvest and training: where the time goes."""
    from crosscode.build.experiment import open_experiment
    from crosscode.build.run import build_trainer
    from crosscode.build.schema import check_config, read_yaml

    values = read_yaml("demo")
    values |= {"device": gpu.device, "backend": "auto" if gpu.device == "cuda" else "torch"}
    values["train"] |= {"log_every": 10**6, "checkpoint_every": None}
    values["evaluation"] = {"n_tokens": 256 if quick else 8192}
    if quick:
        values["train"] |= {"n_tokens": 512, "batch_size": 256}
        values["data"] |= {"shuffle_buffer_size": 1024, "n_tokens_for_norm_estimate": 256, "harvest_batch_size": 2}
        values["crosscoder"]["n_latents"] = 128
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = check_config(values | {"run_dir": str(Path(folder) / "run")})
            started = time.perf_counter()
            trainer = build_trainer(open_experiment(config), progress=False)
            seconds = {"optimizer": 0.0}
            optimizer_step = trainer.optimizer.step

            def timed_step(*arguments: Any, **options: Any) -> Any:
                gpu.synchronize()
                begun = time.perf_counter()
                result = optimizer_step(*arguments, **options)
                gpu.synchronize()
                seconds["optimizer"] += time.perf_counter() - begun
                return result

            trainer.optimizer.step = timed_step
            trainer.train()
            whole = time.perf_counter() - started
            phases, tokens = trainer.phases.total_s, trainer.tokens
    except Exception as error:
        yield {"part": "whole run", "error": error_text(error)}
        return
    parts = {
        "harvest": phases["harvest"], "optimizer": seconds["optimizer"],
        "forward, backward, clipping": phases["step"] - seconds["optimizer"], "evaluation": phases["eval"],
    }  # fmt: skip
    parts["setting up, saving"] = whole - sum(parts.values())
    for part, taken in parts.items():
        yield {"part": part, "seconds": taken, "share": taken / whole}
    yield {"part": "whole run", "seconds": whole, "share": 1.0, "tokens": tokens, "tokens_per_s": tokens / whole}
    yield {"part": "harvest alone", "tokens_per_s": tokens / max(phases["harvest"], 1e-9)}
