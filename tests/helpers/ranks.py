"""Several gloo processes on one machine: `spawn` runs this file in each; `main` trains tiny recipes and keeps what they did."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

N_STEPS = 20
RAGGED = 16
"""Step behind which a batch is smaller."""
LAST_SAVED = 18
"""Step of the last checkpoint: tiny recipes, which end after 3 steps, save one every 3."""


def spawn(n_ranks: int, *arguments: str, words: list[str] | None = None) -> list[subprocess.Popen]:
    """A process for each rank; `words`: another command than this file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": str(n_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    words = words or [sys.executable, __file__, *arguments]
    return [
        subprocess.Popen(
            words, env=os.environ | env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(n_ranks)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], timeout: float = 300) -> list[str]:
    """What each has said, once all have ended well."""
    said = [process.communicate(timeout=timeout)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(said), "\n".join(said)
    return said


def train_on(n_ranks: int, folder: Path, dtype: str, recipes: Sequence[str], before: Path | None = None) -> list[Any]:
    """What rank 0 kept of each recipe, and the losses that the others saw. `before`: the folder of such runs, of which the last
    checkpoint but one goes on."""
    import torch

    own = folder / f"{n_ranks}-{len(list(folder.iterdir()))}"
    own.mkdir()
    for run in before.glob("run-*") if before else ():
        shutil.copytree(run, own / run.name)
        shutil.rmtree(own / run.name / "checkpoints" / f"step_{LAST_SAVED}")
    finish(spawn(n_ranks, str(own), dtype, *recipes), timeout=3000)
    return [torch.load(own / name) for name in ("kept.pt", *(f"losses{rank}.pt" for rank in range(1, n_ranks)))]


def assert_as_one(one: dict[str, Any], several: dict[str, Any], tolerance: float) -> None:
    """The same latents at the same weights; losses, gradient norms and the whole state within rounding."""
    import torch

    assert torch.equal(one["active"], several["active"])
    torch.testing.assert_close(several["losses"], one["losses"], rtol=tolerance, atol=tolerance)
    for name, weight in one["model"].items():
        assert several["model"][name].shape == weight.shape
    for index, state in one["optimizer"].items():
        for key, value in state.items():
            assert torch.as_tensor(several["optimizer"][index][key]).shape == torch.as_tensor(value).shape


def spelled_out(spelled: str) -> tuple[str, str]:
    """Recipe and backend of `NAME@BACKEND@N_LATENTS`, behind which changes may stand as JSON; tiny recipes are made so."""
    import tiny_recipes

    recipe, backend, n_latents, changes = f"{spelled}@{{}}".split("@")[:4]
    tiny_recipes.N_LATENTS, tiny_recipes.CHANGES = int(n_latents), json.loads(changes)
    return recipe, backend


def planned_bytes(spelled: str, n_ranks: int, dtype: str) -> list[int]:
    """What `crosscode plan` says that a rank sends in a step, for the figures of a logged one, and for a held-out batch."""
    from unittest.mock import patch

    import tiny_recipes
    import torch

    from crosscode.build.plan import counted_step
    from crosscode.parallel.group import PaperGroup

    with patch.multiple(tiny_recipes, N_LATENTS=tiny_recipes.N_LATENTS, CHANGES={}):  # put back as they were
        recipe, backend = spelled_out(spelled)
        config, group = (
            tiny_recipes.check_config(tiny_recipes.tiny(recipe, "nowhere", backend, "cpu")),
            PaperGroup(n_ranks),
        )
        counted = counted_step(config, tiny_recipes.WIDTH, group, getattr(torch, dtype))
        return [counted.step, counted.figures, counted.evaluation]


def check_ties(group: Any, L: int) -> None:
    """Integers, so that nearly all values are tied: what is selected over ranks is what one process selects."""
    import torch
    from crosscode_kernels import OpSet
    from crosscode_kernels.backend import Backend

    from crosscode.parallel.opset import ShardedOps

    generator = torch.Generator().manual_seed(0)
    x_BI, W_LI = (torch.randint(-1, 2, (n, 3), generator=generator) for n in (5, L))
    scale_L, dead_L = torch.randint(1, 3, (L,), generator=generator), torch.rand(L, generator=generator) < 0.3
    dead_L[: -(-L // group.size)] = False  # rank 0 has none
    own = slice(*group.bounds(L))
    for name in ("torch", "reference"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            one, ours = OpSet(Backend(name)), ShardedOps(group, L, Backend(name), torch.device("cpu"), dtype)
            x, W, b = x_BI.to(dtype), W_LI.to(dtype), torch.ones(L, dtype=dtype)
            for op, *rest in (
                ("encode_topk", 1), ("encode_topk", min(6, L)), ("encode_topk", L), ("encode_batch_topk", min(2, L)),
                ("encode_batch_topk", min(7, L), scale_L.to(dtype)), ("encode_batch_topk", L),
                ("encode_threshold", torch.tensor(2.0)),
                ("aux_topk", dead_L, min(3, L)), ("aux_topk", dead_L, L), ("aux_topk", dead_L & False, min(3, L)),
                ("encode_relu",),
            ):  # fmt: skip
                expected, found = getattr(one, op)(x, W, b, *rest), getattr(ours, op)(x, W[own], b, *rest)
                assert torch.equal(expected.to_dense(), found.to_dense()), (op, rest, name, dtype)


def check_spread(group: Any, L: int) -> None:
    """ReLU, JumpReLU and what is summed over them have the values and gradients of one process in every form, also where the
    form differs between ranks, one has no active latents, and there is one token or none."""
    import torch
    from crosscode_kernels import OpSet
    from crosscode_kernels.backend import Backend

    from crosscode.parallel.opset import ShardedOps

    generator, d_in, d_out = torch.Generator().manual_seed(0), 5, 6
    whole = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((L, d_in), (L, d_out), (L,))]
    whole[2][: -(-L // group.size)] -= 100  # rank 0 has none
    whole.append(torch.linspace(-1.5, 0.5, L, dtype=torch.float64))
    own, vectors = slice(*group.bounds(L)), (torch.rand(L, generator=generator, dtype=torch.float64) for _ in range(2))
    norms, lambdas = vectors

    def run(ops, x_BI, encode, rows):
        W_enc, W_dec, b, t = leaves = [
            (of[rows] if n < 2 else of).clone().requires_grad_() for n, of in enumerate(whole)
        ]
        if encode == "encode_relu":
            latents = ops.encode_relu(x_BI, W_enc, b)
        else:
            latents = ops.encode_jumprelu(x_BI, W_enc, b, t, 0.7, "gdm", input_gradient=encode == "window")
        target_BO = torch.ones(len(x_BI), d_out, dtype=torch.float64)
        total = ops.decode_recon_loss(latents, W_dec, None, target_BO, [d_out]).loss if len(x_BI) else 0
        total = total + ops.weighted_l1(latents, norms, lambdas) + ops.weighted_tanh(latents, norms, lambdas, 3.0)
        if encode != "encode_relu":
            total = total + ops.pre_act_penalty(latents, t, norms, lambdas)
            l0 = ops.step_l0(latents, t, 0.7)
            total = total + l0.l0_B.square().sum() + (l0.firing_L * lambdas).sum()
        total.backward()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return [total.detach(), latents.to_dense().detach(), latents.l0_B(), latents.firing_counts_L(), *grads]

    for n_tokens in (7, 1, 0):
        x_BI = torch.randn(n_tokens, d_in, generator=generator, dtype=torch.float64)
        for encode in ("encode_relu", "encode_jumprelu", "window"):
            for below in (0.0, 0.4, 1.0) if n_tokens else (1.0,):
                backend = Backend("torch", sparse_below=below)
                ours = ShardedOps(group, L, backend, torch.device("cpu"), torch.float64)
                expected, found = (
                    run(ops, x_BI, encode, rows) for ops, rows in ((OpSet(backend), slice(None)), (ours, own))
                )
                for n, (one, several) in enumerate(zip(expected, found, strict=True)):
                    torch.testing.assert_close(several, one[own] if n in (4, 5) else one, msg=f"{encode} {below} {n}")


def check_traffic(group: Any, L: int) -> None:
    """Bytes that a rank sends in a step, counted, are those of docs/scale.md."""
    import torch
    from crosscode_kernels.backend import Backend

    from crosscode.parallel.opset import ShardedOps

    n, B, d_in, d_out, k = group.size, 6, 3, 8, min(L, 5)
    ops, own = ShardedOps(group, L, Backend("torch"), torch.device("cpu"), torch.float32), slice(*group.bounds(L))
    # Positive numbers: all latents fire, so that a ReLU keeps them dense, of however few latents.
    x, W, D, b = torch.rand(B, d_in), torch.rand(L, d_in)[own], torch.randn(L, d_out)[own], torch.zeros(L)
    for weight in (W, D, b):
        weight.requires_grad_()
    rows = -(-L // n)
    ring = lambda n_bytes: 2 * (n - 1) * n_bytes // n  # noqa: E731
    of_batch = (
        3 * ring(4 << 16) + (n - 1) * 8 + ring(8 * k * B) + ring(4 * k * B)
    )  # two digits of a value, one of a place
    share = -(-B // n)
    of_tokens = (n - 1) * share * 8 * (min(k, rows) + k)
    of_each = {"encode_topk": of_tokens, "encode_batch_topk": of_batch, "encode_relu": 0}
    for encode, selected in of_each.items():
        before = group.bytes_sent
        latents = getattr(ops, encode)(x, W, b, *(() if encode == "encode_relu" else (k,)))
        ops.decode_recon_loss(latents, D, None, torch.zeros(B, d_out), [d_out]).loss.backward()
        assert group.bytes_sent - before == selected + ring(4 * B * d_out) + ring(4 * L), encode
    before, latents = group.bytes_sent, ops.encode_relu(x, W, b)
    assert latents.value.shape == (B, own.stop - own.start)  # nothing of size B x L is held
    ops.weighted_tanh(latents, torch.ones(L), torch.ones(L), 4.0)
    latents.firing_counts_L()
    assert group.bytes_sent - before == ring(4) + (n - 1) * rows * 4
    before = group.bytes_sent
    ops.decoder_norms(D, [4, 4], "sum")
    assert group.bytes_sent - before == (n - 1) * rows * 4 * 3


def check_harvest() -> None:
    """Each rank runs its share of the sequences, and all have those of one process: also where there are fewer than ranks."""
    from types import SimpleNamespace

    import torch

    from crosscode.errors import InputError
    from crosscode.parallel import joined
    from crosscode.parallel.harvest import alone, over_ranks
    from crosscode.parallel.teams import Teams

    asked: list[int] = []

    class One:
        def __init__(self):
            self.models, self.reads_M = [SimpleNamespace(max_sequence_length=None, vocab_size=9)], [0]

        def harvest(self, tokens_HS, segments_HS, others=()):
            asked.append(len(tokens_HS))
            return (tokens_HS + segments_HS)[..., None, None, None].to(torch.bfloat16).expand(-1, -1, 2, 1, 3)

    one: Any = One()
    group = joined()
    harvester = over_ranks(None if group is None else Teams(group, 2), one)
    if group is None:
        assert harvester is one
        return
    assert alone(harvester) is one
    for H in (1, 5, 8):
        tokens_HS = torch.arange(H * 4).view(H, 4) % 9
        assert torch.equal(harvester.harvest(tokens_HS, tokens_HS), one.harvest(tokens_HS, tokens_HS))
        assert asked[-2] in (H // group.size, -(-H // group.size))
    try:
        harvester.harvest(tokens_HS * 0 + group.rank, tokens_HS)
    except InputError as error:
        assert "different texts" in str(error)
    else:
        raise AssertionError("different texts were harvested")


def check_saving(folder: Path) -> None:
    """Each rank writes its rows into one file, or sends them where it does not see the file; the file is what was to be saved."""
    from unittest.mock import patch

    import torch
    from safetensors.torch import load_file

    from crosscode.parallel import group as groups
    from crosscode.parallel.rows import SpreadRows
    from crosscode.weight_files import save_tensors

    group = groups.joined()
    if group is None:
        return
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(7, 2, 3, generator=generator), "b": torch.randn(1, 5, generator=generator, dtype=torch.float64),
        "c": torch.randn(8, generator=generator).bfloat16(), "d": torch.randint(0, 9, (9,), generator=generator),
        "e": torch.randn(5, 0), "f": torch.tensor(True), "g": torch.randn(3, generator=generator),
    }  # fmt: skip
    spread = {
        name: SpreadRows(group, tensor[slice(*group.bounds(len(tensor)))], len(tensor)) if name < "f" else tensor
        for name, tensor in tensors.items()
    }
    if not group.is_first:  # as the state of the data, which is on rank 0 alone
        del spread["f"], spread["g"]
    own = folder / f"of-rank-{group.rank}"
    own.mkdir()
    hidden = (
        patch.object(Path, "is_file", lambda self: False)
        if group.rank == 1
        else patch.object(Path, "x", 0, create=True)
    )
    with patch.object(groups, "BYTES_AT_ONCE", 40):
        save_tensors(spread, own / "each")
        with hidden:
            save_tensors(spread, own / "sent")
        whole_c = spread["c"].whole()
    for name in ("each", "sent"):
        if group.is_first:
            found = load_file(own / name)
            assert found.keys() == tensors.keys() and torch.equal(whole_c, tensors["c"])
            assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items()), name
        else:
            assert (own / name).stat().st_size == 0


def whole(state: Any) -> Any:
    """With all rows on rank 0."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    return state.whole() if hasattr(state, "whole") else state


def main(folder: str, dtype_name: str, *recipes: str) -> None:
    """Each of `recipes` is `spelled_out`."""
    import tiny_recipes
    import torch

    from crosscode.evaluation.heldout import measure_reconstruction
    from crosscode.parallel import joined

    torch.set_num_threads(1)
    group = joined()
    for n_latents in () if group is None else (4 * group.size + 3, group.size - 1):  # no multiple; less than one each
        check_ties(group, n_latents)
        check_spread(group, n_latents)
        check_traffic(group, n_latents)
    check_saving(Path(folder))
    check_harvest()
    kept, dtype = {}, getattr(torch, dtype_name)
    for spelled in recipes:
        recipe, backend = spelled_out(spelled)
        run = Path(folder) / f"run-{len(kept)}"
        trainer = tiny_recipes.make_trainer(recipe, run, backend, "cpu", dtype, resume=run.exists())
        batches = iter(trainer.data)
        losses: list[float] = []
        note = trainer.guard.before_optimizer

        def noted(step, parts, grad_norm, *rest, note=note, losses=losses):
            losses.extend([*(float(value) for value in parts.values()), float(grad_norm)])
            note(step, parts, grad_norm, *rest)

        trainer.guard.before_optimizer = noted
        trainer.start()
        first_BXiDi = trainer.split.activations(trainer.data.acts_SBMPD[0])[0]
        with torch.no_grad():
            latents_BL = trainer.model.encode(first_BXiDi)
        while trainer.step < N_STEPS - 1:  # one batch is ragged: no number of ranks divides it
            trainer.train_step(next(batches)[: 5 if trainer.step == RAGGED else None])
        n_bytes, model = [], trainer.model

        def count(call, *arguments, n_bytes=n_bytes, group=group):
            before = 0 if group is None else group.bytes_sent
            call(*arguments)
            n_bytes.append(0 if group is None else group.bytes_sent - before)

        count(trainer.train_step, acts_BMPD := next(batches))
        kept[spelled] = {
            "bytes": n_bytes,
            "losses": torch.tensor(losses, dtype=torch.float64),
            "active": latents_BL > 0,
            "latents": latents_BL,
            "counts": trainer.firing.n_recent_L.clone(),
            "model": whole(trainer.model.state_dict()),
            "optimizer": whole(trainer.optimizer.state_dict()["state"]),
        }
        trainer.config, trainer._log_training = (
            trainer.config.model_copy(update={"log_every": 1, "checkpoint_every": 1 << 30}),
            lambda *_: None,
        )
        count(trainer.train_step, acts_BMPD)
        n_bytes[1] -= n_bytes[0]
        names, scaling_MP = [str(n) for n in range(len(model.segments))], trainer.data.scaling_MP
        count(measure_reconstruction, model, [acts_BMPD], trainer.split, names, scaling_MP)
    if os.environ.get("RANK", "0") == "0":
        torch.save(kept, Path(folder) / "kept.pt")
    else:
        torch.save({name: of["losses"] for name, of in kept.items()}, Path(folder) / f"losses{os.environ['RANK']}.pt")


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if path != os.getcwd()]
    main(*sys.argv[1:])
