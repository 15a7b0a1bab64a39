"""Every recipe that several processes train, on two and four of them, in both precisions; and on two twice."""

import sys
from pathlib import Path

import pytest
import torch

from crosscode.recipes import __file__ as recipes_file

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from ranks import assert_as_one, train_on

REFUSED = ("dedicated_feature", "feb_update", "sae_l1_resampled")
NAMES = sorted(path.stem for path in Path(recipes_file).parent.glob("*.yaml") if not path.stem.startswith(REFUSED))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_every_recipe_is_trained_as_by_one_process(tmp_path, dtype, tolerance):
    recipes = [f"{name}@{backend}@24" for name in NAMES for backend in ("torch", "reference")]
    recipes += ["sae_topk@torch@9", "batch_topk_crosscoder@torch@9"]  # at 4: shards of 2, 2, 2 and 3, fewer than k
    one = train_on(1, tmp_path, dtype, recipes)[0]
    two, again, four = (train_on(n, tmp_path, dtype, recipes) for n in (2, 2, 4))
    for recipe in recipes:
        assert_as_one(one[recipe], two[0][recipe], tolerance)
        assert_as_one(one[recipe], four[0][recipe], tolerance)
        assert all(torch.equal(two[0][recipe]["model"][k], v) for k, v in again[0][recipe]["model"].items())
        assert all(torch.equal(four[0][recipe]["losses"], of[recipe]) for of in four[1:])
