"""Splicing reconstructions into language models.

H sequences · S sequence · M models · P hookpoints · D width · L latents.
"""

import copy
import math

import pytest
import torch

from crosscode.data import ActivationHarvester, TokenBatch, load_language_model
from crosscode.evaluation.loss_recovered import _figures, _SequenceSums, measure_loss_recovered, reconstruct
from crosscode.evaluation.raw_model import RawModel
from crosscode.evaluation.splicing import logits_with
from crosscode.evaluation.text_parts import TextPart
from crosscode.models import (
    CompoundCrossLayerTranscoder,
    CrossLayerTranscoder,
    ModelHookpointAcausalCrosscoder,
    ReLUActivation,
    SAEOrTranscoder,
)
from crosscode.models.architecture import split_for

WIDTH = 16
RESID, IN, OUT = "blocks.{}.hook_resid_post", "blocks.{}.mlp.hook_in", "blocks.{}.hook_mlp_out"
# Inside a norm, where only TransformerBridge can read.
NORM_1, NORM_2 = "blocks.{}.ln1.hook_normalized", "blocks.{}.ln2.hook_normalized"
HOOKPOINTS = {
    ("model_hookpoint_acausal", "modules"): [RESID.format(0), RESID.format(1)],
    ("model_hookpoint_acausal", "bridge"): [NORM_1.format(1), RESID.format(1)],
    ("sae", "modules"): [RESID.format(1)],
    ("sae", "bridge"): [NORM_2.format(1)],
    ("transcoder", "modules"): [IN.format(1), OUT.format(1)],
    ("transcoder", "bridge"): [NORM_1.format(1), NORM_2.format(1)],
    ("cross_layer_transcoder", "modules"): [IN.format(0), OUT.format(0), OUT.format(1)],
    ("cross_layer_transcoder", "bridge"): [NORM_2.format(0), NORM_2.format(1), OUT.format(1)],
    ("compound_cross_layer_transcoder", "modules"): [IN.format(0), IN.format(1), OUT.format(0), OUT.format(1)],
    ("compound_cross_layer_transcoder", "bridge"): [IN.format(0), IN.format(1), NORM_2.format(1), OUT.format(1)],
}
CASES = {
    "model_hookpoint_acausal": lambda n, fn: ModelHookpointAcausalCrosscoder(2, 2, WIDTH, n, fn),
    "sae": lambda n, fn: SAEOrTranscoder(WIDTH, WIDTH, n, fn),
    "transcoder": lambda n, fn: SAEOrTranscoder(WIDTH, WIDTH, n, fn, linear_skip=True),
    "cross_layer_transcoder": lambda n, fn: CrossLayerTranscoder(2, WIDTH, WIDTH, n, fn),
    "compound_cross_layer_transcoder": lambda n, fn: CompoundCrossLayerTranscoder(2, WIDTH, WIDTH, n, fn),
}


@pytest.fixture(scope="module")
def models(tiny_lms):
    torch.set_num_threads(1)
    loaded = [load_language_model(path) for path in tiny_lms]
    for seed, model in enumerate(loaded):
        # A random model of this size hardly reacts to its activations: make it react.
        generator = torch.Generator().manual_seed(seed)
        for param in model.model.parameters():
            param.copy_(param + 0.3 * torch.randn(param.shape, generator=generator))
    return loaded


def batch_of(models, n_sequences=6, length=12, seed=0, segments=False, holes=True):
    """Sequences that the first model itself has continued, so that it predicts them well."""
    generator = torch.Generator().manual_seed(seed)
    tokens_HS = torch.randint(3, 60, (n_sequences, 1), generator=generator)
    for _ in range(length - 1):
        probs_HV = (3 * logits_with(models[0], tokens_HS, None)[:, -1]).softmax(-1)
        tokens_HS = torch.cat([tokens_HS, torch.multinomial(probs_HV, 1, generator=generator)], 1)
    mask_HS = torch.ones_like(tokens_HS, dtype=torch.bool)
    mask_HS[:, 0] = False
    if holes:
        mask_HS[1, 5] = False
        mask_HS[-1, 8:] = False
    segments_HS = (torch.arange(length) >= 7).long().expand(n_sequences, -1) if segments else None
    return TokenBatch(tokens_HS, mask_HS, segments_HS, 0)


