"""Which features does a layer have? Activations that are a tensor already, five lines, a page to look at.

python examples/own_tensors.py [RUN [N_TOKENS]]      (without a GPU: a minute)
"""

import argparse
import inspect
import sys
import textwrap

import torch

import crosscode
from crosscode.demo import demo_model_path

run_dir = sys.argv[1] if len(sys.argv) > 1 else "runs/own_tensors"
n_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 300_000

# Any code that makes activations will do. Here: a small model that comes with crosscode, reading Python's own library.
lm = crosscode.load_language_model(str(demo_model_path("base")), dtype="float32")
text = "".join(inspect.getsource(module) for module in (argparse, textwrap))
ids = torch.tensor(lm.tokenizer(text)["input_ids"])
tokens_HS = ids[: len(ids) // 128 * 128].view(-1, 128)
with torch.no_grad():
    acts_HSD = torch.cat([lm.model(part, output_hidden_states=True).hidden_states[2] for part in tokens_HS.split(16)])

run = crosscode.train(
    acts_HSD.flatten(0, 1),  # (N, D): a row for each token
    {"type": "sae", "n_latents": 512, "activation": {"type": "topk", "k": 16}},
    run_dir=run_dir,
    tokens=tokens_HS,
    tokenizer=lm.tokenizer,
    n_tokens=n_tokens,
    batch_size=1024,
    data={"validation_fraction": 0.1},
)

print(run.model)
print(f"unexplained variance {run.summary['fvu']:.3f}, {run.summary['l0']:.0f} latents a token")
latent = int(run.table()["firings"].argsort().iloc[-20])
for place in run.top(latent, n=3):
    print(place)
print(run.report())
