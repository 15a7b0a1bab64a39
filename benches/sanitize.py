"""Every op, at small odd sizes and in every dtype, under NVIDIA's compute-sanitizer: memory errors, races, reads of what nobody
wrote, wrong barriers.

    python benches/sanitize.py [--tools memcheck racecheck initcheck synccheck]

Each tool runs `gpu.py --only ops --quick`, some hundred times slower than without it. Exits with an error where a tool finds one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
GPU = Path(__file__).with_name("gpu.py")


def command(tool: str, sanitizer: str, out: str) -> list[str]:
    checked = [sys.executable, str(GPU), "--only", "ops", "--quick", "--out", out]
    return [sanitizer, "--tool", tool, "--target-processes", "all", "--error-exitcode", "99", *checked]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    tools = parser.parse_args().tools
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH: it comes with the CUDA toolkit")
        return 1
    # Each tensor an allocation of its own, so that an access beyond it is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for tool in tools:
        with tempfile.TemporaryDirectory() as out:
            print(f"== {tool}", flush=True)
            if subprocess.run(command(tool, sanitizer, out), env=environment).returncode:
                failed.append(tool)
    print(f"found something: {', '.join(failed)}" if failed else f"{', '.join(tools)}: nothing found")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