def setup(kind, models, path="modules", n_latents=24, seed=0):
    hookpoints = HOOKPOINTS[kind, path]
    harvester = ActivationHarvester(models if kind == "model_hookpoint_acausal" else models[:1], hookpoints)
    assert set(harvester.paths) == {path}
    split = split_for(kind)
    names_MP = [[f"{name}/{hook}" for hook in hookpoints] for name in ("one", "two")[: harvester.dims[0]]]
    model = CASES[kind](n_latents, ReLUActivation(n_latents))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(0.2 * torch.randn(param.shape, generator=generator))
    ones = split.scaling(torch.ones(harvester.dims[:2]))
    model.fold_activation_scaling_into_weights_(*ones)
    return harvester, split, names_MP, model


class Oracle(torch.nn.Module):
    """Knows the target of every input that it will be shown, and adds an error to it."""

    def __init__(self, model, harvester, batches, split):
        super().__init__()
        self.device, self.d_out = torch.device("cpu"), model.d_out
        acts = torch.cat([harvester.harvest(b.tokens_HS, b.segments_HS)[b.mask_HS] for b in batches])
        self.inputs, self.targets = split.activations(acts)

    def forward(self, input_BXiDi):
        distances = torch.cdist(input_BXiDi.flatten(1).double(), self.inputs.flatten(1).double())
        assert float(distances.min(1).values.max()) < 1e-5
        return self.targets[distances.argmin(1)]


@pytest.mark.parametrize(
    ("path", "segments"),
    [("modules", False), ("modules", True), ("bridge", False)],
    ids=["modules", "isolated-documents", "bridge"],
)
@pytest.mark.parametrize("kind", CASES)
def test_a_perfect_reconstruction_recovers_all_loss_and_zeros_none(kind, path, segments, models):
    harvester, split, names_MP, model = setup(kind, models, path)
    batches = [batch_of(models, seed=seed, segments=segments) for seed in range(2)]
    oracle = Oracle(model, harvester, batches, split)
    perfect = measure_loss_recovered(oracle, harvester, batches, split, names_MP, n_tokens=1000)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    zero = measure_loss_recovered(model, harvester, batches, split, names_MP, n_tokens=1000)
    assert perfect.keys() == zero.keys() >= set(split.output_names(names_MP))
    n_predictions = sum(int((b.mask_HS[:, :-1] & b.mask_HS[:, 1:]).sum()) for b in batches)
    for name in perfect:
        assert perfect[name].n_tokens == n_predictions
        assert perfect[name].ce_spliced == pytest.approx(perfect[name].ce_clean, rel=1e-6)
        assert perfect[name].kl_spliced == pytest.approx(0, abs=1e-9)
        assert zero[name].ce_spliced == zero[name].ce_zero
        assert zero[name].kl_spliced == zero[name].kl_zero > 1e-4
        if zero[name].loss_recovered is not None:
            assert perfect[name].loss_recovered == pytest.approx(1, abs=1e-4)
            assert zero[name].loss_recovered == 0
    assert any(found.loss_recovered is not None for found in zero.values())


def put(new_SD, mask_S):
    """A TransformerLens hook that replaces some positions, one by one."""

    def hook(act, hook):
        act = act.clone()
        for s in range(act.shape[1]):
            if mask_S[s]:
                act[0, s] = new_SD[s]
        return act

    return hook


