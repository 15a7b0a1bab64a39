"""Nothing of the user's is lost: which folders a run may take, what of them goes, and when."""

import hashlib
import json
import os
import shutil
import signal
import sys
import time

import pytest
import torch
import yaml

from crosscode.build import schema
from crosscode.commands import demo
from crosscode.commands.cli import main
from crosscode.commands.parts import options
from crosscode.errors import InputError
from crosscode.files import check_may_be_filled, is_temporary, new_folder, write_text
from crosscode.runs import directory as run_directory
from crosscode.runs import run_files
from crosscode.runs.directory import RunDirectory
from crosscode.runs.run_files import ASIDE, LOCK_FILE, MARKER, find_files, read_marker
from crosscode.trainers.trainer import Trainer


@pytest.fixture
def write(tiny_config, tmp_path):
    """Writes the tiny config with other top-level values, or other ones of `train`, and returns its file."""
    torch.set_num_threads(1)
    tiny_config["evaluation"]["loss_recovered"] = "never"
    tiny_config["train"]["checkpoint_every"] = 4

    def write(train=None, **changes):
        file = tmp_path / "config.yaml"
        values = {**tiny_config, **changes, "train": tiny_config["train"] | (train or {})}
        file.write_text(yaml.safe_dump(values))
        return str(file)

    return write


def tree(root):
    """Every path below a folder with its content; of a link, where it leads."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(root))] = os.readlink(path)
        else:
            found[str(path.relative_to(root))] = "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


class Killed(BaseException):
    """Ends a run where it stands, as a kill does."""


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(step, config)`: train and be killed before the update after `step` others."""
    train_step = Trainer.train_step

    def interrupt(step, *arguments):
        def struck(self, acts_BMPD):
            if self.step == step:
                raise Killed
            train_step(self, acts_BMPD)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Trainer, "train_step", struck)
            main([*arguments])

    return interrupt


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def lay(write, interrupt, kept):
    """`lay("finished", at)`, `lay("unfinished", at)`: a run of the tiny config at a folder, trained once for all tests."""

    def lay(state, at):
        if not (kept / state).exists():
            arguments = ["train", write(run_dir=str(kept / state))]
            if state == "finished":
                assert main(arguments) == 0
            else:
                interrupt(6, *arguments)
        shutil.copytree(kept / state, at)
        return at

    return lay


def refused(arguments, capfd, *words):
    capfd.readouterr()
    assert main(arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("crosscode: ")]
    (line,) = [line for line in lines if "loading" not in line]
    assert all(word in line for word in words), line


# ---- folders that are nobody's to take


@pytest.mark.parametrize("command", ["train", "demo", "sweep", "harvest"])
@pytest.mark.parametrize("folder", ["", ".", "..", "HOME", "HOME/..", "/"])
def test_the_working_and_the_home_folder_are_refused(command, folder, write, tmp_path, monkeypatch, capfd):
    config = write(overwrite=True)
    home, project = tmp_path / "home/me", tmp_path / "a/project"
    for made in (home, project):
        made.mkdir(parents=True)
        (made / "config.yaml").write_text((tmp_path / "config.yaml").read_text())
        (made / "metrics.jsonl").write_text("mine")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MPLCONFIGDIR", "/tmp")
    monkeypatch.chdir(project)
    folder = folder.replace("HOME", str(home))
    before = tree(tmp_path)
    arguments = {
        "train": ["train", config, "--run_dir", folder, "--overwrite"],
        "demo": ["demo", "--run-dir", folder, "--overwrite"],
        "sweep": ["sweep", config, "--grid", "crosscoder.activation.k=2,4", "--run-dir", folder, "--overwrite"],
        "harvest": ["harvest", config, "--store", folder],
    }[command]
    refused(arguments, capfd, "data.cache.path = " if command == "harvest" else "run_dir = ")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("given", ["project", "file", "link", "newer"])
