"""Full training steps on the CPU, fast backend against reference, in one run.

    python benches/train_step.py [--cases topk jumprelu_trained ...] [--repeats 9] [--threads 2] [--out FILE]

A step is forward, loss, backward, gradient clip and optimizer. The reference runs with stock `torch.optim.Adam`, the fast backend
with `fused=True` or, for beta1 = 0, row-sparse Adam. Each variant has its own process; they take turns within each repeat, so
that a noisy machine hits all of them. Reported are medians, and medians of the ratios within a repeat, of wall and of CPU
time. `encode` is the wall time of encoder product and selection, `rest` all else; `rows` counts the latents that are active
in the batch. Peak memory counts everything that is allocated during a step except gradients, buffers that the fast backend
keeps from step to step among it; "saved" counts what autograd keeps for backward, parameters excluded. `--out` renews
the rows of the cases that ran and keeps the others.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from crosscode_kernels import Backend, OpSet, host_buffers, resolve_backend
from crosscode_kernels.row_sparse_adam import RowSparseAdam, clip_grad_norm_
from crosscode_kernels.sparse import Latents
from torch import Tensor

from crosscode.objectives.base import batch_variance


@dataclass(frozen=True)
class Case:
    """One training step. `l0` is the aimed number of active latents a token where the activation does not fix it; `k_aux`: with
    AuxK, and `dead` the share of latents that are dead."""

    scheme: str
    B: int = 1024
    I: int = 1536  # noqa: E741
    O: int = 1536  # noqa: E741
    L: int = 16384
    k: int = 32
    l0: float = 0.0
    segments: int = 2
    beta1: float = 0.9
    k_aux: int = 0
    dead: float = 0.0


CASES = {
    "topk": Case("topk"),
    "topk_auxk": Case("topk", k_aux=768),
    "topk_auxk_dead": Case("topk", k_aux=768, dead=0.05),
    "batch_topk": Case("batch_topk"),
    "groupmax": Case("groupmax"),
    "cross_layer_topk": Case("topk", I=512, O=6 * 512, L=8192, segments=6),
    "jumprelu_trained": Case("jumprelu", l0=60),
    "jumprelu_init": Case("jumprelu", l0=0.6 * 16384),
    "l1_trained": Case("l1", l0=60),
    "l1_init": Case("l1", l0=0.5 * 16384),
    **{f"topk_L{n}": Case("topk", B=256, L=n, beta1=0.0) for n in (4096, 8192, 16384, 32768, 65536)},
}
HERE = Path(__file__).parent
WARM_UP = 2


@dataclass
class Step:
    """A trainer without a trainer: parameters, optimizer and one step on a batch."""

    case: Case
    ops: OpSet
    params: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    clock: Callable[[], float] = time.perf_counter
    seconds: dict[str, float] = field(default_factory=dict)
    """Of the last step, by its parts."""
    _last: float = 0.0

    def _mark(self, part: str) -> None:
        now = self.clock()
        self.seconds[part], self._last = self.seconds.get(part, 0.0) + now - self._last, now

    def forward(self, x_BI: Tensor, target_BO: Tensor) -> Tensor:
        case, ops, p = self.case, self.ops, self.params
        widths = [case.O // case.segments] * case.segments
        latents, penalty = self.encode(x_BI), 0.0
        if case.scheme in ("l1", "jumprelu"):
            n_L = ops.decoder_norms(p["W_dec_LO"], widths, "sum").n_L
            ones_L = torch.ones_like(n_L)
        if case.scheme == "l1":
            penalty = ops.weighted_l1(latents, n_L, 2.0 * ones_L)
        elif case.scheme == "jumprelu":
            penalty = ops.weighted_tanh(latents, n_L, 10.0 * ones_L, 4.0)
            penalty = penalty + ops.pre_act_penalty(latents, p["t_L"], n_L, 3e-6 * ones_L)
        recon = ops.decode_recon_loss(latents, p["W_dec_LO"], p["b_dec_O"], target_BO, widths)
        if case.k_aux:
            self._mark("decode and loss")
            penalty = penalty + self.auxk(x_BI, -recon.residual_BO, widths)
            self._mark("AuxK forward")
        return recon.loss + penalty

    def auxk(self, x_BI: Tensor, error_BO: Tensor, widths: list[int]) -> Tensor:
        """AuxK of Gao et al. 2024, as the trainer has it when it does not know that no latent is dead."""
        case, ops, p = self.case, self.ops, self.params
        dead_L = torch.arange(case.L, device=x_BI.device) < case.dead * case.L
        encoder = (x_BI, p["W_enc_LI"], p["b_enc_L"])
        predicted_BO = ops.dead_decode(*encoder, dead_L, case.k_aux, p["W_dec_LO"], sparse_grad=True)
        variance = batch_variance(error_BO)
        aux = ops.recon_loss(predicted_BO, error_BO, widths).loss
        return aux / variance * (dead_L.sum().clamp(max=case.k_aux) / case.k_aux) / 32

    def encode(self, x_BI: Tensor) -> Latents:
        case, ops, p = self.case, self.ops, self.params
        encoder = (x_BI, p["W_enc_LI"], p["b_enc_L"])
        self.seconds, self._last = {}, self.clock()
        if case.scheme == "l1":
            latents = ops.encode_relu(*encoder)
        elif case.scheme == "jumprelu":
            latents = ops.encode_jumprelu(*encoder, p["t_L"], 2.0, "anthropic")
        else:
            latents = getattr(ops, f"encode_{case.scheme}")(*encoder, case.k)
        self._mark("encode")
        return latents

    def run(self, x_BI: Tensor, target_BO: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(x_BI, target_BO)
        self._mark("decode and loss")
        loss.backward()
        self._mark("backward")
        clip_grad_norm_(list(self.params.values()), 1.0, self.optimizer)
        self._mark("clip")
        self.optimizer.step()
        self._mark("optimizer")
        return loss.detach()


def make_params(case: Case, x_BI: Tensor) -> dict[str, Tensor]:
    """Random unit decoder directions, encoder their transpose where widths allow; biases that give few latents much of the
    activity, and for dense activations the aimed density."""
    generator = torch.Generator().manual_seed(0)
    W_dec_LO = torch.randn(case.L, case.O, generator=generator)
    W_dec_LO *= 0.1 / W_dec_LO.norm(dim=1, keepdim=True)
    W_enc_LI = torch.randn(case.L, case.I, generator=generator) * case.I**-0.5
    params = {"W_enc_LI": W_enc_LI, "W_dec_LO": W_dec_LO, "b_dec_O": torch.zeros(case.O)}
    popularity_L = 1 / (1 + torch.randperm(case.L, generator=generator).float() / 100)
    params["b_enc_L"] = 0.5 * popularity_L
    if case.l0:
        h_BL = x_BI[:256] @ W_enc_LI.T + params["b_enc_L"]
        edge = 1.1052 if case.scheme == "jumprelu" else 0.0
        cut = h_BL.flatten().topk(max(int(case.l0 * h_BL.shape[0]), 1)).values[-1]
        params["b_enc_L"] += edge - cut
    if case.scheme == "jumprelu":
        params["t_L"] = torch.full((case.L,), 0.1)
    return {name: tensor.requires_grad_() for name, tensor in params.items()}


def make_step(case: Case, variant: str, x_BI: Tensor) -> Step:
    """`reference`, `torch`, or `torch-screened`."""
    params = make_params(case, x_BI)
    betas = (case.beta1, 0.999)
    if variant == "reference":
        return Step(case, resolve_backend("reference", "cpu"), params, torch.optim.Adam(params.values(), 5e-5, betas))
    row_sparse = case.beta1 == 0.0
    options = [option for option, on in (("screened", variant == "torch-screened"), ("rows", row_sparse)) if on]
    ops = OpSet(Backend("torch", tuple(options)))
    if row_sparse:
        return Step(case, ops, params, RowSparseAdam(params.values(), lr=5e-5, beta2=0.999))
    return Step(case, ops, params, torch.optim.Adam(params.values(), 5e-5, betas, fused=True))


def saved_bytes(step: Step, x_BI: Tensor, target_BO: Tensor) -> int:
    """Bytes of unique storages that autograd keeps for backward, parameters excluded."""
    own = {tensor.untyped_storage().data_ptr() for tensor in step.params.values()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.forward(x_BI, target_BO)
    loss.backward()
    return sum(storages.values())


def peak_bytes(step: Step, x_BI: Tensor, target_BO: Tensor) -> int:
    """Largest sum of live allocations made during one step, those that end as gradients excluded."""
    from torch._C._profiler import _EventType

    step.optimizer.zero_grad(set_to_none=True)
    host_buffers.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step.run(x_BI, target_BO)
    grads = set()
    for tensor in step.params.values():
        if tensor.grad is None:
            continue
        parts = [tensor.grad._values(), tensor.grad._indices()] if tensor.grad.is_sparse else [tensor.grad]
        grads |= {part.untyped_storage().data_ptr() for part in parts}
    changes = []
    queue = list(profile.profiler.kineto_results.experimental_event_tree())
    while queue:
        event = queue.pop()
        queue.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    changes.sort(key=lambda change: change[0])
    last_alloc = {ptr: i for i, (_, ptr, size) in enumerate(changes) if size > 0}
    live: dict[int, int] = {}
    now = peak = 0
    for i, (_, ptr, size) in enumerate(changes):
        if size > 0 and not (ptr in grads and last_alloc[ptr] == i):
            live[ptr] = size
            now += size
            peak = max(peak, now)
        elif size < 0:
            now -= live.pop(ptr, 0)
    return peak


def batch(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.B, case.I, generator=generator), torch.randn(case.B, case.O, generator=generator)


def work(pipe: Connection, variant: str, threads: int) -> None:
    """The process of one variant: takes a case, then steps as it is told; answers with seconds: wall, CPU, encode."""
    torch.set_num_threads(threads)
    while (name := pipe.recv()) is not None:
        case = CASES[name]
        x_BI, target_BO = batch(case)
        step = make_step(case, variant, x_BI)
        while pipe.recv():
            wall, cpu = time.perf_counter(), time.process_time()
            step.run(x_BI, target_BO)
            pipe.send((time.perf_counter() - wall, time.process_time() - cpu, step.seconds["encode"]))
        with torch.no_grad():
            rows = int((step.encode(x_BI).firing_counts_L() > 0).sum())
        pipe.send((saved_bytes(step, x_BI, target_BO), peak_bytes(step, x_BI, target_BO), rows))


def measure(name: str, repeats: int, pipes: dict[str, Connection]) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float, float]]] = {variant: [] for variant in pipes}
    for pipe in pipes.values():
        pipe.send(name)
    for repeat in range(repeats + WARM_UP):
        for variant, pipe in pipes.items():
            pipe.send(True)
            seconds = pipe.recv()
            if repeat >= WARM_UP:
                times[variant].append(seconds)
    row: dict[str, Any] = {"case": name, **asdict(CASES[name])}
    for variant, pipe in pipes.items():
        pipe.send(False)
        saved, peak, row["rows"] = pipe.recv()
        wall, cpu, encode = ([seconds[i] for seconds in times[variant]] for i in (0, 1, 2))
        row |= {f"{variant}_ms": 1e3 * statistics.median(wall), f"{variant}_cpu_ms": 1e3 * statistics.median(cpu)}
        row[f"{variant}_encode_ms"] = 1e3 * statistics.median(encode)
        row[f"{variant}_rest_ms"] = 1e3 * statistics.median(w - e for w, e in zip(wall, encode, strict=True))
        row |= {f"{variant}_saved_mb": saved / 2**20, f"{variant}_peak_mb": peak / 2**20}
        if len(wall) > 1:
            first, _, third = statistics.quantiles(wall, n=4)
            row[f"{variant}_quartiles_ms"] = [1e3 * first, 1e3 * third]
        if variant != "reference" and "reference" in times:
            for i, kind in enumerate(("ratio", "cpu_ratio")):
                pairs = zip(times["reference"], times[variant], strict=True)
                row[f"{variant}_{kind}"] = statistics.median(slow[i] / fast[i] for slow, fast in pairs)
    return row


def print_row(row: dict[str, Any], variants: list[str]) -> None:
    for variant in variants:
        ratios = (row.get(f"{variant}_ratio"), row.get(f"{variant}_cpu_ratio"))
        ratio = " ".join("      " if value is None else f"{value:5.2f}x" for value in ratios)
        print(
            f"{row['case']:>18} {variant:>15} {row[f'{variant}_ms']:8.1f} ms ({row[f'{variant}_cpu_ms']:7.0f} CPU) {ratio}"
            f" = encode {row[f'{variant}_encode_ms']:7.1f} + rest {row[f'{variant}_rest_ms']:7.1f}, {row['rows']} rows,"
            f" saved {row[f'{variant}_saved_mb']:7.1f} MiB  peak {row[f'{variant}_peak_mb']:7.1f} MiB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--variants", nargs="+", default=["reference", "torch", "torch-screened"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for variant in arguments.variants:
        pipes[variant], theirs = context.Pipe()
        context.Process(target=work, args=(theirs, variant, arguments.threads), daemon=True).start()
    rows = []
    for name in arguments.cases:
        rows.append(measure(name, arguments.repeats, pipes))
        print_row(rows[-1], arguments.variants)
    for pipe in pipes.values():
        pipe.send(None)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        run = {"threads": arguments.threads, **provenance()}
        kept = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
        found = {row["case"]: row for row in [*kept, *({**row, "run": run} for row in rows)]}
        ordered = [found[name] for name in CASES if name in found]
        arguments.out.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")


def provenance() -> dict[str, str]:
    """Versions, machine and commit of a run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=HERE)
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {len(cpus)} x {cpus[0] if cpus else 'unknown'}",
        "commit": commit.stdout.strip() or "unknown",
    }


if __name__ == "__main__":
    main()
