"""`crosscode plan`; that the bytes are those that processes send: tests/crosscode/parallel, tests/check/test_ranks.py."""

import pytest

from crosscode.build.plan import GPUS, plan
from crosscode.build.schema import check_config, read_yaml
from crosscode.commands.cli import main


def test_memory_of_the_coder_falls_with_the_ranks_and_times_say_what_dominates():
    config = check_config(read_yaml("topk_crosscoder"))
    one, two, four = plan(config, [1, 2, 4], GPUS["h100"])
    assert one.memory and two.memory and four.memory and four.sent and one.sent
    # all but biases and what else is whole everywhere: 2 models x 3 hookpoints of width 128, 4 copies of float32
    for several in (two, four):
        assert several.memory and several.memory["coder"] == pytest.approx(
            one.memory["coder"] / several.ranks, rel=0.02
        )
        assert several.memory["language models"] == one.memory["language models"]
    assert one.sent["step"] == 0 and four.sent["step"] > 0
    assert one.dominant in (one.seconds or {})


def test_the_command_shows_a_line_for_each_number_of_ranks_and_names_what_is_refused(capsys):
    assert main(["plan", "demo", "--ranks", "3", "--gpu", "a100"]) == 0
    said = capsys.readouterr().out
    assert [int(line.split()[0]) for line in said.splitlines()[2:13]] == [1, 2, 3, *(2**i for i in range(2, 10))]
    assert "predictions" in said and "one of 3:" in said and "A100" in said
    assert main(["plan", "demo", "--train.compile", "true"]) == 0
    assert "train.compile = True" in capsys.readouterr().out
