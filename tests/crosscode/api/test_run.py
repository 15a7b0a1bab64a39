"""The run that `crosscode.train` and `crosscode.open` return, and what commands make of its directory."""

import json
import os
import signal

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

import crosscode
from crosscode.commands.cli import main
from crosscode.errors import InputError, Interrupted


class StopAt(crosscode.Callback):
    """Ctrl-C at a step of our choice."""

    def __init__(self, step):
        self.step = step

    def on_step(self, trainer):
        if trainer.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def losses(run):
    return [row["loss"] for row in run.metrics if "loss" in row]


def test_the_run_has_model_summary_evaluation_and_report(acts, train):
    run = train(acts, data={"validation_fraction": 0.3})
    assert isinstance(run, crosscode.Run) and run.model.is_folded
    raw = acts[:5]
    assert run.model(raw).shape == raw.shape
    assert run.evaluate().fvu == pytest.approx(run.summary["fvu"])
    before = json.loads((run.path / "evaluation.json").read_text())
    assert run.evaluate(n_tokens=5).n_tokens == 5
    assert json.loads((run.path / "evaluation.json").read_text()) == before, "another number of rows replaces nothing"
    page = run.report().read_text()
    assert "row 4" in page and "Latents were not looked at" not in page
    assert repr(run) == f"Run({str(run.path)!r}, sae, finished)"


def test_commands_take_the_directory(acts, train, capsys):
    run = train(acts)
    assert main(["evaluate", str(run.path)]) == 0
    assert json.loads(capsys.readouterr().out)["fvu"] == pytest.approx(run.summary["fvu"])
    assert main(["report", str(run.path)]) == 0
    moved = run.path.with_name("moved")
    run.path.rename(moved)
    assert crosscode.open(moved).evaluate().fvu == pytest.approx(
        json.loads((moved / "summary.json").read_text())["fvu"]
    )


def test_the_table_and_top_places_of_latents(acts, train):
    run = train(acts)
    table = run.table()
    assert len(table) == 24 and int(table["firings"].sum()) == run.evaluate().n_tokens * 3
    latent = int(table["firings"].idxmax())
    first, *others = run.top(latent)
    assert first.activation == pytest.approx(table["max_activation"][latent])
    row = int(first.text.strip(" «»").removeprefix("row "))
    assert run.model.encode(acts[row : row + 1])[0, latent].item() == pytest.approx(first.activation, rel=1e-5)
    assert all(a.activation >= b.activation for a, b in zip([first, *others], others, strict=False))
    with pytest.raises(InputError, match=r"latent = 24: must be between 0 and 23"):
        run.top(24)
    with pytest.raises(InputError, match="knows no language model"):
        run.latents("text")


@pytest.mark.parametrize("flat", [True, False])
def test_tokens_give_examples(flat, acts, train, tiny_lms):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_lms[0])
    tokens = 3 + torch.arange(600).reshape(60, 10) % 50
    tokens = tokens.flatten() if flat else tokens
    run = train(acts, tokens=tokens, tokenizer=tokenizer, data={"validation_fraction": 0.1})
    peak = run.top(int(run.table()["firings"].idxmax()))[0]
    assert f"w{(peak.example.sequence * (10 if not flat else 60) + peak.example.position + 540) % 50}»" in peak.text
    assert "w" in run.report().read_text()
    for format, more in (("circuit-tracer", ["--layer", "3"]), ("delphi", []), ("dataset", [])):
        out = run.path.parent / format
        assert main(["features", str(run.path), "--to", format, "--out", str(out), *more]) == 0
    rows = pq.read_table(out / "latents.parquet").to_pylist()
    assert any("w" in token for row in rows for one in row["examples"] for token in one["tokens"])
    caches = [
        load_file(file) | {"first": int(file.stem.split("_")[0])}
        for file in (out.parent / "delphi").glob("acts/*.safetensors")
    ]
    back = torch.zeros(60, 24)
    for cache in caches:
        h, s, latent = cache["locations"].T
        back[h * cache["tokens"].shape[1] + s, latent + cache["first"]] = cache["activations"].float()
        assert torch.equal(cache["tokens"].flatten(), tokens.flatten()[540:])
    torch.testing.assert_close(back, run.model.encode(acts[540:]).detach().relu(), rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="tokens: are those of acts, of which no row is held out beside heldout="):
        train(acts, name="two", tokens=tokens, tokenizer=tokenizer, heldout=acts[:50])
    plain = train(acts, name="plain", tokens=tokens)
    assert main(["features", str(plain.path), "--to", "dataset", "--out", str(plain.path.parent / "none")]) == 2
    assert (
        plain.top(int(plain.table()["firings"].idxmax()))[0].text.replace("«", "").replace("»", "").split()[0].isdigit()
    )


