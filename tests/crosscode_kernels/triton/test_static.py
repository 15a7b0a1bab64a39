"""The static checks, as far as they fit into a test run: a compilation of every kernel, the traffic model's limit, and
its arithmetic against the tensors themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

BENCHES = Path(__file__).parents[3] / "benches"


@pytest.mark.parametrize(
    ("target", "kernels"),
    [("sm_90", []), ("gfx942", ["_row_select_kernel", "_sparse_decode_kernel", "_segment_rows_kernel"])],
    ids=["every kernel for sm_90", "the main ones for gfx942"],
)
def test_kernels_compile_without_spills_and_with_wide_loads(target, kernels, tmp_path):
    # One configuration each; `make bench-static` compiles all of them for all targets. The compiler needs a process in
    # which Triton does not interpret.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [
        sys.executable, str(BENCHES / "static_compile.py"), "--cases", "cpu-bench", "--targets", target,
        "--one-per-kernel", "--out", str(tmp_path), *(["--kernels", *kernels] if kernels else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "compile_matrix.json").read_text())
    assert len({row["kernel"] for row in rows}) == len(rows) >= (len(kernels) or 20)
    assert all(row["spills"] == 0 for row in rows)
    assert {tuple(row["hot_widths"]) for row in rows} <= {(), (128,)}
    assert sum(row["hot_widths"] == [128] for row in rows) >= (len(kernels) or 12)


def _plain_python(program: str) -> str:
    """Output of a program that imports the benches, in a process in which Triton does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(BENCHES)!r})\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_stored_matrix_is_clean_and_has_every_configuration_that_the_heuristics_choose():
    rows = json.loads((BENCHES / "results" / "compile_matrix.json").read_text())
    assert not [(row["kernel"], row["target"], row["complaints"]) for row in rows if row["complaints"]]
    program = (
        "import json, static_compile as c\n"
        "work = [(job, target) for job in c.jobs_of() for target in c.TARGETS if c.can_choose(job, target)]\n"
        "print(json.dumps([c.described(job, target) for job, target in work]))\n"
    )
    wanted = json.loads(_plain_python(program))
    assert {row["target"] for row in wanted} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    compiled = {_identity(row, wanted[0].keys()) for row in rows}
    missing = [one for one in wanted if _identity(one, wanted[0].keys()) not in compiled]
    assert not missing, f"{len(missing)} configurations are not in the table, run make bench-static: {missing[:3]}"


def _identity(row, columns):
    return json.dumps([row[column] for column in columns])


def test_the_compile_report_sees_a_narrow_load_and_a_spill():
    # The check itself, on a made-up row: it must be able to fail.
    program = (
        "import static_compile as c, torch\n"
        "jobs = c.jobs_of(['cpu-bench'], (torch.bfloat16,))\n"
        "job = next(j for j in jobs if j.kernel == '_decoder_norms_fwd_kernel')\n"
        "row = {'target': 'sm_90', 'spills': 0, 'shared': 0, 'n_hot': 1, 'hot_widths': [128]}\n"
        "assert c.complaints(row, job) == []\n"
        "narrow, lost = {'hot_widths': [32, 128]}, {'hot_widths': []}\n"
        "for bad in ({'spills': 8}, {'shared': 10**6}, narrow, lost, {'error': 'x'}):\n"
        "    assert len(c.complaints(row | bad, job)) == 1, bad\n"
    )
    _plain_python(program)


WAITS = ("encode_threshold", "encode_threshold scaled")
"""For inference: the number of entries is not known beforehand."""


def test_no_kernel_reads_from_the_device(static_cases, static_tensors):
    # Tensors on the meta device have no values: `.item()`, `nonzero` or a shape that depends on data would raise.
    from crosscode_kernels.triton_common.launch import recorded_launches

    case = static_tensors.CASES[0]
    for name, call in static_cases.op_calls(case, static_tensors.Tensors(case, torch.bfloat16)).items():
        if name not in WAITS:
            with recorded_launches() as launches:
                call()
            assert launches, name


