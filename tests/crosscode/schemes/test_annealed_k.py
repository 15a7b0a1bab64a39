"""A k that falls while a model is trained, in every scheme: the schedule at each step, what is saved, and going on in between.

Axes: B tokens · L latents.
"""

from __future__ import annotations

import pytest
import torch

from crosscode.models import BaseCrosscoder
from crosscode.trainers.constraints import TieTargets

K = 2
FALLING = {"k": K, "k_start": 8, "k_anneal_fraction": 1.0}
KS = [8, 7, 7, 6, 6, 5, 4, 4, 3, 3]
"""Of ten steps: 8 - 0.6 t, rounded; the last one is not at k yet."""
NEAR = 2
"""What comes with the smallest of 640, within the slack of a threshold."""
TOPK, BATCH_TOPK = {"type": "topk", **FALLING}, {"type": "batch_topk", "threshold_ema_decay": 0.5, **FALLING}
CLT = {"kind": "compound_cross_layer_transcoder", "dims": (1, 6, 6)}
NESTED = {"recon": {}, "matryoshka": {}}
OWN = [{"models": [0], "n_latents": 5}, {"models": [1], "n_latents": 4}]
CASES = {
    "crosscoder": {"activation": TOPK},
    "transcoder set": {"activation": BATCH_TOPK, "model_options": {"later_layers": False}, **CLT},
    "transcoder set over all layers": {
        "activation": TOPK, "model_options": {"later_layers": False, "topk_scope": "all_layers"}, **CLT,
    },
    "tied CLT": {"activation": BATCH_TOPK, "constraints": (TieTargets(),), **CLT},
    "tied CLT over all layers": {
        "activation": BATCH_TOPK, "constraints": (TieTargets(),), "model_options": {"topk_scope": "all_layers"}, **CLT,
    },
    "Matryoshka": {"activation": BATCH_TOPK, "objective": NESTED, "model_options": {"prefixes": [6, 12]}},
    "Matryoshka, TopK": {"activation": TOPK, "objective": NESTED, "model_options": {"prefixes": [6, 12]}},
    "Matryoshka CLT": {"activation": TOPK, "objective": NESTED, "model_options": {"prefixes": [6, 12]}, **CLT},
    "Matryoshka CLT over all layers": {
        "activation": BATCH_TOPK, "objective": NESTED, "model_options": {"prefixes": [6], "topk_scope": "all_layers"}, **CLT,
    },
    "by decoder norms, in parts": {
        "activation": BATCH_TOPK | {"rank_by": "decoder_norm_weighted"}, "grad_accumulation": 4,
    },
    "dedicated features": {"activation": BATCH_TOPK, "model_options": {"partition": OWN}},
    "delta": {"activation": BATCH_TOPK, "objective": {"recon": {}, "delta": {}}},
    "two widths": {"activation": BATCH_TOPK, "model_options": {"widths": [[4], [6]]}},
    "two widths, Matryoshka": {
        "activation": TOPK, "objective": NESTED, "model_options": {"widths": [[4], [6]], "prefixes": [6]},
    },
}  # fmt: skip


@pytest.fixture(params=CASES)
def make(request, make_trainer, planted):
    """A trainer of a case, all of whose latents are positive at the start, so that k of them are kept."""

    class Padded(planted):
        def __iter__(self):
            for acts_BMPD in super().__iter__():
                for m, widths in enumerate(options.get("model_options", {}).get("widths", ())):
                    acts_BMPD[:, m, :, widths[0] :] = 0
                yield acts_BMPD

    options = dict(CASES[request.param])
    dims = options.pop("dims", (2, 1, 6))

    def trainer(name, seed=0):
        made = make_trainer(name, data=Padded(dims=dims), seed=seed, checkpoint_every=5, **options)
        with torch.no_grad():
            for part in made.model.parts:
                part.b_enc_L.fill_(20.0)
        return made

    return trainer


def kept_of_steps(trainer):
    """Of each step the number of latents that the whole batch keeps."""
    kept, train_step = [], trainer.train_step

    def counting(*args):
        done = train_step(*args)
        kept.append(round(float(trainer.firing.l0) * 32, 3))
        return done

    trainer.train_step = counting
    return kept


def n_choices(model):
    """How many times k latents are chosen of a token."""
    return 1 if model.selects_over_parts else len(model.parts)


def test_k_falls_step_by_step_to_what_is_saved_and_goes_on_where_it_was(make):
    whole = make("whole")
    kept = kept_of_steps(whole)
    whole.train()
    assert kept == [32 * k * n_choices(whole.model) for k in KS]

    broken = make("broken")
    broken.start()
    batches = iter(broken.data)
    for _ in range(6):
        broken.train_step(next(batches))
    again = make("broken", seed=1)
    again.restore(5)
    kept_again = kept_of_steps(again)
    again.train()
    assert kept_again == kept[5:]
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


def ranks_of(model, x_BXiDi):
    """By source layer, what is ranked."""
    inputs = [x_BXiDi] if len(model.parts) == 1 else x_BXiDi.unbind(1)
    for part, x in zip(model.parts, inputs, strict=True):
        a_BL = (x.flatten(1) @ part.W_enc_LI.T + part.b_enc_L).relu()
        yield a_BL * part.ranking_norms_L() if part.activation_fn.uses_decoder_norms else a_BL


def kept_by_training(model, x_BXiDi):
    """`kept_BSL` of source layers S, by sorting."""
    rank_BSL = torch.stack([*ranks_of(model, x_BXiDi)], 1)
    B, S, L = rank_BSL.shape
    apart = rank_BSL.reshape(B, 1, S * L) if model.selects_over_parts else rank_BSL
    per_group = apart.transpose(0, 1)  # groups that are chosen from, tokens, latents
    if model.parts[0].activation_fn.selects_over_batch:
        smallest = per_group.flatten(1).sort(1, descending=True).values[:, K * B - 1][:, None, None]
    else:
        smallest = per_group.sort(2, descending=True).values[:, :, K - 1, None]
    return (per_group >= smallest).transpose(0, 1).reshape(B, S, L)


@torch.no_grad()
def test_thresholds_are_those_of_the_last_k(make):
    """Of what was trained on: k a token where a threshold decides, and of a prefix as many as training keeps with k."""
    trainer = make("run")
    with torch.enable_grad():
        trainer.train()
    model, scaling_MP = trainer.model.eval(), trainer.data.scaling_MP  # which is folded in
    trainer.data.number = 0
    batches = iter(trainer.data)
    inputs = [trainer.split.activations(next(batches) / scaling_MP[..., None])[0] for _ in range(10)]

    def n_active(coder):
        return sum(int((coder.encode(x) > 0).sum()) for x in inputs)

    if model.parts[0].activation_fn.selects_over_batch:
        assert n_active(model) == pytest.approx(320 * K * n_choices(model), abs=NEAR)
    saved = BaseCrosscoder.load(trainer.run.final)
    for size in model.prefixes:
        own = size // len(model.parts)
        n = sum(int(kept_by_training(model, x)[:, :, :own].sum()) for x in inputs)
        assert n_active(model.prefix(size)) == n_active(saved.prefix(size)) == pytest.approx(n, abs=NEAR)
    assert n_active(saved) == pytest.approx(320 * K * n_choices(model), abs=NEAR)