def slow_figures(run, batch, recon_HSD):
    """The five figures from `run(tokens_1S, acts_SD | None, mask_S) -> logits_1SV`, prediction by prediction."""
    sums, n = dict.fromkeys(("ce_clean", "ce_spliced", "ce_zero", "kl_spliced", "kl_zero"), 0.0), 0
    for tokens_S, mask_S, recon_SD in zip(batch.tokens_HS, batch.mask_HS, recon_HSD, strict=True):
        replaced = {"clean": None, "spliced": recon_SD, "zero": torch.zeros_like(recon_SD)}
        with torch.no_grad():
            logits = {key: run(tokens_S[None], acts_SD, mask_S)[0].double() for key, acts_SD in replaced.items()}
        for s in range(len(tokens_S) - 1):
            if not (mask_S[s] and mask_S[s + 1]):
                continue
            n += 1
            probs = {key: logits_SV[s].softmax(-1) for key, logits_SV in logits.items()}
            for key, prob_V in probs.items():
                sums[f"ce_{key}"] -= math.log(prob_V[tokens_S[s + 1]])
            for key in ("spliced", "zero"):
                sums[f"kl_{key}"] += float((probs["clean"] * (probs["clean"] / probs[key]).log()).sum())
    return n, {key: value / n for key, value in sums.items()}


def assert_agree(ours, n, slow):
    assert ours.n_tokens == n
    for key, value in slow.items():
        assert getattr(ours, key) == pytest.approx(value, rel=1e-4), key
    if ours.loss_recovered is not None:
        expected = (slow["ce_zero"] - slow["ce_spliced"]) / (slow["ce_zero"] - slow["ce_clean"])
        assert ours.loss_recovered == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("kind", CASES)
def test_figures_agree_with_a_slow_computation_in_transformer_lens(kind, models):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    harvester, split, names_MP, model = setup(kind, models)
    batch = batch_of(models)
    found = measure_loss_recovered(model, harvester, [batch], split, names_MP)
    acts_HSMPD = harvester.harvest(batch.tokens_HS, batch.segments_HS).float()
    recon_HSXD = reconstruct(RawModel(model, split, None), acts_HSMPD, batch.mask_HS)
    names_X = split.output_names(names_MP)
    for lm, names_P in zip(harvester.models, names_MP, strict=True):
        bridge = build_bridge_from_module(
            copy.deepcopy(lm.model), type(lm.model).__name__, hf_config=lm.model.config, model_name="tiny"
        )
        for name, hook_name in zip(names_P, harvester.hookpoints, strict=True):
            if name not in names_X:
                continue

            def run(tokens_1S, acts_SD, mask_S, bridge=bridge, hook_name=hook_name):
                hooks = [] if acts_SD is None else [(hook_name, put(acts_SD, mask_S))]
                return bridge.run_with_hooks(tokens_1S, fwd_hooks=hooks, return_type="logits")

            assert_agree(found[name], *slow_figures(run, batch, recon_HSXD[:, :, names_X.index(name)]))


@pytest.mark.parametrize("kind", CASES)
def test_figures_inside_a_norm_agree_with_the_plain_model(kind, models):
    """The same by hand: what a norm hands on is its weight times what is spliced in before that weight."""
    harvester, split, names_MP, model = setup(kind, models, "bridge")
    batch = batch_of(models)
    found = measure_loss_recovered(model, harvester, [batch], split, names_MP)
    acts_HSMPD = harvester.harvest(batch.tokens_HS, batch.segments_HS).float()
    recon_HSXD = reconstruct(RawModel(model, split, None), acts_HSMPD, batch.mask_HS)
    names_X = split.output_names(names_MP)
    n_checked = 0
    for lm, names_P in zip(harvester.models, names_MP, strict=True):
        for name, hook_name in zip(names_P, harvester.hookpoints, strict=True):
            if name not in names_X or "hook_normalized" not in hook_name:
                continue
            layer = lm.model.model.layers[int(hook_name.split(".")[1])]
            norm = layer.input_layernorm if ".ln1." in hook_name else layer.post_attention_layernorm

            def run(tokens_1S, acts_SD, mask_S, lm=lm, norm=norm):
                def replace(module, args, output):
                    return torch.where(mask_S[None, :, None], module.weight * acts_SD, output)

                handle = None if acts_SD is None else norm.register_forward_hook(replace)
                try:
                    return lm.model(tokens_1S).logits
                finally:
                    if handle is not None:
                        handle.remove()

            assert_agree(found[name], *slow_figures(run, batch, recon_HSXD[:, :, names_X.index(name)]))
            n_checked += 1
    assert n_checked


