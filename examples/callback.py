"""A figure of one's own in the metrics, beside the progress bar and in the report; stopping early; files of one's own.

python examples/callback.py [RUN [N_TOKENS]]
"""

import sys

import torch

import crosscode


class Recovered(crosscode.Callback):
    """How many planted directions have a decoder vector with cosine above 0.9."""

    def __init__(self, features_FD: torch.Tensor):
        self.features_FD = torch.nn.functional.normalize(features_FD, dim=1)

    def on_evaluate(self, trainer, evaluation):
        decoder_LD = torch.nn.functional.normalize(trainer.model.W_dec_LO.detach().cpu(), dim=1)
        best_F = (self.features_FD @ decoder_LD.T).amax(dim=1)
        return {"recovered": (best_F > 0.9).float().mean()}

    def on_checkpoint(self, trainer, folder):
        print(f"step {trainer.step}: {folder} is written")


run_dir = sys.argv[1] if len(sys.argv) > 1 else "runs/callback"
n_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 500_000

generator = torch.Generator().manual_seed(0)
features_FD = torch.randn(48, 32, generator=generator)
acts_ND = (torch.rand(20_000, 48, generator=generator) < 0.06).float() @ features_FD

run = crosscode.train(
    acts_ND,
    {"type": "sae", "n_latents": 96, "activation": {"type": "topk", "k": 3}},
    run_dir=run_dir,
    callbacks=[Recovered(features_FD)],
    n_tokens=n_tokens,
    batch_size=256,
    optimizer=crosscode.Adam(lr=3e-3),
    evaluation={"every": max(1, n_tokens // 256 // 5)},
)
print([round(row["recovered"], 2) for row in run.metrics if "recovered" in row])
print(run.report())
