"""Steps that are captured and replayed are those of the trainer to the bit, with a stand-in for CUDA graphs that is as blind as
they are; what a graph cannot do is not done by one, and said."""

from __future__ import annotations

import logging
import sys
from itertools import islice
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from graph_double import GraphDouble
from tiny_recipes import BATCH
from tiny_recipes import make_trainer as make_tiny
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.objectives.base import LossTerm
from crosscode.recipes import recipe_names
from crosscode.trainers import graphs
from crosscode.trainers.callbacks import Callback
from crosscode.trainers.faults import NonFiniteLoss
from crosscode.trainers.graphs import N_WARM_UP, StepGraphs, why_not

N_STEPS = 9
ON_DEVICE = {"type": "adam", "lr": 0.01, "lr_on_device": True}
ROWS = {"type": "adam", "betas": (0.0, 0.9), "row_sparse": True}
FEW = ("demo_tuned", "matryoshka_clt", "wanted_l0_sae", "dedicated_feature_crosscoder", "feb_update_diffing_topk")


def state_of(trainer) -> dict[str, Any]:
    """All that a step changes, and goes on from."""
    return {
        "model": trainer.model.state_dict(),
        "buffers": dict(trainer.model.named_buffers()),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "firing": trainer.firing.state_dict(),
        "guard": {name: value for name, value in vars(trainer.guard).items() if isinstance(value, Tensor)},
        "objective": trainer.objective.state_dict(),
    }


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in row.items() if not key.startswith(("time/", "memory/", "tokens_per", "elapsed"))
    }


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The torch backend as it goes there, where looking at the data would wait."""
    for module in [module for name, module in sys.modules.items() if name.startswith("crosscode_kernels")]:
        if hasattr(module, "may_look"):
            monkeypatch.setattr(module, "may_look", lambda x_BI: False)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.soak) for n in recipe_names()])
def test_steps_of_recipes_are_replayed_to_the_bit(name, as_on_a_gpu, tmp_path):
    torch.set_num_threads(1)
    found = []
    for captures in (False, True):
        train: dict[str, Any] = {"n_tokens": N_STEPS * BATCH, "log_every": 7}
        trainer = make_tiny(name, tmp_path / "0", "torch", "cpu", train=train)
        if reason := why_not(trainer.forward, trainer.constraints, trainer.optimizer_plan):
            assert reason in ("train.optimizer SignSGDScheduleFree", "train.optimizer Adam")
            return
        train["optimizer"] = {"lr_on_device": True}
        trainer, rows, double = (
            make_tiny(name, tmp_path / str(captures), "torch", "cpu", train=train),
            [],
            GraphDouble(),
        )
        trainer.config, trainer.metrics.log = trainer.config.model_copy(update={"log_every": 7}), rows.append
        if captures:
            trainer.graphs = StepGraphs(trainer.update, trainer.split, double)
        trainer.start()
        for acts_BMPD in islice(trainer.data, N_STEPS):
            trainer.train_step(acts_BMPD)
        found.append((state_of(trainer), [timeless(row) for row in rows]))
    assert double.n_replays >= N_STEPS - 2 - 2 * N_WARM_UP and len(found[0][1]) == 2
    assert_same(*found)


@pytest.fixture
def both(make_trainer, rows_of, caplog):
    """Trains eagerly and through the stand-in; asserts that nothing differs; the latter's events and what was said."""

    def run(**settings):
        settings = {"log_every": 50, "optimizer": ON_DEVICE, "n_steps": 12} | settings
        made = {key: settings.pop(key) for key in ("callbacks", "data") if key in settings}
        found, double = [], GraphDouble()
        with caplog.at_level(logging.INFO, logger="crosscode"):
            for name, capture in (("eager", None), ("captured", double)):
                fresh = {key: make() for key, make in made.items()}
                trainer = make_trainer(name, capture=capture, **fresh, **settings)
                trainer.train()
                found.append((state_of(trainer), [timeless(row) for row in rows_of(trainer)]))
        assert_same(*found)
        said = [record.getMessage() for record in caplog.records if "cuda_graph" in record.getMessage()]
        return double.events, said

    return run


