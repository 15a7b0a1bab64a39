"""The Triton kernels as they are compiled for sm_90, emulated: their results are those of stock ops, and no race is found.

One kernel in an ordinary run, all of them in `make soak`. Not emulated, since tensor cores are not: the kernels in `TENSOR_CORES`
on 16-bit tensors (in float32 they multiply without them).

Axes: B tokens · L latents · N entries.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ptx_emulator.launcher import Emulator
from static_cases import launches, op_calls
from static_tensors import Case, Tensors
from torch import Tensor

ROOT = Path(__file__).parents[3] / "kernels" / "crosscode_kernels"
TENSOR_CORES = {
    "_dead_preacts_kernel": ("aux_topk", "aux_topk unbiased", "encode_topk screened"),
    "_product_if_kernel": ("capacity_product decode", "capacity_product values", "capacity_product weights"),
}
CASES = {
    case.name: case
    for case in (
        Case("odd", 9, 37, (17, 5), 131, 3),
        Case("aligned", 6, 64, (64, 64), 256, 8),
        Case("long rows", 2, 37, (17, 17, 5), 3001, 5),
        Case("one entry", 5, 16, (16,), 64, 1),
        Case("ones", 1, 1, (1,), 1, 1),
    )
}
OPS = sorted(set().union(*(op_calls(case, Tensors(case, torch.float32)) for case in CASES.values())))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest value: sums of a tensor of this dtype are rounded in another order than by stock ops."""


def emulated(op: str, case: Case, tensors: Tensors, emulator: Emulator) -> list[Tensor]:
    with emulator.in_place_of_a_gpu():
        return parts(op_calls(case, tensors)[op]())


def expected(op: str, case: Case, t: Tensors) -> list[Tensor]:
    """By stock ops; by formula where the torch backend has no kernel of that name."""
    h_BL, n_L, lambda_L = (tensor.float() for tensor in (t.h_BL, t.n_L, t.lambda_L))
    if op.startswith("encode_threshold"):
        rank_BL = h_BL.relu() * (n_L if "scaled" in op else 1)
        threshold = t.g if "scaled" in op else t.g.to(t.h_BL.dtype).float()
        kept_BL = (h_BL > 0) & (rank_BL >= threshold)
        return [kept_BL.sum(1), kept_BL.nonzero()[:, 1], t.h_BL[kept_BL]]
    if op.startswith("capacity_support"):
        kept_BL = h_BL > (t.t_L if "jumprelu" in op else 0)
        n, n_kept = h_BL.numel(), int(kept_BL.sum())
        row_ptr_B1 = torch.nn.functional.pad(kept_BL.sum(1).cumsum(0), (1, 0))
        rest = (0, n - n_kept)
        places_N = kept_BL.view(-1).nonzero()[:, 0]
        parts_N = ((kept_BL.nonzero()[:, 1], 0), (t.h_BL[kept_BL], 0), (places_N, n))
        padded = [torch.nn.functional.pad(part, rest, value=value) for part, value in parts_N]
        return [row_ptr_B1, *padded, torch.zeros(())]
    if op == "dense_penalty l1":
        return [(h_BL * n_L * lambda_L).sum() / case.n_tokens, lambda_L * h_BL.sum(0) / case.n_tokens]
    if op == "dense_penalty_backward l1":
        coefficient_L = t.g * lambda_L / case.n_tokens
        return [(coefficient_L * n_L).to(t.h_BL.dtype).expand_as(h_BL)]
    return parts(op_calls(case, t, "torch")[op]())


def parts(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]


def comparable(op: str, tensors: list[Tensor]) -> list[Tensor]:
    """Entries of a row in the order of their latents: the backends order them differently."""
    if op.startswith(("encode_topk", "aux_topk")):
        idx_BK, order_BK = tensors[0].sort(1)
        return [idx_BK, tensors[1].gather(1, order_BK)]
    return tensors


