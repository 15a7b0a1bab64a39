"""What a Python user gets of `Trainer.train()` alone."""

import pytest
import torch

from crosscode.config.experiment import TrainConfig
from crosscode.evaluation.heldout import measure_reconstruction


def test_training_writes_the_summary(make_trainer, rows_of):
    trainer = make_trainer(n_steps=6, activation={"type": "topk", "k": 4})
    assert trainer.train() is None
    summary, last = trainer.run.read_summary(), rows_of(trainer)[-1]
    assert (summary["step"], summary["tokens"], summary["l0"]) == (6, 6 * 32, 4)
    assert summary["figures_from"] == "last training batch"
    assert summary["loss"] == last["loss"] and summary["fvu_by_position"] == {
        "x0": last["fvu/x0"],
        "x1": last["fvu/x1"],
    }
    assert summary["tokens_per_s"] == pytest.approx(summary["tokens"] / summary["wall_s"])
    assert (summary["backend"], summary["device"]) == ("torch", "cpu")


def test_the_summary_holds_held_out_figures_where_there_are_some(make_trainer, planted):
    def evaluate(model, scaling_MP):
        raw = [acts_BMPD / planted().scaling_MP[..., None] for acts_BMPD in planted(n_batches=2)]
        return measure_reconstruction(model, raw, trainer.split, ["x0", "x1"], scaling_MP)

    trainer = make_trainer(n_steps=4, evaluate=evaluate, evaluate_every=2)
    evaluation = trainer.train()
    summary = trainer.run.read_summary()
    assert summary["figures_from"] == "held-out data"
    assert (summary["fvu"], summary["l0"]) == (evaluation.fvu, evaluation.l0)
    assert summary["fvu_by_position"] == evaluation.fvu_by_position


@pytest.mark.parametrize("n_parts", [1, 2])
def test_tokens_and_batch_size_give_the_number_of_steps(n_parts, make_trainer):
    assert TrainConfig(n_tokens=100, batch_size=32).n_steps == 3
    trainer = make_trainer(n_steps=None, n_tokens=100, batch_size=32, grad_accumulation=n_parts)
    trainer.train()
    assert trainer.step == trainer.run.read_summary()["step"] == 3


def test_memory_kept_from_step_to_step_is_given_back_after_training(make_trainer):
    from crosscode_kernels import host_buffers

    host_buffers.empty((1 << 12, 1 << 11), like=torch.empty(0))
    assert host_buffers.n_bytes() > 0
    make_trainer(n_steps=2).train()
    assert host_buffers.n_bytes() == 0
