"""Traffic model: bytes and FLOPs of each Triton op from its shapes.

These are predictions from arithmetic, not measurements. `fewest` counts every input and output once (of weights that
are gathered, the rows that are touched); `moved` is what the kernels ask of device memory, with what they re-read from
a cache left out where its working set fits, and counted in part where it does not.

Axes: B tokens · I, O flattened input and output dims · L latents · N = B k stored entries · X crosscoding positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from crosscode_kernels.triton_common import heuristics as h
from sass import Constants, Work
from static_tensors import Case

from crosscode.build.plan import GPUS


class Device(NamedTuple):
    """Peaks of a GPU: bytes/s, dense FLOP/s in 16 bits and in float32 (IEEE: `train.tf32` is off unless it is given), and
    bytes of its last cache. For `sass.py`: what its kernels are compiled for, multiprocessors, and their clock."""

    name: str
    bandwidth: float
    flops_16: float
    flops_32: float
    cache: float
    target: str = ""
    units: int = 0
    clock: float = 0.0


CACHES = {
    "h100": (50e6, "sm_90", 132, 1.7e9),
    "a100": (40e6, "sm_80", 108, 1.4e9),
    "mi300x": (256e6, "gfx942", 304, 2.1e9),
}
"""Clocks are what such cards hold under load, not their highest."""
DEVICES = tuple(
    Device(GPUS[name].name, GPUS[name].bandwidth, GPUS[name].flops_16, GPUS[name].flops_32, *others)
    for name, others in CACHES.items()
)
GEMM_EFFICIENCY, MEMORY_EFFICIENCY = 0.7, 0.85
CACHE_SHARE = 0.7
"""Assumed: what a good GEMM reaches of the peak, streaming kernels of the bandwidth, and one op of the cache."""
PROGRAMS, VENDOR_TILE = 264, 128
"""Assumed: GEMM programs that run at a time, two on each of 132 multiprocessors; rows and columns of the vendor's."""
NEAR = 0.15
"""Assumed: a load from a multiprocessor's own cache, of one from the last."""
INDEX = 4
FP32 = 4
DEAD_FRACTION = 0.05


class Term(NamedTuple):
    """One op of the step. `work`: how its kernel goes about it, where `sass.py` knows."""

    name: str
    flops: float
    fewest: float
    moved: float
    work: Work | None = None

    @property
    def ratio(self) -> float:
        """Bytes moved over the fewest possible."""
        return self.moved / self.fewest

    def seconds(self, device: Device, element_size: int, bytes_: float | None = None) -> float:
        """Predicted time with the bytes that are moved, or with other `bytes_`."""
        return max(self.bounds(device, element_size, bytes_).values())

    def bounds(self, device: Device, element_size: int, bytes_: float | None = None) -> dict[str, float]:
        """Seconds by what may decide: "memory", "arithmetic"; and, from the disassembly, "issue" and "latency"."""
        peak = device.flops_16 if element_size == 2 else device.flops_32
        found = {
            "memory": (self.moved if bytes_ is None else bytes_) / (device.bandwidth * MEMORY_EFFICIENCY),
            "arithmetic": self.flops / (peak * GEMM_EFFICIENCY),
        }
        return found if self.work is None else found | self.work.seconds(device, element_size)

    def excess(self, device: Device, element_size: int) -> float:
        """Predicted time over the time with the fewest bytes. Where memory decides, that is the ratio of bytes; bytes
        that hide behind a GEMM's arithmetic cost nothing."""
        return self.seconds(device, element_size) / self.seconds(device, element_size, self.fewest)

    def bound(self, device: Device, element_size: int) -> str:
        """What decides the predicted time."""
        bounds = self.bounds(device, element_size)
        return max(bounds, key=lambda name: bounds[name])

    def within_limit(self, device: Device, element_size: int) -> bool:
        """At most `LIMIT` times the fewest bytes; a GEMM may re-read what arithmetic hides."""
        return self.ratio <= LIMIT or (self.name in GEMMS and self.bound(device, element_size) == "arithmetic")


