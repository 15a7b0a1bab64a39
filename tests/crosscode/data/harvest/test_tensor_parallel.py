"""What can be read of a model that several processes hold together, told from its configuration; what they read: test_teams."""

import pytest

from crosscode.data.harvest.loading import load_skeleton
from crosscode.data.harvest.tensor_parallel import check_tensor_parallel, n_weights_of_a_rank
from crosscode.errors import InputError


@pytest.mark.parametrize(
    ("hookpoint", "n_ranks", "said"),
    [
        ("blocks.1.attn.hook_q", 2, "'blocks.1.attn.hook_q' of '.*' is not whole on a process"),
        ("blocks.1.attn.hook_z", 2, "is not whole"),
        ("blocks.0.mlp.hook_pre", 2, "is not whole"),
        ("blocks.0.mlp.hook_post", 2, "is not whole"),
        ("model.layers.0.mlp.act_fn", 2, "is not whole"),
        ("blocks.0.attn.hook_pattern", 2, "TransformerBridge"),
        ("blocks.0.hook_resid_post", 4, "must divide num_key_value_heads = 2"),
        ("blocks.0.hook_resid_post", 2, None),
        ("blocks.0.hook_attn_out", 2, None),
        ("blocks.1.hook_mlp_out", 2, None),
        ("blocks.1.ln2.hook_out", 2, None),
        ("model.embed_tokens", 2, None),
    ],
)
def test_what_is_a_part_on_each_process_is_refused_by_name(hookpoint, n_ranks, said, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    skeleton = load_skeleton(str(tmp_path))
    if said is None:
        check_tensor_parallel(skeleton, [hookpoint], n_ranks)
    else:
        with pytest.raises(InputError, match=said):
            check_tensor_parallel(skeleton, [hookpoint], n_ranks)
    norms = 16 * (2 * 2 + 1)
    n_all = sum(weight.numel() for weight in skeleton.model.parameters())
    assert n_weights_of_a_rank(skeleton, 1) == n_all
    assert n_weights_of_a_rank(skeleton, 2) == (n_all - norms) // 2 + norms


def test_a_model_without_a_plan_is_refused(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no tensor-parallel plan for GPT2LMHeadModel"):
        check_tensor_parallel(load_skeleton(str(tmp_path)), ["blocks.0.hook_resid_post"], 2)
