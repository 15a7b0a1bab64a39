"""Two LoRA adapters on one base: bytes of weights, and harvest time against two merged models.

Random llamas, two layers of a given width (576x1536 is SmolLM2-135M's, 4096x14336 Llama-3-8B's), adapters of random weights on
all linear modules. CPU time of one thread, as medians of harvests that take turns.

    python benches/adapters.py [--rounds 7] [--rank 8] [--shape 2x256] [DTYPE,ADAPTER_DTYPE,WIDTHxMLP ...]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from data_common import interleaved, report
from transformers import AutoModelForCausalLM, LlamaConfig

from crosscode.data import ActivationHarvester, load_language_model, wrap_language_model
from crosscode.data.harvest.language_models import LanguageModel

CASES = [
    *(f"float32,float32,{width}" for width in ("576x1536", "2048x5632")),
    *(f"bfloat16,{own},{width}" for own in ("float32", "auto") for width in ("576x1536", "2048x5632", "4096x14336")),
]
N_LAYERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--shape", default="2x256", help="sequences x tokens of a batch")
    args = parser.parse_args()
    torch.set_num_threads(1)
    H, S = map(int, args.shape.split("x"))
    rows = [row(case, args.rounds, args.rank, H, S) for case in args.cases]
    report("adapters", rows, layers=N_LAYERS, shape=args.shape, rounds=args.rounds, rank=args.rank)


def row(case: str, rounds: int, rank: int, H: int, S: int) -> dict[str, Any]:
    dtype, adapter_dtype, width = case.split(",")
    with tempfile.TemporaryDirectory() as folder:
        base, *adapters = (Path(folder) / name for name in ("base", "one", "two"))
        save(base, adapters, rank, dtype, width)
        loaded: dict[object, LanguageModel] = {}
        plain, *adapted = (
            load_language_model(str(base), adapter=adapter and str(adapter), adapter_dtype=adapter_dtype, loaded=loaded)
            for adapter in (None, *adapters)
        )
        merged = [wrap_language_model(model.plain_tree(), None) for model in adapted]
        for model in merged:  # weights of its own each, as two checkpoints have them
            model.model.load_state_dict(
                {name: one.clone() for name, one in model.model.state_dict().items()}, assign=True
            )
        tokens_HS = torch.randint(plain.vocab_size, (H, S), generator=torch.Generator().manual_seed(0))
        harvesters = {
            way: ActivationHarvester(models, [f"blocks.{N_LAYERS - 1}.hook_resid_post"])
            for way, models in (("merged", merged), ("adapted", adapted))
        }
        acts = {way: harvester.harvest(tokens_HS) for way, harvester in harvesters.items()}
        times = interleaved({way: lambda one=one: one.harvest(tokens_HS) for way, one in harvesters.items()}, rounds)
        return {
            "base": dtype,
            "adapter_dtype": adapter_dtype,
            "width": width,
            "memory, of one base": bytes_of(adapted) / bytes_of([plain]),
            "two merged, memory": bytes_of(merged) / bytes_of([plain]),
            "two merged, s": times["merged"].cpu,
            "two adapters, s": times["adapted"].cpu,
            "cpu time, of merged": times["adapted"].cpu / times["merged"].cpu,
            "best wall time, of merged": times["adapted"].best / times["merged"].best,
            "relative difference": float((acts["adapted"] - acts["merged"]).norm() / acts["merged"].norm()),
        }


def save(base: Path, adapters: list[Path], rank: int, dtype: str, width: str) -> None:
    d_model, d_mlp = map(int, width.split("x"))
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=d_model // 64,
        num_key_value_heads=d_model // 192 if d_model % 192 == 0 else d_model // 256,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(base)
    lora = peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    for folder in adapters:
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data.normal_(std=0.02)
        adapted.save_pretrained(folder)


def bytes_of(models: list[LanguageModel]) -> int:
    """Of storage, each once."""
    weights = (weight.untyped_storage() for model in models for weight in model.model.parameters())
    return sum({one.data_ptr(): one.nbytes() for one in weights}.values())


if __name__ == "__main__":
    main()
