"""The console script: a whole run, and every way of getting its input wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from crosscode.commands.cli import main


def write_config(values, folder: Path) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def metrics_of(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run: Path):
    return [row["loss"] for row in metrics_of(run) if "loss" in row]


def test_train_writes_the_run_directory(tiny_config, tmp_path, capsys):
    assert main(["train", write_config(tiny_config, tmp_path)]) == 0
    run = tmp_path / "run"
    shown = capsys.readouterr().out
    assert str(run) in shown and "FVU" in shown
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "evaluation.json", "checkpoints", "final"} <= names
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_10"]
    rows = metrics_of(run)
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10]
    for row in rows[:-1]:
        total = sum(row[f"weight/{name}"] * row[f"loss/{name}"] for name in ("recon", "auxk"))
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["step"] == 10 and summary["tokens"] == 640
    assert set(summary["fvu_by_position"]) == {"one/blocks.1.hook_resid_post", "two/blocks.1.hook_resid_post"}
    assert losses(run)[-1] < losses(run)[0]


def test_train_says_the_figures_of_each_text_apart(tiny_config, tmp_path, capsys):
    source = tiny_config["data"]["source"]
    other = shutil.copy(source["path"], tmp_path / "other.jsonl")
    parts = [{"source": source}, {"source": {**source, "path": str(other)}}]
    values = {**tiny_config, "data": {**tiny_config["data"], "source": {"type": "mixture", "parts": parts}}}
    assert main(["train", write_config(values, tmp_path)]) == 0
    shown = capsys.readouterr().out
    groups = json.loads((tmp_path / "run" / "summary.json").read_text())["groups"]["source"]
    assert len(groups) == 2
    for name, of_group in groups.items():
        assert f"{of_group['fvu']:.4f}  source {name} (L0 {of_group['l0']:.1f}, {of_group['n_tokens']} tokens)" in shown


def test_training_again_from_the_written_config_gives_the_same_losses(tiny_config, tmp_path):
    assert main(["train", write_config(tiny_config, tmp_path)]) == 0
    first, second = tmp_path / "run", tmp_path / "again"
    assert main(["train", str(first / "config.yaml"), "--run_dir", str(second)]) == 0
    assert losses(second) == losses(first)
    third = tmp_path / "other-seed"
    assert main(["train", str(first), "--run_dir", str(third), "--seed", "1"]) == 0
    assert losses(third) != losses(first)


def test_final_model_in_a_fresh_process_reproduces_the_reported_fvu(tiny_config, tmp_path):
    assert main(["train", write_config(tiny_config, tmp_path)]) == 0
    code = """
import sys, torch
from crosscode.models import ModelHookpointAcausalCrosscoder
from crosscode.build.experiment import open_experiment
from crosscode.build.schema import load_config
model = ModelHookpointAcausalCrosscoder.load(sys.argv[1] + "/final", backend="reference")
acts = torch.cat(list(open_experiment(load_config(sys.argv[1])).heldout_activations())).double()
error = (model(acts.float()).double() - acts).square().sum()
print((error / (acts - acts.mean(0)).square().sum()).item())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, cwd="/", timeout=300
    )
    assert done.returncode == 0, done.stderr
    reported = json.loads((tmp_path / "run" / "summary.json").read_text())["fvu"]
    assert float(done.stdout) == pytest.approx(reported, rel=1e-5)


def test_evaluate_agrees_with_the_end_of_training(tiny_config, tmp_path, capsys):
    assert main(["train", write_config(tiny_config, tmp_path)]) == 0
    before = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["fvu"] == pytest.approx(before["fvu"], rel=1e-6)


