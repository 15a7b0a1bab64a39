"""Absurd values are said at the field that holds them, before anything is loaded."""

import pytest

from crosscode.build.schema import check_config
from crosscode.errors import InputError


def changed(values, path, value):
    *sections, name = path.split(".")
    for section in sections:
        values = values[int(section) if section.isdigit() else section]
    values[name] = value


@pytest.mark.parametrize(
    ("path", "value", "right"),
    [
        ("train.optimizer.lr", 1e300, "must be below 3.4e\\+38"),
        ("objective.recon.weight", 1e39, "must be below 3.4e\\+38"),
        ("crosscoder.init.dec_init_norm", 1e300, "must be below 3.4e\\+38"),
        ("crosscoder.activation.k", True, "must be a number"),
        ("train.batch_size", True, "must be a number"),
        ("train.optimizer.lr", False, "must be a number"),
        ("data.validation_fraction", False, "must be a number"),
        ("data.source.path", "", "must not be empty"),
        ("data.source.path", "a\0b", "nor have control characters"),
        ("language_models.0.path", "", "must not be empty"),
        ("language_models.0.device", "", "must not be empty"),
        ("language_models.0.revision", "a\nb", "nor have control characters"),
        ("finetune_from", "", "must not be empty"),
        ("data.cache", {"path": "\0"}, "nor have control characters"),
    ],
)
def test_absurd_values_are_named(path, value, right, tiny_config):
    changed(tiny_config, path, value)
    with pytest.raises(InputError, match=rf"{path.replace('.', '[.]')}\b.*{right}") as refused:
        check_config(tiny_config)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("value", [-1e3, 1e3, True])
def test_a_threshold_that_float32_does_not_hold(value, tiny_config):
    tiny_config["crosscoder"]["activation"] = {"type": "jumprelu", "log_threshold_init": value}
    with pytest.raises(InputError, match=r"crosscoder[.]activation[.]log_threshold_init = "):
        check_config(tiny_config)


@pytest.mark.parametrize("folder", ["", "a\0b"])
def test_a_run_directory_without_a_name(folder, tiny_config, tmp_path, capfd):
    import yaml

    from crosscode.commands.cli import main

    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tiny_config | {"run_dir": folder}))
    assert main(["train", str(file)]) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "run_dir" in said[0]
