"""Whether anybody answers at the hub is asked once, at once, and never where that would tell nothing."""

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from crosscode.data import hub
from crosscode.data.harvest.loading import load_skeleton
from crosscode.data.text.sources import load_documents
from crosscode.errors import InputError
from crosscode.interop.hub import fetch, foreign, push


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """What is asked; as if nothing were known yet, with nobody there."""
    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    hub.look_for_hub.cache_clear()
    yield asked
    hub.look_for_hub.cache_clear()


def test_an_unreachable_hub_is_one_line_and_asked_once(asked):
    for load in (load_documents, fetch, load_skeleton, lambda name: foreign(Path(name)), lambda name: push(name, {})):
        with pytest.raises(InputError) as refused:
            load("nobody/nothing")
        line = str(refused.value)
        assert "nobody/nothing" in line and constants.ENDPOINT in line and len(line.splitlines()) == 1
        assert "HF_HUB_OFFLINE" not in line  # which was set here, not by the user
    assert asked == [("huggingface.co", 443)] and constants.is_offline_mode()


def test_a_hub_that_answers_is_used_as_it_is(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.undo()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "getproxies", dict)
        assert hub.look_for_hub() is None and not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("setting", ["offline", "proxy"])
def test_nothing_is_asked_where_that_would_tell_nothing(setting, asked, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", setting == "offline")
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:80"} if setting == "proxy" else {})
    assert hub.look_for_hub() is None and not asked


def test_a_name_server_that_is_silent_does_not_hold_anything_up(monkeypatch):
    from threading import Event

    silent = Event()
    monkeypatch.setattr(hub, "SECONDS", 0.05)
    monkeypatch.setattr(socket, "create_connection", lambda *args: silent.wait(10) and socket.socket())
    assert hub.look_for_hub() is not None
    silent.set()
