"""Resume, warm start and settings through the command line."""

import json
import logging
import os
import re
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from crosscode.commands.cli import main
from crosscode.runs.directory import RunDirectory
from crosscode.trainers.trainer import Trainer


@pytest.fixture
def write(tiny_config, tmp_path):
    """Writes the tiny config, changed by dotted paths, and returns its file."""
    torch.set_num_threads(1)
    tiny_config["evaluation"]["loss_recovered"] = "never"

    def write(name="config", **changes):
        for path, value in changes.items():
            *parents, last = path.split("__")
            section = tiny_config
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = value
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tiny_config))
        return str(file)

    return write


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume: expects RUN"),
        (["--resume", "/nowhere"], "/nowhere"),
        (["--resume", "RUN", "--train.log_every", "3"], "usage: crosscode train --resume RUN"),
    ],
)
def test_a_bad_resume_is_one_line(arguments, message, capfd):
    assert main(["train", *arguments]) == 2
    shown = capfd.readouterr().err.strip()
    assert message in shown and "\n" not in shown


def test_a_run_that_is_done_can_be_resumed_and_stays_as_it_is(write, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", write(train__checkpoint_every=4, evaluation__every=5)]) == 0
    before = rows(run), load_file(run / "final/model.safetensors"), (run / "summary.json").read_text()
    assert [row["step"] for row in before[0]] == [2, 4, 5, 6, 8, 10, 10]
    assert main(["train", "--resume", str(run)]) == 0
    after = rows(run), load_file(run / "final/model.safetensors"), (run / "summary.json").read_text()
    assert [row["step"] for row in after[0]] == [2, 4, 5, 6, 8, 10, 10]
    assert [row.get("loss") for row in after[0]] == [row.get("loss") for row in before[0]]
    assert all(torch.equal(after[1][name], tensor) for name, tensor in before[1].items())
    summaries = [json.loads(text) for text in (before[2], after[2])]
    for name in ("step", "loss", "fvu", "l0", "dead_fraction"):
        assert summaries[0][name] == summaries[1][name]


@pytest.fixture
def half_run(write, tmp_path, monkeypatch):
    """A run that stopped half way, and a function that changes its config."""
    train_step = Trainer.train_step

    def stop(self, acts_BMPD):
        if self.step == 5:
            raise KeyboardInterrupt
        train_step(self, acts_BMPD)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        assert main(["train", write(train__checkpoint_every=5)]) == 130
    file = tmp_path / "run/config.yaml"

    def change(path, value):
        config = yaml.safe_load(file.read_text())
        *parents, last = path.split(".")
        section = config
        for parent in parents:
            section = section[int(parent) if parent.isdigit() else parent]
        section[last] = value
        file.write_text(yaml.safe_dump(config))

    return change


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("crosscoder.n_latents", 48),
        ("crosscoder.activation.k", 5),
        ("train.batch_size", 32),
        ("train.optimizer.lr", 0.5),
        ("seed", 3),
        ("data.sequence_length", 12),
        ("data.shuffle_buffer_size", 128),
        ("hookpoints", ["blocks.0.hook_resid_post"]),
    ],
)
def test_a_resume_refuses_what_decides_the_model_or_the_data(field, value, half_run, tmp_path, capfd):
    half_run(field, value)
    before = sorted(tmp_path.joinpath("run").rglob("*"))
    capfd.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    shown = capfd.readouterr().err.strip()
    assert f"resume: {field} was " in shown and "put it back" in shown and "\n" not in shown
    assert sorted(tmp_path.joinpath("run").rglob("*")) == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "backend",
            "reference",
            "backend was 'torch' when the checkpoint was written and is 'reference' now: .*rounding",
        ),
        ("train.grad_accumulation", 2, "train.grad_accumulation was 1 .*rounding"),
        ("train.n_tokens", 64 * 12, "train.n_tokens was 640 .*goes on with the new value"),
        ("objective.recon.weight", 2.0, "objective.recon.weight was 1.0 .*goes on with the new value"),
        ("train.log_every", 1, "train.log_every was 2 .*leaves the weights as they would have been"),
        ("evaluation.n_tokens", 100, "evaluation.n_tokens was 200 .*leaves the weights"),
    ],
)
def test_a_resume_says_what_other_changes_mean_and_goes_on(field, value, message, half_run, tmp_path, caplog):
    half_run(field, value)
    with caplog.at_level(logging.INFO, logger="crosscode"):
        assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert re.search(message, caplog.text)
    assert caplog.text.count("resume:") == 1
    assert json.loads((tmp_path / "run/summary.json").read_text())["step"] == (12 if field == "train.n_tokens" else 10)


