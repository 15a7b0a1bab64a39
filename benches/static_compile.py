"""Compile matrix: every kernel, at every configuration the heuristics choose for real sizes, for four GPU targets.

    python benches/static_compile.py [--out DIR] [--cases NAME ...] [--targets NAME ...] [--kernels NAME ...] [--jobs N]
                                    [--one-per-kernel] [--seconds S]

Needs no GPU. Arguments are specialised as the runtime would (pointers and sizes that are multiples of 16, sizes of 1).
`static_binary.py` reads the figures. Exits with an error where a kernel does not compile, spills, exceeds shared memory,
or has a hot load (one through an argument that is a whole matrix) that is narrower than 128 bits. An interrupted run goes
on from what it had finished. Where not everything is compiled, the rows of `--join` (a stored matrix) are kept beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from crosscode_kernels.triton_common.heuristics import warps_on
from static_binary import amd_facts, cubin_facts, hot_places, ptx_hot_widths
from static_cases import launches
from static_table import joined, write
from static_tensors import CASES, DTYPES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
SHARED_PER_UNIT = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024, "gfx942": 64 * 1024}
BLOCKS_PER_UNIT = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 32}
HALF_CASES = ("crosscoder-131k", "ragged")
"""fp16 chooses what bf16 does, but for the key layout of the selects, which does not depend on the shape."""
# A cached binary would carry the line numbers of the day it was compiled.
triton.knobs.compilation.always_compile = True


class Job(NamedTuple):
    """One kernel at one configuration and specialisation. `where` says which op and case asked for it first."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    where: str


def specialised(kernel: Any, args: tuple[Any, ...], meta: dict[str, Any], where: str) -> Job:
    backend = make_backend(TARGETS["sm_90"])
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _options = binder(*args, **meta)
    names = list(bound)
    constants, aligned, signature = [], [], []
    for name, (kind, extra) in zip(names, specialization, strict=True):
        signature.append((name, kind))
        if kind == "constexpr":
            constants.append((name, bound[name]))
        elif isinstance(extra, str) and "D" in extra:
            aligned.append(name)
    return Job(
        kernel.module, kernel.__name__, tuple(signature), tuple(constants), tuple(aligned),
        meta.get("num_warps", 4), meta.get("num_stages", 3), where,
    )  # fmt: skip


def _settings(meta: dict[str, Any], dtype: torch.dtype) -> list[dict[str, Any]]:
    """The options of a launch, and those under PyTorch's setting for float32 products that it may find on a GPU."""
    if dtype == torch.float32 and meta.get("PRECISION") == "ieee":
        return [meta, meta | {"PRECISION": "tf32"}]
    return [meta]


def can_choose(job: Job, target: str) -> bool:
    """AMD has no such setting."""
    return target != "gfx942" or dict(job.constants).get("PRECISION") != "tf32"


