"""Damaged and odd files of adapters, by fixed seeds: refused in one line, or what plain `peft` computes from them."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosscode.data import load_language_model
from crosscode.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from damage import ODD, damage_file

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = {"lora": {}, "dora": {"use_dora": True}, "save": {"modules_to_save": ["lm_head"]}, "bias": {"bias": "all"}}
TOKENS_HS = torch.randint(46, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from transformers import AutoModelForCausalLM, LlamaConfig

    root = tmp_path_factory.mktemp("adapters")
    sizes = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name, width in (("base", 16), ("wide", 32)):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=46, hidden_size=width, max_position_embeddings=32, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    for kind, options in KINDS.items():
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options
        )
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), config)
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(0.3 * torch.randn(param.shape))
        model.save_pretrained(root / kind)
    return root


def odd_tensor(folder, rng):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = rng.choice(sorted(tensors))
    old = tensors.pop(key)
    changed = {
        "nan": old * torch.nan,
        "one infinite": old.index_put((torch.tensor(0),), torch.tensor(torch.inf)),
        "fewer rows": old[:1].clone(),
        "flat": old.reshape(-1).clone(),
        "empty": old.new_zeros(0),
        "turned": old.T.contiguous(),
        "of another dtype": old.to(rng.choice([torch.float16, torch.float64, torch.int64])),
    }
    kind = rng.choice([*changed, "gone", "twice"])
    more = {key: old, f"{key}x": old.clone()} if kind == "twice" else {key: changed[kind]} if kind in changed else {}
    save_file(tensors | more, file)
    return f"{key} is {kind}"


def odd_config(folder, rng):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    key = rng.choice(sorted(config))
    config[key] = rng.choice([*ODD, 3, "LORA", "all-linear", ["lm_head"], "none"])
    file.write_text(json.dumps(config))
    return f"{key} = {config[key]!r}"


def odd_file(folder, rng):
    file = folder / rng.choice(["adapter_config.json", "adapter_model.safetensors"])
    return f"{file.name}: {damage_file(file, rng)}"


def check(root, folder, what, **options):
    """None where it is refused, else the logits."""
    from transformers import AutoModelForCausalLM

    try:
        logits_HSV = (
            load_language_model(str(folder if not options else root / "base"), **options).model(TOKENS_HS).logits
        )
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, what
        return None
    assert logits_HSV.isfinite().all(), what
    whole = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), str(folder)).eval()
    with torch.no_grad():
        assert torch.equal(whole(input_ids=TOKENS_HS, use_cache=False).logits, logits_HSV), what
    return logits_HSV


@pytest.mark.parametrize(
    "seeds", [pytest.param(range(40), id="some"), pytest.param(range(40, 1000), id="many", marks=pytest.mark.soak)]
)
def test_odd_files_are_refused_in_one_line_or_read_as_peft_reads_them(seeds, root, tmp_path):
    n_refused = 0
    for seed in seeds:
        rng, folder = random.Random(seed), tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / rng.choice(list(KINDS)), folder)
        what = (seed, rng.choice([odd_tensor, odd_tensor, odd_config, odd_config, odd_file])(folder, rng))
        options = rng.choice([{}, {"adapter": str(folder)}])
        n_refused += check(root, folder, what, **options) is None
    assert 0.4 < n_refused / len(seeds) < 0.95


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("r", 0, "r"),
        ("lora_alpha", 1e308, "not finite with it"),
        ("lora_alpha", 0, "changes no logit"),
        ("alora_invocation_tokens", [5, 6], "acts after certain tokens alone"),
        ("base_model_name_or_path", 7, "does not describe an adapter"),
        ("target_modules", ["v_proj"], "weights are"),
    ],
)
def test_values_that_give_no_adapter_are_refused(name, value, message, root, tmp_path):
    shutil.copytree(root / "lora", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(InputError, match=message) as error:
        load_language_model(str(root / "base"), adapter=str(tmp_path / "adapter"))
    assert "\n" not in str(error.value)


def test_a_base_of_other_sizes_is_refused_with_the_shapes(root):
    with pytest.raises(InputError, match="size mismatch for base_model") as error:
        load_language_model(str(root / "wide"), adapter=str(root / "lora"))
    assert "\n" not in str(error.value)
