"""What a partition of the dictionary adds to a training step: the trainer's `train_step` with and without one, on the CPU.

    python benches/partition_cost.py [--steps 15]

Steps of all variants take turns; the ratio is the median over those of the same turn. Written to
benches/results/partition_cost.json.

Axes: B tokens · M models · P hookpoints · D width · L latents.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from data_common import report
from trainer_overhead import OneBatch

from crosscode.config.experiment import TrainConfig
from crosscode.config.registry import Component
from crosscode.models import ACTIVATIONS, AnthropicTransposeInit, ModelHookpointAcausalCrosscoder
from crosscode.models.architecture import split_for
from crosscode.objectives import TERMS, Objective
from crosscode.runs.directory import RunDirectory
from crosscode.trainers.trainer import Trainer

B, D, L = 1024, 768, 8192
ACTIVATION = {"topk": {"type": "topk", "k": 32}, "batch_topk": {"type": "batch_topk", "k": 32}}
OPTIMIZER = {
    "adam": {"type": "adam", "lr": 1e-3},
    "row-sparse adam": {"type": "adam", "lr": 1e-3, "betas": [0.0, 0.999], "row_sparse": True},
}
SHARES = (0.0, 0.05, 0.3)
"""of the latents that belong to one model alone, for each of the two"""


def make_trainer(folder: Path, activation: str, optimizer: str, share: float) -> Trainer:
    run = RunDirectory(folder)
    run.create("name: bench\n")
    backend = "torch:rows" if OPTIMIZER[optimizer].get("row_sparse") else "torch"
    blocks = [{"models": [m], "share": share} for m in range(2)] if share else []
    activation_fn = ACTIVATIONS.build(ACTIVATION[activation], n_latents=L)
    model = ModelHookpointAcausalCrosscoder(2, 1, D, L, activation_fn, partition=blocks, backend=backend)
    data = OneBatch()
    data.acts_BMPD = torch.randn(B, 2, 1, D, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(n_tokens=B, batch_size=B, log_every=10**9, optimizer=Component(**OPTIMIZER[optimizer]))
    split = split_for("model_hookpoint_acausal")
    objective = Objective({"recon": TERMS["recon"]()})
    trainer = Trainer(
        model.init_weights(AnthropicTransposeInit()), data, split, objective, config, run, [],
        position_names=["a", "b"], n_steps=10**9, progress=False,
    )  # fmt: skip
    trainer.start()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15, help="turns that are measured (default: %(default)s)")
    n_steps = parser.parse_args().steps
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for activation in ACTIVATION:
            for optimizer in OPTIMIZER:
                trainers = {
                    share: make_trainer(
                        Path(folder) / f"{activation}-{optimizer}-{share}", activation, optimizer, share
                    )
                    for share in SHARES
                }
                seconds = {share: list[float]() for share in SHARES}
                for turn in range(2 + n_steps):
                    for share in SHARES[turn % 3 :] + SHARES[: turn % 3]:
                        acts_BMPD = trainers[share].data.acts_BMPD  # pyright: ignore[reportAttributeAccessIssue]
                        started = time.process_time()
                        trainers[share].train_step(acts_BMPD)
                        if turn >= 2:
                            seconds[share].append(time.process_time() - started)
                for share in SHARES:
                    ratios = [one / plain for one, plain in zip(seconds[share], seconds[0.0], strict=True)]
                    rows.append(
                        {
                            "activation": activation, "optimizer": optimizer, "share_of_each": share,
                            "cpu_ms": round(1e3 * statistics.median(seconds[share]), 1),
                            "ratio": round(statistics.median(ratios), 4),
                        }
                    )  # fmt: skip
    report("partition_cost", rows)


if __name__ == "__main__":
    main()
