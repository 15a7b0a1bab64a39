"""Components chosen by name in a config: activations, initialisations, loss terms, schedules, optimizers.

A component is one class in one file. It carries its own `Config` (what a user may set, with meanings and defaults) and
registers itself under the `type` of that config; `discover` finds every file of a folder, so no other file lists it.
Its constructor takes the fields of that `Config`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Self, TypeVar, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from crosscode.config.checked import checked
from crosscode.config.counts import as_count, members_of
from crosscode.config.hints import REGISTERED
from crosscode.errors import InputError, short

T = TypeVar("T", bound=type)
ClassT = TypeVar("ClassT", bound=type)


LARGEST = 3.4e38


def _check_printable(text: str) -> str:
    if not text or re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError(f"= {short(text)}: must not be empty, nor have control characters")
    return text


Printable = Annotated[str, AfterValidator(_check_printable)]
"""Names and paths: they are printed, and stand in files."""


class ConfigModel(BaseModel):
    """Base of every config: frozen; an unknown field is an error, and so are a number that is not finite, or not in float32,
    and true in place of one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        cls.__doc__ = with_fields(vars(cls).get("__doc__"), cls)

    @model_validator(mode="after")
    def _no_size_of_nothing(self) -> Self:
        """A number that no tensor or file can have is said here, rather than by whatever meets it first."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"{name} = {value}: must be below 2**63")
            if isinstance(value, float) and abs(value) > LARGEST:
                raise ValueError(f"{name} = {value}: must be below {LARGEST}, the largest number of float32")
        return self

    @model_validator(mode="before")
    @classmethod
    def _read_counts(cls, values: Any) -> Any:
        """`1e6`, `2.5M` or `64k` where an integer is wanted."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        for name, value in values.items():
            if isinstance(value, bool) and name in fields:
                allowed = {*members_of(fields[name].annotation)}
                if bool not in allowed and allowed & {int, float}:
                    raise ValueError(f"{name} = {value}: must be a number")
        return {
            name: as_count(value)
            if isinstance(value, str) and name in fields and int in members_of(fields[name].annotation)
            else value
            for name, value in values.items()
        }


FIELDS = "\n\nFields:\n"


def with_fields(doc: str | None, config: type[BaseModel]) -> str | None:
    """A docstring for `help()`, and what the fields of a config mean below it."""
    fields = {name: info.description for name, info in config.model_fields.items() if name != "type"}
    if not doc or FIELDS in doc or not fields:
        return doc
    lines = [f"    {name}: {' '.join((text or '').split())}" for name, text in fields.items()]
    return inspect.cleandoc(doc) + FIELDS + "\n".join(lines)


class NamedByPath(ConfigModel):
    """What has a `path`: text in its place is that path."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Component(BaseModel):
    """A component that is not resolved yet: its `type` and whatever else was given. `Registry.resolve` checks it."""

    model_config = ConfigDict(frozen=True, extra="allow")
    type: str


def type_of(config_class: type[BaseModel]) -> str:
    """The name under which a component's config is chosen: the default of its `type` field."""
    return config_class.model_fields["type"].default


# ---- components


class Configured:
    """Base of everything that a config names. The constructor takes the fields of `Config`, by position or by name:
    those that must be given, then `beside`, then those with a default.

    A subclass has no `__init__`: the checked fields are its attributes (and `config` holds them all); what it makes of
    them, it makes in `setup`.
    """

    Config: ClassVar[type[ConfigModel]]
    section: ClassVar[str] = ""
    """where a config names it, for messages; set by `Registry.register`"""
    beside: ClassVar[tuple[str, ...]] = ()
    """required arguments of the constructor that are no fields"""
    by_name: ClassVar[tuple[str, ...]] = ()
    """fields with a default that the constructor takes by name only"""
    config: Any

    def __init__(self, *args: Any, **kwargs: Any):
        given = inspect.signature(type(self)).bind(*args, **kwargs).arguments
        beside = {name: given.pop(name) for name in self.beside}
        self._start(checked(self.Config, given, self.section), **beside)

    @classmethod
    def of(cls, config: ConfigModel, **beside: Any) -> Self:
        """From a config that was checked before."""
        made = cls.__new__(cls)
        made._start(config, **beside)
        return made

    def _start(self, config: ConfigModel, **beside: Any) -> None:
        self.config = config
        fields = {name: getattr(config, name) for name in type(config).model_fields if name != "type"}
        self.__dict__.update(beside | fields)
        self.setup()

    def setup(self) -> None:
        """Make what follows from the fields; refuse what does not fit together."""

    @classmethod
    def type_name(cls) -> str:
        """The `type` by which a config chooses it."""
        return type_of(cls.Config)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            raise TypeError(f"{cls.__name__}.__init__: arguments are the fields of Config; make the rest in `setup`")
        if "Config" in cls.__dict__:
            cls.__doc__ = with_fields(cls.__doc__, cls.Config)
            cls.__signature__ = _signature(cls)  # pyright: ignore[reportAttributeAccessIssue]

    if TYPE_CHECKING:  # fields are attributes, but type checkers cannot know which

        def __getattr__(self, name: str) -> Any: ...


