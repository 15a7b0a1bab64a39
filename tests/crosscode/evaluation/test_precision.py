"""bfloat16 autocast with float32 weights, the switch for TF32, and the compiled step."""

import pytest
import torch

from crosscode.evaluation.precision import float32_products, full_precision

AUXK = {"recon": {}, "auxk": {"k_aux": 4, "dead_after_tokens": 40}}
SCHEMES = {
    "topk": ({"type": "topk", "k": 4}, AUXK),
    "batch_topk": ({"type": "batch_topk", "k": 4, "rank_by": "decoder_norm_weighted"}, AUXK),
    "groupmax": ({"type": "groupmax", "k": 4}, {"recon": {}}),
    "relu": ({"type": "relu"}, {"recon": {}, "l1": {"weight": 0.01}}),
    "jumprelu": (
        {"type": "jumprelu", "log_threshold_init": -1.0},
        {"recon": {}, "tanh": {"weight": 0.01}, "pre_act": {}},
    ),
}


@pytest.mark.parametrize("n_parts", [1, 2])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16_comes_near_float32_and_keeps_state_in_float32(scheme, backend, n_parts, make_trainer, rows_of):
    activation, objective = SCHEMES[scheme]
    options = {"activation": activation, "objective": objective, "backend": backend, "n_steps": 40, "log_every": 20}
    exact = make_trainer("exact", **options)
    exact.train()
    fast = make_trainer("fast", **options, precision="bfloat16", grad_accumulation=n_parts)
    fast.train()
    kept = [*fast.model.state_dict().values(), *fast.firing.state_dict().values()]
    kept += [value for state in fast.optimizer.state.values() for value in state.values()]
    assert {value.dtype for value in kept} <= {torch.float32, torch.int64}
    losses = [rows_of(trainer)[-1]["loss"] for trainer in (exact, fast)]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_loss_is_summed_in_float32(make_trainer, planted):
    trainer = make_trainer(precision="bfloat16")
    _, terms = trainer.forward(*trainer.split.activations(next(iter(planted()))))
    loss = trainer.objective.weigh(terms, trainer.objective.coefficients(0, 10))
    assert loss.total.dtype == torch.float32
    assert {value.dtype for value in loss.parts.values()} == {torch.float32}


@pytest.mark.parametrize(("tf32", "expected"), [(False, "highest"), (True, "high")])
def test_the_tf32_switch_holds_for_the_run_alone(tf32, expected):
    before = torch.get_float32_matmul_precision()
    with float32_products(tf32=tf32):
        assert torch.get_float32_matmul_precision() == expected
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this PyTorch has one setting")
@pytest.mark.parametrize("own", ["ieee", "tf32"])
def test_a_setting_made_by_the_newer_interface_is_put_back(own):
    matmul, on_cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before, on_cpu_before = matmul.fp32_precision, on_cpu.fp32_precision
    try:
        matmul.fp32_precision, on_cpu.fp32_precision = own, "ieee"
        with float32_products(tf32=own == "ieee"):
            assert matmul.fp32_precision == ("tf32" if own == "ieee" else "ieee")
            with full_precision():
                assert matmul.fp32_precision == "ieee"
        assert (matmul.fp32_precision, on_cpu.fp32_precision) == (own, "ieee")
    finally:
        matmul.fp32_precision, on_cpu.fp32_precision = before, on_cpu_before
