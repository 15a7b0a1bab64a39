"""The pinned and the lowest versions resolve on every platform, as far as an index's metadata tells: nothing is installed.

    make check

Resolved are the commands that users run: crosscode alone, and with its extras `dev` and `docs`, with constraints.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
from packaging.version import Version

uv = pytest.importorskip("uv", reason="needs uv: pip install -c constraints.txt uv")
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PLATFORMS = {
    "Linux x86_64": "x86_64-manylinux_2_28",
    "Linux aarch64": "aarch64-manylinux_2_28",
    "macOS 14 arm64": "aarch64-apple-darwin",
}
PYTHONS = ["3.11", "3.13"]
# How uv says that it did not reach an index, or was told not to try.
NO_NETWORK = re.compile(
    r"error sending request|dns error|network was disabled|timed out|Connection re(fused|set)", re.I
)


def pins(text: str, relation: str = "==") -> dict[str, Version]:
    """Versions of `name==version` lines, by normalised name."""
    found = re.findall(rf"^([\w.-]+)(?:\[\w+\])?{relation}([\w.+!]+)", text, re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in found}


def constraints(name: str) -> dict[str, Version]:
    return pins((ROOT / name).read_text(encoding="utf-8"))


@cache
def run_uv(platform: str, python: str, constraints_file: str, *options: str) -> tuple[int, str, str]:
    command = [uv.find_uv_bin(), "pip", "compile", "pyproject.toml", "--no-header", "--no-annotate", "--no-config"]
    command += ["--quiet", "--python-version", python, "--python-platform", PLATFORMS[platform]]
    command += ["--only-binary", "torch", "--constraints", constraints_file, *options]
    environment = os.environ | {"MACOSX_DEPLOYMENT_TARGET": "14.0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    return done.returncode, done.stdout, done.stderr


def resolved(platform: str, python: str, constraints_file: str, *options: str) -> dict[str, Version]:
    """What would be installed. Skips the test where no index is reached."""
    code, output, errors = run_uv(platform, python, constraints_file, *options)
    if code and NO_NETWORK.search(errors):
        pytest.skip(f"no package index is reached from here: {errors.strip().splitlines()[-1].strip()}")
    assert code == 0, errors
    return pins(output)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_pinned_versions_resolve(platform, python):
    wanted = constraints("constraints.txt")
    versions = resolved(platform, python, "constraints.txt", "--extra", "dev")
    assert versions["torch"] == wanted["torch"]
    unused = {name for name in wanted if name not in versions}
    assert not unused, "pinned, but nothing asks for it"
    assert {name: versions[name] for name in wanted} == wanted


@pytest.mark.parametrize("platform", ["Linux x86_64", "Linux aarch64"])
def test_the_dev_extra_names_the_triton_that_torch_brings(platform):
    assert "triton" not in constraints("constraints.txt") | constraints("constraints-lowest.txt")
    assert not [line for line in PROJECT["dependencies"] if line.startswith("triton")]
    (named,) = (line for line in PROJECT["optional-dependencies"]["dev"] if line.startswith("triton"))
    brought = resolved(platform, "3.11", "constraints.txt")["triton"]
    assert named.partition(";")[0].strip() == f"triton=={brought}"


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_lowest_versions_resolve(platform):
    wanted = constraints("constraints-lowest.txt")
    versions = resolved(platform, "3.11", "constraints-lowest.txt")
    assert {name: version for name, version in versions.items() if name in wanted} == {
        name: version for name, version in wanted.items() if name in versions
    }


def test_the_lowest_versions_are_the_promised_ones():
    extras = PROJECT["optional-dependencies"]
    in_tests = (line for name in ("dev", "gguf", "peft") for line in extras[name])
    promised = pins("\n".join([*PROJECT["dependencies"], *in_tests]), ">=")
    assert {line.partition(">=")[0] for line in PROJECT["dependencies"]} <= set(promised), "a lower bound for each"
    lowest = constraints("constraints-lowest.txt")
    # Linters and the resolver say nothing about crosscode in use.
    for name in ("ruff", "pyright", "uv"):
        promised.pop(name)
    assert {name: lowest.get(name) for name in promised} == promised


def test_a_triton_that_torch_does_not_want_is_noticed(tmp_path):
    conflicting = tmp_path / "constraints.txt"
    conflicting.write_text((ROOT / "constraints.txt").read_text() + "triton==3.9.0\n")
    code, _, errors = run_uv("Linux x86_64", "3.11", str(conflicting))
    if NO_NETWORK.search(errors):
        pytest.skip("no package index is reached from here")
    assert code and "torch" in errors and "triton" in errors


def test_an_index_out_of_reach_is_told_from_a_conflict(tmp_path):
    code, _, errors = run_uv("Linux x86_64", "3.11", "constraints.txt", "--offline", "--cache-dir", str(tmp_path))
    assert code and NO_NETWORK.search(errors)
    assert not NO_NETWORK.search(
        "No solution found when resolving dependencies: torch==2.13.0 depends on triton==3.7.1"
    )
