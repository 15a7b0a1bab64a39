"""What earlier versions wrote is read: `tests/fixtures/vN` holds what has format N of a run, a trained model and a store, as the
command line of that time left them (the newest checkpoint of the run taken out, so that there is something to resume).
"""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from crosscode import formats
from crosscode.build.resume import ResumePoint
from crosscode.build.schema import load_config
from crosscode.checksums import find_damage, write_checksums
from crosscode.commands.cli import main
from crosscode.data.store.reader import ActivationCache
from crosscode.errors import InputError
from crosscode.formats import MODEL, RUN, STATE, STORE, Format, today
from crosscode.models.base import BaseCrosscoder
from crosscode.runs.checkpoints import Checkpoints
from crosscode.runs.directory import RunDirectory
from crosscode.runs.state import read_state

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir())
NOISE = ("time/", "memory/", "tokens_per_s", "elapsed_s")


@pytest.fixture(params=[name for name in VERSIONS if (FIXTURES / name / "run").is_dir()])
def old(request, tmp_path):
    """A copy of what a version wrote."""
    torch.set_num_threads(1)
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param))


def trains(command, capsys):
    """Training ends well; skipped where the text of the fixtures is not at hand."""
    code, said = main(["train", *command]), capsys.readouterr().err
    if code == 2 and re.search(r"tokens\.dataset (was|is) ", said):
        pytest.skip("the fixtures were trained on the standard library of Python 3.11.7; this is another")
    assert code == 0, said


def rows(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(NOISE)} for row in lines]


def test_every_version_that_is_written_has_fixtures():
    assert max(kind.version for kind in (MODEL, STATE, STORE, RUN)) <= max(int(name[1:]) for name in VERSIONS)


# ---- what was written


def test_an_old_run_goes_on_as_it_would_have(old, capsys):
    run = old / "run"
    expected, trained = rows(run), BaseCrosscoder.load(run / "final")
    assert RunDirectory(run).steps() == [4]
    trains(["--resume", str(run)], capsys)
    for row, row_expected in zip(rows(run), expected, strict=True):
        # A BatchTopK is evaluated by another threshold now, which resuming says.
        trained_on = {name: value for name, value in row.items() if not name.startswith("eval/")}
        assert trained_on == pytest.approx(
            {name: row_expected[name] for name in trained_on if name in row_expected}, rel=1e-4, abs=1e-6
        )
    again = BaseCrosscoder.load(run / "final")
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, trained.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert find_damage(run / "checkpoints" / "step_6") is None