@pytest.mark.parametrize("model", ["relu", "jumprelu"])
def test_schedules_and_controllers_go_on_between_replays(model, both, as_on_a_gpu):
    ramp = {"type": "linear_ramp", "value": 2.0, "ramp_steps": 8}
    penalty = {"relu": "l1", "jumprelu": "tanh"}[model]
    objective = {"recon": {}, penalty: {"weight": ramp, "target_l0": 3.0}}
    events, said = both(activation={"type": model}, objective=objective, log_every=5)
    assert events == ["aside"] * 3 + ["capture"] + ["replay"] * (12 - 3 - 3) and not said


@pytest.mark.parametrize("activation", [{"type": "batch_topk", "k": 3}, {"type": "groupmax", "k": 4}])
def test_running_statistics_go_on(activation, both, as_on_a_gpu):
    events, _ = both(activation=activation, objective={"recon": {"normalise": True}})
    assert events.count("replay") == 12 - 3 - 1


def test_what_may_be_dead_from_some_step_on_is_another_graph(both, as_on_a_gpu):
    objective = {"recon": {}, "auxk": {"k_aux": 8, "dead_after_tokens": 6 * 32}}
    events, said = both(activation={"type": "topk", "k": 1}, objective=objective, n_steps=14)
    assert events.count("capture") == 2 and events.count("replay") == 13 - 6 and not said


def test_while_k_falls_nothing_is_captured(both, as_on_a_gpu):
    activation = {"type": "topk", "k": 2, "k_start": 6, "k_anneal_fraction": 0.4}
    events, said = both(activation=activation)
    assert events == ["aside"] * 3 + ["capture"] + ["replay"] * 3
    assert said == ["train.cuda_graph: steps are not captured while crosscoder.activation.k_start falls to k"]


def test_a_batch_of_another_size_is_a_step_of_its_own(both, as_on_a_gpu, planted):
    class Ragged:
        def __init__(self) -> None:
            self.whole = planted()
            self.scaling_MP, self.dims, self.device = self.whole.scaling_MP, self.whole.dims, self.whole.device

        def __iter__(self):
            for number, acts_BMPD in enumerate(self.whole):
                yield acts_BMPD[:5] if number in (6, 8) else acts_BMPD

    events, said = both(data=Ragged)
    assert events.count("replay") == 12 - 3 - 1 - 2
    assert said == ["train.cuda_graph: steps are not captured of batches of another size, such as 5"]


class Meddler(Callback):
    """Changes weights at a step."""

    def on_step(self, trainer):
        if trainer.step == 6:
            with torch.no_grad():
                trainer.model.W_enc_LXiDi.mul_(1.5)


def test_weights_that_something_else_changed_are_captured_anew(both, as_on_a_gpu):
    events, _ = both(callbacks=lambda: [Meddler()])
    assert events == (["aside"] * 3 + ["capture"] + ["replay"] * 3) + (["aside"] * 3 + ["capture"] + ["replay"] * 2)


def test_resampling_goes_on(both, as_on_a_gpu):
    events, _ = both(resample={"every": 6, "dead_after_tokens": 32}, activation={"type": "topk", "k": 1}, n_steps=14)
    assert events.count("capture") == 2


def test_what_cannot_be_captured_runs_on_and_says_so(both):
    objective = {"recon": {}, "auxk": {"k_aux": 8, "dead_after_tokens": 1}}
    events, said = both(activation={"type": "topk", "k": 1}, objective=objective)
    assert events == ["aside"] * 3 + ["capture"]
    assert said == [
        "train.cuda_graph: the step cannot be captured (operation not permitted when stream is capturing: "
        "aten.nonzero.default): the run goes on without"
    ]


def test_the_guard_knows_the_step_of_a_replay(make_trainer, planted, as_on_a_gpu):
    trainer = make_trainer(
        capture=GraphDouble(), data=planted(poison={8: float("nan")}), log_every=50, optimizer=ON_DEVICE, n_steps=12
    )
    with pytest.raises(NonFiniteLoss, match="at step 8"):
        trainer.train()


def test_a_run_goes_on_to_the_bit(make_trainer, as_on_a_gpu):
    settings = {"log_every": 50, "optimizer": ON_DEVICE, "checkpoint_every": 6, "keep_last": 3, "n_steps": 14}
    settings |= {"objective": {"recon": {}, "l1": {"target_l0": 3.0}}, "activation": {"type": "relu"}}
    whole = make_trainer("whole", capture=GraphDouble(), **settings)
    whole.train()
    again = make_trainer("whole", capture=(double := GraphDouble()), **settings)
    again.restore(6)
    again.train()
    assert double.n_captures == 1 and double.n_replays == 14 - 6 - 3 - 1
    assert_same(state_of(whole), state_of(again))


