"""The loss of every recipe as it ships, at chosen steps, against the formulas of the literature (conftest.py).

Model, objective, coefficients and schedules are those of the YAML; only width, number of latents and the backend's
precision are not.

Axes: Xi/Xo input/output crosscoding dims · Di/Do widths · L latents.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from crosscode.build.experiment import build_model, build_objective
from crosscode.build.schema import check_config, read_yaml
from crosscode.models.architecture import split_for
from crosscode.recipes import recipe_names

N_STEPS, L, WIDTH, N_DEAD = 1000, 480, 5, 40


def coefficient(weight, step: int) -> float:
    """What the YAML's number or schedule says: 0 at the start, its value from the end of the ramp on."""
    if isinstance(weight, (int, float)):
        return float(weight)
    if weight["type"] == "warm_up":
        return weight["value"] * min(1.0, step / (weight["warmup_fraction"] * N_STEPS))
    assert weight["type"] == "linear_ramp" and set(weight) <= {"type", "value", "ramp_fraction"}
    return weight["value"] * min(1.0, step / (weight.get("ramp_fraction", 1.0) * N_STEPS))


def annealed_k(activation, step: int) -> int | None:
    k, start = activation.get("k"), activation.get("k_start")
    if start is None:
        return k
    return round(start + (k - start) * min(1.0, step / (activation["k_anneal_fraction"] * N_STEPS)))


def expected_loss(formula, values, step, idle_L):
    objective, k = dict(values["objective"]), annealed_k(values["crosscoder"]["activation"], step)
    a_S = formula.latents(k)
    recon = formula.normalised_recon if objective.pop("recon").get("normalise") else formula.recon
    total = recon(a_S)
    for name, fields in objective.items():
        if name == "auxk":
            term = formula.auxk(a_S, idle_L >= fields["dead_after_tokens"], fields["k_aux"])
            total = total + fields.get("weight", 1 / 32) * term
        elif name == "matryoshka":
            assert fields == {}
            n_sources = len(a_S)
            sizes = [n_sources * round(share * L / n_sources) for share in values["crosscoder"]["prefixes"]]
            total = total + torch.stack([formula.recon_of_prefix(a_S, size) for size in sizes]).sum()
        elif name == "l0":
            assert set(fields) == {"target"}
            default = {"type": "warm_up", "value": 10.0, "warmup_fraction": 0.05}
            total = total + coefficient(default, step) * formula.l0(fields["target"])
        elif name == "multi_topk":
            assert fields.get("normalise", False) == (recon == formula.normalised_recon)
            total = total + recon(formula.latents(min(fields["factor"] * k, L))) / 8
        elif name == "delta":
            total = total + fields["weight"] * formula.delta(a_S)
        else:
            ratio, weight = fields.get("shared_ratio", 1.0), coefficient(fields["weight"], step)
            if name == "tanh":
                term = formula.tanh(a_S, ratio, fields["c"])
            else:
                term = formula.l1(a_S, ratio) if name == "l1" else formula.pre_act(ratio)
            total = total + weight * term
    return total


@pytest.mark.parametrize("name", recipe_names())
def test_the_loss_of_a_recipe_is_its_formula(name, randomise, context, dictionary, check):
    values = read_yaml(name)
    values["crosscoder"].pop("expansion_factor", None)
    values["crosscoder"]["n_latents"] = L
    values["backend"] = "torch"
    config = check_config(values)
    split = split_for(config.crosscoder.type)
    model = randomise(build_model(config, WIDTH).double(), seed=2)
    generator = torch.Generator().manual_seed(1)
    dims = (16, len(config.language_models), len(config.hookpoints), WIDTH)
    acts_BMPD = torch.randn(dims, generator=generator, dtype=torch.float64)
    case = SimpleNamespace(model=model)
    case.input_BXiDi, case.target_BXoDo = split.activations(acts_BMPD)
    idle_L = torch.zeros(L, dtype=torch.int64)
    idle_L[torch.randperm(L, generator=generator)[:N_DEAD]] = 10**6
    activation = values["crosscoder"]["activation"]
    kind = (
        activation["type"]
        + ("_linear" if activation.get("thresholds") == "linear" else "")
        + ("_by_norm" if activation.get("rank_by") == "decoder_norm_weighted" else "")
    )
    for step in (0, 150, 700, 999):
        model.zero_grad()
        model.before_step(step, N_STEPS)
        loss = build_objective(config)(context(case, idle_L), step, N_STEPS)
        formula = dictionary(case, kind)
        check(case, formula, loss, expected_loss(formula, values, step, idle_L))
