"""`crosscode plan`; that the bytes are those that processes send: tests/crosscode/parallel, tests/check/test_ranks.py."""

import pytest

from crosscode.build.plan import GPUS, plan
from crosscode.build.schema import check_config, read_yaml
from crosscode.commands.cli import main


def test_memory_of_the_coder_falls_with_the_ranks():
    one, four = plan(check_config(read_yaml("topk_crosscoder")), [1, 4], GPUS["h100"])
    assert one.memory and four.memory and four.sent and one.sent
    assert four.memory["coder"] == pytest.approx(one.memory["coder"] / 4, rel=0.02)  # biases are whole everywhere
    assert four.memory["language models"] == one.memory["language models"]
    assert one.sent["step"] == 0 and four.sent["step"] > 0


def test_the_command_shows_a_line_for_each_number_of_ranks_and_names_what_is_refused(capsys):
    assert main(["plan", "demo", "--ranks", "3", "--gpu", "a100", "--crosscoder.n_latents", "300"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()[2:13]
    assert [int(line.split()[0]) for line in lines] == [1, 2, 3, *(2**i for i in range(2, 10))]
    assert "crosscoder.n_latents = 300: must be at least one for each process" in lines[-1]
    assert "predictions" in said and "one of 3:" in said and "A100" in said
