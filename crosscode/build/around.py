"""A run around a model that was not trained in it: read from another library, or converted.

Axes: M models · P hookpoints · D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosscode.build.experiment import open_experiment
from crosscode.build.heldout import AnyExperiment
from crosscode.build.replacing import check_may_begin
from crosscode.build.run import model_metadata
from crosscode.build.schema import check_config, dump_config
from crosscode.config.experiment import ExperimentConfig
from crosscode.errors import InputError
from crosscode.evaluation.heldout import EvaluationResult
from crosscode.models import ARCHITECTURES, BaseCrosscoder
from crosscode.models.checkpoint import model_config
from crosscode.runs.directory import RunDirectory
from crosscode.runs.metrics import Metrics
from crosscode.trainers.summary import summary


def section_of_model(model: BaseCrosscoder, n_models: int, n_hookpoints: int, width: int) -> dict[str, Any]:
    """The section `crosscoder` that describes a model.

    Raises:
        InputError: it does not read activations of these dimensions.
    """
    kinds = [name for name in ARCHITECTURES if ARCHITECTURES[name] is type(model)]
    fitting = [name for name in kinds if ARCHITECTURES.config_class(name).split.reads(n_models, n_hookpoints)]
    wanted = type(model).dims_for(n_models, n_hookpoints, width)
    found = {name: getattr(model, name) for name in wanted}
    if not fitting or wanted != found:
        raise InputError(
            f"crosscoder: the model has {found}, but acts of {n_models} model(s), {n_hookpoints} hookpoint(s) and width "
            f"{width} need {wanted}"
        )
    fields = ARCHITECTURES.config_class(fitting[0]).model_fields
    return {
        "type": fitting[0],
        **{name: value for name, value in model_config(model).items() if name in fields},
        "init": {"type": "given"},
    }


def values_around(values: Mapping[str, Any], model: BaseCrosscoder, run_dir: Path) -> dict[str, Any]:
    """The values of a config, with this model as what it trained. Its activations come from where they came from."""
    config = check_config(
        {
            **values,
            "crosscoder": {"type": "sae", "n_latents": 1, "activation": {"type": "relu"}, "init": {"type": "given"}},
        }
    )
    width = model.d_in
    section, activation = section_of_model(model, *config.n_positions(), width), model.activation_fns[0]
    architecture = ARCHITECTURES.config_class(section["type"])
    of_activation = activation.usual_init if architecture.takes_init_of_activation else None
    section["init"] = {"type": of_activation or architecture.usual_init}
    objective = {name: {} for name in activation.usual_terms}
    return {**values, "run_dir": str(run_dir), "crosscoder": section, "objective": objective, "constraints": {}}


def checked_around(values: Mapping[str, Any]) -> ExperimentConfig:
    """The config of these values.

    Raises:
        InputError: the folder may not be written to.
    """
    config = check_config(values)
    if config.run_path().is_dir() and any(config.run_path().iterdir()):
        raise InputError(f"out = {str(config.run_path())!r}: is there already; name a new folder")
    check_may_begin(config)
    return config


def open_around(values: Mapping[str, Any], model: BaseCrosscoder) -> AnyExperiment:
    """The experiment of these values.

    Raises:
        InputError: the folder may not be written to, or the activations are of another width than the model.
    """
    experiment = open_experiment(checked_around(values), to_train=False)
    section_of_model(model, *experiment.dims)
    return experiment


def write_run_around(
    config: ExperimentConfig, model: BaseCrosscoder, experiment: AnyExperiment, made_by: str
) -> EvaluationResult:
    """Evaluate the model, and write a finished run that holds it; nothing, where that fails."""
    model = model.to(experiment.device)
    result = experiment.evaluate(model)
    run = RunDirectory(config.run_path())
    run.create_later(dump_config(config), lambda: None, made_by=made_by)
    try:
        with run.held():
            run.begin()
            experiment.keep_heldout_in(run.path)
            model.save(run.final, model_metadata(experiment), max_shard_size=config.train.max_shard_size)
            run.write_evaluation(result.to_json())
            counts = {"step": 0, "tokens": 0, "seconds": 0.0}
            run.write_summary(summary(model, counts, Metrics([]), experiment.output_names(), result))
    except BaseException:
        run.undo()
        raise
    return result
