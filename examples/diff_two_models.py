"""Which features did fine-tuning add? Two small models that come with crosscode, from a recipe.

python examples/diff_two_models.py [RUN [N_TOKENS]]      (without a GPU: two minutes)
"""

import sys

import crosscode

run_dir = sys.argv[1] if len(sys.argv) > 1 else "runs/diff"
n_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 400_000

heldout = {"n_tokens": min(50_000, n_tokens), "loss_recovered_n_tokens": 1024}
run = crosscode.train("demo", run_dir=run_dir, train={"n_tokens": n_tokens}, evaluation=heldout)
print(run.model)

(verdict,) = run.verdicts
print(verdict.headline())
for latent in verdict.ranking("tuned")[:3]:
    print(f"latent {latent} ({verdict.names[latent]}): {verdict.why[latent]}")
    for place in run.top(latent, n=2):
        print("   ", place)

found = run.latents("def main():\n    return 0\n")
for position, token in enumerate(found.tokens):
    print(f"{token!r:12} {found.strongest(position, n=3)}")
