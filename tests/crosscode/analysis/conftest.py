"""Tiny random models, held-out batches, a byte-level tokenizer, and fabricated run directories."""

import html
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from crosscode.analysis import plots
from crosscode.analysis.report import HeldoutText
from crosscode.models import ModelHookpointAcausalCrosscoder, TopkActivation
from crosscode.models.architecture import split_for

TEXT = 'def f(x):\n    return x + 1\nprint("naïve → 日本語 🙂")\n# a <b>comment</b> & more\n' * 3


@dataclass
class Batch:
    tokens_HS: Tensor
    mask_HS: Tensor
    acts_HSMPD: Tensor


@pytest.fixture
def make_model():
    """A random crosscoder with scaling folded in (factors that differ between positions) unless told otherwise."""

    def make(n_models=2, n_hookpoints=1, d_model=8, n_latents=24, k=4, seed=0, backend="torch", folded=True):
        model = ModelHookpointAcausalCrosscoder(
            n_models, n_hookpoints, d_model, n_latents, TopkActivation(k, n_latents), backend=backend
        )
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            param.data = torch.randn(param.shape, generator=generator)
        if folded:
            scaling_MP = torch.rand(n_models, n_hookpoints, generator=generator) * 3 + 0.5
            model.fold_activation_scaling_into_weights_(scaling_MP, scaling_MP)
        return model.eval()

    return make


@pytest.fixture
def make_heldout():
    """Random held-out batches: position 0 is masked, one sequence is partly padding."""

    def make(n_models=2, n_hookpoints=1, d_model=8, sizes=(5, 3), length=12, vocab=300, seed=0):
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for n in sizes:
            tokens_HS = torch.randint(3, vocab, (n, length), generator=generator)
            mask_HS = torch.ones(n, length, dtype=torch.bool)
            mask_HS[:, 0] = False
            mask_HS[-1, length // 2 :] = False
            acts = torch.randn(n, length, n_models, n_hookpoints, d_model, generator=generator)
            batches.append(Batch(tokens_HS, mask_HS, acts))
        return batches

    return make


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A byte-level BPE tokenizer with 300 tokens; most characters outside ASCII are spread over several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def quick_plots(monkeypatch):
    """Plots are drawn but not rendered, for tests of everything else on the page."""

    def finish(figure, axes, xlabel, ylabel, label, grid="y"):
        return f'<svg aria-label="{html.escape(label)}"></svg>'

    monkeypatch.setattr(plots, "finish", finish)


NAMES = {
    "position_names": ["base/blocks.1.hook_resid_post", "tuned/blocks.1.hook_resid_post"],
    "language_models": [{"path": "demo:base", "name": "base"}, {"path": "demo:tuned", "name": "tuned"}],
}


@pytest.fixture
def heldout_text(make_heldout, byte_tokenizer):
    """Held-out text of the two models of `make_run`."""

    def make(position_names=tuple(NAMES["position_names"]), kind="model_hookpoint_acausal", **options):
        return HeldoutText(make_heldout(**options), byte_tokenizer, split_for(kind), list(position_names))

    return make


@pytest.fixture
def make_run(tmp_path, make_model):
    """A run directory as training leaves it."""

    def make(model=None, position_names=tuple(NAMES["position_names"]), name="fabricated", metadata=None):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text("name: fabricated\ntrain:\n  n_tokens: 1000\n", encoding="utf-8")
        rows = []
        for step in range(1, 21):
            fvu = float(np.exp(-step / 8) + 0.1)
            row = {"step": step, "tokens": 50 * step, "loss": 9 * fvu, "loss/recon": 8 * fvu, "loss/auxk": 32 * fvu}
            row |= {"weight/recon": 1.0, "weight/auxk": 1 / 32, "fvu": fvu, "l0": 4.0, "dead_fraction": 0.1}
            row |= {f"fvu/{name}": fvu + 0.01 * i for i, name in enumerate(position_names)}
            rows.append(row | {"tokens_per_s": 1234.5, "elapsed_s": 0.1 * step})
        rows.append({"step": 20, "tokens": 1000, "eval/fvu": 0.21, **{f"eval/fvu/{p}": 0.21 for p in position_names}})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        by_position = {p: 0.2 + 0.02 * i for i, p in enumerate(position_names)}
        summary = {
            "step": 20, "tokens": 1000, "loss": 1.9, "fvu": 0.21, "fvu_by_position": by_position, "l0": 4.0,
            "dead_fraction": 0.125, "tokens_per_s": 1234.5, "backend": "torch", "device": "cpu", "wall_s": 61.0,
            "versions": {"torch": "2.13.0", "crosscode": "0.1.0"},
        }  # fmt: skip
        (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        evaluation = {
            "n_tokens": 80, "fvu": 0.21, "fvu_by_position": by_position, "l0": 4.0, "l0_p5": 4.0, "l0_p95": 4.0,
            "dead_fraction": 0.125, "density_L": [],
        }  # fmt: skip
        (run / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
        hookpoints = list(dict.fromkeys(name.rpartition("/")[2] for name in position_names))
        (model or make_model()).save(
            run / "final",
            metadata or {"language_models": NAMES["language_models"], "hookpoints": hookpoints},
        )
        return run

    return make
