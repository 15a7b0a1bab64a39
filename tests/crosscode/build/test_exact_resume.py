"""Every kind of state comes back: a trainer that is restored goes on to the bit, whatever it trains."""

import pytest
import torch

AUXK = {"recon": {}, "auxk": {"k_aux": 4, "dead_after_tokens": 40}}
JUMPRELU = {"type": "jumprelu", "log_threshold_init": -1.0}
PENALTIES = {"recon": {}, "tanh": {"weight": 0.1}, "pre_act": {}}
BATCH_TOPK = {"type": "batch_topk", "k": 4, "threshold_ema_decay": 0.5}
COMPOUND = {"kind": "compound_cross_layer_transcoder", "dims": (1, 4, 6)}
CASES = {
    "topk": {"activation": {"type": "topk", "k": 4}, "objective": AUXK},
    "topk, annealed": {"activation": {"type": "topk", "k": 2, "k_start": 8, "k_anneal_fraction": 0.8}},
    "batch_topk by norm, in parts": {
        "activation": BATCH_TOPK | {"rank_by": "decoder_norm_weighted"}, "objective": AUXK, "grad_accumulation": 4,
    },
    "batch_topk, multi-topk": {
        "activation": BATCH_TOPK, "objective": {"recon": {}, "multi_topk": {"factor": 3}, "auxk": AUXK["auxk"]},
    },
    "batch_topk, bfloat16": {"activation": BATCH_TOPK, "objective": AUXK, "precision": "bfloat16"},
    "groupmax": {"activation": {"type": "groupmax", "k": 4}, "objective": AUXK},
    "relu, ramp": {
        "activation": {"type": "relu"},
        "objective": {"recon": {}, "l1": {"weight": {"type": "linear_ramp", "value": 0.1, "ramp_fraction": 0.7}}},
    },
    "jumprelu": {"activation": JUMPRELU, "objective": PENALTIES},
    "relu, wanted l0": {"activation": {"type": "relu"}, "objective": {
        "recon": {}, "l1": {"weight": {"type": "linear_ramp", "value": 0.1, "ramp_fraction": 0.7}, "target_l0": 3},
    }},
    "jumprelu, wanted l0": {
        "activation": {"type": "jumprelu", "thresholds": "linear"},
        "objective": {"recon": {}, "l0": {"target": 3, "weight": {"type": "warm_up", "value": 10.0, "warmup_fraction": 0.8}}},
    },
    "jumprelu, in parts": {"activation": JUMPRELU, "objective": PENALTIES, "grad_accumulation": 2},
    "jumprelu, wanted l0 of tanh, in parts": {
        "activation": JUMPRELU, "objective": PENALTIES | {"tanh": {"weight": 0.1, "target_l0": 3}}, "grad_accumulation": 2,
    },
    "jumprelu, reference": {"activation": JUMPRELU, "objective": PENALTIES, "backend": "reference"},
    "schedule-free": {"optimizer": {"type": "sign_sgd_schedule_free", "lr": 0.01}, "evaluate_every": 2},
    "resampling": {
        "activation": {"type": "batch_topk", "k": 1}, **COMPOUND,
        "resample": {"every": 2, "until": 1.0, "dead_after_tokens": 32},
    },
    "resampling, schedule-free": {
        "activation": {"type": "topk", "k": 1}, "resample": {"every": 2, "dead_after_tokens": 32}, "grad_accumulation": 2,
        "optimizer": {"type": "sign_sgd_schedule_free", "lr": 0.01},
    },
    "skips": {"max_skipped_steps": 3, "poison": {1: float("nan"), 7: float("inf")}},
    "compound": {"activation": BATCH_TOPK, "objective": AUXK, **COMPOUND},
    "compound over all layers": {
        "activation": BATCH_TOPK, "objective": AUXK, "model_options": {"topk_scope": "all_layers"}, **COMPOUND,
    },
    "shared latents": {"activation": JUMPRELU, "objective": PENALTIES, "model_options": {"n_shared_latents": 6}},
    "partition": {
        "activation": BATCH_TOPK, "objective": AUXK,
        "model_options": {"partition": [{"models": [0], "n_latents": 5}, {"models": [1], "n_latents": 4}]},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_restored_trainer_goes_on_to_the_bit(case, make_trainer, planted, rows_of):
    options = dict(CASES[case])
    dims, poison = options.pop("dims", (2, 1, 6)), options.pop("poison", None)

    def make(name, seed=0):
        data = planted(dims=dims, poison=poison)
        return make_trainer(
            name, data=data, seed=seed, checkpoint_every=3, dead_after_tokens=40, keep_last=9, **options
        )

    whole = make("whole")
    whole.train()
    for step in (3, 6, 9):
        broken = make(f"from {step}")
        broken.start()
        batches = iter(broken.data)
        for _ in range(min(step + 2, 10)):
            broken.train_step(next(batches))
        again = make(f"from {step}", seed=1)
        again.restore(step)
        assert again.step == step
        again.train()
        for name, tensor in again.model.state_dict().items():
            assert torch.equal(tensor, whole.model.state_dict()[name]), name
        noise = ("time/", "memory/", "tokens_per_s", "elapsed_s")
        ours, theirs = (
            [{key: str(value) for key, value in row.items() if not key.startswith(noise)} for row in rows_of(trainer)]
            for trainer in (again, whole)
        )
        assert ours == theirs
