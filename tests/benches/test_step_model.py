"""The model of a training step against a real trainer's, and what it predicts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_recipes import make_trainer

OF_THE_INTERPRETER = {"set_", "copy_"}
"""By which it takes the tensors of a launch and gives them back."""


@pytest.fixture
def benches(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches"))
    pytest.importorskip("triton")
    import counted_bytes  # pyright: ignore[reportMissingImports]
    import sass  # pyright: ignore[reportMissingImports]
    import static_traffic  # pyright: ignore[reportMissingImports]
    import step_model  # pyright: ignore[reportMissingImports]

    return SimpleNamespace(counted=counted_bytes, sass=sass, traffic=static_traffic, step=step_model)


@pytest.fixture
def interpreter() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter")
    from triton_interpreter import repaired_interpreter

    with repaired_interpreter():
        yield


@pytest.mark.parametrize(
    ("precision", "fused"),
    [
        ("bfloat16", False),
        ("bfloat16", True),
        *(pytest.param("float32", one, marks=pytest.mark.soak) for one in (False, True)),
    ],
)
def test_a_step_of_triton_moves_what_the_model_says_besides_its_kernels(
    precision, fused, benches, interpreter, tmp_path
):
    train = {"optimizer": {"fused": fused}, "precision": precision}
    trainer = make_trainer("topk_crosscoder", tmp_path / "run", "triton", "cpu", train=train)
    trainer.objective.terms.pop("auxk", None)
    weights = [trainer.model.W_enc_LXiDi, trainer.model.W_dec_LXoDo]
    n_weights, smallest = sum(one.numel() for one in weights), min(one.numel() for one in weights)
    trainer.start()
    first, second = islice(trainer.data, 2)
    trainer.train_step(first)
    with benches.counted.CountedBytes(smallest) as count:
        trainer.train_step(second)
    run = benches.step.Run(getattr(torch, precision), fused=fused)
    e = run.dtype.itemsize
    found = {name.removeprefix("aten."): n for name, n in count.of_weights.items() if name.startswith("aten.")}
    expected = {"_to_copy": benches.step.casts(n_weights, e, run).moved}
    if not fused:
        norm, adam = benches.step.optimizer(n_weights, run)
        expected |= {"linalg_vector_norm": norm.moved, "_fused_adam_": adam.moved}
    for name, moved in expected.items():
        # Biases, and what is by row, come on top.
        assert moved <= found.pop(name, 0) <= 1.2 * moved, name
    assert found.keys() <= OF_THE_INTERPRETER, "the model knows of no other op of PyTorch on whole weights"


def test_a_fused_step_with_moments_in_bfloat16_is_predicted_to_take_less_than_20_ms(benches):
    case, h100 = benches.traffic.CASES[0], benches.traffic.DEVICES[0]
    runs = {str(run): benches.traffic.step_ms(case, run, h100) for run in benches.traffic.RUNS}
    assert runs["bfloat16, fused, moments in bfloat16"] < 20 < runs["bfloat16"]
    assert runs["bfloat16, fused"] < 0.75 * runs["bfloat16"]


def test_few_warps_and_many_instructions_cost_time(benches, monkeypatch):
    row = {"instructions_per_byte": 2.0, "instructions_around": 10, "warps_per_unit": 16}
    monkeypatch.setattr(benches.sass, "facts", lambda kernel, *_: row if kernel == "known" else None)
    device = SimpleNamespace(target="sm_90", units=100, clock=1e9)
    work = benches.sass.Work("known", asked=3.2e9, waits=1.6e6, around=1e6)
    found = work.seconds(device, 2)
    assert found["issue"] == pytest.approx((2e8 + 1e7) / (100 * 4 * 1e9 * 0.8))
    assert found["latency"] == pytest.approx(1.6e6 * 300e-9 / (16 * 100))
    assert benches.sass.Work("unknown", 1.0).seconds(device, 2) == {}
