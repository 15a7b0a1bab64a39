"""The arrows of the house: what may import what, and what importing must not do."""

import ast
import os
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Who may import whom: each room, and the rooms below it that it may reach. Single files (`recipes`: names of the YAML
# files) stand at the bottom, open to all.
MODELS_DOWN = {"models", "config"}
RUNS_DOWN = {"runs", "objectives", "data", *MODELS_DOWN}
TRAINERS_DOWN = {"trainers", "evaluation", *RUNS_DOWN}
BUILD_DOWN = {"build", "interop", "parallel", "demo", *TRAINERS_DOWN}
ARROWS = {
    "config": set(),
    "demo": set(),
    "models": {"config"},
    "data": {"config"},
    "objectives": MODELS_DOWN,
    "runs": MODELS_DOWN | {"data"},
    "evaluation": RUNS_DOWN,
    "trainers": RUNS_DOWN | {"evaluation"},
    "interop": RUNS_DOWN,
    "parallel": RUNS_DOWN,
    "analysis": MODELS_DOWN | {"runs"},
    "build": BUILD_DOWN - {"build"},
    "synthetic": BUILD_DOWN,
    "commands": BUILD_DOWN | {"analysis", "synthetic"},
    "api": BUILD_DOWN | {"analysis", "commands"},
}
OPEN_TO_ALL = {
    "checksums",
    "errors",
    "files",
    "formats",
    "groups",
    "recipes",
    "seeds",
    "stopping",
    "stored",
    "weight_files",
    "widths",
}

# What a fresh `import NAME` must not pull in from outside.
FORBIDDEN = {
    "crosscode": ["torch", "transformers", "datasets", "matplotlib"],
    "crosscode.config.experiment": ["torch", "transformers", "datasets"],
    "crosscode.config.registry": ["torch"],
    "crosscode_kernels": ["crosscode", "transformers", "datasets"],
    "crosscode.models": ["datasets", "transformers"],
    "crosscode.commands.cli": ["torch", "transformers"],
}


def imports(file: Path) -> set[str]:
    """Modules of ours that a file names in an import, wherever it stands in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith(("crosscode.", "crosscode_kernels."))}


def modules(root: Path) -> dict[str, Path]:
    """Files below a package's folder by dotted name."""
    names = {file: file.relative_to(root.parent).with_suffix("").parts for file in root.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): file for file, parts in names.items()}


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_arrows_point_one_way(room: str):
    wrong = {}
    for name, file in modules(ROOT / "crosscode" / room).items():
        reached = {target.split(".")[1] for target in imports(file) if target.startswith("crosscode.")}
        stray = reached - ARROWS[room] - OPEN_TO_ALL - {room}
        if stray:
            wrong[name] = sorted(stray)
    assert wrong == {}


def imported_files(file: Path, files: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports, for type checkers alone as well. A name that a package hands on counts as
    its `__init__`, a module by itself."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in files else node.module for name in names}
    return found & files.keys()


def test_no_circle_of_imports():
    files = modules(ROOT / "crosscode") | modules(ROOT / "kernels" / "crosscode_kernels")
    graph = {name: imported_files(file, files) for name, file in files.items()}
    assert "crosscode.models.base" in graph and graph["crosscode.models.base"] >= {"crosscode.models.folding"}
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the files


def test_a_circle_for_type_checkers_alone_is_found(tmp_path: Path):
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "a.py").write_text("from house import b\n")
    (tmp_path / "house" / "b.py").write_text("if TYPE_CHECKING:\n    from house.a import A\n")
    files = modules(tmp_path / "house")
    with pytest.raises(CycleError, match=r"house\.a.*house\.b|house\.b.*house\.a"):
        TopologicalSorter({name: imported_files(file, files) for name, file in files.items()}).prepare()


def test_every_room_has_its_arrows():
    rooms = {path.name for path in (ROOT / "crosscode").iterdir() if (path / "__init__.py").is_file()}
    assert rooms - OPEN_TO_ALL <= ARROWS.keys()


def run_python(code: str, **env: str) -> str:
    """Run code in a fresh process that sits in another folder."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=os.environ | env, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", FORBIDDEN)
def test_importing_stays_light(name: str):
    code = f"import sys, {name}; print('\\n'.join(sys.modules))"
    loaded = set(run_python(code).splitlines())
    assert name in loaded
    wrong = [module for module in FORBIDDEN[name] if module in loaded]
    assert not wrong, f"import {name} pulls in {wrong}"


def test_kernels_is_not_an_importable_package_of_ours():
    code = "import importlib.util as u; spec = u.find_spec('kernels'); print(spec and spec.origin)"
    assert str(ROOT) not in run_python(code)
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_import_writes_nothing_and_opens_no_connection(tmp_path: Path):
    code = """
import logging, socket, sys
def refuse(event, args):
    if event.startswith("socket.connect") or event == "socket.getaddrinfo":
        raise RuntimeError(f"network: {event} {args}")
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        raise RuntimeError(f"write: {args[0]}")
sys.dont_write_bytecode = True
sys.addaudithook(refuse)
import crosscode, crosscode.config.experiment
assert not logging.getLogger().handlers
print("ok")
"""
    assert run_python(code, HOME=str(tmp_path)) == "ok"
    assert not list(tmp_path.iterdir())


def test_public_names_are_importable_from_the_top():
    code = "import crosscode; print(all(getattr(crosscode, name) is not None for name in crosscode.__all__))"
    assert run_python(code) == "True"


def test_source_files_stay_small():
    files = [*ROOT.glob("crosscode/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert {name: n for name, n in lengths.items() if n > 330} == {}


def test_no_folder_of_tests_is_passed_over(pytestconfig):
    patterns = pytestconfig.getini("norecursedirs")
    parts = {part for file in (ROOT / "tests").rglob("test_*.py") for part in file.relative_to(ROOT).parts[:-1]}
    assert not [part for part in parts if any(fnmatch(part, pattern) for pattern in patterns)]
