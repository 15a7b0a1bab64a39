"""Parts of the trainer: evaluation, firing, state on disk, schedules of the learning rate, run directory."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosscode.errors import InputError
from crosscode.evaluation.fvu import FvuAccumulator
from crosscode.evaluation.heldout import measure_reconstruction
from crosscode.files import new_folder, write_text
from crosscode.models import AnthropicTransposeInit, ModelHookpointAcausalCrosscoder, TopkActivation
from crosscode.models.architecture import split_for
from crosscode.runs.directory import RunDirectory, open_run
from crosscode.runs.state import read_state, write_state
from crosscode.trainers.firing import FiringTracker
from crosscode.trainers.optimizers.base import warmup_and_decay


def make_model(n_models=2, n_hookpoints=1, width=5, n_latents=12, k=3):
    activation = TopkActivation(k, n_latents=n_latents)
    model = ModelHookpointAcausalCrosscoder(n_models, n_hookpoints, width, n_latents, activation, backend="reference")
    return model.init_weights(AnthropicTransposeInit(), seed=0)


def acts(n=40, n_models=2, n_hookpoints=1, width=5, seed=0):
    return torch.randn(n, n_models, n_hookpoints, width, generator=torch.Generator().manual_seed(seed)) + 3


def test_fvu_is_a_ratio_of_sums_over_the_whole_set():
    y, yhat = acts().double(), acts(seed=1).double()
    together = FvuAccumulator((2, 1))
    for part in range(0, 40, 7):  # ragged parts: a mean of ratios would differ
        together.update(y[part : part + 7], yhat[part : part + 7])
    errors = ((y - yhat) ** 2).sum((0, 3))
    variances = ((y - y.mean(0)) ** 2).sum((0, 3))
    torch.testing.assert_close(together.fvu_Xo(), errors / variances, rtol=1e-10, atol=0)
    assert together.fvu() == pytest.approx(float(errors.sum() / variances.sum()), rel=1e-10)


def test_fvu_of_a_perfect_reconstruction_is_0_and_of_the_mean_is_1():
    y = acts()
    perfect, mean = FvuAccumulator((2, 1)), FvuAccumulator((2, 1))
    perfect.update(y, y)
    mean.update(y, y.double().mean(0, keepdim=True).expand_as(y))
    assert perfect.fvu() == 0
    assert mean.fvu() == pytest.approx(1, rel=1e-6)


def test_evaluation_of_a_scaled_model_is_in_raw_space():
    model, scaling_MP = make_model(), torch.tensor([[0.5], [3.0]])
    split = split_for("model_hookpoint_acausal")
    names = ["a", "b"]
    batches = [acts(17, seed=s) for s in range(3)]
    training = measure_reconstruction(model, batches, split, names, scaling_MP)
    folded = model.with_folded_scaling_factors(scaling_MP, scaling_MP)
    final = measure_reconstruction(folded, batches, split, names)
    assert training.fvu == pytest.approx(final.fvu, rel=1e-5)
    assert training.fvu_by_position == pytest.approx(final.fvu_by_position, rel=1e-5)
    all_acts = torch.cat(batches).double()
    error = (folded(all_acts.float()).double() - all_acts).square().sum().detach()
    assert final.fvu == pytest.approx(float(error / (all_acts - all_acts.mean(0)).square().sum()), rel=1e-5)
    with pytest.raises(InputError, match="scaling_MP"):
        measure_reconstruction(folded, batches, split, names, scaling_MP)


def test_evaluation_keeps_the_mode_and_does_not_depend_on_the_cut():
    model = make_model().train()
    split = split_for("model_hookpoint_acausal")
    whole = measure_reconstruction(model, [acts(50)], split, ["a", "b"], torch.ones(2, 1))
    cut = measure_reconstruction(model, list(acts(50).split(3)), split, ["a", "b"], torch.ones(2, 1), max_rows=2)
    assert model.training
    assert whole.fvu == pytest.approx(cut.fvu, rel=1e-6)
    assert whole.density_L == cut.density_L
    assert sum(whole.density_L) == pytest.approx(whole.l0)


def test_evaluation_without_tokens_says_so():
    with pytest.raises(InputError, match="no tokens"):
        measure_reconstruction(make_model(), [], split_for("model_hookpoint_acausal"), ["a", "b"], torch.ones(2, 1))


def test_firing_counts_tokens_since_a_latent_was_active():
    from crosscode_kernels.sparse import DenseLatents, SparseLatents

    tracker = FiringTracker(3)
    tracker.update(DenseLatents(torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]])))
    assert tracker.tokens_since_fired_L.tolist() == [2, 0, 2]
    stored_zero = SparseLatents(
        torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0.0, 1.0]), 3
    )
    tracker.update(stored_zero)
    assert tracker.tokens_since_fired_L.tolist() == [4, 2, 0]
    assert tracker.dead_fraction(3).item() == pytest.approx(1 / 3)


def test_the_bound_on_the_silence_is_never_below_it():
    from crosscode_kernels.sparse import DenseLatents

    tracker = FiringTracker(3)
    assert tracker.longest_silence(2) == 2
    tracker.update(DenseLatents(torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 0.0]])))
    assert tracker.longest_silence(5) == 7
    resumed = FiringTracker(3)
    resumed.load_state_dict(tracker.state_dict())
    assert resumed.longest_silence(1) == 3


@given(
    st.integers(1, 500),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
)
def test_learning_rate_always_moves_and_peaks_at_1(n_steps, warmup, decay):
    factors = [warmup_and_decay(step, n_steps, warmup, decay) for step in range(n_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    rising = [factor for step, factor in enumerate(factors) if step < n_steps * warmup and step < n_steps * (1 - decay)]
    assert rising == sorted(rising)


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(NESTED)
def test_state_comes_back_as_it_was(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("state")
    tensors = {"a": torch.arange(6).reshape(2, 3).T, 3: {"b": torch.tensor(2.5, dtype=torch.float64)}}
    write_state(folder, {"value": value, "tensors": tensors})
    back = read_state(folder)
    assert back["value"] == value
    assert torch.equal(back["tensors"]["a"], tensors["a"])
    assert torch.equal(back["tensors"][3]["b"], tensors[3]["b"])
    assert back["tensors"][3]["b"].dtype == torch.float64


def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "step_1"
    with pytest.raises(RuntimeError), new_folder(target, "file") as folder:
        write_text(folder / "half", "x")
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []
    with new_folder(target, "file") as folder:
        write_text(folder / "file", "old")
    with pytest.raises(RuntimeError), new_folder(target, "file") as folder:
        raise RuntimeError("killed while replacing")
    assert (target / "file").read_text() == "old"
    with new_folder(target, "file") as folder:
        write_text(folder / "file", "new")
    assert (target / "file").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_run_directory_never_replaces_what_is_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        RunDirectory(tmp_path).create("name: x")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(InputError, match=r"no config\.yaml there\)$"):
        open_run(tmp_path)
    RunDirectory(tmp_path / "runs" / "a").create("name: a")
    with pytest.raises(InputError, match=r"it holds runs: name one, such as .*runs/a$"):
        open_run(tmp_path / "runs")


def test_run_directory_lists_whole_checkpoints_only(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create("name: x")
    for name in ("step_20", "step_3", "step_7", ".step_40.partial", "notes"):
        (run.checkpoints / name).mkdir(parents=True)
    for name in ("step_20", "step_3"):
        (run.checkpoints / name / "config.json").touch()
    assert run.steps() == [3, 20]
    run.write_summary({"step": 1})
    assert json.loads((run.path / "summary.json").read_text())["step"] == 1
