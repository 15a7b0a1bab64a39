"""`train.optimizer.fused` of every recipe, tiny, through the trainer: the weights of PyTorch's Adam, constraint by constraint.

    TRITON_INTERPRET=1 pytest tests/crosscode/trainers/optimizers/test_adam.py       (`make tests` does so)

Two trainers walk side by side. The plain one is given the gradients of the fused one at the place at which a trainer begins to
change them: constraints, clipping, guard and optimizer are its own. So what differs is rounding, which nothing amplifies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import pytest
import torch
from crosscode_kernels import Backend, copies
from crosscode_kernels.fused_adam import FusedAdam
from crosscode_kernels.opset import find_ops
from crosscode_kernels.segments.deferred import SegmentGrad, computed
from tiny_recipes import BATCH, make_trainer
from torch import Tensor

from crosscode.build.schema import read_yaml
from crosscode.recipes import recipe_names
from crosscode.trainers.constraints import UnitNormDecoder

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
RECIPES = [name for name in recipe_names() if "sign_sgd" not in name]
FEW_LATENTS = 8
PRECISIONS = ("float32", "bfloat16")
CASES = [
    ("topk_crosscoder", 2, "bfloat16"),
    ("tied_clt", 2, "float32"),
    *(pytest.param(name, 50, kind, marks=pytest.mark.soak) for name in RECIPES for kind in PRECISIONS),
]


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    from triton_interpreter import repaired_interpreter

    torch.set_num_threads(1)
    with repaired_interpreter():
        yield


class Gradients:
    """Sees gradients before any other constraint: takes note of them, or puts in place what another took note of."""

    def __init__(self, given: Gradients | None = None) -> None:
        self.given, self.n_deferred = given, 0
        self.seen: list[Tensor | None] = []

    def after_backward(self, model: Any) -> None:
        if self.given is None:
            grads = [param.grad for param in model.parameters()]
            self.n_deferred += sum(isinstance(grad, SegmentGrad) for grad in grads)
            self.seen = [None if grad is None else computed(grad.clone()) for grad in grads]
        else:
            for param, grad in zip(model.parameters(), self.given.seen, strict=True):
                param.grad = None if grad is None else grad.clone()

    def before_step(self, model: Any) -> None:
        pass

    def after_step(self, model: Any) -> None:
        pass


def trainer_of(name: str, folder: Any, n_steps: int, fused: bool, **train: Any) -> Any:
    """Plain ones need no kernels: their gradients are given. Over many steps there are few latents, but where a recipe names
    shares of them, and PyTorch's ops go forward and back: what is interpreted then is what a fused Adam does, the sums of its
    gradients, their norm and the update."""
    optimizer = {**train.pop("optimizer", {}), "fused": fused}
    if not fused:
        optimizer.pop("moments", None)
    train |= {"optimizer": optimizer, "n_tokens": n_steps * BATCH}
    is_long = n_steps > 20
    in_shares = {"prefixes", "partition", "shared_fraction"} & read_yaml(name)["crosscoder"].keys()
    size = {"n_latents": FEW_LATENTS} if is_long and not in_shares else {}
    trainer = make_trainer(name, folder, "triton" if fused else "torch", "cpu", train=train, **size)
    if fused and is_long:
        for ops in {id(part.ops): part.ops for part in trainer.model.modules() if hasattr(part, "ops")}.values():
            for op, function in find_ops().items():
                setattr(ops, op, partial(function, backend=Backend("torch", ops.backend.options, sparse_below=1.0)))
    return trainer


def walk(fused: Any, plain: Any, n_steps: int, rtol: float, atol: float) -> int:
    """Both for so many steps, on the gradients of the first; how many of these were not computed before the step."""
    noted = Gradients()
    fused.constraints.append(noted)
    plain.constraints.append(Gradients(noted))
    for trainer in (fused, plain):
        trainer.start()
    assert type(fused.optimizer) is FusedAdam and type(plain.optimizer) is torch.optim.Adam
    for acts_BMPD in islice(fused.data, n_steps):
        fused.train_step(acts_BMPD)
        plain.train_step(acts_BMPD)
        for (path, mine), theirs in zip(fused.model.named_parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(
                mine, theirs, rtol=rtol, atol=atol, msg=lambda text, path=path: f"{path}: {text}"
            )
            kept = copies.valid_copy(mine)
            assert kept is None or torch.equal(kept, mine.detach().to(kept.dtype)), path
    return noted.n_deferred


def tolerance(trainer: Any, n_steps: int) -> dict[str, float]:
    """A step moves a weight by the learning rate at most, and is off by some units in the last place of that."""
    lr = max(group["initial_lr"] for group in trainer.optimizer.param_groups)
    return {"rtol": 1e-6 * n_steps**0.5, "atol": 2e-6 * lr * n_steps}


def both(name: str, folder: Any, n_steps: int, **train: Any) -> tuple[Any, Any]:
    return tuple(trainer_of(name, folder / str(fused), n_steps, fused, **dict(train)) for fused in (True, False))


@pytest.mark.parametrize(("name", "n_steps", "precision"), CASES)
def test_every_recipe_has_the_weights_of_adam(name, n_steps, precision, tmp_path):
    fused, plain = both(name, tmp_path, n_steps, precision=precision)
    n_deferred = walk(fused, plain, n_steps, **tolerance(fused, n_steps))
    sparse = fused.model.activation_fns[0].type_name() in ("topk", "batch_topk", "groupmax")
    assert n_deferred > 0 or not sparse


@pytest.mark.parametrize("n_steps", [2, pytest.param(50, marks=pytest.mark.soak)])
def test_unit_norms_and_their_16_bit_copies(n_steps, tmp_path):
    fused, plain = both("sae_topk", tmp_path, n_steps, precision="bfloat16")
    for trainer in (fused, plain):
        trainer.constraints.append(UnitNormDecoder())
        trainer.constraints[-1].after_step(trainer.model)
    walk(fused, plain, n_steps, **tolerance(fused, n_steps))
    norm_L = fused.model.W_dec_LO.norm(dim=1)
    torch.testing.assert_close(norm_L, torch.ones_like(norm_L))


@pytest.mark.soak
@pytest.mark.parametrize("options", [{"betas": [0.0, 0.999], "row_sparse": True}, {"betas": [0.0, 0.999]}, {}])
def test_accumulation_and_row_sparse_steps(options, tmp_path):
    fused, plain = both("topk_crosscoder", tmp_path, 20, grad_accumulation=2, optimizer=options)
    if "row_sparse" in options:
        assert fused.optimizer.row_sparse
    walk(fused, plain, 20, **tolerance(fused, 20))


def run_on(trainer: Any, n_steps: int) -> Any:
    trainer.start()
    for acts_BMPD in islice(trainer.data, n_steps):
        trainer.train_step(acts_BMPD)
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {"moments": "bfloat16", "lr_on_device": True},
        pytest.param({"betas": [0.0, 0.999], "row_sparse": True}, marks=pytest.mark.soak),
    ],
)
def test_a_run_goes_on_to_the_bit(options, tmp_path):
    train = {"optimizer": {**options, "fused": True}, "precision": "bfloat16", "n_tokens": 2 * BATCH}
    straight = run_on(make_trainer("topk_crosscoder", tmp_path / "straight", "triton", "cpu", train=train), 2)
    first = run_on(make_trainer("topk_crosscoder", tmp_path / "cut", "triton", "cpu", train=train), 1)
    first.save_checkpoint()
    resumed = make_trainer("topk_crosscoder", tmp_path / "cut", "triton", "cpu", resume=True, train=train)
    run_on(resumed, 1)
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
        mine, theirs = straight.optimizer.state[one], resumed.optimizer.state[other]
        assert mine.keys() == theirs.keys() and all(mine[key].dtype == theirs[key].dtype for key in mine)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path):
    train = {"optimizer": {"fused": True}, "max_skipped_steps": 5}
    trainer = run_on(make_trainer("topk_crosscoder", tmp_path / "run", "triton", "cpu", train=train), 1)
    before = [param.detach().clone() for param in trainer.model.parameters()]
    acts_BMPD = next(iter(trainer.data)).clone()
    acts_BMPD[0, 0, 0, 0] = float("inf")
    trainer.train_step(acts_BMPD)
    for param, expected in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(param, expected)
        assert all(value.isfinite().all() for value in trainer.optimizer.state[param].values())
