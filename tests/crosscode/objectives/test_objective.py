"""Which objectives fit which models.

Axes: L latents.
"""

from __future__ import annotations

import logging

import pytest

from crosscode.errors import InputError
from crosscode.objectives import (
    TERMS,
    AuxKTerm,
    L1Term,
    MultiTopkTerm,
    Objective,
    PreActTerm,
    ReconTerm,
    TanhTerm,
    as_schedule,
)


@pytest.mark.parametrize("term", [TanhTerm(), PreActTerm()])
@pytest.mark.parametrize("activation", ["topk", "batch_topk", "groupmax", "relu"])
def test_jumprelu_penalties_need_a_jumprelu_model(term, activation, make_case):
    model = make_case("acausal_2x1", activation).model
    objective = Objective({"penalty": (term, as_schedule(1.0))})
    with pytest.raises(
        InputError, match=rf"a penalty of JumpReLU models, but crosscoder.activation.type = '{activation[:5]}"
    ):
        objective.check_model(model)
    objective.check_model(make_case("compound", "jumprelu").model)


@pytest.mark.parametrize("activation", ["relu", "groupmax", "jumprelu"])
def test_multi_topk_needs_topk(activation, make_case):
    with pytest.raises(
        InputError, match=r"objective.multi_topk: needs crosscoder.activation.type 'topk' or 'batch_topk'"
    ):
        MultiTopkTerm().check_model(make_case("sae", activation).model)
    MultiTopkTerm().check_model(make_case("sae", "topk").model)


@pytest.mark.parametrize("term", [L1Term, TanhTerm, PreActTerm])
def test_a_shared_ratio_needs_shared_latents(term, make_case):
    with pytest.raises(InputError, match=r"shared_ratio = 0.1: the model has no shared latents"):
        term(shared_ratio=0.1).check_model(make_case("acausal_2x1", "jumprelu").model)


@pytest.mark.parametrize(("ratio", "warns"), [(0.1, False), (0.3, False), (0.31, True), (None, True)])
@pytest.mark.parametrize("term", [L1Term, TanhTerm, PreActTerm])
def test_a_large_shared_ratio_is_warned_of(term, ratio, warns, make_case, caplog):
    with caplog.at_level(logging.WARNING, logger="crosscode"):
        term(shared_ratio=ratio).check_model(make_case("acausal_shared", "jumprelu").model)
    assert ("lambda_s / lambda_f above 0.3" in caplog.text) == warns


def test_an_objective_without_terms_is_refused():
    with pytest.raises(InputError, match="no loss term given"):
        Objective({})


def test_an_unknown_term_gets_a_hint():
    with pytest.raises(InputError, match=r"unknown type 'recons' \(did you mean 'recon'\?\)"):
        TERMS["recons"]


def test_defaults_are_those_of_the_literature():
    auxk, tanh, l1 = AuxKTerm.Config(), TanhTerm.Config(), L1Term.Config()
    assert (as_schedule(auxk.weight)(0, 1), auxk.k_aux, auxk.dead_after_tokens) == (1 / 32, 256, None)
    assert tanh.c == 4.0 and [as_schedule(tanh.weight)(step, 10) for step in (0, 10)] == [0.0, 10.0]
    assert as_schedule(PreActTerm.Config().weight)(0, 1) == 3e-6
    assert [as_schedule(l1.weight)(step, 10**6) for step in (0, 500, 1000, 10**5)] == [0.0, 1.0, 2.0, 2.0]
    assert as_schedule(ReconTerm.Config().weight)(0, 1) == 1.0
    assert as_schedule(MultiTopkTerm.Config().weight)(0, 1) == 1 / 8
