"""Where metrics go: the file, wandb, tensorboard, histograms.

Axes: L latents · X crosscoding positions.
"""

import json
import resource
import sys
import types
from typing import ClassVar

import pytest
import torch

from crosscode.errors import InputError
from crosscode.runs.histograms import histogram, latent_histograms
from crosscode.runs.loggers import JsonlLogger, cut_rows
from crosscode.runs.loggers_extra import TensorboardLogger, WandbLogger


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_is_on_disk_at_once_and_is_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log({"step": 1, "loss": float("nan"), "fvu": float("inf"), "l0": 2.0, "eval/x": None})
    assert lines(path) == [{"step": 1, "loss": None, "fvu": None, "l0": 2.0, "eval/x": None}]
    assert "NaN" not in path.read_text()
    logger.close()


def test_rewinding_keeps_what_the_checkpoint_knew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    for step in (1, 2, 2, 3):
        logger.log({"step": step})
        logger.log_histograms(step, {})
    logger.rewind(2, 2)
    logger.log({"step": 2, "again": True})
    logger.close()
    assert lines(path) == [{"step": 1}, {"step": 2}, {"step": 2, "again": True}]
    assert [row["step"] for row in lines(tmp_path / "histograms.jsonl")] == [1, 2, 2]


def test_rows_that_a_full_disk_refuses_come_later_and_whole(tmp_path, small_files, caplog):
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log({"step": 1})
    small_files(20)
    for step in (2, 3, 4):
        logger.log({"step": step})
    assert path.stat().st_size == 20  # half a row is there
    assert caplog.text.count("rows are kept in memory") == 1
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    logger.log({"step": 5})
    logger.close()
    assert [row["step"] for row in lines(path)] == [1, 2, 3, 4, 5]


def test_cutting_a_file_that_is_not_there_makes_none(tmp_path):
    cut_rows(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


# ---- histograms


def test_a_histogram_counts_every_finite_value():
    values = torch.tensor([0.0, 0.5, 1.0, float("nan"), float("inf"), 7.0, -3.0])
    found = histogram(values, low=0.0, high=1.0)
    assert sum(found.counts) == 5
    assert found.counts[0] == 2 and found.counts[-1] == 2  # what lies outside counts at the ends
    assert found.edges[0] == 0 and found.edges[-1] == 1 and len(found.edges) == len(found.counts) + 1
    assert sum(histogram(torch.full((9,), 2.5)).counts) == 9
    assert sum(histogram(torch.empty(0)).counts) == 0


def test_histograms_of_a_training_run(make_trainer):
    objective = {"recon": {}, "tanh": {"weight": 0.1}, "pre_act": {}}
    activation = {"type": "jumprelu", "log_threshold_init": -1.0}
    trainer = make_trainer(activation=activation, objective=objective, n_steps=6, histogram_every=4)
    trainer.train()
    rows = lines(trainer.run.path / "histograms.jsonl")
    assert [row["step"] for row in rows] == [4, 6]
    for row in rows:
        assert set(row) == {"step", "log10_density", "decoder_norm", "threshold", "relative_norm"}
        assert all(sum(found["counts"]) == trainer.model.n_latents for name, found in row.items() if name != "step")


def test_the_density_is_that_of_the_tokens_since_the_last_histogram(make_trainer, planted):
    trainer = make_trainer(n_steps=50)
    trainer.start()
    batches = iter(planted())
    for _ in range(3):
        trainer.train_step(next(batches))
    trainer.firing.take_density_L()
    acts_BMPD = next(batches)
    expected_L = trainer.model.encode_latents(acts_BMPD).firing_counts_L() / acts_BMPD.shape[0]
    trainer.train_step(acts_BMPD)
    torch.testing.assert_close(trainer.firing.take_density_L(), expected_L.double(), rtol=1e-6, atol=0)
    assert float(trainer.firing.take_density_L().sum()) == 0


def test_relative_norm_points_at_the_second_position(make_trainer):
    model = make_trainer().model
    with torch.no_grad():
        model.W_dec_LXoDo[:, 0] = 0
    found = latent_histograms(model, torch.zeros(model.n_latents))["relative_norm"]
    assert found.counts[-1] == model.n_latents


# ---- extras


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.rows, self.inits, self.finished = [], [], False
        self.id = "abc123"

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished = True

    class Histogram:
        def __init__(self, np_histogram):
            self.counts, self.edges = np_histogram


def test_wandb_gets_rows_and_histograms_and_goes_on_in_the_same_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger = WandbLogger("project", "name", tmp_path, {"seed": 1})
    assert not fake.inits and not list(tmp_path.iterdir())
    logger.open()
    logger.log({"step": 5, "loss": 2.0})
    logger.log_histograms(5, {"decoder_norm": histogram(torch.arange(5.0))})
    logger.close()
    assert fake.rows[0] == (5, {"loss": 2.0})
    assert fake.rows[1][1]["histogram/decoder_norm"].counts.tolist() == histogram(torch.arange(5.0)).counts
    assert fake.finished
    logger = WandbLogger("project", "name", tmp_path, {"seed": 1})
    logger.open()
    logger.rewind(3, 1)
    assert [options["id"] for options in fake.inits] == [None, "abc123"]
    assert fake.inits[1]["resume"] == "allow"


class FakeWriter:
    made: ClassVar[list] = []

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.histograms = folder, purge_step, [], []
        FakeWriter.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_histogram_raw(self, name, **options):
        self.histograms.append((name, options))

    def close(self): ...


def test_tensorboard_gets_scalars_and_histograms_and_replaces_repeated_steps(tmp_path, monkeypatch):
    FakeWriter.made = []
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    logger = TensorboardLogger(tmp_path)
    assert not FakeWriter.made
    logger.open()
    logger.log({"step": 5, "loss": 2.0, "name": "x", "eval/none": None})
    logger.log_histograms(5, {"decoder_norm": histogram(torch.arange(5.0))})
    logger.rewind(3, 1)
    first, second = FakeWriter.made
    assert first.scalars == [("loss", 2.0, 5)]
    ((name, options),) = first.histograms
    assert name == "histogram/decoder_norm" and options["num"] == 5 and options["global_step"] == 5
    assert second.purge_step == 4


@pytest.mark.parametrize(("module", "field"), [("wandb", "train.wandb_project"), ("tensorboard", "train.tensorboard")])
def test_an_extra_that_is_not_installed_says_how_to_install_it(module, field, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=rf"{field} = .*pip install 'crosscode\[{module}\]'"):
        if module == "wandb":
            WandbLogger("project", "name", tmp_path, {})
        else:
            TensorboardLogger(tmp_path)


def test_logged_rows_say_where_the_time_goes_and_how_much_memory_is_used(make_trainer, rows_of):
    trainer = make_trainer(n_steps=4, log_every=2)
    trainer.train()
    for row in rows_of(trainer):
        assert row["time/harvest_ms"] > 0 and row["time/step_ms"] > 0 and row["memory/process_peak_gib"] > 0
        assert row["tokens_per_s"] > 0
