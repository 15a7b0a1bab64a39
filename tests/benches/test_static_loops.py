"""What is read from the disassembly of a kernel's hottest loop."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def loop_facts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches"))
    from static_loops import loop_facts  # pyright: ignore[reportMissingImports]

    return loop_facts


def sass(*lines: str) -> str:
    return "\n".join(
        line if line.startswith(".") else f"        /*{i:04x}*/    {line} ;" for i, line in enumerate(lines)
    )


LOAD, OTHER = "LDG.E.128 R8, desc[UR4][R2.64]", "@P0 LDG.E.128 R12, desc[UR4][R4.64+0x200]"
USE, OTHER_USE, BACK = "FADD R20, R9.reuse, R20", "FADD R21, R14, R21", "@!P0 BRA `(.L_x_1)"


@pytest.mark.parametrize(
    ("body", "in_flight", "per_byte"),
    [
        ((LOAD, USE, BACK), 1, 3 / 16),
        ((LOAD, USE, OTHER, OTHER_USE, BACK), 1, 5 / 32),
        ((LOAD, OTHER, USE, OTHER_USE, BACK), 2, 5 / 32),
        # The second is used in the next iteration only: it is on its way while the first is.
        ((OTHER_USE, OTHER, LOAD, USE, BACK), 2, 5 / 32),
        ((LOAD, "LDG.E.U16 R30, desc[UR4][R6.64]", USE, BACK), 1, 4 / 18),
        (("LDGSTS.E.128 [R2], desc[UR4][R4.64]", "DEPBAR.LE SB0, 0x2", "LDS.128 R8, [R3]", BACK), 3, 4 / 16),
    ],
)
def test_of_the_loop_that_loads_most(loop_facts, body, in_flight, per_byte):
    text = sass(LOAD, OTHER, ".L_x_0:", "LDG.E R1, desc[UR4][R2.64]", "@P1 BRA `(.L_x_0)", ".L_x_1:", *body, "EXIT")
    assert loop_facts(text) == (in_flight, round(per_byte, 2), None)


def test_a_kernel_without_loops_is_taken_whole(loop_facts):
    assert loop_facts(sass(LOAD, OTHER, USE, OTHER_USE, "EXIT", ".L_x_2:", "BRA `(.L_x_2)")) == (
        2,
        round(6 / 32, 2),
        None,
    )
    assert loop_facts(sass("STG.E.128 desc[UR4][R2.64], R8", "EXIT")) == (None, None, None)


def test_of_the_loop_around_it_what_is_in_no_loop_counts(loop_facts):
    short = (".L_x_0:", "LDG.E R1, desc[UR4][R2.64]", "@P1 BRA `(.L_x_0)")
    text = sass(
        OTHER,
        ".L_x_2:",
        "MOV R1, R2",
        *short,
        ".L_x_1:",
        LOAD,
        USE,
        BACK,
        "IADD R2, R2, 1",
        "@P2 BRA `(.L_x_2)",
        "EXIT",
    )
    assert loop_facts(text) == (1, round(3 / 16, 2), 3)