# ---- configs


def test_a_config_is_the_command_line(tiny_config, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(tiny_config))
    assert main(["train", str(file), "--run_dir", str(tmp_path / "cli"), "--train.batch_size", "32"]) == 0
    run = crosscode.train(str(file), run_dir=tmp_path / "python", train={"batch_size": 32}, progress=False)
    assert losses(run) == losses(crosscode.open(tmp_path / "cli"))
    assert run.config.train.batch_size == 32

    found = run.latents("w1 w2 w3")
    assert found.tokens == ["<s>", " w1", " w2", " w3"] and found.values_SL.shape == (4, 32)
    assert found.values_SL.to_dense().gt(0).sum(1).tolist() == [4, 4, 4, 4]
    (latent, value), *_ = found.strongest(1)
    assert found.values_SL.to_dense()[1].max().item() == value == found.values_SL.to_dense()[1, latent].item()
    with pytest.raises(InputError, match=r"text: 0 tokens|text: 80 tokens"):
        run.latents("w1 " * 79)
    assert [model.name for model in run.language_models] == [lm["path"] for lm in tiny_config["language_models"]]


def test_a_dumped_config_of_files_trains_again_to_the_bit(acts, train, tmp_path):
    torch.save(acts, tmp_path / "unused.pt")
    import numpy as np

    np.save(tmp_path / "acts.npy", acts.numpy())
    run = train(tmp_path / "acts.npy")
    assert main(["train", str(run.path / "config.yaml"), "--run_dir", str(tmp_path / "again")]) == 0
    assert losses(crosscode.open(tmp_path / "again")) == losses(run)


# ---- going on


def test_a_run_on_a_file_is_resumed_by_the_command_line(acts, train, tmp_path):
    import numpy as np

    np.save(tmp_path / "acts.npy", acts.numpy())
    whole = train(tmp_path / "acts.npy", name="whole", tokens=torch.arange(600).reshape(60, 10))
    with pytest.raises(Interrupted):
        train(tmp_path / "acts.npy", tokens=torch.arange(600).reshape(60, 10), callbacks=[StopAt(4)])
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert losses(crosscode.open(tmp_path / "run")) == losses(whole)


def test_a_run_on_a_tensor_is_resumed_with_the_tensor_alone(acts, train, tmp_path, capsys):
    whole = train(acts, name="whole")
    with pytest.raises(Interrupted):
        train(acts, callbacks=[StopAt(4)])
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert "were a tensor in memory (600, 8), which no file holds; pass them again: crosscode.open(" in error
    assert "\n" not in error
    with pytest.raises(InputError, match=r"data state: store.content was"):
        crosscode.open(tmp_path / "run").resume(acts + 1, progress=False)
    assert losses(crosscode.open(tmp_path / "run").resume(acts, progress=False)) == losses(whole)


def test_a_run_on_an_iterator_says_why_it_cannot_be_resumed(acts, train, tmp_path, capsys):
    with pytest.raises(Interrupted):
        train(iter(acts.split(100)), n_tokens=512, data={"shuffle_buffer_size": 64}, callbacks=[StopAt(4)])
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert "has no position to go on from; begin a new run" in error and "\n" not in error
    with pytest.raises(InputError, match="has no position to go on from"):
        crosscode.open(tmp_path / "run").resume(iter(acts.split(100)), progress=False)


