"""Every format on disk: which versions are read, how an older one is brought forward, how earlier spellings are read.

To change a format, raise its `version` and add the step that makes the version before into it. A field that is new,
and whose absence means what its default says, needs no step: it goes into `defaults` (of a config: nothing to do).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from crosscode.errors import InputError

log = logging.getLogger("crosscode")

Content = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """One kind of file.

    Args:
        name: for messages.
        version: what is written; whatever `steps` lead from is read as well.
        key: the field that holds the version.
        unversioned: the version of content without that field; None: such content is refused.
        defaults: fields that content of the current version may lack, and what that means.
        steps: by version, what makes content of it into content of the next one.
    """

    name: str
    version: int
    key: str
    unversioned: int | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[int, Callable[[Content], Content]] = field(default_factory=dict)

    def stamp(self) -> dict[str, int]:
        """The field that says the version."""
        return {self.key: self.version}

    def read(self, content: Mapping[str, Any], where: str, error: type[InputError] = InputError) -> Content:
        """Content of the current version, from that of any version that is read.

        Raises:
            InputError: or `error`, for any other version. `where` is the file.
        """
        found = version = content.get(self.key, self.unversioned)
        content = dict(content)
        while isinstance(version, int) and version < self.version and version in self.steps:
            content, version = self.steps[version](content), version + 1
        if version != self.version:
            known = ", ".join(map(str, sorted({*self.steps, self.version})))
            raise error(f"{where}: {self.key} = {found!r}: this version reads a {self.name} of version {known}")
        return {**self.defaults, **content, **self.stamp()}


MODEL = Format("saved model", 1, "format_version")
STATE = Format("trainer state", 1, "format_version", unversioned=1, defaults={"rules": 1, "recent": None})
STATE_TENSORS = "trainer_state.safetensors"
STORE = Format(
    "store of activations",
    2,
    "version",
    defaults={"activation_dtype": "float32"},
    steps={1: lambda content: content},  # its shards have no labels
)
ROLLOUTS = Format("folder of rollouts", 1, "version")
RUN = Format("run directory", 1, "format")

# ---- configs: fields by dotted path, through mappings only

_OPTIONS = ("own_layer", "topk_scope", "n_shared_latents", "use_pre_bias")
RENAMED: dict[str, str] = {f"crosscoder.options.{name}": f"crosscoder.{name}" for name in _OPTIONS}
"""Earlier spelling -> today's."""
GONE: dict[str, Any] = {"crosscoder.options": {}, "crosscoder.shared_fraction": None}
"""Fields that are no more (or not of every architecture), each with the value that said nothing: with it they are passed
over."""


def today(values: Mapping[str, Any], where: str) -> Content:
    """The values of a config in today's spelling, with one warning where it was another. `where` is the file.

    Raises:
        InputError: both spellings of a field are given.
    """
    values = copy.deepcopy(dict(values))
    changed = []
    for path, new_path in RENAMED.items():
        holder, name = _holder(values, path)
        if name not in holder:
            continue
        new_holder, new_name = _holder(values, new_path, make=True)
        if new_name in new_holder:
            raise InputError(f"{where}: {path} is the earlier spelling of {new_path}: give one of the two")
        new_holder[new_name] = holder.pop(name)
        changed.append(f"{path} is {new_path} now")
    for path, nothing in GONE.items():
        holder, name = _holder(values, path)
        if name in holder and holder[name] == nothing:
            del holder[name]
    if changed:
        _warn_once(f"{where}: earlier spellings are read: {', '.join(changed)}")
    return values


def _holder(values: Any, path: str, *, make: bool = False) -> tuple[Content, str]:
    """The mapping in which a field would stand (an empty one, where there is none and none is made), and its name."""
    *parents, name = path.split(".")
    for parent in parents:
        values = values.setdefault(parent, {}) if make else values.get(parent)
        if not isinstance(values, dict):
            return {}, name
    return values, name


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)
