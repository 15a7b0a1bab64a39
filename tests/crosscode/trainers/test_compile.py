"""The compiled step gives the eager losses within the error budget."""

import pytest
import torch

from crosscode.errors import InputError

AUXK = {"recon": {}, "auxk": {"k_aux": 4, "dead_after_tokens": 40}}
SCHEMES = {
    "topk": ({"type": "topk", "k": 4}, AUXK),
    "batch_topk": ({"type": "batch_topk", "k": 4}, {"recon": {}}),
    "jumprelu": (
        {"type": "jumprelu", "log_threshold_init": -1.0},
        {"recon": {}, "tanh": {"weight": 0.1}, "pre_act": {}},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_compiled_run_gives_the_eager_losses(scheme, make_trainer, rows_of):
    torch._dynamo.reset()
    activation, objective = SCHEMES[scheme]
    runs = [
        make_trainer(name, activation=activation, objective=objective, n_steps=8, compile=compiled)
        for name, compiled in (("eager", False), ("compiled", True))
    ]
    for trainer in runs:
        trainer.train()
    eager, compiled = map(rows_of, runs)
    for row, expected in zip(compiled, eager, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["l0"] == pytest.approx(expected["l0"], rel=1e-2)
    assert torch.equal(runs[0].firing.tokens_since_fired_L, runs[1].firing.tokens_since_fired_L)


def test_a_machine_that_cannot_compile_says_so_in_one_line(make_trainer, monkeypatch):
    from torch._dynamo.exc import Unsupported

    def cannot(function):
        def fail(*args):
            raise Unsupported("no compiler found\nand a long story")

        return fail

    monkeypatch.setattr(torch, "compile", cannot)
    trainer = make_trainer(compile=True)
    with pytest.raises(
        InputError, match=r"train.compile = true: .*no compiler found.*; set train.compile: false"
    ) as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
