"""A custom loop with as little as will do, and what is refused before anything is written."""

import pytest
import torch

import crosscode
from crosscode import Adam, Backend, Objective, ReconTerm, SAEOrTranscoder, TopkActivation, TrainConfig, Trainer
from crosscode.errors import InputError


def sae(**options):
    return SAEOrTranscoder(6, 6, 16, TopkActivation(2, 16), **({"backend": "torch"} | options))


def batches(n=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(32, 1, 1, 6, generator=generator) for _ in range(n)]


def trainer(folder, data, model=None, *, names=("acts",), objective=None, **settings):
    torch.set_num_threads(1)
    model = model or sae().init_weights(crosscode.AnthropicTransposeInit())
    run = crosscode.RunDirectory(folder / "run")
    run.create_later("name: test\n", lambda: None)
    config = TrainConfig(n_tokens=128, batch_size=32, log_every=1, **settings)
    objective = objective or Objective({"recon": ReconTerm()})
    loggers = [crosscode.JsonlLogger(run.metrics_file)]
    split = crosscode.split_for("sae")
    return Trainer(model, data, split, objective, config, run, loggers, position_names=names, progress=False)


def test_a_list_of_batches_is_a_source(tmp_path):
    made = trainer(tmp_path, batches(), checkpoint_every=2)
    made.train()
    assert made.run.is_finished() and made.run.steps() == [2, 4]
    assert made.model.folded_scaling_in_Xi.item() == 1
    again = trainer(tmp_path, batches())
    with pytest.raises(InputError, match=r"resume: the source of this run \(list\) has no state_dict"):
        again.restore(4)


class WithScaling(list):
    scaling_MP = torch.tensor([[2.0]])


def test_a_source_with_scaling_alone_has_it_folded_in(tmp_path):
    made = trainer(tmp_path, WithScaling(batches()))
    made.train()
    assert made.model.folded_scaling_in_Xi.item() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["a", "b"]}, r"position_names: 2 were given \('a', 'b'\), but the model's output has 1 position"),
        ({"model": sae()}, "model: its weights are not initialised"),
        ({"scaling": torch.ones(2, 3)}, "reads one language model, got 2"),
        ({"scaling": torch.zeros(1, 1)}, "factors must be positive and finite"),
        ({"optimizer": Adam(betas=(0, 0.999), row_sparse=True)}, "the model's backend 'torch' gives"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(change, message, tmp_path):
    data = WithScaling(batches())
    data.scaling_MP = change.pop("scaling", data.scaling_MP)
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, data, **change).train()
    assert not list(tmp_path.glob("run/*"))


def test_row_sparse_adam_trains_with_a_backend_that_gives_rows(tmp_path):
    model = sae(backend=Backend("torch", ("rows",))).init_weights(crosscode.AnthropicTransposeInit())
    plan = Adam(betas=(0, 0.999), row_sparse=True)
    trainer(tmp_path, batches(), model, optimizer=plan).train()


def test_uninitialised_weights_show_and_initialised_ones_do_not():
    model = sae()
    with pytest.raises(InputError, match="not initialised"):
        model.check_initialised()
    model.init_weights(crosscode.AnthropicTransposeInit()).check_initialised()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


# ---- objectives, learning rates


def test_numbers_schedules_and_functions_make_an_objective(tmp_path):
    def bias(context):
        return context.model.b_dec_D.square().sum()

    objective = Objective({"recon": ReconTerm(), "l1": (crosscode.L1Term(), 0.5), "bias": (bias, lambda s, n: s / n)})
    assert [objective.terms[name][1](1, 4) for name in ("recon", "l1", "bias")] == [1.0, 0.5, 0.25]
    made = trainer(tmp_path, batches(), objective=objective)
    made.train()
    assert {"loss/l1", "loss/bias"} <= made.metrics.last.keys()
    assert Objective({"bias": bias}).terms["bias"][1](3, 4) == 1.0


@pytest.mark.parametrize("given", [3, (ReconTerm(), "much"), (ReconTerm(), 1.0, 2.0), (ReconTerm(), True)])
def test_what_is_no_term_is_refused(given):
    with pytest.raises(InputError, match=r"objective\.recon"):
        Objective({"recon": given})


def test_one_word_makes_the_learning_rate_constant():
    assert [Adam(lr=1e-3, schedule="constant").lr_factor(step, 10) for step in (0, 5, 9)] == [1.0, 1.0, 1.0]
    assert Adam(lr=1e-3).lr_factor(9, 10) < 1


def test_auxk_counts_latents_as_dead_like_the_figures_do(make_trainer):
    made = make_trainer(objective={"recon": {}, "auxk": {"k_aux": 4}}, n_latents=300, n_steps=6, dead_after_tokens=64)
    made.train()
    assert made.metrics.last["dead_fraction"] > 0 and made.metrics.last["loss/auxk"] > 0
    late = make_trainer("late", objective={"recon": {}, "auxk": {}}, n_latents=300, n_steps=6, dead_after_tokens=10_000)
    late.train()
    assert late.metrics.last["loss/auxk"] == 0


# ---- repr


def test_a_model_says_what_it_is(tmp_path):
    model = sae().init_weights(crosscode.AnthropicTransposeInit())
    text = repr(model)
    for part in (
        "SAEOrTranscoder((6,) -> 16 latents -> (6,)",
        "topk(k=2",
        "backend='torch'",
        "214 parameters",
        "not folded",
    ):
        assert part in text
    model.save(tmp_path / "saved", {"output_positions": ["base/mid"]})
    assert "positions: base/mid" in repr(SAEOrTranscoder.load(tmp_path / "saved"))
    model.save(tmp_path / "both", metadata={"output_positions": ["base/mid"], "hookpoints": ["pre", "mid"]})
    assert ", reads pre, positions: base/mid)" in repr(SAEOrTranscoder.load(tmp_path / "both"))
    assert "\n" not in text
    model.save(tmp_path / "kind", metadata={"architecture": "diff_sae"})
    assert repr(SAEOrTranscoder.load(tmp_path / "kind")).startswith("SAEOrTranscoder(diff_sae: (6,) -> ")
