"""Every recipe on two and four processes, in both precisions, on two twice; and ranks that end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file

from crosscode.recipes import recipe_names

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from ranks import assert_as_one, finish, planned_bytes, spawn, train_on

pytestmark = pytest.mark.soak  # minutes of several processes, which a busy machine may cut short


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_every_recipe_is_trained_as_by_one_process(tmp_path, dtype, tolerance):
    recipes = [f"{name}@torch@24" for name in recipe_names()]
    recipes += [
        f"{name}@reference@24" for name in ("sae_topk", "batch_topk_crosscoder", "jan_update_crosscoder", "sae_l1")
    ]
    recipes += ["sae_topk@torch:screened@24"] if dtype == "float32" else []
    recipes += ["sae_topk@torch@9", "batch_topk_crosscoder@torch@9"]  # at 4: shards of 2, 2, 2 and 3, fewer than k
    one = train_on(1, tmp_path, dtype, recipes)[0]
    two, again, four = (train_on(n, tmp_path, dtype, recipes) for n in (2, 2, 4))
    for recipe in recipes:
        assert_as_one(one[recipe], two[0][recipe], tolerance)
        assert_as_one(one[recipe], four[0][recipe], tolerance)
        assert all(torch.equal(two[0][recipe]["model"][k], v) for k, v in again[0][recipe]["model"].items())
        assert all(torch.equal(four[0][recipe]["losses"], of[recipe]) for of in four[1:])
        for several in (two, four) if "@torch" in recipe else ():  # a plan is one of that backend
            assert several[0][recipe]["bytes"] == planned_bytes(recipe, len(several), dtype)


def test_every_kind_of_state_goes_on_at_another_number_of_ranks(tmp_path):
    row_sparse = '{"train": {"optimizer": {"type": "adam", "lr": 0.01, "betas": [0, 0.999], "row_sparse": true}}}'
    names = (
        "sae_topk", "sae_batch_topk", "sae_jumprelu", "feb_update_diffing_topk", "tied_clt", "dedicated_feature_crosscoder",
        "wanted_l0_sae", "sae_topk_sign_sgd",
    )  # fmt: skip
    recipes = [*(f"{name}@torch@25" for name in names), f"topk_crosscoder@torch@25@{row_sparse}"]
    firsts = {n: train_on(n, tmp_path, "float32", recipes)[0] for n in (1, 2, 4)}
    for (before, after), folder in zip(((1, 2), (2, 4), (2, 3), (4, 1)), ("1-0", "2-1", "2-1", "4-2"), strict=True):
        resumed = train_on(after, tmp_path, "float32", recipes, tmp_path / folder)[0]
        for recipe in recipes:
            n_losses = len(resumed[recipe]["losses"])
            assert 0 < n_losses < len(firsts[1][recipe]["losses"])
            torch.testing.assert_close(
                resumed[recipe]["losses"], firsts[1][recipe]["losses"][-n_losses:], rtol=1e-4, atol=1e-4,
                msg=lambda text, case=(recipe, before, after): f"{case}: {text}",
            )  # fmt: skip
            assert torch.equal(resumed[recipe]["counts"], firsts[1][recipe]["counts"]), (recipe, before, after)


FEWER = [f"{name}@torch@3" for name in ("sae_topk", "tied_clt", "sae_topk_sign_sgd", "sae_batch_topk", "sae_jumprelu")]
FEWER += [
    'topk_crosscoder@torch@3@{"train": {"optimizer": {"type": "adam", "lr": 0.01, "betas": [0, 0.999], "row_sparse": true}}}',
    'sae_l1@torch@3@{"train": {"resample": {"every": 1, "until": 1.0, "dead_after_tokens": 8}}}',
    'matryoshka_sae@torch@3@{"crosscoder": {"prefixes": [1, 2]}}',
]


def test_fewer_latents_than_ranks_are_trained_as_by_one_process(tmp_path):
    one, four = (train_on(n, tmp_path, "float64", FEWER) for n in (1, 4))
    for recipe in FEWER:
        assert_as_one(one[0][recipe], four[0][recipe], 1e-10)
        assert all(torch.equal(four[0][recipe]["losses"], of[recipe]) for of in four[1:])
        assert four[0][recipe]["bytes"] == planned_bytes(recipe, 4, "float64")


def test_fewer_latents_than_ranks_go_on_at_another_number(tmp_path):
    recipes = [FEWER[i] for i in (0, 1, 2, 5)]
    whole, _ = (train_on(n, tmp_path, "float32", recipes)[0] for n in (1, 4))
    for n, before in ((4, "1-0"), (1, "4-1")):
        resumed = train_on(n, tmp_path, "float32", recipes, tmp_path / before)[0]
        for recipe in recipes:
            losses = resumed[recipe]["losses"]
            assert 0 < len(losses) < len(whole[recipe]["losses"])
            torch.testing.assert_close(losses, whole[recipe]["losses"][-len(losses) :], rtol=1e-4, atol=1e-4)


def test_triton_kernels_are_what_a_rank_computes_with(tmp_path, monkeypatch):
    names = ("sae_topk", "sae_batch_topk", "sae_jumprelu")
    one = train_on(1, tmp_path, "float32", [f"{name}@torch@25" for name in names])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    two = train_on(2, tmp_path, "float32", [f"{name}@triton@25" for name in names])
    for name in names:
        assert_as_one(one[0][f"{name}@torch@25"], two[0][f"{name}@triton@25"], 1e-4)


@pytest.mark.parametrize(("n_latents", "n_ranks"), [(25, 2), (3, 4)])  # of four ranks one has none
def test_fused_adam_trains_and_goes_on_at_another_number_of_ranks(tmp_path, monkeypatch, n_latents, n_ranks):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Moments in bfloat16 are rounded by chance, and a rank draws for its own rows.
    tolerances = {"": 1e-4, ', "betas": [0, 0.999], "row_sparse": true': 1e-4, ', "moments": "bfloat16"': 5e-3}
    adam = '{"train": {"optimizer": {"type": "adam", "lr": 0.01, "fused": true%s}}}'
    recipes = [f"topk_crosscoder@triton@{n_latents}@{adam % options}" for options in tolerances]
    one, several = (train_on(n, tmp_path, "float32", recipes)[0] for n in (1, n_ranks))
    more, fewer = (
        train_on(n_ranks, tmp_path, "float32", recipes, tmp_path / "1-0"),
        train_on(1, tmp_path, "float32", recipes, tmp_path / f"{n_ranks}-1"),
    )
    for recipe, tolerance in zip(recipes, tolerances.values(), strict=True):
        assert_as_one(one[recipe], several[recipe], tolerance)
        for resumed in (more[0][recipe], fewer[0][recipe]):
            expected = one[recipe]["losses"][-len(resumed["losses"]) :]
            torch.testing.assert_close(resumed["losses"], expected, rtol=tolerance, atol=tolerance)
            for index, state in one[recipe]["optimizer"].items():
                for name, value in state.items():
                    found = resumed["optimizer"][index][name]
                    assert (found.shape, found.dtype) == (value.shape, value.dtype)


def test_bfloat16_is_trained_as_by_one_process_up_to_its_rounding(tmp_path):
    changes = '{"train": {"precision": "bfloat16"}}'
    recipes = [f"{name}@torch@25@{changes}" for name in ("topk_crosscoder", "sae_batch_topk", "jan_update_crosscoder")]
    one, two = (train_on(n, tmp_path, "float32", recipes) for n in (1, 2))
    for recipe in recipes:
        assert_as_one(one[0][recipe], two[0][recipe], 5e-3)


CONFIG = """
name: ranks
run_dir: RUN
backend: torch
device: cpu
language_models: [{path: "demo:base", dtype: float32}]
hookpoints: [blocks.2.hook_resid_post]
data: {source: {type: demo, split: train}, heldout: {type: demo, split: heldout}, sequence_length: 64, harvest_batch_size: 8,
  shuffle_buffer_size: 1024, n_tokens_for_norm_estimate: 512}
