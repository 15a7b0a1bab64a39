"""Ranks write the store that one process writes, byte for byte."""

import sys
from pathlib import Path

import pytest

from crosscode.commands.cli import main

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

from ranks import finish, spawn

HARVEST = (
    "harvest", "demo_tuned", "--n-tokens", "4k", "--data.cache.shard_mb", "1", "--data.harvest_batch_size", "4",
    "--data.sequence_length", "128",
)  # fmt: skip
COMMAND = [sys.executable, "-c", "import sys; from crosscode.commands.cli import main; sys.exit(main(sys.argv[1:]))"]


def contents(folder):
    """But positions, whose two entries safetensors writes in any order."""
    return {
        each.name: each.read_bytes() for each in folder.iterdir() if each.suffix != "" and "resume" not in each.name
    }


def harvest(n_ranks, folder):
    return spawn(n_ranks, words=[*COMMAND, *HARVEST, "--store", str(folder)])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "store"
    assert main([*HARVEST, "--store", str(folder)]) == 0
    return contents(folder)


def test_two_ranks_write_what_one_process_does(one, tmp_path):
    said = finish(harvest(2, tmp_path / "two"))
    assert contents(tmp_path / "two") == one
    assert len(one) > 4
    assert "activations" in said[0]
    assert "mean norm" not in said[1]
