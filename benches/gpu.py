"""What a GPU's owner can tell us, in one command: is it right here, how fast is it, where does the time go?

    python benches/gpu.py [--out benches/results] [--only SECTION ...] [--quick]     (make gpu)
    python benches/gpu.py --dry-run                        the whole program on CPU tensors, Triton interpreted: does it work?

Writes `gpu-DEVICE.json` and `gpu-DEVICE.md`, made to be attached to an issue. Each section has a process of its own, so that one
that dies leaves the others; what a section had found until then is kept. Exits with an error where a check failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "tests" / "helpers")]
SECTIONS = (
    "machine",
    "ops",
    "optimizer",
    "recipes",
    "graphs",
    "captured training",
    "op times",
    "step times",
    "other libraries",
    "whole run",
)


def section(name: str) -> Callable[..., Iterator[dict[str, Any]]]:
    """Imported in the section's own process: the first one must not touch the device, or the others could not."""
    import gpu_checks
    import gpu_timings

    return {
        "machine": machine, "ops": gpu_checks.ops_against_float64, "optimizer": gpu_checks.fused_adam,
        "recipes": gpu_checks.recipes_without_waiting,
        "graphs": gpu_checks.graph_capture, "captured training": gpu_checks.captured_training,
        "op times": gpu_timings.op_times, "step times": gpu_timings.step_times,
        "other libraries": gpu_timings.other_libraries, "whole run": gpu_timings.whole_run,
    }[name]  # fmt: skip


def machine(gpu: Any, quick: bool) -> Iterator[dict[str, Any]]:
    import torch
    from crosscode_kernels import available_backends
    from train_step import provenance

    from crosscode.trainers.summary import PACKAGES, versions

    yield {"fact": "device", **gpu.facts()}
    yield {"fact": "versions", **versions((*PACKAGES, "triton"))}
    yield {"fact": "machine", **provenance(), "cores": os.cpu_count(), "quick": quick}
    for status in available_backends(gpu.device):
        yield {"fact": f"backend {status.name}", "available": status.available, "reason": status.reason}
    yield {"fact": "products", "tf32": torch.backends.cuda.matmul.allow_tf32}


def run_section(name: str, dry: bool, quick: bool, out: Path) -> None:
    """The body of a section's process: a line of JSON for each row."""
    from gpu_device import DryRun, Gpu

    gpu = DryRun() if dry else Gpu()
    with out.open("w") as file:
        if dry:
            from triton_interpreter import repaired_interpreter

            context = repaired_interpreter()
        else:
            from contextlib import nullcontext

            context = nullcontext()
        with context:
            for row in section(name)(gpu, quick):
                file.write(json.dumps(row) + "\n")
                file.flush()


def collect(names: list[str], dry: bool, quick: bool) -> dict[str, Any]:
    """All sections, one after the other."""
    found: dict[str, Any] = {}
    if dry:  # there is no device to share: the processes need not begin from nothing
        import gpu_timings  # noqa: F401
    context = multiprocessing.get_context("fork" if dry else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            out, started = Path(folder) / "rows.jsonl", time.monotonic()
            out.write_text("")
            process = context.Process(target=run_section, args=(name, dry, quick, out))
            process.start()
            process.join()
            rows = [json.loads(line) for line in out.read_text().splitlines()]
            if process.exitcode:
                rows.append({"ok": False, "error": f"the section ended with exit code {process.exitcode}"})
            found[name] = rows
            print(f"{name}: {len(rows)} rows, {time.monotonic() - started:.0f} s", flush=True)
    return found


def failures(found: dict[str, Any]) -> list[str]:
    """Rows that say that something is wrong."""
    return [f"{name}: {json.dumps(row)}" for name, rows in found.items() for row in rows if row.get("ok") is False]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--dry-run", action="store_true", help="on CPU tensors, at toy sizes")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}
    names = [name for name in SECTIONS if name in arguments.only or name == "machine"]
    found = collect(names, arguments.dry_run, arguments.quick or arguments.dry_run)
    device = next((row["name"] for row in found["machine"] if row.get("fact") == "device"), "")
    if not device:
        print("no CUDA or ROCm device was found; `--dry-run` tries the program without one")
        return 1
    from gpu_report import report

    stem = arguments.out / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-')}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    stem.with_suffix(".md").write_text(report(found))
    print(f"{stem}.json and .md: please attach both to an issue")
    bad = failures(found)
    print("\n".join(bad[:20]) or "every check passed")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
