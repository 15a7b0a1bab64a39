"""The emulator itself, on a few lines of PTX: what it computes, and each kind of fault that it must find."""

from __future__ import annotations

import random

import numpy as np
import pytest
from ptx_emulator import launcher  # noqa: F401  (it brings the instructions)
from ptx_emulator.assembler import Unsupported, assemble
from ptx_emulator.machine import Kernel, run_grid
from ptx_emulator.memory import Fault, Region, Space
from ptx_emulator.program import parse

HEAD = """
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0)
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [k_param_0];
    mov.u32 %r1, %tid.x;
    mad.wide.u32 %rd2, %r1, 4, %rd1;
    shl.b32 %r2, %r1, 2;
"""
BASE = 1 << 20


def run(body, data, n_warps=2, n_blocks=1, shared=1024):
    """What a kernel leaves of `data` (int32), and what was found wrong."""
    lines = [part.strip() for part in body.split(";")]
    lines = [line if line.endswith(":") else f"{line};" for line in (*lines, "ret")]
    program = parse(HEAD.format(threads=32 * n_warps) + "\n".join(lines), shared, n_warps)
    region = Region(BASE, data.view(np.uint8).copy())
    grid = (n_blocks, 1, 1)
    kernel = Kernel(program, assemble(program))
    found = run_grid(
        kernel,
        grid,
        [(i, 0, 0) for i in range(n_blocks)],
        {"k_param_0": BASE},
        Space("global", [region]),
        random.Random(0),
    )
    return region.data.view(np.int32), {text.partition(":")[0] for text in found}


def test_lanes_load_compute_and_store():
    body = "ld.global.b32 %r3, [%rd2]; mad.lo.s32 %r3, %r3, %r3, %r1; st.global.b32 [%rd2], %r3"
    out, found = run(body, np.arange(64, dtype=np.int32))
    assert out.tolist() == [i * i + i for i in range(64)] and not found


def test_lanes_that_part_meet_again():
    body = (
        "setp.lt.u32 %p1, %r1, 5; @%p1 bra $L_a; mov.b32 %r3, 1; bra.uni $L_b; $L_a:; mov.b32 %r3, 2; $L_b:; "
        "shfl.sync.bfly.b32 %r4, %r3, 16, 31, -1; st.global.b32 [%rd2], %r4"
    )
    out, found = run(body, np.zeros(32, np.int32), n_warps=1)
    assert out.tolist() == [1] * 16 + [2] * 5 + [1] * 11 and not found


NEIGHBOUR = (
    "xor.b32 %r5, %r2, 128; st.shared.b32 [%r2], %r1; {barrier}ld.shared.b32 %r3, [%r5]; st.global.b32 [%rd2], %r3"
)


def test_a_barrier_orders_two_warps():
    out, found = run(NEIGHBOUR.format(barrier="bar.sync 0; "), np.zeros(64, np.int32))
    assert out.tolist() == [*range(32, 64), *range(32)] and not found
    for _ in range(3):
        assert run(NEIGHBOUR.format(barrier=""), np.zeros(64, np.int32))[1] & {
            "shared race (read after write)", "shared race (write after read)", "shared memory read that nobody wrote"
        }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("mov.b32 %r3, %ctaid.x; st.global.b32 [%rd2], %r3", "global race (write after write)"),
        ("st.global.b32 [%rd1], %r1", "lanes of a warp store different values at one address"),
        ("ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd2], %r3", "shared memory read that nobody wrote"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 ret; bar.sync 0", "some warps ended before it"),
        ("atom.global.add.u32 %r3, [%rd1], 1; ld.global.b32 %r4, [%rd1]", "global race"),
        ("atom.global.add.u32 %r3, [%rd1], 1", None),
    ],
)
def test_what_is_reported(body, expected):
    found = run(body, np.zeros(64, np.int32), n_blocks=2)[1]
    assert not found if expected is None else any(text.startswith(expected) for text in found)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r3, [%rd2+4]", "global access out of bounds: ld.global"),
        ("st.global.b32 [%rd2+-4], %r1", "global access out of bounds: st.global"),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd2]", "misaligned global access"),
        ("st.shared.b32 [%r2+1000], %r1", "shared access out of bounds"),
    ],
)
def test_what_cannot_go_on(body, message):
    with pytest.raises(Fault, match=message):
        run(body, np.zeros(64, np.int32))


def test_tensor_cores_are_not_emulated():
    with pytest.raises(Unsupported, match="mma"):
        run("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4}", np.zeros(64, np.int32))


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1.0, 1.00390625, 1.01171875, np.nan], np.float32)
    data = np.concatenate([values, np.zeros(28, np.float32)]).view(np.int32)
    body = "ld.global.b32 %r3, [%rd2]; cvt.rn.bf16.f32 %rs1, %r3; cvt.u32.u16 %r4, %rs1; st.global.b32 [%rd2], %r4"
    assert run(body, data, n_warps=1)[0][:4].tolist() == [0x3F80, 0x3F80, 0x3F82, 0x7FFF]
