"""What must hold for every kernel: it stays within its tensors, it writes all of its output, and the order in which its
programs run does not matter.

The calls are those of the static checks, with numbers in them. Widths are odd, one latent is active on every token
(so that it takes overflow items), and rows are longer than a candidate list.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

OPS = [
    "encode_topk", "encode_topk screened", "encode_batch_topk", "encode_batch_topk scaled", "encode_groupmax", "aux_topk",
    "aux_topk unbiased", "sparse_decode",
    "sparse_decode unbiased", "nested_decode", "nested_decode unbiased", "decode_recon", "decode_recon unbiased",
    "gather_dot", "gather_dot by latent", "sparse_decode_backward", "segment_rows", "decoder_norms",
    "decoder_norms_backward sum", "decoder_norms_backward joint", "recon_loss", "recon_loss_backward", "jumprelu",
    "jumprelu_backward anthropic", "jumprelu_backward gdm", "pre_act", "pre_act_backward",
    "dense_penalty l1", "dense_penalty_backward l1", "dense_penalty tanh", "dense_penalty_backward tanh",
    "sparse_penalty l1", "sparse_penalty_backward l1", "sparse_penalty tanh", "sparse_penalty_backward tanh",
    "encode_threshold", "encode_threshold scaled", "fused_adam", "fused_adam row-sparse", "fused_adam bfloat16",
    "encode_jumprelu", "encode_jumprelu_backward plain", "encode_jumprelu_backward l1", "encode_jumprelu_backward tanh",
    "capacity_support relu", "capacity_support jumprelu", "capacity_product decode", "capacity_product values",
    "capacity_product weights", "grouped_decode", "grouped_decode unbiased", "grouped_backward",
]  # fmt: skip
NOT_REGISTERED = {"encode_threshold", "fused_adam", "capacity_support", "capacity_product"}
FENCE = 8192


class Fences(TorchFunctionMode):
    """Every tensor allocated in this mode lies between two bands of a canary and is filled with poison."""

    ALLOCATIONS = ("empty", "new_empty", "empty_like")

    def __init__(self) -> None:
        super().__init__()
        self.bands: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in self.ALLOCATIONS and out.device.type == "cpu":
            return self.fence(out, fill=True)
        return out

    def fence(self, tensor: Tensor, fill: bool = False) -> Tensor:
        # An index read from poison is -1: it lands in the band before its target, which is NaN.
        poison = float("nan") if tensor.is_floating_point() else False if tensor.dtype == torch.bool else -1
        with torch._C.DisableTorchFunction():
            whole = torch.full((tensor.numel() + 2 * FENCE,), poison, dtype=tensor.dtype)
            inside = whole[FENCE : FENCE + tensor.numel()].view(tensor.shape)
            if not fill:
                inside.copy_(tensor)
            self.bands.append((whole, tensor.numel()))
            return inside

    def broken(self) -> int:
        """Bands that something was written to."""
        count = 0
        for whole, n in self.bands:
            for band in (whole[:FENCE], whole[FENCE + n :]):
                intact = band.isnan() if whole.is_floating_point() else band == band.new_full((), -1)
                count += not bool((~band if whole.dtype == torch.bool else intact).all())
        return count


@contextmanager
def fenced(tensors) -> Iterator[Fences]:
    """The case's tensors moved between bands, and every allocation of the call fenced."""
    mode = Fences()
    for name, value in vars(tensors).items():
        if isinstance(value, Tensor):
            setattr(tensors, name, mode.fence(value))
        elif name == "order":
            tensors.order = tuple(mode.fence(part) for part in value)
    with mode:
        yield mode


@pytest.fixture
def case(static_tensors):
    return static_tensors.Case("odd", 67, 37, (17, 17, 5), 1050, 3)


@pytest.fixture
def small_case(static_tensors):
    """For what loops over rows of every latent or token."""
    return static_tensors.Case("odd", 67, 37, (17, 17, 5), 21, 3)


LONG_ROWS = (
    "encode_topk", "encode_topk screened", "encode_batch_topk", "encode_batch_topk scaled", "aux_topk", "aux_topk unbiased",
    "encode_groupmax",
)  # fmt: skip


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def few_tokens(case, op):
    """Selects need long rows, everything else many tokens: no call needs both."""
    return case._replace(n_tokens=3) if op in LONG_ROWS else case


def test_the_list_of_ops_is_complete(static_cases, static_tensors, small_case):
    assert sorted(static_cases.op_calls(small_case, static_tensors.Tensors(small_case, torch.float32))) == sorted(OPS)


