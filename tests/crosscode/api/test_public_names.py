"""What `import crosscode` offers, and what it says before torch is imported."""

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest
import torch

import crosscode
from crosscode.config.data import TokenPolicy
from crosscode.config.experiment import TrainConfig

NAMES = [name for name in dir(crosscode) if not name.startswith("__")]


def fresh(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


WRONG = {
    "crosscode.train(foo=1)": "train: unknown argument 'foo'; there are fields of train (n_tokens",
    "crosscode.train('demo', batchsize=1)": "train: unknown argument 'batchsize'; did you mean 'batch_size'?",
    "crosscode.train('x.npy', {}, tokeniser=1)": "train: unknown argument 'tokeniser'; did you mean 'tokenizer'?",
    "crosscode.train('x.npy', {}, lr=1e-3)": "did you mean train.optimizer.lr? As in optimizer={'lr': 0.001}",
    "crosscode.train('demo', k=3)": "did you mean crosscoder.activation.k? As in crosscoder={'activation': {'k': 3}}",
    "crosscode.train('demo', every=3)": "did you mean evaluation.every or train.resample.every? As in evaluation={'every': 3}",
    "crosscode.train('demo', train={'lr': 1e-3})": "train.lr: unknown field (value 0.001); did you mean train.optimizer.lr?",
    "crosscode.train('x.npy', {}, hookpoints=['a'])": "hookpoints = ['a']: is for runs that harvest",
    "crosscode.train('demo', 3)": "crosscoder: int: beside a config it must be fields of its section",
    "crosscode.train('demo', {'n_latents': 0})": "crosscoder.n_latents = 0",
    "crosscode.train()": "train: nothing to train on",
    "crosscode.train(3)": "train: activations without a crosscoder",
    "crosscode.train('demo', batch_size=1, train={'batch_size': 2})": "'batch_size' is given twice",
    "crosscode.train('demo', batch_size=0)": "train.batch_size = 0: input should be greater than 0",
    "crosscode.train('demo', names=['a'])": "names: is for activations of your own",
    "crosscode.train('no such recipe')": "config: 'no such recipe' is neither a file nor a recipe",
    "crosscode.train('demo', crosscoder=None, seed=-1)": "seed = -1",
}


def test_wrong_arguments_are_refused_before_torch_is_imported():
    code = f"""
import crosscode, sys
for call in {list(WRONG)!r}:
    try:
        eval(call)
    except crosscode.InputError as error:
        print(str(error))
    assert "torch" not in sys.modules, call
"""
    for message, said in zip(WRONG.values(), fresh(code), strict=True):
        assert message in said


def test_the_rest_is_refused_before_anything_slow_is_imported():
    code = """
import sys, torch, crosscode
for section in ({"type": "sae"}, {"type": "nope"}, {"type": "sae", "n_latents": 8, "activation": {"type": "topk", "kk": 3}}):
    try:
        crosscode.train(torch.zeros(100, 4), section)
    except crosscode.InputError as error:
        print(error)
print(sorted({"transformers", "datasets", "pandas", "matplotlib", "transformer_lens", "torch._inductor"} & {*sys.modules}))
"""
    said = fresh(code)
    assert (
        "crosscoder.activation: required" in said[0] and "'nope'" in said[1] and "crosscoder.activation.kk" in said[2]
    )
    assert said[3] == "[]"


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


# ---- help() of each


def described(cls):
    """What a class and its bases of ours say, with the strings below their fields."""
    ours = [base for base in cls.__mro__ if base.__module__.startswith("crosscode")]
    return "\n".join((base.__doc__ or "") + "".join(attribute_docs(base)) for base in ours)


def attribute_docs(cls):
    """`name: what stands below it` of each field that has a string below it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    for field, below in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield f"{ast.unparse(field.target)}: {below.value.value}\n"


def of_ours(name):
    """Functions and properties that a public class has from its own or our other classes."""
    for base in getattr(crosscode, name).__mro__:
        if base.__module__.startswith("crosscode"):
            for member, found in vars(base).items():
                made = getattr(found, "__func__", getattr(found, "fget", getattr(found, "func", found)))
                if inspect.isfunction(made) and not member.startswith("_"):
                    yield member, made


CLASSES = [name for name in NAMES if inspect.isclass(getattr(crosscode, name))]
PROTOCOLS = [name for name in CLASSES if getattr(getattr(crosscode, name), "_is_protocol", False)]


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_member_says_what_it_does(name):
    promised = {member for each in PROTOCOLS for member, made in of_ours(each) if made.__doc__}
    promised |= {"extra_repr", "forward"} if issubclass(getattr(crosscode, name), torch.nn.Module) else set()
    promised |= {member for member, made in of_ours(name) if made.__doc__}  # an override of one that says it
    assert {member for member, made in of_ours(name) if not made.__doc__} - promised == set()


@pytest.mark.parametrize("name", [name for name in NAMES if callable(getattr(crosscode, name))])
def test_every_argument_is_explained(name):
    found = getattr(crosscode, name)
    is_class = inspect.isclass(found)
    if getattr(found, "_is_protocol", False) or (is_class and issubclass(found, BaseException)):
        return
    said = described(found) if is_class else found.__doc__
    if name in ("train", "TokenSequenceLoader"):  # which take the fields of a config, where they are explained
        said += "".join(f"{field}\n" for config in (TrainConfig, TokenPolicy) for field in config.model_fields)
    own = {"args", "kwargs", "type"}
    parameters = {name for name in inspect.signature(found).parameters if not name.startswith("_")} - own
    assert {one for one in parameters if not re.search(rf"\b{one}\b", said)} == set()


@pytest.mark.parametrize("name", ["Adam", "TopkActivation", "L1Term", "TrainConfig", "LinearRamp", "UnitNormDecoder"])
def test_help_of_what_a_config_names_has_its_fields(name):
    found = getattr(crosscode, name)
    fields = getattr(found, "Config", found).model_fields
    for field, info in fields.items():
        assert field == "type" or f"{field}: {' '.join(info.description.split())}" in found.__doc__


# ---- shapes, units, errors

SHAPE = re.compile(r"_[A-Z][A-Za-z]*\b|[(\[][A-Z.][A-Za-z.]*(, [A-Z][a-z]?)*,?[)\]]|[Ss]calar")
"""A name that ends in axes, axes in brackets, or a scalar."""
SIZE = re.compile(r"_every$|_steps?$|_tokens?$|_size$|_length$|_workers$|_mb$|_gb$|^(seconds|sizes|k|capacity|window)$")
UNIT = re.compile(r"token|step|byte|second|sequence|row|latent|activation|batch|thread|process|document|MB|GB|MiB|GiB")


def is_tensor(annotation):
    """A tensor, or several, but not latents, whose own type says what they hold."""
    return re.search(r"\b(Tensor|ndarray)\b", str(annotation)) is not None


def members(name):
    """`label, function, all that help() says of it`, for each function, and for what a class has and inherits."""
    found = getattr(crosscode, name)
    if not inspect.isclass(found):
        yield name, found, found.__doc__ or ""
        return
    said = {}
    for base in found.__mro__:
        if base.__module__.startswith("crosscode"):
            for member, thing in vars(base).items():
                made = getattr(thing, "__func__", getattr(thing, "fget", getattr(thing, "func", thing)))
                if inspect.isfunction(made) and (member == "__call__" or not member.startswith("_")):
                    first, docs = said.get(member, (made, ""))
                    said[member] = (first, f"{docs}\n{made.__doc__ or ''}")
    for promise in map(dict, ([(member, made) for member, made in of_ours(each)] for each in PROTOCOLS)):
        if promise.keys() <= said.keys():
            said |= {member: (said[member][0], f"{said[member][1]}\n{promise[member].__doc__}") for member in promise}
    yield from ((f"{name}.{member}", made, docs) for member, (made, docs) in said.items())
    if "__init__" in vars(found) and name not in PROTOCOLS and not issubclass(found, BaseException):
        yield f"{name}.__init__", vars(found)["__init__"], described(found)


def without_shapes(label, made, said):
    """Tensors among the arguments and results of a function of which nothing says the shape."""
    signature = inspect.signature(made)
    for parameter in (one for one in signature.parameters.values() if not one.name.startswith("_")):
        about = "\n".join(line for line in said.splitlines() if re.search(rf"\b{parameter.name}\b", line))
        if is_tensor(parameter.annotation) and not (SHAPE.search(parameter.name) or SHAPE.search(about)):
            yield f"{label}: {parameter.name}"
    if is_tensor(signature.return_annotation) and not (SHAPE.search(label) or SHAPE.search(said)):
        yield f"{label}: what it returns"


CALLABLE = [name for name in NAMES if callable(getattr(crosscode, name))]


@pytest.mark.parametrize("name", CALLABLE)
def test_every_tensor_says_its_shape(name):
    missing = {one for member in members(name) for one in without_shapes(*member)}
    found = getattr(crosscode, name)
    for base in found.__mro__ if inspect.isclass(found) else ():
        if base.__module__.startswith("crosscode"):
            docs = (base.__doc__ or "") + "".join(attribute_docs(base))
            for field, annotation in vars(base).get("__annotations__", {}).items():
                about = "\n".join(line for line in docs.splitlines() if re.search(rf"\b{field}\b", line))
                if is_tensor(annotation) and not (field.startswith("_") or SHAPE.search(field) or SHAPE.search(about)):
                    missing.add(f"{name}.{field}")
    assert missing == set()


def raised(made):
    """Exceptions of ours or Python's own that stand in the function itself."""
    is_written = not made.__code__.co_filename.startswith("<")  # a dataclass makes its own
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(made)) if is_written else "")):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
            if (
                error.endswith(("Error", "NonFiniteLoss", "OutOfMemory", "Interrupted"))
                and error != "NotImplementedError"
            ):
                yield error


