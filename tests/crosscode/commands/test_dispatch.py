"""What the console script does before, around and after a command: help, names, errors, closed pipes, speed."""

import os
import subprocess
import sys

import pytest
import yaml

from crosscode.commands import cli
from crosscode.commands.cli import command_names, load_command, main
from crosscode.commands.parts.options import read_words
from crosscode.commands.train import COMMAND as TRAIN
from crosscode.config.experiment import ExperimentConfig

# Prints the exit code and whether torch was loaded on the way.
PROBE = """
import sys
from crosscode.commands.cli import main
code = main(sys.argv[1:])
print("\\n", code, "torch" in sys.modules, file=sys.stderr)
"""


def run(*arguments, **options):
    command = [sys.executable, "-m", "crosscode.commands.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_every_file_of_the_folder_is_a_command_with_help(capsys):
    assert {"train", "harvest", "evaluate", "report", "sweep", "demo", "synthetic", "doctor"} <= {*command_names()}
    assert "cli" not in command_names() and "parts" not in command_names()
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in command_names():
        assert f"  {name} " in shown and load_command(name).text.splitlines()[0][:40] in shown
        assert main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: crosscode {name}")


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--help"], 0, []),
        (["train", "--help"], 0, []),
        (["--version"], 0, []),
        ([], 2, ["no command given"]),
        (["trian"], 2, ["unknown command 'trian'", "did you mean 'train'?"]),
        (["--versio"], 2, ["did you mean '--version'?"]),
        (["--train.n_tokens", "3", "train"], 2, ["options stand behind it"]),
        (["--help", "evaluate"], 0, []),
        (["train", "demo", "seed=3"], 2, ["'seed=3' is one word too many; did you mean --seed=3?"]),
        (
            ["steer", "x", "--latent", "many", "--prompt", "p"],
            2,
            ["steer: --latent = 'many'", "such as 4096, 1e6 or 64k"],
        ),
        (["train"], 2, ["no config given"]),
        (["train", "nowhere.yaml"], 2, ["'nowhere.yaml' is neither a file nor a recipe"]),
        (["train", "demo", "again"], 2, ["'again' is one word too many"]),
        (
            ["train", "demo", "--train.n_tokens", "1"],
            2,
            ["train.n_tokens = 1: must be at least train.batch_size = 512"],
        ),
        (["train", "demo", "--trian.n_tokens", "3"], 2, ["did you mean --train.n_tokens?"]),
        (["train", "demo", "--crosscoder.activation", "topk"], 2, ["--crosscoder.activation takes no value", ".FIELD"]),
        (
            ["train", "demo", "--overwrite", "maybe"],
            2,
            ["'maybe' is one word too many", "--overwrite takes true or false"],
        ),
        (["train", "demo", "--train.batchsize", "3"], 2, ["--train.batchsize", "did you mean --train.batch_size?"]),
        (["train", "demo", "--crosscoder.activation.k", "2", "--sed", "1"], 2, ["--sed", "did you mean --seed?"]),
        (["train", "demo", "--train.batch_size", "many"], 2, ["train.batch_size = 'many'", "integer"]),
        (["train", "BAD"], 2, ["trian: unknown field", "did you mean 'train'?"]),
        (["train", "TWICE"], 2, ["line 2: 'seed' is given twice (first in line 1)"]),
        (["sweep", "demo", "--grid", "train.logevery=1,2"], 2, ["'train.logevery'", "did you mean 'train.log_every'?"]),
        (["synthetic", "--n_step", "3"], 2, ["--n_step", "did you mean --n_steps?"]),
        (["harvest", "demo", "--stor", "x"], 2, ["--stor", "did you mean --store?"]),
        (["evaluate"], 2, ["no RUN given", "usage: crosscode evaluate RUN"]),
        (["report", "x", "--n_tokens", "0"], 2, ["--n-tokens = 0", "greater than 0"]),
        (["doctor", "--folder", "/nowhere"], 2, ["--folder = '/nowhere'"]),
    ],
)
def test_help_and_errors_come_before_torch(arguments, code, expected, tmp_path):
    bad, twice = tmp_path / "BAD", tmp_path / "TWICE"
    bad.write_text("trian: {n_tokens: 1}\n")
    twice.write_text("seed: 1\nseed: 2\n")
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    *lines, last = done.stderr.strip().splitlines()
    assert last.split() == [str(code), "False"], done.stderr
    assert len([line for line in lines if line.strip()]) == (code != 0), done.stderr
    assert all(text in done.stderr for text in expected), done.stderr
    assert bool(done.stdout) == (code == 0)


def test_the_version_is_the_package_s(capsys):
    import crosscode

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"crosscode {crosscode.__version__}\n"


def test_public_names_are_listed():
    import crosscode

    assert {*crosscode.__all__, "__version__", "__doc__"} <= {*dir(crosscode)}


@pytest.mark.parametrize("arguments", [["recipes"], ["train", "--help"], ["--help"], ["backends"]])
def test_a_closed_pipe_ends_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "crosscode.commands.cli", *arguments]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (cli.EXIT_CLOSED_PIPE, "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "/some/file"), "crosscode: '/some/file': Permission denied"),
        (OSError(28, "No space left on device"), "crosscode: No space left on device; free some space"),
        (ConnectionError("the hub\ndoes not answer"), "crosscode: the hub"),
    ],
)
def test_errors_of_the_system_are_one_line(error, line, monkeypatch, capfd):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert main(["recipes"]) == cli.EXIT_FAILED
    shown = capfd.readouterr().err
    assert shown.startswith(line) and shown.count("\n") == 1


