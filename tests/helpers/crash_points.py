"""Commands that are killed at a point of their work on files, and what can be made of what they left.

Run as a program: `crash_points.py SCENARIO FOLDER POINT ...` prints a line of JSON for each point; without points, how many
there are. A point is the n-th call that makes, renames, flushes or removes something; SIGKILL comes before it takes effect.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from forked import in_child, in_child_with_imports

CALLS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir", "remove")
CONFIG = {
    "name": "run",
    "data": {"source": {"type": "arrays", "names": [["acts"]], "files": [{"path": "acts.npy"}]}},
    "crosscoder": {
        "type": "sae",
        "n_latents": 16,
        "activation": {"type": "topk", "k": 2},
        "init": {"type": "anthropic_transpose"},
    },
    "objective": {"recon": {}},
    "evaluation": {"n_tokens": 64},
    "backend": "torch",
    "device": "cpu",
    "train": {
        "n_tokens": 512,
        "batch_size": 64,
        "checkpoint_every": 3,
        "log_every": 2,
        "optimizer": {"type": "adam", "lr": 1e-3},
    },
}  # fmt: skip
JOINED = CONFIG | {
    "language_models": [{"path": f"demo:{name}", "dtype": "float32"} for name in ("base", "tuned")],
    "hookpoints": ["blocks.0.hook_resid_pre"],
    "data": {
        "source": {"type": "demo", "split": "train", "domains": ["code"]},
        "sequence_length": 16,
        "harvest_batch_size": 8,
        "join": ["stores/base", "stores/tuned"],
    },
    "crosscoder": CONFIG["crosscoder"] | {"type": "model_hookpoint_acausal"},
    "evaluation": {"n_tokens": 64, "loss_recovered": "never"},
}  # fmt: skip
SWEEP = ["sweep", "config.yaml", "--grid", "train.optimizer.lr=1e-3,2e-3", "--run-dir", "runs"]
TRAIN = ["train", "config.yaml", "--run-dir", "runs/a"]
OTHER = [*TRAIN, "--train.n_tokens", "256"]
HARVEST = ["harvest", "harvest.yaml", "--n-tokens", "1000", "--models"]
APART = [[*HARVEST, "0", "--store", "stores/base"], [*HARVEST, "1", "--store", "stores/tuned"]]
TRAIN_JOINED = ["train", "joined.yaml", "--run-dir", "runs/a"]
SCENARIOS = {
    # what was done before; the command that is killed; what may be typed next, until one works
    "train": ([], TRAIN, [TRAIN, ["train", "--resume", "runs/a"]]),
    "overwrite": ([OTHER], [*TRAIN, "--overwrite"], [[*TRAIN, "--overwrite"]]),
    "overwrite_resume": ([OTHER], [*TRAIN, "--overwrite"], [["train", "--resume", "runs/a"]]),
    "joined": (APART, TRAIN_JOINED, [TRAIN_JOINED, ["train", "--resume", "runs/a"]]),
    "sweep": ([], SWEEP, [SWEEP, ["sweep", "--resume", "runs"]]),
    "sweep_overwrite": ([SWEEP], [*SWEEP, "--overwrite"], [[*SWEEP, "--overwrite"]]),
    "sweep_overwrite_resume": ([SWEEP], [*SWEEP, "--overwrite"], [["sweep", "--resume", "runs"]]),
}


def command(words, said: Path):
    """`crosscode WORDS`, what it says kept in a file."""
    from crosscode.commands.cli import main

    text = io.StringIO()
    try:
        with redirect_stderr(text), redirect_stdout(text):
            return main(words)
    except BaseException as error:
        text.write(f"TRACEBACK {type(error).__name__}: {error}")
        return 98
    finally:
        said.write_text(text.getvalue())


def counted(words, said: Path, kill_at: int | None, count: Path | None = None, work=None):
    """The command (or `work`) with its calls counted, and killed before the `kill_at`-th."""
    n = 0

    def watched(call):
        def instead(*args, **kwargs):
            nonlocal n
            n += 1
            if n == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return instead

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name)))
    status = command(words, said) if work is None else work()
    if count is not None:
        count.write_text(str(n))
    return status


def state(folder: Path):
    """The trained models, by folder, as bytes' digests."""
    import hashlib

    finals = sorted(folder.glob("runs/**/final/model.safetensors"))
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in finals
        if ".crosscode-old" not in path.parts
    }


def prepare(folder: Path) -> None:
    import numpy as np
    import yaml

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.save(folder / "acts.npy", rng.standard_normal((400, 8)).astype("float32"))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "joined.yaml").write_text(yaml.safe_dump(JOINED))
    data = {name: value for name, value in JOINED["data"].items() if name != "join"}
    (folder / "harvest.yaml").write_text(yaml.safe_dump(JOINED | {"data": data}))


def main(scenario: str, folder: Path, points: list[int]) -> None:
    import torch

    torch.set_num_threads(1)
    import crosscode.build.run
    import crosscode.commands.parts.sweep_runs  # noqa: F401

    before, killed, after = SCENARIOS[scenario]
    start, said, names = folder / "start", folder / "said.txt", folder / "imported.json"
    prepare(start)
    os.chdir(start)
    for words in before:
        assert in_child_with_imports(lambda words=words: command(words, said), names) == 0, said.read_text()
    old = state(start)
    whole = folder / "whole"
    shutil.copytree(start, whole)
    os.chdir(whole)
    assert in_child_with_imports(lambda: counted(killed, said, None, folder / "count"), names) == 0, said.read_text()
    new = state(whole)
    assert new, "something was trained"
    n_points = int((folder / "count").read_text())
    if not points:
        print(n_points)
        return
    for point in points:
        at = folder / "at"
        shutil.rmtree(at, ignore_errors=True)
        shutil.copytree(start, at)
        os.chdir(at)
        status = in_child(lambda point=point: counted(killed, said, point))
        tried = []
        for words in after:
            code = in_child(lambda words=words: command(words, said))
            tried.append([words[0], code, said.read_text().strip().splitlines()[-1:]])
            if code == 0:
                break
        found = state(at)
        print(json.dumps({
            "point": point, "status": status, "tried": tried, "as_new": found == new, "as_old": found == old,
            "leftovers": sorted(str(path.relative_to(at)) for path in at.glob("runs/**/.crosscode-tmp-*")),
        }))  # fmt: skip
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(word) for word in sys.argv[3:]])
