"""Checkpoints: rotation, checksums, damage, a full disk."""

import json
import logging
import resource

import pytest
import torch

from crosscode.checksums import find_damage, write_checksums
from crosscode.errors import InputError
from crosscode.runs.checkpoints import CheckpointNotSaved, Checkpoints
from crosscode.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create("name: x\n")
    return run


def write_some(folder):
    (folder / "a.bin").write_bytes(b"weights" * 100)
    (folder / "b.json").write_text("{}")


def test_rotation_keeps_the_newest_and_those_that_are_for_ever(run):
    checkpoints = Checkpoints(run, keep_last=2, keep_every=4)
    for step in range(1, 11):
        checkpoints.save(step, write_some)
    assert run.steps() == [4, 8, 9, 10]


def test_checksums_name_the_damage(run):
    folder = Checkpoints(run).save(1, write_some)
    assert find_damage(folder) is None
    (folder / "a.bin").write_bytes(b"weightz" + b"weights" * 99)
    assert "a.bin has another checksum" in (find_damage(folder) or "")
    (folder / "a.bin").write_bytes(b"short")
    assert "a.bin has 5 bytes instead of 700" in (find_damage(folder) or "")
    (folder / "a.bin").unlink()
    assert "a.bin is missing" in (find_damage(folder) or "")
    (folder / "checksums.json").write_text("{")
    assert "cannot be read" in (find_damage(folder) or "")
    (folder / "checksums.json").unlink()
    assert "checksums.json is missing" in (find_damage(folder) or "")


@pytest.fixture
def three(make_trainer):
    """Checkpoints of a run after its steps 1, 2 and 3."""
    trainer = make_trainer(n_steps=3, checkpoint_every=1, keep_last=3)
    assert trainer.checkpoints.newest_whole() is None
    trainer.train()
    assert trainer.checkpoints.newest_whole() == 3
    return trainer.checkpoints


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rename(values, old, new):
    values[new] = values.pop(old)


INDEX = {
    "another name": lambda value: rename(value, "files", "filez"),
    "another key of a file": lambda value: rename(value["files"]["config.json"], "bytes", "byte"),
    "a size that is no number": lambda value: value["files"]["config.json"].update(bytes="10"),
    "a file left out": lambda value: value["files"].pop("trainer_state.json"),
    "all files left out": lambda value: value["files"].clear(),
    "a list": lambda value: value.update(files=[]),
    "a file elsewhere": lambda value: rename(value["files"], "config.json", "../step_2/config.json"),
}


@pytest.mark.parametrize("change", INDEX)
def test_an_index_that_is_not_whole_falls_back(change, three, caplog):
    change_json(three.run.checkpoint(3) / "checksums.json", INDEX[change])
    with caplog.at_level(logging.WARNING, logger="crosscode"):
        assert three.newest_whole() == 2
    assert "checkpoint 3 is damaged" in caplog.text


STATE = {
    "no step": lambda items: items.pop(1),
    "a step that is no number": lambda items: items[1].__setitem__(1, "3"),
    "another step": lambda items: items[1].__setitem__(1, 4),
    "a tensor that is not there": lambda items: items.append(["more", {"__tensor__": "/more"}]),
    "something else": lambda items: items.append({"x": 1}),
    "a part of another form": lambda items: next(item for item in items if item[0] == "optimizer").__setitem__(1, [1]),
}


@pytest.mark.parametrize("change", STATE)
def test_a_state_that_is_none_falls_back_even_where_its_checksum_holds(change, three, caplog):
    folder = three.run.checkpoint(3)
    assert json.loads((folder / "trainer_state.json").read_text())["__items__"][1] == ["step", 3]
    change_json(folder / "trainer_state.json", lambda value: STATE[change](value["__items__"]))
    write_checksums(folder)
    with caplog.at_level(logging.WARNING, logger="crosscode"):
        assert three.newest_whole() == 2
    assert "checkpoint 3 is damaged" in caplog.text