def test_every_registered_kernel_is_called(static_cases, small_case):
    from crosscode_kernels.registration import kernel_names

    of_stock_ops = {"latent_order", "window_sums"}
    assert set(kernel_names()) - of_stock_ops == {op.split()[0] for op in OPS} - NOT_REGISTERED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_reads_and_writes_stay_within_the_tensors(op, dtype, static_cases, static_tensors, case, small_case, same_bits):
    if dtype == torch.bfloat16 and op.startswith(
        ("dense", "jumprelu", "encode_jumprelu", "pre_act", "encode_topk screened")
    ):
        pytest.skip("the same addresses as in fp32")
    case = few_tokens(case, op) if op in LONG_ROWS else small_case
    plain = static_cases.op_calls(case, static_tensors.Tensors(case, dtype, "cpu"))[op]()
    tensors = static_tensors.Tensors(case, dtype, "cpu")
    with fenced(tensors) as fences:
        result = static_cases.op_calls(case, tensors)[op]()
    same_bits(result, plain)
    assert all(bool(part.isfinite().all()) for part in (result if isinstance(result, tuple) else (result,)))
    assert len(fences.bands) > 20
    assert fences.broken() == 0


def shuffled(programs):
    programs = list(programs)
    random.Random(len(programs)).shuffle(programs)
    return programs


def backwards(programs):
    return programs[::-1]


def test_the_order_of_the_programs_does_not_matter(op, static_cases, static_tensors, case, small_case, same_bits):
    from triton_interpreter import repaired_interpreter

    case = few_tokens(case, op) if op in LONG_ROWS else small_case
    call = static_cases.op_calls(case, static_tensors.Tensors(case, torch.float32, "cpu"))[op]
    plain = call()
    with repaired_interpreter(order=shuffled):
        result = call()
    same_bits(result, plain)


def test_an_access_beyond_a_tensor_is_noticed():
    import triton
    import triton.language as tl

    @triton.jit
    def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(out_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < 4)

    x, out = torch.zeros(8)[2:6], torch.zeros(4)
    _copy_kernel[(1,)](x, out, 4, BLOCK=8)
    with pytest.raises(triton.runtime.errors.InterpreterError, match=r"load of 1 element\(s\) outside"):
        _copy_kernel[(1,)](x, out, 5, BLOCK=8)
    with pytest.raises(triton.runtime.errors.InterpreterError, match=r"store of 2 element\(s\) outside"):
        _copy_kernel[(1,)](x, out[:2], 4, BLOCK=8)


def test_a_shuffled_grid_is_really_shuffled():
    import triton
    import triton.language as tl
    from triton_interpreter import repaired_interpreter

    @triton.jit
    def _last_writer_kernel(out_ptr):
        tl.store(out_ptr, tl.program_id(0))

    out = torch.zeros(1, dtype=torch.int32)
    with repaired_interpreter(order=backwards):
        _last_writer_kernel[(5,)](out)
    assert out.item() == 0
    _last_writer_kernel[(5,)](out)
    assert out.item() == 4


def test_every_kernel_is_explained():
    root = Path(__file__).parents[3] / "kernels"
    sources = "\n".join(path.read_text() for path in (root / "crosscode_kernels").rglob("*.py"))
    kernels = set(re.findall(r"@triton\.jit\ndef (_\w+_kernel)\(", sources)) - {"_probe_kernel"}
    assert len(kernels) > 20
    assert not [name for name in kernels if f"`{name}`" not in (root / "README.md").read_text()]


def masked_loads_without_other(source: str) -> list[int]:
    """Lines of `tl.load(..., mask=...)` that do not say what a masked lane yields."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loads = [call for call in calls if ast.unparse(call.func) == "tl.load"]
    words = [(call.lineno, {word.arg for word in call.keywords}) for call in loads]
    return [line for line, given in words if "mask" in given and "other" not in given]


def test_masked_loads_say_what_a_masked_lane_yields():
    assert masked_loads_without_other("tl.load(p, mask=m)\ntl.load(p)\ntl.load(p, mask=m, other=0)") == [1]
    root = Path(__file__).parents[3] / "kernels" / "crosscode_kernels"
    wrong = {path.name: masked_loads_without_other(path.read_text()) for path in root.rglob("*.py")}
    assert not {name: lines for name, lines in wrong.items() if lines}


def test_nothing_is_tuned_at_run_time():
    root = Path(__file__).parents[3] / "kernels" / "crosscode_kernels"
    assert not [path.name for path in root.rglob("*.py") if "autotune" in path.read_text()]
