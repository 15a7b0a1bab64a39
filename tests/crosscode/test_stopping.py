"""Signals: the first finishes the step and saves, the second ends at once."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch

from crosscode.errors import Interrupted
from crosscode.evaluation.heldout import EvaluationResult
from crosscode.stopping import Stopped, StopSignals, interruptible, uninterrupted
from crosscode.trainers import update as update_module
from crosscode.trainers.progress import Progress
from crosscode.trainers.source import as_source


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_and_says_how_to_go_on(number, make_trainer, rows_of, monkeypatch):
    trainer = make_trainer(n_steps=10)
    clip = update_module.clip_grad_norm_

    def strike(*args):
        if trainer.step == 3:
            os.kill(os.getpid(), number)
        return clip(*args)

    monkeypatch.setattr(update_module, "clip_grad_norm_", strike)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=rf"{number.name} after step 4 of 10; .*train --resume .*run"):
        trainer.train()
    assert signal.getsignal(number) is before
    assert trainer.run.steps() == [4]
    assert [row["step"] for row in rows_of(trainer)] == [1, 2, 3, 4]
    assert not trainer.run.final.exists()


def test_handlers_are_put_back_whatever_happens():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(RuntimeError), StopSignals():
        assert signal.getsignal(signal.SIGTERM) not in before
        raise RuntimeError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_training_leaves_signals_alone(make_trainer):
    trainer = make_trainer(n_steps=2)
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.step == 2
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("numbers", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_a_second_signal_ends_the_process_by_that_signal(numbers):
    code = f"""
import os, signal
from crosscode.stopping import StopSignals
with StopSignals() as stop:
    os.kill(os.getpid(), signal.{numbers[0]})
    print(stop.received, flush=True)
    os.kill(os.getpid(), signal.{numbers[1]})
    print("still here", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.stdout.split() == [numbers[0]]
    assert done.returncode == -getattr(signal, numbers[1])
    assert "a second signal ends at once" in done.stderr


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("at", [2, 4])
def test_a_signal_within_an_evaluation_ends_it_at_once_and_saves(name, at, make_trainer):
    waited = []

    def evaluate(model, scaling_MP):
        if trainer.step == at:
            os.kill(os.getpid(), getattr(signal, name))
            waited.append(True)
        return EvaluationResult(1, 0.5, {"x0": 0.5}, 1.0, 1.0, 1.0, 0.0, [0.0])

    trainer = make_trainer(n_steps=4, evaluate_every=2, evaluate=evaluate)
    with pytest.raises(Interrupted, match=rf"{name} after step {at} of 4; continue with: crosscode train --resume"):
        trainer.train()
    assert not waited and trainer.run.steps()[-1] == at
    assert not (trainer.run.path / "summary.json").exists()
    assert trainer.run.final.exists() == (at == 4)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_signal_before_the_first_batch_leaves_no_trace(resumed, make_trainer):
    def batches():
        signal.raise_signal(signal.SIGINT)
        yield torch.zeros(64, 2, 1, 8)

    trainer = make_trainer(n_steps=4)
    trainer.data, trainer._resumed = as_source(batches()), resumed
    before = sorted(trainer.run.path.rglob("*"))
    with pytest.raises(Interrupted if resumed else KeyboardInterrupt):
        trainer.train()
    assert sorted(trainer.run.path.rglob("*")) == before and trainer.step == 0


def test_what_must_end_as_a_whole_is_not_interrupted():
    done = []
    with suppress(KeyboardInterrupt), StopSignals(), interruptible():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("whole")
        done.append("after")
    assert done == ["whole"]


def test_other_threads_are_stopped_where_they_begin_anew():
    found = []

    def work():
        try:
            with interruptible():
                found.append("went on")
        except Stopped:
            found.append("stopped")

    with StopSignals():
        signal.raise_signal(signal.SIGTERM)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == ["stopped"]


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_outside_of_training_a_signal_ends_a_command_with_one_line(name, code):
    program = f"""
import os, signal, sys, time
from crosscode.commands import cli
def wait(arguments):
    os.kill(os.getpid(), signal.{name})
    time.sleep(60)
cli._dispatch = wait
sys.exit(cli.main(["report"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", timeout=30)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1 and "stopped by" in done.stderr


def test_a_closed_pipe_of_the_log_does_not_end_a_run(make_trainer, monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        flush = isatty = lambda self: False

    trainer = make_trainer(n_steps=3)
    trainer.progress = Progress(3)
    monkeypatch.setattr(sys, "stderr", Closed())
    trainer.train()
    assert trainer.step == 3
