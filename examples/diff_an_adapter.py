"""What did a LoRA adapter change? A small model that comes with crosscode, and an adapter that is trained on it here.

pip install 'crosscode[peft]'
python examples/diff_an_adapter.py [RUN [N_TOKENS]]      (without a GPU: two minutes)
"""

import sys
from pathlib import Path

import peft
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import crosscode
from crosscode.config.reading import read_yaml
from crosscode.demo import demo_model_path
from crosscode.demo.corpus import demo_corpus

run_dir = sys.argv[1] if len(sys.argv) > 1 else "runs/adapter"
n_tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 400_000
adapter = Path(run_dir).with_name(f"{Path(run_dir).name}_lora")

# An adapter as people make them: the base saw Python sources alone, and learns the manual's prose.
base = str(demo_model_path("base"))
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"))
ids = AutoTokenizer.from_pretrained(base)("\n".join(demo_corpus("train", ["manual"], 400_000)["text"]), verbose=False)[
    "input_ids"
]
tokens_NS = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step in range(min(100, n_tokens // 1000)):
    batch_HS = tokens_NS[torch.arange(step * 8, step * 8 + 8) % len(tokens_NS)]
    loss = model(input_ids=batch_HS, labels=batch_HS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"adapter: step {step}, loss {loss:.2f}")
model.save_pretrained(str(adapter))

values = read_yaml("demo")
demo = {"path": "demo:base", "dtype": "float32"}
values["language_models"] = [demo, {**demo, "adapter": str(adapter), "name": "lora"}]
config = adapter / "diff.yaml"
config.write_text(yaml.safe_dump(values, sort_keys=False))  # crosscode train CONFIG does the same
heldout = {"n_tokens": min(50_000, n_tokens), "loss_recovered_n_tokens": 1024}
run = crosscode.train(config, run_dir=run_dir, train={"n_tokens": n_tokens}, evaluation=heldout)
(verdict,) = run.verdicts
print(verdict.headline())
for latent in verdict.ranking("lora")[:3]:
    print(f"latent {latent} ({verdict.names[latent]}): {verdict.why[latent]}")
    for place in run.top(latent, n=2):
        print("   ", place)