def assert_same(op: str, actual: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(comparable(op, actual), comparable(op, wanted), strict=True):
        assert one.shape == other.shape
        if one.is_floating_point():
            error = (one.double() - other.double()).abs().max() if one.numel() else torch.zeros(())
            assert error <= TOLERANCE[dtype] * other.double().abs().max(), f"{op}: {error:.2g}"
        else:
            assert torch.equal(one.long(), other.long()), op


def check(op: str, case: Case, dtype: torch.dtype) -> None:
    tensors, emulator = Tensors(case, dtype, "cpu"), Emulator()
    actual = emulated(op, case, tensors, emulator)
    assert not emulator.findings
    assert emulator.programs
    assert_same(op, actual, expected(op, case, tensors), dtype)


def test_a_kernel_gives_what_stock_ops_give_and_has_no_race():
    check("dense_penalty l1", CASES["long rows"], torch.float32)


def test_without_its_barrier_it_has_a_race():
    def without_barriers(ptx: str) -> str:
        changed, n = re.subn(r"\bbar\.sync\s+0;", "", ptx)
        assert n > 0
        return changed

    case, emulator = CASES["long rows"], Emulator(change_ptx=without_barriers)
    emulated("dense_penalty l1", case, Tensors(case, torch.float32, "cpu"), emulator)
    assert any(text.startswith("_dense_fwd_kernel: shared race") for text in emulator.findings), emulator.findings


def test_every_kernel_is_emulated_or_excluded_by_name():
    sources = "\n".join(path.read_text() for path in ROOT.rglob("*.py"))
    bodies = re.split(r"@triton\.jit\ndef ", sources)[1:]
    kernels = {body.partition("(")[0]: "tl.dot(" in body.partition("\n\n\n")[0] for body in bodies}
    kernels = {name: has_dot for name, has_dot in kernels.items() if name.endswith("_kernel")}
    assert {name for name, has_dot in kernels.items() if has_dot} == TENSOR_CORES.keys()
    found = {
        launch.kernel.__name__: op
        for case in CASES.values()
        for op, recorded in launches(case, torch.float32).items()
        for launch in recorded
    }
    assert kernels.keys() - {"_probe_kernel"} == found.keys()


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_gives_what_stock_ops_give_and_has_no_race(op, dtype, case):
    if dtype != torch.float32 and any(op in ops for ops in TENSOR_CORES.values()):
        pytest.skip("tensor cores are not emulated")
    if op not in op_calls(case, Tensors(case, dtype)):
        pytest.skip("not for this shape")
    check(op, case, dtype)


SAMPLED = Case("sampled", 64, 768, (384, 384), 4096, 32)


def ops_of_one_launch() -> list[str]:
    excluded = set().union(*TENSOR_CORES.values())
    found = launches(SAMPLED, torch.bfloat16).items()
    return [op for op, recorded in found if len(recorded) == 1 and op not in excluded]


@pytest.mark.soak
@pytest.mark.parametrize("op", ops_of_one_launch())
def test_some_programs_of_a_larger_grid(op):
    tensors, emulator = Tensors(SAMPLED, torch.bfloat16, "cpu"), Emulator(most_programs=3)
    actual = emulated(op, SAMPLED, tensors, emulator)
    assert not emulator.findings
    compared = 0
    for one, other in zip(actual, expected(op, SAMPLED, tensors), strict=True):
        written = emulator.written.get(one.data_ptr())
        if written is not None and written.size == one.nbytes and written.any():
            written = torch.from_numpy(written.reshape(*one.shape, one.element_size()).all(-1))
            assert_same("", [one[written]], [other[written]], torch.bfloat16)
            compared += int(written.sum())
    # What is left: sums that stock ops add up, and selections that they convert.
    assert compared or op.endswith(("penalty l1", "penalty tanh", "pre_act")) or op.startswith("encode")


@pytest.mark.soak
def test_the_barriers_of_the_row_select_are_needed():
    from crosscode_kernels.selection import triton_impl

    kernel, case = triton_impl._row_select_kernel, Case("row", 1, 8, (8,), 8192, 16)
    source = kernel.src
    found = []
    try:
        for changed in (source, source.replace("tl.debug_barrier()", "pass")):
            kernel._unsafe_update_src(changed)
            emulator = Emulator()
            emulated("encode_topk", case, Tensors(case, torch.bfloat16, "cpu"), emulator)
            found.append({text.partition(":")[2] for text in emulator.findings})
    finally:
        kernel._unsafe_update_src(source)
    assert not found[0] and any("race" in text for text in found[1]), found
