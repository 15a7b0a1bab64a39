"""SIGKILL at a call that makes, renames, flushes or removes something, while a run or a sweep is made, replaced or trained:
the same command or `--resume` then ends with what it would have given, or everything is as it was before.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "helpers" / "crash_points.py"
SCENARIOS = ["train", "joined", "overwrite", "overwrite_resume", "sweep", "sweep_overwrite", "sweep_overwrite_resume"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and kills")


def crash(scenario, folder, *points):
    """What was found at each point; without points, how many there are."""
    command = [sys.executable, str(PROGRAM), scenario, str(folder), *map(str, points)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=env)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found):
    for row in found:
        assert row["status"] == -9, row
        assert all("TRACEBACK" not in str(said) for *_, said in row["tried"]), row
        assert row["tried"][-1][1] == 0, row
        assert row["as_new"] or row["as_old"], row
        assert not row["leftovers"], row


@pytest.mark.parametrize(
    ("scenario", "points"),
    [
        ("train", (2, 7, 60)),
        ("overwrite", (12, 40, 90)),
        ("sweep", (3, 30, 120)),
        ("sweep_overwrite_resume", (12, 20, 70)),
    ],
)
def test_a_kill_at_some_points_leaves_what_can_be_gone_on_with(scenario, points, tmp_path):
    found = crash(scenario, tmp_path / "at", *points)
    assert [row["point"] for row in found] == list(points)
    check(found)


@pytest.mark.soak
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_kill_at_every_point_leaves_what_can_be_gone_on_with(scenario, tmp_path):
    (n_points,) = crash(scenario, tmp_path / "count")
    assert n_points > 50
    check(crash(scenario, tmp_path / "at", *range(1, n_points + 1)))
