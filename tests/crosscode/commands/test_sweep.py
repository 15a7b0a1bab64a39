"""Sweeps: several models on one stream of activations."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from crosscode.commands.cli import main
from crosscode.commands.parts.sweep_grid import grid_points, parse_grid
from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.errors import InputError
from crosscode.trainers.trainer import Trainer


def test_a_grid_is_every_combination_of_its_values(tiny_config):
    grid = parse_grid(["train.optimizer.lr=1e-3,0.01", "crosscoder.activation.k=2,4"])
    points = grid_points(tiny_config, grid)
    assert [point.label for point in points] == ["lr=0.001,k=2", "lr=0.001,k=4", "lr=0.01,k=2", "lr=0.01,k=4"]
    (one,) = grid_points(tiny_config, parse_grid(["train.batch_size=32"]))
    assert one.config.train.batch_size == 32 and one.label == "run"
    assert points[2].config.train.optimizer.lr == 0.01
    assert points[2].config.crosscoder.activation.k == 2
    assert points[2].config.run_path().parent == points[0].config.run_path().parent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no --grid"),
        (["train.optimizer.lr"], "expected FIELD=VALUE"),
        (["train.log_every=1", "train.log_every=2"], "twice"),
        (["train.batch_size=32,64"], "train.batch_size decides the activations"),
        (["crosscoder.activation.k=2,2"], "names the value 2 twice"),
        (["seed=1,2"], "seed decides the activations"),
        (["data.sequence_length=8,16"], "data decides the activations"),
        (["crosscoder.activation.k=0"], "crosscoder.activation.k"),
        (["crosscoder.activation.kk=3"], "did you mean 'k'"),
    ],
)
def test_a_bad_grid_is_one_line(options, message, tiny_config):
    with pytest.raises(InputError, match=message) as caught:
        grid_points(tiny_config, parse_grid(options))
    assert "\n" not in str(caught.value)


def test_every_run_of_a_sweep_is_what_train_gives_and_batches_are_harvested_once(
    tiny_config, tmp_path, capsys, monkeypatch
):
    torch.set_num_threads(1)
    tiny_config["evaluation"]["loss_recovered"] = "never"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_config))
    n_harvested = []
    harvest = ActivationHarvester.harvest

    def counted(self, tokens_HS, segments_HS=None):
        n_harvested.append(tokens_HS.shape[0])
        return harvest(self, tokens_HS, segments_HS)

    monkeypatch.setattr(ActivationHarvester, "harvest", counted)
    lr_grid = "train.optimizer.lr=0.01,0.002,0.0005"
    assert main(["sweep", str(config), "--grid", lr_grid, "--run-dir", str(tmp_path / "sweep")]) == 0
    together = len(n_harvested)
    shown = capsys.readouterr().out
    assert shown.count("FVU") == 3
    alone = tmp_path / "alone"
    n_harvested.clear()
    assert main(["train", str(config), "--train.optimizer.lr", "0.002", "--run_dir", str(alone)]) == 0
    in_sweep = tmp_path / "sweep" / "lr=0.002"

    def losses(run):
        return [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]

    assert losses(in_sweep) == losses(alone)
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (in_sweep, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert together < 3 * len(n_harvested)
    results = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [result["run"] for result in results] == ["lr=0.01", "lr=0.002", "lr=0.0005"]
    assert main(["sweep", str(config), "--grid", lr_grid, "--run-dir", str(tmp_path / "sweep")]) == 2
    assert "holds a sweep (3 of 3 runs done)" in capsys.readouterr().err
    assert main(["train", "--resume", str(in_sweep)]) == 0
    assert losses(in_sweep) == losses(alone)


def test_a_run_that_fails_leaves_the_others_alone(tiny_config, tmp_path, capfd):
    torch.set_num_threads(1)
    tiny_config["train"] |= {"clip_grad_norm": None, "log_every": 1}
    tiny_config["evaluation"]["loss_recovered"] = "never"
    tiny_config["objective"] = {"recon": {}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_config))
    grid = "objective.recon.weight=1.0,3e38"
    assert main(["sweep", str(config), "--grid", grid, "--run-dir", str(tmp_path / "sweep")]) == 1
    shown = capfd.readouterr()
    assert "some runs of the sweep failed" in shown.err
    good, bad = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert good["step"] == 10 and "error" not in good
    assert "is inf at step 0" in bad["error"]
    assert main(["sweep", "--resume", str(tmp_path / "sweep")]) == 1
    assert capfd.readouterr().out.count("failed") == 1


class Killed(BaseException):
    """Ends a sweep where it stands, as a kill does."""


def strike(monkeypatch, at_call, act):
    """`act` just before the update number `at_call`, counted over all runs of a sweep."""
    calls = []
    train_step = Trainer.train_step

    def struck(self, acts_BMPD):
        calls.append(self.step)
        if len(calls) == at_call:
            act()
        train_step(self, acts_BMPD)

    monkeypatch.setattr(Trainer, "train_step", struck)


def kill():
    raise Killed


GRID = ["--grid", "train.optimizer.lr=0.01,0.002", "--grid", "train.checkpoint_every=2,3"]


@pytest.fixture(scope="module")
def whole_sweep(tmp_path_factory):
    """Set by the first test that needs it: a sweep that nothing interrupted."""
    return tmp_path_factory.mktemp("whole") / "sweep"


def assert_same_runs(folder, expected):
    noise = ("time/", "memory/", "tokens_per_s", "elapsed_s")
    results = json.loads((folder / "sweep.json").read_text())
    assert len(results) == 4 and all(result["step"] == 10 for result in results)
    for run in sorted(path.name for path in expected.iterdir() if path.is_dir()):
        ours, theirs = (load_file(root / run / "final" / "model.safetensors") for root in (folder, expected))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        rows = [
            [
                {name: value for name, value in json.loads(line).items() if not name.startswith(noise)}
                for line in (root / run / "metrics.jsonl").read_text().splitlines()
            ]
            for root in (folder, expected)
        ]
        assert rows[0] == rows[1]


# Updates come in the order of the runs: 4 a batch. Checkpoints are at steps 2, 4, ... or 3, 6, ....
@pytest.mark.parametrize(
    ("at_call", "how"),
    [
        (3, "kill"),  # before any checkpoint
        (14, "kill"),  # in the fourth batch: two runs have step 2, two have step 3
        (23, "kill"),  # one of a pair has its newest checkpoint, the other does not
        (18, "sigterm"),
        (40, "sigterm"),  # the last update of the last run: none is finished yet
    ],
)
def test_an_interrupted_sweep_goes_on_as_if_nothing_had_happened(
    at_call, how, tiny_config, tmp_path, whole_sweep, monkeypatch, capfd
):
    torch.set_num_threads(1)
    tiny_config["evaluation"]["loss_recovered"] = "never"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_config))
    if not whole_sweep.exists():
        assert main(["sweep", str(config), *GRID, "--run-dir", str(whole_sweep)]) == 0
    folder = tmp_path / "sweep"
    arguments = ["sweep", str(config), *GRID, "--run-dir", str(folder)]
    with monkeypatch.context() as patch:
        if how == "kill":
            strike(patch, at_call, kill)
            with pytest.raises(Killed):
                main(arguments)
        else:
            strike(patch, at_call, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert main(arguments) == 75
            assert f"crosscode sweep --resume {folder}" in capfd.readouterr().err
    assert main(arguments) == 2
    assert "holds a sweep (0 of 4 runs done); go on with it by" in capfd.readouterr().err
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert main(["sweep", "--resume", str(moved)]) == 0
    assert_same_runs(moved, whole_sweep)
    capfd.readouterr()
    assert main(["sweep", "--resume", str(moved)]) == 0
    assert capfd.readouterr().out.count("FVU") == 4


def test_runs_that_are_done_are_left_alone_when_a_sweep_goes_on(tiny_config, tmp_path, monkeypatch, caplog):
    torch.set_num_threads(1)
    tiny_config["evaluation"]["loss_recovered"] = "never"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_config))
    folder = tmp_path / "sweep"
    finish, finished = Trainer.finish, []

    def struck(self):
        if len(finished) == 2:
            raise Killed
        finished.append(self)
        return finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "finish", struck)
        with pytest.raises(Killed):
            main(["sweep", str(config), *GRID, "--run-dir", str(folder)])
    before = [trainer.run.path / "final" / "model.safetensors" for trainer in finished]
    times = [path.stat().st_mtime_ns for path in before]
    assert main(["sweep", "--resume", str(folder)]) == 0
    assert "2 of 4 runs done, 2 to go on with" in caplog.text
    assert [path.stat().st_mtime_ns for path in before] == times
    assert [row["step"] for row in json.loads((folder / "sweep.json").read_text())] == [10] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere"], "holds no sweep"),
        (["demo", "--resume", "nowhere"], "usage: crosscode sweep --resume FOLDER"),
        ([], "name a config file"),
    ],
)
def test_a_sweep_that_cannot_be_resumed_says_so_in_one_line(arguments, message, capsys):
    assert main(["sweep", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
