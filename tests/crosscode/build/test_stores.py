"""Stores of activations in a config: written ahead, written while training, read instead of harvesting."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from crosscode.build import language_models as build_models
from crosscode.build.experiment import open_experiment
from crosscode.build.resume import ResumePoint
from crosscode.build.run import build_dataloader, build_trainer
from crosscode.build.schema import check_config, dump_config, load_config
from crosscode.commands import cli
from crosscode.commands.harvest import config_of, harvest_config, run_harvest
from crosscode.config.reading import load_yaml
from crosscode.data import ActivationCache, ActivationHarvester
from crosscode.data.store import beginning, reader, writer
from crosscode.errors import InputError


@pytest.fixture
def harvests(monkeypatch):
    """One entry for each batch that language models have run."""
    calls = []
    harvest = ActivationHarvester.harvest
    monkeypatch.setattr(ActivationHarvester, "harvest", lambda self, *args: calls.append(1) or harvest(self, *args))
    return calls


@pytest.fixture
def with_data(tiny_config):
    """`with_data(cache=..., **changes)`: values of the config with other fields of `data`."""
    return lambda **changes: {**tiny_config, "data": {**tiny_config["data"], **changes}}


@pytest.fixture
def harvest(with_data, tmp_path):
    """`harvest(name, n_tokens=..., **data)` writes a store and returns its folder."""

    def run(name="store", n_tokens=None, **data):
        path = str(tmp_path / name)
        values = with_data(cache={"path": path, **data.pop("cache", {})}, **data)
        run_harvest(harvest_config(values), n_tokens, progress=False)
        return path

    return run


def share_found(rows_RE, known_RE):
    """Share of the rows that are among the known ones, bit for bit."""
    known = {row.numpy().tobytes() for row in known_RE}
    return sum(row.numpy().tobytes() in known for row in rows_RE) / len(rows_RE)


def metrics_of(config):
    lines = (config.run_path() / "metrics.jsonl").read_text().splitlines()
    return [{key: row[key] for key in ("step", "loss", "fvu") if key in row} for row in map(json.loads, lines)]


def train(values):
    config = check_config(values)
    build_trainer(open_experiment(config), progress=False).train()
    return metrics_of(config)


def stop_after_six_steps(values):
    trainer = build_trainer(open_experiment(check_config(values)), progress=False)
    batches = iter(trainer.data)
    with trainer.run.held():
        trainer.open()
        trainer.start()
        for _ in range(6):
            trainer.train_step(next(batches))
        trainer.save_and_close()


def resumed(values):
    config = check_config(values)
    build_trainer(open_experiment(config), resume=ResumePoint.find(config.run_path()), progress=False).train()
    return metrics_of(config)


def test_a_run_reads_a_store_that_was_written_ahead(harvest, with_data, harvests):
    path = harvest()
    harvests.clear()
    config = check_config(with_data(stores=[path]))
    data = build_dataloader(open_experiment(config))
    rows = sum(batch.shape[0] for batch, _ in zip(data, range(5), strict=False))
    assert rows == 5 * config.train.batch_size
    assert not harvests
    torch.testing.assert_close(data.scaling_MP, ActivationCache(path).scaling_MP())


@pytest.mark.parametrize("kind", ["stores", "cache"])
def test_a_run_looks_through_a_store_once_before_it_reads(harvest, with_data, monkeypatch, kind):
    looked = []
    for module in (reader, writer, beginning):
        look = module.list_shards
        monkeypatch.setattr(module, "list_shards", lambda *args, look=look: looked.append(args[0]) or look(*args))
    path = harvest()
    values = with_data(stores=[path]) if kind == "stores" else with_data(cache={"path": path})
    looked.clear()
    build_dataloader(open_experiment(check_config(values)))
    assert looked == [Path(path)]


def test_the_shuffle_buffer_of_a_store_is_its_window(harvest, with_data):
    """Rows of a store wait once, in the dtype on disk, and no checkpoint holds them."""
    data = build_dataloader(open_experiment(check_config(with_data(stores=[harvest()], shuffle_buffer_size=128))))
    assert (data.rows.rows.window, data.shuffle_buffer_size) == (128, 0)
    next(iter(data))
    assert data.state_dict()["buffer"]["rows_NE"].shape[0] == 0


def test_training_text_of_a_store_is_what_a_harvest_trains_on_and_never_held_out(harvest, with_data):
    stored = ActivationCache(harvest())
    experiment = open_experiment(check_config(with_data()))
    rows_RE = stored.read_rows(torch.arange(stored.n_rows)).flatten(1)
    heldout_RE = torch.cat(list(experiment.heldout_activations(10_000))).flatten(1)
    assert len(heldout_RE) > 100
    # The first words of different sentences may agree, and with them the first activations.
    assert share_found(heldout_RE, rows_RE) < 0.15
    live = build_dataloader(open_experiment(check_config(with_data(shuffle_buffer_size=0, scale=False))))
    assert share_found(next(iter(live)).flatten(1), rows_RE) == 1


def test_a_run_keeps_what_it_harvests_and_the_next_run_harvests_only_what_is_missing(with_data, tmp_path, harvests):
    cache = {"path": str(tmp_path / "cache"), "dtype": "bfloat16"}
    values = {**with_data(cache=cache), "evaluation": {"n_tokens": 64, "loss_recovered": "never"}}
    first = train(values)
    n_first = len(harvests)
    harvests.clear()
    second = train({**values, "run_dir": str(tmp_path / "again")})
    assert first == second
    assert len(harvests) < n_first / 2
    assert ActivationCache(tmp_path / "cache").n_rows >= 640


def test_a_cached_run_trains_on_the_same_values_as_a_plain_one(with_data, tmp_path):
    plain = build_dataloader(open_experiment(check_config(with_data())))
    cached = build_dataloader(open_experiment(check_config(with_data(cache={"path": str(tmp_path / "cache")}))))
    for one, two, _ in zip(plain, cached, range(8), strict=False):
        assert torch.equal(one, two)
    assert torch.equal(plain.scaling_MP, cached.scaling_MP)
    cached.close()


def test_stores_of_the_parts_of_a_mixture_are_mixed_by_weight(harvest, with_data, tiny_corpus, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2} w{i + 3}"}) for i in range(40)))
    sources = [{"type": "local", "path": tiny_corpus}, {"type": "local", "path": str(other)}]
    paths = [harvest(f"part{i}", source=source) for i, source in enumerate(sources)]
    mixture = {"type": "mixture", "parts": [{"source": source} for source in sources]}
    stores = [{"path": paths[0], "weight": 3}, {"path": paths[1], "weight": 1}]
    config = check_config(with_data(source=mixture, stores=stores, scale=False))
    data = build_dataloader(open_experiment(config))
    rows_RE = torch.cat([batch for batch, _ in zip(data, range(20), strict=False)]).flatten(1)
    first = ActivationCache(paths[0])
    known_RE = first.read_rows(torch.arange(first.n_rows)).flatten(1)
    assert 0.70 < share_found(rows_RE, known_RE) < 0.80
    with pytest.raises(InputError, match=r"data.stores.1: store '.*part1' holds other data: tokens.dataset is '"):
        open_experiment(check_config(with_data(source=sources[0], stores=stores)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hookpoints": ["blocks.0.hook_resid_post"]},
            r"hookpoints is \['blocks.1.hook_resid_post'\] in the store and",
        ),
        ({"data": {"sequence_length": 12}}, "tokens.sequence_length is 16 in the store and 12 in this run"),
        ({"data": {"keep_first_position": True}}, "tokens.keep_first_position is False in the store and True in this"),
        ({"data": {"validation_fraction": 0.3}}, "tokens.validation_fraction is 0.2 in the store and 0.3 in this run"),
        ({"data": {"bos": "document"}}, "tokens.bos is 'sequence' in the store and 'document' in this run"),
        ({"data": {"source": {"type": "demo"}}}, "tokens.dataset is '.*' in the store and '.*' in this run"),
        ({"language_models": 1}, r"models is \['.*one', '.*two'\] in the store and \['.*one'\] in this run"),
    ],
)
@pytest.mark.parametrize("kind", ["stores", "cache"])
def test_a_store_of_something_else_is_refused_before_a_model_is_loaded(
    harvest, with_data, monkeypatch, change, message, kind
):
    path = harvest(n_tokens=100)
    values = with_data(**(change.get("data", {})), **{kind: [path] if kind == "stores" else {"path": path}})
    values |= {key: value for key, value in change.items() if key == "hookpoints"}
    if "language_models" in change:
        values |= {"language_models": values["language_models"][: change["language_models"]]}
    loaded = []
    monkeypatch.setattr(build_models, "load_language_model", lambda *args, **kwargs: loaded.append(args))
    with pytest.raises(InputError, match=rf"data.{kind}.*: store '.*' holds other data: {message}"):
        open_experiment(check_config(values))
    assert not loaded


def test_models_with_other_weights_are_refused(harvest, with_data, tiny_lms):
    values = with_data(stores=[harvest(n_tokens=100)])
    swapped = {**values, "language_models": [{"path": path} for path in reversed(tiny_lms)]}
    with pytest.raises(
        InputError, match=r"models.0.weights is '.*' in the store and '.*' in this run \(models '.*one'"
    ):
        build_dataloader(open_experiment(check_config(swapped)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"cache": {"path": "a"}, "stores": ["b"]},
            "data: cache.path = 'a' is written and stores .* give one of the two",
        ),
        ({"stores": [{"path": "a", "weight": 1}, "b"]}, "data: stores: give a weight to each of them, or to none"),
        ({"stores": ["nowhere"]}, "data.stores.0: store 'nowhere': no such store"),
        ({"cache": {"path": "a", "dtype": "int4"}}, "data.cache.dtype = 'int4': input should be"),
        ({"stores": [{"path": "a", "weight": 0}]}, "data.stores.0.weight = 0: input should be greater than 0"),
    ],
)
def test_contradictions_are_refused(with_data, data, message):
    with pytest.raises(InputError, match=message):
        open_experiment(check_config(with_data(**data)))


def test_a_file_in_place_of_a_store_and_a_store_in_use_are_refused(with_data, harvest, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"data.cache: store '.*inner': '.*file' is a file, not a folder"):
        open_experiment(check_config(with_data(cache={"path": str(tmp_path / "file" / "inner")})))
    values = with_data(cache={"path": harvest(n_tokens=100)})
    data = build_dataloader(open_experiment(check_config(values)))
    next(iter(data))
    with pytest.raises(InputError, match=r"data.cache: store '.*' is being written by another process"):
        open_experiment(check_config(values))
    data.close()
    open_experiment(check_config(values))


def test_a_run_is_evaluated_and_reported_without_its_store(harvest, with_data, tmp_path, capsys):
    path = harvest()
    config = check_config(with_data(stores=[path]))
    build_trainer(open_experiment(config), progress=False).train()
    shutil.rmtree(path)
    assert cli.main(["evaluate", str(config.run_path())]) == 0
    assert json.loads(capsys.readouterr().out)["fvu"] > 0


def test_a_resumed_run_goes_on_in_a_store_that_has_grown(harvest, with_data, tmp_path):
    path = harvest(n_tokens=300)
    values = with_data(stores=[path]) | {"evaluation": {"n_tokens": 64, "loss_recovered": "never"}}
    whole = train({**values, "run_dir": str(tmp_path / "whole")})
    stopped = {**values, "run_dir": str(tmp_path / "stopped")}
    stop_after_six_steps(stopped)
    harvest(n_tokens=500)
    assert ActivationCache(path).n_rows >= 500
    assert resumed(stopped) == whole


def test_harvest_from_the_command_line_continues_and_reports(tiny_config, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_config(check_config(tiny_config)))
    store = str(tmp_path / "store")
    arguments = ["harvest", str(recipe), "--store", store, "--data.cache.dtype", "int8"]
    assert cli.main([*arguments, "--n-tokens", "200"]) == 0
    n_rows = ActivationCache(store).n_rows
    assert 200 <= n_rows < 300
    assert cli.main(arguments) == 0
    whole = ActivationCache(store)
    assert whole.n_rows > n_rows
    out = capsys.readouterr().out
    assert f"activations {whole.n_rows} of 2 x 1 x 16, int8" in out
    assert "one/blocks.1.hook_resid_post" in out


def test_harvest_takes_options_alone_and_names_what_is_missing(tiny_lms, tiny_corpus, tmp_path, capsys):
    store = str(tmp_path / "store")
    options = ["--language_models", json.dumps([{"path": tiny_lms[0]}]), "--hookpoints", '["blocks.1.hook_resid_post"]']
    options += ["--data.source.type", "local", "--data.source.path", tiny_corpus, "--data.sequence_length", "16"]
    assert cli.main(["harvest", *options]) == cli.EXIT_BAD_INPUT
    assert "data.cache: no store to write is given; name its folder with --store DIR" in capsys.readouterr().err
    assert cli.main(["harvest", "--store", store, *options]) == 0
    assert ActivationCache(store).dims == (1, 1, 16)
    assert cli.main(["harvest", "--store", store, "--n-tokens", "many"]) == cli.EXIT_BAD_INPUT
    assert "harvest: --n-tokens = 'many': input should be an integer" in capsys.readouterr().err
    assert cli.main(["harvest", "--store", store]) == cli.EXIT_BAD_INPUT
    assert "language_models: required, but not given" in capsys.readouterr().err


def test_a_store_beside_the_run_is_found_from_any_folder(harvest, with_data, monkeypatch, tmp_path):
    harvest("near")
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(check_config(with_data(stores=["near"], cache=None))))
    monkeypatch.chdir("/")
    assert load_config(saved).data.stores[0].path == str(tmp_path / "near")


def test_models_in_memory_stand_in_for_paths(with_data, tiny_lms, tmp_path):
    from crosscode.data import load_language_model

    models = [load_language_model(path, dtype="bfloat16") for path in tiny_lms]
    named = [{"path": "mine"}, {"path": "yours"}]
    config = check_config({**with_data(cache={"path": str(tmp_path / "cache")}), "language_models": named})
    experiment = open_experiment(config, models)
    assert experiment.harvester.models == models
    next(iter(build_dataloader(experiment)))
    with pytest.raises(InputError, match="models: 1 were given, but language_models names 2"):
        open_experiment(config, models[:1])


def test_the_same_text_to_train_and_to_evaluate_on_is_refused(with_data, tiny_corpus):
    same = {"type": "local", "path": tiny_corpus}
    with pytest.raises(InputError, match=r"data.heldout: the same text as data.source"):
        open_experiment(check_config(with_data(heldout=same)))
    mixture = {"type": "mixture", "parts": [{"source": same}, {"source": {"type": "demo"}}]}
    with pytest.raises(InputError, match=r"data.heldout: the same text as a part of data.source"):
        open_experiment(check_config(with_data(source=mixture, heldout=same)))


def test_text_that_leaves_nothing_to_evaluate_on_is_refused_at_once(with_data, tiny_corpus, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    one = {"type": "local", "path": str(tmp_path / "one.jsonl")}
    with pytest.raises(InputError, match=r"validation_fraction = 0.2: no document of the 1 in data.source is left"):
        open_experiment(check_config(with_data(source=one)))
    with pytest.raises(InputError, match=r"data.source: .*one.jsonl' has 4 usable tokens, less than one batch"):
        open_experiment(check_config(with_data(source=one, heldout={"type": "local", "path": tiny_corpus})))


@pytest.mark.parametrize("field", ["stores", "cache"])
def test_a_store_inside_a_run_that_is_replaced_is_not_deleted(field, harvest, with_data):
    train(with_data())
    path = harvest("run/store")
    given = {"stores": [path]} if field == "stores" else {"cache": {"path": path}}
    with pytest.raises(InputError, match=r"is inside the run directory .*; put the store beside it"):
        train({**with_data(**given), "overwrite": True})
    assert ActivationCache(path).n_rows > 0


def test_a_store_with_no_room_for_a_harvest_says_so(harvest):
    with pytest.raises(InputError, match=r"data.cache.max_gb = 1e-06: too small for the activations of one harvest"):
        harvest(cache={"max_gb": 1e-6})


def test_a_manifest_of_another_store_is_noticed_before_training(harvest, with_data):
    path, other = harvest(), harvest("other", keep_first_position=True)
    shutil.copy(f"{other}/manifest.json", f"{path}/manifest.json")
    with pytest.raises(InputError, match=r"data.stores.0: .* was written for another manifest"):
        open_experiment(check_config(with_data(stores=[path], keep_first_position=True)))


def test_a_streaming_run_that_evaluates_continues_exactly(with_data, tmp_path):
    """Evaluation reads the same stream as training in between, and must not move its position."""
    lines = [json.dumps({"text": f"w{i % 50} w{i % 47} w{i % 43} w{i % 41} w{i // 40}"}) for i in range(1200)]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    source = {"type": "local", "path": str(tmp_path / "long.jsonl"), "streaming": True}
    values = with_data(source=source, n_tokens_for_norm_estimate=32)
    values["train"] = {**values["train"], "n_tokens": 3200, "checkpoint_every": 10, "keep_last": 10, "log_every": 1}
    values["evaluation"] = {"n_tokens": 100, "every": 4}
    whole = train(values)
    config = check_config(values)
    for step in (20, 30, 40, 50):
        if step > 20:
            shutil.rmtree(config.run_path() / "checkpoints" / f"step_{step}", ignore_errors=True)
    point = ResumePoint.find(config.run_path())
    assert point.step == 20
    build_trainer(open_experiment(point.config), resume=point, progress=False).train()
    assert metrics_of(config) == whole


@pytest.fixture(scope="module")
def chat_lm(tiny_lms, tmp_path_factory):
    """The first tiny model, with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "one"
    shutil.copytree(tiny_lms[0], folder)
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