def _signature(cls: type[Configured]) -> inspect.Signature:
    """What must be given comes first; fields shared through a config that is no component's come last."""
    fields = {name: field for name, field in cls.Config.model_fields.items() if name != "type"}
    bases = [base for base in cls.Config.__mro__[1:] if issubclass(base, BaseModel)]
    shared = {name for base in bases if "type" not in base.model_fields for name in base.model_fields}

    def parameter(name: str) -> inspect.Parameter:
        field = fields.get(name)
        default = inspect.Parameter.empty
        if field is not None and not field.is_required():
            default = field.get_default(call_default_factory=True)
        annotation = inspect.Parameter.empty if field is None else field.annotation
        kind = inspect.Parameter.KEYWORD_ONLY if name in cls.by_name else inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(name, kind, default=default, annotation=annotation)

    required = [name for name, field in fields.items() if field.is_required()]
    optional = [name for name in fields if name not in required]
    optional.sort(key=lambda name: (name in cls.by_name, name in shared))
    return inspect.Signature([parameter(name) for name in (*required, *cls.beside, *optional)])


def _configs_of(cls: Any) -> dict[str, Any]:
    return {type_of(config_class): config_class for config_class in getattr(cls, "Configs", None) or (cls.Config,)}


class Registry(Generic[T]):
    """Classes of one kind by name, e.g. all activations. `section` is where a config names one, `{type}` its name."""

    def __init__(self, section: str, package: str):
        self.section = section
        self._package = package
        self._classes: dict[str, T] = {}

    def register(self, cls: ClassT) -> ClassT:
        """Class decorator; the class must have a nested `Config` with a literal `type`, or several as `Configs`."""
        for name in _configs_of(cls):
            if self._classes.get(name, cls).__qualname__ != cls.__qualname__:
                raise ValueError(f"two classes register as {self.section} {name!r}: {self._classes[name]} and {cls}")
            cls.section = self.section.format(type=name)  # pyright: ignore[reportAttributeAccessIssue]
            self._classes[name] = cls  # pyright: ignore[reportArgumentType]
            REGISTERED.add((cls.section, name))  # pyright: ignore[reportAttributeAccessIssue]
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
            section = self.section.removesuffix(".{type}")
            raise InputError(f"{section}: unknown type {name!r}{hint}; available: {', '.join(sorted(self._classes))}")
        return self._classes[name]

    def config_class(self, name: str) -> Any:
        """The `Config` that is chosen by this `type`."""
        return _configs_of(self[name])[name]

    def config_classes(self) -> dict[str, type[BaseModel]]:
        return {name: self.config_class(name) for name in self}

    def config_union(self) -> Any:
        """The type of a config field that takes any component of this kind, told apart by `type`."""
        members = tuple(self.config_classes().values())
        if len(members) == 1:
            return members[0]
        return Annotated[Union[members], Field(discriminator="type")]  # noqa: UP007

    def resolve(self, component: BaseModel | Mapping[str, Any], section: str | None = None) -> Any:
        """Check an unresolved component, or plain values, against its class; a resolved one passes through.
        `section`: where it stands, if not where others of its kind do."""
        if isinstance(component, BaseModel) and not isinstance(component, Component):
            return component
        values = component.model_dump() if isinstance(component, BaseModel) else component
        section = section or self.section.format(type=values["type"])
        return checked(self.config_class(values["type"]), values, section)

    def build(self, config: BaseModel | Mapping[str, Any], **beside: Any) -> Any:
        """An object from its config, resolved or not."""
        config = self.resolve(config)
        return self[config.type].of(config, **beside)  # pyright: ignore[reportAttributeAccessIssue]