def test_what_is_no_run_is_never_replaced(given, write, tmp_path, capfd):
    run = tmp_path / "run"
    if given == "file":
        run.write_text("mine")
    else:
        run.mkdir()
        (run / "config.yaml").write_text((tmp_path / write()).read_text() if given == "project" else "name: mine\n")
        (run / "src").mkdir()
        (run / "src/metrics.jsonl").write_text("mine")
    if given == "link":
        run.rename(tmp_path / "elsewhere")
        run.symlink_to("elsewhere")
    if given == "newer":
        (run / MARKER).write_text(json.dumps({"kind": "run", "format": 99}))
    before = tree(tmp_path)
    for arguments in (["--overwrite"], ["--overwrite", "true"], []):
        config = write(overwrite=True)
        refused(["train", config, *arguments], capfd, str(run))
    assert {path: hash for path, hash in tree(tmp_path).items() if path != "config.yaml"} == {
        path: hash for path, hash in before.items() if path != "config.yaml"
    }


# ---- replacing


def test_only_what_crosscode_wrote_goes_and_the_rest_is_named(write, tmp_path, lay, caplog):
    run = lay("finished", tmp_path / "run")
    marker = json.loads((run / MARKER).read_text())
    assert marker["kind"] == "run" and {"config.yaml", "checkpoints", "final"} <= set(marker["writes"])
    assert yaml.safe_load((run / "config.yaml").read_text())["overwrite"] is False
    mine = [
        "notes.txt",
        ".git/config",
        "final/notes.txt",
        "checkpoints/step_8/notes.txt",
        "checkpoints/best/x",
        "tensorboard/x",
    ]
    for name in mine:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(f"mine: {name}")
    assert main(["train", write(train={"n_tokens": 64 * 5}, overwrite=True)]) == 0
    for name in mine:
        assert (run / name).read_text() == f"mine: {name}"
        assert str(next(p for p in find_files(run).foreign if name.startswith(str(p)))) in caplog.text
    assert RunDirectory(run).steps() == [4, 5]
    assert json.loads((run / "summary.json").read_text())["step"] == 5
    assert not (run / ASIDE).exists()
    assert set(tree(run)) >= {"final/model.safetensors", "checkpoints/step_5/checksums.json"}
    assert "checkpoints/step_8/model.safetensors" not in tree(run) and "checkpoints/step_10" not in tree(run)
    assert main(["train", "--resume", str(run)]) == 0  # writes final/ anew
    assert all((run / name).read_text() == f"mine: {name}" for name in mine)


def test_an_unfinished_run_goes_only_where_that_is_typed(write, tmp_path, lay, capfd):
    run = lay("unfinished", tmp_path / "run")
    before = tree(run)
    refused(["train", write(overwrite=True)], capfd, f"crosscode train --resume {run}", "--overwrite", "not over")
    refused(["train", write()], capfd, f"crosscode train --resume {run}")
    refused(["train", write(overwrite=True), "--overwrite", "false"], capfd, f"crosscode train --resume {run}")
    assert tree(run) == before
    assert main(["train", write(), "--overwrite", "--train.log_every", "1"]) == 0
    assert json.loads((run / "summary.json").read_text())["step"] == 10
    (run / MARKER).unlink()  # as of an earlier version
    refused(["train", write(overwrite=True)], capfd, "earlier version", "--overwrite")
    assert main(["train", write(), "--overwrite"]) == 0 and read_marker(run)["made_by"] == "train"


def test_the_old_run_stays_until_the_new_one_has_a_checkpoint(write, tmp_path, lay, interrupt, caplog):
    run = lay("finished", tmp_path / "run")
    old = {name: hash for name, hash in tree(run).items() if name != LOCK_FILE}
    for step in (1, 2, 3):  # each start dies before its checkpoint
        interrupt(step, "train", write(train={"log_every": 1}), "--overwrite")
        assert tree(run / ASIDE) == old
        assert f"lies in {run / ASIDE} until the first checkpoint" in caplog.text
        caplog.clear()
    interrupt(3, "train", "--resume", str(run))
    assert tree(run / ASIDE) == old
    interrupt(5, "train", "--resume", str(run))
    assert not (run / ASIDE).exists()
    assert main(["train", "--resume", str(run)]) == 0


