"""A run that somebody else made: what its config asks for counts only if it is typed, what it is called is shown as text."""

import base64
import hashlib
import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import crosscode
from crosscode.analysis.diffing import as_cell
from crosscode.build.schema import check_config
from crosscode.commands.cli import main
from crosscode.errors import InputError
from crosscode.files import check_output, write_output
from crosscode.weight_files import save_tensors

RUN = Path(__file__).parents[2] / "fixtures" / "v1" / "run"


@pytest.fixture
def strange_run(tmp_path):
    """A run whose config lets its first language model run code of its own."""
    import shutil

    run = tmp_path / "strange"
    shutil.copytree(RUN, run)
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["language_models"][0]["trust_remote_code"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    return run


@pytest.mark.parametrize(
    "command",
    [
        *(["evaluate"], ["report"], ["train", "--resume"], ["train"], ["harvest", "--store", "s"], ["lens"]),
        *(["sweep", "--grid", "seed=1,2"], ["features", "--to", "dataset", "--out", "f"], ["latents", "--text", "w1"]),
        *(["steer", "--latent", "1", "--prompt", "w1"], ["convert", "--out", "c"]),
        ["export", "--check", "--to", "saelens"],
        ["import", str(RUN / "final"), "--from", "saelens", "--out", "i", "--config"],
    ],
)
def test_code_of_a_model_runs_only_if_that_was_typed(strange_run, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {file: file.read_bytes() for file in strange_run.rglob("*") if file.is_file()}
    assert main([*command, str(strange_run)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "language_models.0.trust_remote_code = True" in message and "--trust-remote-code" in message
    after = {file: file.read_bytes() for file in strange_run.rglob("*") if file.is_file() and file.name != "lock"}
    assert after == {file: content for file, content in before.items() if file.name != "lock"}


def test_what_lies_in_a_run_is_a_strangers_by_whatever_name(strange_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(strange_run / "config.yaml"), "--run-dir", "new"]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err


def test_tensors_have_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_cells_that_a_spreadsheet_would_run_are_text():
    assert as_cell('=HYPERLINK("x")') == '\'=HYPERLINK("x")'
    assert as_cell(" @sum") == "' @sum"
    assert as_cell("a\nb\x1b[31m") == "a b [31m"
    assert as_cell("base/blocks.2") == "base/blocks.2"
    assert as_cell(-1.5) == -1.5


def test_names_have_no_control_characters(tiny_config):
    tiny_config["language_models"][0]["name"] = "a\x1b[31mb"
    with pytest.raises(InputError, match=r"language_models\.0\.name"):
        check_config(tiny_config)


def test_what_a_user_wants_elsewhere_can_be_streamed_and_the_device_stays(tmp_path):
    code = (
        "from pathlib import Path; from crosscode.files import write_output; print('before')\n"
        "write_output(Path('/dev/stdout'), b'a,b\\n'); write_output(Path('/dev/null'), b'x'); print('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "before\na,b\nafter\n"
    with (tmp_path / "file").open("w") as stream:
        subprocess.run([sys.executable, "-c", code], stdout=stream, check=True)
    assert (tmp_path / "file").read_text() == done.stdout
    assert Path("/dev/null").is_char_device() and Path("/dev/stdout").is_symlink()


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="No such device"):
        write_output(tmp_path / "pipe", b"a")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300, "nowhere/t.csv", "."])
def test_a_place_for_a_table_is_judged_before_the_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^csv = "):
        check_output(Path(name), "csv")
    assert not list(tmp_path.iterdir())


def test_the_policy_of_the_page_names_its_script_alone(tmp_path):
    from crosscode.analysis.report import write_report

    page = write_report(RUN, output=tmp_path / "page.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"sha256-([A-Za-z0-9+/=]+)", page) == digests
    assert "default-src 'none'" in html.unescape(page)


@pytest.mark.parametrize("folder", ["x" * 300, "file/x"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    export = ["export", str(RUN), "--to", "saelens"]
    for command in (["import", str(RUN / "final")], ["features", str(RUN), "--to", "dataset"], export):
        assert main([*command, "--out", folder]) == 2
        assert "out = " in capsys.readouterr().err


def test_in_python_code_of_a_model_runs_only_if_that_was_said(strange_run, tmp_path):
    (tmp_path / "own.yaml").write_bytes((strange_run / "config.yaml").read_bytes())
    (strange_run / "notes").mkdir()
    (strange_run / "notes" / "try.yaml").write_bytes((strange_run / "config.yaml").read_bytes())
    for config in (strange_run, strange_run / "config.yaml", strange_run / "notes" / "try.yaml"):
        with pytest.raises(InputError, match=r"language_models\.0\.trust_remote_code = True"):
            crosscode.train(config, run_dir=tmp_path / "new")
    with pytest.raises(InputError, match="trust_remote_code=True"):
        _ = crosscode.open(strange_run).config
    with pytest.raises(InputError, match="trust_remote_code=True"):
        crosscode.open(strange_run).resume()
    assert crosscode.open(strange_run, trust_remote_code=True).config.language_models[0].trust_remote_code
    for config, trust in ((tmp_path / "own.yaml", False), (strange_run, True)):  # then only the folder is wrong
        with pytest.raises(InputError, match=r"^run_dir"):
            crosscode.train(config, run_dir=tmp_path, trust_remote_code=trust)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["a" * 300, "b/" * 3000], ids=["name", "path"])
def test_a_name_that_no_file_can_have_is_bad_input(name, capsys):
    for command in (
        ["verify", name],
        ["report", name],
        ["train", "--resume", name],
        ["push", name, "a/b", "--dry-run"],
    ):
        assert main(command) == 2
        assert len(capsys.readouterr().err) < 600
