"""What a model's activations are is tried out: what cannot be right is refused before anything is made of it."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from crosscode.data import ActivationHarvester, TokenSequenceLoader, wrap_documents, wrap_language_model
from crosscode.data.harvest.trials import check_isolation, check_length
from crosscode.data.rows import HarvestedRows
from crosscode.errors import InputError

SIZE = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "pad_token_id": 1}  # fmt: skip
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16}
FALCON_H1 = {
    **GROUPED,
    "mamba_d_ssm": 16,
    "mamba_n_heads": 2,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
}


def tiny(kind, auto=AutoModelForCausalLM, scale=4.0, **config):
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **{**SIZE, **config}))
    for weight in model.parameters():
        weight.data *= scale if weight.ndim > 1 else 1.0
    return wrap_language_model(model, None, f"tiny/{kind}")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bert", {}),
        ("electra", {"embedding_size": 16}),
        ("gemma3_text", {**GROUPED, "use_bidirectional_attention": True}),
        ("llama", {"is_causal": False}),
    ],
)
def test_bidirectional_attention_is_refused_and_what_comes_before_it_is_not(kind, config):
    model = tiny(kind, **config)
    assert ActivationHarvester([model], ["blocks.0.hook_resid_pre"]).dims == (1, 1, 16)
    with pytest.raises(InputError, match=r"blocks.1.hook_resid_post.* sees later tokens"):
        ActivationHarvester([model], ["blocks.1.hook_resid_post"])


def test_an_encoder_is_refused():
    t5 = tiny("t5", AutoModel, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2).model.encoder
    with pytest.raises(InputError, match="sees later tokens"):
        ActivationHarvester([wrap_language_model(t5, None, "t5")], ["block.1"])


@pytest.mark.parametrize(
    ("kind", "config", "right", "wrong"),
    [
        ("opt", {**OPT, "do_layer_norm_before": True}, ["hook_resid_mid", "hook_attn_out"], []),
        ("opt", {**OPT, "do_layer_norm_before": False}, ["hook_resid_post"], ["hook_resid_mid", "hook_attn_out"]),
        ("falcon_h1", {**FALCON_H1, "attention_out_multiplier": 0.25}, ["hook_resid_post"], ["hook_attn_out"]),
        ("granite", {**GROUPED, "residual_multiplier": 0.3}, ["hook_attn_out", "hook_mlp_out", "hook_resid_mid"], []),
        ("cohere", GROUPED, ["hook_attn_out", "hook_mlp_out"], []),
        ("mixtral", {**GROUPED, "num_local_experts": 4}, ["hook_mlp_out"], ["mlp.hook_post", "mlp.hook_pre"]),
        ("granite", GROUPED, ["mlp.hook_post", "mlp.hook_pre"], []),
        ("falcon_h1", {**FALCON_H1, "mlp_multipliers": [0.4, 1.0]}, ["mlp.hook_post"], ["mlp.hook_pre"]),
        ("falcon_h1", FALCON_H1, ["mlp.hook_post", "mlp.hook_pre"], []),
    ],
)  # fmt: skip
def test_a_name_is_what_it_says_or_refused(kind, config, right, wrong):
    model = tiny(kind, **config)
    for name in right:
        ActivationHarvester([model], [f"blocks.1.{name}"])
    for name in wrong:
        with pytest.raises(InputError, match=rf"hookpoints: .*blocks.1.{name}.* of 'tiny/{kind}' "):
            ActivationHarvester([model], [f"blocks.1.{name}"])


@pytest.mark.parametrize(
    ("kind", "config", "path"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}, "transformer.wpe"),
        ("llama", GROUPED, "model.rotary_emb"),
    ],
)
def test_a_module_without_a_batch_axis_is_refused(kind, config, path):
    with pytest.raises(InputError, match=rf"'{path}' of .* gives a tensor of shape \(1, 11, \d+\) for 2 x 11 tokens"):
        ActivationHarvester([tiny(kind, **config)], [path])


def test_a_bridge_that_cannot_be_built_is_refused_in_words():
    model = tiny("falcon", num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True)
    ActivationHarvester([model], ["blocks.1.hook_resid_post"])
    with pytest.raises(InputError, match=r"hookpoints: 'tiny/falcon' .* cannot be run in TransformerBridge") as error:
        ActivationHarvester([model], ["blocks.1.hook_mlp_out"])
    assert "\n" not in str(error.value)


def test_a_hybrid_that_carries_a_state_does_not_isolate_documents():
    """Its attention keeps inside a document; its state leaks a few percent."""
    model = tiny("falcon_h1", **FALCON_H1, ssm_out_multiplier=0.05)
    harvester = ActivationHarvester([model], ["blocks.1.hook_resid_post"])
    with pytest.raises(InputError, match="cannot keep attention inside"):
        check_isolation(harvester)
    check_isolation(ActivationHarvester([tiny("llama", **GROUPED)], ["blocks.1.hook_resid_post"]))


@pytest.mark.parametrize(
    ("kind", "config", "limit"),
    [
        ("roberta", {"is_decoder": True}, 30),
        ("camembert", {"is_decoder": True, "pad_token_id": 3}, 28),
        ("opt", OPT, 32),
        ("llama", GROUPED, 32),
    ],
)
def test_the_limit_of_positions_is_the_model_s_own(kind, config, limit):
    model = tiny(kind, **config)
    assert model.max_sequence_length == limit
    harvester = ActivationHarvester([model], ["blocks.0.hook_resid_post"])
    loader = TokenSequenceLoader(wrap_documents([[5] * 40]), None, bos="none", sequence_length=limit)
    HarvestedRows(loader, harvester)
    with pytest.raises(InputError, match=f"sequence_length: {limit + 1} is above the models' limit of {limit}"):
        HarvestedRows(loader.fresh(sequence_length=limit + 1), harvester)


def test_a_limit_of_minus_one_is_none():
    config = AutoConfig.for_model("xlnet", vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=24)
    model = wrap_language_model(AutoModelForCausalLM.from_config(config), None, "tiny/xlnet")
    assert model.config.max_position_embeddings == -1 and model.max_sequence_length is None


def test_a_limit_that_nothing_names_is_found_by_trying(monkeypatch):
    model = tiny("roberta", is_decoder=True)
    monkeypatch.setattr(type(model), "max_sequence_length", None)
    harvester = ActivationHarvester([model], ["blocks.0.hook_resid_post"])
    check_length(harvester, 30)
    with pytest.raises(InputError, match="sequence_length: 47 is above the models' limit of 30"):
        check_length(harvester, 47)
