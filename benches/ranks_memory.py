"""What each process holds while 1, 2 and 4 of them train one SAE: a TopK of 32 of L latents, width D, Adam, batches of B tokens.

    python benches/ranks_memory.py [--n-latents 32768] [--width 512] [--tokens 256]

By tensors: weights, gradients and Adam's moments behind three steps. By the system: resident memory then, and at its peak, over
that before the model was made; of the process that took most. On CPUs, through gloo.

Axes: B tokens · D width · L latents.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from data_common import report


def status(field: str) -> int:
    """Bytes, from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def of_one(n_latents: int, width: int, tokens: int) -> dict[str, int]:
    from crosscode.models import AnthropicTransposeInit, SAEOrTranscoder, TopkActivation
    from crosscode.parallel import joined
    from crosscode.parallel.training import shard_

    torch.set_num_threads(1)
    group, before = joined(), status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model = SAEOrTranscoder(width, width, n_latents, TopkActivation(32, n_latents), backend="torch")
    model.init_weights(AnthropicTransposeInit(), 0)
    if group is not None:
        shard_(model, group)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x_BD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        model.forward_train(x_BD).recon_loss(x_BD).loss.backward()
        optimizer.step()
    held = [*model.parameters(), *(param.grad for param in model.parameters() if param.grad is not None)]
    held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return {
        "tensors": sum(tensor.nbytes for tensor in held),
        "resident": status("VmRSS") - before,
        "peak": status("VmHWM") - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"n_latents": 32_768, "width": 512, "tokens": 256}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--into", type=Path)
    given = vars(parser.parse_args())
    if into := given.pop("into"):
        (into / os.environ.get("RANK", "0")).write_text(json.dumps(of_one(**given)))
        return
    rows = []
    for n_ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n_ranks), __file__]
            words += [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
            subprocess.run([*words, "--into", folder], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            found = [json.loads(file.read_text()) for file in Path(folder).iterdir()]
        largest = {name: max(one[name] for one in found) for name in found[0]}
        rows.append({"ranks": n_ranks, **{f"{name}_mib": round(value / 2**20, 1) for name, value in largest.items()}})
    report("ranks_memory", rows)


if __name__ == "__main__":
    main()
