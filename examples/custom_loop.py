"""A training loop of one's own around a model, a loss and the fast backend; no run directory, no config.

python examples/custom_loop.py [MODEL [N_STEPS]]
"""

import sys

import torch

import crosscode
from crosscode import AuxKTerm, LinearRamp, LossContext, Objective, ReconTerm

folder = sys.argv[1] if len(sys.argv) > 1 else "runs/custom_loop"
n_steps = int(sys.argv[2]) if len(sys.argv) > 2 else 1000

device = "cuda" if torch.cuda.is_available() else "cpu"
model = crosscode.SAEOrTranscoder(
    d_in=32, d_out=32, n_latents=128, activation_fn=crosscode.TopkActivation(k=4, n_latents=128), backend="auto"
).to(device)
model.init_weights(crosscode.AnthropicTransposeInit(), seed=0)
objective = Objective({"recon": ReconTerm(), "auxk": (AuxKTerm(k_aux=16), LinearRamp(value=1 / 32, ramp_fraction=0.1))})
firing = crosscode.FiringTracker(model.n_latents).to(device)  # tokens since each latent was last active
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

generator = torch.Generator().manual_seed(0)
features_FD = torch.randn(64, 32, generator=generator)

for step in range(n_steps):
    x_BD = ((torch.rand(256, 64, generator=generator) < 0.06).float() @ features_FD).to(device)
    model.before_step(step, n_steps)
    result = model.forward_train(x_BD)
    firing.update(result.latents)
    context = LossContext(model, x_BD, x_BD, result, firing.tokens_since_fired_L, dead_after_tokens=20_000)
    loss = objective(context, step, n_steps)
    loss.total.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.after_step(result.latents)
    if step % max(1, n_steps // 5) == 0:
        parts = ", ".join(f"{name} {value.item():.3f}" for name, value in loss.parts.items())
        print(f"step {step:5}  {parts}  ({model.ops.name} backend)")

model.save(folder)
print(crosscode.SAEOrTranscoder.load(folder))
