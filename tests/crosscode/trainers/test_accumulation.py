"""A batch in parts gives the update of the whole batch.

Axes: B tokens · L latents.
"""

from contextlib import nullcontext
from typing import Literal

import pytest
import torch

from crosscode.models.layered_latents import concat_tokens
from crosscode.trainers.whole_batch import batch_cuts, needs_whole_batch

AUXK = {"recon": {}, "auxk": {"k_aux": 4, "dead_after_tokens": 40}}
SCHEMES = {
    "topk": ({"type": "topk", "k": 4}, AUXK),
    "batch_topk": ({"type": "batch_topk", "k": 4, "threshold_ema_decay": 0.5}, AUXK),
    "batch_topk_by_norm": ({"type": "batch_topk", "k": 4, "rank_by": "decoder_norm_weighted"}, AUXK),
    "batch_topk_multi": (
        {"type": "batch_topk", "k": 2},
        {"recon": {}, "multi_topk": {"factor": 3}, "auxk": AUXK["auxk"]},
    ),
    "batch_topk_annealed": ({"type": "batch_topk", "k": 2, "k_start": 8, "k_anneal_fraction": 0.5}, AUXK),
    "batch_topk_that_keeps_all": ({"type": "batch_topk", "k": 24}, {"recon": {}}),
    "groupmax": ({"type": "groupmax", "k": 4}, AUXK),
    "relu": ({"type": "relu"}, {"recon": {}, "l1": {"weight": 0.1}}),
    "jumprelu": (
        {"type": "jumprelu", "log_threshold_init": -1.0},
        {"recon": {}, "tanh": {"weight": 0.1, "target_l0": 3}, "pre_act": {}},
    ),
    "wanted_l0": (
        {"type": "jumprelu", "log_threshold_init": -1.0, "thresholds": "linear"},
        {"recon": {}, "l0": {"target": 3, "weight": 1.0, "max_firing_share": 0.1}},
    ),
}
FIGURES = ("loss", "fvu", "l0", "dead_fraction", "grad_norm")


def curves(make_trainer, rows_of, name, n_parts, scheme, backend="torch", **options):
    activation, objective = SCHEMES[scheme]
    trainer = make_trainer(
        f"{name}{n_parts}",
        activation=activation,
        objective=objective,
        backend=backend,
        grad_accumulation=n_parts,
        dead_after_tokens=40,
        # Plain steps: Adam divides by the root of a second moment that may be rounding noise.
        optimizer={"type": "sgd_for_tests"},
        n_steps=8,
        **options,
    )
    trainer.train()
    return trainer, rows_of(trainer)


@pytest.fixture(autouse=True)
def plain_sgd(monkeypatch):
    """Makes `sgd_for_tests` an optimizer for the time of a test."""
    from crosscode.config.registry import ConfigModel
    from crosscode.trainers.optimizers import OPTIMIZERS
    from crosscode.trainers.optimizers.base import OptimizerPlan, lr_groups

    class Sgd(OptimizerPlan):
        class Config(ConfigModel):
            type: Literal["sgd_for_tests"] = "sgd_for_tests"
            lr: float = 0.003

        def build(self, model):
            return torch.optim.SGD(lr_groups(model, self.lr), lr=self.lr)

        def lr_factor(self, step, n_steps):
            return 1.0

    monkeypatch.setitem(OPTIMIZERS._classes, "sgd_for_tests", Sgd)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("scope", [None, "layer", "all_layers"])
