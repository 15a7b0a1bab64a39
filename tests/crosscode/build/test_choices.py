"""Variants that are tried out when a run begins: what is chosen, where it is written, and that it stays."""

from __future__ import annotations

import logging
import time

import pytest
import torch
import yaml
from graph_double import GraphDouble

from crosscode.build import choices
from crosscode.build.choices import crossing, with_choices
from crosscode.build.experiment import backend_of, open_experiment
from crosscode.build.resume import ResumePoint
from crosscode.build.run import build_trainer
from crosscode.build.schema import check_config, load_config
from crosscode.errors import InputError

ROWS = {"type": "adam", "lr": 0.01, "betas": [0.0, 0.99], "row_sparse": "auto"}


@pytest.fixture
def config(tiny_config):
    """A checked config of the tiny run that leaves the backend open, with fields changed."""

    def make(activation="topk", **changes):
        values = tiny_config | {"backend": "auto"} | changes
        values["crosscoder"] = values["crosscoder"] | {"n_latents": 512, "activation": {"type": activation}}
        if activation in ("topk", "batch_topk"):
            values["crosscoder"]["activation"]["k"] = 4
        else:
            values["objective"] = {"recon": {}, "l1": {"weight": 1.0}}
        return check_config(values)

    return make


@pytest.fixture
def timed(monkeypatch):
    """At any size the variants are tried, and take the given seconds."""

    def set_times(**seconds):
        monkeypatch.setattr(choices, "WORTH_TRYING", 0)
        monkeypatch.setattr(choices, "faster", lambda what, variants, *_, **__: {v: seconds[_key(v)] for v in variants})

    return set_times


def _key(variant):
    return variant.replace(":", "_").replace(" ", "_").replace("-", "_")


@pytest.mark.parametrize(("screened", "chosen"), [(0.9, "torch:screened"), (0.98, "torch"), (1.5, "torch")])
def test_a_variant_must_be_clearly_faster(screened, chosen, config, timed, caplog):
    timed(torch=1.0, torch_screened=screened)
    with caplog.at_level(logging.INFO, logger="crosscode"):
        found = with_choices(config(), 16)
    assert found.backend == chosen and str(backend_of(found)) == chosen
    assert f"backend auto: {chosen}" in caplog.text


def test_what_the_config_says_is_not_tried(config, timed):
    timed()  # to look up a time would raise
    for pinned in (
        config(backend="torch"),
        config(backend="reference"),
        config("batch_topk"),
        config("relu", sparse_below=0.1),
    ):
        assert with_choices(pinned, 16) == pinned


def test_small_runs_are_not_tried(config):
    assert with_choices(config(), 16) == config()


def test_density_at_which_sparse_products_pay():
    assert crossing(2.0, [(0.01, 1.0), (0.03, 2.0)]) == 0.03
    assert crossing(1.5, [(0.01, 1.0), (0.03, 2.0)]) == 0.02
    assert crossing(0.4, [(0.01, 1.0), (0.03, 2.0)]) == 0.0
    assert crossing(50.0, [(0.01, 1.0), (0.03, 2.0)]) == choices.MOST
    assert crossing(2.0, [(0.01, 1.5), (0.03, 1.4)]) == choices.MOST
    assert crossing(1.0, [(0.01, 1.5), (0.03, 1.4)]) == 0.0


@pytest.mark.parametrize(("rows", "chosen"), [(0.5, True), (0.99, False)])
def test_row_sparse_adam_is_chosen_where_it_is_faster(rows, chosen, config, timed, tiny_config):
    timed(torch=1.0, torch_screened=2.0, fused_Adam=1.0, row_sparse_Adam=rows)
    found = with_choices(config(train=tiny_config["train"] | {"optimizer": ROWS}), 16)
    assert found.train.optimizer.row_sparse is chosen
    assert backend_of(found).options == (("rows",) if chosen else ())


