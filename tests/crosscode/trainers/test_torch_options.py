"""Options of the torch backend change time and memory, never results: screened encode and row-sparse Adam."""

from __future__ import annotations

import json

import pytest
import torch
from crosscode_kernels import Backend

from crosscode.build.experiment import open_experiment
from crosscode.build.resume import ResumePoint
from crosscode.build.run import build_trainer
from crosscode.build.schema import check_config
from crosscode.errors import InputError
from crosscode.models.activations import TopkActivation
from crosscode.models.sae_or_transcoder import SAEOrTranscoder

ROWS = {"type": "adam", "lr": 0.01, "betas": [0.0, 0.99], "row_sparse": True}
DENSE = {**ROWS, "row_sparse": False}


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture
def train(tiny_config, tmp_path):
    """Trains the tiny config with some fields changed; returns the losses and the trainer."""

    def run(name, **changes):
        values = {**tiny_config, "run_dir": str(tmp_path / name)}
        for path, value in changes.items():
            *parents, field = path.split("__")
            node = values
            for parent in parents:
                node[parent] = node = dict(node[parent])
            node[field] = value
        trainer = build_trainer(open_experiment(check_config(values)), progress=False)
        trainer.train()
        return losses(tmp_path / name), trainer

    return run


@pytest.mark.parametrize("accumulation", [1, 2])
def test_row_sparse_adam_gives_the_losses_of_adam(train, accumulation):
    changes = {"train__log_every": 1, "train__grad_accumulation": accumulation}
    dense, _ = train("dense", train__optimizer=DENSE, **changes)
    rows, trainer = train("rows", train__optimizer=ROWS, **changes)
    assert len(rows) == 10
    assert rows == pytest.approx(dense, rel=1e-5)
    assert rows[-1] < rows[0]
    assert type(trainer.optimizer).__name__ == "RowSparseAdam"
    names = {tuple(state) for state in trainer.optimizer.state.values()}
    assert ("step", "exp_avg_sq", "last_step_R") in names


def test_gradients_of_touched_rows_only_reach_the_parameters():
    activation = TopkActivation(k=2, n_latents=64)
    model = SAEOrTranscoder(8, 8, 64, activation, backend="torch:rows")
    for param in model.parameters():
        torch.nn.init.normal_(param)
    result = model.forward_train(torch.randn(3, 8))
    result.recon_loss(torch.randn(3, 8)).loss.backward()
    touched = result.latents.latent_idx_N.unique()
    for weight in (model.W_enc_LXiDi, model.W_dec_LXoDo):
        assert weight.grad.is_sparse
        assert torch.equal(weight.grad.coalesce().indices()[0], touched)


def test_the_steps_of_rows_survive_a_checkpoint(train, tmp_path):
    _, trained = train("whole", train__optimizer=ROWS)
    point = ResumePoint.find(tmp_path / "whole")
    trainer = build_trainer(open_experiment(point.config), resume=point, progress=False)
    states = [list(t.optimizer.state.values()) for t in (trained, trainer)]
    for before, after in zip(*states, strict=True):
        if "last_step_R" in before:
            assert after["last_step_R"].dtype == torch.int32
            assert torch.equal(after["last_step_R"], before["last_step_R"])
            assert before["last_step_R"].max() == 10


def test_screened_encode_gives_the_losses_without_it(train):
    changes = {"crosscoder__n_latents": 256, "crosscoder__activation": {"type": "topk", "k": 4}, "train__log_every": 1}
    plain, _ = train("plain", **changes)
    screened, trainer = train("screened", backend="torch:screened", **changes)
    assert trainer.model.ops.backend == Backend("torch", ("screened",))
    assert screened == pytest.approx(plain, rel=1e-5)


def test_both_together(train):
    changes = {"crosscoder__n_latents": 256, "train__log_every": 1}
    plain, _ = train("plain", train__optimizer=DENSE, **changes)
    both, trainer = train("both", backend="torch:screened", train__optimizer=ROWS, **changes)
    assert trainer.model.ops.backend == Backend("torch", ("screened", "rows"))
    assert both == pytest.approx(plain, rel=1e-5)


def test_a_learning_rate_on_the_device_is_the_same_one_and_survives_a_checkpoint(train, tmp_path):
    own = {"type": "adam", "lr": 0.01}
    plain, _ = train("plain", train__optimizer=own, train__log_every=1)
    on_device, trainer = train("on_device", train__optimizer={**own, "lr_on_device": True}, train__log_every=1)
    assert on_device == pytest.approx(plain, rel=1e-5)
    assert all(isinstance(group["lr"], torch.Tensor) for group in trainer.optimizer.param_groups)
    point = ResumePoint.find(tmp_path / "on_device")
    resumed = build_trainer(open_experiment(point.config), resume=point, progress=False)
    resumed.optimizer_plan.set_learning_rate(resumed.optimizer, 0, 10)
    assert all(group["lr"].device == resumed.model.device for group in resumed.optimizer.param_groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": {"optimizer": {**ROWS, "betas": [0.9, 0.99]}}},
            r"row_sparse needs betas\[0\] = 0, got train.optimizer.betas = \[0.9, 0.99\]",
        ),
        (
            {"train": {"optimizer": ROWS}, "backend": "reference"},
            "row_sparse = True: needs backend 'torch', .* 'reference'",
        ),
        ({"train": {"optimizer": ROWS}, "backend": "triton"}, "triton"),
        (
            {"train": {"optimizer": ROWS}, "constraints": {"unit_norm_decoder": {}}},
            "row_sparse = True: UnitNormDecoder needs the whole gradient",
        ),
        (
            {"train": {"optimizer": {"type": "adam", "moments": "bfloat16"}}},
            "optimizer.moments = 'bfloat16' needs train.optimizer.fused = true, got train.optimizer.fused = false",
        ),
        (
            {"train": {"optimizer": {**ROWS, "lr_on_device": True}}},
            "optimizer.lr_on_device = true with row_sparse needs train.optimizer.fused = true",
        ),
        ({"backend": "reference:screened"}, "backend"),
        ({"backend": "torch:fast"}, "backend"),
        (
            {"backend": "torch:screened", "crosscoder": {"activation": {"type": "batch_topk", "k": 4}}},
            "backend = 'torch:screened': screens the encode of crosscoder.activation.type 'topk', got 'batch_topk'",
        ),
    ],
)
def test_refused(tiny_config, changes, message):
    values = {**tiny_config}
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(InputError, match=message) as error:
        open_experiment(check_config(values))
    assert "\n" not in str(error.value)