def test_of_ranks_that_look_at_once_one_puts_the_run_back_and_none_takes_another_for_a_stranger(
    lay, tmp_path, monkeypatch
):
    run = lay("finished", tmp_path / "run")
    old = tree(run)
    run_files.move_aside(run)
    recover = RunDirectory.recover
    monkeypatch.setattr(RunDirectory, "recover", lambda self: (time.sleep(0.05), recover(self)))
    with pytest.raises(InputError, match="another process is at work"), RunDirectory(run).held():
        RunDirectory(run).check_not_held()  # of one process
    monkeypatch.setenv("WORLD_SIZE", "4")
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            try:
                RunDirectory(run).check_not_held()
                os._exit(0 if tree(run).keys() >= old.keys() else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert {name: of for name, of in tree(run).items() if name != LOCK_FILE} == {
        name: of for name, of in old.items() if name != LOCK_FILE
    }


def test_a_kill_anywhere_while_a_run_is_put_by_loses_nothing(lay, tmp_path):
    """In forked processes that end at the n-th change of the file system, for every n."""
    whole = lay("finished", tmp_path / "run")
    old = {name: hash for name, hash in tree(whole).items() if name != LOCK_FILE}
    n, n_old, n_new = 0, 0, 0
    while True:
        n += 1
        run = tmp_path / f"run{n}"
        shutil.copytree(whole, run)
        child = os.fork()
        if child == 0:
            left = [n]

            def counted(change, left=left):
                def act(*args, **kwargs):
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return change(*args, **kwargs)

                return act

            for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
                setattr(os, name, counted(getattr(os, name)))
            directory = RunDirectory(run)
            directory.create_later("name: new\n", check=lambda: None)
            with directory.held():
                directory.begin()
            os._exit(0)
        ended_well = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        again = RunDirectory(run)
        again.recover()
        again.recover()
        if (run / "config.yaml").read_text() == "name: new\n":
            assert tree(run / ASIDE) == old
            n_new += 1
        else:
            kept = {name: hash for name, hash in tree(run).items() if name not in (LOCK_FILE, ASIDE)}
            assert {name: hash for name, hash in kept.items() if not is_temporary(run / name)} == old
            n_old += 1
        if ended_well:
            break
    assert n_old > 20 and n_new >= 1


def test_a_run_left_half_replaced_is_put_back_by_the_same_command(write, tmp_path, lay, capfd):
    run = lay("finished", tmp_path / "run")
    old = tree(run)
    run_files.move_aside(run)
    refused(["evaluate", str(run)], capfd, "--resume")
    refused(["train", write()], capfd, "holds a run")  # not typed: but put back
    assert tree(run) == old
    run_files.move_aside(run)
    assert main(["train", "--resume", str(run)]) == 0
    run_files.move_aside(run)
    assert main(["train", write(), "--overwrite"]) == 0


# ---- starts that fail


def wandb_without_a_key(monkeypatch):
    module = type(sys)("wandb")

    def init(dir, **options):
        os.makedirs(f"{dir}/wandb/run-1")
        raise RuntimeError("api_key not configured (no-tty)")

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)


FAILING = {
    "wandb is not there": {"train": {"wandb_project": "x"}},
    "wandb without a key": {"train": {"wandb_project": "x"}},
    "no tensorboard": {"train": {"tensorboard": True}},
    "betas": {"train": {"optimizer": {"type": "adam", "lr": 0.01, "betas": [1.5, 0.9]}}},
    "seed": {"seed": 2**63},
    "empty documents": {},
}