def test_an_old_model_is_evaluated_as_then(old, capsys):
    expected = json.loads((old / "run" / "evaluation.json").read_text())
    # Then whole batches were taken, so more tokens than the config asks for.
    assert main(["evaluate", str(old / "run"), "--n-tokens", str(expected["n_tokens"])]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("fvu", "l0", "dead_fraction", "n_tokens", "l0_train_mode"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    for position, figures in found["loss_recovered"].items():
        assert figures["ce_spliced"] == pytest.approx(expected["loss_recovered"][position]["ce_spliced"], rel=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_an_old_store_is_read_by_a_run(version, old, tmp_path, capsys):
    folder = shutil.copytree(FIXTURES / version / "store", tmp_path / "store")
    store = ActivationCache(folder)
    assert (store.labels() is None) == (version == "v1")
    assert (store.n_rows, store.dims) == (124, (1, 1, 192))
    command = [str(old / "run"), "--run_dir", str(tmp_path / "new"), "--train.n_tokens", "64"]
    trains([*command, "--data.stores", json.dumps([str(folder)]), "--evaluation.loss_recovered=never"], capsys)
    assert RunDirectory(tmp_path / "new").read_summary()["tokens"] == 64


# ---- fields that came later


def as_written_without(run, *fields):
    """The newest checkpoint as if it were from before these fields of the config were there."""
    folder = run / "checkpoints" / "step_4"
    saved = json.loads((folder / "config.json").read_text())
    for path in fields:
        *parents, name = path.split(".")
        values = saved["metadata"]["config"]
        for parent in parents:
            values = values[parent]
        del values[name]
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "checksums.json").unlink()
    write_checksums(folder)


LATER = (
    "data.token_workers",
    "train.precision",
    "train.optimizer.betas",
    "data.pack",
    "crosscoder.linear_skip",
    "seed",
)


def test_a_field_that_a_checkpoint_lacks_means_its_default(old, caplog):
    as_written_without(old / "run", *LATER)
    with caplog.at_level(logging.INFO, logger="crosscode"):
        assert ResumePoint.find(old / "run").step == 4
    assert "was" not in caplog.text


@pytest.mark.parametrize(("field", "value"), [("seed", 3), ("data.pack", False), ("crosscoder.linear_skip", True)])
def test_another_value_than_that_default_is_a_change(field, value, old):
    as_written_without(old / "run", *LATER)
    config = yaml.safe_load((old / "run" / "config.yaml").read_text())
    values = config
    *parents, name = field.split(".")
    for parent in parents:
        values = values[parent]
    values[name] = value
    (old / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=f"resume: {field} was .* and is {value}"):
        ResumePoint.find(old / "run")


def test_a_state_without_a_version_is_one_of_the_first(old):
    folder = RunDirectory(old / "run").checkpoint(4)
    assert "format_version" not in (folder / "trainer_state.json").read_text()
    assert read_state(folder)["format_version"] == 1


# ---- versions

TOY = Format(
    "toy", 3, "v", defaults={"new": 5}, steps={1: lambda c: c | {"b": c["a"] + 1}, 2: lambda c: c | {"b": -c["b"]}}
)


def test_content_is_brought_forward_version_by_version():
    assert TOY.read({"v": 1, "a": 1}, "file") == {"v": 3, "a": 1, "b": -2, "new": 5}
    assert TOY.read({"v": 2, "b": 7}, "file") == {"v": 3, "b": -7, "new": 5}
    assert TOY.read({"v": 3, "new": 6}, "file") == {"v": 3, "new": 6}


@pytest.mark.parametrize("version", [0, 4, None, "3", [1]])
def test_any_other_version_is_refused_and_those_that_are_read_are_named(version):
    with pytest.raises(InputError, match=r"file: v = .*: this version reads a toy of version 1, 2, 3"):
        TOY.read({"v": version}, "file")


def test_a_later_state_is_refused(old):
    folder = RunDirectory(old / "run").checkpoint(4)
    text = (folder / "trainer_state.json").read_text()
    (folder / "trainer_state.json").write_text(
        json.dumps({"__items__": [["format_version", 99], *json.loads(text)["__items__"]]})
    )
    with pytest.raises(InputError, match=r"trainer_state.json: format_version = 99"):
        read_state(folder)


def test_a_later_run_directory_is_refused(tmp_path, old, capsys):
    config = yaml.safe_load((old / "run" / "config.yaml").read_text())
    run = tmp_path / "later"
    run.mkdir()
    (run / ".crosscode").write_text(json.dumps({"kind": "run", "format": 99}))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config | {"run_dir": str(run)}))
    assert main(["train", str(tmp_path / "c.yaml")]) == 2
    assert "format = 99: this version reads a run directory of version 1" in capsys.readouterr().err
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for words in (["evaluate", str(run)], ["report", str(run)], ["train", "--resume", str(run)]):
        assert main(words) == 2
        assert "format = 99: this version reads a run directory of version 1" in capsys.readouterr().err


# ---- earlier spellings


@pytest.fixture
def renamed(monkeypatch):
    formats._warn_once.cache_clear()
    monkeypatch.setattr(
        formats, "RENAMED", {"train.steps_per_row": "train.log_every", "length": "data.sequence_length"}
    )


def test_earlier_spellings_are_read_with_one_warning(renamed, old, caplog):
    path = old / "run" / "config.yaml"
    expected = load_config(path)
    values = yaml.safe_load(path.read_text())
    values["train"]["steps_per_row"] = values["train"].pop("log_every")
    values["length"] = values["data"].pop("sequence_length")
    path.write_text(yaml.safe_dump(values))
    with caplog.at_level(logging.WARNING, logger="crosscode"):
        assert load_config(path) == load_config(path) == expected
    (record,) = caplog.records
    assert "train.steps_per_row is train.log_every now, length is data.sequence_length now" in record.getMessage()
    assert ResumePoint.find(old / "run").step == 4


def test_both_spellings_are_one_too_many(renamed):
    with pytest.raises(InputError, match=r"file: train.steps_per_row is the earlier spelling of train.log_every"):
        today({"train": {"steps_per_row": 1, "log_every": 1}}, "file")


def test_a_field_that_is_gone_is_passed_over_where_it_said_nothing(monkeypatch):
    monkeypatch.setattr(formats, "GONE", {"a.b": {}})
    assert today({"a": {"b": {}, "c": 1}}, "file") == {"a": {"c": 1}}
    assert today({"a": {"b": {"x": 1}}}, "file") == {"a": {"b": {"x": 1}}}  # and is refused where fields are checked
    assert today({"a": None}, "file") == {"a": None}


def test_a_checkpoint_of_an_old_run_is_whole(old):
    assert Checkpoints(RunDirectory(old / "run")).newest_whole() == 4
