"""The config with every component's own fields in place: what is checked, shown in the help, and written to a run."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union

from pydantic import BaseModel, Field, create_model

from crosscode.config.checked import checked
from crosscode.config.experiment import DEFAULT_ARCHITECTURE, CrosscoderConfig, ExperimentConfig, TrainConfig
from crosscode.config.reading import dump_yaml, read_trusted, read_yaml
from crosscode.config.registry import FIELDS, ConfigModel, Registry
from crosscode.data.store.place import absolute
from crosscode.models import ACTIVATIONS, ARCHITECTURES, INITIALIZATIONS
from crosscode.objectives import TERMS
from crosscode.trainers.constraints import CONSTRAINTS
from crosscode.trainers.optimizers import OPTIMIZERS

_FIRST = ("name", "run_dir", "overwrite")


def experiment_class() -> type[ExperimentConfig]:
    """`ExperimentConfig` with the fields of all components that are registered by now."""
    return _experiment_class(
        tuple(tuple(one.config_classes().items()) for one in (ACTIVATIONS, INITIALIZATIONS, OPTIMIZERS, CONSTRAINTS)),
        tuple(tuple(one.config_classes().items()) for one in (ARCHITECTURES, TERMS)),
    )


@cache
def _experiment_class(*registered: Any) -> type[ExperimentConfig]:
    components: dict[str, Any] = {
        "activation": (ACTIVATIONS.config_union(), _like(CrosscoderConfig, "activation")),
        "init": (INITIALIZATIONS.config_union(), _like(CrosscoderConfig, "init")),
    }
    # The default comes last: it is the one that the help shows.
    types = sorted(ARCHITECTURES, key=lambda name: name == DEFAULT_ARCHITECTURE)
    architectures = tuple(_resolved(ARCHITECTURES.config_class(name), components) for name in types)
    crosscoder: Any = Annotated[Union[architectures], Field(discriminator="type")]  # noqa: UP007
    adam = OPTIMIZERS["adam"].Config()
    train = create_model(
        "TrainConfig",
        __base__=TrainConfig,
        __doc__=TrainConfig.__doc__,
        optimizer=(OPTIMIZERS.config_union(), _like(TrainConfig, "optimizer", default=adam)),
    )
    constraints = _by_name("ConstraintsConfig", CONSTRAINTS)
    return create_model(
        "ExperimentConfig",
        __base__=ExperimentConfig,
        __doc__=ExperimentConfig.__doc__,
        crosscoder=(crosscoder, _like(ExperimentConfig, "crosscoder")),
        objective=(_by_name("ObjectiveConfig", TERMS), _like(ExperimentConfig, "objective")),
        constraints=(constraints, _like(ExperimentConfig, "constraints", default=constraints())),
        train=(train, _like(ExperimentConfig, "train")),
    )


def _resolved(architecture: type[BaseModel], components: dict[str, Any]) -> type[BaseModel]:
    """An architecture's `Config` with the fields of its components."""
    kind: Any = architecture.model_fields["type"]
    fields = {"type": (kind.annotation, _like(CrosscoderConfig, "type", default=kind.default)), **components}
    name = architecture.__qualname__.replace(".", "")
    return create_model(name, __base__=architecture, __doc__=architecture.__doc__, **fields)


def _by_name(class_name: str, registry: Registry[Any]) -> type[ConfigModel]:
    """A model with one optional field for each component of a registry."""
    fields: dict[str, Any] = {}
    for name, config_class in registry.config_classes().items():
        doc = " ".join((registry[name].__doc__ or "").partition(FIELDS)[0].split())
        fields[name] = (config_class | None, Field(default=None, description=doc))
    return create_model(class_name, __base__=ConfigModel, **fields)


def _like(model: type[BaseModel], field: str, **options: Any) -> Any:
    return Field(description=model.model_fields[field].description, **options)


def given_components(components: BaseModel | Mapping[str, Any]) -> dict[str, BaseModel]:
    """The components of an objective or of constraints that are set, by name."""
    return {name: config for name, config in dict(components).items() if config is not None}


# ---- from and to files


def load_config(config: str | Path) -> ExperimentConfig:
    """A checked config from a YAML file, a run directory or a recipe's name."""
    return check_config(read_yaml(config))


def load_own_config(run: str | Path, trust_remote_code: bool) -> ExperimentConfig:
    """The config of a run that is there, whoever made it; as `read_trusted`."""
    return check_config(read_trusted(run, trust_remote_code, is_of_run=True))


def check_config(values: Mapping[str, Any]) -> ExperimentConfig:
    """A resolved config from plain values.

    Raises:
        InputError: naming each bad field, its value and what is allowed.
    """
    return checked(experiment_class(), values)


def dump_config(config: ExperimentConfig) -> str:
    """YAML from which the same run can be made again, from any folder."""
    values = config.model_dump(mode="json")
    values["overwrite"] = False  # a permission for once, and no part of the run
    for section in ("objective", "constraints"):
        values[section] = {name: value for name, value in values[section].items() if value is not None}
    if config.finetune_from is not None and Path(config.finetune_from).expanduser().exists():
        values["finetune_from"] = str(Path(config.finetune_from).expanduser().resolve())
    for language_model in values["language_models"]:
        _make_model_absolute(language_model)
    _make_data_absolute(values["data"])
    return dump_yaml({name: values[name] for name in (*_FIRST, *values)})


def _make_data_absolute(data: dict[str, Any]) -> None:
    """Texts where they are; stores wherever they are going to be."""
    for source in (data["source"], data["heldout"]):
        for part in (source or {}).get("parts", [{"source": source}]):
            _make_source_absolute(part["source"] or {"type": None})
        for file in [*(source or {}).get("files", ()), *(source or {}).get("heldout_files", ())]:
            _make_absolute(file)
    data["join"] = [absolute(path) for path in data["join"]]
    for store in [*data["stores"], *([data["cache"]] if data["cache"] else [])]:
        store["path"] = absolute(store["path"])


def _make_source_absolute(source: dict[str, Any]) -> None:
    if source["type"] == "local":
        _make_absolute(source)
    elif source["type"] == "rollouts":
        _make_source_absolute(source["prompts"])
        _make_model_absolute(source["model"])
        if source["folder"] is not None:
            source["folder"] = str(Path(source["folder"]).expanduser().resolve())


def _make_model_absolute(model: dict[str, Any]) -> None:
    _make_absolute(model)
    if model["adapter"] is not None:
        _make_absolute(model, "adapter")


def _make_absolute(values: dict[str, Any], name: str = "path") -> None:
    path = Path(values[name]).expanduser()
    if path.exists():
        values[name] = str(path.resolve())
