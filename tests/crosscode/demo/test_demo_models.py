"""The embedded language models: ordinary checkpoints, small, and worth the name."""

import json

import pytest
import torch
from bits import bits_per_byte
from transformers import AutoModelForCausalLM, AutoTokenizer

from crosscode.demo import DEMO_MODELS, demo_model_path
from crosscode.demo.corpus import Domain, demo_documents
from crosscode.errors import InputError


@pytest.fixture(scope="module")
def card():
    return json.loads((demo_model_path("base").parent / "model_card.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path("base"))


def sample(domain: Domain, characters: int) -> list[str]:
    """The beginnings of a few held-out documents."""
    texts = [doc.text for doc in demo_documents("heldout", (domain,))]
    return [text[: characters // 8] for text in texts[:8]]


def test_all_of_the_package_is_under_25_mb():
    package = demo_model_path("base").parents[2]
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 25e6


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_a_model_loads_like_any_other_folder(name, card):
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(name))
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path(name))
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "llama"
    assert len(tokenizer) == model.config.vocab_size
    assert sum(p.numel() for p in model.parameters()) == card["parameters"]


def test_the_models_share_a_tokenizer():
    assert len({(demo_model_path(name) / "tokenizer.json").read_bytes() for name in DEMO_MODELS}) == 1


def test_everything_together_is_small():
    folder = demo_model_path("base").parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 15_000_000


TEXTS = ["def f(x):\n    return x\n", "", " \n\n\t  x \r\n", "naïve Ωμέγα 漢字 🐍", "\x00\x7f\x85\u2028", "1234567890"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_round_trips_any_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[1:]) == text


def test_transformer_lens_boots_a_model_with_the_same_activations(tokenizer):
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    tokens_HS = torch.randint(2, len(tokenizer), (2, 32))
    plain = AutoModelForCausalLM.from_pretrained(demo_model_path("base"), dtype=torch.float32).eval()
    with torch.no_grad():
        expected_HSD = plain(tokens_HS, output_hidden_states=True).hidden_states[3]
        bridge = TransformerBridge.boot_transformers("demo", hf_model=plain, tokenizer=tokenizer)
        _, cache = bridge.run_with_cache(tokens_HS, names_filter=["blocks.2.hook_resid_post"])
    torch.testing.assert_close(cache["blocks.2.hook_resid_post"], expected_HSD, atol=1e-3, rtol=1e-3)


def test_the_base_beats_the_best_5_gram_on_held_out_code(card):
    bits = card["held_out_bits_per_byte"]
    best = min(bits["5gram_bytes"]["code"], bits["5gram_tokens"]["code"])
    assert bits["base"]["code"] < best - 0.05
    # The beginnings of files are the easier part; broken weights cost several bits.
    assert bits_per_byte(demo_model_path("base"), sample("code", 12_000)) < bits["base"]["code"] + 0.3


def test_the_fine_tune_beats_the_base_on_the_held_out_manual(card):
    bits = card["held_out_bits_per_byte"]
    texts = sample("manual", 12_000)
    base, tuned = (bits_per_byte(demo_model_path(name), texts) for name in ("base", "tuned"))
    assert tuned < base - 0.1
    assert bits["tuned"]["manual"] < bits["base"]["manual"] - 0.1


def test_an_unknown_model_is_named():
    with pytest.raises(InputError, match="name: 'large' is no demo model, must be one of base, tuned, planted"):
        demo_model_path("large")
