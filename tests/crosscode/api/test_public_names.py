"""What `import crosscode` offers, and what it says before torch is imported."""

import inspect
import subprocess
import sys

import pytest

import crosscode
from crosscode.config.experiment import TrainConfig

NAMES = [name for name in dir(crosscode) if not name.startswith("__")]


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("crosscode.train(foo=1)", "train: unknown argument 'foo'; there are fields of train (n_tokens"),
        ("crosscode.train('demo', batchsize=1)", "train: unknown argument 'batchsize'; did you mean 'batch_size'?"),
        ("crosscode.train('x.npy', {}, tokeniser=1)", "train: unknown argument 'tokeniser'; did you mean 'tokenizer'?"),
        ("crosscode.train()", "train: nothing to train on"),
        ("crosscode.train(3)", "train: activations without a crosscoder"),
        ("crosscode.train('demo', batch_size=1, train={'batch_size': 2})", "'batch_size' is given twice"),
        ("crosscode.train('demo', batch_size=0)", "train.batch_size = 0: input should be greater than 0"),
        ("crosscode.train('demo', names=['a'])", "names: is for activations of your own"),
        ("crosscode.train('no such recipe')", "config: 'no such recipe' is neither a file nor a recipe"),
        ("crosscode.train('demo', crosscoder=None, seed=-1)", "seed = -1"),
    ],
)
def test_wrong_arguments_are_refused_before_torch_is_imported(call, message):
    code = f"""
import crosscode, sys
try:
    {call}
except crosscode.InputError as error:
    print(str(error))
print("torch" in sys.modules)
"""
    said, torch_is_there = fresh(code)
    assert message in said and torch_is_there == "False"


def test_the_rest_is_refused_soon_after():
    code = """
import sys, time, torch, transformers, datasets, crosscode
started = time.perf_counter()
for section in ({"type": "sae"}, {"type": "nope"}, {"type": "sae", "n_latents": 8, "activation": {"type": "topk", "kk": 3}}):
    try:
        crosscode.train(torch.zeros(100, 4), section)
    except crosscode.InputError as error:
        print(error)
print(time.perf_counter() - started)
"""
    *said, seconds = fresh(code)
    assert (
        "crosscoder.activation: required" in said[0] and "'nope'" in said[1] and "crosscoder.activation.kk" in said[2]
    )
    assert float(seconds) < 20  # a second on a machine that is not shared: measured by benches, not by tests


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_documented_with_its_signature(name):
    found = getattr(crosscode, name)
    if isinstance(found, str):
        return
    assert (found.__doc__ or "").strip(), f"crosscode.{name} has no docstring"
    is_made = inspect.isclass(found) and not inspect.isabstract(found) and not getattr(found, "_is_protocol", False)
    if is_made and not issubclass(found, BaseException):
        parameters = inspect.signature(found).parameters
        bare = {"args", "kwargs"} & parameters.keys()
        assert not bare, f"help(crosscode.{name}) shows no arguments: {parameters}"


def test_names_are_stated_once_and_exist():
    assert len(NAMES) > 80 and set(crosscode.__all__) | {"open"} == set(NAMES)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        crosscode.trian  # noqa: B018


def test_train_shows_the_fields_of_train():
    parameters = inspect.signature(crosscode.train).parameters
    assert set(TrainConfig.model_fields) < set(parameters) and list(parameters)[:2] == ["acts", "crosscoder"]
    assert parameters["batch_size"].default == TrainConfig.model_fields["batch_size"].default
