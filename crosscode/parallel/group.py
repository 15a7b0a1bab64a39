"""The processes that `torchrun` started, what they tell each other, and how a gradient passes through it.

Axes: R rows · L latents.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from crosscode.config.parallel import ParallelConfig
from crosscode.errors import rank_lost
from crosscode.stopping import is_first as is_first
from crosscode.stopping import n_ranks as n_ranks

PATIENCE = timedelta(seconds=60)
"""How long a process waits for the others to begin."""
BYTES_AT_ONCE = 64 << 20
"""Of a tensor that goes through host memory."""


class Group:
    """All ranks. `bytes_sent` counts what this one has sent in `n_calls`, where collectives go round a ring."""

    def __init__(self, timeout: timedelta = dist.default_pg_timeout) -> None:
        if (own := int(os.environ.get("LOCAL_RANK", "0"))) < torch.cuda.device_count():  # else all of it is on CPUs
            torch.cuda.set_device(own)
        if not dist.is_initialized():
            with _said_in_one_line():
                _meet("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout)
        self._begin(dist.get_rank(), dist.get_world_size())

    def _begin(self, rank: int, size: int) -> None:
        self.rank, self.size, self.bytes_sent, self.n_calls = rank, size, 0, 0
        self.folders: list[Any] = []

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def bounds(self, n_rows: int, rank: int | None = None) -> tuple[int, int]:
        """The rows that a rank holds, `start` and `stop`: as many as the others, or one less."""
        rank = self.rank if rank is None else rank
        return rank * n_rows // self.size, (rank + 1) * n_rows // self.size

    def most_rows(self, n_rows: int) -> int:
        return -(-n_rows // self.size)

    def _carry(self, collective: Any, *arguments: Any) -> None:
        self.n_calls += 1
        with _said_in_one_line():
            collective(*arguments)

    def all_reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        self._carry(dist.all_reduce, tensor, op)
        self.bytes_sent += 2 * tensor.nbytes * (self.size - 1) // self.size
        return tensor

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """That of each rank; all have one shape."""
        tensor = tensor.detach().contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._carry(dist.all_gather, parts, tensor)
        self.bytes_sent += tensor.nbytes * (self.size - 1)
        return parts

    def exchange(self, tensor: Tensor) -> Tensor:
        """Of each rank the share of its rows that stands where this rank does among all; one behind the other. All have one
        shape, of which the ranks divide the first size."""
        mixed = torch.empty_like(tensor := tensor.detach().contiguous())
        self._carry(dist.all_to_all_single, mixed, tensor)
        self.bytes_sent += tensor.nbytes * (self.size - 1) // self.size
        return mixed

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """That of rank 0."""
        self._carry(dist.broadcast, tensor, 0)
        self.bytes_sent += tensor.nbytes * self.is_first
        return tensor

    def rows_of_all(self, rows_R: Tensor, n_rows: int) -> Tensor:
        """The rows of all ranks in their order, `n_rows` of them, of which this rank holds those of `bounds`."""
        padded_R = rows_R.new_zeros(self.most_rows(n_rows), *rows_R.shape[1:])
        padded_R[: rows_R.shape[0]] = rows_R
        sizes = [stop - start for start, stop in (self.bounds(n_rows, rank) for rank in range(self.size))]
        return torch.cat([part[:size] for part, size in zip(self.all_gather(padded_R), sizes, strict=True)])

    def objects_of_all(self, known: Any) -> list[Any]:
        """Of each rank what it knows, as Python objects: for what is exchanged once."""
        of_all: list[Any] = [None] * self.size
        self._carry(dist.all_gather_object, of_all, known)
        return of_all

    def barrier(self) -> None:
        self.all_reduce_(torch.zeros(1))

    def pieces(self, rows_R: Tensor, n_rows: int, rank: int, *, sent: bool = True) -> Iterator[tuple[int, Tensor]]:
        """The rows that `rank` holds of `n_rows`, on the CPU in pieces `(first row, rows...)` of bounded size: where they are
        `sent`, on rank 0, else on that rank; elsewhere nothing."""
        start, stop = self.bounds(n_rows, rank)
        step = max(1, BYTES_AT_ONCE * rows_R.shape[0] // max(1, rows_R.nbytes))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            if self.rank == rank:
                piece = rows_R[first - start : last - start].cpu().contiguous()
                if self.is_first or not sent:
                    yield first, piece
                    continue
                with _said_in_one_line():
                    dist.send(piece, 0)
                self.bytes_sent += piece.nbytes
            elif self.is_first and sent:
                piece = torch.empty(last - first, *rows_R.shape[1:], dtype=rows_R.dtype)
                with _said_in_one_line():
                    dist.recv(piece, rank)
                yield first, piece


def _meet(backend: str, timeout: timedelta) -> None:
    """As `init_process_group`, at a place of its own for each attempt of `torchrun --max-restarts`: its store outlives the
    processes, and in it new ones would find the addresses of those that have ended."""
    store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    apart = dist.PrefixStore(f"attempt {attempt}", store)  # pyright: ignore[reportPrivateImportUsage]
    apart.set(f"here {rank}", "")
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not apart.check([f"here {other}" for other in range(size)]):  # not `wait`, which would hear no signal
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all of the {size} processes have come within {PATIENCE.total_seconds():.0f} s")
        time.sleep(0.05)
    apart.set_timeout(dist.default_pg_timeout)
    dist.init_process_group(backend, store=apart, rank=rank, world_size=size, timeout=timeout)


class PaperGroup(Group):
    """Of `size` processes that are not there: it counts, on tensors without content, what one of them would send."""

    def __init__(self, size: int) -> None:
        self._begin(size - 1, size)  # nobody has more rows

    def _carry(self, collective: Any, *arguments: Any) -> None:
        self.n_calls += 1


_group: Group | None = None


def joined(parallel: ParallelConfig | None = None) -> Group | None:
    """The group of this process, which waits for the others; None where it is alone. The first call says for how long what they
    do together may take."""
    global _group
    if _group is None and n_ranks() > 1:
        _group = Group() if parallel is None else Group(timedelta(minutes=parallel.timeout))
    return _group


@contextmanager
def _said_in_one_line() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise rank_lost(error) from error


# ---- what a gradient passes through


def _sum_of(group: Group, tensor: Tensor) -> Tensor:
    """Over ranks; NCCL takes what lies in order."""
    return group.all_reduce_(tensor.clone(memory_format=torch.contiguous_format))


class _Summed(torch.autograd.Function):
    """Forward the sum over ranks. The sum is the same everywhere, and so is its gradient: that of each summand."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        group, tensor = arguments
        return _sum_of(group, tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, grads[0]


class _Gathered(torch.autograd.Function):
    """Forward the rows of all ranks; backward the own rows of a gradient that is the same everywhere."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        group, rows_R, n_rows = arguments
        ctx.own = slice(*group.bounds(n_rows))
        return group.rows_of_all(rows_R, n_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, grads[0][ctx.own], None


class _Shared(torch.autograd.Function):
    """Forward tensors that are the same everywhere; backward the sum of what each rank does with them. One node for all of
    them, so that ranks sum up in one order."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.group, *tensors = arguments
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.needs_input_grad[1:], grads, strict=True)
        return None, *(
            ctx.group.all_reduce_(grad.clone(memory_format=torch.contiguous_format)) if needs else None
            for needs, grad in pairs
        )


def summed(group: Group, tensor: Tensor) -> Tensor:
    return _Summed.apply(group, tensor)


def gathered(group: Group, rows_R: Tensor, n_rows: int) -> Tensor:
    """The rows of all ranks in their order, `n_rows` of them."""
    return _Gathered.apply(group, rows_R, n_rows)


def shared(group: Group, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Each tensor, of which this rank uses a part; None stays."""
    there = iter(_Shared.apply(group, *(tensor for tensor in tensors if tensor is not None)))
    return [None if tensor is None else next(there) for tensor in tensors]