@pytest.mark.parametrize("rank_by", ["activation", "decoder_norm_weighted"])
def test_among_equal_values_the_first_of_the_whole_batch_are_kept_by_its_parts(
    scope, rank_by, backend, make_trainer, planted
):
    """Whole numbers, so that most values are equal to others; one part has nothing above 0."""
    compound = {"kind": "compound_cross_layer_transcoder", "model_options": {"topk_scope": scope}}
    trainer = make_trainer(
        activation={"type": "batch_topk", "k": 3, "rank_by": rank_by},
        objective={"recon": {}, "multi_topk": {"factor": 2}},
        backend=backend,
        data=planted(dims=(1, 4, 6)) if scope else None,
        **(compound if scope else {}),
    )
    model = trainer.model.train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = torch.randint(-1, 2, parameter.shape, generator=generator).float()
            parameter.copy_(whole * ("b_enc" not in name))
    x_BXiDi = torch.randint(-1, 2, (20, *model.in_dims, model.d_in), generator=generator).float()
    x_BXiDi[5:10] = 0
    for factor in (1, 2):
        with model.k_multiplied(factor):
            whole_BL = model.encode_latents(x_BXiDi).to_dense()
        for n_parts in (2, 3, 4):
            parts = x_BXiDi.chunk(n_parts)
            of_part, found = batch_cuts(model, trainer.objective, parts, nullcontext), []
            for i, part in enumerate(parts):
                with of_part(i), model.k_multiplied(factor):
                    found.append(model.encode_latents(part).to_dense())
            assert torch.equal(torch.cat(found), whole_BL)
        n_kept = 3 * factor * 20 * (len(model.parts) if scope == "layer" else 1)
        assert (whole_BL > 0).sum() == n_kept or factor == 2  # then there are fewer above 0


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_add_up_to_the_whole(scheme, backend, make_trainer, rows_of):
    whole, expected = curves(make_trainer, rows_of, "whole", 1, scheme, backend)
    for n_parts in (2, 4):
        parts, rows = curves(make_trainer, rows_of, "parts", n_parts, scheme, backend)
        for row, row_expected in zip(rows, expected, strict=True):
            for figure in FIGURES:
                assert row[figure] == pytest.approx(row_expected[figure], rel=2e-5, abs=1e-7), (figure, row["step"])
        for ours, theirs in zip(parts.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        ours, theirs = parts.firing.tokens_since_fired_L, whole.firing.tokens_since_fired_L
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scope", ["layer", "all_layers"])
def test_parts_add_up_for_compound_models(scope, make_trainer, rows_of, planted):
    def run(n_parts):
        return curves(
            make_trainer,
            rows_of,
            scope,
            n_parts,
            "batch_topk",
            kind="compound_cross_layer_transcoder",
            data=planted(dims=(1, 4, 6)),
            model_options={"topk_scope": scope},
        )

    (whole, expected), (parts, rows) = run(1), run(4)
    for row, row_expected in zip(rows, expected, strict=True):
        for figure in FIGURES:
            assert row[figure] == pytest.approx(row_expected[figure], rel=2e-5, abs=1e-7), (figure, row["step"])
    for ours, theirs in zip(parts.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_parts_on_their_own_would_give_something_else(make_trainer, rows_of, monkeypatch):
    """Guards the tests above: without the pass over the whole batch they would fail."""
    _, expected = curves(make_trainer, rows_of, "whole", 1, "batch_topk")
    monkeypatch.setattr("crosscode.trainers.accumulation.needs_whole_batch", lambda model, objective: False)
    _, rows = curves(make_trainer, rows_of, "parts", 4, "batch_topk")
    assert rows[-1]["loss"] != pytest.approx(expected[-1]["loss"], rel=2e-5)


def test_only_schemes_that_need_it_look_at_the_whole_batch_first(make_trainer):
    need = set()
    for scheme, (activation, objective) in SCHEMES.items():
        trainer = make_trainer(scheme, activation=activation, objective=objective)
        if needs_whole_batch(trainer.model, trainer.objective):
            need.add(scheme)
    assert need == set(SCHEMES) - {"relu", "jumprelu"}


def test_an_uneven_last_part_counts_by_its_size(make_trainer, rows_of, planted):
    _, expected = curves(make_trainer, rows_of, "whole", 1, "topk", data=planted(batch_size=30))
    _, rows = curves(make_trainer, rows_of, "parts", 4, "topk", data=planted(batch_size=30))
    for row, row_expected in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(row_expected["loss"], rel=2e-5)


def test_concatenated_latents_are_those_of_the_whole(make_trainer, planted):
    model = make_trainer(activation={"type": "topk", "k": 4}).model
    acts_BMPD = next(iter(planted()))
    whole = model.encode_latents(acts_BMPD)
    parts = concat_tokens([model.encode_latents(part) for part in acts_BMPD.chunk(3)])
    assert torch.equal(parts.to_dense(), whole.to_dense())
    assert torch.equal(parts.l0_B(), whole.l0_B())
