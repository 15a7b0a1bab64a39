"""A file much larger than memory may be: it is read ahead, and never is as a whole in memory.

Sparse files: they have their full length, and hardly a byte on the disk.
"""

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, sys
import torch
# Not `ru_maxrss`: over a fork and an exec it keeps that of the process which started this one.
status_gb = lambda name: int(next(line for line in open("/proc/self/status") if name in line).split()[1]) * 1024 / 1e9
torch_gb = status_gb("VmRSS")
import crosscode
path, run_dir, width, n_latents = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(2)
section = {"type": "sae", "n_latents": n_latents, "activation": {"type": "topk", "k": 8}}
run = crosscode.train(
    path, section, run_dir=run_dir, n_tokens=200 * 256, batch_size=256, backend="torch", device="cpu", progress=False,
    data={"scale": False, "shuffle_buffer_size": 16384}, evaluation={"n_tokens": 4096},
)
n_parameters = sum(one.numel() for one in run.model.parameters())
figures = {"peak_gb": status_gb("VmHWM"), "parameters_gb": 4 * n_parameters / 1e9, "torch_gb": torch_gb}
print(json.dumps({**figures, "step": run.summary["step"]}))
"""


def sparse_npy(path, gb, width):
    import numpy as np

    n_rows = int(gb * 1e9) // (4 * width)
    np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n_rows, width))
    assert path.stat().st_blocks * 512 < 1e6 < path.stat().st_size
    return path


def sparse_safetensors(path, gb, width):
    n_rows = int(gb * 1e9) // (4 * width)
    size = n_rows * width * 4
    header = json.dumps({"acts": {"dtype": "F32", "shape": [n_rows, width], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with open(path, "r+b") as file:
        file.truncate(8 + len(header) + size)
    assert path.stat().st_blocks * 512 < 1e6 < path.stat().st_size
    return path


MAKERS = {"npy": sparse_npy, "safetensors": sparse_safetensors}


def measured(folder, gb, width, n_latents, suffix="npy"):
    path = MAKERS[suffix](folder / f"acts.{suffix}", gb, width)
    command = [sys.executable, "-c", MEASURE, str(path), str(folder / "run"), str(width), str(n_latents)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found, width):
    """Weights, gradients, two moments, the buffer, and 1 GB for the rest, libraries included (a build of torch for CUDA
    brings more than 0.3 GB of its own)."""
    assert found["step"] == 200
    found["peak_gb"] -= max(found["torch_gb"] - 0.3, 0)
    assert found["peak_gb"] < 4 * found["parameters_gb"] + 16384 * 4 * width / 1e9 + 1


def test_a_file_of_some_gb_takes_no_more_than_its_buffer(tmp_path):
    check(measured(tmp_path, gb=3, width=256, n_latents=512), 256)


@pytest.mark.soak
@pytest.mark.parametrize("suffix", MAKERS)
def test_a_file_of_100_gb_takes_no_more_than_its_buffer(suffix, tmp_path):
    found = measured(tmp_path, gb=100, width=1024, n_latents=4096, suffix=suffix)
    print(suffix, found)
    check(found, 1024)
