"""What each process holds while 1, 2 and 4 of them train one SAE: L latents (a TopK of 32, ReLU or JumpReLU), width D, Adam,
batches of B tokens.

    python benches/ranks_memory.py [--activation topk|relu|jumprelu] [--n-latents 32768] [--width 512] [--tokens 256]

By tensors: weights, gradients and Adam's moments behind three steps; and what a forward pass keeps for its backward pass. By the
system: resident memory then, and at its peak, over that before the model was made; and how much saving the model took besides,
and filling it from the saved one, as a run that goes on does; of the process that took most. On CPUs, through gloo.

Axes: B tokens · D width · L latents.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from data_common import report
from torch.autograd.graph import saved_tensors_hooks


def status(field: str) -> int:
    """Bytes, from Linux's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def rise(work: Callable[[], object]) -> int:
    """How far resident memory rose above what it was before."""
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return status("VmHWM") - before


def of_one(activation: str, n_latents: int, width: int, tokens: int, into: Path) -> dict[str, int]:
    from crosscode.models import AnthropicTransposeInit, SAEOrTranscoder
    from crosscode.models.activations.base import ACTIVATIONS
    from crosscode.models.checkpoint import read_weights_
    from crosscode.parallel import joined
    from crosscode.parallel.training import shard_

    torch.set_num_threads(1)
    group, before = joined(), status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    config = {"type": activation} | ({"k": 32} if activation == "topk" else {})
    function = ACTIVATIONS.build(config, n_latents=n_latents)
    model = SAEOrTranscoder(width, width, n_latents, function, backend="torch")
    model.init_weights(AnthropicTransposeInit(), 0)
    if group is not None:
        shard_(model, group)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x_BD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        kept: dict[int, int] = {}  # each storage once

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model.forward_train(x_BD).recon_loss(x_BD).loss
        loss.backward()
        optimizer.step()
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    held = [*model.parameters(), *(param.grad for param in model.parameters() if param.grad is not None)]
    held += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    resident, peak = status("VmRSS"), status("VmHWM")
    with tempfile.TemporaryDirectory() as folder:
        saved = into / "model"  # that of the first process, which is whole
        saving = rise(lambda: model.save(saved if group is None or group.is_first else Path(folder) / "model"))
        if group is not None:
            group.barrier()
        loading = rise(lambda: read_weights_(model, saved))
    return {
        "saving": saving,
        "loading": loading,
        "tensors": sum(tensor.nbytes for tensor in held),
        "kept": sum(n for at, n in kept.items() if at not in weights),
        "resident": resident - before,
        "peak": peak - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"n_latents": 32_768, "width": 512, "tokens": 256}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--activation", choices=("topk", "relu", "jumprelu"), default="topk")
    parser.add_argument("--into", type=Path)
    given = vars(parser.parse_args())
    if into := given.pop("into"):
        (into / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(of_one(**given, into=into)))
        return
    rows = []
    for n_ranks in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n_ranks), __file__]
            words += [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
            subprocess.run([*words, "--into", folder], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            found = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
        largest = {name: max(one[name] for one in found) for name in found[0]}
        rows.append({"ranks": n_ranks, **{f"{name}_mib": round(value / 2**20, 1) for name, value in largest.items()}})
    report("ranks_memory", rows)


if __name__ == "__main__":
    main()
