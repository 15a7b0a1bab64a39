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

table = run.table()  # a row for each latent
alive = table.query("firings >= 20").sort_values("relative_norm_tuned", ascending=False)
for latent in alive.index[:3]:
    share = alive["relative_norm_tuned"][latent]
    print(f"latent {latent}: share of the fine-tuned model in its decoder norms {share:.2f}")
    for place in run.top(latent, n=2):
        print("   ", place)

found = run.latents("def main():\n    return 0\n")
for position, token in enumerate(found.tokens):
    print(f"{token!r:12} {found.strongest(position, n=3)}")
