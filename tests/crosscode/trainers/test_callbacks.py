"""What callbacks give is logged, shown and reported; what they are told of."""

import pytest

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
    [({"loss": 1.0}, "'loss' is a figure of the trainer's own"), ({"mine": "high"}, "Gives gave 'mine' = 'high'")],
)
def test_figures_that_cannot_be_logged_are_refused(figures, message, make_trainer):
    with pytest.raises(InputError, match=message):
        make_trainer(n_steps=2, callbacks=[Gives(figures)]).train()
