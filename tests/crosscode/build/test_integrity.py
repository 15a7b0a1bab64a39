"""What belongs to a run is what that run has written: no command takes another model, or figures of one, without a word."""

import json
import logging
import shutil

import numpy as np
import pytest

import crosscode
from crosscode.commands.cli import main
from crosscode.errors import InputError

SECTION = {"type": "sae", "n_latents": 16, "activation": {"type": "topk", "k": 2}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs whose models have the same shapes."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "acts.npy", np.random.default_rng(0).standard_normal((400, 8)).astype("float32"))
    options = {"n_tokens": 512, "batch_size": 64, "device": "cpu", "progress": False, "checkpoint_every": 3}
    for seed in (0, 1):
        crosscode.train(folder / "acts.npy", SECTION, run_dir=folder / f"{seed}", seed=seed, log_every=2, **options)
    return folder


@pytest.fixture
def run(runs, tmp_path):
    return shutil.copytree(runs / "0", tmp_path / "run")


def take(*names):
    def from_other(runs, run):
        for name in names:
            lose(name)(runs, run)
            copy = shutil.copytree if (runs / "1" / name).is_dir() else shutil.copy
            copy(runs / "1" / name, run / name)

    return from_other


def edit(name, field, value):
    def edited(runs, run):
        content = json.loads((run / name).read_text())
        (run / name).write_text(json.dumps(content | {field: value}))

    return edited


def lose(*names):
    def lost(runs, run):
        for name in names:
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()

    return lost


COMMANDS = {
    "evaluate": lambda run, out: ["evaluate", str(run)],
    "report": lambda run, out: ["report", str(run)],
    "export": lambda run, out: ["export", str(run), "--to", "saelens", "--out", str(out)],
    "convert": lambda run, out: ["convert", str(run), "--out", str(out)],
    "push": lambda run, out: ["push", str(run), "someone/something", "--dry-run"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (take("final"), "is of another model than lies in"),
        (take("final/model.safetensors"), "another checksum"),
        (lose("final/model.safetensors", "checkpoints/step_8"), "model.safetensors is missing"),
        (lose("final/checksums.json"), "checksums.json is missing"),
        (lose("final/config.json"), "config.json"),
    ],
)
def test_another_or_half_a_model_is_refused(damage, said, command, runs, run, tmp_path, capsys):
    damage(runs, run)
    assert main(COMMANDS[command](run, tmp_path / "out")) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("crosscode: ") == 1
    assert not (tmp_path / "out").exists()


def test_a_warm_start_takes_no_model_of_another_run(runs, run, tmp_path):
    take("final")(runs, run)
    options = {"n_tokens": 64, "batch_size": 64, "device": "cpu", "progress": False, "finetune_from": str(run)}
    with pytest.raises(InputError, match="is of another model"):
        crosscode.train(runs / "acts.npy", SECTION, run_dir=tmp_path / "new", **options)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (take("evaluation.json"), "evaluation.json' is of another model"),
        (take("summary.json"), "summary.json' is of another model"),
        (edit("evaluation.json", "l0", 7.0), "evaluation.json: it: changed since it was written"),
        (edit("summary.json", "fvu", 0.01), "summary.json: it: changed since it was written"),
        (lose("final"), "final: missing"),
    ],
)
def test_figures_of_another_model_are_found(damage, said, runs, run, capsys):
    damage(runs, run)
    assert main(["verify", str(run)]) == 1
    assert said in capsys.readouterr().out


def test_a_checkpoint_in_place_of_the_trained_model_is_said(run, caplog, capsys):
    shutil.rmtree(run / "final")
    with caplog.at_level(logging.WARNING, "crosscode"):
        assert main(["evaluate", str(run)]) == 0
    assert "final/, is gone; that of checkpoint 8 is taken" in caplog.text


def test_figures_that_somebody_edited_are_measured_again(run, capsys):
    whole = (run / "evaluation.json").read_bytes()
    edit("evaluation.json", "max_activation_L", [1.0] * 16)(None, run)
    with pytest.raises(InputError, match="changed since it was written"):
        _ = crosscode.open(run).max_activation_L
    assert main(["evaluate", str(run)]) == 0
    assert (run / "evaluation.json").read_bytes() == whole


@pytest.mark.parametrize("line", [0, 1, -1])
def test_lines_of_metrics_that_are_gone_are_said(line, run, caplog, capsys):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    del lines[line]
    (run / "metrics.jsonl").write_text("".join(lines))
    assert main(["verify", str(run)]) == 1
    assert "metrics.jsonl: 1 line(s) are gone" in capsys.readouterr().out
    with caplog.at_level(logging.WARNING, "crosscode"):
        assert main(["report", str(run)]) == 0
    assert "1 line(s) of metrics.jsonl are gone" in caplog.text


def test_lines_that_are_gone_are_said_when_a_run_goes_on(run, caplog):
    for name in ("final", "checkpoints/step_8"):
        shutil.rmtree(run / name)
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[1:]))
    with caplog.at_level(logging.WARNING, "crosscode"):
        assert main(["train", "--resume", str(run)]) == 0
    assert "1 of the" in caplog.text and "are gone" in caplog.text


def test_a_config_of_another_run_is_said(runs, run, caplog, capsys):
    shutil.copy(runs / "1" / "config.yaml", run)
    with caplog.at_level(logging.WARNING, "crosscode"):
        assert main(["evaluate", str(run)]) == 0
    assert "config.yaml: seed is 1; the model was trained with 0" in caplog.text
