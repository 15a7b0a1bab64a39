"""The bench of the decode of several source layers: what it compares is one function, and it counts what it says."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

SIZES = Namespace(layers=3, width=5, tokens=7, latents=9, k=2)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches"))
    pytest.importorskip("triton")
    import grouped_decode  # pyright: ignore[reportMissingImports]

    return grouped_decode


def test_both_columns_decode_the_same_with_the_same_gradients(bench):
    found = []
    for decode in bench.COLUMNS.values():
        step = bench.Step(SIZES)
        found.append([step.run(decode, bench.Backend("torch")), step.b_O.grad, *(W_LO.grad for W_LO in step.W_S)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_launches_and_bytes_by_hand(bench):
    apart, at_once = (bench.counted(decode, SIZES) for decode in bench.COLUMNS.values())
    assert at_once["Triton launches"] == 1 + 1  # 42 entries: no latent can be hot
    assert apart["Triton launches"] == 3 * (1 + 1)
    slices, whole = 7 * (15 + 10 + 5) * 4, 7 * 15 * 4
    # Forward: a decode writes each slice, which is read and added to what is there; then the bias.
    assert apart["GB beside the gathers"] * 1e9 > 4 * slices + 2 * whole
    assert at_once["GB beside the gathers"] < apart["GB beside the gathers"]
    assert at_once["stock ops"] < apart["stock ops"]
