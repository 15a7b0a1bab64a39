"""A component's constructor is its config; a registry finds, checks and builds components by type."""

from __future__ import annotations

import inspect
from typing import Literal

import pytest
from pydantic import Field, PositiveInt

from crosscode.config.registry import Component, ConfigModel, Configured, Registry
from crosscode.errors import InputError


class Shared(ConfigModel):
    shared: float = 0.5


class Lamp(Configured):
    class Config(Shared):
        type: Literal["lamp"] = "lamp"
        watts: PositiveInt
        """power"""
        colour: Literal["red", "white"] = "white"
        switches: list[str] = Field(default=[])

    beside = ("room",)
    by_name = ("switches",)

    def setup(self) -> None:
        if self.watts > 100 and self.room == "cellar":
            raise InputError(f"{self.section}.watts = {self.watts}: too bright for a {self.room}")


@pytest.fixture
def lamps():
    registry = Registry("house.lamps.{type}", "crosscode.models.activations")
    registry.register(Lamp)
    return registry


def test_the_signature_is_that_of_the_config():
    parameters = inspect.signature(Lamp).parameters
    assert list(parameters) == ["watts", "room", "colour", "shared", "switches"]
    assert parameters["watts"].default is inspect.Parameter.empty and parameters["colour"].default == "white"
    assert parameters["switches"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["watts"].annotation is int


@pytest.mark.parametrize(
    "make",
    [
        lambda: Lamp(60, "hall", "red", 0.25),
        lambda: Lamp(60, room="hall", colour="red", shared=0.25),
        lambda: Lamp(shared=0.25, colour="red", room="hall", watts=60),
        lambda: Lamp.of(Lamp.Config(watts=60, colour="red", shared=0.25), room="hall"),
    ],
)
def test_fields_are_given_by_position_or_name_and_become_attributes(make):
    lamp = make()
    assert (lamp.watts, lamp.room, lamp.colour, lamp.shared, lamp.switches) == (60, "hall", "red", 0.25, [])
    assert lamp.config == Lamp.Config(watts=60, colour="red", shared=0.25)


def test_a_bad_field_is_named_with_its_value(lamps):
    with pytest.raises(InputError, match=r"^house.lamps.lamp.watts = -1: input should be greater than 0$"):
        Lamp(-1, "hall")
    with pytest.raises(InputError, match=r"watts = 0: .*; house.lamps.lamp.colour = 'blue': input should be 'red' or"):
        Lamp(0, "hall", "blue")
    with pytest.raises(InputError, match="watts = 200: too bright for a cellar"):
        Lamp(200, "cellar")


@pytest.mark.parametrize("arguments", [{}, {"watts": 60}, {"watts": 60, "room": "hall", "size": 3}])
def test_missing_and_unknown_arguments_are_those_of_any_call(arguments):
    with pytest.raises(TypeError):
        Lamp(**arguments)


@pytest.mark.parametrize("wrap", [dict, lambda values: Component(**values), lambda values: Lamp.Config(**values)])
def test_a_registry_builds_from_plain_values_or_configs(lamps, wrap):
    lamp = lamps.build(wrap({"type": "lamp", "watts": 60}), room="hall")
    assert isinstance(lamp, Lamp) and lamp.watts == 60 and lamp.room == "hall"


def test_a_registry_names_what_it_cannot_build(lamps):
    with pytest.raises(InputError, match=r"house.lamps: unknown type 'lamb' \(did you mean 'lamp'\?\)"):
        lamps.build({"type": "lamb", "watts": 60}, room="hall")
    with pytest.raises(InputError, match=r"^house.lamps.lamp.volts: unknown field \(value 3\)"):
        lamps.build({"type": "lamp", "watts": 60, "volts": 3}, room="hall")
    with pytest.raises(InputError, match=r"^attic.watts = 'x': input should be an integer"):
        lamps.resolve({"type": "lamp", "watts": "x"}, "attic")


def test_a_constructor_of_its_own_is_refused():
    with pytest.raises(TypeError, match=r"Candle.__init__: arguments are the fields of Config"):

        class Candle(Configured):
            def __init__(self, wax: int):
                self.wax = wax


def test_one_class_may_stand_behind_several_types():
    class DeskConfig(ConfigModel):
        type: Literal["desk"] = "desk"

    class ShelfConfig(ConfigModel):
        type: Literal["shelf"] = "shelf"

    furniture = Registry("furniture", "crosscode.models.activations")

    @furniture.register
    class Wood:
        Configs = (DeskConfig, ShelfConfig)

    assert list(furniture) == ["desk", "shelf"]
    assert furniture["desk"] is furniture["shelf"] is Wood
    assert furniture.config_class("shelf") is ShelfConfig

    with pytest.raises(ValueError, match="two classes register as furniture 'shelf'"):

        @furniture.register
        class Glass:
            Config = ShelfConfig
