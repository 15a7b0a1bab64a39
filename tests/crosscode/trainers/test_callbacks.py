"""What callbacks give is logged, shown and reported; what they are told of."""

import pytest
import torch

from crosscode.analysis.report import write_report
from crosscode.errors import InputError
from crosscode.evaluation.heldout import measure_reconstruction
from crosscode.trainers.callbacks import Callback


class Watch(Callback):
    def __init__(self):
        self.calls = []

    def on_start(self, trainer):
        assert trainer.run.config_file.is_file()
        self.calls.append(("start", trainer.step))

    def on_step(self, trainer):
        self.calls.append(("step", trainer.step))
        return {"bias_norm": trainer.model.b_dec_XoDo.norm()}

    def on_evaluate(self, trainer, evaluation):
        self.calls.append(("evaluate", trainer.step))
        return {"l0_twice": 2 * evaluation.l0}

    def on_checkpoint(self, trainer, folder):
        assert (folder / "model.safetensors").is_file()
        self.calls.append((folder.name, trainer.step))


@pytest.fixture
def watched(make_trainer, planted):
    def make(watch, **settings):
        def evaluate(model, scaling_MP):
            raw = [acts_BMPD / planted().scaling_MP[..., None] for acts_BMPD in planted(n_batches=1)]
            return measure_reconstruction(model, raw, trainer.split, ["x0", "x1"], scaling_MP)

        trainer = make_trainer(n_steps=4, evaluate=evaluate, evaluate_every=2, callbacks=[watch], **settings)
        return trainer

    return make


def test_callbacks_are_told_of_everything_in_order(watched):
    watch = Watch()
    watched(watch, checkpoint_every=2).train()
    assert watch.calls == [
        ("start", 0), ("step", 1), ("step", 2), ("evaluate", 2), ("step_2", 2), ("step", 3), ("step", 4), ("step_4", 4),
        ("final", 4), ("evaluate", 4),
    ]  # fmt: skip


def test_figures_stand_in_metrics_summary_progress_and_report(watched, rows_of, capsys):
    trainer = watched(Watch(), log_every=2)
    trainer.progress.enabled = True
    trainer.train()
    rows = rows_of(trainer)
    assert [row["step"] for row in rows if "bias_norm" in row] == [2, 4]
    assert [row["l0_twice"] == 2 * row["eval/l0"] for row in rows if "l0_twice" in row] == [True, True]
    last = rows[-2]
    assert trainer.run.read_summary()["callbacks"]["bias_norm"] == last["bias_norm"] > 0
    before = next(row for row in rows if row["step"] == 2)
    assert f"bias_norm {before['bias_norm']:.4g}" in capsys.readouterr().err
    page = write_report(trainer.run.path).read_text()
    assert "bias_norm, as a callback gave it." in page


class Gives(Callback):
    def __init__(self, figures):
        self.figures = figures

    def on_step(self, trainer):
        return self.figures


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"loss": 1.0}, "'loss' is a figure of the trainer's own"),
        ({"mine": "high"}, "Gives gave 'mine' = 'high'"),
        ({"mine": torch.ones(2)}, "must be a number"),
        ({"mine": "3"}, "Gives gave 'mine' = '3': must be a number"),
        ({3: 1.0}, "Gives gave a figure the name 3"),
        (2.0, "Gives gave 2.0: must be figures by name"),
    ],
)
def test_figures_that_cannot_be_logged_are_refused_and_the_run_is_saved(figures, message, make_trainer, rows_of):
    trainer = make_trainer(n_steps=9, callbacks=[Gives(figures)])
    with pytest.raises(InputError, match=message):
        trainer.train()
    assert trainer.step == 1 and trainer.checkpoints.newest_whole() == 1
    assert [row["step"] for row in rows_of(trainer)] == [1] and "mine" not in rows_of(trainer)[0]


def test_two_callbacks_do_not_share_a_name(make_trainer):
    with pytest.raises(InputError, match="Gives gave 'mine', as Gives did"):
        make_trainer(n_steps=2, callbacks=[Gives({"mine": 1.0}), Gives({"mine": 2.0})]).train()


def test_a_figure_with_the_name_of_a_held_out_one_is_found_at_the_first_evaluation(watched):
    trainer = watched(Gives({"eval/l0": 3.0}))
    with pytest.raises(InputError, match="'eval/l0' is a figure of the trainer's own"):
        trainer.train()
    assert trainer.step == 2 and trainer.checkpoints.newest_whole() == 2


def test_a_figure_that_is_not_finite_is_null(make_trainer, rows_of):
    trainer = make_trainer(n_steps=2, callbacks=[Gives({"mine": torch.tensor(float("inf"))})])
    trainer.train()
    assert [row["mine"] for row in rows_of(trainer)] == [None, None]


class Fails(Callback):
    """In one method, at one step."""

    def __init__(self, method, step, error=ZeroDivisionError):
        self.method, self.at, self.error = method, step, error

    def _maybe(self, method, trainer):
        if (method, trainer.step) == (self.method, self.at):
            raise self.error("mine")

    def on_step(self, trainer):
        self._maybe("on_step", trainer)

    def on_evaluate(self, trainer, evaluation):
        self._maybe("on_evaluate", trainer)

    def on_checkpoint(self, trainer, folder):
        self._maybe("on_checkpoint", trainer)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(("method", "step"), [("on_step", 1), ("on_evaluate", 2), ("on_checkpoint", 2)])
def test_where_a_callback_raises_the_run_is_saved(method, step, error, watched):
    broken = watched(Fails(method, step, error), checkpoint_every=2, log_every=1)
    with pytest.raises(error, match="mine") as raised:
        broken.train()
    assert f"the run is saved after step {step}" in raised.value.__notes__[0] and broken.step == step
    assert broken.checkpoints.newest_whole() == step and broken.metrics.last["step"] == step


@pytest.mark.parametrize("method", ["on_evaluate", "on_checkpoint"])
def test_a_callback_that_raises_at_the_end_costs_nothing(method, watched):
    trainer = watched(Fails(method, 4))
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.run.is_finished() and trainer.run.read_summary()["step"] == 4


@pytest.mark.parametrize("given", [Watch(), [Watch], [lambda trainer: None], "watch"])
def test_what_is_no_callback_is_refused_at_once(given, make_trainer):
    with pytest.raises(InputError, match=r"callbacks.*must be .*crosscode\.Callback"):
        make_trainer(n_steps=2, callbacks=given)
