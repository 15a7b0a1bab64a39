"""The self-test of a machine."""

import dataclasses

import pytest
import torch
from crosscode_kernels import resolve_backend

from crosscode.commands.cli import main
from crosscode.commands.parts import self_test


def test_the_doctor_finds_nothing_wrong_here(capsys, tmp_path):
    torch.set_num_threads(1)
    assert main(["doctor", "--seconds", "0", "--folder", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for text in ("torch ", "python", "cpu", "backend reference", "torch cpu batch_topk", "MiB/s"):
        assert text in shown
    assert "FAIL" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_kernel_that_is_wrong_is_found():
    torch.set_num_threads(1)
    right = resolve_backend("torch", "cpu", torch.float32)

    class Wrong:
        name = "wrong"

        def __getattr__(self, op):
            return getattr(right, op)

        def encode_topk(self, *args):
            latents = right.encode_topk(*args)
            return dataclasses.replace(latents, value_N=latents.value_N * 1.001)

        def encode_groupmax(self, *args):
            raise RuntimeError("no such kernel\nmore")

    checks = {check.name: check for check in self_test._test_backend(Wrong(), torch.device("cpu"), 0.0)}
    assert checks["wrong cpu topk"].ok is False
    assert checks["wrong cpu groupmax"].ok is False and "no such kernel" in checks["wrong cpu groupmax"].text
    assert checks["wrong cpu relu"].ok is True


def test_a_folder_that_cannot_be_written_is_a_failed_check(tmp_path):
    (check,) = self_test.disk_speed(tmp_path / "missing")
    assert check.ok is False and "missing" in check.text


def test_a_missing_folder_is_bad_input(capfd):
    assert main(["doctor", "--folder", "/nowhere"]) == 2
    assert "/nowhere" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["doctor", "sweep", "train"])
def test_the_general_help_names_every_command_and_the_exit_codes(command, capsys):
    assert main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert command in shown and "75 stopped by Ctrl-C or SIGTERM" in shown
