"""Ops are found by their folders, each with one door that is public, and nothing else lists them.

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import crosscode_kernels
import pytest
import torch
from crosscode_kernels import Backend, OpSet, encode_topk, resolve_backend, sparse_decode
from crosscode_kernels.opset import door, find_ops

KERNELS = Path(__file__).parents[3] / "kernels"
SOURCES = sorted((KERNELS / "crosscode_kernels").rglob("*.py"))
OPS = dict(find_ops())


def python_blocks(page: Path, containing: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in blocks if containing in block]


def run(code: str, **variables: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "", **variables}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", OPS)
def test_a_door_is_public_and_documented(name):
    op = getattr(crosscode_kernels, name)
    assert op is OPS[name] and inspect.isfunction(op) and name in crosscode_kernels.__all__
    assert op.__module__ == f"crosscode_kernels.{name}"
    page = sys.modules[op.__module__].__doc__ or ""
    assert page.startswith(f"{name}: ") and "Axes: " in page and "Errors (ValueError)" in page + (op.__doc__ or "")
    backend = inspect.signature(op).parameters["backend"]
    assert backend.kind is backend.KEYWORD_ONLY and backend.default == "auto"


def test_doors_are_functions_whichever_part_is_imported_first():
    code = (
        "from crosscode_kernels.encode_topk.torch_impl import dense_preacts\n"
        "import crosscode_kernels.jumprelu\n"
        "from crosscode_kernels import encode_topk, jumprelu\n"
        "assert callable(encode_topk) and callable(jumprelu)\n"
    )
    run(code)


def test_the_page_serves_a_model_of_ones_own():
    (code,) = python_blocks(KERNELS / "README.md", "from crosscode_kernels import")
    assert len(code.strip().splitlines()) <= 16
    names: dict[str, object] = {}
    exec(code, names)
    assert names["loss"].item() > 0
    for weight in ("W_enc_LI", "W_dec_LI"):
        rows = names[weight].grad.abs().sum(1)
        assert rows.isfinite().all() and 0 < rows.count_nonzero() <= rows.shape[0]


def test_a_door_resolves_names_by_the_tensors_at_hand(make_problem):
    p = make_problem(6, 8, 40, 5)
    ops = resolve_backend("torch", "cpu")
    bound = ops.sparse_decode(ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 3), p.W_dec_LO, p.b_dec_O)
    for backend in ("auto", "torch", Backend("torch")):
        latents = encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, k=3, backend=backend)
        assert torch.equal(sparse_decode(latents, p.W_dec_LO, p.b_dec_O, backend=backend), bound)
    reference = encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, k=3, backend="reference")
    torch.testing.assert_close(reference.to_dense(), latents.to_dense())
    with pytest.raises(ValueError, match="backend is 'cuda'; must be one of auto"):
        encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, k=3, backend="cuda")
    with pytest.raises(ValueError, match="'torch:screened' is not available on cpu"):
        encode_topk(p.x_BI.double(), p.W_enc_LI.double(), None, k=3, backend="torch:screened")


def test_an_op_set_has_what_the_doors_have():
    ops = OpSet(Backend("reference"))
    assert {name for name, value in vars(ops).items() if callable(value)} == set(OPS)
    with pytest.raises(AttributeError, match="encode_top"):
        ops.encode_top  # noqa: B018


def test_two_doors_of_one_name_are_refused():
    def encode_topk() -> None: ...

    with pytest.raises(ValueError, match="op 'encode_topk' is there twice"):
        door(encode_topk)


def test_a_new_op_is_one_folder(tmp_path):
    (example,) = python_blocks(KERNELS / "README.md", "@door")
    folder = tmp_path / "soft_threshold"
    folder.mkdir()
    (folder / "__init__.py").write_text(example, encoding="utf-8")
    code = (
        "import crosscode_kernels as k, torch\n"
        f"k.__path__.append({str(tmp_path)!r})\n"
        "ops = k.resolve_backend('torch', 'cpu')\n"
        "h_BL = torch.tensor([[-1.0, 0.3, 2.0]])\n"
        "print(ops.soft_threshold(h_BL, 0.5).tolist())\n"
    )
    assert run(code) == "[[0.0, 0.0, 1.5]]\n"


def signatures(source: str) -> list[tuple[str, ...]]:
    """Name, and names and types of the parameters, of every function with two or more. `backend` and a context, which
    all have, do not count, nor does the language of Triton."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            typed = [ast.unparse(a) for a in arguments if a.annotation and a.arg not in ("backend", "ctx")]
            if len(typed) >= 2 and "tl.constexpr" not in " ".join(typed):
                found.append((node.name, *typed))
    return found


def test_no_signature_is_written_more_than_twice():
    # At the door and in one implementation, or as the same kernel of two backends.
    assert signatures("def f(x_BI: Tensor, k: int, *, backend: B = 1): ...") == [("f", "x_BI: Tensor", "k: int")]
    counts = Counter(one for path in SOURCES for one in signatures(path.read_text(encoding="utf-8")))
    assert len(counts) > 80
    assert {one: n for one, n in counts.items() if n > 2} == {}


@pytest.mark.parametrize("name", OPS)
def test_what_a_door_takes_is_listed_at_the_door(name):
    own = signatures(inspect.getsource(OPS[name]))
    others = [path for path in SOURCES if path != Path(inspect.getfile(OPS[name]))]
    elsewhere = [path for path in others if set(own) & set(signatures(path.read_text(encoding="utf-8")))]
    assert [path.name for path in elsewhere] in ([], ["reference.py"])


def test_nothing_names_an_op_but_its_folder_and_those_that_use_it():
    # What is generic must not know any op: a list somewhere is a list to forget.
    generic = ["__init__", "backend", "checks", "encoder", "opset", "registration", "sparse"]
    for module in generic:
        tree = ast.parse((KERNELS / "crosscode_kernels" / f"{module}.py").read_text(encoding="utf-8"))
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not (strings | names) & set(OPS), module