def test_data_that_ends_early_leaves_a_final_model(acts, train):
    run = train(iter(acts.split(100)), n_tokens=64_000, data={"shuffle_buffer_size": 64, "validation_fraction": 0.001})
    assert 0 < run.summary["step"] < 1000 and run.directory.is_finished()


# ---- models


def test_an_initialised_model_is_trained_in_place(acts, train):
    activation = crosscode.TopkActivation(k=3, n_latents=24)
    model = crosscode.SAEOrTranscoder(8, 8, 24, activation, use_encoder_bias=False)
    with pytest.raises(InputError, match="its weights are not initialised"):
        train(acts, model)
    model.init_weights(crosscode.AnthropicTransposeInit(), seed=5)
    before = model.W_dec_LD.detach().clone()
    run = train(acts, model)
    assert not torch.equal(model.W_dec_LD, before) and torch.equal(run.model.W_dec_LD, model.W_dec_LD)
    config = yaml.safe_load((run.path / "config.yaml").read_text())["crosscoder"]
    assert (config["type"], config["init"], config["use_encoder_bias"]) == ("sae", {"type": "given"}, False)
    with pytest.raises(InputError, match="scaling is folded in"):
        train(acts, model, name="again")
    assert main(["train", str(run.path / "config.yaml"), "--run_dir", str(run.path.with_name("other"))]) == 2


def test_a_model_of_another_size_is_refused(acts, train):
    model = crosscode.SAEOrTranscoder(7, 7, 24, crosscode.TopkActivation(k=3, n_latents=24))
    model.init_weights(crosscode.AnthropicTransposeInit())
    with pytest.raises(InputError, match=r"'d_in': 7.*width 8 need"):
        train(acts, model)


ARCHITECTURES = {"sae": 1, "transcoder": 2, "model_hookpoint_acausal": 2, "cross_layer_transcoder": 3}
ARCHITECTURES["compound_cross_layer_transcoder"] = 4


