"""Train the embedded pair of language models: `python benches/demo_models/train_models.py --out FOLDER`.

The base is a small Llama on the standard library's sources; the tuned model is the base, trained on with the manual
and a share of code against forgetting. Both land in `FOLDER` with their tokenizer and a `model_card.json`.
"""

import argparse
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from bits import bits_per_byte
from ngram import baseline_bits_per_byte
from safetensors.torch import load_file
from tokenizer import train_tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from train_loop import CONTEXT, Job, Phase, worker
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from crosscode.demo.corpus import Document, demo_documents
from crosscode.files import write_json

STAGING = ".crosscode-tmp-models"
VOCAB_SIZE = 2048
ARCHITECTURE = {
    "hidden_size": 192,
    "intermediate_size": 416,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}


def token_stream(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All documents as one row of ids, each between BOS and EOS."""
    ids = tokenizer([doc.text for doc in documents], verbose=False)["input_ids"]
    return torch.tensor([token for row in ids for token in (*row, tokenizer.eos_token_id)], dtype=torch.long)


def make_job(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, corpora: dict[str, list[Document]]
) -> Job:
    """Phases, data and architecture of a run."""
    code, manual = token_stream(corpora["code"], tokenizer), token_stream(corpora["manual"], tokenizer)
    base_streams = [(1.0, code)]
    if corpora["tests"]:
        base_streams = [
            (arguments.code_share, code),
            (1 - arguments.code_share, token_stream(corpora["tests"], tokenizer)),
        ]

    def phase(name: str, **settings: float) -> Phase:
        tokens, minutes = (getattr(arguments, f"{name}_{unit}") for unit in ("tokens", "minutes"))
        return Phase(name=name, tokens=tokens, minutes=minutes, batch_tokens=arguments.batch_tokens, **settings)

    return Job(
        phases=[
            phase("base", lr_matrices=0.02, lr_rest=2e-3, decay_from=0.4, full_context_from=0.65),
            phase("tuned", lr_matrices=0.005, lr_rest=1e-3, decay_from=0.1, full_context_from=0.0),
        ],
        streams={
            "base": base_streams,
            "tuned": [(1 - arguments.replay_share, manual), (arguments.replay_share, code)],
        },
        config={
            **ARCHITECTURE,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        folder=arguments.out / STAGING,
        start=arguments.start,
        seed=arguments.seed,
        microbatch_tokens=arguments.microbatch_tokens,
        compiled=arguments.compile,
        checkpoint_minutes=arguments.checkpoint_minutes,
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train both models, score them, publish them with their card."""
    code = demo_documents("train", ("code",))
    proper = {doc.path for doc in code}
    tests = [doc for doc in demo_documents("train", ("code",), include_tests=True) if doc.path not in proper]
    corpora = {"code": code, "tests": tests, "manual": demo_documents("train", ("manual",))}
    if arguments.start:
        tokenizer = AutoTokenizer.from_pretrained(arguments.start)
    else:
        tokenizer = train_tokenizer((doc.text for doc in code), VOCAB_SIZE, CONTEXT)
    job = make_job(arguments, tokenizer, corpora)
    train(job, tokenizer, arguments.processes)
    card = model_card(job, corpora, tokenizer, arguments.skip_baselines)
    publish(job, arguments.out, card)
    return card


def train(job: Job, tokenizer: PreTrainedTokenizerFast, n_processes: int) -> None:
    """All phases, each with its tokenizer, in a new staging folder."""
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    for phase in job.phases:
        tokenizer.save_pretrained(job.folder / phase.name)
    spawn(worker, args=(n_processes, job.folder.absolute() / ".rendezvous", job), nprocs=n_processes)


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def model_card(
    job: Job, corpora: dict[str, list[Document]], tokenizer: PreTrainedTokenizerFast, skip_baselines: bool
) -> dict[str, Any]:
    """What was trained on what, and the held-out bits per byte of both models and of the baselines."""
    held_out = {domain: [doc.text for doc in demo_documents("heldout", (domain,))] for domain in ("code", "manual")}
    texts = {name: [doc.text for doc in documents] for name, documents in corpora.items()}
    seen = texts["code"] + texts["tests"]
    scores = {
        phase.name: {domain: round(bits_per_byte(job.folder / phase.name, held_out[domain]), 4) for domain in held_out}
        for phase in job.phases
    }
    print(scores, flush=True)
    if not skip_baselines:
        scores |= baseline_bits_per_byte({"code": seen, "manual": seen + texts["manual"]}, held_out, tokenizer)
    return {
        "parameters": sum(weight.numel() for weight in load_file(job.folder / "base" / "model.safetensors").values()),
        "architecture": job.config,
        "held_out_bits_per_byte": scores,
        "training": {phase.name: json.loads((job.folder / f"{phase.name}.json").read_text()) for phase in job.phases},
        "trained_before": earlier_training(job.start),
        "corpus_bytes": {name: sum(len(text.encode()) for text in documents) for name, documents in texts.items()},
        "corpus_tokens": {name: sum(len(stream) for _, stream in job.streams[name]) for name in job.streams},
        "held_out_bytes": {domain: sum(len(text.encode()) for text in held_out[domain]) for domain in held_out},
        "seed": job.seed,
        "versions": versions(),
    }


def earlier_training(start: Path | None) -> list[dict[str, Any]]:
    """The `training` records of the runs that led to the checkpoint `start`, oldest first."""
    if start is None or not (start.parent / "model_card.json").is_file():
        return []
    card = json.loads((start.parent / "model_card.json").read_text())
    return [*card.get("trained_before", []), card["training"]]


def publish(job: Job, out: Path, card: dict[str, Any], card_name: str = "model_card.json") -> None:
    """Move the finished models and their card to `out`, each file at once."""
    write_json(job.folder / card_name, card)
    for file in (job.folder / card_name, *(f for p in job.phases for f in (job.folder / p.name).iterdir())):
        target = out / file.relative_to(job.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(job.folder)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python benches/demo_models/train_models.py",
        description="Train the embedded pair of language models on text of this Python installation.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, help="folder to write base/, tuned/ and model_card.json to")
    p.add_argument("--start", type=Path, help="base checkpoint to train on from, with its tokenizer; fresh if left out")
    p.add_argument("--base-tokens", type=int, default=40_000_000, help="training tokens of the base model")
    p.add_argument("--tuned-tokens", type=int, default=1_500_000, help="training tokens of the fine-tune")
    p.add_argument("--base-minutes", type=float, default=40.0, help="wall-clock limit of the base model's training")
    p.add_argument("--tuned-minutes", type=float, default=4.0, help="wall-clock limit of the fine-tune")
    p.add_argument("--batch-tokens", type=int, default=8192, help="tokens an optimizer step, over all processes")
    p.add_argument("--microbatch-tokens", type=int, default=4096, help="tokens a backward pass of one process")
    p.add_argument("--code-share", type=float, default=0.5, help="share of the library proper, against its test suite")
    p.add_argument("--replay-share", type=float, default=0.3, help="share of code in the fine-tune")
    p.add_argument("--seed", type=int, default=0, help="seed of weights and data order")
    p.add_argument("--processes", type=int, default=2, help="processes of one thread each, at most the number of cores")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="use torch.compile")
    p.add_argument("--checkpoint-minutes", type=float, default=5.0, help=f"minutes between saves to OUT/{STAGING}")
    p.add_argument("--skip-baselines", action="store_true", help="leave the n-gram baselines out of the card")
    return p


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))
