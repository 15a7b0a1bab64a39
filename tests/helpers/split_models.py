"""Language models over gloo processes: `ranks.spawn` runs this file in each; a folder holds tiny models and a config."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

KINDS = ("llama", "gpt_neox", "qwen2", "gemma2")


def save_model(kind: str, folder: Path, seed: int = 0) -> str:
    """A random one of 4 attention heads and 2 of keys."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {
        "vocab_size": 63,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    sizes |= {} if kind == "gpt_neox" else {"num_key_value_heads": 2}
    sizes |= {"head_dim": 8} if kind == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return str(folder)


def check_model(folder: str, n_together: int) -> float:
    """Every tap that is called whole is that of one process, and every other is not; so are fingerprint, weights, logits.
    Returns the largest difference, relative to the norm."""
    import torch

    from crosscode.data.harvest.hookpoints import Tap, find_taps
    from crosscode.data.harvest.language_models import LanguageModel
    from crosscode.data.harvest.loading import load_language_model, load_skeleton
    from crosscode.data.harvest.model_runs import ModuleRun
    from crosscode.data.harvest.tensor_parallel import is_whole, n_weights_of_a_rank
    from crosscode.evaluation.splicing import logits_with

    skeleton, one = load_skeleton(folder), load_language_model(folder)
    split = load_language_model(folder, n_ranks=n_together)
    taps = find_taps(skeleton) | {
        f"{path}:{side}": Tap(path, side)
        for path, _ in skeleton.model.named_modules()
        for side in ("in", "out")
        if path.count(".") > 2 and "rotary" not in path  # not what is handed several tensors, or none
    }
    tokens_HS = torch.randint(3, 63, (2, 7), generator=torch.Generator().manual_seed(0))

    def read(model: LanguageModel, tap: Tap) -> torch.Tensor:
        found: list[torch.Tensor] = []
        ModuleRun(model, [tap])(tokens_HS, None, lambda _p, act: found.append(act.clone()))
        return found[0].double()

    worst, n_parts = 0.0, 0
    for name, tap in taps.items():
        ours, theirs = read(split, tap), read(one, tap)
        far = float((ours - theirs).norm() / theirs.norm()) if ours.shape == theirs.shape else 1.0
        is_same = far < 1e-5
        assert is_same == is_whole(skeleton.model.tp_plan, tap), (folder, name, tuple(ours.shape), far)
        worst, n_parts = max(worst, far if is_same else 0.0), n_parts + (not is_same)
    assert n_parts >= 8 * 2  # two layers
    assert split.fingerprint() == one.fingerprint()
    held = sum(getattr(weight, "to_local", lambda of=weight: of)().numel() for weight in split.model.parameters())
    assert abs(held / n_weights_of_a_rank(skeleton, n_together) - 1) < 0.02  # 63 words do not divide by 2
    torch.testing.assert_close(
        logits_with(split, tokens_HS, None), logits_with(one, tokens_HS, None), rtol=1e-4, atol=1e-4
    )
    return worst


def main(folder: str, *runs: str) -> None:
    """`runs`: check:T tries T processes together on every kind; anything else is a command line whose words commas part."""
    import torch

    from crosscode.commands.cli import main as crosscode
    from crosscode.parallel import joined

    torch.set_num_threads(1)
    joined()
    for run in runs:
        if run.startswith("check:"):
            for kind in KINDS:
                print(kind, check_model(str(Path(folder) / kind), int(run[6:])))
        else:
            assert crosscode(run.split(",")) == 0, run


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if path != os.getcwd()]
    main(*sys.argv[1:])
