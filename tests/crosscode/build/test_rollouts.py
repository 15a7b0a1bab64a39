"""Rollouts as the text of a run: generated once, held out by content, kept, refused early."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import crosscode
from crosscode.build import rollouts as rollouts_module
from crosscode.build.data import build_documents, build_token_loader
from crosscode.build.experiment import open_experiment
from crosscode.build.schema import check_config, load_config
from crosscode.commands.cli import main
from crosscode.commands.harvest import harvest_config, run_harvest
from crosscode.errors import InputError


@pytest.fixture
def values(tiny_config, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = {
        "type": "rollouts", "model": "two", "prompts": {"type": "local", "path": tiny_corpus}, "n_prompts": 60,
        "prompt_tokens": 4, "max_new_tokens": 16, "batch_size": 30,
    }  # fmt: skip
    return {**tiny_config, "data": {**tiny_config["data"], "source": source}}


def changed(values, **changes):
    return {**values, "data": {**values["data"], "source": {**values["data"]["source"], **changes}}}


@pytest.fixture
def never(monkeypatch):
    def refuse(*args):
        raise AssertionError("a language model was about to be loaded")

    monkeypatch.setattr(rollouts_module, "load_model", refuse)


def test_a_run_on_what_a_model_writes(values, tmp_path, monkeypatch, request):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    run = crosscode.train(config, progress=False)
    (folder,) = (tmp_path / "cache" / "crosscode" / "rollouts").iterdir()
    written = [json.loads(line)["text"] for file in sorted(folder.glob("rollouts-*")) for line in file.open()]
    assert len(written) > 50
    source = load_config(run.path).data.source
    assert source.model.short_name() == "two"  # whole, so that the run's config means the same anywhere
    request.getfixturevalue("never")
    fvu = run.evaluate().fvu
    assert fvu == pytest.approx(run.summary["fvu"])
    experiment = open_experiment(load_config(run.path), to_train=False)
    sides = [
        {
            tuple(row.tolist())
            for batch in build_token_loader(experiment, heldout=side).fresh(epochs=1)
            for row in batch.tokens_HS
        }
        for side in (False, True)
    ]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert [*experiment.documents.open()] == written


def test_a_store_of_rollouts_says_what_they_are(values, tmp_path):
    cached = {**values, "data": {**values["data"], "cache": {"path": str(tmp_path / "acts")}}}
    store = run_harvest(harvest_config(cached), 200, progress=False)
    documents = build_documents(check_config(values).data.source, "data.source")
    assert store.manifest["tokens"]["dataset"] == documents.fingerprint
    cached["data"]["cache"]["path"] = str(tmp_path / "one")
    one = run_harvest(harvest_config(cached), 200, [0], progress=False)
    assert one.manifest["tokens"] == store.manifest["tokens"]  # by a model that is not harvested
    stored = changed(values, seed=1)
    stored["data"]["stores"] = [str(tmp_path / "acts")]
    with pytest.raises(InputError, match=r"data.stores.0: store .* holds other data: tokens.dataset"):
        open_experiment(check_config(stored))


def test_an_adapter_that_was_trained_on_is_not_taken_for_what_it_was(values, tiny_lms, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    def fingerprint(seed):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(tiny_lms[0])
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_alpha=64)
        peft.get_peft_model(model, config).save_pretrained(tmp_path / "lora")
        writer = {"path": tiny_lms[0], "adapter": str(tmp_path / "lora")}
        return build_documents(check_config(changed(values, model=writer)).data.source, "data.source").fingerprint

    assert fingerprint(0) != fingerprint(1)
    assert len([*(tmp_path / "cache" / "crosscode" / "rollouts").iterdir()]) == 2


def test_mixed_with_other_text(values, tiny_corpus):
    parts = [{"source": values["data"]["source"]}, {"source": {"type": "local", "path": tiny_corpus}}]
    config = check_config({**values, "data": {**values["data"], "source": {"type": "mixture", "parts": parts}}})
    mixed = build_documents(config.data.source, "data.source")
    (written, plain) = mixed.sources
    assert {*mixed.open()} <= {*written.open()} | {*plain.open()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "three"}, r"data.source.model = 'three': must be one of one, two, or \{path: ...\}"),
        ({"model": {"path": "./nowhere"}}, r"data.source.model: language model './nowhere': no such folder"),
        ({"max_new_tokens": 64}, r"data.source.max_new_tokens = 64: two takes 64 positions, the prompt among them"),
        ({"max_new_tokens": 0}, "data.source.max_new_tokens = 0"),
        ({"n_prompts": -3}, "data.source.n_prompts = -3"),
        (
            {"sampling": {"temperature": 1e-9}},
            r"data.source.sampling.temperature = 1e-09: must be 0, or from 0.01 to 10",
        ),
        ({"sampling": {"top_p": 0}}, r"data.source.sampling.top_p = 0"),
        (
            {"prompts": {"type": "local", "path": "nowhere.jsonl"}},
            r"data.source.prompts.path = 'nowhere.jsonl': no such file",
        ),
        ({"prompts": {"type": "hub", "name": "a/b"}, "n_prompts": None}, "data.source: n_prompts: must be given where"),
        ({"folder": "~"}, r"data.source.folder = '~': is the home folder"),
        ({"prompts": {"type": "rollouts"}}, r"data.source.prompts.type = 'rollouts': must be one of"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(changes, message, values, never):
    with pytest.raises(InputError, match=message):
        open_experiment(check_config(changed(values, **changes)))


def test_held_out_text_that_is_not_there_is_said_before_anything_is_written(values, never):
    values["data"]["heldout"] = {"type": "local", "path": "nowhere.jsonl"}
    with pytest.raises(InputError, match=r"data.heldout.path = 'nowhere.jsonl': no such file"):
        open_experiment(check_config(values))


def test_a_model_that_does_not_fit_is_refused(values, never, monkeypatch):
    monkeypatch.setattr("crosscode.build.foresight._memory", lambda device: 1000)
    with pytest.raises(InputError, match=r"model.path = .* more than the 0.0 GiB that are free"):
        build_documents(check_config(values).data.source, "data.source")


def test_code_of_a_models_own_runs_only_where_that_is_said_now(values, tiny_lms, tmp_path):
    from crosscode.build.schema import load_own_config

    writer = {"path": tiny_lms[0], "trust_remote_code": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed(values, model=writer)))
    with pytest.raises(InputError, match=r"data.source.model.trust_remote_code = True"):
        load_own_config(tmp_path / "config.yaml", False)


def test_a_folder_may_be_named_and_moves_with_the_run(values, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(changed(values, folder=str(tmp_path / "said"))))
    run = crosscode.train(config, progress=False)
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / "said" / "manifest.json").is_file()
    final = (run.path / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(run.path / "final")
    moved = Path(shutil.move(tmp_path / "said", tmp_path / "moved"))
    stored = run.path / "config.yaml"
    stored.write_text(stored.read_text().replace(str(tmp_path / "said"), str(moved)))
    assert main(["train", "--resume", str(run.path)]) == 0
    assert main(["verify", str(moved)]) == 0
    assert (run.path / "final" / "model.safetensors").read_bytes() == final
