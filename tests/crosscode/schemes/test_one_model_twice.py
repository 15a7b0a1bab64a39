"""One model beside itself: whatever the scheme makes of it, no latent is called specific."""

from __future__ import annotations

import pytest
import torch

import crosscode
from crosscode.build.schema import read_yaml
from crosscode.recipes import recipe_names

WIDTH, L = 8, 32


def of_two_models(name):
    values = read_yaml(name)
    return values["crosscoder"]["type"] == "model_hookpoint_acausal" and len(values["language_models"]) == 2


@pytest.mark.parametrize("name", [name for name in recipe_names() if of_two_models(name)])
def test_no_latent_is_specific(name, tmp_path):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    active_NF = (torch.rand(1500, 20, generator=generator) < 0.2) * torch.rand(1500, 20, generator=generator)
    acts_ND = active_NF @ torch.randn(20, WIDTH, generator=generator)
    acts_NMPD = torch.stack([acts_ND, acts_ND], 1)[:, :, None]
    values = read_yaml(name)
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
    (verdict,) = run.verdicts
    fired = sum(firings >= 20 for firings in run.table()["firings"].tolist())
    assert fired >= 4, "latents fire often enough to be judged"
    assert verdict.counts["A-specific"] == verdict.counts["B-specific"] == 0
