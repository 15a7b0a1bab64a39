"""Fields that are known without torch, for hints."""

from crosscode.build.schema import experiment_class
from crosscode.config import hints
from crosscode.config.checked import field_paths
from crosscode.config.experiment import ExperimentConfig
from crosscode.config.hints import component_fields, component_types, likely_fields


def test_all_fields_are_those_of_the_resolved_config():
    known = {*component_fields(), *field_paths(ExperimentConfig)}
    real = set(field_paths(experiment_class()))
    assert known <= real
    # Not read: what is deeper than a component's own fields.
    deeper = {path for path in real - known if not path.endswith(".type")}
    assert all(".weight." in path or path.startswith("crosscoder.partition.") for path in deeper), deeper


def test_the_same_name_elsewhere_comes_before_another_name_here():
    known = ["lr", "train.log_every", "train.optimizer.lr", "data.batch_size"]
    assert likely_fields("train.lr", known) == ["lr", "train.optimizer.lr"]
    assert likely_fields("train.logevery", known) == ["train.log_every"]
    assert likely_fields("train.batchsize", known) == ["data.batch_size"]
    assert likely_fields("train.none_of_them", known) == []


def test_types_of_components_are_known_without_torch_and_those_of_ones_own_once_registered(monkeypatch):
    assert {"topk", "relu"} <= {*component_types("crosscoder.activation")} and "sae" in component_types("crosscoder")
    assert component_types("objective.auxk") == ["auxk"] and component_types("house.lamps") == []
    monkeypatch.setattr(hints, "REGISTERED", {("crosscoder", "mine")})
    assert "mine" in component_types("crosscoder")
