"""Two LoRA adapters on one base: bytes of weights, and harvest time against two merged models.

A random llama, of SmolLM2-135M's width (576x1536) unless told otherwise, adapters of random weights on all its linear modules.
CPU time of all threads, as medians of pairs that take turns.

    python benches/adapters.py [rounds [layers [HxS [RANK [DTYPE [ADAPTER_DTYPE [WIDTHxMLP]]]]]]]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import peft
import torch
from data_common import interleaved, report
from transformers import AutoModelForCausalLM, LlamaConfig

from crosscode.data import ActivationHarvester, load_language_model, wrap_language_model
from crosscode.data.harvest.language_models import LanguageModel


def main(rounds: int, n_layers: int, shape: str, rank: int, dtype: str, adapter_dtype: str, width: str) -> None:
    H, S = map(int, shape.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        base, *adapters = (Path(folder) / name for name in ("base", "one", "two"))
        save(base, adapters, n_layers, rank, dtype, width)
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
        name = [f"blocks.{n_layers - 1}.hook_resid_post"]
        ways = {
            "two merged models": ActivationHarvester(merged, name),
            "two adapters on one base": ActivationHarvester(adapted, name),
        }
        acts = [harvester.harvest(tokens_HS) for harvester in ways.values()]
        error = float((acts[1] - acts[0]).norm() / acts[0].norm())
        times = interleaved({label: lambda one=one: one.harvest(tokens_HS) for label, one in ways.items()}, rounds)
        first = times["two merged models"]
        n_bytes = {"two merged models": bytes_of(merged), "two adapters on one base": bytes_of(adapted)}
        rows = [
            {
                "way": label,
                "MB of weights": n_bytes[label] / 1e6,
                "of one base": n_bytes[label] / bytes_of([plain]),
                "cpu_seconds": time.cpu,
                "cpu time, of merged": time.cpu / first.cpu,
                "wall time, of merged": time.wall / first.wall,
                "best wall time, of merged": time.best / first.best,
            }
            for label, time in times.items()
        ]
        said = {"rank": rank, "dtype": dtype, "adapter_dtype": adapter_dtype, "width": width, "relative_error": error}
        report("adapters", rows, layers=n_layers, shape=shape, rounds=rounds, **said)


def save(base: Path, adapters: list[Path], n_layers: int, rank: int, dtype: str, width: str) -> None:
    d_model, d_mlp = map(int, width.split("x"))
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=n_layers,
        num_attention_heads=d_model // 64,
        num_key_value_heads=d_model // 192 if d_model % 192 == 0 else d_model // 256,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(base)
    for seed, folder in enumerate(adapters):
        torch.manual_seed(seed)
        lora = peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder)


def bytes_of(models: list[LanguageModel]) -> int:
    """Of storage, each once."""
    weights = (weight.untyped_storage() for model in models for weight in model.model.parameters())
    return sum({one.data_ptr(): one.nbytes() for one in weights}.values())


if __name__ == "__main__":
    given = [*sys.argv[1:], *("11", "6", "8x256", "8", "float32", "float32", "576x1536")[len(sys.argv) - 1 :]]
    torch.set_num_threads(1)
    main(int(given[0]), int(given[1]), given[2], int(given[3]), *given[4:])
