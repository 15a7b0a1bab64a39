"""Launch configurations: one frozen dataclass and one documented rule per kernel. No autotuning.

Axes: B tokens · O flattened width of a row of weights · L latents · N non-zeros · C columns of pre-activations.

The rules depend on shapes and dtypes, and on the device only through `warps_on`, so that one table
(`benches/results/compile_matrix`) covers every configuration that can occur. Three considerations decide:

- a thread's loads are 16 bytes wide: a tile row of one warp holds at least 16 bytes x 8 lanes;
- the slice of weights that concurrent programs gather from should stay in L2 (`L2_BYTES`, what an A100 has to spare);
- accumulators live in fp32 registers: at most 64 a thread, so that two of them never spill.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

L2_BYTES = 24 * 2**20
ITEM = 64
"""Pairs summed by one program of a weight gradient; a latent with more is summed from partials in fixed order."""


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= max(n, 1)."""
    return 1 << max(n - 1, 0).bit_length()


def clamp_power_of_2(n: int, low: int, high: int) -> int:
    """`next_power_of_2(n)` within `[low, high]` (both powers of two)."""
    return min(max(next_power_of_2(n), low), high)


def warps_for(tile: int) -> int:
    """Eight elements a thread: one 16-byte load in 16-bit precision, two in fp32."""
    return min(max(tile // 256, 1), 8)


def warps_on(num_warps: int, warp_size: int) -> int:
    """Configurations count warps of 32 threads; AMD's have 64. The number of threads stays, and its bytes."""
    return max(1, num_warps * 32 // warp_size)


def rows_are_aligned(width: int, element_size: int) -> bool:
    """Whether every row of a matrix starts at a multiple of 16 bytes."""
    return width * element_size % 16 == 0


@dataclass(frozen=True)
class DecodeConfig:
    """One warp sums `BLOCK_K` weighted rows at a time over a tile of `BLOCK_O` columns."""

    BLOCK_K: int
    BLOCK_O: int
    num_warps: int = 1
    num_stages: int = 2


def decode_config(n_latents: int, width: int, element_size: int) -> DecodeConfig:
    """The widest tile whose column slice of all rows fits L2; 256 bytes at least, 2 KiB at most."""
    narrowest, widest = 256 // element_size, 512
    in_l2 = L2_BYTES // max(n_latents * element_size, 1)
    tile = narrowest
    while tile * 2 <= min(in_l2, widest) and tile < width:
        tile *= 2
    return DecodeConfig(BLOCK_K=max(1, 2048 // tile // 2), BLOCK_O=tile)


@dataclass(frozen=True)
class SegmentConfig:
    """One warp owns a row of weights, or a slice of it, and walks its pairs `BLOCK_E` at a time, tile by tile."""

    BLOCK_E: int
    BLOCK_O: int
    slice_width: int
    num_warps: int = 1
    num_stages: int = 2


def segment_config(n_tokens: int, width: int, element_size: int) -> SegmentConfig:
    """A tile row of 1 KiB: 16 bytes a lane of a 64-lane warp; half of it where rows are not aligned to 16 bytes, since
    narrow loads need an address each. As many pairs in flight as load 2 KiB. Slices so wide that all tokens' rows take
    half of L2, in whole tiles; as equal as tiles allow."""
    tile_bytes = 1024 if rows_are_aligned(width, element_size) else 512
    block_o = clamp_power_of_2(width, 64, tile_bytes // element_size)
    tiles = -(-width // block_o)
    tiles_in_l2 = max(L2_BYTES // 2 // max(n_tokens * block_o * element_size, 1), 1)
    slices = -(-tiles // tiles_in_l2)
    return SegmentConfig(
        BLOCK_E=min(max(2048 // (block_o * element_size), 1), 8),
        BLOCK_O=block_o,
        slice_width=-(-tiles // slices) * block_o,
    )


@dataclass(frozen=True)
class KeyLayout:
    """Radix layout of the ranking keys of a dtype: `N_DIGITS` digits of `DIGIT_BITS`; `torch_dtype` holds a key."""

    KEY_DTYPE: Any
    torch_dtype: torch.dtype
    DIGIT_BITS: int
    N_DIGITS: int


def key_layout(dtype: torch.dtype) -> KeyLayout:
    """16-bit floats have keys of 15 bits, float32 of 31: the sign is known."""
    if dtype == torch.float32:
        return KeyLayout(tl.float32, torch.int32, 8, 4)
    return KeyLayout(tl.bfloat16 if dtype == torch.bfloat16 else tl.float16, torch.int16, 8, 2)


def chunk_width(n_columns: int, kept_per_row: float, element_size: int) -> int:
    """Columns that share a maximum. Wide chunks make few maxima, narrow ones leave little to read again: bytes are
    least at `C^2 = L / kept`. At least one 32-byte sector."""
    best = (n_columns / max(kept_per_row, 1)) ** 0.5
    return clamp_power_of_2(round(best / 1.4), 32 // element_size, 128)


@dataclass(frozen=True)
class RowSelectConfig:
    """One program a row: a first pass over `SCAN` columns at a time, then tiles of `BLOCK`, both made of chunks of `CHUNK`; up to
    `CAPACITY` candidates are listed."""

    SCAN: int
    BLOCK: int
    CHUNK: int
    CAPACITY: int
    num_warps: int = 4
    num_stages: int = 2


def row_select_config(n_columns: int, k: int, element_size: int) -> RowSelectConfig:
    """The list holds four times k (the k-th chunk maximum bounds the k-th value from below, so it rarely fills). The first pass
    has four loads in flight; two where rows of 16-bit numbers are not aligned to 16 bytes: each number then has an address."""
    block = clamp_power_of_2(n_columns, 128, 1024)
    n_loads = 4 if element_size == 4 or rows_are_aligned(n_columns, element_size) else 2
    return RowSelectConfig(
        SCAN=clamp_power_of_2(n_columns, block, n_loads * block),
        BLOCK=block,
        CHUNK=chunk_width(n_columns, k, element_size),
        CAPACITY=clamp_power_of_2(4 * k, 256, 8192),
        num_warps=warps_for(block),
    )


def preacts_at_a_time(fixed: int, cut: int, unit: int = 1) -> int:
    """How much of the dimension `cut` goes into one GEMM: 2**28 pre-activations, in multiples of `unit` (and of 1024
    where there are so many, which keeps chunks aligned)."""
    step = max(2**28 // max(fixed, 1), 1)
    unit = math.lcm(unit, 1024) if step >= math.lcm(unit, 1024) else unit
    return min(max(step // unit, 1) * unit, max(cut, 1))


@dataclass(frozen=True)
class ElementwiseConfig:
    """A program streams `BLOCK` contiguous elements."""

    BLOCK: int
    num_warps: int = 4
    num_stages: int = 2


def elementwise_config(n: int) -> ElementwiseConfig:
    """1024 elements at most."""
    block = clamp_power_of_2(n, 64, 1024)
    return ElementwiseConfig(BLOCK=block, num_warps=warps_for(block))


@dataclass(frozen=True)
class NormsConfig:
    """A program takes `BLOCK_L` rows, tile of `BLOCK_O` columns by tile."""

    BLOCK_L: int
    BLOCK_O: int
    num_warps: int = 4
    num_stages: int = 2


def norms_config(width: int) -> NormsConfig:
    """A warp a row: 256 columns are 16 bytes a lane in bf16, twice that in fp32."""
    return NormsConfig(BLOCK_L=4, BLOCK_O=clamp_power_of_2(width, 64, 256))


@dataclass(frozen=True)
class DeadGemmConfig:
    """Output tile `BLOCK_B x BLOCK_C`, `BLOCK_I` columns a step, loads `num_stages` steps ahead."""

    BLOCK_B: int
    BLOCK_C: int
    BLOCK_I: int
    num_warps: int
    num_stages: int


def dead_gemm_config(width: int, element_size: int) -> DeadGemmConfig:
    """128 x 128 for 16-bit inputs; fp32 takes half of each and half the steps, since its operands are twice as wide. Half
    the columns where rows are not aligned to 16 bytes: operands then wait in registers, an address for each number."""
    aligned = rows_are_aligned(width, element_size)
    if element_size == 2:
        return DeadGemmConfig(BLOCK_B=128, BLOCK_C=128 if aligned else 64, BLOCK_I=32, num_warps=8, num_stages=3)
    block_c, block_i = (64, 16) if aligned else (32, 32)
    return DeadGemmConfig(BLOCK_B=64, BLOCK_C=block_c, BLOCK_I=block_i, num_warps=4, num_stages=3)


@dataclass(frozen=True)
class GroupMaxConfig:
    """A program takes `BLOCK_G` neighbouring groups of a token, `BLOCK_W` of their latents at a time."""

    BLOCK_G: int
    BLOCK_W: int
    num_warps: int = 4
    num_stages: int = 2


def groupmax_config(group_width: int, n_groups: int) -> GroupMaxConfig:
    """2048 elements a step, as wide along the group as it goes: neighbouring groups are neighbours in memory."""
    block_w = clamp_power_of_2(group_width, 8, 1024)
    return GroupMaxConfig(BLOCK_G=clamp_power_of_2(n_groups, 1, 2048 // block_w), BLOCK_W=block_w)


@dataclass(frozen=True)
class DenseConfig:
    """A program streams `rows_per_split` rows through a tile of `BLOCK_L` latents."""

    BLOCK_L: int
    rows_per_split: int
    num_warps: int = 4
    num_stages: int = 2


def dense_config(n_tokens: int, n_latents: int, element_size: int) -> DenseConfig:
    """About 2048 programs, but 32 rows each at least, so that partial column sums stay near 3% of the matrix. Twice the threads
    where rows are not aligned to 16 bytes: each number then has an address."""
    block = clamp_power_of_2(n_latents, 64, 1024)
    tiles = -(-n_latents // block)
    splits = max(1, 2048 // tiles)
    warps = warps_for(block) * (1 if rows_are_aligned(n_latents, element_size) else 2)
    return DenseConfig(BLOCK_L=block, rows_per_split=max(32, -(-n_tokens // splits)), num_warps=warps)


@dataclass(frozen=True)
class LatentSumConfig:
    """A program sums the entries of `BLOCK_L` latents, `BLOCK_E` of each at a time."""

    BLOCK_L: int
    BLOCK_E: int
    num_warps: int = 4


def latent_sum_config(n_entries: int, n_latents: int) -> LatentSumConfig:
    """1024 entries a step, shaped after the mean number of entries; a hot latent takes more steps."""
    block_e = clamp_power_of_2(4 * (n_entries // max(n_latents, 1)), 16, 64)
    return LatentSumConfig(BLOCK_L=1024 // block_e, BLOCK_E=block_e)


@dataclass(frozen=True)
class BatchSelectConfig:
    """Tiles of `BLOCK` columns in chunks of `CHUNK`; at most `max_programs` add up a histogram; the list of candidates
    holds `list_per_kept` entries for each one kept."""

    BLOCK: int
    CHUNK: int
    max_programs: int = 1024
    list_per_kept: int = 4
    num_warps: int = 4


def batch_select_config(n_columns: int, kept_per_row: float, element_size: int) -> BatchSelectConfig:
    """As for rows."""
    block = clamp_power_of_2(n_columns, 128, 1024)
    chunk = chunk_width(n_columns, kept_per_row, element_size)
    return BatchSelectConfig(BLOCK=block, CHUNK=chunk, num_warps=warps_for(block))