def test_a_resume_with_another_backend_stays_within_rounding(half_run, write, tmp_path):
    assert main(["train", write(run_dir=str(tmp_path / "whole"))]) == 0
    half_run("backend", "reference")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    ours, theirs = ([row["loss"] for row in rows(tmp_path / name) if "loss" in row] for name in ("run", "whole"))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_run_that_nobody_changed_is_resumed_from_another_folder_without_a_word(
    half_run, tmp_path, caplog, monkeypatch
):
    monkeypatch.chdir(tmp_path / "run")
    with caplog.at_level(logging.INFO, logger="crosscode"):
        assert main(["train", "--resume", "."]) == 0
    assert "resume:" not in caplog.text


def test_a_damaged_newest_checkpoint_is_set_aside_so_that_it_does_not_push_out_a_whole_one(
    half_run, tmp_path, caplog, monkeypatch
):
    half_run("train.checkpoint_every", 4)
    half_run("train.keep_last", 1)
    run = tmp_path / "run"
    shutil.copytree(run / "checkpoints/step_5", run / "checkpoints/step_9")
    (run / "checkpoints/step_9/model.safetensors").write_bytes(b"")
    train_step = Trainer.train_step

    def signalled(self, acts_BMPD):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(self, acts_BMPD)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", signalled)
        assert main(["train", "--resume", str(run)]) == 75
    assert "checkpoint 9 is damaged" in caplog.text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["damaged_step_9", "step_7"]
    assert main(["train", "--resume", str(run)]) == 0


def test_a_run_that_is_being_trained_is_left_alone(half_run, write, tmp_path, capfd):
    run = tmp_path / "run"
    before = sorted(run.rglob("*"))
    config = write(overwrite=True)
    with RunDirectory(run).held():
        for arguments in (["train", "--resume", str(run)], ["train", config], ["report", str(run)]):
            assert main(arguments) == 2
            assert "another process is at work in" in capfd.readouterr().err
    assert sorted(run.rglob("*")) == before
    assert main(["train", "--resume", str(run)]) == 0


def test_a_run_that_is_not_over_is_evaluated_at_its_newest_checkpoint(half_run, tmp_path, capfd):
    run = tmp_path / "run"
    assert main(["evaluate", str(run)]) == 0
    shown = capfd.readouterr()
    assert "training is not over: these are figures of" in shown.err and "step_5" in shown.err
    half = json.loads(shown.out)
    assert main(["train", "--resume", str(run)]) == 0
    capfd.readouterr()
    assert main(["evaluate", str(run)]) == 0
    whole = json.loads(capfd.readouterr().out)
    assert whole["fvu"] == json.loads((run / "evaluation.json").read_text())["fvu"] < half["fvu"]


def test_an_evaluation_says_how_far_it_is_and_keeps_nothing_beside_another_process(
    half_run, tmp_path, capfd, caplog, monkeypatch
):
    run = tmp_path / "run"
    monkeypatch.setattr("crosscode.trainers.progress.SECONDS_BETWEEN_LINES", 0)
    before = sorted(run.rglob("*"))
    with RunDirectory(run).held():
        assert main(["evaluate", str(run)]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)["fvu"] > 0
    assert re.search(r"^token \d+/\d+", shown.err, re.MULTILINE)
    assert "the figures are not kept in the run" in caplog.text
    assert sorted(run.rglob("*")) == before