class Model:
    """The ops of one case on one device; latents are uniformly popular, which is the worst case for re-use."""

    def __init__(self, case: Case, dtype: torch.dtype, device: Device) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.e = dtype.itemsize
        self.B, self.I, self.O, self.L, self.X = (
            case.n_tokens, case.input_width, case.output_width, case.n_latents, len(case.segments),
        )  # fmt: skip
        self.N = case.n_tokens * case.k
        self.touched = self.L * -math.expm1(-self.N / self.L)
        self.entries = self.N * (INDEX + self.e)

    def missed(self, working_set: float) -> float:
        """Share of re-reads that go to device memory."""
        return 1 - min(1.0, CACHE_SHARE * self.device.cache / max(working_set, 1))

    # ---- encode
    def preacts(self) -> Term:
        x, W, y = self.B * self.I * self.e, self.L * (self.I + 1) * self.e, self.B * self.L * self.e
        again = self._x_read_again(self.L, VENDOR_TILE, VENDOR_TILE)
        return Term("encode GEMM", 2 * self.B * self.I * self.L, x + W + y, x + W + y + again)

    def _x_read_again(self, n_columns: float, tile_b: int, tile_c: int) -> float:
        """Programs of one column of output tiles run together and share rows of W; each wave of columns reads x again,
        from the cache as far as it fits."""
        x = self.B * self.I * self.e
        columns_at_a_time = max(1, PROGRAMS // math.ceil(self.B / tile_b))
        waves = math.ceil(n_columns / tile_c / columns_at_a_time)
        return max(waves - 1, 0) * x * self.missed(x)

    def row_select(self) -> Term:
        config = h.row_select_config(self.L, self.case.k, self.e)
        matrix = self.B * self.L * self.e
        # A program reads its own maxima back at once, from the cache.
        maxima = self.B * self.L / config.CHUNK * self.e
        again = self._chunks_read_again(config.CHUNK) * config.CHUNK * self.e
        work = Work("_row_select_kernel", matrix + again, (("SCREEN", "True"),))
        return Term("row top-k", 0, matrix + self.entries, matrix + maxima + again + self.entries, work)

    def batch_select(self) -> Term:
        config, layout = h.batch_select_config(self.L, self.case.k, self.e), h.key_layout(self.dtype)
        matrix = self.B * self.L * self.e
        maxima = self.B * self.L / config.CHUNK * self.e
        again = self._chunks_read_again(config.CHUNK)
        chunks, listed = again * config.CHUNK * self.e, again * (32 + INDEX)
        # Maxima are written and read by the first digit after the matrix has gone through the cache; further digits,
        # counting and listing find them there if they fit. So do listing (after counting) the chunks, and all but the
        # first look at the list (a sector for each entry) the list.
        moved = matrix + maxima * (2 + (1 + layout.N_DIGITS) * self.missed(maxima))
        moved += chunks * (1 + self.missed(chunks)) + listed * (layout.N_DIGITS + 2) * self.missed(listed)
        return Term("batch top-k", 0, matrix + self.entries, moved + self.entries)

    def _chunks_read_again(self, chunk: int) -> float:
        """Chunks that reach the bound: k of a row for the k-th largest maximum, and some ties and neighbours."""
        return min(1.3 * self.N, self.B * self.L / chunk)

    def groupmax(self) -> Term:
        matrix = self.B * self.L * self.e
        return Term("group maximum", 0, matrix + self.entries, matrix + self.entries)

    def dead_preacts(self) -> Term:
        dead = DEAD_FRACTION * self.L
        x, W, y = self.B * self.I * self.e, dead * (self.I + 1) * self.e, self.B * dead * self.e
        config = h.dead_gemm_config(self.I, self.e)
        again = self._x_read_again(dead, config.BLOCK_B, config.BLOCK_C)
        return Term("dead-row GEMM", 2 * self.B * self.I * dead, x + W + y, x + W + y + again)

    # ---- sparse products
    def decode(self, fused: bool) -> Term:
        tile = h.decode_config(self.L, self.O, self.e).BLOCK_O
        rows, y = self.touched * self.O * self.e, self.B * self.O * self.e
        again = (self.N - self.touched) * self.O * self.e * self.missed(self.touched * tile * self.e)
        # Fused: the target is read and the residual written instead of y.
        outputs = 2 * y if fused else y
        fewest = rows + self.entries + outputs + self.O * self.e
        name, kernel = ("decode + residual", "_decode_recon_kernel") if fused else ("decode", "_sparse_decode_kernel")
        config = h.decode_config(self.L, self.O, self.e)
        tiles = self.B * math.ceil(self.O / tile)
        waits = tiles * (1 + (1 + NEAR) * math.ceil(self.case.k / config.BLOCK_K))
        work = Work(kernel, self.N * self.O * self.e, waits=waits)
        return Term(name, 2 * self.N * self.O, fewest, fewest + again, work)

    def decode_backward(self, deferred: bool = False) -> Term:
        """`deferred`: the weight's gradient is summed by the optimizer."""
        return self._segments("decode backward", self.O, dots=True, out=not deferred)

    def encode_backward(self) -> Term:
        return self._segments("encode weight gradient", self.I, dots=False, out=True)

    def _segments(self, name: str, width: int, dots: bool, out: bool) -> Term:
        config = h.segment_config(self.B, width, self.e)
        slices = math.ceil(width / config.slice_width)
        rows, written = self.B * width * self.e, self.L * width * self.e if out else 0
        weights = self.touched * width * self.e if dots else 0
        order = self.N * 2 * INDEX + self.L * 2 * INDEX
        fewest = rows + written + weights + self.entries + order + (self.N * self.e if dots else self.L * self.e)
        again = self.rows_again(width)
        partial_dots = 2 * slices * self.N * FP32 if dots and slices > 1 else 0
        moved = fewest + again + partial_dots + (slices - 1) * (order + self.entries)
        work = self.gathers(width, dots=dots, out=out, streamed=weights)
        return Term(name, (2 * dots + 2 * out) * self.N * width, fewest, moved, work)

    def rows_again(self, width: int) -> float:
        """What of the tokens' rows, read once for each entry, goes to memory again."""
        config = h.segment_config(self.B, width, self.e)
        return (self.N - self.B) * width * self.e * self.missed(self.B * config.slice_width * self.e)

    def gathers(
        self,
        width: int,
        *,
        dots: bool = False,
        out: bool = True,
        outer: str = "",
        of_outer: Constants = (),
        streamed: float = 0.0,
    ) -> Work:
        """A walk over the entries of each latent: bounds and the first entry's token are waited for once; then, tile by tile and
        batch by batch of entries, a token from the nearest cache and rows from the last."""
        config = h.segment_config(self.B, width, self.e)
        batches = self.touched * math.ceil(self.N / self.touched / config.BLOCK_E)
        tiles, slices = math.ceil(width / config.BLOCK_O), math.ceil(width / config.slice_width)
        loop = (("HAS_OUT", str(out)), ("HAS_DOT", str(dots)), ("OVERFLOW", "True"), ("ALIGN", "0"))
        return Work(
            "_segment_rows_kernel", self.N * width * self.e, loop, outer, of_outer, streamed,
            waits=batches * tiles * (1 + NEAR) + 2 * self.touched * slices, around=self.touched * tiles,
        )  # fmt: skip

    def latent_order(self) -> Term:
        # A radix sort of 32-bit keys with their positions: four passes, each reads and writes both.
        fewest = self.N * 2 * INDEX + self.L * INDEX
        return Term("sort by latent", 0, fewest, fewest + 3 * 2 * self.N * (INDEX + 8))

    # ---- norms and losses
    def norms(self) -> Term:
        fewest = self.L * self.O * self.e + self.L * (self.X + 1) * FP32
        return Term("decoder norms", 0, fewest, fewest + self.L * self.X * FP32)

    def norms_backward(self) -> Term:
        vectors = self.L * (2 * self.X + 2) * FP32
        fewest = 2 * self.L * self.O * self.e + vectors
        tiles = math.ceil(self.O / self.X / h.norms_config(self.O // self.X).BLOCK_O)
        return Term("decoder norms backward", 0, fewest, fewest + (tiles - 1) * vectors * 0.1)

    def recon(self) -> Term:
        fewest = 3 * self.B * self.O * self.e + self.X * FP32
        tiles = self.X * math.ceil(self.O / self.X / h.elementwise_config(self.O // self.X).BLOCK)
        return Term("recon loss", 0, fewest, fewest + 2 * self.B * tiles * FP32)

    def recon_backward(self) -> Term:
        bytes_ = 2 * self.B * self.O * self.e + self.X * FP32
        return Term("recon loss backward", 0, bytes_, bytes_)

    def jumprelu(self) -> Term:
        fewest = 2 * self.B * self.L * self.e + self.L * FP32
        splits = math.ceil(self.B / h.dense_config(self.B, self.L, self.e).rows_per_split)
        return Term("JumpReLU", 0, fewest, fewest + (splits - 1) * self.L * FP32)

    def jumprelu_backward(self) -> Term:
        fewest = 3 * self.B * self.L * self.e + 2 * self.L * FP32
        splits = math.ceil(self.B / h.dense_config(self.B, self.L, self.e).rows_per_split)
        # The threshold is read and partial column sums written for each split, then read to be added.
        moved = fewest + (splits - 1) * self.L * FP32 + 2 * splits * self.L * FP32
        return Term("JumpReLU backward", 0, fewest, moved)

    def sparse_penalty(self) -> Term:
        fewest = self.entries + 2 * self.L * FP32
        return Term("sparse penalty", 0, fewest, fewest + self.N / 1024 * 2 * FP32)

    def sparse_penalty_backward(self) -> Term:
        fewest = self.N * INDEX + 2 * self.N * self.e + self.L * (3 * FP32 + INDEX)
        # Entries of a latent lie apart: each is a sector of its own where the values do not fit the cache.
        again = self.N * (32 - self.e) * 2 * self.missed(self.N * self.e)
        return Term("sparse penalty backward", 0, fewest, fewest + again)


OPS: tuple[Callable[[Model], Term], ...] = (
    Model.preacts, Model.row_select, Model.batch_select, Model.groupmax, Model.dead_preacts,
    lambda m: m.decode(False), lambda m: m.decode(True), Model.decode_backward, Model.encode_backward, Model.norms,
    Model.norms_backward, Model.recon, Model.recon_backward, Model.jumprelu, Model.jumprelu_backward,
    Model.sparse_penalty, Model.sparse_penalty_backward,
)  # fmt: skip
"""Triton ops (and the vendor's encode GEMM) that must stay within `LIMIT` times the fewest bytes."""
LIMIT = 1.3
GEMMS = ("encode GEMM", "dead-row GEMM")


def judged(case: Case, dtype: torch.dtype, device: Device) -> list[Term]:
    """Every op of a case, for the limit."""
    model = Model(case, dtype, device)
    return [op(model) for op in OPS]