@pytest.mark.parametrize("activation", ["relu", "topk", "batch_topk", "groupmax", "jumprelu"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_scheme_has_usual_settings(architecture, activation, acts, train):
    k = {"k": 4} if activation in ("topk", "groupmax", "batch_topk") else {}
    if activation == "batch_topk":
        k["threshold_start_step"] = 1
    section = {"type": architecture, "n_latents": 24, "activation": {"type": activation, **k}}
    run = train([acts] * ARCHITECTURES[architecture], section, n_tokens=192)
    terms = set(yaml.safe_load((run.path / "config.yaml").read_text())["objective"])
    assert terms == {"relu": {"recon", "l1"}, "jumprelu": {"recon", "tanh", "pre_act"}}.get(
        activation, {"recon", "auxk"}
    )


# ---- reading


@pytest.fixture
def text_run(tiny_config, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(yaml.safe_dump(tiny_config))
    return crosscode.train(str(file), progress=False)


def test_logits_of_a_latent_are_those_of_each_model_itself(text_run):
    found = text_run.logits(5)
    assert list(found) == [f"{name}/blocks.1.hook_resid_post" for name in ("one", "two")]
    for m, (lm, logits) in enumerate(zip(text_run.language_models, found.values(), strict=True)):
        with torch.no_grad():
            expected_V = lm.model.lm_head(lm.model.model.norm(text_run.model.W_dec_LXoDo[5, m, 0]))
        torch.testing.assert_close(logits.logits_V, expected_V, rtol=0, atol=1e-5 * float(expected_V.abs().max()))
        best = int(expected_V.argmax())
        assert logits.top(1)[0][0].strip() == lm.tokenizer.convert_ids_to_tokens(best)
        assert logits.bottom(1)[0][1] == pytest.approx(float(expected_V.min()))
    with pytest.raises(InputError, match=r"latent = 32: must be between 0 and 31"):
        text_run.logits(32)


def test_the_command_shows_the_largest_latents_of_each_token(text_run, capsys):
    assert main(["latents", str(text_run.path), "--text", "w1 w2", "--n", "2"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].endswith("  (training leaves out position 0)")
    rows = [line.partition("  (")[0].split() for line in out.splitlines()]
    found = text_run.latents("w1 w2")
    assert [row[0] for row in rows] == ["<s>", "w1", "w2"]
    for position, (_, *shown) in enumerate(rows):
        assert shown == [f"{latent}:{value:.3g}" for latent, value in found.strongest(position, 2)]


def test_chats_pass_through_the_template(text_run, capsys):
    message = [{"role": "user", "content": "w1 w2"}]
    with pytest.raises(InputError, match="text: the tokenizer has no chat template"):
        text_run.latents(message)
    text_run.experiment.tokenizer.chat_template = "<s> w9{% for m in messages %} {{ m['content'] }}{% endfor %}"
    assert text_run.latents(message).tokens == ["<s>", " w9", " w1", " w2"]


def test_as_many_activations_as_asked_for_are_evaluated(text_run, caplog):
    before = (text_run.path / "evaluation.json").read_bytes()
    assert text_run.evaluate(n_tokens=37).n_tokens == 37
    assert "are held out" not in caplog.text
    found = text_run.evaluate(n_tokens=10**6).n_tokens
    assert f"n_tokens = 1000000: only {found} are held out" in caplog.text
    assert (text_run.path / "evaluation.json").read_bytes() == before
    assert text_run.evaluate().n_tokens == 200


# ---- intervening


def test_a_run_steers_its_models_by_multiples_of_the_largest_activation(text_run):
    table, lm = text_run.table(), text_run.language_models[1]
    latent = int(table["firings"].idxmax())
    vector_D = 1.5 * float(table["max_activation"][latent]) * text_run.model.W_dec_LXoDo[latent, 1, 0].detach()
    ids = torch.tensor([[1, 5, 9, 12]])
    handle = lm.model.model.layers[1].register_forward_hook(lambda module, args, out: out + vector_D)
    expected = lm.model(ids).logits
    handle.remove()
    for models in ("two", 1, [lm], lm.model, None):
        with text_run.steer({latent: 1.5}, models=models):
            found = lm.model(ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    for wrong, message in (
        (lambda: text_run.steer({0: 1.0}, models="three"), "models: 'three' is not one of this run's: one, two"),
        (lambda: text_run.steer({32: 1.0}), "latent = 32: must be between 0 and 31"),
        (lambda: text_run.steer({0: float("nan")}), "strength = nan of latent 0: must be a finite number"),
        (lambda: text_run.ablate([1.5]), "latent = 1.5: must be between 0 and 31"),
        (lambda: text_run.ablate([0], positions=True), "positions = True: must be all"),
        (lambda: text_run.ablate([0], positions=-1), "positions = -1: must be all, prompt, generated, or a number"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()


def test_the_command_shows_what_a_latent_does_beside_a_random_direction(text_run, capsys):
    latent = int(text_run.table()["firings"].idxmax())
    base = ["steer", str(text_run.path), "--latent", str(latent), "--prompt", "w1 w2", "--n-tokens", "4"]
    assert main([*base, "--strength", "20", "--models", "two"]) == 0
    out = capsys.readouterr().out
    found = text_run.compare_steered("w1 w2", {latent: 20.0}, models="two", n_tokens=4)
    assert list(found) == ["two"] and "== two" in out and "== one" not in out
    steered = found["two"]
    changes = [abs(after - before) for _, before, after in steered.changed.tokens]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0
    assert steered.changed.tokens != steered.random.tokens
    assert f"-- latent {latent} x 20\n{steered.changed.continuations[0]}" in out
    assert "-- random direction, equal norm" in out

    assert main([*base, "--strength", "0"]) == 0
    assert capsys.readouterr().out.count("\nunchanged") == 4
    none = text_run.compare_steered("w1 w2", {latent: 0.0}, samples=3, seed=1)
    assert all(len(one.plain) == 3 and one.plain == one.changed.continuations for one in none.values())
    assert main([*base, "--ablate"]) == 0
    assert f"latent {latent} taken out" in capsys.readouterr().out
    assert main([*base[:2], "--latent", "99", *base[4:]]) == 2
    assert "latent = 99: must be between 0 and 31" in capsys.readouterr().err
    assert main([*base, "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_what_a_models_latents_close_is_measured_and_kept(text_run, capsys):
    named = text_run.closes([1, 2], "one", "two", n_tokens=50, n_random=2)
    assert named.latents == [1, 2] and len(named.random_shares) == 2
    usual = text_run.closes(n_tokens=50)
    relative = text_run.table().query("firings >= 20")["relative_norm_two"]
    assert usual.latents and (relative[usual.latents] > 0.5).all()
    other_way = text_run.closes(model_a="two", model_b="one", n_tokens=50)
    assert other_way.latents and (relative[other_way.latents] < 0.5).all()
    assert main(["evaluate", str(text_run.path), "--closes"]) == 0
    shown = json.loads(capsys.readouterr().out)["closes"]
    assert shown == json.loads((text_run.path / "evaluation.json").read_text())["closes"]
    assert shown["latents"] == usual.latents and shown["kl"] > 0


def test_a_report_says_how_often_latents_fire_on_what_each_model_writes(text_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(["report", str(text_run.path), "--own-text", "64", "--csv", str(tmp_path / "t.csv")]) == 0
    header, *rows = (tmp_path / "t.csv").read_text().splitlines()
    assert {"density_on_text_of_one", "density_on_text_of_two"} < {*header.split(",")}
    at = header.split(",").index("density_on_text_of_two")
    assert any(float(row.split(",")[at]) > 0 for row in rows) and "of what two writes." in rows[0] + rows[-1]


def test_one_model_alone_has_nothing_to_close(acts, train, capsys):
    run = train(acts)
    assert main(["evaluate", str(run.path), "--closes"]) == 2
    assert "closes: needs a crosscoder between two language models" in capsys.readouterr().err


def test_what_closes_on_answers_is_said_where_there_are_chats(tiny_config, save_tiny_lm, tmp_path):
    from transformers import AutoTokenizer

    for seed, name in enumerate(("one", "two")):
        save_tiny_lm(tmp_path / name, seed)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        tokenizer.chat_template = "{% for m in messages %}w50 {{ m['content'] }} w51 {% endfor %}"
        tokenizer.save_pretrained(tmp_path / name)
    generator = torch.Generator().manual_seed(0)

    def words(n):
        return " ".join(f"w{i}" for i in torch.randint(45, (n,), generator=generator).tolist())

    chats = [[{"role": "user", "content": words(4)}, {"role": "assistant", "content": words(6)}] for _ in range(150)]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    tiny_config["language_models"] = [{"path": str(tmp_path / name)} for name in ("one", "two")]
    tiny_config["data"]["source"] = {"type": "local", "path": str(tmp_path / "chats.jsonl"), "column": "messages"}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tiny_config))
    run = crosscode.train(str(tmp_path / "my.yaml"), progress=False)
    found = run.closes([1, 2], n_random=1)
    assert found.answers is not None and found.answers.answers is None
    assert 0 < found.answers.n_tokens < 0.7 * found.n_tokens
    assert found.answers.kl != pytest.approx(found.kl)
    steered = run.compare_steered([{"role": "user", "content": "w1"}], {1: 0.0}, n_tokens=2)
    assert set(steered) == {"one", "two"}


def test_a_run_starts_from_the_path_of_another(acts, train):
    first = train(acts)
    second = train(acts, name="second", finetune_from=first.path)
    assert second.config.finetune_from == str(first.path) and second.summary["loss"] < first.summary["loss"]
