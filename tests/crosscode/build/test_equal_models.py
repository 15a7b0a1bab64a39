"""Two models that are one are told so before training; whoever goes on finds nothing.

M models · P hookpoints · D width.
"""

import pytest
import torch
import yaml

import crosscode
from crosscode.build.equal_models import equal_places
from crosscode.commands.cli import main
from crosscode.errors import InputError


@pytest.fixture
def twice(tiny_config, tiny_lms, tmp_path):
    """Writes a config that diffs one model with itself."""

    def write(data=(), crosscoder=()):
        tiny_config["language_models"] = [{"path": tiny_lms[0], "name": "one"}, {"path": tiny_lms[0], "name": "copy"}]
        tiny_config["data"] |= dict(data)
        tiny_config["crosscoder"] |= dict(crosscoder)
        path = tmp_path / "twice.yaml"
        path.write_text(yaml.safe_dump(tiny_config), encoding="utf-8")
        return path

    return write


def test_one_model_twice_is_answered_before_training(twice, tmp_path, capsys):
    assert main(["train", str(twice())]) == 2
    said = capsys.readouterr().err
    assert "no difference: one and copy have equal activations at blocks.1.hook_resid_post (on " in said
    assert "data.equal_models: train trains all the same" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scheme", ["topk", "tied", "partition"])
def test_whoever_goes_on_finds_no_specific_latent(twice, scheme):
    changes = {
        "topk": {},
        "tied": {
            "shared_fraction": 0.25,
            "init": {"type": "identical_latents", "first": {"type": "anthropic_transpose"}},
        },
        "partition": {"partition": [{"models": [0], "share": 0.25}, {"models": [1], "share": 0.25}]},
    }[scheme]
    run = crosscode.train(twice({"equal_models": "train"}, changes), progress=False)
    (verdict,) = run.verdicts
    assert not verdict.specific("one") and not verdict.specific("copy") and verdict.difference == 0
    assert verdict.headline().startswith("No difference found")


def test_equal_places_are_found_pair_by_pair():
    acts_RMPD = torch.randn(5, 3, 2, 4)
    acts_RMPD[:, 2, 1] = acts_RMPD[:, 0, 1]
    assert equal_places(acts_RMPD) == [(0, 2, 1)]


def test_activations_of_ones_own_are_asked_too(tmp_path):
    acts = torch.randn(400, 1, 1, 8).expand(-1, 2, -1, -1).contiguous()
    crosscoder = {"type": "model_hookpoint_acausal", "n_latents": 16, "activation": {"type": "topk", "k": 2}}
    with pytest.raises(InputError, match=r"no difference: .* have equal activations"):
        crosscode.train(acts, crosscoder, run_dir=tmp_path / "run", n_tokens=256, batch_size=64, progress=False)