def jobs_of(case_names: list[str] | None = None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> list[Job]:
    """The distinct compilations that the cases need."""
    jobs: dict[tuple[Any, ...], Job] = {}
    for case in CASES:
        if case_names is not None and case.name not in case_names:
            continue
        for dtype in dtypes:
            if dtype == torch.float16 and case.name not in HALF_CASES:
                continue
            for op, recorded in launches(case, dtype).items():
                for launch in recorded:
                    where = f"{op}, {case.name}, {str(dtype).removeprefix('torch.')}"
                    for meta in _settings(launch.meta, dtype):
                        job = specialised(launch.kernel, launch.args, meta, where)
                        jobs.setdefault(job[:-1], job)
    return list(jobs.values())


def _occupancy(target: str, registers: int, shared: int, num_warps: int) -> int:
    """Warps that fit a multiprocessor (a compute unit on AMD) with these resources."""
    if target == "gfx942":
        per_simd = min(8, 512 // max(-(-registers // 8) * 8, 1))
        by_registers = per_simd * 4 // num_warps
    else:
        by_registers = 65536 // (max(-(-registers * 32 // 256) * 256, 256) * num_warps)
    most_warps = 32 if target == "gfx942" else 64
    overhead = 0 if target == "gfx942" else 1024
    by_shared = SHARED_PER_UNIT[target] // max(shared + overhead, 1) if shared + overhead else by_registers
    return min(by_registers, by_shared, BLOCKS_PER_UNIT[target], most_warps // num_warps) * num_warps


def described(job: Job, target_name: str) -> dict[str, Any]:
    """The columns of the table that say what was compiled."""
    return {
        "kernel": job.kernel, "target": target_name,
        "constants": {name: str(value) for name, value in job.constants},
        "dtypes": sorted({kind for _, kind in job.signature if kind.startswith("*")}), "aligned": len(job.aligned),
        "num_warps": warps_on(job.num_warps, TARGETS[target_name].warp_size),
    }  # fmt: skip


def compiled_job(job: Job, target_name: str) -> Any:
    """What Triton makes of a job."""
    kernel = getattr(sys.modules[job.module], job.kernel)
    order = {name: i for i, (name, _) in enumerate(job.signature)}
    source = ASTSource(
        kernel, dict(job.signature), {(order[name],): value for name, value in job.constants},
        {(order[name],): [["tt.divisibility", 16]] for name in job.aligned},
    )  # fmt: skip
    target = TARGETS[target_name]
    options = {"num_warps": warps_on(job.num_warps, target.warp_size), "num_stages": job.num_stages}
    return triton.compile(source, target=target, options=options)


def compile_job(job: Job, target_name: str) -> dict[str, Any]:
    """Compile one job for one target and read what came out. `error` is set where it failed."""
    target = TARGETS[target_name]
    row = described(job, target_name)
    try:
        compiled = compiled_job(job, target_name)
    except Exception as error:  # whatever the compiler raises is a row of the table
        return row | {"error": f"{type(error).__name__}: {str(error)[-400:]}"}
    hot = hot_places(compiled.asm["ttgir"], job)
    if target.backend == "hip":
        facts = amd_facts(compiled.asm["amdgcn"], hot)
    else:
        facts = cubin_facts(compiled.asm["cubin"])
        facts["hot_widths"] = sorted(set(ptx_hot_widths(compiled.asm["ptx"], job)))
    facts["n_hot"] = len(hot)
    shared = compiled.metadata.shared
    occupancy = _occupancy(target_name, facts["registers"], shared, row["num_warps"])
    return row | facts | {"shared": shared, "warps_per_unit": occupancy}


def complaints(row: dict[str, Any], job: Job) -> list[str]:
    """What is wrong with a row; nothing, it is hoped."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["spills"]:
        found.append(f"spills {row['spills']}")
    if row["shared"] > SHARED_LIMIT[row["target"]]:
        found.append(f"shared memory {row['shared']} above {SHARED_LIMIT[row['target']]}")
    if can_be_wide(job) and row["n_hot"] and not row["hot_widths"]:
        found.append("hot loads not found in the binary")
    if can_be_wide(job) and any(width < 128 for width in row["hot_widths"]):
        found.append(f"hot loads of {row['hot_widths']} bits")
    return found


def can_be_wide(job: Job) -> bool:
    """Whether rows start at multiples of 16 bytes and are as long as a tile of 16 bytes a thread (the candidates that
    chunks of latents leave for the last select are not)."""
    sizes = {name for name, kind in job.signature if kind in ("i32", "i64")}
    sizes &= {"n_out", "n_in", "L", "width", "n_columns"}
    case = next(case for case in CASES if f", {case.name}, " in job.where)
    widths = (*case.segments, case.input_width, case.n_latents // (case.k if "groupmax" in job.where else 1))
    return sizes <= set(job.aligned) and min(widths) >= 512 and dict(job.constants).get("BLOCK", 512) >= 512


def _key(job: Job, target: str) -> str:
    """What a row was made from: the configuration, the target, and the source of the kernel and all that it calls."""
    source = getattr(sys.modules[job.module], job.kernel).cache_key
    return hashlib.sha256(repr((job[:-1], target, source, triton.__version__)).encode()).hexdigest()[:16]


def finished_rows(work: list[tuple[Job, str]], partial: Path) -> list[dict[str, Any]]:
    """The rows of `work` that are in the file `partial`."""
    stored = {row.pop("key"): row for row in map(json.loads, partial.read_text().splitlines())}
    rows = []
    for job, target in work:
        if row := stored.get(_key(job, target)):
            judged = {"where": job.where, "aligned_rows": can_be_wide(job), "complaints": complaints(row, job)}
            rows.append(row | judged)
    return rows


def compile_all(work: list[tuple[Job, str]], n_processes: int, partial: Path, seconds: float) -> None:
    """Compile what the file `partial` lacks and add it there, until `seconds` are over."""
    start = time.monotonic()
    partial.touch()
    done = {json.loads(line)["key"] for line in partial.read_text().splitlines()}
    missing = [one for one in work if _key(*one) not in done]
    at_a_time = 4 * n_processes
    with ProcessPoolExecutor(n_processes) as pool, partial.open("a") as file:
        for first in range(0, len(missing), at_a_time):
            if time.monotonic() - start > seconds:
                return
            batch = missing[first : first + at_a_time]
            for one, row in zip(batch, pool.map(compile_job, *zip(*batch, strict=True)), strict=True):
                file.write(json.dumps(row | {"key": _key(*one)}) + "\n")
                file.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--cases", nargs="*", default=None, choices=[case.name for case in CASES])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--kernels", nargs="*", default=None, help="names of kernels; default: all")
    parser.add_argument("--one-per-kernel", action="store_true", help="a quick look: one configuration of each kernel")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument(
        "--join", type=Path, default=None, help="a stored compile_matrix.json, of which other rows are kept"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop then; the same command goes on")
    arguments = parser.parse_args()
    jobs = jobs_of(arguments.cases)
    if arguments.kernels is not None:
        jobs = [job for job in jobs if job.kernel in arguments.kernels]
    if arguments.one_per_kernel:
        jobs = list({job.kernel: job for job in jobs}.values())
    work = [(job, target) for job in jobs for target in arguments.targets if can_choose(job, target)]
    print(f"{len(jobs)} kernels at their configurations, {len(work)} compilations", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    partial = arguments.out / "compile_matrix.partial.jsonl"
    compile_all(work, arguments.jobs, partial, arguments.seconds)
    rows = finished_rows(work, partial)
    if len(rows) < len(work):
        print(f"{len(rows)} of {len(work)} compilations done: the same command goes on")
        return 1
    rows = [{**row, "triton": triton.__version__} for row in rows]
    every_case = arguments.cases is None and not arguments.one_per_kernel
    rows = joined(rows, json.loads(arguments.join.read_text()) if arguments.join else [], every_case)
    write(rows, arguments.out)
    partial.unlink()
    bad = [row for row in rows if row["complaints"]]
    for row in bad:
        print(row["kernel"], row["target"], row["where"], row["constants"], row["complaints"], sep=" · ")
    print(f"{len(rows) - len(bad)} of {len(rows)} without complaint")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