def test_a_run_without_a_checkpoint_cannot_be_evaluated(half_run, tmp_path, capfd):
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "holds neither a saved model nor a run with one" in capfd.readouterr().err


def test_other_weights_of_a_language_model_are_noticed(write, tmp_path, capfd, save_tiny_lm):
    lm = save_tiny_lm(tmp_path / "lm", seed=3)
    config = write(language_models=[{"path": str(lm)}], crosscoder__type="sae")
    assert main(["train", config]) == 0
    weights = load_file(lm / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, lm / "model.safetensors", {"format": "pt"})
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "other weights than when the run began" in capfd.readouterr().err


def test_the_threshold_must_be_tracked_before_it_is_needed(write, tmp_path, capfd):
    activation = {"type": "batch_topk", "k": 4, "threshold_start_step": 4}
    assert main(["train", write(crosscoder__activation=activation, evaluation__every=4)]) == 2
    assert "threshold_start_step = 4: must be below" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_warm_start_begins_where_the_other_run_ended(write, tmp_path, capfd):
    assert main(["train", write()]) == 0
    last = rows(tmp_path / "run")[-2]["loss"]
    second = write(run_dir=str(tmp_path / "second"), finetune_from=str(tmp_path / "run"), train__log_every=1)
    assert main(["train", second]) == 0
    assert rows(tmp_path / "second")[0]["loss"] < 1.5 * last
    third = write(run_dir=str(tmp_path / "third"), finetune_from="/nowhere")
    capfd.readouterr()
    assert main(["train", third]) == 2
    assert "finetune_from = '/nowhere'" in capfd.readouterr().err
    assert not (tmp_path / "third").exists()


def test_evaluation_during_training_splices_when_asked(write, tmp_path):
    config = write(evaluation__loss_recovered="always", evaluation__every=5, evaluation__loss_recovered_n_tokens=30)
    assert main(["train", config]) == 0
    name = "eval/kl_spliced/one/blocks.1.hook_resid_post"
    assert [row["step"] for row in rows(tmp_path / "run") if name in row] == [5, 10]
    found = json.loads((tmp_path / "run/evaluation.json").read_text())["loss_recovered"]
    assert found["two/blocks.1.hook_resid_post"]["ci95"]["ce_spliced"][0] > 0


def test_data_that_end_early_still_leave_a_whole_run(write, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="crosscode"):
        assert main(["train", write(data__epochs=1, train__n_tokens=64 * 500)]) == 0
    assert "the data ended at step" in caplog.text
    run = tmp_path / "run"
    step = json.loads((run / "summary.json").read_text())["step"]
    assert 0 < step < 500
    assert (run / "checkpoints" / f"step_{step}").is_dir() and (run / "final").is_dir()


def test_a_compound_transcoder_is_evaluated_as_the_replacement_model(tiny_config, tmp_path, capsys):
    hooks = [f"blocks.{layer}.{hook}" for hook in ("mlp.hook_in", "hook_mlp_out") for layer in (0, 1)]
    tiny_config |= {"language_models": tiny_config["language_models"][:1], "hookpoints": hooks}
    tiny_config["crosscoder"] |= {"type": "compound_cross_layer_transcoder", "init": {"type": "compound_uniform"}}
    tiny_config["evaluation"] |= {"loss_recovered_n_tokens": 40}
    file = tmp_path / "clt.yaml"
    file.write_text(yaml.safe_dump(tiny_config))
    assert main(["train", str(file)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    found = json.loads(capsys.readouterr().out)
    layered = found["replacement_model"]
    assert layered["kl"]["with_error_terms"] == pytest.approx(0, abs=1e-6) and layered["kl"]["from_own_outputs"] > 1e-6
    spliced = found["loss_recovered"]["one/all hookpoints"]
    assert layered["ce"]["from_clean_inputs"] == pytest.approx(spliced["ce_spliced"], rel=1e-6)
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "all layers, from own outputs" in (tmp_path / "run" / "report.html").read_text()
