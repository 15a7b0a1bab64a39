"""Adapters, roles and rollouts together: killed and gone on with, in stores, and in configs with odd values."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml

from crosscode.build.schema import check_config
from crosscode.commands.harvest import harvest_config, run_harvest
from crosscode.data.store.joined import JoinedStores
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
        "isolate_documents": True,
    }  # fmt: skip
    config["crosscoder"]["type"] = "model_hookpoint_acausal"
    return config


def strike(values, folder, data_of):
    """A run that is not struck, and one that is killed and goes on: they end alike."""
    scenarios = []
    for name, more in (("whole", {}), ("struck", {"signal": "SIGKILL", "step": 5, "place": "update"})):
        file = folder / f"{name}.yaml"
        file.write_text(
            yaml.safe_dump(values | {"data": values["data"] | data_of(name), "run_dir": str(folder / name)})
        )
        scenarios.append({"config": str(file), **more})
    scenarios.append({"resume": str(folder / "struck")})
    assert _run_scenarios(scenarios, folder) == [0, -9, 0]
    assert later_rows(folder / "struck") == later_rows(folder / "whole")
    assert_equal_models(folder / "struck" / "final", folder / "whole" / "final")


def test_a_killed_run_on_rollouts_ends_like_one_that_was_not(values, tmp_path):
    strike(values, tmp_path, lambda name: {"cache": {"path": str(tmp_path / f"{name}-store"), "shard_mb": 1}})
    whole, struck = (ActivationCache(tmp_path / f"{name}-store") for name in ("whole", "struck"))
    assert torch.equal(whole.read_rows(torch.arange(len(whole))), struck.read_rows(torch.arange(len(struck))))
    labels = whole.labels()
    assert {ROLES[role] for role in labels.role_T.tolist()} == {"assistant"}
    assert int(labels.document_T.unique(return_counts=True)[1].max()) <= 12
    assert torch.equal(labels.packed_R3(), struck.labels().packed_R3())


@pytest.fixture(scope="module")
def apart(values, tmp_path_factory):
    """A store of each model alone, on what one of them says."""
    paths = [str(tmp_path_factory.mktemp("apart") / f"model{m}") for m in range(2)]
    for m, path in enumerate(paths):
        config = harvest_config(values | {"data": values["data"] | {"cache": {"path": path}}})
        run_harvest(config, models=[m], progress=False)
    return paths


def test_models_apart_are_those_of_one_pass(values, apart, tmp_path):
    cache = {"cache": {"path": str(tmp_path / "both")}}
    both = run_harvest(harvest_config(values | {"data": values["data"] | cache}), progress=False)
    joined, every_R = JoinedStores(apart), torch.arange(both.n_rows)
    assert joined.n_rows == both.n_rows > 300
    assert torch.equal(joined.read_rows(every_R), both.read_rows(every_R))
    assert torch.equal(joined.labels().packed_R3(), both.labels().packed_R3())


@pytest.mark.soak
def test_a_killed_run_on_joined_stores_ends_like_one_that_was_not(values, apart, tmp_path):
    strike(values, tmp_path, lambda name: {"join": apart})


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