@pytest.mark.parametrize("name", CALLABLE)
def test_every_error_is_announced(name):
    found = getattr(crosscode, name)
    of_class = described(found) if inspect.isclass(found) else ""
    silent = {
        f"{label}: {error}"
        for label, made, said in members(name)
        for error in raised(made)
        if error not in said + of_class and not re.search(r"\bsetup$", label)
    }
    assert silent == set()


@pytest.mark.parametrize("name", CALLABLE)
def test_every_size_says_its_unit(name):
    bare = set()
    for label, made, said in members(name):
        said += "".join(attribute_docs(TrainConfig)) if name == "train" else ""
        for parameter in inspect.signature(made).parameters.values():
            counts = re.search(r"\b(int|float|Count)\b", str(parameter.annotation)) and not is_tensor(
                parameter.annotation
            )
            if counts and SIZE.search(parameter.name) and not UNIT.search(parameter.name):
                about = [line for line in said.splitlines() if re.search(rf"\b{parameter.name}\b", line)]
                if not any(UNIT.search(line) for line in about):
                    bare.add(f"{label}: {parameter.name}")
    fields = getattr(getattr(found := getattr(crosscode, name), "Config", found), "model_fields", {})
    for field, info in fields.items():
        if SIZE.search(field) and not UNIT.search(f"{field} {info.description}"):
            bare.add(f"{name}: {field}")
    assert bare == set()
