"""Adapters, roles and rollouts together: killed and gone on with, in stores, and in configs with odd values."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml

from crosscode.build.schema import check_config
from crosscode.data.store.reader import ActivationCache
from crosscode.data.text.labels import ROLES
from crosscode.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
from damage import ODD
from test_resume_after_signals import SCHEMES, _run_scenarios, assert_equal_models, later_rows, scheme_config

peft = pytest.importorskip("peft")
TEMPLATE = (
    "{% for m in messages %}{{ ' <s> ' + m['role'] + ' ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <s> assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def values(save_tiny_lm, tmp_path_factory):
    """A diff of a base and an adapter on what the adapter answers, of which the answers alone count."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("talking")
    base = str(save_tiny_lm(root / "base", 0, ["user", "assistant", *(f"w{i}" for i in range(60))]))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_alpha=32)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(root / "lora")
    chats = [[{"role": "user", "content": f"w{i % 60} w{i % 7}"}] for i in range(90)]
    (root / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    config = scheme_config(SCHEMES["topk"], [base], "")
    config["language_models"].append({"path": base, "adapter": str(root / "lora"), "name": "lora"})
    config["data"] |= {
        "source": {
            "type": "rollouts", "model": "lora", "max_new_tokens": 24, "batch_size": 30, "folder": str(root / "said"),
            "prompts": {"type": "local", "path": str(root / "chats.jsonl"), "column": "messages"},
        },
        "positions": {"roles": ["assistant"], "at_most_per_document": 12},
    }  # fmt: skip
    config["crosscoder"]["type"] = "model_hookpoint_acausal"
    return config


def test_a_killed_run_on_rollouts_ends_like_one_that_was_not(values, tmp_path):
    scenarios = []
    for name, strike in (("whole", {}), ("struck", {"signal": "SIGKILL", "step": 5, "place": "update"})):
        file = tmp_path / f"{name}.yaml"
        data = values["data"] | {"cache": {"path": str(tmp_path / f"{name}-store"), "shard_mb": 1}}
        file.write_text(yaml.safe_dump(values | {"data": data, "run_dir": str(tmp_path / name)}))
        scenarios.append({"config": str(file), **strike})
    scenarios.append({"resume": str(tmp_path / "struck")})
    assert _run_scenarios(scenarios, tmp_path) == [0, -9, 0]
    assert later_rows(tmp_path / "struck") == later_rows(tmp_path / "whole")
    assert_equal_models(tmp_path / "struck" / "final", tmp_path / "whole" / "final")
    whole, struck = (ActivationCache(tmp_path / f"{name}-store") for name in ("whole", "struck"))
    assert torch.equal(whole.read_rows(torch.arange(len(whole))), struck.read_rows(torch.arange(len(struck))))
    labels = whole.labels()
    assert {ROLES[role] for role in labels.role_T.tolist()} == {"assistant"}
    assert int(labels.document_T.unique(return_counts=True)[1].max()) <= 12
    assert torch.equal(labels.packed_R3(), struck.labels().packed_R3())


def test_odd_values_of_adapters_roles_and_rollouts_are_one_line(values, tmp_path):
    parts = ["language_models", "source", "positions"]
    values = json.loads(json.dumps(values | {"run_dir": str(tmp_path / "run")}))
    n_refused = 0
    for seed in range(400):
        rng, changed = random.Random(seed), json.loads(json.dumps(values))
        part = rng.choice(parts)
        node = changed if part == "language_models" else changed["data"]
        key, path = part, []
        while True:
            path.append(key)
            parent, node = node, node[key]
            if not isinstance(node, (dict, list)) or not node or (len(path) > 1 and rng.random() < 0.2):
                break
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        parent[key] = rng.choice(ODD)
        try:
            check_config(changed)
        except InputError as error:
            n_refused += 1
            assert len(str(error).splitlines()) == 1, (seed, path)
            assert str(part) in str(error) or "data" in str(error), (seed, path, str(error))
    assert n_refused > 150
