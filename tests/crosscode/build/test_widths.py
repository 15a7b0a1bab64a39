"""Models of different width in one crosscoder, end to end. The oracle computes per model, in float64, without padding."""

import json
import re
from types import MappingProxyType

import pytest
import torch
import yaml
from safetensors.torch import load_file

import crosscode
from crosscode.build.converting import convert
from crosscode.build.foresight import foreseen_widths
from crosscode.commands.harvest import harvest_config, run_harvest
from crosscode.data import ActivationHarvester, load_language_model
from crosscode.data.store.joined import JoinedStores
from crosscode.errors import InputError
from crosscode.models import BaseCrosscoder
from crosscode.models.activations.batch_topk import THRESHOLD_SLACK

W_A, W_B = 6, 10


@pytest.fixture(scope="module")
def arrays():
    """One set of planted concepts in two spaces: half of them in both, a quarter in each alone."""
    generator = torch.Generator().manual_seed(0)
    n_concepts = 8
    on_NC = (torch.rand(6000, n_concepts, generator=generator) < 0.15) * torch.rand(
        6000, n_concepts, generator=generator
    )
    found = []
    for width, own in ((W_A, range(6)), (W_B, [*range(4), 6, 7])):
        directions_CD = torch.nn.functional.normalize(torch.randn(n_concepts, width, generator=generator), dim=1)
        directions_CD[[c for c in range(n_concepts) if c not in own]] = 0
        found.append(on_NC @ directions_CD * (3.0 if width == W_A else 40.0) + 0.01)
    return found


def trained(arrays, run_dir, names=("small/x", "large/x"), crosscoder=MappingProxyType({}), **fields):
    section = {"type": "model_hookpoint_acausal", "n_latents": 16, "activation": {"type": "topk", "k": 3}, **crosscoder}
    usual = {"n_tokens": 60_000, "batch_size": 256, "optimizer": {"type": "adam", "lr": 3e-3}, "backend": "torch"}
    usual["data"] = {"validation_fraction": 0.2}
    return crosscode.train(arrays, section, run_dir=str(run_dir), names=list(names), **(usual | fields))


@pytest.fixture(scope="module")
def run(arrays, tmp_path_factory):
    return trained(arrays, tmp_path_factory.mktemp("widths") / "run")


def test_padding_is_exactly_zero_in_what_was_trained(run):
    model = run.model
    assert model.widths == ((W_A,), (W_B,)) and model.d_model == W_B
    for weight in (model.W_enc_LXiDi, model.W_dec_LXoDo, model.b_dec_XoDo[None]):
        assert bool((weight[:, 0, :, W_A:] == 0).all()) and bool(weight[:, 0, :, :W_A].any())
    config = json.loads((run.path / "final" / "config.json").read_text())
    assert config["model"]["widths"] == [[W_A], [W_B]] and config["metadata"]["widths"] == [[W_A], [W_B]]


def test_figures_are_those_of_each_model_in_its_own_width(run, arrays):
    held = [acts[-1200:].double() for acts in arrays]
    weights = {name: value.double() for name, value in load_file(run.path / "final" / "model.safetensors").items()}
    W_enc, W_dec, b_dec = weights["W_enc_LXiDi"], weights["W_dec_LXoDo"], weights["b_dec_XoDo"]
    pre_BL = held[0] @ W_enc[:, 0, 0, :W_A].T + held[1] @ W_enc[:, 1, 0].T + weights["b_enc_L"]
    top = pre_BL.relu().topk(3, dim=1)
    latents_BL = torch.zeros_like(pre_BL).scatter(1, top.indices, top.values)
    fvu = run.evaluate().fvu_by_position
    decoders = (W_dec[:, 0, 0, :W_A], b_dec[0, 0, :W_A]), (W_dec[:, 1, 0], b_dec[1, 0])
    for (name, of_position), y_BD, (W_LD, b_D) in zip(fvu.items(), held, decoders, strict=True):
        error = (latents_BL @ W_LD + b_D - y_BD).square().sum() / (y_BD - y_BD.mean(0)).square().sum()
        assert of_position == pytest.approx(float(error), rel=1e-3), name
        assert of_position < 0.1