def test_where_all_checkpoints_are_damaged_that_is_said(three, caplog):
    (three.run.checkpoint(3) / "model.safetensors").write_text("[]")
    assert three.newest_whole() == 2
    for step in (1, 2):
        (three.run.checkpoint(step) / "trainer_state.safetensors").unlink()
    with pytest.raises(InputError, match=r"all checkpoints .* are damaged"):
        three.newest_whole()


def test_a_full_disk_keeps_the_old_checkpoints_and_leaves_no_rest(run, small_files):
    checkpoints = Checkpoints(run, keep_last=1)
    checkpoints.save(1, write_some)
    small_files(300)
    with pytest.raises(CheckpointNotSaved, match=r"checkpoint of step 2 .* the last one is .*step_1"):
        checkpoints.save(2, write_some)
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_1"]
    assert find_damage(run.checkpoint(1)) is None


def test_training_goes_on_over_a_full_disk(make_trainer, small_files, caplog):
    trainer = make_trainer(n_steps=6, checkpoint_every=2, data=None)
    original = trainer.checkpoints.save

    def save(step, write):
        if step == 4:
            small_files(1000)
        try:
            return original(step, write)
        finally:
            small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])

    trainer.checkpoints.save = save
    with caplog.at_level(logging.WARNING, logger="crosscode"):
        trainer.train()
    assert trainer.run.steps() == [2, 6]
    assert "step 4 could not be written" in caplog.text and "training goes on" in caplog.text


def test_the_trained_model_on_a_full_disk_is_one_line_and_the_run_can_be_finished(make_trainer, small_files):
    trainer = make_trainer(n_steps=4, checkpoint_every=2)
    save_checkpoint = trainer.save_checkpoint

    def save_and_fill(**options):
        save_checkpoint(**options)
        if trainer.step == 4:
            small_files(1000)

    trainer.save_checkpoint = save_and_fill
    with pytest.raises(
        CheckpointNotSaved, match=r"the trained model could not be .*; free some space, then: .*--resume"
    ):
        trainer.train()
    assert not trainer.run.final.exists()
    small_files(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    again = make_trainer(n_steps=4)
    again.restore(again.checkpoints.newest_whole())
    again.train()
    assert (again.run.final / "model.safetensors").is_file()


def test_a_trainer_continues_from_the_checkpoint_before_a_damaged_one(make_trainer, rows_of):
    whole = make_trainer("whole", n_steps=9, checkpoint_every=3)
    whole.train()
    first = make_trainer("other", n_steps=9, checkpoint_every=3)
    first.train()
    weights = first.run.checkpoint(9) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    again = make_trainer("other", n_steps=9, checkpoint_every=3)
    again.restore(again.checkpoints.newest_whole())
    assert again.step == 6
    again.train()
    assert [row["step"] for row in rows_of(again)] == list(range(1, 10))
    assert [row["loss"] for row in rows_of(again)] == [row["loss"] for row in rows_of(whole)]
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


def test_the_global_random_state_is_part_of_a_checkpoint(make_trainer):
    trainer = make_trainer(n_steps=2, checkpoint_every=1)
    torch.manual_seed(5)
    trainer.train()
    drawn = torch.rand(3)
    again = make_trainer(n_steps=2)
    torch.manual_seed(6)
    again.restore(2)
    assert torch.equal(torch.rand(3), drawn)


def test_rows_behind_the_checkpoint_are_cut(make_trainer, rows_of):
    trainer = make_trainer(n_steps=4, checkpoint_every=2)
    trainer.train()
    with trainer.run.metrics_file.open("a") as file:
        file.write(json.dumps({"step": 5, "loss": 1.0}) + '\n{"step": 6, "lo')
    again = make_trainer(n_steps=4)
    again.restore(2)
    again.open()
    assert [row["step"] for row in rows_of(again)] == [1, 2]
    from_the_start = make_trainer(n_steps=4)
    from_the_start.restore(None)
    from_the_start.open()
    assert rows_of(from_the_start) == []
