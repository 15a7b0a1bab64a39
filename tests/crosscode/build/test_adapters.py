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
from crosscode.evaluation.splicing import logits_with

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
