"""What a trainer is given where several processes train: a model with its own rows, batches that are the same everywhere, and
state that is whole on disk.

Axes: B tokens · M models · P hookpoints · D width · L latents.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from crosscode.models.base import BaseCrosscoder
from crosscode.parallel.group import Group
from crosscode.parallel.opset import ShardedOps
from crosscode.parallel.rows import SpreadRows
from crosscode.runs.directory import RunDirectory
from crosscode.stopping import SIGNALS, pending, stop_all, stop_by_agreement

OF_ROWS = ("W_enc_LXiDi", "W_dec_LXoDo")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shard_(model: BaseCrosscoder, group: Group) -> None:
    """Keep the rows of this rank. In its `state_dict` they are `SpreadRows`, which are saved as a whole, and filled from a whole
    file."""
    for part in {model, *model.parts}:
        part.op_set_of, part._ops = partial(ShardedOps, group, part.n_latents), None
    for part in model.parts:
        own = slice(*group.bounds(part.n_latents))
        part.first_row = own.start
        for name in OF_ROWS:
            param = nn.Parameter(getattr(part, name).detach()[own].clone())
            param.holds_own_rows = True  # pyright: ignore[reportAttributeAccessIssue]
            setattr(part, name, param)

        def make_whole(part: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            for name in OF_ROWS:
                state[prefix + name] = SpreadRows(group, state[prefix + name], part.n_latents)

        part.register_state_dict_post_hook(make_whole)


def _shard_optimizer(optimizer: torch.optim.Optimizer, group: Group, n_latents_of: dict[Tensor, int]) -> None:
    """As of a model."""

    def each(state: dict[str, Any], change: Any) -> dict[str, Any]:
        params = [param for of in optimizer.param_groups for param in of["params"]]
        changed = dict(state["state"])
        for index, param in enumerate(params):
            if param in n_latents_of and index in changed:
                changed[index] = {
                    key: change(value, n_latents_of[param]) if isinstance(value, Tensor) and value.dim() else value
                    for key, value in changed[index].items()
                }
        return {**state, "state": changed}

    optimizer.register_state_dict_post_hook(lambda _, state: each(state, partial(SpreadRows, group)))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: each(state, lambda v, n: v[slice(*group.bounds(n))]))


@contextmanager
def follow(trainer: Any, group: Group) -> Iterator[None]:
    """Make a new trainer one of several. Within the block it may read from its run directory; behind it only rank 0 goes on
    there and says anything: the others write what is small and of no use into a folder that goes with them."""
    n_latents_of = {getattr(part, name): part.n_latents for part in trainer.model.parts for name in OF_ROWS}
    _shard_optimizer(trainer.optimizer, group, n_latents_of)
    yield
    stop_by_agreement()
    # A checkpoint that the disk refuses ends the run: half way in it the others wait for rank 0, and would not know.
    trainer.saver.save = lambda counts, or_warn=False, save=trainer.saver.save: save(counts)
    if not group.is_first:
        folder = tempfile.TemporaryDirectory(prefix="crosscode-rank-")
        trainer.run = trainer.checkpoints.run = RunDirectory(f"{folder.name}/run")
        group.folders.append(folder)  # goes with the process
        trainer.metrics = trainer.saver.parts["metrics"] = type(trainer.metrics)([])
        for number in SIGNALS:  # rank 0 says when to stop
            signal.signal(number, signal.SIG_IGN)
        logging.getLogger("crosscode").setLevel(logging.ERROR)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    group.barrier()  # until all have looked at the run directory, nobody writes to it


class SharedSource:
    """Batches of rank 0 on all ranks (`ActivationSource`); the others read no activations."""

    def __init__(self, group: Group, data: Any, device: torch.device):
        self.group, self.data, self.device = group, data, device
        self._scaling_MP: Tensor | None = None

    @property
    def scaling_MP(self) -> Tensor:
        if self._scaling_MP is None:
            self._scaling_MP = self._from_first(lambda: self.data.scaling_MP, torch.device("cpu"))
        assert self._scaling_MP is not None
        return self._scaling_MP

    def __iter__(self) -> Iterator[Tensor]:
        batches = iter(self.data) if self.group.is_first else iter(())
        while (acts_BMPD := self._from_first(lambda: next(batches, None), self.device)) is not None:
            yield acts_BMPD

    def _from_first(self, give: Any, device: torch.device) -> Tensor | None:
        """What rank 0 is given; None is. Stops on all ranks where a signal came to rank 0."""
        header, given = self._header(), None
        if self.group.is_first and not header[0] and (given := give()) is not None:
            given = given.to(device).contiguous()
            header[:3] = torch.tensor([1, _DTYPES.index(given.dtype), given.dim()])
            header[3 : 3 + given.dim()] = torch.tensor(given.shape)
        kind, code, n_dims, *shape = self._agreed(header)
        if kind == 0:
            return None
        if given is None:
            given = torch.empty(shape[:n_dims], dtype=_DTYPES[code], device=device)
        return self.group.broadcast_(given)

    def _header(self) -> Tensor:
        """Whether a signal came to rank 0, and room for what it sends else."""
        header = torch.zeros(8, dtype=torch.int64)
        if self.group.is_first and (name := pending()) is not None:
            header[:2] = torch.tensor([2, SIGNALS.index(signal.Signals[name])])
        return header

    def _agreed(self, header: Tensor) -> list[int]:
        """That of rank 0; stops on all ranks where a signal came to it."""
        kind, code, *rest = self.group.broadcast_(header).tolist()
        if kind == 2:
            stop_all(signal.Signals(SIGNALS[code]).name)
        return [kind, code, *rest]

    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict() if self.group.is_first else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scaling_MP = None
        self.data.load_state_dict(state)

    def close(self) -> None:
        self.data.close()


class AlikeSource(SharedSource):
    """Batches that all ranks make of one harvest (`TokenShards`), each for itself."""

    @property
    def scaling_MP(self) -> Tensor:
        return self.data.scaling_MP

    def __iter__(self) -> Iterator[Tensor]:
        batches = iter(self.data)
        while self._agreed(self._header()) and (acts_BMPD := next(batches, None)) is not None:
            yield acts_BMPD
