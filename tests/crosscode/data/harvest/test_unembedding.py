"""Final norm and unembedding against the whole model with plain hooks.

N vectors · D width.
"""

import pytest
import torch

from crosscode.data import load_language_model, wrap_language_model
from crosscode.data.harvest.unembedding import unembed
from crosscode.demo import demo_model_path
from crosscode.errors import InputError


def by_hooks(model, last_block, vectors_ND):
    """Logits of the model with the output of its last block replaced, one position a vector."""

    def replace(_module, _args, output):
        if isinstance(output, tuple):
            return (vectors_ND[None], *output[1:])
        return vectors_ND[None]

    handle = last_block.register_forward_hook(replace)
    try:
        with torch.no_grad():
            return model(torch.ones(1, len(vectors_ND), dtype=torch.long), use_cache=False).logits[0]
    finally:
        handle.remove()


def random_model(name):
    import transformers as tf

    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}
    configs = {
        "gpt2": (lambda: tf.GPT2Config(**gpt2), lambda m: m.transformer.h),
        "gpt_neox": (lambda: tf.GPTNeoXConfig(**small, intermediate_size=24), lambda m: m.gpt_neox.layers),
        # not among the families that are written down
        "phi": (lambda: tf.PhiConfig(**small, intermediate_size=24), lambda m: m.model.layers),
        "olmo": (lambda: tf.OlmoConfig(**small, intermediate_size=24), lambda m: m.model.layers),
    }
    config, blocks = configs[name]
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config())
    for param in model.parameters():
        param.data += 0.3 * torch.randn(param.shape)
    return wrap_language_model(model, None), blocks(model)[-1]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi", "olmo", "demo"])
def test_logits_are_those_of_the_model_with_the_vector_as_its_last_residual(name):
    if name == "demo":
        model = load_language_model(str(demo_model_path("tuned")), dtype="float32")
        last_block = model.model.model.layers[-1]
    else:
        model, last_block = random_model(name)
    vectors_ND = torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(1))
    expected = by_hooks(model.model, last_block, vectors_ND)
    torch.testing.assert_close(unembed(model, vectors_ND), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_vectors_outside_the_residual_stream_are_refused():
    model, _ = random_model("gpt2")
    with pytest.raises(InputError, match="width 24 are not in the residual stream of 'in-memory', which is 16 wide"):
        unembed(model, torch.ones(1, 24))
