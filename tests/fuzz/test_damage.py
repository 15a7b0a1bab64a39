"""Damaged runs, stores and configs, by fixed seeds: one line or the same figures as before, never a traceback, never another
figure without a word.
"""

import json
import logging
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import crosscode
from crosscode.commands.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from damage import ODD, damage_file

SECTION = {"type": "sae", "n_latents": 16, "activation": {"type": "batch_topk", "k": 2}}


class Said(logging.Handler):
    """Warnings of ours."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def said():
    handler = Said()
    logging.getLogger("crosscode").addHandler(handler)
    yield handler.lines
    logging.getLogger("crosscode").removeHandler(handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run, and one that can be resumed from step 6 of 8."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    np.save(folder / "acts.npy", np.random.default_rng(0).standard_normal((400, 8)).astype("float32"))
    options = {"n_tokens": 512, "batch_size": 64, "device": "cpu", "progress": False, "checkpoint_every": 3}
    run = crosscode.train(folder / "acts.npy", SECTION, run_dir=folder / "run", log_every=2, **options)
    shutil.copytree(run.path, folder / "stopped")
    shutil.rmtree(folder / "stopped" / "final")
    shutil.rmtree(folder / "stopped" / "checkpoints" / "step_8")
    (folder / "stopped" / "summary.json").unlink()
    return folder


@pytest.fixture(scope="module")
def model_bytes(whole):
    return (whole / "run" / "final" / "model.safetensors").read_bytes()


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")


def attempts(n_some, n_all):
    """The first seeds each time, the others in `make soak`."""
    return [
        pytest.param(range(n_some), id="some"),
        pytest.param(range(n_some, n_all), id="many", marks=pytest.mark.soak),
    ]


def one_line(code, err, what):
    """Bad input and failures are said in one line that is no traceback."""
    assert code in (0, 1, 2), what
    assert "Traceback" not in err, what
    ours = [line for line in err.splitlines() if line.startswith("crosscode: ")]
    assert code == 0 or (len(ours) == 1 and len(ours[0]) < 2000), (what, err)


@pytest.mark.parametrize("seeds", attempts(60, 1500))
def test_a_damaged_run_is_evaluated_as_before_or_not_at_all(seeds, whole, tmp_path, capsys, said):
    expected = json.loads((whole / "run" / "evaluation.json").read_text())
    for seed in seeds:
        rng, run = random.Random(seed), tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole / "run", run)
        file = rng.choice(files_of(run))
        what = (seed, str(file.relative_to(run)), damage_file(file, rng))
        for command in (["verify", str(run)], ["evaluate", str(run)], ["report", str(run)]):
            said.clear()
            code = main(command)
            printed = capsys.readouterr()
            one_line(code, printed.err, (*what, command[0]))
            if command[0] == "evaluate" and code == 0 and not said:
                figures = json.loads(printed.out)
                assert figures["fvu"] == pytest.approx(expected["fvu"], rel=1e-6), what
                assert figures["l0"] == pytest.approx(expected["l0"], rel=1e-6), what


@pytest.mark.parametrize("seeds", attempts(50, 1000))
def test_a_damaged_run_goes_on_to_the_same_model_or_not_at_all(seeds, whole, model_bytes, tmp_path, capsys, said):
    for seed in seeds:
        rng, run = random.Random(seed), tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole / "stopped", run)
        file = rng.choice(files_of(run))
        what = (seed, str(file.relative_to(run)), damage_file(file, rng))
        said.clear()
        code = main(["train", "--resume", str(run)])
        one_line(code, capsys.readouterr().err, what)
        if code == 0 and not said:
            assert (run / "final" / "model.safetensors").read_bytes() == model_bytes, what


@pytest.fixture(scope="module")
def store(whole, tmp_path_factory):
    from crosscode.data.rows import Rows  # noqa: F401
    from crosscode.data.store.format import StoreError  # noqa: F401
    from crosscode.data.store.writer import ActivationCacheWriter

    folder = tmp_path_factory.mktemp("store") / "store"
    manifest = {
        "format": "crosscode-activations", "version": 1, "models": [{"name": "a", "weights": "0", "dtype": "float32"}],
        "tokenizer": "none", "hookpoints": ["h"], "dims": [1, 1, 8], "dtype": "float32", "activation_dtype": "float32",
        "tokens": {"dataset": "d"},
    }  # fmt: skip
    acts = torch.from_numpy(np.load(whole / "acts.npy"))[:, None, None]
    with ActivationCacheWriter(folder, manifest, shard_bytes=2048) as writer:
        for i, part in enumerate(acts.split(50)):
            writer.append(part, {"at": i})
        writer.finish()
    return folder


@pytest.mark.parametrize("seeds", attempts(100, 2000))
def test_a_damaged_store_gives_the_rows_that_were_written_or_is_refused(seeds, whole, store, tmp_path, capsys):
    from crosscode.data.store.reader import ActivationCache
    from crosscode.errors import InputError

    acts = torch.from_numpy(np.load(whole / "acts.npy"))[:, None, None]
    for seed in seeds:
        rng, copy = random.Random(seed), tmp_path / "store"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(store, copy)
        file = rng.choice(files_of(copy))
        what = (seed, file.name, damage_file(file, rng))
        code = main(["verify", str(copy)])
        one_line(code, capsys.readouterr().err, what)
        try:
            opened = ActivationCache(copy)
            rows = opened.read_rows(torch.arange(len(opened)))
        except InputError as error:
            assert len(str(error).splitlines()) == 1, what
            assert code == 1 or not (copy / "manifest.json").exists(), what
        else:
            assert torch.equal(rows, acts[: len(rows)]), what
            assert len(rows) == len(acts) or code == 1, what


@pytest.mark.parametrize("seeds", attempts(100, 2000))
def test_damaged_rollouts_are_as_they_were_written_or_refused(seeds, tmp_path, capsys):
    from crosscode.data.rollouts import RolloutFolder
    from crosscode.errors import InputError

    recipe = {"seed": 0, "sampling": {"temperature": 1.0}, "prompts": "p"}
    folder = RolloutFolder(tmp_path / "whole", recipe)
    folder.path.mkdir()
    folder._begin()
    batches = [["one", "two"], [[{"role": "user", "content": "?"}, {"role": "assistant", "content": "tüv"}]], []]
    for i, batch in enumerate(batches):
        folder._keep(i, batch)
    folder._end(len(batches))
    for seed in seeds:
        rng, copy = random.Random(seed), tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder.path, copy)
        file = rng.choice(files_of(copy))
        what = (seed, file.name, damage_file(file, rng))
        code = main(["verify", str(copy)])
        one_line(code, capsys.readouterr().err, what)
        try:
            found = RolloutFolder(copy, recipe).whole()
        except InputError as error:
            assert len(str(error).splitlines()) == 1, what
        else:  # None: it would be gone on with, or begun
            assert found is None or found == [one for batch in batches for one in batch], what


@pytest.mark.parametrize("seeds", attempts(150, 3000))
def test_an_odd_config_is_one_line_that_names_a_field(seeds, whole, tmp_path, capsys):
    config = yaml.safe_load((whole / "run" / "config.yaml").read_text())
    for seed in seeds:
        rng, changed = random.Random(seed), json.loads(json.dumps(config))
        changed["run_dir"], changed["train"]["n_tokens"] = str(tmp_path / "new"), 64
        path, node = [], changed
        while isinstance(node, (dict, list)) and node and (not path or rng.random() < 0.9):
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            path.append(key)
            parent, node = node, node[key]
        parent[path[-1]] = rng.choice(ODD)
        what = (seed, path, parent[path[-1]])
        if path[-1] in ("run_dir", "name", "tensorboard", "wandb_project", "n_tokens"):
            continue
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(changed))
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        code = main(["train", str(file)])
        one_line(code, capsys.readouterr().err, what)
        assert code != 2 or not (tmp_path / "new").exists(), what


@pytest.fixture(scope="module")
def sweep(whole, tmp_path_factory):
    """Two finished runs of a sweep, and the digests of their models."""
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    config = yaml.safe_load((whole / "run" / "config.yaml").read_text())
    (folder.parent / "config.yaml").write_text(yaml.safe_dump(config | {"run_dir": str(folder)}))
    grid = ["--grid", "train.optimizer.lr=1e-3,2e-3", "--run-dir", str(folder)]
    assert main(["sweep", str(folder.parent / "config.yaml"), *grid]) == 0
    return folder


@pytest.mark.parametrize("seeds", attempts(8, 120))
def test_a_damaged_sweep_goes_on_to_the_same_models_or_not_at_all(seeds, sweep, tmp_path, capsys, said):
    models = {file.relative_to(sweep): file.read_bytes() for file in sweep.glob("*/final/model.safetensors")}
    rows = {row["run"]: row for row in json.loads((sweep / "sweep.json").read_text())}
    capsys.readouterr()
    for seed in seeds:
        rng, copy = random.Random(seed), tmp_path / "sweep"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(sweep, copy)
        file = rng.choice([copy / "sweep.json", rng.choice(files_of(copy))])
        what = (seed, str(file.relative_to(copy)), damage_file(file, rng))
        for command in (["verify", str(copy)], ["report", str(copy)], ["sweep", "--resume", str(copy)]):
            said.clear()
            code = main(command)
            one_line(code, capsys.readouterr().err, (*what, command[0]))
            if command[0] == "sweep" and code == 0 and not said:
                found = {one.relative_to(copy): one.read_bytes() for one in copy.glob("*/final/model.safetensors")}
                assert found == models or file.name == "model.safetensors", what
                for row in json.loads((copy / "sweep.json").read_text()):
                    assert row["fvu"] == pytest.approx(rows[row["run"]]["fvu"], rel=1e-6), what


@pytest.mark.parametrize("seeds", attempts(40, 400))
def test_damaged_stores_that_are_joined_give_the_rows_that_were_written_or_are_refused(seeds, whole, store, tmp_path):
    from crosscode.data.store.joined import JoinedStores
    from crosscode.errors import InputError

    acts = torch.from_numpy(np.load(whole / "acts.npy"))[:, None, None]
    expected = torch.cat([acts, acts], dim=2)
    for seed in seeds:
        rng, copies = random.Random(seed), [tmp_path / "one", tmp_path / "two"]
        for copy in copies:
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(store, copy)
        manifest = json.loads((copies[1] / "manifest.json").read_text())
        (copies[1] / "manifest.json").write_text(json.dumps(manifest | {"hookpoints": ["another"]}))
        file = rng.choice(files_of(rng.choice(copies)))
        what = (seed, file.name, damage_file(file, rng))
        try:
            opened = JoinedStores(copies)
            rows = opened.read_rows(torch.arange(opened.n_rows))
        except InputError as error:
            assert len(str(error).splitlines()) == 1, what
        else:
            assert torch.equal(rows, expected[: len(rows)]), what
