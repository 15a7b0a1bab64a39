"""Float32 products of the kernel follow PyTorch's setting, by whichever of its two interfaces it was made."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

triton_impl = pytest.importorskip("crosscode_kernels.aux_topk.triton_impl")
ON_CUDA, ON_CPU = SimpleNamespace(is_cuda=True), SimpleNamespace(is_cuda=False)
matmul = torch.backends.cuda.matmul
has_newer = pytest.mark.skipif(
    not hasattr(matmul, "fp32_precision"), reason="this PyTorch has the older interface alone"
)


@pytest.fixture(autouse=True)
def _settings_as_they_were(monkeypatch):
    newer = [matmul, torch.backends, getattr(torch.backends.mkldnn, "matmul", None)]
    before = [(owner, owner.fp32_precision) for owner in newer if hasattr(owner, "fp32_precision")]
    older = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.version, "hip", None)
    yield
    torch.set_float32_matmul_precision(older)
    for owner, value in before:
        owner.fp32_precision = value


@pytest.mark.parametrize(("name", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_the_older_interface(name, expected):
    torch.set_float32_matmul_precision(name)
    assert triton_impl.precision_of(ON_CUDA) == expected
    assert triton_impl.precision_of(ON_CPU) == "ieee"


@has_newer
@pytest.mark.parametrize("name", ["ieee", "tf32"])
def test_the_newer_interface_after_the_older(name):
    torch.set_float32_matmul_precision("high" if name == "ieee" else "highest")
    matmul.fp32_precision = name
    with pytest.raises(RuntimeError):
        _ = matmul.allow_tf32  # what reading the older interface comes to
    assert triton_impl.precision_of(ON_CUDA) == name


@has_newer
def test_the_newer_interface_for_all_backends():
    torch.backends.fp32_precision = "tf32"  # type: ignore[attr-defined]
    assert triton_impl.precision_of(ON_CUDA) == "tf32"
    matmul.fp32_precision = "ieee"
    assert triton_impl.precision_of(ON_CUDA) == "ieee"


def test_rocm_computes_in_full(monkeypatch):
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert triton_impl.precision_of(ON_CUDA) == "ieee"
