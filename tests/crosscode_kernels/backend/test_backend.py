"""Which backend serves a request, and what is said where none does."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from crosscode_kernels import OpSet, available_backends, backend, resolve_backend


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_backends_of_every_machine(name):
    ops = resolve_backend(name, "cpu")
    assert ops.name == name
    assert isinstance(ops, OpSet)


def test_an_unknown_name_lists_what_is_allowed():
    with pytest.raises(ValueError, match="backend is 'cuda'; must be one of auto, triton, torch, reference"):
        resolve_backend("cuda", "cpu")  # type: ignore[arg-type]


def test_an_explicit_request_never_falls_back():
    # A fresh process, since triton decides at import whether it interprets.
    code = "import crosscode_kernels as k; k.resolve_backend('triton', 'cpu')"
    env = {"PATH": "", "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ValueError: backend 'triton' is not available on cpu")


def test_an_unsupported_dtype_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=r"dtype torch\.int8 is not float16, bfloat16, float32 or float64"):
        resolve_backend("torch", "cpu", torch.int8)


def test_auto_takes_the_fastest_and_says_so_once(caplog):
    backend._announced.clear()
    with caplog.at_level(logging.INFO, logger="crosscode_kernels"):
        assert resolve_backend("auto", "cpu").name == "torch"
        assert resolve_backend("auto", "cpu").name == "torch"
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("backend auto: torch on cpu with torch.float32 (triton: ")


def test_every_backend_has_a_status_with_a_reason_where_it_is_missing():
    statuses = {status.name: status for status in available_backends("cpu")}
    assert list(statuses) == ["triton", "torch", "reference"]
    assert statuses["torch"].available and statuses["reference"].available
    assert statuses["triton"].available or statuses["triton"].reason


def test_importing_the_package_starts_nothing():
    code = (
        "import sys, crosscode_kernels; "
        "assert not any(m == 'triton' or m.startswith(('crosscode.', 'transformers')) for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dtype_is_part_of_the_request():
    assert resolve_backend("torch", "cpu", torch.bfloat16).name == "torch"


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(capability, gcn="")`: a device of that compute capability, or, by its `gcn` name, one on ROCm."""
    triton_launch = pytest.importorskip("crosscode_kernels.triton_common.launch")
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(backend, "_announced", set())

    def fake(capability=(9, 0), gcn=""):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a fake")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=gcn))
        monkeypatch.setattr(torch.version, "hip", "7.0" if gcn else None)

    return fake


@pytest.mark.parametrize(
    "device",
    [{"capability": (8, 0)}, {"capability": (8, 9)}, {"capability": (12, 0)}, {"gcn": "gfx942:sramecc+:xnack-"}],
)
def test_auto_takes_triton_where_its_kernels_run(device, gpu, caplog):
    gpu(**device)
    with caplog.at_level(logging.INFO, logger="crosscode_kernels"):
        assert [resolve_backend("auto", "cuda:0").name for _ in range(2)] == ["triton", "triton"]
    assert [record.getMessage() for record in caplog.records] == [
        "backend auto: triton on cuda:0 with torch.float32 (the fastest, and its kernels serve a fake)"
    ]
    assert resolve_backend("triton", "cuda").name == "triton"


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ({"capability": (7, 5)}, "compute capability 7.5 is below 8.0"),
        ({"capability": (7, 0)}, "compute capability 7.0 is below 8.0"),
        # Compute capability of a ROCm device says nothing: 9.0 is its architecture's first digit.
        ({"gcn": "gfx906"}, "architecture gfx906 is not among those it is compiled for: gfx942"),
        (
            {"gcn": "gfx1100", "capability": (11, 0)},
            "architecture gfx1100 is not among those it is compiled for: gfx942",
        ),
    ],
)
def test_a_gpu_that_kernels_do_not_support_is_served_by_torch_and_refused_to_triton(device, reason, gpu, caplog):
    gpu(**device)
    with caplog.at_level(logging.INFO, logger="crosscode_kernels"):
        assert resolve_backend("auto", "cuda").name == "torch"
    assert [record.getMessage() for record in caplog.records] == [
        f"backend auto: torch on cuda with torch.float32 (triton: {reason})"
    ]
    with pytest.raises(ValueError, match=f"backend 'triton' is not available on cuda with torch.float32: {reason}$"):
        resolve_backend("triton", "cuda")


def test_a_missing_gpu_is_a_reason(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"backend 'triton' is not available on cuda .*sees no CUDA or ROCm device"):
        resolve_backend("triton", "cuda")