def test_report_of_a_run_is_one_self_contained_page(tiny_config, tmp_path):
    assert main(["train", write_config(tiny_config, tmp_path)]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<html" in page and 'src="http' not in page


def test_triton_in_the_interpreter_reproduces_the_reference(tiny_config, tmp_path):
    tiny_config["train"] |= {"n_tokens": 40, "batch_size": 8, "log_every": 1, "dead_after_tokens": 16}
    tiny_config["objective"]["auxk"]["dead_after_tokens"] = 16
    tiny_config["evaluation"] = {"n_tokens": 32, "loss_recovered_n_tokens": 32}
    curves = {}
    for backend in ("reference", "torch", "triton"):
        config = write_config(tiny_config | {"run_dir": str(tmp_path / backend), "backend": backend}, tmp_path)
        if backend == "triton":  # whether kernels are interpreted is settled when they are imported
            done = subprocess.run(
                [sys.executable, "-m", "crosscode.commands.cli", "train", config],
                capture_output=True,
                text=True,
                env=os.environ | {"TRITON_INTERPRET": "1"},
                timeout=600,
            )
            assert done.returncode == 0, done.stderr
        else:
            assert main(["train", config]) == 0
        curves[backend] = torch.tensor(losses(tmp_path / backend), dtype=torch.float64)
    for backend in ("torch", "triton"):
        torch.testing.assert_close(curves[backend], curves["reference"], rtol=1e-5, atol=0)


def change(path, value):
    """A function that sets a dotted path of a config."""

    def apply(config):
        *parents, last = path.split(".")
        for name in parents:
            config = config[int(name) if name.isdigit() else name]
        config[last] = value

    return apply


BAD = {
    "unknown field": (change("train.batchsize", 3), "train.batchsize", "3", "batch_size"),
    "wrong type": (change("train.batch_size", "many"), "train.batch_size", "many", "integer"),
    "k > n_latents": (change("crosscoder.activation.k", 99), "activation.k", "99", "32"),
    "k = 0": (change("crosscoder.activation.k", 0), "crosscoder.activation.k", "0", "greater than 0"),
    "missing model folder": (change("language_models.0.path", "/nowhere/lm"), "language_models.0.path", "/nowhere/lm"),
    "missing data": (change("data.source.path", "/nowhere/text.jsonl"), "data.source", "/nowhere/text.jsonl"),
    "unknown hookpoint": (change("hookpoints", ["blocks.1.hook_resid_pst"]), "hookpoints", "blocks.1.hook_resid_post"),
    "layer that is not there": (change("hookpoints", ["blocks.9.hook_resid_post"]), "hookpoints", "blocks.9"),
    "no such column": (change("data.source.column", "body"), "data.source.column", "body", "text"),
    "unknown loss term": (change("objective.recno", {}), "objective.recno", "recon"),
    "unknown activation": (change("crosscoder.activation.type", "topq"), "crosscoder.activation", "topq", "topk"),
    "both sizes": (change("crosscoder.expansion_factor", 2), "n_latents", "expansion_factor"),
    "sequence too long": (change("data.sequence_length", 4096), "data.sequence_length", "4096", "64"),
    "accumulation": (change("train.grad_accumulation", 7), "grad_accumulation", "7", "64"),
    "too many shared latents": (change("crosscoder.n_shared_latents", 99), "crosscoder.n_shared_latents = 99", "32"),
    "small buffer": (change("data.shuffle_buffer_size", 3), "data.shuffle_buffer_size = 3", "64"),
    "unknown backend": (change("backend", "cuda"), "backend", "cuda", "triton"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_exit_code_2_and_nothing_written(case, tiny_config, tmp_path, capfd):
    apply, *expected = BAD[case]
    apply(tiny_config)
    config = write_config(tiny_config, tmp_path)
    assert main(["train", config]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, shown.err
    for text in expected:
        assert text in lines[0]
    assert not (tmp_path / "run").exists()


def test_models_with_different_tokenizers_are_aligned_and_said_to_be(tiny_config, tmp_path, save_tiny_lm, caplog):
    other = str(save_tiny_lm(tmp_path / "other", words=[f"v{i}" for i in range(60)]))
    tiny_config["language_models"][1]["path"] = other
    assert main(["train", write_config(tiny_config, tmp_path)]) == 0
    assert "% of positions have no partner and are left out" in caplog.text


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_dataset_is_refused(content, tiny_config, tmp_path, capfd):
    empty = tmp_path / "empty.jsonl"
    empty.write_text(content, encoding="utf-8")
    tiny_config["data"]["source"]["path"] = str(empty)
    assert main(["train", write_config(tiny_config, tmp_path)]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_kept_unless_overwrite_is_set(tiny_config, tmp_path, capfd):
    config = write_config(tiny_config, tmp_path)
    assert main(["train", config]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(["train", config]) == 2
    assert "overwrite" in capfd.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert main(["train", config, "--overwrite", "true"]) == 0


@pytest.mark.parametrize("command", [["evaluate", "/nowhere"], ["report", "/nowhere"], ["train", "/nowhere.yaml"]])
def test_missing_paths_are_named(command, capfd):
    assert main(command) == 2
    assert "/nowhere" in capfd.readouterr().err