def test_all_hookpoints_at_once_replaces_them_all(models):
    harvester, split, names_MP, model = setup("model_hookpoint_acausal", models)
    batch = batch_of(models, holes=False)
    found = measure_loss_recovered(model, harvester, [batch], split, names_MP)
    # The last layer of the two overwrites what the first did: all at once equals the last alone.
    for name in ("one", "two"):
        last = found[f"{name}/blocks.1.hook_resid_post"]
        assert found[f"{name}/all hookpoints"].ce_zero == pytest.approx(last.ce_zero, rel=1e-6)
    assert len(found) == 6


def test_zeros_that_hurt_without_bound_give_no_ratio():
    sums = _SequenceSums()
    tokens_HS, mask_HS = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    part = TextPart(tokens_HS, mask_HS, None, torch.zeros(2, 3, 1, 1, 1), mask_HS)
    good_HSV = torch.randn(2, 3, 4)
    figure_NF = _figures(part, good_HSV, good_HSV, torch.full((2, 3, 4), math.nan))
    sums.add(part, figure_NF, torch.ones(4, dtype=torch.bool))
    found = sums.result()
    assert found.loss_recovered is None
    assert found.ce_spliced == found.ce_clean
    assert found.ci95.keys() == {"ce_clean", "ce_spliced", "kl_spliced"}


def test_text_without_a_prediction_gives_nothing(models):
    harvester, split, names_MP, model = setup("sae", models)
    batch = batch_of(models)
    batch.mask_HS[:, ::2] = False
    assert measure_loss_recovered(model, harvester, [batch], split, names_MP) == {}


def test_a_model_in_training_is_measured_in_raw_space(models):
    harvester, split, names_MP, model = setup("sae", models)
    scaling_MP = torch.tensor([[0.3]])
    folded = SAEOrTranscoder(WIDTH, WIDTH, 24, ReLUActivation(24))
    plain = SAEOrTranscoder(WIDTH, WIDTH, 24, ReLUActivation(24))
    weights = {name: tensor for name, tensor in model.state_dict().items() if "folded" not in name}
    for other in (folded, plain):
        other.load_state_dict(weights)
    folded.fold_activation_scaling_into_weights_(*split.scaling(scaling_MP))
    one = measure_loss_recovered(folded, harvester, [batch_of(models)], split, names_MP)
    two = measure_loss_recovered(plain.train(), harvester, [batch_of(models)], split, names_MP, scaling_MP)
    assert plain.training
    for name in one:
        assert one[name].ce_spliced == pytest.approx(two[name].ce_spliced, rel=1e-5)


def test_intervals_hold_the_means_and_narrow_with_more_sequences(models):
    harvester, split, names_MP, model = setup("sae", models)

    def width(n_batches):
        batches = [batch_of(models, n_sequences=8, seed=seed) for seed in range(n_batches)]
        (found,) = measure_loss_recovered(model, harvester, batches, split, names_MP, n_tokens=10**6).values()
        for name, (low, high) in found.ci95.items():
            assert low <= getattr(found, name) <= high
        assert found.n_sequences == 8 * n_batches
        return found.ci95["ce_spliced"][1] - found.ci95["ce_spliced"][0]

    assert width(8) < 0.7 * width(1)


def test_the_models_are_left_without_hooks_and_unlocked(models):
    harvester, split, names_MP, model = setup("sae", models)
    batch = batch_of(models)
    before = logits_with(harvester.models[0], batch.tokens_HS, None)
    measure_loss_recovered(model, harvester, [batch], split, names_MP)
    assert torch.equal(logits_with(harvester.models[0], batch.tokens_HS, None), before)
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks for module in harvester.models[0].model.modules()
    )