crosscoder: {type: sae, n_latents: 63, activation: {type: batch_topk, k: 4, threshold_ema_decay: 0.9},
  init: {type: anthropic_transpose, dec_init_norm: 0.1}}
objective: {recon: {}, auxk: {k_aux: 8, dead_after_tokens: 256}}
train: {n_tokens: 2560, batch_size: 64, optimizer: {type: adam, lr: 0.002}, checkpoint_every: 3, log_every: 1}
evaluation: {n_tokens: 500, loss_recovered: never}
"""


def numbers(value) -> list[float]:
    """Of nested lists and dictionaries."""
    if isinstance(value, (list, tuple, dict)):
        return [n for part in (value.values() if isinstance(value, dict) else value) for n in numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def test_harvest_evaluation_and_histograms_are_those_of_one_process(tmp_path):
    crosscode = str(Path(sys.executable).with_name("crosscode"))
    config = tmp_path / "c.yaml"
    values = CONFIG.replace("RUN", str(tmp_path / "run")).replace(
        "n_tokens: 2560", "n_tokens: 1280, histogram_every: 10"
    )
    # 7 sequences divide by neither
    values = values.replace("harvest_batch_size: 8", "harvest_batch_size: 7")
    config.write_text(values.replace("loss_recovered: never", "loss_recovered_n_tokens: 300, every: 10"))
    found = []
    for n_ranks in (1, 2, 3):
        run = tmp_path / str(n_ranks)
        finish(spawn(n_ranks, words=[crosscode, "train", str(config), "--run_dir", str(run)]))
        evaluation = json.loads((run / "evaluation.json").read_text())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        counted = [{name: v for name, v in row.items() if name.startswith(("loss", "fvu", "eval/"))} for row in rows]
        histograms = [json.loads(line) for line in (run / "histograms.jsonl").read_text().splitlines()]
        found.append((evaluation["loss_recovered"], counted, evaluation["density_L"], histograms))
    for several in found[1:]:
        assert numbers(several) == pytest.approx(numbers(found[0]), rel=1e-4)
    alone = tmp_path / "1" / "evaluation.json"
    before = numbers(json.loads(alone.read_text()))
    alone.unlink()
    finish(spawn(2, words=[crosscode, "evaluate", str(tmp_path / "1")]))
    assert numbers(json.loads(alone.read_text())) == pytest.approx(before, rel=1e-4)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, float]:
    """The model of a run that nobody disturbs, and for how many seconds its ranks were at work together."""
    folder = tmp_path_factory.mktemp("whole")
    processes, began = begun(folder, folder / "run")
    finish(processes)
    return folder / "run" / "final" / "model.safetensors", time.monotonic() - began


def begun(folder: Path, run: Path) -> tuple[list[subprocess.Popen], float]:
    """Two ranks that have met, and when."""
    config = folder / "c.yaml"
    config.write_text(CONFIG.replace("RUN", str(run)).replace("n_tokens: 2560", "n_tokens: 1280"))
    processes = spawn(2, words=[str(Path(sys.executable).with_name("crosscode")), "train", str(config)])
    assert processes[0].stdout is not None
    while "loading language model" not in (line := processes[0].stdout.readline()):
        assert line, "rank 0 has ended"
    return processes, time.monotonic()


@pytest.mark.parametrize("seed", range(20))
def test_a_rank_that_is_killed_at_any_moment_ends_the_other_and_costs_nothing(tmp_path, uninterrupted, seed):
    whole, seconds = uninterrupted
    rank, moment = (random := Random(seed)).randrange(2), random.uniform(0, seconds)
    processes, began = begun(tmp_path, tmp_path / "run")
    time.sleep(max(0, began + moment - time.monotonic()))
    was_over = processes[rank].poll() is not None
    processes[rank].kill()
    other = processes[1 - rank]
    said = other.communicate(timeout=60)[0]
    assert was_over or other.returncode in (74, 0), said  # 0: it had nothing left to do with the one that was killed
    assert "Traceback" not in said
    has_begun = (tmp_path / "run" / "config.yaml").exists()
    words = ["--resume", str(tmp_path / "run")] if has_begun else [str(tmp_path / "c.yaml")]
    if not (tmp_path / "run" / "summary.json").exists():
        finish(spawn(2, words=[str(Path(sys.executable).with_name("crosscode")), "train", *words]))
    one, resumed = (load_file(path) for path in (whole, tmp_path / "run" / "final" / "model.safetensors"))
    assert all(torch.equal(one[name], resumed[name]) for name in one)


def test_a_rank_that_is_killed_before_all_have_met_ends_the_other(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.replace("RUN", str(tmp_path / "run")))
    processes = spawn(2, words=[str(Path(sys.executable).with_name("crosscode")), "train", str(config)])
    processes[1].kill()
    said = processes[0].communicate(timeout=120)[0]  # it waits for 60 s, behind its imports
    assert processes[0].returncode == 74 and "Traceback" not in said, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_given_up_in_the_time_that_is_set(tmp_path, rank):
    config, rows = tmp_path / "c.yaml", tmp_path / "run" / "metrics.jsonl"
    config.write_text(CONFIG.replace("RUN", str(tmp_path / "run")) + "parallel: {timeout: 0.25}\n")
    processes = spawn(2, words=[str(Path(sys.executable).with_name("crosscode")), "train", str(config)])
    while not (rows.exists() and rows.read_text().count("\n") > 3):
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.05)
    processes[rank].send_signal(signal.SIGSTOP)
    try:
        said = processes[1 - rank].communicate(timeout=60)[0]
    finally:
        processes[rank].kill()
        processes[rank].communicate()
    assert processes[1 - rank].returncode == 74 and "Traceback" not in said, said


@pytest.mark.parametrize("n_rows", [0, 6, 9])  # in the first step, and where checkpoints are written
def test_of_four_ranks_one_that_is_killed_ends_all(tmp_path, n_rows):
    crosscode, config, run = str(Path(sys.executable).with_name("crosscode")), tmp_path / "c.yaml", tmp_path / "run"
    config.write_text(CONFIG.replace("RUN", str(run)).replace("n_tokens: 2560", "n_tokens: 1280"))
    processes, rows = spawn(4, words=[crosscode, "train", str(config)]), run / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("\n") >= n_rows):
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.01)
    processes[n_rows % 4].kill()
    killed, said = time.monotonic(), [process.communicate(timeout=60)[0] for process in processes]
    assert time.monotonic() - killed < 60
    assert sorted(process.returncode for process in processes) == [-9, 74, 74, 74], said
    assert not any("Traceback" in text for text in said), said
    finish(spawn(4, words=[crosscode, "train", "--resume", str(run)]))
    finish(spawn(4, words=[crosscode, "train", str(config), "--run_dir", str(tmp_path / "whole")]))
    one, other = (load_file(path / "final" / "model.safetensors") for path in (run, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_goes_on_at_another_number_of_ranks(tmp_path, uninterrupted):
    processes, _ = begun(tmp_path, tmp_path / "run")
    while not (tmp_path / "run" / "checkpoints" / "step_6").exists():
        time.sleep(0.05)
    processes[0].send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in processes] == [75, 75]
    whole = load_file(uninterrupted[0])
    for n_ranks in (1, 3):
        run = shutil.copytree(tmp_path / "run", tmp_path / str(n_ranks))
        finish(spawn(n_ranks, words=[str(Path(sys.executable).with_name("crosscode")), "train", "--resume", str(run)]))
        for name, weight in load_file(run / "final" / "model.safetensors").items():
            torch.testing.assert_close(weight, whole[name], rtol=1e-3, atol=1e-4)


def test_torchrun_starts_a_run_anew_from_its_last_checkpoint(tmp_path):
    config, run, whole = tmp_path / "c.yaml", tmp_path / "run", tmp_path / "whole"
    config.write_text(CONFIG.replace("RUN", str(run)))
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "3",
        "--no-python",
    ]
    words += [str(Path(sys.executable).with_name("crosscode")), "train", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]  # where the folder `kernels` must not stand for a package
    agent = subprocess.Popen(
        words, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    rows, children = run / "metrics.jsonl", Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    for n_killed, n_rows in enumerate((7, 15)):
        while not (rows.exists() and rows.read_text().count("\n") > n_rows):
            assert agent.poll() is None, agent.communicate()[0]
            time.sleep(0.05)
        os.kill(int(children.read_text().split()[n_killed]), signal.SIGKILL)
    said = agent.communicate(timeout=600)[0]
    assert agent.returncode == 0, said
    finish(spawn(2, words=[*words[-3:], "--run_dir", str(whole)]))
    one, other = (load_file(path / "final" / "model.safetensors") for path in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("rank", "number", "codes"), [(0, 9, [-9, 74]), (1, 9, [74, -9]), (0, 15, [75, 75])])
def test_a_run_goes_on_to_the_bit_where_a_rank_was_ended(tmp_path, rank, number, codes):
    crosscode = str(Path(sys.executable).with_name("crosscode"))
    config, run, whole = tmp_path / "c.yaml", tmp_path / "run", tmp_path / "whole"
    config.write_text(CONFIG.replace("RUN", str(run)))
    processes = spawn(2, words=[crosscode, "train", str(config)])
    rows = run / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("\n") > 7):
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.05)
    processes[rank].send_signal(number)
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == codes, said
    assert not any("Traceback" in text for text in said), said
    finish(spawn(2, words=[crosscode, "train", "--resume", str(run)]))
    finish(spawn(2, words=[crosscode, "train", str(config), "--run_dir", str(whole)]))
    one, other = (load_file(path / "final" / "model.safetensors") for path in (run, whole))
    assert all(torch.equal(one[name], other[name]) for name in one)
