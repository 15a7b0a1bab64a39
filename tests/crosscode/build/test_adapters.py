"""An adapter through a whole run: facts, loss recovered, steering, resume, stores."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import crosscode
from crosscode.build.data import build_rows, build_token_loader
from crosscode.build.experiment import open_experiment
from crosscode.build.foresight import check_language_models
from crosscode.build.resume import ResumePoint
from crosscode.build.run import build_trainer
from crosscode.build.schema import check_config
from crosscode.commands.harvest import harvest_config, run_harvest
from crosscode.data import load_language_model
from crosscode.errors import InputError
from crosscode.evaluation.splicing import Splicer, logits_with

peft = pytest.importorskip("peft")


@pytest.fixture
def save_adapter(tiny_lms):
    """`save_adapter(folder, seed)`: an adapter of random weights on the first tiny model."""
    from transformers import AutoModelForCausalLM

    def save(folder, seed=0):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny_lms[0])
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture
def values(tiny_config, tiny_lms, save_adapter, tmp_path):
    adapter = save_adapter(tmp_path / "lora")
    models = [{"path": tiny_lms[0]}, {"path": tiny_lms[0], "adapter": adapter}]
    return {**tiny_config, "language_models": models}


def test_a_run_on_an_adapter(values, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    run = crosscode.train(config, progress=False)
    adapter = values["language_models"][1]["adapter"]
    facts = json.loads((run.path / "final" / "config.json").read_text())["metadata"]["language_models"]
    assert [fact.get("adapter") for fact in facts] == [None, adapter]
    assert [fact["name"] for fact in facts] == ["one", "lora"]
    assert run.report().read_text().count(adapter)
    base, adapted = run.language_models
    tokens_HS = torch.arange(4, 12)[None]
    alone = load_language_model(adapter)
    plain_HSV = logits_with(base, tokens_HS, None)
    adapted_HSV = logits_with(adapted, tokens_HS, None)
    assert torch.equal(adapted_HSV, alone.model(tokens_HS).logits)
    assert not torch.equal(adapted_HSV, plain_HSV)
    latent = int(run.table()["firings"].argmax())
    with run.steer({latent: 5.0}, models="lora"):
        assert not torch.equal(adapted.model(tokens_HS).logits, adapted_HSV)
        assert torch.equal(base.model(tokens_HS).logits, plain_HSV)
    assert torch.equal(adapted.model(tokens_HS).logits, adapted_HSV)


def test_the_readmes_config_of_gemma_harvests_in_bfloat16(tiny_lms, tiny_corpus, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

    tokenizer = AutoTokenizer.from_pretrained(tiny_lms[0])
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    config = Gemma2Config(vocab_size=len(tokenizer), num_hidden_layers=15, max_position_embeddings=2048, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer.save_pretrained(tmp_path / "gemma")
    model.save_pretrained(tmp_path / "gemma")
    lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "lora")
    text_file = tmp_path / "text.jsonl"
    text_file.write_text(Path(tiny_corpus).read_text() * 3)
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    text = readme.partition("## A config, whole\n\n```yaml\n")[2].partition("```")[0]
    named = text.replace("google/gemma-2-2b", str(tmp_path / "gemma")).replace("OWNER/LORA", str(tmp_path / "lora"))
    values = yaml.safe_load(named)
    values["data"] |= {"source": {"type": "local", "path": str(text_file)}, "sequence_length": 32}
    experiment = open_experiment(check_config(values | {"run_dir": str(tmp_path / "run"), "device": "cpu"}))
    assert [model.dtype for model in experiment.harvester.models] == [torch.bfloat16] * 2
    batch = next(iter(build_token_loader(experiment, heldout=False)))
    acts_HSMPD = experiment.harvester.harvest(batch.tokens_HS[:2])
    assert acts_HSMPD.dtype == torch.float32
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "gemma", dtype="auto").eval()
    for m in range(2):
        if m:
            whole = peft.PeftModel.from_pretrained(whole, str(tmp_path / "lora")).eval()
        with torch.no_grad():
            states = whole(input_ids=batch.tokens_HS[:2], output_hidden_states=True).hidden_states
        assert states[14].dtype == torch.bfloat16 and torch.equal(acts_HSMPD[:, :, m, 0], states[14].float())


def test_a_store_of_one_adapter_is_not_that_of_another(values, save_adapter, tmp_path):
    data = {**values["data"], "cache": {"path": str(tmp_path / "acts")}}
    store = run_harvest(harvest_config({**values, "data": data}), 200, progress=False)
    assert store.manifest["models"][1]["name"].endswith("lora")
    stored = {**values, "data": {**values["data"], "stores": [str(tmp_path / "acts")]}}
    moved = str(shutil.move(tmp_path / "lora", tmp_path / "moved"))

    def rows(adapter, **changes):
        models = [values["language_models"][0], {**values["language_models"][1], "adapter": adapter, **changes}]
        return build_rows(open_experiment(check_config({**stored, "language_models": models})))

    assert rows(moved).n_rows == store.n_rows
    for adapter, changes in ((save_adapter(tmp_path / "other", 1), {}), (moved, {"adapter_scale": 0.5})):
        with pytest.raises(InputError, match=r"holds other data: models.1.weights"):
            rows(adapter, **changes)


def test_a_run_goes_on_with_its_adapter_alone(values, save_adapter, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    run = crosscode.train(config, progress=False)
    shutil.rmtree(run.path / "final")
    save_adapter(tmp_path / "lora", 1)
    with pytest.raises(
        InputError,
        match=r"language_models.1.path = .* with adapter '.*lora': has other weights than when the run began",
    ):
        build_trainer(open_experiment(ResumePoint.find(run.path).config), resume=ResumePoint.find(run.path))


def test_memory_and_missing_files_are_told_before_a_model_is_loaded(values, tiny_lms, monkeypatch):
    n_bytes = sum(p.numel() * 4 for p in load_language_model(tiny_lms[0]).model.parameters())
    monkeypatch.setattr("crosscode.build.foresight._memory", lambda device: n_bytes)
    with pytest.raises(
        InputError, match=r"language_models.1.path = .* in float32 and those of the adapter take .*free"
    ):
        check_language_models(check_config(values))
    values["language_models"][1]["adapter"] += "x"
    with pytest.raises(InputError, match=r"language_models.1.adapter = .*x': no folder or hub repository"):
        check_language_models(check_config(values))


def test_fields_of_an_adapter_that_say_nothing_are_refused(values):
    for changes, message in (
        ({"adapter_revision": "main"}, "adapter_revision = 'main': is given without adapter"),
        ({"adapter_scale": 0}, "adapter_scale = 0.0: would be the base"),
    ):
        with pytest.raises(InputError, match=message):
            check_config({**values, "language_models": [{"path": "x", **changes}]})


# As the models' tokenizers ship them, the date of Llama 3's without its lines on tools.
LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIGNS = [
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|im_start|>",
    "<|im_end|>",
]
WORDS = [*SIGNS, "user", "assistant", "system", "model", *(f"w{i}" for i in range(40))]
CHAT = [
    {"role": "user", "content": "w1 w2"},
    {"role": "assistant", "content": "w3 w4"},
    {"role": "user", "content": "w5 w6 w7"},
]


@pytest.fixture(scope="module")
def chat_run(save_tiny_lm, tmp_path_factory):
    """A run between a base and an adapter on it that talk, the folders of both, and the run's config."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("chats")
    save_tiny_lm(folder / "base", words=WORDS)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SIGNS)})
    tokenizer.chat_template = QWEN
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        for weight in base.parameters():
            weight.mul_(8.0 if weight.ndim == 2 else 1.0)  # so that it says something
    base.save_pretrained(folder / "base")
    peft.get_peft_model(base, config).save_pretrained(folder / "lora")
    chats = [
        [{"role": role, "content": f"w{i % 40} w{i * 7 % 40} w{i * 3 % 40}"} for role in ("user", "assistant")]
        for i in range(120)
    ]
    (folder / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    values = {
        "run_dir": str(folder / "run"), "backend": "torch", "device": "cpu", "hookpoints": ["blocks.1.hook_resid_post"],
        "language_models": [{"path": str(folder / "base")}, {"path": str(folder / "base"), "adapter": str(folder / "lora")}],
        "data": {
            "source": {"type": "local", "path": str(folder / "chats.jsonl"), "column": "messages"},
            "validation_fraction": 0.3, "sequence_length": 32, "n_tokens_for_norm_estimate": 128,
        },
        "crosscoder": {"n_latents": 32, "activation": {"type": "topk", "k": 4}, "init": {"type": "anthropic_transpose"}},
        "objective": {"recon": {}},
        "train": {"n_tokens": 640, "batch_size": 64},
        "evaluation": {"n_tokens": 200},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return crosscode.train(folder / "config.yaml", progress=False), folder


def plain_models(folder):
    """The base, and the adapter on a base of its own, as `peft` runs it."""
    from transformers import AutoModelForCausalLM

    base, own = (AutoModelForCausalLM.from_pretrained(folder / "base").eval() for _ in range(2))
    return base, peft.PeftModel.from_pretrained(own, str(folder / "lora")).eval().get_base_model()


@torch.no_grad()
def greedy(model, ids, n, delta_of=None):
    """`n` tokens, one full pass each, with `delta_of(ids)` `[S, D]` added to the output of block 1; and the first logits."""
    first = None
    for _ in range(n):
        added = None if delta_of is None else delta_of(ids)
        handle = model.model.layers[1].register_forward_hook(lambda m, a, out, d=added: out if d is None else out + d)
        logits_SV = model(torch.tensor([ids]), use_cache=False).logits[0]
        handle.remove()
        first = logits_SV[-1] if first is None else first
        ids = [*ids, int(logits_SV[-1].argmax())]
        if ids[-1] == 2:
            break
    return ids, first


@pytest.mark.parametrize("template", [LLAMA3, GEMMA, QWEN], ids=["llama3", "gemma", "qwen"])
def test_chats_are_steered_with_an_adapter_as_by_hooks_on_pefts_own(template, chat_run):
    run, folder = chat_run
    tokenizer = run.experiment.tokenizer
    tokenizer.chat_template = template
    ids = tokenizer.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True)["input_ids"]
    bos, read = [1] * (ids[0] != 1), run.latents(CHAT)
    asked = tokenizer.apply_chat_template(CHAT, tokenize=True)["input_ids"]
    assert run.experiment.harvester.models[0].tokenizer is tokenizer and len(read.tokens) == len(bos + asked)
    n, latent = 6, int(read.values_SL.to_dense().amax(0).argmax())
    W_enc_MD, W_dec_MD = run.model.W_enc_LXiDi[latent, :, 0].detach(), run.model.W_dec_LXoDo[latent, :, 0].detach()
    assert W_enc_MD.shape == W_dec_MD.shape == (2, 16)
    amount = 3.0 * float(run.max_activation_L[latent])
    base, adapted = plain_models(folder)

    def latents_of(ids):
        """`a_S`, from both plain models."""
        states = [m(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0] for m in (base, adapted)]
        h_SL = torch.einsum("msd,lmd->sl", torch.stack(states), run.model.W_enc_LXiDi[:, :, 0]) + run.model.b_enc_L
        kept = h_SL.topk(4, dim=1).indices
        return (h_SL.relu() * torch.zeros_like(h_SL).scatter(1, kept, 1.0))[:, latent, None].detach()

    changes = {
        "steered": [lambda ids, m=m: amount * W_dec_MD[m] for m in (0, 1)],
        "ablated": [lambda ids, m=m: -latents_of(ids) * W_dec_MD[m] for m in (0, 1)],
    }
    found = {
        "steered": run.compare_steered(CHAT, {latent: 3.0}, n_tokens=n),
        "ablated": run.compare_steered(CHAT, ablate=[latent], n_tokens=n),
    }
    for what, delta_M in changes.items():
        for model, delta_of, one in zip((base, adapted), delta_M, found[what].values(), strict=True):
            plain_ids, before_V = greedy(model, bos + ids, n)
            changed_ids, after_V = greedy(model, bos + ids, n, delta_of)
            shown = [
                tokenizer.decode(some[len(bos + ids) :], skip_special_tokens=True) for some in (plain_ids, changed_ids)
            ]
            assert [one.plain[0].strip(), one.changed.continuations[0].strip()] == [text.strip() for text in shown]
            change_V = after_V.softmax(-1) - before_V.softmax(-1)
            assert float(change_V.abs().max()) > 1e-4
            top = max(one.changed.tokens, key=lambda token: abs(token[2] - token[1]))
            assert top[2] - top[1] == pytest.approx(float(change_V[change_V.abs().argmax()]), abs=1e-6)


@torch.no_grad()
def test_an_adapter_is_spliced_as_by_hooks_on_pefts_own(chat_run):
    run, folder = chat_run
    batch = next(run.experiment.heldout_batches())
    replaced_HSD = torch.randn(*batch.tokens_HS.shape, 16, generator=torch.Generator().manual_seed(0))
    for m, model in enumerate(plain_models(folder)):
        acts_HSD = model(batch.tokens_HS, output_hidden_states=True).hidden_states[2]
        assert torch.equal(acts_HSD, batch.acts_HSMPD[:, :, m, 0])
        new_HSD = torch.where(batch.mask_HS[..., None], replaced_HSD, acts_HSD)
        handle = model.model.layers[1].register_forward_hook(lambda module, a, out, new=new_HSD: new)
        expected_HSV = model(batch.tokens_HS, use_cache=False).logits
        handle.remove()
        spliced = Splicer(run.experiment.harvester, m).logits(batch.tokens_HS, None, {0: replaced_HSD}, batch.mask_HS)
        torch.testing.assert_close(spliced, expected_HSV, rtol=0, atol=1e-5 * float(expected_HSV.abs().max()))
        assert not torch.allclose(expected_HSV, model(batch.tokens_HS).logits, atol=0.1)