def test_scaling_gives_both_models_the_same_part_of_the_loss(run, arrays, tmp_path):
    by_width = trained(arrays, tmp_path / "run", n_tokens=512, data={"validation_fraction": 0.2, "scale": "own_width"})
    for of_run, norms in ((run, (W_B**0.5, W_B**0.5)), (by_width, (W_A**0.5, W_B**0.5))):
        scaling = of_run.model.folded_scaling_out_Xo.flatten()
        for factor, acts, norm in zip(scaling, arrays, norms, strict=True):
            assert float(factor * acts.norm(dim=1).mean()) == pytest.approx(norm, rel=0.03)


def test_a_concept_of_both_has_a_relative_norm_of_a_half(run):
    table = run.table()
    by_tag = dict(iter(table.groupby("tag")["relative_norm_large"]))
    assert len(by_tag["shared"]) >= 6 and by_tag["shared"].sub(0.5).abs().median() < 0.05
    assert len(by_tag["large-specific"]) >= 1 and by_tag["large-specific"].min() > 0.8
    assert table["decoder_cosine"].isna().all()  # vectors of different width have no angle


def test_a_run_on_own_activations_is_converted_with_what_it_holds_out(run, tmp_path):
    converted = convert(run, "jumprelu", tmp_path / "jump")
    again = crosscode.open(tmp_path / "jump")
    assert again.model.widths == run.model.widths and again.evaluate().fvu == pytest.approx(converted.after.fvu)
    assert converted.before.fvu == pytest.approx(run.evaluate().fvu)


def test_a_prefix_of_two_widths_is_a_coder_of_its_own(arrays, tmp_path):
    run = trained(
        arrays, tmp_path / "run", n_tokens=20_000, objective={"recon": {}, "matryoshka": {}},
        crosscoder={"activation": {"type": "batch_topk", "k": 3}, "prefixes": [4, 8]},
    )  # fmt: skip
    held = [acts[-1200:].double() for acts in arrays]
    weights = {name: value.double() for name, value in run.model.state_dict().items()}
    W_enc, W_dec, b_dec = weights["W_enc_LXiDi"], weights["W_dec_LXoDo"], weights["b_dec_XoDo"]
    x_BD = torch.cat(held, 1)
    pre_BL = held[0] @ W_enc[:, 0, 0, :W_A].T + held[1] @ W_enc[:, 1, 0].T + weights["b_enc_L"]
    W_dec_LD = torch.cat([W_dec[:, 0, 0, :W_A], W_dec[:, 1, 0]], 1)
    b_D = torch.cat([b_dec[0, 0, :W_A], b_dec[1, 0]])
    of_whole = float(run.model.activation_fn.threshold)
    for size, threshold, figures in zip((4, 8), run.model.prefix_thresholds_S, run.evaluate().prefixes, strict=False):
        kept_by_whole_BL = pre_BL[:, :size].relu() * (pre_BL[:, :size] > of_whole)
        error = (kept_by_whole_BL @ W_dec_LD[:size] + b_D - x_BD).square().sum() / (x_BD - x_BD.mean(0)).square().sum()
        assert figures.fvu == pytest.approx(float(error), rel=1e-4)
        run.model.prefix(size).save(tmp_path / f"prefix{size}")
        prefix = BaseCrosscoder.load(tmp_path / f"prefix{size}")
        assert prefix.widths == run.model.widths and prefix.prefixes == (4,)[: size > 4]
        padded_BMPD = torch.zeros(1200, 2, 1, W_B)
        padded_BMPD[:, 0, 0, :W_A], padded_BMPD[:, 1, 0] = arrays[0][-1200:], arrays[1][-1200:]
        own_BL = pre_BL[:, :size].relu() * (pre_BL[:, :size] > threshold)
        y_BD = prefix(padded_BMPD)[:, :, 0].detach().double()
        torch.testing.assert_close(
            torch.cat([y_BD[:, 0, :W_A], y_BD[:, 1]], 1), own_BL @ W_dec_LD[:size] + b_D, atol=1e-4, rtol=1e-4
        )
        assert not y_BD[:, 0, W_A:].any()
        of_small = prefix.export("saelens", tmp_path / f"sae{size}", position=run.model.position_names[0])
        found = load_file(of_small / "sae_weights.safetensors")
        assert found["W_dec"].shape == (size, W_A)
        torch.testing.assert_close(found["W_dec"].double(), W_dec[:size, 0, 0, :W_A])
        torch.testing.assert_close(found["threshold"], threshold.expand(size), rtol=2 * THRESHOLD_SLACK, atol=0)


