"""What a compiled kernel needs and how wide it loads, read from the binary: registers, spills, load widths.

NVIDIA figures come from the cubin (`cuobjdump`, `nvdisasm` of the Triton wheel) and the PTX, AMD figures from the assembly.
A hot load is one through an argument in `HOT`: those that are whole matrices.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Protocol

import triton
from static_loops import loop_facts

HOT = ("W_ptr", "rows_ptr", "dy_ptr", "residual_ptr", "y_ptr", "x_ptr", "h_ptr", "da_ptr")
"""Arguments that are whole matrices. The target in the decode is not among them: one row for the k rows gathered."""
LISTS = ("SCREEN", "HAS_LIST")
"""Flags of kernels that gather single elements through a list of candidates (vectors): only their tiles are hot."""
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Job(Protocol):
    """What is asked of a compilation here: its arguments' kinds, and its compile-time constants."""

    @property
    def signature(self) -> tuple[tuple[str, str], ...]: ...
    @property
    def constants(self) -> tuple[tuple[str, Any], ...]: ...


def _places(ttgir: str) -> dict[str, tuple[str, int]]:
    """File and line of each location alias; of an inlined call, the place within the callee."""
    aliases = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))

    def resolve(text: str) -> tuple[str, int]:
        if place := re.match(r'"([^"]+)":(\d+):\d+', text):
            return place[1], int(place[2])
        inner = re.search(r"#loc\d*", text)
        return resolve(aliases[inner[0]]) if inner and inner[0] in aliases else ("", 0)

    return {alias: resolve(text) for alias, text in aliases.items()}


def hot_places(ttgir: str, job: Job) -> set[tuple[str, int]]:
    """Where the loads from hot arguments stand, as the layout passes left it."""
    places = _places(ttgir)
    sources: dict[str, str] = {}
    gathers = any(name in LISTS and value for name, value in job.constants)
    hot: set[tuple[str, int]] = set()
    for line in ttgir.splitlines():
        defined = re.match(r"\s*(%[\w.]+) = \S+ (%[\w.]+)", line)
        if defined:
            sources[defined[1]] = defined[2]
        load = re.search(r"(?:tt\.load|async_copy_global_to_local|buffer_load\S*) (%[\w.]+).* loc\((#loc\d*)\)$", line)
        if load is None:
            continue
        pointer = load[1]
        while pointer in sources:
            pointer = sources[pointer]
        is_tile = re.search(r"tensor<\d+x\d+x", line) is not None
        is_scalar = "tensor<" not in line
        if pointer.lstrip("%") in HOT and not is_scalar and (is_tile or not gathers):
            hot.add(places[load[2]])
    return hot


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BIN / tool, *arguments], check=True, capture_output=True, text=True).stdout


_WIDTH = {"": 32, ".U8": 8, ".S8": 8, ".U16": 16, ".S16": 16, ".64": 64, ".128": 128}
_PTX_LOAD = re.compile(r"ld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bsuf](\d+) .*?\[ *(%rd\d+)")
_PTX_COPY = re.compile(r"cp\.async\.\w+\.shared\.global.*?\[.*?\], *\[ *(%rd\d+)[^,]*, *(\w+)")


def ptx_hot_widths(ptx: str, job: Job) -> list[int]:
    """Widths of the loads whose address is computed from a hot argument; gathers of single elements left out."""
    pointers = [name for name, kind in job.signature if kind != "constexpr"]
    gathers = any(name in LISTS and value for name, value in job.constants)
    defined_by: dict[str, set[str]] = {}
    params: dict[str, str] = {}
    loads: list[tuple[str, int]] = []
    for line in ptx.splitlines():
        if param := re.search(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            params[param[1]] = pointers[int(param[2])] if int(param[2]) < len(pointers) else ""
        elif load := _PTX_LOAD.search(line):
            loads.append((load[3], int(load[1] or 1) * int(load[2])))
        elif copy := _PTX_COPY.search(line):
            loads.append((copy[1], int(copy[2], 0) * 8))
        elif assigned := re.match(r"\s*(?:@\S+\s+)?\w[\w.]*\s+(%rd\d+), *(.*);", line):
            defined_by.setdefault(assigned[1], set()).update(re.findall(r"%rd\d+", assigned[2]))
    widths = []
    for address, width in loads:
        seen, todo = set(), [address]
        while todo:
            register = todo.pop()
            if register not in seen:
                seen.add(register)
                todo.extend(defined_by.get(register, ()))
        reached = {params[register] for register in seen if register in params}
        if reached & set(HOT) and not (gathers and width < 128):
            widths.append(width)
    return widths


def cubin_facts(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    kinds = [re.search(r"\.(U8|S8|U16|S16|64|128)\b", load) for load in re.findall(r"\bLDG(?:STS)?\.E\S*", sass)]
    return {
        "registers": numbers["REG"],
        "spills": numbers["LOCAL"] + numbers["STACK"] + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "load_widths": sorted({_WIDTH[f".{kind[1]}" if kind else ""] for kind in kinds}),
        **loop_facts(sass)._asdict(),
    }


_AMD_WIDTH = {"ubyte": 8, "sbyte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32, "dwordx2": 64,
              "dwordx3": 96, "dwordx4": 128, "b128": 128, "b64": 64, "b32": 32, "u16": 16, "d16": 16}  # fmt: skip


def amd_facts(assembly: str, hot: set[tuple[str, int]]) -> dict[str, Any]:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    files = re.findall(r'\.file\s+(\d+)\s+"([^"]*)"\s+"([^"]+)"', assembly)
    paths = {int(number_): f"{folder}/{name}" for number_, folder, name in files}
    here: tuple[str, int] = ("", 0)
    widths: list[int] = []
    hot_widths: list[int] = []
    for line in assembly.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            here = (paths.get(int(place[1]), ""), int(place[2]))
        elif load := re.match(r"\s*(?:global|buffer)_load_(?:lds_)?(\w+)", line):
            width = _AMD_WIDTH.get(load[1].split("_")[0], 32)
            widths.append(width)
            if here in hot:
                hot_widths.append(width)
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "scalar_spills": number("sgpr_spill_count"),
        "load_widths": sorted(set(widths)),
        "hot_widths": sorted(set(hot_widths)),
    }
