"""Tiny tokenizer, tiny random models, tiny documents."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)
WORDS = [f"w{i}" for i in range(40)]


def make_tokenizer(words=WORDS, chat_template: str | None = None):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", "user", "assistant", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.chat_template = chat_template
    fast.init_kwargs["name_or_path"] = "tiny"
    return fast


def make_model(family: str, seed: int = 0, **changes):
    """A random model of a few thousand weights."""
    from transformers import (
        AutoModelForCausalLM,
        Gemma2Config,
        Gemma3TextConfig,
        GemmaConfig,
        GPT2Config,
        GPTNeoXConfig,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
    )

    shape = {
        "vocab_size": 46,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    grouped = {"num_key_value_heads": 1}
    configs = {
        "llama": lambda: LlamaConfig(**{**shape, **grouped, **changes}),
        "mistral": lambda: MistralConfig(**{**shape, **grouped, **changes}),
        "qwen2": lambda: Qwen2Config(**{**shape, **grouped, **changes}),
        "qwen3": lambda: Qwen3Config(**{**shape, **grouped, "head_dim": 8, **changes}),
        "gemma": lambda: GemmaConfig(**{**shape, **grouped, "head_dim": 8, **changes}),
        "gemma2": lambda: Gemma2Config(**{**shape, **grouped, "head_dim": 8, "sliding_window": 4, **changes}),
        "gemma3_text": lambda: Gemma3TextConfig(**{**shape, **grouped, "head_dim": 8, "sliding_window": 4, **changes}),
        "gpt_neox": lambda: GPTNeoXConfig(**{**shape, **changes}),
        "gpt2": lambda: GPT2Config(
            vocab_size=46, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(configs[family]())


def make_documents(n: int = 40, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 30, (n,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(40, (k,), generator=generator).tolist()) for k in lengths]


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def documents():
    return make_documents()


@pytest.fixture(scope="session")
def model_pair(tokenizer):
    """Two random Llama-shaped models with one tokenizer."""
    from crosscode.data import wrap_language_model

    return [wrap_language_model(make_model("llama", seed=seed), tokenizer, f"tiny-{seed}") for seed in (0, 1)]


@pytest.fixture(scope="session")
def build_model():
    return make_model


@pytest.fixture(scope="session")
def build_tokenizer():
    return make_tokenizer


@pytest.fixture(scope="session")
def build_documents():
    return make_documents


@pytest.fixture(scope="session")
def remember_harvests():
    """Makes a harvester run its models once per token batch: tests that restart the same data do not wait for them."""

    def remember(harvester):
        harvest, known = harvester.harvest, {}

        def harvest_once(tokens_HS, segments_HS=None):
            key = (
                tokens_HS.shape,
                tokens_HS.numpy().tobytes(),
                None if segments_HS is None else segments_HS.numpy().tobytes(),
            )
            if key not in known:
                known[key] = harvest(tokens_HS, segments_HS)
            return known[key].clone()

        harvester.harvest = harvest_once
        return harvester

    return remember


@pytest.fixture(scope="session")
def tokenizer_of():
    """A tokenizer with a token for each character, and a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def make(template):
        vocab = {character: i for i, character in enumerate(["<unk>", *map(chr, range(10, 127))])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
        fast.chat_template = template
        return fast

    return make