def test_what_would_need_one_width_is_refused(arrays, tmp_path):
    wrong = [
        (["small/x", "large/x"], {"crosscoder": {"n_shared_latents": 4}}, "n_shared_latents = 4"),
        (["small/x", "large/x"], {"objective": {"recon": {}, "delta": {}}}, "delta: models of different width"),
        (
            ["x", "y"],
            {"crosscoder": {"type": "cross_layer_transcoder", "init": {"type": "anthropic_transpose_cross_layer"}}},
            "'y' is 10 wide, but 'x' is 6 wide; only a crosscoder",
        ),
    ]
    for names, more, message in wrong:
        with pytest.raises(InputError, match=message):
            trained(arrays, tmp_path / "run", names, **more)
        assert not (tmp_path / "run").exists()


# ---- language models


@pytest.fixture
def values(tiny_config, tiny_lms, save_tiny_lm, tmp_path):
    wide = save_tiny_lm(str(tmp_path / "wide"), seed=5, width=24)
    return {**tiny_config, "language_models": [{"path": tiny_lms[0]}, {"path": str(wide)}]}


def test_a_run_on_language_models_of_two_widths(values, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    run = crosscode.train(path, progress=False)
    assert run.model.widths == ((16,), (24,))
    recovered = run.evaluate().loss_recovered
    assert recovered is not None and len(recovered) == 2
    assert run.report().is_file()
    latent = int(run.table()["firings"].argmax())
    tokens_HS, a_max = torch.arange(4, 12)[None], run.table()["max_activation"][latent]
    for m, (lm, name) in enumerate(zip(run.language_models, run.model.position_names, strict=True)):
        vector_D = run.model.W_dec_LXoDo[latent, m, 0, : lm.d_model].detach()
        layer = lm.model.model.layers[int(run.config.hookpoints[0].split(".")[1])]
        handle = layer.register_forward_hook(lambda _module, _args, out, v=vector_D: out + 2 * a_max * v)
        expected_HSV = lm.model(tokens_HS).logits
        handle.remove()
        with run.steer({latent: 2.0}, models=m):
            torch.testing.assert_close(lm.model(tokens_HS).logits, expected_HSV, atol=1e-5, rtol=1e-5)
        expected_V = lm.model.lm_head(lm.model.model.norm(vector_D))
        torch.testing.assert_close(run.logits(latent)[name].logits_V, expected_V, atol=1e-5, rtol=1e-5)
    folder = run.model.export("saelens", tmp_path / "sae", position=run.model.position_names[1])
    assert load_file(folder / "sae_weights.safetensors")["W_enc"].shape[0] == 24


@pytest.mark.parametrize(
    ("more", "hookpoints", "message"),
    [
        (
            {"crosscoder": {"type": "cross_layer_transcoder", "init": {"type": "anthropic_transpose_cross_layer"}}},
            ["hook_resid_post", "mlp.hook_post"],
            "blocks.0.mlp.hook_post' is 24 wide, but ",
        ),
        (
            {"objective": {"recon": {}, "delta": {}}},
            [],
            "objective.delta: models of different width have no difference",
        ),
        ({"crosscoder": {"n_shared_latents": 4}}, [], "n_shared_latents = 4: must be 0 for models of different width"),
    ],
)
def test_what_train_refuses_for_its_widths_plan_and_export_refuse_before_anything_is_loaded(
    more, hookpoints, message, values, monkeypatch
):
    from crosscode.build import data, planned
    from crosscode.build.experiment import open_experiment
    from crosscode.build.plan import GPUS, plan
    from crosscode.build.schema import check_config

    monkeypatch.setattr(data, "load_models", lambda *given: 1 / 0)
    values |= more | {"crosscoder": values["crosscoder"] | more.get("crosscoder", {})}
    if hookpoints:
        values["hookpoints"] = [f"blocks.0.{name}" for name in hookpoints]
        values["language_models"] = values["language_models"][:1]
    config = check_config(values)
    refusals = [open_experiment, planned.planned_model, lambda config: plan(config, [1], GPUS["h100"])]
    for refused in refusals:
        with pytest.raises(InputError, match=re.escape(message)):
            refused(config)


def test_hookpoints_of_two_widths_have_logits_where_there_is_a_residual_stream(values, tmp_path):
    path = tmp_path / "config.yaml"
    values["language_models"], values["hookpoints"] = (
        values["language_models"][:1],
        ["blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"],
    )
    path.write_text(yaml.safe_dump(values))
    run = crosscode.train(path, progress=False)
    assert run.model.widths == ((16, 24),)
    names, (lm,) = run.model.position_names, run.language_models
    expected_V = lm.model.lm_head(lm.model.model.norm(run.model.W_dec_LXoDo[0, 0, 0, :16].detach()))
    found = run.logits(0)
    assert tuple(found) == names[:1]
    torch.testing.assert_close(found[names[0]].logits_V, expected_V, atol=1e-5, rtol=1e-5)
    assert run.report().is_file()
    record = json.loads(
        (run.path / "report" / "data" / "records-0.js").read_text().partition(",")[2].rpartition(")")[0]
    )
    assert list(record[0]["logits"]) == ["blocks.1.hook_resid_post"]


def test_what_has_no_difference_is_refused_before_models_are_loaded(values, tmp_path, monkeypatch, capsys):
    from crosscode.build import data
    from crosscode.commands.cli import main

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    crosscode.train(path, progress=False)
    monkeypatch.setattr(data, "load_models", lambda *given: 1 / 0)
    for command in (["evaluate", values["run_dir"], "--closes"], ["lens", str(path)]):
        capsys.readouterr()
        assert main(command) == 2
        assert "(widths [16], [24])" in capsys.readouterr().err


@pytest.mark.parametrize(
    "hookpoint", ["hook_resid_post", "mlp.hook_post", "mlp.hook_pre", "attn.hook_z", "attn.hook_q"]
)
def test_foreseen_widths_are_those_of_the_activations(hookpoint, values):
    models = [load_language_model(one["path"]) for one in values["language_models"]]
    hookpoints = [f"blocks.1.{hookpoint}", "blocks.0.hook_mlp_out"]
    assert foreseen_widths(models, hookpoints) == ActivationHarvester(models, hookpoints).widths_MP
    assert foreseen_widths([*models, None], hookpoints) is None


def test_apart_and_joined_they_are_the_rows_of_both(values, tmp_path):
    data = {**values["data"], "cache": {"path": str(tmp_path / "both")}}
    both = run_harvest(harvest_config({**values, "data": data}), 200, progress=False)
    for m in range(2):
        data["cache"] = {"path": str(tmp_path / str(m))}
        run_harvest(harvest_config({**values, "data": data}), 200, [m], progress=False)
    joined = JoinedStores([tmp_path / "0", tmp_path / "1"])
    index_B = torch.arange(both.n_rows)
    assert joined.dims == both.dims == (2, 1, 24)
    assert torch.equal(joined.read_rows(index_B), both.read_rows(index_B))
    assert torch.equal(joined.scaling_MP(), both.scaling_MP())
    rows_BMPD = both.read_rows(index_B)
    assert not rows_BMPD[:, 0, :, 16:].any() and rows_BMPD[:, 0, :, :16].any(-1).all()