# ---- help


def lines_of(capsys, *arguments):
    assert main(["train", "--help", *arguments]) == 0
    return capsys.readouterr().out


def test_the_help_of_train_fits_a_screen_or_two_and_points_on(capsys):
    shown = lines_of(capsys)
    assert len(shown.splitlines()) <= 60 and "crosscode train --help SECTION" in shown
    for name, field in ExperimentConfig.model_fields.items():
        assert f"  --{name} " in shown or f"  {name} " in shown, field
    assert "batch_size" in shown and "sign_sgd" not in shown and "zero_dec_skip" not in shown


def test_every_field_is_shown_by_its_section_with_type_default_and_meaning(capsys):
    from crosscode.build.schema import experiment_class
    from crosscode.config.checked import field_paths

    shown = " ".join("".join(lines_of(capsys, section) for section in ("train", "data", "evaluation")).split())
    assert "--train.batch_size int activations of one optimizer step (default: 4096)" in shown
    assert "--train.optimizer adam|sign_sgd_schedule_free" in shown and "(default: adam)" in shown
    paths = [path for path in field_paths(experiment_class()) if path.split(".")[0] in ("train", "data", "evaluation")]
    assert [path for path in paths if path.count(".") == 1 and f"--{path} " not in shown] == []
    for path in field_paths(experiment_class()):
        assert path.split(".")[-1] in lines_of(capsys, path)


@pytest.mark.parametrize(
    ("topic", "expected", "missing"),
    [
        ("train.optimizer", ["(default: adam)", "type adam", "type sign_sgd", "--train.optimizer.lr"], "batch_size"),
        ("crosscoder.activation", ["type topk", "type jumprelu", "--crosscoder.activation.k int"], "n_latents int"),
        ("crosscoder.activation.topk", ["type topk", "--crosscoder.activation.k int"], "jumprelu"),
        ("topk", ["type topk", "--crosscoder.activation.k int"], "jumprelu"),
        ("objective.auxk", ["--objective.auxk.k_aux int", "(default: 256)"], "--objective.l1"),
        ("--train.batch-size", ["--train.batch_size int", "(default: 4096)"], "log_every"),
        ("language_models", ["--language_models.path str", "(required)"], "hookpoints"),
        ("train.optimizer.lr", ["type adam", "null: 2e-4", "type sign_sgd_schedule_free", "null: 5e-3"], "betas"),
        ("crosscoder.activation.k", ["type batch_topk, topk", "type groupmax", "must divide"], "k_start"),
        ("crosscoder.type", ["--crosscoder.type {", "sae,", "(default:", "model_hookpoint_acausal)"], "type sae"),
        ("train.optimizer.momentum", ["type sign_sgd_schedule_free", "0.95"], "type adam"),
    ],
)
def test_help_shows_one_section_type_or_field(topic, expected, missing, capsys):
    shown = lines_of(capsys, topic)
    assert all(text in shown for text in expected) and missing not in shown, shown


def test_help_on_what_there_is_not_is_one_line(capfd):
    assert main(["train", "--help", "train.optimzer"]) == 2
    assert "did you mean train.optimizer?" in capfd.readouterr().err


# ---- values


def test_options_before_the_config_and_counts_reach_the_run(tiny_config, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config))
    words = ["train", "--overwrite", "--train.n-tokens", "1e3", "--train.tf32", "--train.keep_every", "1k", str(config)]
    assert main([*words, "--run-dir", str(tmp_path / "other")]) == 0
    written = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())["train"]
    assert (written["n_tokens"], written["keep_every"], written["tf32"]) == (1000, 1000, True)
    assert not (tmp_path / "run").exists()


def test_a_word_behind_a_flag_of_a_component_is_not_lost(capfd):
    assert main(["train", "sae_topk", "--train.optimizer.fused", "maybe"]) == 2
    assert "'maybe' is one word too many" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["0", "0.5", "{type: linear_ramp, value: 1}"])
@pytest.mark.parametrize("with_sign", [False, True])
def test_what_may_be_a_number_or_a_schedule_takes_its_word(text, with_sign):
    option = "--objective.tanh.weight"
    words = [f"{option}={text}"] if with_sign else [option, text]
    assert TRAIN.whole is not None
    read = read_words(["demo", *words], TRAIN.options, TRAIN.whole())
    weight = read.values["objective"]["tanh"]["weight"]
    assert read.positional == ["demo"]
    assert weight == (text if text[0] != "{" else yaml.safe_load(text))


def test_an_unknown_architecture_is_named_and_one_of_a_list_can_be_set(capfd):
    assert main(["train", "sae_topk", "--crosscoder.type", "autoencoder"]) == 2
    assert "crosscoder.type = 'autoencoder': must be one of compound_cross_layer_trans" in capfd.readouterr().err
    assert main(["train", "sae_topk", "--language_models.0.dtype", "float8"]) == 2
    said = capfd.readouterr().err
    assert said.count("language_models.0.dtype = 'float8'") == 1 and "'auto' or 'float32', 'bfloat16'" in said


def test_a_flag_of_a_component_may_stand_before_the_config(tiny_config, tmp_path, capfd):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(tiny_config))
    assert main(["train", "--train.optimizer.row_sparse", str(config), "--backend", "reference"]) == 2
    assert "crosscode: train.optimizer: row_sparse needs betas[0] = 0" in capfd.readouterr().err