# ---- what is known not to be captured


class Counting(LossTerm):
    """Reads a number that changes in Python."""

    class Config(ConfigModel):
        weight: float = 1.0

    def setup(self) -> None:
        self.n_calls = 0

    def __call__(self, context):
        return context.recon.loss * (1 + self.n_calls)

    def after_step(self, l0, step, n_steps):
        self.n_calls += 1


class SaysItCan(Counting):
    capturable = True


def with_term(trainer, term):
    trainer.objective.terms["own"] = (term, lambda step, n_steps: 1.0)


@pytest.mark.parametrize(("term", "reason"), [(Counting, "objective.own"), (SaysItCan, None)])
def test_terms_of_others_must_say_that_they_can(term, reason, make_trainer, as_on_a_gpu):
    found = []
    for name, captures in (("eager", False), ("captured", True)):
        trainer = make_trainer(name, optimizer=ON_DEVICE, log_every=50)
        with_term(trainer, term())
        assert why_not(trainer.forward, trainer.constraints, trainer.optimizer_plan) == reason
        if captures:
            trainer.graphs = StepGraphs(trainer.update, trainer.split, GraphDouble())
        trainer.train()
        found.append(state_of(trainer))
    with pytest.raises(AssertionError):  # as it says so wrongly: the stand-in sees it
        assert_same(*found)


class Inherits(SaysItCan):
    """Says nothing of itself."""


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"grad_accumulation": 2}, "train.grad_accumulation = 2"),
        ({"compile": True}, "train.compile = True"),
        ({"optimizer": {"type": "sign_sgd_schedule_free"}}, "train.optimizer SignSGDScheduleFree"),
        ({"optimizer": ROWS, "backend": "torch:rows"}, "train.optimizer Adam"),
        ({"log_every": 1}, "train.log_every = 1, and a step whose figures are logged never is"),
    ],
)
def test_runs_without_graphs_are_named(settings, reason, make_trainer, caplog):
    trainer = make_trainer(capture=GraphDouble(), **{"log_every": 50} | settings)
    assert trainer.graphs is None and not trainer.optimizer_plan.lr_on_device
    assert [record.getMessage() for record in caplog.records] == [
        f"train.cuda_graph: no step of this run is captured: {reason}"
    ]


def test_a_subclass_inherits_no_promise(make_trainer):
    trainer = make_trainer(log_every=50)
    with_term(trainer, Inherits())
    assert why_not(trainer.forward, trainer.constraints, trainer.optimizer_plan) == "objective.own"


def test_sampled_prefixes_are_not_captured(make_trainer):
    objective = {"recon": {}, "matryoshka": {"sampled": 2}}
    trainer = make_trainer(objective=objective, model_options={"prefixes": [0.5]}, capture=GraphDouble(), log_every=50)
    assert trainer.graphs is None


def test_the_learning_rate_lies_on_the_device_where_steps_are_captured(make_trainer):
    trainer = make_trainer(capture=GraphDouble(), log_every=50)
    assert all(isinstance(group["lr"], Tensor) for group in trainer.optimizer.param_groups)


# ---- the device


def test_without_cuda_it_is_refused(make_trainer):
    with pytest.raises(InputError, match=r"train.cuda_graph = True: needs a CUDA device, got 'cpu'; set") as error:
        make_trainer(cuda_graph=True)
    assert "\n" not in str(error.value)
    assert make_trainer(cuda_graph="auto").graphs is None


def test_torch_cuda_has_what_is_asked_of_it(monkeypatch):
    cuda = create_autospec(torch.cuda)
    monkeypatch.setattr(graphs, "cuda", cuda)
    capture, calls = graphs.CudaCapture(torch.device("cuda")), []
    assert capture.aside(lambda: calls.append(1) or 7) == 7
    cuda.stream.assert_called_with(capture.stream)
    cuda.current_stream.return_value.wait_stream.assert_called_with(capture.stream)
    assert capture.capture(lambda: 8) == (8, cuda.CUDAGraph.return_value.replay)
    cuda.graph.assert_called_with(cuda.CUDAGraph.return_value, stream=capture.stream, capture_error_mode="thread_local")
