"""What a user sees while a run goes on, on a terminal and without one."""

import logging

import pytest

from crosscode.trainers import progress
from crosscode.trainers.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is the time."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_plain_lines_come_every_ten_seconds_with_figures_and_time_left(clock, capsys):
    with Progress(4000) as bar:
        bar.start(0)
        clock.now += 300  # the shuffle buffer fills: no part of the pace
        for step in range(1, 101):
            clock.now += 0.5
            bar.advance({"loss": 12.345, "fvu": 0.25, "l0": 32.0} if step > 50 else {})
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "step 0/4000  waiting for the first batch"
    assert lines[0] == "step 1/4000"
    assert lines[1] == "step 21/4000  2.0 steps/s  33:10 left"
    assert lines[-1] == "step 81/4000  2.0 steps/s  32:40 left  loss 12.35  fvu 0.2500  l0 32.0"
    assert len(lines) == 5


def test_the_last_step_and_the_evaluation_after_it_have_lines(clock, capsys):
    with Progress(12) as bar:
        bar.start(10)
        for _ in range(2):
            clock.now += 3
            bar.advance({"l0": 1.0})
        with bar.during("evaluate"):
            pass
    assert capsys.readouterr().err.splitlines()[1:] == [
        "step 12/12  3.0 s/step  0:00 left  l0 1.0",
        "step 12/12  evaluate",
    ]


def test_work_of_unknown_length_has_no_time_left_and_counts_from_its_first_report(clock, capsys):
    with Progress(None, what="harvest", unit="activation") as bar:
        for done in (1000, 2000, 5000):
            bar.show(done, "0.01 GiB")
            clock.now += 10
    assert capsys.readouterr().err.splitlines() == [
        "activation 2000  100.0 activations/s  0.01 GiB",
        "activation 5000  200.0 activations/s  0.01 GiB",
    ]


def test_more_than_was_asked_for_is_the_end(clock, capsys):
    with Progress(150, unit="activation") as bar:
        for done in (100, 200):
            bar.show(done, "")
            clock.now += 2
    assert capsys.readouterr().err == "activation 200/150  50.0 activations/s  0:00 left\n"


def test_on_a_terminal_there_is_one_bar_and_warnings_do_not_break_it(monkeypatch, capsys, caplog):
    monkeypatch.setattr(progress, "_is_terminal", lambda: True)
    with Progress(3) as bar:
        bar.start(1)
        for _ in range(2):
            bar.advance({"loss": 0.5})
        with bar.during("evaluate"):
            logging.getLogger("crosscode").warning("look")
    shown = capsys.readouterr().err
    assert "3/3" in shown and "loss 0.5" in shown and "evaluate" in shown
    assert "look" in caplog.text


def test_nothing_is_shown_where_nothing_was_asked_for(monkeypatch, capsys):
    for terminal in (True, False):
        monkeypatch.setattr(progress, "_is_terminal", lambda terminal=terminal: terminal)
        with Progress(1, enabled=False) as bar:
            bar.start(0)
            bar.advance({})
            with bar.during("evaluate"):
                pass
    assert capsys.readouterr().err == ""


def test_work_that_cannot_count_says_for_how_long(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.001)
    with progress.at_work("export"):
        while "export  0:00\n" not in (said := capsys.readouterr().err):
            assert not said.strip("\n")
