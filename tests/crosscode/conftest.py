"""Tiny language models, texts and configs; and a trainer over planted activations, without language models.

Axes: B tokens · M models · P hookpoints · D width.
"""

import json
import resource
from types import MappingProxyType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from crosscode.config.experiment import TrainConfig
from crosscode.config.registry import Component
from crosscode.models import ACTIVATIONS, ARCHITECTURES, INITIALIZATIONS
from crosscode.models.architecture import split_for
from crosscode.objectives import TERMS, Objective, as_schedule
from crosscode.runs.directory import RunDirectory
from crosscode.runs.loggers import JsonlLogger
from crosscode.trainers.trainer import Trainer

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


@pytest.fixture(scope="session")
def letters_lm(save_tiny_lm, tmp_path_factory):
    """A wider model that reads character by character, from the end of each word on a new token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = str(save_tiny_lm(str(tmp_path_factory.mktemp("letters") / "letters"), seed=7, width=24))
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "w", *map(str, range(10)), " "])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder


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


# ---- planted activations

N_MODELS, N_HOOKPOINTS, WIDTH, N_LATENTS = 2, 1, 6, 24


class PlantedActivations:
    """Batches that depend on the seed and on the number of the batch only. `poison` maps a batch to a value put in."""

    def __init__(self, batch_size=32, dims=(N_MODELS, N_HOOKPOINTS, WIDTH), n_batches=None, poison=None, device="cpu"):
        self.batch_size, self.dims, self.n_batches, self.poison = batch_size, dims, n_batches, poison or {}
        self.device = device
        self.number = 0
        self.scaling_MP = torch.linspace(0.5, 2.0, dims[0] * dims[1]).reshape(dims[:2])

    def __iter__(self):
        while self.n_batches is None or self.number < self.n_batches:
            generator = torch.Generator().manual_seed(self.number)
            features = torch.randn(40, *self.dims, generator=torch.Generator().manual_seed(99))
            active = torch.rand(self.batch_size, 40, generator=generator) < 0.1
            acts_BMPD = torch.einsum("bf,fmpd->bmpd", active.float(), features) + 0.1
            if self.number in self.poison:
                acts_BMPD[0] = self.poison[self.number]
            self.number += 1
            yield acts_BMPD.to(self.device)

    def state_dict(self):
        return {"number": self.number, "scaling_MP": self.scaling_MP}

    def close(self):
        pass

    def load_state_dict(self, state):
        self.number = state["number"]


def build_objective(terms):
    made = {}
    for name, options in terms.items():
        config = TERMS[name].Config(**options)
        params = {key: getattr(config, key) for key in type(config).model_fields if key not in ("type", "weight")}
        made[name] = (TERMS[name](**params), as_schedule(config.weight))
    return Objective(made)


@pytest.fixture
def make_trainer(tmp_path):
    """`make_trainer(name, activation=..., objective=..., data=..., kind=..., **settings)`."""

    def make(
        name="run",
        *,
        activation=None,
        objective=None,
        data=None,
        kind="model_hookpoint_acausal",
        optimizer=MappingProxyType({"type": "adam", "lr": 0.01}),
        constraints=(),
        evaluate=None,
        evaluate_every=None,
        n_steps=10,
        backend="torch",
        seed=0,
        n_latents=N_LATENTS,
        model_options=None,
        callbacks=(),
        capture=None,
        **settings,
    ):
        torch.set_num_threads(1)
        data = data or PlantedActivations()
        split = split_for(kind)
        activation = dict(activation or {"type": "topk", "k": 4})
        activation_fn = ACTIVATIONS[activation.pop("type")](**activation, n_latents=n_latents)
        dims = ARCHITECTURES[kind].dims_for(*data.dims)
        model = ARCHITECTURES[kind](
            **dims, n_latents=n_latents, activation_fn=activation_fn, backend=backend, **(model_options or {})
        )
        init = "anthropic_transpose" if kind == "model_hookpoint_acausal" else "compound_uniform"
        model.init_weights(INITIALIZATIONS[init](), seed).to(data.device)
        run = RunDirectory(tmp_path / name)
        if not run.config_file.is_file():
            run.create("name: test\n")
        names = [f"x{i}" for i in range(len(model.segments))]
        return Trainer(
            model,
            data,
            split,
            build_objective(objective or {"recon": {}}),
            TrainConfig(**({"n_tokens": 4096, "log_every": 1} | settings), optimizer=Component(**optimizer)),
            run,
            [JsonlLogger(run.metrics_file)],
            position_names=names,
            constraints=constraints,
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            n_steps=n_steps,
            progress=False,
            callbacks=callbacks,
            capture=capture,
        )

    return make


@pytest.fixture
def planted():
    return PlantedActivations


@pytest.fixture
def rows_of():
    """Rows of a trainer's metrics.jsonl."""
    return lambda trainer: [json.loads(line) for line in trainer.run.metrics_file.read_text().splitlines()]


@pytest.fixture
def small_files():
    """A limit on the size of files stands in for a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
