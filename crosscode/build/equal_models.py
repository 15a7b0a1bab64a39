"""Whether there is a difference between language models at all, asked before anything is trained.

Axes: R rows that arrive together · M models · P hookpoints · D width.
"""

from __future__ import annotations

import logging
from contextlib import closing
from itertools import combinations

from torch import Tensor

from crosscode.build.heldout import AnyExperiment
from crosscode.data.rows import RowSource
from crosscode.errors import InputError

log = logging.getLogger("crosscode")

EQUAL = 1e-10
"""Squared difference, in the squared norm, up to which activations are called equal: a run on a GPU need not repeat them to
the bit."""


def check_models_differ(experiment: AnyExperiment, rows: RowSource) -> None:
    """Look at the first rows that train.

    Raises:
        InputError: all models have equal activations at all hookpoints, and `data.equal_models` is "stop". Where only some
            are equal, that is a warning.
    """
    n_models, n_hookpoints, _ = experiment.dims
    if n_models < 2:
        return
    with closing(rows.open_sample()) as sample:
        first = next(iter(sample), None)
    if first is None or not len(first.acts_RMPD):
        return
    places = experiment.config.position_names()
    names = [place.rpartition("/")[0] or place for place, *_ in places]
    hookpoints = [place.rpartition("/")[2] for place in places[0]]
    n_rows, equal = len(first.acts_RMPD), equal_places(first.acts_RMPD)
    if len(equal) == n_models * (n_models - 1) // 2 * n_hookpoints:
        found = f"{' and '.join(names)} have equal activations at {', '.join(hookpoints)} (on {n_rows} tokens)"
        if experiment.config.data.equal_models == "stop":
            raise InputError(
                f"no difference: {found}, so that there is nothing to find between them. Do they differ in "
                "later layers only? data.equal_models: train trains all the same"
            )
        log.warning("no difference: %s", found)
        return
    for a, b, p in equal:
        log.warning(
            "%s and %s have equal activations at %s: there they cannot differ", names[a], names[b], hookpoints[p]
        )


def equal_places(acts_RMPD: Tensor) -> list[tuple[int, int, int]]:
    """`(a, b, p)`: models a < b have equal activations at hookpoint p."""
    found = []
    for a, b in combinations(range(acts_RMPD.shape[1]), 2):
        difference_P = (acts_RMPD[:, a].double() - acts_RMPD[:, b].double()).square().sum((0, 2))
        norm_P = acts_RMPD[:, a].double().square().sum((0, 2))
        found += [(a, b, p) for p, is_equal in enumerate((difference_P <= EQUAL * norm_P).tolist()) if is_equal]
    return found
