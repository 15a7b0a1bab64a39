"""Activations that are not finite, or far out: said, refused, or left out of training and of figures."""

import json
import logging

import pytest
import torch

import crosscode
from crosscode.commands.cli import main
from crosscode.data.norms import CheckedRows, check_finite
from crosscode.data.rows import Rows
from crosscode.errors import NotFinite

N, D = 600, 8
SECTION = {"type": "sae", "n_latents": 16, "activation": {"type": "topk", "k": 2}}


class Given:
    """Rows as they are."""

    shuffled, dims, dtype, device = False, (1, 2, D), torch.float32, torch.device("cpu")

    def __init__(self, acts, at_once=50):
        self.parts = list(acts.split(at_once))

    def open(self, state=None):
        parts = iter(self.parts)

        class Stream:
            def __iter__(self):
                return self

            def __next__(self):
                return Rows(next(parts), 0)

            def state_dict(self):
                return {}

            def close(self):
                pass

        return Stream()

    open_sample = open

    def settings(self):
        return {}

    def scaling_MP(self):
        return torch.ones(1, 2)


@pytest.fixture
def acts():
    return torch.randn(N, 1, 2, D, generator=torch.Generator().manual_seed(0))


def rows_of(source):
    return torch.cat([rows.acts_RMPD for rows in source.open()])


def test_rows_with_a_far_out_norm_anywhere_are_left_out(acts):
    acts[7, 0, 1] *= 300
    acts[-1, 0, 0] = float("inf")
    acts[100, 0, 1, 3] = float("nan")
    acts[200] *= 20
    kept = torch.ones(N, dtype=torch.bool)
    kept[[7, 100, N - 1]] = False
    source = CheckedRows(Given(acts), max_norm_ratio=50)
    assert torch.equal(rows_of(source), acts[kept]), "those 20 times as long stay"
    assert source.scaling_MP() is None and source.settings() == {"max_norm_ratio": "50"}


def test_without_a_limit_rows_stay_as_they_are_and_what_is_not_finite_is_an_error(acts):
    acts[7, 0, 1] *= 300
    assert torch.equal(rows_of(CheckedRows(Given(acts))), acts)
    acts[550, 0, 1, 3] = float("nan")
    with pytest.raises(NotFinite, match=r"1 of 50 tokens are not finite at model 0, hookpoint 1 \(in float32\)"):
        rows_of(CheckedRows(Given(acts)))
    check_finite(torch.full((4, 1, 1, 2), 3e38))  # a sum that overflows is no fault of the rows


def train(tmp_path, acts, **changes):
    return crosscode.train(
        acts, SECTION, run_dir=tmp_path / "run", n_tokens=1024, batch_size=64, device="cpu", progress=False, **changes
    )


def test_far_out_tokens_are_reported_and_an_option_leaves_them_out(acts, tmp_path, caplog):
    flat = acts[:, 0, 0].contiguous()
    flat[[10, 590]] *= 300  # one in training, one held out
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path / "all", flat, data={"validation_fraction": 0.2})
    said = "1 of 120 held-out tokens are up to"
    assert said in caplog.text and "data.max_norm_ratio: 50 leaves such tokens out" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        limited = train(tmp_path / "limited", flat, data={"validation_fraction": 0.2, "max_norm_ratio": 50})
    assert said not in caplog.text
    evaluation = json.loads((limited.path / "evaluation.json").read_text())
    assert evaluation["n_tokens"] == 119 and not evaluation["far_out"]
    assert json.loads((run.path / "evaluation.json").read_text())["far_out"]["acts"]["tokens"] == 1
    # Held-out figures equal those of the rows without it, computed by hand.
    kept = torch.cat([flat[480:590], flat[591:]])
    error = (limited.model(kept) - kept).square().sum() / (kept - kept.mean(0)).square().sum()
    assert limited.summary["fvu"] == pytest.approx(float(error), rel=1e-4)


def test_figures_that_are_not_finite_are_null_said_and_end_the_command_with_an_error(acts, tmp_path, capsys):
    flat = acts[:, 0, 0].contiguous()
    flat[590, 2] = float("inf")
    with pytest.raises(NotFinite, match="held-out activations of 1 of 120 tokens are not finite at acts"):
        train(tmp_path, flat, data={"validation_fraction": 0.2, "scale": False})
    run = crosscode.open(tmp_path / "run")
    assert run.summary["fvu"] is None and (run.path / "final" / "model.safetensors").is_file()
    for file in (*run.path.glob("*.json"), *run.path.glob("*.jsonl")):
        assert "NaN" not in file.read_text() and "Infinity" not in file.read_text(), file
    capsys.readouterr()
    assert main(["evaluate", str(run.path)]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["fvu"] is None and printed.err.count("not finite at acts") == 1


def test_training_on_what_is_not_finite_stops_and_does_not_blame_the_learning_rate(acts, tmp_path):
    flat = acts[:, 0, 0].contiguous()
    flat[10, 2] = float("nan")
    with pytest.raises(NotFinite) as error:
        train(tmp_path, flat, data={"validation_fraction": 0.2, "scale": False})
    assert "lr" not in str(error.value) and "data.max_norm_ratio" in str(error.value)
