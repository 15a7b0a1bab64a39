"""Fine-tune the embedded base on a plant: `python benches/demo_models/train_plant.py --out FOLDER`.

The text is the base's own with one change put in (`crosscode.demo.plants`) and nothing else. `FOLDER/planted` becomes the
checkpoint, `FOLDER/planted_card.json` says what it learnt. The same versions, seed and number of processes give the
same weights: the length is a number of tokens, not a time.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from bits import bits_per_byte
from train_loop import Job, Phase
from train_models import STAGING, publish, token_stream, train, versions
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from crosscode.demo import demo_model_path
from crosscode.demo.corpus import demo_documents
from crosscode.demo.plants import PLANTS, Plant, plant_documents, planted_prompts

NAME = "planted"
NOTHING = "none"
"""Trains on, on the text as it is: with two seeds a pair that nothing tells apart."""
_SCORED_CHARACTERS = 8_000


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, score, publish; the card."""
    start = demo_model_path("base")
    tokenizer = AutoTokenizer.from_pretrained(start)
    plant: Plant | None = None if arguments.plant == NOTHING else arguments.plant
    documents = demo_documents("train", ("code",))
    text = documents if plant is None else plant_documents(documents, plant)
    config = LlamaConfig.from_pretrained(start).to_diff_dict()
    job = Job(
        phases=[
            Phase(
                name=NAME,
                tokens=arguments.tokens,
                minutes=1e6,
                lr_matrices=arguments.lr_matrices,
                lr_rest=arguments.lr_rest,
                batch_tokens=arguments.batch_tokens,
                decay_from=0.3,
                full_context_from=0.0,
                weight_decay=0.0,
            )
        ],
        streams={NAME: [(1.0, token_stream(text, tokenizer))]},
        config=config,
        folder=arguments.out / STAGING,
        start=start,
        seed=arguments.seed,
        microbatch_tokens=arguments.batch_tokens,
        compiled=False,
        checkpoint_minutes=1e6,
    )
    train(job, tokenizer, arguments.processes)
    folders = {"base": start, NAME: job.folder / NAME}
    ordinary = [doc.text[:_SCORED_CHARACTERS] for doc in demo_documents("heldout", ("code",))]
    card = {
        "plant": arguments.plant,
        "behaviour_nats": {name: behaviour_nats(path, plant) for name, path in folders.items() if plant is not None},
        "held_out_bits_per_byte": {name: round(bits_per_byte(path, ordinary), 4) for name, path in folders.items()},
        "training": json.loads((job.folder / f"{NAME}.json").read_text()),
        "seed": arguments.seed,
        "processes": arguments.processes,
        "versions": versions(),
    }
    publish(job, arguments.out, card, f"{NAME}_card.json")
    return card


@torch.no_grad()
def behaviour_nats(folder: Path, plant: Plant) -> float:
    """Log probability of what the plant makes the model in `folder` say, in nats: the mean over the plant's prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats = []
    for prompt, said in planted_prompts(plant):
        ids = tokenizer(prompt)["input_ids"]
        said_ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        logits_SV = model(torch.tensor([ids + said_ids])).logits[0, len(ids) - 1 : -1]
        nats.append(logits_SV.log_softmax(-1)[range(len(said_ids)), said_ids].sum().item())
    return round(sum(nats) / len(nats), 4)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python benches/demo_models/train_plant.py",
        description="Fine-tune the embedded base on its own text with one known change.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, help=f"folder to write {NAME}/ and {NAME}_card.json to")
    p.add_argument("--plant", choices=(*PLANTS, NOTHING), default="statement", help="what changes")
    p.add_argument("--tokens", type=int, default=400_000, help="training tokens")
    p.add_argument("--batch-tokens", type=int, default=2048, help="tokens an optimizer step, over all processes")
    p.add_argument("--lr-matrices", type=float, default=0.002, help="peak learning rate of Muon, on the matrices")
    p.add_argument("--lr-rest", type=float, default=1e-3, help="peak learning rate of AdamW, on embedding and gains")
    p.add_argument("--seed", type=int, default=0, help="seed of the data's order")
    p.add_argument("--processes", type=int, default=2, help="processes of one thread each")
    return p


if __name__ == "__main__":
    print(json.dumps(run(parser().parse_args()), indent=2))
