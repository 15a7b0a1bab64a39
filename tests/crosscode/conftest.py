"""A pair of tiny random language models on disk, and a config that trains on them in a second."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

N_WORDS = 60


def _tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class Reads(TorchDispatchMode):
    """Counts values that are brought from the device."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads():
    """`with reads: ...; reads.n` values were brought from the device."""
    return Reads()


@pytest.fixture(scope="session")
def save_tiny_lm():
    """A function that writes a random Llama-shaped model with its tokenizer into a folder."""

    def save(folder, seed=0, words=None, width=16):
        from transformers import AutoModelForCausalLM, LlamaConfig

        words = words or [f"w{i}" for i in range(N_WORDS)]
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(words) + 3,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        _tokenizer(words).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_lms(tmp_path_factory, save_tiny_lm):
    """Folders of two random models that share a tokenizer."""
    root = tmp_path_factory.mktemp("language-models")
    return [str(save_tiny_lm(root / name, seed)) for seed, name in enumerate(("one", "two"))]


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory):
    """A jsonl file of random sentences over the tiny vocabulary."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(120):
        ids = torch.randint(N_WORDS, (int(torch.randint(5, 40, (1,), generator=generator)),), generator=generator)
        lines.append(json.dumps({"text": " ".join(f"w{i}" for i in ids.tolist())}))
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def tiny_config(tiny_lms, tiny_corpus, tmp_path):
    """Values of a config that trains a TopK crosscoder between the tiny models; tests change what they need."""
    return {
        "name": "tiny",
        "run_dir": str(tmp_path / "run"),
        "backend": "torch",
        "device": "cpu",
        "language_models": [{"path": path} for path in tiny_lms],
        "hookpoints": ["blocks.1.hook_resid_post"],
        "data": {
            "source": {"type": "local", "path": tiny_corpus},
            "validation_fraction": 0.2,
            "sequence_length": 16,
            "harvest_batch_size": 4,
            "shuffle_buffer_size": 256,
            "n_tokens_for_norm_estimate": 128,
        },
        "crosscoder": {
            "n_latents": 32,
            "activation": {"type": "topk", "k": 4},
            "init": {"type": "anthropic_transpose"},
        },
        "objective": {"recon": {}, "auxk": {"k_aux": 8, "dead_after_tokens": 128}},
        "train": {
            "n_tokens": 640,
            "batch_size": 64,
            "optimizer": {"type": "adam", "lr": 0.01},
            "dead_after_tokens": 128,
            "log_every": 2,
        },
        "evaluation": {"n_tokens": 200},
    }
