"""Metrics to wandb and tensorboard: optional extras behind the same protocol as the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from crosscode.errors import InputError
from crosscode.files import write_json
from crosscode.runs.histograms import Histogram
from crosscode.stored import WandbRun, read_json

WANDB_FILE = "wandb.json"


class WandbLogger:
    """A wandb run `name` of a `project`, with the `config` of the crosscode run in `run_path`. Needs the extra `wandb`.
    A resumed run goes on in the same wandb run, whose id is kept in the run directory.

    Raises:
        InputError: wandb is not installed.
    """

    def __init__(self, project: str, name: str, run_path: Path, config: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise InputError(
                f"train.wandb_project = {project!r}: wandb is not installed; pip install 'crosscode[wandb]'"
            ) from error
        self._wandb, self._run_path = wandb, run_path
        self._options = {"project": project, "name": name, "dir": str(run_path), "config": config}
        self._run: Any = None

    def open(self) -> None:
        """
        Raises:
            InputError: wandb does not begin, for want of a key for example.
        """
        known = self._run_path / WANDB_FILE
        run_id = read_json(known, WandbRun)["id"] if known.is_file() else None
        try:
            self._run = self._wandb.init(**self._options, id=run_id, resume="allow" if run_id else None)
        except Exception as error:  # of many kinds, and none of them ours
            reason = " ".join(str(error).split())
            raise InputError(
                f"train.wandb_project = {self._options['project']!r}: wandb does not begin: {reason}"
            ) from error
        write_json(known, {"id": self._run.id})

    def log(self, metrics: dict[str, Any]) -> None:
        self._run.log({name: value for name, value in metrics.items() if name != "step"}, step=metrics["step"])

    def log_histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        made = {
            f"histogram/{name}": self._wandb.Histogram(
                np_histogram=(np.array(histogram.counts), np.array(histogram.edges))
            )
            for name, histogram in histograms.items()
        }
        self._run.log(made, step=step)

    def rewind(self, step: int, n_rows: int) -> None:
        """wandb keeps the rows that it has and leaves out repeated steps by itself."""

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class TensorboardLogger:
    """Event files of tensorboard in `folder`. Needs the extra `tensorboard`.
    Steps that a resumed run repeats replace what was there.

    Raises:
        InputError: tensorboard is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "train.tensorboard = true: tensorboard is not installed; pip install 'crosscode[tensorboard]'"
            ) from error
        self._folder, self._make_writer = str(folder), SummaryWriter
        self._writer: Any = None

    def open(self) -> None:
        self._writer = self._make_writer(self._folder)

    def log(self, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if name != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, metrics["step"])

    def log_histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        for name, histogram in histograms.items():
            middles = [(a + b) / 2 for a, b in zip(histogram.edges, histogram.edges[1:], strict=False)]
            counts = histogram.counts
            self._writer.add_histogram_raw(
                f"histogram/{name}",
                min=histogram.edges[0],
                max=histogram.edges[-1],
                num=sum(counts),
                sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
                sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
                bucket_limits=histogram.edges[1:],
                bucket_counts=counts,
                global_step=step,
            )

    def rewind(self, step: int, n_rows: int) -> None:
        self._writer.close()
        self._writer = self._make_writer(self._folder, purge_step=step + 1)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
