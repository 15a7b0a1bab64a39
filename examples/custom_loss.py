"""A loss term of one's own, with a schedule: in the config like any other, in the metrics, resumable.

python examples/custom_loss.py [RUN [N_TOKENS]]
"""

import sys
from typing import Literal

import torch
from torch import Tensor

import crosscode


@crosscode.TERMS.register
class DecoderOverlap(crosscode.LossTerm):
    """Mean squared cosine of pairs of neighbouring decoder vectors: latents should not say the same."""

    class Config(crosscode.ConfigModel):
        type: Literal["decoder_overlap"] = "decoder_overlap"
        weight: float | crosscode.LinearRamp = 1.0
        """coefficient: a number or a schedule"""

    def __call__(self, context: crosscode.LossContext) -> Tensor:
        directions_LO = torch.nn.functional.normalize(context.model.W_dec_LO, dim=1)
        return (directions_LO * directions_LO.roll(1, dims=0)).sum(1).square().mean()


run_dir = sys.argv[1] if len(sys.argv) > 1 else "runs/custom_loss"
n_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 300_000

generator = torch.Generator().manual_seed(0)
features_FD = torch.randn(64, 32, generator=generator)
acts_ND = (torch.rand(20_000, 64, generator=generator) < 0.06).float() @ features_FD

run = crosscode.train(
    acts_ND,
    {"type": "sae", "n_latents": 128, "activation": {"type": "batch_topk", "k": 4}},
    run_dir=run_dir,
    objective={"recon": {}, "decoder_overlap": {"weight": {"type": "linear_ramp", "value": 2.0}}},
    n_tokens=n_tokens,
    batch_size=256,
)
for row in run.metrics[:: max(1, len(run.metrics) // 5)]:
    if "loss/decoder_overlap" in row:
        print(f"step {row['step']:5}  overlap {row['loss/decoder_overlap']:.4f} x {row['weight/decoder_overlap']:.2f}")