def test_row_sparse_adam_is_not_tried_where_it_cannot_be(config, timed, tiny_config):
    timed()
    train = tiny_config["train"] | {"optimizer": ROWS}
    for one in (config(train=train, backend="reference"), config("relu", train=train, sparse_below=0.1)):
        assert with_choices(one, 16).train.optimizer.row_sparse is False


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_trials_run_and_leave_the_generator_alone(activation, config, monkeypatch, tiny_config):
    monkeypatch.setattr(choices, "WORTH_TRYING", 0)
    state = torch.get_rng_state()
    found = with_choices(config(activation, train=tiny_config["train"] | {"optimizer": ROWS}), 16)
    assert torch.equal(torch.get_rng_state(), state)
    if activation == "topk":
        assert found.backend in ("torch", "torch:screened") and found.train.optimizer.row_sparse in (True, False)
    else:
        assert 0 <= found.sparse_below <= choices.MOST
        assert backend_of(found).sparse_below == found.sparse_below


def test_a_run_keeps_its_choices_and_its_config_repeats_it_to_the_bit(config, timed, monkeypatch, tmp_path):
    timed(torch=1.0, torch_screened=0.5)
    first = build_trainer(open_experiment(config()), progress=False)
    first.train()
    run_dir = first.run.path
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["backend"] == "torch:screened"
    timed()  # nothing is tried from here on
    point = ResumePoint.find(run_dir)
    resumed = build_trainer(open_experiment(point.config), resume=point, progress=False)
    assert str(resumed.model.backend) == "torch:screened"
    assert resumed.metadata["config"]["backend"] == "torch:screened"
    again = load_config(run_dir / "config.yaml").model_copy(update={"run_dir": str(tmp_path / "again")})
    second = build_trainer(open_experiment(again), progress=False)
    second.train()
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def tried(config, tiny_config):
    """Whether the step of the run is captured after a trial, and what the trial did."""

    def run(activation="relu", backend="reference", **train):
        made = config(activation, backend=backend, train=tiny_config["train"] | {"log_every": 50} | train)
        double = GraphDouble()
        return choices.captured(made, 16, torch.device("cpu"), double, time.perf_counter), double.events

    return run


@pytest.mark.parametrize(("replayed", "chosen"), [(0.5, True), (0.98, False)])
@pytest.mark.parametrize("activation", ["batch_topk", "relu", "jumprelu"])
def test_a_step_is_captured_where_that_is_clearly_faster(activation, replayed, chosen, tried, timed):
    timed(launched=1.0, as_a_CUDA_graph=replayed)
    found, events = tried(activation)
    waits = activation == "batch_topk"  # that of the reference waits for a value
    assert found == (chosen and not waits)
    assert events == ["aside"] * 3 + ["capture"] + ([] if waits else ["replay"])


def test_a_trial_of_a_graph_runs_the_steps_of_the_run_both_ways(tried, monkeypatch, caplog):
    steps, rates = [], []
    update = choices.Update.__call__

    def counted(self, *args):
        steps.append(self.optimizer.param_groups[0]["betas"])
        rates.append(self.optimizer.param_groups[0]["lr"])
        return update(self, *args)

    monkeypatch.setattr(choices.Update, "__call__", counted)
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="crosscode"):
        found, events = tried(optimizer={"type": "adam", "lr": 0.125, "betas": [0.5, 0.75]})
    assert isinstance(found, bool) and torch.equal(torch.get_rng_state(), state)
    assert events == ["aside"] * 3 + ["capture"] + ["replay"] * 7 and steps == [(0.5, 0.75)] * 10
    assert "launched" in caplog.text and all(isinstance(lr, torch.Tensor) and lr == 0.125 for lr in rates)


def test_a_step_that_cannot_be_captured_is_not_tried(tried, caplog):
    with caplog.at_level(logging.INFO, logger="crosscode"):
        assert tried(grad_accumulation=2) == (False, [])
    assert "train.cuda_graph auto: not tried: train.grad_accumulation = 2" in caplog.text


def test_nothing_is_captured_without_a_gpu(config, tiny_config, caplog):
    with caplog.at_level(logging.INFO, logger="crosscode"):
        found = with_choices(config(train=tiny_config["train"] | {"cuda_graph": "auto"}), 16)
    assert found.train.cuda_graph is False and "train.cuda_graph auto: False" in caplog.text


def test_a_graph_that_was_asked_for_is_refused_before_anything_is_loaded(config, tiny_config):
    asked = config(train=tiny_config["train"] | {"cuda_graph": True}, device="cpu")
    with pytest.raises(InputError, match=r"train.cuda_graph = True: needs a CUDA device, got 'cpu'"):
        open_experiment(asked)
