"""`crosscode doctor`: does everything work on this machine, and how fast is its disk?

Axes: B tokens · I flattened input · O flattened output · L latents.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from crosscode_kernels import OpSet, available_backends, resolve_backend
from crosscode_kernels.sparse import Latents
from torch import Tensor

from crosscode.trainers.summary import PACKAGES, versions

N_TOKENS, D_IN, D_OUT, N_LATENTS, K = 32, 24, 20, 96, 6
SEGMENTS = (8, 12)
TOLERANCE = 1e-4
EXTRAS = ("wandb", "tensorboard", "gguf")
DISK_BYTES = 64 << 20


@dataclass(frozen=True)
class Check:
    """One line of the report. `ok` is None for a plain fact."""

    name: str
    text: str
    ok: bool | None = None

    def __str__(self) -> str:
        mark = {None: "    ", True: "ok  ", False: "FAIL"}[self.ok]
        return f"{mark} {self.name:28} {self.text}"


def examine(folder: Path, seconds: float = 10.0) -> Iterator[Check]:
    """All checks, one after the other. `folder`: where to measure the disk (nothing stays there)."""
    for name, version in versions((*PACKAGES, *EXTRAS)).items():
        yield Check(name, version)
    yield from devices()
    for status in available_backends():
        yield Check(f"backend {status.name}", "available" if status.available else f"not available: {status.reason}")
    yield from self_test(seconds)
    yield from disk_speed(folder)


def devices() -> Iterator[Check]:
    threads, cores = torch.get_num_threads(), os.cpu_count()
    yield Check("cpu", f"{cores} cores, {threads} threads for PyTorch, {torch.backends.cpu.get_cpu_capability()}")
    yield Check("memory", f"{_memory_gib():.1f} GiB")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield Check(f"cuda:{i}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        yield Check("mps", "available")


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


# ---- kernels against the reference


def self_test(seconds: float) -> Iterator[Check]:
    """Every op of every backend that works here against the reference in float64, values and gradients, on seed
    after seed while its share of the time lasts (at least one)."""
    found = []
    for device in _test_devices():
        for status in available_backends(device):
            if status.available and status.name != "reference":
                found.append((status.name, device))
    for name, device in found:
        ops = resolve_backend(name, device, torch.float32)  # pyright: ignore[reportArgumentType]
        yield from _test_backend(ops, device, seconds / max(1, len(found)))


def _test_devices() -> list[torch.device]:
    return [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])


def _test_backend(ops: OpSet, device: torch.device, seconds: float) -> Iterator[Check]:
    deadline, worst, n_seeds = time.monotonic() + seconds, dict.fromkeys(CASES, 0.0), 0
    broken: dict[str, str] = {}
    while n_seeds == 0 or time.monotonic() < deadline:
        for case in CASES:
            try:
                worst[case] = max(worst[case], _difference(ops, case, n_seeds, device))
            except Exception as error:
                broken[case] = f"{type(error).__name__}: {error}".splitlines()[0]
        n_seeds += 1
    for case, error in worst.items():
        found = f"agrees with float64 to {error:.1e} of the largest value (allowed {TOLERANCE:.0e}), {n_seeds} seed(s)"
        text = broken.get(case) or found
        yield Check(f"{ops.name} {device.type} {case}", text, case not in broken and error < TOLERANCE)


def _difference(ops: OpSet, case: str, seed: int, device: torch.device) -> float:
    """Largest difference to the reference, relative to the largest value, over results and gradients."""
    reference = resolve_backend("reference", "cpu", torch.float64)
    expected = _results(reference, case, seed, torch.float64, torch.device("cpu"))
    ours = _results(ops, case, seed, torch.float32, device)
    worst = 0.0
    for mine, theirs in zip(ours, expected, strict=True):
        scale = float(theirs.abs().max()) or 1.0
        worst = max(worst, float((mine.double().cpu() - theirs).abs().max()) / scale)
        if not bool(mine.isfinite().all()):
            return float("inf")
    return worst


def _results(ops: OpSet, case: str, seed: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device).requires_grad_()

    inputs = {"x": draw(N_TOKENS, D_IN), "W_enc": draw(N_LATENTS, D_IN), "b_enc": draw(N_LATENTS)}
    inputs |= {"W_dec": draw(N_LATENTS, D_OUT), "b_dec": draw(D_OUT), "t": draw(N_LATENTS)}
    target_BO = draw(N_TOKENS, D_OUT).detach()
    latents = CASES[case](ops, inputs)
    y_BO = ops.sparse_decode(latents, inputs["W_dec"], inputs["b_dec"])
    norms = ops.decoder_norms(inputs["W_dec"], SEGMENTS, "sum")
    ones_L = torch.ones_like(norms.n_L).detach()
    loss = ops.recon_loss(y_BO, target_BO, SEGMENTS).loss
    loss = loss + ops.weighted_l1(latents, norms.n_L, ones_L) + ops.weighted_tanh(latents, norms.n_L, ones_L, 4.0)
    if case == "jumprelu":
        loss = loss + ops.pre_act_penalty(latents, inputs["t"], norms.n_L, ones_L)
    loss.backward()
    grads = [tensor.grad for tensor in inputs.values() if tensor.grad is not None]
    return [latents.to_dense().detach(), y_BO.detach(), loss.detach(), *grads]


def _aux(ops: OpSet, p: dict[str, Tensor]) -> Latents:
    dead_mask_L = torch.arange(N_LATENTS, device=p["x"].device) % 3 == 0
    return ops.aux_topk(p["x"], p["W_enc"], p["b_enc"], dead_mask_L, K)


CASES: dict[str, Callable[[OpSet, dict[str, Any]], Latents]] = {
    "topk": lambda ops, p: ops.encode_topk(p["x"], p["W_enc"], p["b_enc"], K),
    "batch_topk": lambda ops, p: ops.encode_batch_topk(p["x"], p["W_enc"], p["b_enc"], K),
    "groupmax": lambda ops, p: ops.encode_groupmax(p["x"], p["W_enc"], p["b_enc"], K),
    "aux_topk": _aux,
    "relu": lambda ops, p: ops.encode_relu(p["x"], p["W_enc"], p["b_enc"]),
    "jumprelu": lambda ops, p: ops.encode_jumprelu(p["x"], p["W_enc"], p["b_enc"], p["t"], 2.0, "anthropic"),
}


# ---- disk


def disk_speed(folder: Path) -> Iterator[Check]:
    """Write (to the platter, not to the cache) and read back a file of 64 MiB."""
    block = os.urandom(1 << 20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".crosscode-doctor-") as file:
            started = time.perf_counter()
            for _ in range(DISK_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written_s = time.perf_counter() - started
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            started = time.perf_counter()
            while file.read(len(block)):
                pass
            read_s = time.perf_counter() - started
    except OSError as error:
        yield Check("disk", f"{folder}: {error}", False)
        return
    mib = DISK_BYTES / 2**20
    free_gib = shutil.disk_usage(folder).free / 2**30
    speed = f"write {mib / written_s:.0f} MiB/s, read {mib / read_s:.0f} MiB/s, {free_gib:.1f} GiB free"
    yield Check("disk", f"{folder.resolve()}: {speed}", True)
