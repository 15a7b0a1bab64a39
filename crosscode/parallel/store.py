"""One store that ranks write: each harvests the sequences of its own shards, and no activation is sent.

Every rank reads and tokenizes the whole text, which is cheap, so that all know where each shard begins: rows, shards and their
bytes are those that one process writes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from crosscode.data.rows import harvest_usable
from crosscode.data.store.harvest import HarvestThroughStore
from crosscode.data.store.reader import ActivationCache
from crosscode.data.store.writer import ActivationCacheWriter
from crosscode.errors import RankLost, check_at_least
from crosscode.parallel.teams import Teams
from crosscode.stopping import check_not_stopped, interruptible, uninterrupted


def harvest_over_ranks(
    teams: Teams,
    through: HarvestThroughStore,
    *,
    max_rows: int | None = None,
    on_progress: Callable[[int, int], None],
) -> ActivationCache:
    """As `harvest_to_store`; shard i is that of team i modulo their number, whose first rank writes it.
    What of a shard is not whole when it stops is lost.

    Raises:
        RankLost: another rank has ended.
    """
    check_at_least(1, max_rows=max_rows)
    group = teams.group
    try:
        with _opened(teams, through) as writer:
            n_checked = writer.n_rows
            if n_checked:
                with interruptible():
                    ActivationCache(through.path, unfinished=True).verify(rows=group.bounds(n_checked))
            _write(teams, through, writer, max_rows, on_progress)
            group.barrier()  # the manifest comes after the last shard
        group.barrier()
    except RankLost as error:
        check_not_stopped()  # a signal came to all, and another rank was the first to leave
        raise RankLost(
            "another rank has ended or does not answer; whole shards are kept, and the same command goes on"
        ) from error
    return ActivationCache(through.path)


def _opened(teams: Teams, through: HarvestThroughStore) -> ActivationCacheWriter:
    """Rank 0 looks at the store first, mends and claims it."""
    group, token, writer = teams.group, torch.zeros(16, dtype=torch.uint8), None
    owns = lambda index: index % teams.n_teams * teams.size == group.rank  # noqa: E731
    group.barrier()  # until all have looked at what is there, nobody writes
    if group.is_first:
        writer = through.open_writer(owns=owns)
        writer.begin(through.harvested.token_loader.fresh().state_dict())
        token[: len(writer.token)] = torch.tensor([*writer.token.encode()], dtype=torch.uint8)
    group.broadcast_(token)
    return writer or through.open_writer(owns=owns, token=bytes(token.tolist()).rstrip(b"\0").decode())


def _write(
    teams: Teams,
    through: HarvestThroughStore,
    writer: ActivationCacheWriter,
    max_rows: int | None,
    on_progress: Callable[[int, int], None],
) -> None:
    tokens = through.harvested.token_loader.fresh()
    if writer.resume_state is not None:
        tokens.load_state_dict(writer.resume_state)
    n_rows, batches = writer.n_rows, iter(tokens)
    n_bytes = n_rows * writer.layout.row_bytes
    while not writer.finished and not writer.full and (max_rows is None or n_rows < max_rows):
        n_shards = writer.n_shards
        with interruptible():
            batch = next(batches, None)
            if batch is None:
                with uninterrupted():
                    writer.finish()
                return
            tokens_R = batch.tokens_HS[batch.mask_HS]
            labels = None if batch.labels is None else batch.labels[batch.mask_HS]
            is_ours = writer.n_shards % teams.n_teams == teams.team()
            acts_RMPD = harvest_usable(through.harvested.harvester, batch) if is_ours else None
        if acts_RMPD is None or not writer.is_own:
            writer.pass_over(len(tokens_R), tokens.state_dict(), tokens_R, labels)
        else:
            writer.append(acts_RMPD, tokens.state_dict(), tokens_R, labels)
        if not writer.full:
            n_rows += len(tokens_R)
            n_bytes += len(tokens_R) * writer.layout.row_bytes
        if acts_RMPD is not None:
            on_progress(n_rows, n_bytes)
        if writer.n_shards > n_shards and writer.n_shards % teams.n_teams == 0:
            teams.group.barrier()  # nobody is further ahead than one shard
            writer.forget_positions()
    writer.flush()
