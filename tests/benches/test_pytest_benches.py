"""The benches on pytest-benchmark, once through at toy sizes, and the plots of what they write."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crosscode_kernels import Backend, OpSet
from crosscode_kernels.opset import find_ops

BENCHES = Path(__file__).parents[2] / "benches"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["reference", "torch"]


def run(*arguments: str | Path) -> None:
    # pytest-benchmark switches itself off where this variable of pytest-xdist is set.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module", params=["triton-interpreted" if INTERPRETED else "torch"])
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for name in ("bench_ops", "bench_train_step"):
        bench = ("-m", "pytest", "-c", BENCHES / "pytest.ini", BENCHES / f"{name}.py", "--quick", "--threads", "1")
        run(*bench, "-k", " or ".join(BACKENDS), "--benchmark-json", folder / f"{name}.json")
    return folder


@pytest.fixture
def op_cases(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    return importlib.import_module("op_cases")


def test_an_op_that_is_found_has_a_case(op_cases, monkeypatch):
    def gated(h_BL, W_dec_LO, *, backend="auto", slope=2.0):
        return slope * h_BL.sigmoid() @ W_dec_LO

    def odd(h_BL, unheard_of, *, backend="auto"):
        return h_BL

    monkeypatch.setitem(find_ops(), "gated", gated)
    monkeypatch.setitem(find_ops(), "odd", odd)
    ops = OpSet(Backend("reference"))
    inputs = op_cases.Inputs(op_cases.Case("topk", B=3, I=4, O=6, L=8, k=2), ops, "cpu", torch.float32, seed=0)
    cases = op_cases.find_cases()
    value, (dh_BL, dW_LO) = (op_cases.call(cases["gated"], ops, inputs, backward) for backward in (False, True))
    assert torch.equal(value, 2 * inputs.h_BL.sigmoid() @ inputs.W_dec_LO)
    assert cases["gated"].leaves == ("h_BL", "W_dec_LO") and dh_BL.shape == (3, 8) and dW_LO.shape == (8, 6)
    with pytest.raises(LookupError, match=r"odd: the benches have no input called unheard_of; see `Inputs`"):
        op_cases.call(cases["odd"], ops, inputs, False)


def test_every_op_and_scheme_is_measured_on_every_backend(results, op_cases):
    assert {name.split()[0] for name in op_cases.OPS} | set(op_cases.NOT_TIMED) == set(find_ops())
    stored = json.loads((results / "bench_ops.json").read_text())
    measured = {(row["extra_info"]["backend"], row["extra_info"]["op"]) for row in stored["benchmarks"]}
    assert measured == {(backend, op) for backend in BACKENDS for op in op_cases.OPS}
    stored = json.loads((results / "bench_train_step.json").read_text())
    measured = {(row["extra_info"]["backend"], row["extra_info"]["scheme"]) for row in stored["benchmarks"]}
    schemes = {"topk", "batch_topk", "groupmax", "jumprelu", "l1"}
    assert measured == {(backend, scheme) for backend in BACKENDS for scheme in schemes}
    assert all(row["extra_info"]["peak_mib"] > 0 for row in stored["benchmarks"])


def test_results_say_where_they_come_from(results):
    for name in ("bench_ops", "bench_train_step"):
        stored = json.loads((results / f"{name}.json").read_text())
        assert {"torch", "triton", "python", "threads", "cores", "gpu"} <= stored["machine_info"].keys()
        assert stored["machine_info"]["quick"] is True
        assert len(stored["commit_info"]["id"]) == 40
        assert all({"median", "q1", "q3"} <= row["stats"].keys() for row in stored["benchmarks"])


@pytest.mark.skipif(INTERPRETED, reason="ratios to the reference are drawn where that is measured")
def test_plots_are_drawn(results, tmp_path):
    run(BENCHES / "plots.py", "--results", results, "--out", tmp_path)
    for name in ("step_time", "step_memory", "step_ratio", "op_ratio"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
