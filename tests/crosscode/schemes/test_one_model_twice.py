"""One model beside itself, or beside its rounding: whatever the scheme makes of it, no latent is called specific."""

from __future__ import annotations

import pytest
import torch

import crosscode
from crosscode.build.schema import read_yaml
from crosscode.recipes import recipe_names

WIDTH, L = 8, 32


def same(x):
    return x


def rounded(x):
    return x.bfloat16().float()


def of_models(name):
    return read_yaml(name)["crosscoder"]["type"] == "model_hookpoint_acausal"


CASES = [(name, same) for name in recipe_names() if of_models(name)]
CASES += [(name, rounded) for name in ("topk_crosscoder", "dedicated_feature_crosscoder")]


@pytest.mark.parametrize("name, other", CASES)
def test_no_latent_is_specific(name, other, tmp_path):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    active_NF = (torch.rand(1500, 20, generator=generator) < 0.2) * torch.rand(1500, 20, generator=generator)
    acts_ND = active_NF @ torch.randn(20, WIDTH, generator=generator)
    values = read_yaml(name)
    others = [other(acts_ND)] * (len(values["language_models"]) - 1)
    acts_NMPD = torch.stack([acts_ND, *others], 1)[:, :, None]
    crosscoder, objective = values["crosscoder"] | {"n_latents": L}, values["objective"]
    crosscoder.pop("expansion_factor", None)
    if "k" in crosscoder["activation"]:
        crosscoder["activation"]["k"] = 4
    if "partition" in crosscoder:
        crosscoder["partition"] = [{"models": [0], "share": 0.3}, {"models": [1], "share": 0.3}]
    if "auxk" in objective:
        objective["auxk"] |= {"k_aux": 8, "dead_after_tokens": 500}
    if "l0" in objective:
        objective["l0"] |= {"target": 4}
    for init in (crosscoder["init"], crosscoder["init"].get("first", {})):
        init |= {"n_calibration_tokens": 256} if init.get("type") == "jan_update" else {}
    run = crosscode.train(
        acts_NMPD[:1000], crosscoder, objective=objective, optimizer=values["train"]["optimizer"], batch_size=64,
        n_tokens=64 * 30, heldout=acts_NMPD[1000:], run_dir=tmp_path / "run", data={"equal_models": "train"},
    )  # fmt: skip
    fired = sum(firings >= 20 for firings in run.table()["firings"].tolist())
    assert fired >= 4, "latents fire often enough to be judged"
    assert len(run.verdicts) == len(others) * (len(others) + 1) // 2
    assert all(verdict.headline().startswith("No difference found") for verdict in run.verdicts)