@pytest.mark.parametrize("there", ["finished", "unfinished", "nothing"])
@pytest.mark.parametrize("case", FAILING)
def test_a_start_that_fails_leaves_everything_as_it_was(case, there, write, tiny_config, tmp_path, lay, monkeypatch):
    run = tmp_path / "runs/run"
    if there != "nothing":
        lay(there, run)
        (run / "notes.txt").write_text("mine")
    before = tree(tmp_path / "runs") if there != "nothing" else None
    if case == "wandb without a key":
        wandb_without_a_key(monkeypatch)
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    if case == "empty documents":
        empty = tmp_path / "empty.jsonl"
        empty.write_text('{"text": ""}\n' * 50)
        tiny_config["data"] |= {"source": {"type": "local", "path": str(empty)}, "scale": False}
    try:
        code = main(["train", write(run_dir=str(run), **FAILING[case]), "--overwrite"])
    except Exception:  # said in one line or not: another matter
        code = 1
    assert code != 0
    if there == "nothing":
        assert not (tmp_path / "runs").exists()
    else:
        assert tree(tmp_path / "runs") == before


# ---- resume


def test_a_resume_removes_its_own_temporaries_only(tmp_path, lay):
    run = lay("unfinished", tmp_path / "run")
    mine = [".git/HEAD", ".notes", ".config.yaml.swp", ".crosscode-tmp-notes", "checkpoints/.keep", "checkpoints/.x/y"]
    for name in mine:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    with pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(Killed))
        patch.setattr(run_directory.Path, "unlink", lambda self, missing_ok=False: None)
        write_text(run / "summary.json", "half")
    (left,) = [path for path in run.iterdir() if is_temporary(path)]
    assert main(["train", "--resume", str(run)]) == 0
    assert not left.exists()
    assert all((run / name).read_text() == "mine" for name in mine)


@pytest.mark.parametrize(
    "name",
    ["checkpoints", "checkpoints/step_4", "metrics.jsonl", "final", "lock", MARKER, ASIDE, "tensorboard", "wandb"],
)
@pytest.mark.parametrize("command", ["resume", "overwrite", "evaluate"])
def test_links_in_a_run_directory_are_refused(name, command, write, tmp_path, lay, capfd):
    run, home = lay("unfinished", tmp_path / "run"), tmp_path / "home"
    write()
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/key").write_text("mine")
    link = run / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(home if "." not in name.removeprefix(".") else home / ".ssh/key")
    before = tree(tmp_path)
    arguments = {
        "resume": ["train", "--resume", str(run)],
        "overwrite": ["train", write(), "--overwrite"],
        "evaluate": ["evaluate", str(run)],
    }[command]
    refused(arguments, capfd, str(link), "is a link")
    assert tree(tmp_path) == before