def test_float32_products_are_exact_unless_the_user_says_otherwise(static_cases, static_tensors):
    case = static_tensors.CASES[2]
    precisions = {
        launch.meta["PRECISION"]
        for recorded in static_cases.launches(case, torch.float32).values()
        for launch in recorded
        if "PRECISION" in launch.meta
    }
    assert precisions == {"ieee"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_ops_move_at_most_a_third_more_than_the_fewest_bytes(traffic_model, static_tensors, dtype):
    for case in static_tensors.CASES:
        for device in traffic_model.DEVICES:
            for term in traffic_model.judged(case, dtype, device):
                where = (case.name, device.name, term)
                if term.name in traffic_model.GEMMS and term.ratio > 1.3:
                    # A GEMM reads x again where that hides behind its arithmetic.
                    assert term.bound(device, dtype.itemsize) == "arithmetic", where
                    assert term.excess(device, dtype.itemsize) == 1, where
                else:
                    assert 1 <= term.ratio <= 1.3, where
                assert term.within_limit(device, dtype.itemsize), where


def test_an_op_that_moves_too_much_is_noticed(traffic_model):
    device = traffic_model.DEVICES[0]
    Term = traffic_model.Term
    assert Term("decode", 0, 100, 130).within_limit(device, 2)
    assert not Term("decode", 0, 100, 131).within_limit(device, 2)
    assert not Term("decode", 1e15, 100, 131).within_limit(device, 2)
    assert Term("encode GEMM", 1e15, 100, 131).within_limit(device, 2)
    assert not Term("encode GEMM", 1, 100, 131).within_limit(device, 2)


def test_no_kernel_of_the_torch_backend_moves_less_than_the_fewest_bytes(counted_bytes, static_tensors):
    case = static_tensors.Case("small", 128, 192, (96, 96), 2048, 8)
    found = counted_bytes.counted(case)
    # What stock ops need at most: the bias is one more pass (`addmm` makes it too, unseen), the residual is read again for
    # its norms, JumpReLU is several elementwise passes over blocks.
    most = {"encode GEMM": 1.0, "recon loss backward": 1.001, "decoder norms": 1.05, "decoder norms backward": 1.05}
    most |= {"decode": 1.3, "decode backward": 1.2, "encode weight gradient": 1.1, "recon loss": 1.4}
    most |= {"GEMM and row top-k": 1.85, "sparse penalty": 3, "JumpReLU": 8}
    most |= {"JumpReLU backward": 10}
    assert found.keys() == most.keys()
    for name, (fewest, moved) in found.items():
        # The model knows how many latents are touched on average only: here that may be two in a hundred off.
        assert 0.98 * fewest <= moved <= most[name] * fewest, (name, moved / fewest)


def test_counting_leaves_views_out_and_gathered_rows_in(counted_bytes):
    x_BD, idx_N = torch.zeros(10, 4), torch.tensor([1, 1, 3])
    cases = {
        "view": (lambda: x_BD.view(4, 10).T, 0),
        "add": (lambda: x_BD + x_BD, 3 * 160),
        "in place": (lambda: x_BD.add_(1), 2 * 160),
        "out": (lambda: torch.mul(x_BD, 2, out=x_BD), 2 * 160),
        "gather": (lambda: x_BD.index_select(0, idx_N), 2 * 16 + 3 * 8 + 3 * 16),
        "gather of numbers": (lambda: x_BD.gather(1, idx_N[None]), 3 * 4 + 3 * 8 + 3 * 4),
        "broadcast": (lambda: x_BD[:1].expand(10, 4) + x_BD, 16 + 2 * 160),
    }
    for name, (run, expected) in cases.items():
        with counted_bytes.CountedBytes() as count:
            run()
        assert count.moved == expected, name


def nbytes(value):
    """Bytes of the tensors in a call's arguments or result."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(nbytes(item) for item in value) if isinstance(value, (tuple, list)) else 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_the_fewest_bytes_are_those_of_the_tensors(static_tensors, traffic_model, dtype):
    # Dense ops touch whatever they are given: the model's count must be that of their arguments and results.
    case = static_tensors.CASES[2]
    model = traffic_model.Model(case, dtype, traffic_model.DEVICES[0])
    t = static_tensors.Tensors(case, dtype)
    pairs = [
        (model.norms(), [t.W_dec_LO, t.norms_LX, t.n_L]),
        (model.norms_backward(), [t.W_dec_LO, t.W_dec_LO, t.norms_LX, t.norms_LX, t.n_L, t.n_L]),
        (model.recon(), [t.y_BO, t.target_BO, t.y_BO, t.g_X]),
        (model.recon_backward(), [t.y_BO, t.y_BO, t.g_X]),
        (model.jumprelu(), [t.h_BL, t.h_BL, t.t_L]),
        (model.jumprelu_backward(), [t.h_BL, t.da_BL, t.h_BL, t.t_L, t.t_L]),
        (model.preacts(), [t.x_BI, t.W_enc_LI, t.b_enc_L, t.h_BL]),
        (model.sparse_penalty(), [t.idx_N, t.value_N, t.n_L, t.lambda_L]),
    ]
    for term, tensors in pairs:
        assert abs(term.fewest - nbytes(tensors)) <= 16, term.name


def test_the_gemm_counts_the_flops_that_pytorch_counts(static_tensors, traffic_model):
    from torch.utils.flop_counter import FlopCounterMode

    case = static_tensors.CASES[2]
    t = static_tensors.Tensors(case, torch.float32)
    with FlopCounterMode(display=False) as counter:
        torch.addmm(t.b_enc_L, t.x_BI, t.W_enc_LI.T)
    model = traffic_model.Model(case, torch.float32, traffic_model.DEVICES[0])
    assert counter.get_total_flops() == model.preacts().flops


def test_the_prediction_names_what_dominates(static_traffic):
    text = static_traffic.report()
    assert "B=4096, I=4608, O=4608, L=131072, k=64" in text
    for term, n in (("Adam", 1), ("sums and Adam", 3), ("encode GEMM", 3)):
        assert text.count(f"Dominating term: H100 SXM: {term} (") >= n
    assert "prediction, not a measurement" in text.splitlines()[0]
