"""The examples of CONTRIBUTING.md do what the text says, each from one file."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from crosscode.build.experiment import build_constraints, build_model
from crosscode.build.schema import check_config, read_yaml
from crosscode.config.registry import Registry
from crosscode.errors import InputError
from crosscode.models import (
    ACTIVATIONS,
    ARCHITECTURES,
    INITIALIZATIONS,
    BaseCrosscoder,
    SAEOrTranscoder,
    TopkActivation,
)
from crosscode.models.architecture import split_for
from crosscode.objectives import TERMS, LossContext, Objective, as_schedule
from crosscode.trainers.constraints import CONSTRAINTS
from crosscode.trainers.optimizers import OPTIMIZERS

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"`(crosscode/\S+?\.py)`:\n\n```python\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Load one example as if its file lay in its folder, and forget it afterwards."""

    def load(path: str, registry: Registry):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
        file = tmp_path / Path(path).name
        file.write_text(EXAMPLES[path], encoding="utf-8")
        name = path.removesuffix(".py").replace("/", ".")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_there_is_an_example_of_each_kind():
    kinds = ["activations", "terms", "initialization", "models", "optimizers", "constraints"]
    assert [Path(path).parent.name for path in EXAMPLES] == kinds


def test_the_activation(example, tmp_path):
    example("crosscode/models/activations/soft_threshold.py", ACTIVATIONS)
    activation = ACTIVATIONS["soft_threshold"](8, threshold=0.2)
    config = TypeAdapter(ACTIVATIONS.config_union()).validate_python({"type": "soft_threshold", "threshold": 0.2})
    assert activation.config == config
    model = SAEOrTranscoder(4, 4, 8, activation, backend="torch")
    model.init_weights(INITIALIZATIONS["anthropic_transpose"]())
    x_BD = torch.randn(16, 4)
    torch.testing.assert_close(model.encode(x_BD), (x_BD @ model.W_enc_DL - 0.2).relu())
    model.save(tmp_path / "model")
    assert torch.equal(BaseCrosscoder.load(tmp_path / "model", backend="torch")(x_BD), model(x_BD))


def test_the_term(example):
    example("crosscode/objectives/terms/l0_target.py", TERMS)
    term = TERMS["l0_target"](target=2.0)
    model = SAEOrTranscoder(4, 4, 8, TopkActivation(2, 8), backend="torch")
    model.init_weights(INITIALIZATIONS["anthropic_transpose"]())
    x_BD = torch.randn(16, 4)
    result = model.forward_train(x_BD)
    context = LossContext(model, x_BD, x_BD, result, torch.zeros(8, dtype=torch.int64))
    loss = Objective({"l0_target": (term, as_schedule(3.0))})(context, 0, 10)
    expected = (result.latents.to_dense().tanh().sum() / 16 / 2.0 - 1) ** 2
    torch.testing.assert_close(loss.total, 3 * expected)
    with pytest.raises(InputError, match="must not exceed n_latents = 8"):
        TERMS["l0_target"](target=9.0).check_model(model)


def test_the_initialisation(example):
    example("crosscode/models/initialization/small_normal.py", INITIALIZATIONS)
    model = SAEOrTranscoder(40, 40, 80, TopkActivation(2, 80), backend="torch")
    model.init_weights(INITIALIZATIONS["small_normal"](std=0.5), seed=3)
    assert model.W_enc_LXiDi.std().item() == pytest.approx(0.5, rel=0.05)
    assert model.b_enc_L is not None and not model.b_enc_L.any()


def test_the_architecture(example, tmp_path):
    example("crosscode/models/gather_transcoder.py", ARCHITECTURES)
    values = read_yaml("skip_transcoder")
    values["hookpoints"] = ["a", "b", "c"]
    values["crosscoder"] |= {"type": "gather_transcoder", "n_latents": 64, "linear_skip": True}
    model = build_model(check_config(values), width=5)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.1 * torch.randn_like(param))
    acts_BMPD = torch.randn(16, 1, 3, 5)
    input_BPD, target_BD = split_for("gather_transcoder").activations(acts_BMPD)
    assert torch.equal(input_BPD, acts_BMPD[:, 0, :2]) and torch.equal(target_BD, acts_BMPD[:, 0, 2])
    assert model(input_BPD).shape == target_BD.shape
    model.save(tmp_path / "model")
    loaded = BaseCrosscoder.load(tmp_path / "model", backend="torch")
    assert type(loaded) is type(model) and loaded.kind == "gather_transcoder"
    assert torch.equal(loaded(input_BPD), model(input_BPD))
    with pytest.raises(InputError, match=r"crosscoder.type = 'gather_transcoder': .* got 1 hookpoint"):
        split_for("gather_transcoder").check(1, 1)


def test_the_optimizer(example):
    example("crosscode/trainers/optimizers/momentum.py", OPTIMIZERS)
    values = read_yaml("sae_jumprelu")
    values["train"]["optimizer"] = {"type": "momentum", "lr": 0.5}
    recipe = OPTIMIZERS.build(check_config(values).train.optimizer)
    assert recipe.config == OPTIMIZERS["momentum"](0.5).config
    model = SAEOrTranscoder(4, 4, 8, TopkActivation(2, 8), backend="torch")
    model.init_weights(INITIALIZATIONS["anthropic_transpose"]())
    before = model.W_dec_LXoDo.detach().clone()
    optimizer = recipe.build(model)
    model.W_dec_LXoDo.grad = torch.ones_like(before)
    optimizer.step()
    torch.testing.assert_close(model.W_dec_LXoDo.detach(), before - 0.5)
    assert recipe.lr_factor(0, 1000) == pytest.approx(1 / 50)
    with pytest.raises(InputError, match=r"train.optimizer.momentum = 1.5: input should be less than 1"):
        OPTIMIZERS["momentum"](momentum=1.5)


def test_the_constraint(example):
    example("crosscode/trainers/constraints/non_negative_decoder.py", CONSTRAINTS)
    values = read_yaml("sae_topk")
    values["constraints"] = {"non_negative_decoder": {}}
    config = check_config(values)
    model = build_model(config, width=4)
    model.init_weights(INITIALIZATIONS.build(config.crosscoder.init))
    assert (model.W_dec_LXoDo < 0).any()
    (constraint,) = build_constraints(config, model)
    constraint.start(model)
    assert (model.W_dec_LXoDo >= 0).all() and model.W_dec_LXoDo.any()