def test_a_saved_model_takes_its_place_among_other_files(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("notes.txt", "config.json", "weights"):
        (tmp_path / "model" / name).write_text("old")
    with new_folder(tmp_path / "model", "config.json") as folder:
        for name in ("config.json", "weights"):
            write_text(folder / name, "new")
    assert {path.name: path.read_text() for path in (tmp_path / "model").iterdir()} == {
        "notes.txt": "old", "config.json": "new", "weights": "new"
    }  # fmt: skip
    (tmp_path / "link").symlink_to("model")
    with pytest.raises(InputError, match="is a link"), new_folder(tmp_path / "link", "config.json"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


def test_a_folder_beside_or_below_the_working_one_may_be_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/x", "../x", str(tmp_path / "new")):
        check_may_be_filled(folder, "run_dir")


# ---- demo and sweep


@pytest.fixture
def tiny_demo(tiny_config, write, monkeypatch):
    """`crosscode demo` on the tiny models; the arguments of the command."""
    write()
    read_trusted = options.read_trusted
    copy = lambda: json.loads(json.dumps(tiny_config | {"name": "demo"}))  # noqa: E731
    monkeypatch.setattr(
        options, "read_trusted", lambda name, *trust: copy() if name == "demo" else read_trusted(name, *trust)
    )
    return ["demo", "--run-dir", tiny_config["run_dir"], "--backend", "torch"]


@pytest.fixture
def without_reports(monkeypatch):
    """Call it to let further demos write no page: one is enough."""
    return lambda: monkeypatch.setattr(demo, "report_run", lambda run, **options: run / "report.html")


def test_the_demo_goes_on_with_its_own_run_and_replaces_it_when_it_is_finished(
    tiny_demo, tmp_path, interrupt, capfd, without_reports
):
    run = tmp_path / "run"
    interrupt(6, *tiny_demo)
    rows = (run / "metrics.jsonl").read_text()
    assert main(tiny_demo) == 0
    assert "was interrupted: it goes on" in capfd.readouterr().err
    assert (run / "metrics.jsonl").read_text().splitlines()[:2] == rows.splitlines()[:2]
    assert (run / "report.html").is_file()
    without_reports()
    assert main([*tiny_demo, "--n-tokens", "320"]) == 0
    assert json.loads((run / "summary.json").read_text())["step"] == 5
    assert main(tiny_demo) == 0
    assert json.loads((run / "summary.json").read_text())["step"] == 10


def test_the_demo_leaves_other_runs_alone(tiny_demo, write, tmp_path, capfd, without_reports):
    without_reports()
    assert main(["train", write(train={"n_tokens": 320})]) == 0
    before = tree(tmp_path / "run")
    refused(tiny_demo, capfd, "holds a run")
    assert tree(tmp_path / "run") == before
    assert main([*tiny_demo, "--overwrite"]) == 0


def test_no_recipe_replaces_anything_by_itself():
    from crosscode.recipes import recipe_names

    assert not any(schema.read_yaml(name).get("overwrite") for name in recipe_names())


def test_a_sweep_replaces_its_own_runs_only(write, tmp_path, capfd, monkeypatch):
    folder = tmp_path / "sweep"
    arguments = ["sweep", write(), "--grid", "crosscoder.activation.k=2,4", "--run-dir", str(folder)]
    assert main(arguments) == 0
    assert read_marker(folder)["kind"] == "sweep"
    for name in ("notes.txt", "k=2/notes.txt"):
        (folder / name).write_text("mine")
    before = tree(folder)
    refused(arguments, capfd, "holds a sweep (2 of 2 runs done)", "--overwrite")
    wandb_without_a_key(monkeypatch)
    assert main(["sweep", write(train={"wandb_project": "x"}, overwrite=True), *arguments[2:]]) == 2
    write()
    assert tree(folder) == before
    assert main([*arguments, "--overwrite"]) == 0
    assert all((folder / name).read_text() == "mine" for name in ("notes.txt", "k=2/notes.txt"))
    refused(["train", write(run_dir=str(folder)), "--overwrite"], capfd, "holds a sweep")
    shutil.rmtree(folder / "k=2")
    (folder / "k=2").symlink_to(tmp_path)
    refused(["sweep", "--resume", str(folder)], capfd, "is a link")


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "lock", ".crosscode", "final/config.json", "checkpoints/step_8/checksums.json"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_lies_in_place_of_a_file_is_refused_and_not_waited_for(name, make, tmp_path, write, lay, capfd):
    run = lay("finished", tmp_path / "run")
    file = run / name
    file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    make(file)
    for arguments in (["train", write(), "--overwrite"], ["train", "--resume", str(run)], ["evaluate", str(run)]):
        refused(arguments, capfd, f"{str(file)!r} is no file")
    assert file.exists()


@pytest.mark.parametrize("folder", ["file/x", "/proc/x", "x" * 300, "a/" + "x" * 300 + "/b"])
def test_a_folder_that_cannot_be_made_is_said_before_anything_is_loaded(folder, tmp_path, write, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    config = write()
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("crosscode.build.experiment.open_experiment", None)
    before = sorted(tmp_path.iterdir())
    assert main(["train", config, "--run-dir", folder]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith(f"crosscode: run_dir = '{folder[:100]}") and "cannot be made" in said
    assert sorted(tmp_path.iterdir()) == before
