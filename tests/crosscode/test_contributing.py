"""The examples of CONTRIBUTING.md do what the text says, each from one file."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from crosscode.config.registry import Registry, build_component
from crosscode.errors import InputError
from crosscode.models import ACTIVATIONS, INITIALIZATIONS, BaseCrosscoder, SAEOrTranscoder, TopkActivation
from crosscode.objectives import TERMS, LossContext, Objective, as_schedule

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
    assert [Path(path).parent.name for path in EXAMPLES] == ["activations", "terms", "initialization"]


def test_the_activation(example, tmp_path):
    example("crosscode/models/activations/soft_threshold.py", ACTIVATIONS)
    config = TypeAdapter(ACTIVATIONS.config_union()).validate_python({"type": "soft_threshold", "threshold": 0.2})
    activation = build_component(ACTIVATIONS, config, n_latents=8)
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
