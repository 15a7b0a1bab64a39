"""Components chosen by name in a config: activations, initialisations, loss terms, schedules, optimizers.

A component is one class in one file. It carries its own `Config` (what a user may set, with meanings and defaults) and
registers itself under the `type` of that config; `discover` finds every file of a folder, so no other file lists it.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Generic, TypeVar, Union

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crosscode.config.counts import as_count, members_of
from crosscode.errors import InputError

T = TypeVar("T", bound=type)
ClassT = TypeVar("ClassT", bound=type)


class ConfigModel(BaseModel):
    """Base of every config: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _read_counts(cls, values: Any) -> Any:
        """`1e6`, `2.5M` or `64k` where an integer is wanted."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            name: as_count(value)
            if isinstance(value, str) and name in fields and int in members_of(fields[name].annotation)
            else value
            for name, value in values.items()
        }


class Component(BaseModel):
    """A component that is not resolved yet: its `type` and whatever else was given. `Registry.resolve` checks it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    type: str


def type_of(config_class: type[BaseModel]) -> str:
    """The name under which a component's config is chosen: the default of its `type` field."""
    return config_class.model_fields["type"].default


class Registry(Generic[T]):
    """Classes of one kind by name, e.g. all activations."""

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self._package = package
        self._classes: dict[str, T] = {}

    def register(self, cls: ClassT) -> ClassT:
        """Class decorator; the class must have a nested `Config` with a literal `type`."""
        name = type_of(cls.Config)  # pyright: ignore[reportAttributeAccessIssue]
        if self._classes.get(name, cls).__qualname__ != cls.__qualname__:
            raise ValueError(f"two classes register as {self.kind} {name!r}: {self._classes[name]} and {cls}")
        self._classes[name] = cls  # pyright: ignore[reportArgumentType]
        return cls

    def discover(self) -> None:
        """Import every module of the package, so that each component has registered itself."""
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")

    def __iter__(self) -> Iterator[str]:
        self.discover()
        return iter(sorted(self._classes))

    def __getitem__(self, name: str) -> T:
        self.discover()
        if name not in self._classes:
            near = difflib.get_close_matches(name, self._classes, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise InputError(f"{self.kind}: unknown type {name!r}{hint}; available: {', '.join(sorted(self._classes))}")
        return self._classes[name]

    def config_classes(self) -> dict[str, type[BaseModel]]:
        return {name: self[name].Config for name in self}  # pyright: ignore[reportAttributeAccessIssue]

    def config_union(self) -> Any:
        """The type of a config field that takes any component of this kind, told apart by `type`."""
        members = tuple(self.config_classes().values())
        if len(members) == 1:
            return members[0]
        return Annotated[Union[members], Field(discriminator="type")]  # noqa: UP007

    def resolve(self, component: BaseModel) -> BaseModel:
        """Check an unresolved component against its class; a resolved one passes through."""
        if not isinstance(component, Component):
            return component
        return self[component.type].Config.model_validate(component.model_dump())  # pyright: ignore[reportAttributeAccessIssue]


def params_of(config: BaseModel) -> dict[str, Any]:
    """Constructor arguments in a component's config: its fields without `type`."""
    return {name: getattr(config, name) for name in type(config).model_fields if name != "type"}


def build_component(registry: Registry[Any], config: BaseModel, **extra: Any) -> Any:
    """An object from its config: `Class(**fields, **extra)`."""
    cls: Callable[..., Any] = registry[getattr(config, "type")]  # noqa: B009
    return cls(**params_of(registry.resolve(config)), **extra)
