"""The command for a GPU's owner, without a GPU: a dry run of all of it, its calls of torch.cuda by name and signature, and the
script for compute-sanitizer with a stand-in for that."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

from crosscode.trainers import graphs

BENCHES = Path(__file__).parents[2] / "benches"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SPARSIFY = """
import torch
def decoder_impl(top_indices, top_acts, W_dec):
    return torch.nn.functional.embedding_bag(top_indices, W_dec, per_sample_weights=top_acts, mode="sum")
"""
FLEXSAE = """
def triton_topk_sae_loss(indices, weight, vals, bias, target):
    return ((weight[indices] * vals.unsqueeze(-1)).sum(1) + bias - target).square().mean()
"""


@pytest.fixture
def benches(monkeypatch):
    for folder in (BENCHES, BENCHES.parent / "tests" / "helpers"):
        monkeypatch.syspath_prepend(str(folder))


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="kernels need the interpreter here")
def test_a_dry_run_of_everything_with_triton_interpreted(tmp_path):
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / "__init__.py").touch()
    (tmp_path / "sparsify" / "utils.py").write_text(SPARSIFY)
    (tmp_path / "flex_sae.py").write_text(FLEXSAE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHES / "gpu.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert not [row for rows in found.values() for row in rows if "error" in row]
    assert {row["op"] for row in found["ops"]} == {row["op"] for row in found["op times"]}
    assert all(
        row["ok"] for name in ("ops", "optimizer", "recipes", "graphs", "captured training") for row in found[name]
    )
    assert all(row["same_bits"] for name in ("ops", "optimizer", "graphs", "captured training") for row in found[name])
    assert {row["kind"] for row in found["optimizer"]} == {"dense", "row-sparse", "bfloat16"}
    fused = {row["variant"]: row["predicted_ms"] for row in found["step times"] if row["variant"].startswith("triton")}
    assert fused.keys() == {"triton", "triton, fused", "triton, fused, bfloat16 moments"}
    assert all(ms > 0 for ms in fused.values())
    losses = {row["library"]: row["loss"] for row in found["other libraries"]}
    assert losses.keys() == {"crosscode", "dense", "sparsify", "flexsae"}
    assert all(loss == pytest.approx(losses["dense"], rel=1e-4) for loss in losses.values())
    parts = {row["part"]: row for row in found["whole run"]}
    assert parts["harvest alone"]["tokens_per_s"] > 0
    shares = [row["share"] for part, row in parts.items() if part not in ("whole run", "harvest alone")]
    assert sum(shares) == pytest.approx(1)
    text = (tmp_path / "gpu-dry-run.md").read_text()
    assert "## The recipe `demo`" in text and "over_predicted" in text


def test_torch_cuda_has_what_is_asked_of_it(benches, monkeypatch):
    import gpu_device

    cuda = create_autospec(torch.cuda)
    cuda.Event.return_value.elapsed_time.return_value = 30.0
    cuda.memory_allocated.return_value, cuda.max_memory_allocated.return_value = 2**20, 3 * 2**20
    cuda.get_device_capability.return_value = (9, 0)
    monkeypatch.setattr(gpu_device, "cuda", cuda)
    monkeypatch.setattr(graphs, "cuda", cuda)
    gpu, calls = gpu_device.Gpu(), []
    assert gpu.milliseconds(lambda: calls.append(1), n_rounds=2, n_calls=10) == [3.0, 3.0] and len(calls) == 30
    assert gpu.peak_mib(gpu.synchronize) == 2.0
    with gpu.no_waiting():
        cuda.set_sync_debug_mode.assert_called_with("error")
    cuda.set_sync_debug_mode.assert_called_with("default")
    calls.clear()
    assert gpu.captured(lambda: calls.append(1)) is cuda.CUDAGraph.return_value.replay and len(calls) == 4
    gpu.free()
    assert gpu.facts()["capability"] == [9, 0] and gpu.name() is cuda.get_device_name.return_value


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", ["odd", "ones"])
def test_the_allowed_errors_hold_for_the_torch_backend(benches, size, dtype):
    import gpu_checks
    from crosscode_kernels import resolve_backend

    ops = resolve_backend("torch", "cpu", gpu_checks.DTYPES[dtype])
    inputs = gpu_checks.Inputs(gpu_checks.SIZES[size], ops, "cpu", gpu_checks.DTYPES[dtype], 0)
    found = {name: gpu_checks._judged(name, ops, inputs, dtype) for name in gpu_checks.OPS}
    assert not {name: row for name, row in found.items() if not row["ok"]}


def test_a_wrong_result_is_a_failed_check(benches, monkeypatch):
    import gpu
    import gpu_checks
    from crosscode_kernels import OpSet, resolve_backend
    from gpu_device import DryRun

    monkeypatch.setattr(gpu_checks, "backends", lambda gpu, dtype: ["torch"])
    rows = list(gpu_checks.ops_against_float64(DryRun(), True))
    assert all(row["ok"] for row in rows), rows
    norms = OpSet(resolve_backend("torch", "cpu").backend).decoder_norms
    wrong = OpSet(resolve_backend("torch", "cpu").backend)
    wrong.decoder_norms = lambda *a, **k: norms(*a, **k)._replace(n_L=1.01 * norms(*a, **k).n_L)
    inputs = gpu_checks.Inputs(gpu_checks.QUICK["odd"], wrong, "cpu", torch.float32, 0)
    row = gpu_checks._judged("decoder_norms", wrong, inputs, "float32")
    assert not row["ok"] and row["error_of_largest"] == pytest.approx(0.01, rel=0.1)
    assert gpu.failures({"ops": [rows[0], row]}) == [f"ops: {json.dumps(row)}"]


def test_a_section_that_dies_is_said_and_the_others_stay(benches, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "run_section", _dies)
    found = gpu.collect(["ops", "graphs"], True, True)
    assert [rows[-1]["ok"] for rows in found.values()] == [False, False]
    assert "exit code 3" in found["ops"][-1]["error"]


def _dies(*arguments):
    os._exit(3)


@pytest.mark.parametrize("finds", [False, True])
def test_each_tool_of_the_sanitizer_runs_every_op(benches, monkeypatch, tmp_path, capfd, finds):
    import sanitize

    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$2" != racecheck ] || exit {99 if finds else 0}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", ["sanitize.py"])
    assert sanitize.main() == finds
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == list(sanitize.TOOLS)
    assert all("gpu.py --only ops --quick" in call for call in calls)
    assert ("found something: racecheck" in capfd.readouterr().out) == finds
