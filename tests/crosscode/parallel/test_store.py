"""Ranks write the store that one process writes, byte for byte; a rank that dies leaves what the same command goes on from."""

import random
import re
import signal
import sys
import time
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


def until_a_shard(ranks, folder, moment):
    """Seconds behind it."""
    while not any(folder.glob("shard-*")):
        assert all(each.poll() is None for each in ranks), [each.communicate()[0] for each in ranks]
        time.sleep(0.01)
    time.sleep(moment)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("killed", "resumed_by", "moment"),
    [(0, 2, 0), (1, 3, 0), (1, 1, 0), *((i % 2, 2, random.Random(i).random()) for i in range(4))],
)
def test_a_killed_rank_ends_the_others_and_the_same_command_goes_on(one, tmp_path, killed, resumed_by, moment):
    folder = tmp_path / "store"
    ranks = harvest(2, folder)
    until_a_shard(ranks, folder, moment)
    ranks[killed].send_signal(signal.SIGKILL)
    other = ranks[1 - killed].communicate(timeout=120)[0]
    ranks[killed].communicate()
    if ranks[1 - killed].returncode != 0:  # else it was done before
        assert ranks[1 - killed].returncode == 74, other
        assert "another rank has ended" in other.splitlines()[-1], other
        assert not (folder / "manifest.json").exists()
    finish(harvest(resumed_by, folder))
    assert contents(folder) == one


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "told", "codes"),
    [
        ("SIGTERM", (0, 1), (75, 75)),
        ("SIGINT", (0, 1), (75, 75)),
        ("SIGINT", (0,), (75, 74)),
        ("SIGTERM", (1,), (74, 75)),
    ],
)
def test_a_signal_stops_all_and_the_same_command_goes_on(one, tmp_path, name, told, codes):
    folder = tmp_path / "store"
    ranks = harvest(2, folder)
    until_a_shard(ranks, folder, 0.1)
    for rank in told:
        ranks[rank].send_signal(getattr(signal, name))
    said = [each.communicate(timeout=120)[0].splitlines()[-1] for each in ranks]
    found = tuple(each.returncode for each in ranks)
    if found == (0, 0):
        pytest.skip("it was done before")
    assert found == codes, said
    if 0 in told:
        assert re.fullmatch(rf"crosscode: stopped by {name} at \d+ activations; the same command goes on", said[0])
    if 1 in told:
        assert "stopped" not in said[1]
    assert not (folder / "manifest.json").exists()
    finish(harvest(2, folder))
    assert contents(folder) == one