KINDS = ["jsonl", "parquet", "arrow", "saved", "token ids", "chat kept", "chat masked"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_text_reaches_a_store_through_the_config(kind, with_data, chat_lm, tmp_path):
    import datasets

    texts = [f"w{i} w{i + 1} w{i + 2} w{i + 3}" for i in range(20)]
    rows = {
        "text": texts,
        "ids": [[5 + i, 6 + i, 7 + i, 8 + i] for i in range(20)],
        "messages": [[{"role": "w1", "content": text}] for text in texts],
    }
    data = datasets.Dataset.from_dict(rows)
    path = tmp_path / f"text.{kind if kind in ('jsonl', 'parquet') else 'jsonl'}"
    if kind == "parquet":
        data.to_parquet(path)
    elif kind in ("saved", "arrow"):
        path = tmp_path / "saved"
        data.save_to_disk(path)
        path = next(path.glob("*.arrow")) if kind == "arrow" else path
    else:
        data.to_json(path)
    column = {"token ids": "ids", "chat kept": "messages", "chat masked": "messages"}.get(kind, "text")
    source = {"type": "local", "path": str(path), "column": column}
    template_tokens = "mask" if kind == "chat masked" else "keep"
    values = with_data(source=source, template_tokens=template_tokens, cache={"path": str(tmp_path / "store")})
    store = run_harvest(harvest_config({**values, "language_models": [{"path": chat_lm}]}), progress=False)
    n_of_document = {"chat kept": 5}.get(kind, 4)
    # Documents end with a separator each, which is used; a share of them is held out.
    n_separators = store.n_rows - store.n_rows // (n_of_document + 1) * n_of_document
    assert store.n_rows == n_separators * (n_of_document + 1)
    assert 10 <= n_separators < 20
    assert store.manifest["tokens"]["template_tokens"] == template_tokens


@pytest.mark.parametrize("kind", ["harvested", "cache", "stores", "blocks of stores"])
def test_a_position_continues_exactly_through_everything_at_once(kind, with_data, harvest, tiny_corpus, tmp_path):
    """A mixture, two epochs, workers that tokenize, prefetch, and where the activations come from."""
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"text": f"w{i} w{i + 1} w{i + 2} w{i + 3}"}) for i in range(25)))
    parts = [
        {"source": {"type": "local", "path": path}, "weight": i + 1} for i, path in enumerate((tiny_corpus, str(other)))
    ]
    options = {
        "source": {"type": "mixture", "parts": parts, "stop": "all"},
        "epochs": 2,
        "prefetch": 2,
        "token_workers": 2,
    }
    options["shuffle_buffer_size"] = 128
    if kind == "cache":
        options["cache"] = {"path": str(tmp_path / "cache"), "dtype": "int8", "shard_mb": 1}
    if "stores" in kind:
        paths = [harvest(f"part{i}", source=part["source"]) for i, part in enumerate(parts)]
        options["stores"] = [{"path": path, "weight": 2 - i} for i, path in enumerate(paths)]
        options["store_read_block"] = 5 if "blocks" in kind else 1
    experiment = open_experiment(check_config(with_data(**options)))

    def batches_from(state=None, n=None):
        data = build_dataloader(experiment)
        if state is not None:
            data.load_state_dict(state)
        batches, states = [], []
        for batch in data:
            batches.append(batch)
            states.append(data.state_dict())
            if len(batches) == n:
                break
        data.close()
        return batches, states

    whole, states = batches_from()
    assert len(whole) >= 10
    for n_done in (1, len(whole) // 2, len(whole) - 1):
        assert all(torch.equal(one, two) for one, two in zip(batches_from(n=n_done)[0], whole, strict=False))
        rest, _ = batches_from(states[n_done - 1])
        assert len(rest) == len(whole) - n_done
        assert all(torch.equal(one, two) for one, two in zip(rest, whole[n_done:], strict=True))


def test_models_that_are_harvested_apart_are_read_as_one(with_data, tmp_path, harvest, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(with_data()))
    for m in (0, 1):
        cli.main(["harvest", str(config), "--models", str(m), "--store", str(tmp_path / f"model{m}")])
    apart = [str(tmp_path / "model0"), str(tmp_path / "model1")]
    joined = build_dataloader(open_experiment(check_config(with_data(join=apart))))
    whole = build_dataloader(open_experiment(check_config(with_data(stores=[harvest("whole")]))))
    for mine, theirs, _ in zip(joined, whole, range(3), strict=False):
        assert torch.equal(mine, theirs)
    assert torch.equal(joined.scaling_MP, whole.scaling_MP)
    config = check_config(with_data(join=apart))
    assert load_yaml(dump_config(config), "x")["data"]["join"] == apart
    with pytest.raises(
        InputError,
        match=r"data.join: the join of .* and .* holds other data: models.0.weights .* in another order than",
    ):
        build_dataloader(open_experiment(check_config(with_data(join=apart[::-1]))))
    with pytest.raises(InputError, match=r"data.join.1 = '': must not be empty"):
        check_config(with_data(join=[apart[0], ""]))
    with pytest.raises(InputError, match="stores is given as well: give one of them"):
        check_config(with_data(join=apart, stores=apart))
    with pytest.raises(InputError, match="models = 2: must be below 2, the number of language_models"):
        config_of(harvest_config(with_data(cache={"path": "x"})), [2])


def test_a_run_on_joined_stores_goes_on_to_the_bit(with_data, tmp_path, tiny_lms):
    values = with_data(cache={"path": str(tmp_path / "a")})
    run_harvest(harvest_config(values), models=[0], progress=False)
    run_harvest(harvest_config(with_data(cache={"path": str(tmp_path / "b")})), models=[1], progress=False)
    values = with_data(join=[str(tmp_path / "a"), str(tmp_path / "b")])
    values |= {"evaluation": {"n_tokens": 64, "loss_recovered": "never"}}
    whole = train({**values, "run_dir": str(tmp_path / "whole")})
    stopped = {**values, "run_dir": str(tmp_path / "stopped")}
    stop_after_six_steps(stopped)
    assert resumed(stopped) == whole
