"""Several dictionaries decode to windows of one output, in one pass each way.

Axes: B tokens · I input width · O flattened output dims · L latents of each dictionary · S dictionaries.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from crosscode_kernels import DenseLatents, SparseLatents, resolve_backend

WINDOWS = {
    "a later one each": ([0, 5, 10], [15, 10, 5], 15),
    "its own alone": ([0, 5, 10], [5, 5, 5], 15),
    "one": ([0], [9], 9),
    "gaps and ragged": ([3, 0, 40, 7], [70, 1, 33, 16], 80),
    "aligned": ([0, 16], [48, 32], 64),
}


def problem(backend, windows, dtype=torch.float32, L=20, B=9, zipf=False):
    """x_BI, and for each dictionary its encoder and decoder; one bias. The numbers are the same for every dtype."""
    first_S, width_S, n_out = WINDOWS[windows]
    generator = torch.Generator().manual_seed(len(windows))

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) / 2).to(backend.device, dtype).requires_grad_()

    x_BI = normal(B, 6)
    hot_L = torch.zeros(L, dtype=dtype, device=backend.device)
    hot_L[0] = 4.0 if zipf else 0.0  # active on every token: it takes overflow items
    encoders = [(normal(L, 6), hot_L.clone().requires_grad_()) for _ in first_S]
    return x_BI, encoders, [normal(L, width) for width in width_S], normal(n_out), first_S, n_out


def latents_of(kind, x_BI, W_LI, b_L, s):
    """Encoded by stock ops: the encoders are not what is tested, and slow where they are interpreted."""
    ops = resolve_backend("torch", x_BI.device, x_BI.dtype)
    if kind == "mixed":  # as where each encoder takes the form that its density asks for
        kind = ("topk", "relu")[s % 2]
    if kind == "relu":
        return ops.encode_relu(x_BI, W_LI, b_L)
    return (ops.encode_topk if kind == "topk" else ops.encode_batch_topk)(x_BI, W_LI, b_L, 4)


def run(ops, kind, x_BI, encoders, W_S, b_O, first_S, n_out):
    latents_S = [latents_of(kind, x_BI, *encoder, s) for s, encoder in enumerate(encoders)]
    y_BO = ops.grouped_decode(latents_S, W_S, b_O, first_S, n_out)
    (y_BO * torch.linspace(-1, 1, y_BO.numel(), device=y_BO.device).view(y_BO.shape)).sum().backward()
    leaves = [x_BI, *(one for encoder in encoders for one in encoder), *W_S, *([] if b_O is None else [b_O])]
    return latents_S, [y_BO.detach(), *(leaf.grad for leaf in leaves)]


def by_hand(a_SBL, W_S, b_O, first_S, n_out):
    y_BO = torch.zeros(a_SBL[0].shape[0], n_out, dtype=a_SBL[0].dtype) + (0 if b_O is None else b_O)
    for a_BL, W_LO, first in zip(a_SBL, W_S, first_S, strict=True):
        y_BO = y_BO + torch.nn.functional.pad(a_BL @ W_LO, (first, n_out - first - W_LO.shape[1]))
    (y_BO * torch.linspace(-1, 1, y_BO.numel()).view(y_BO.shape).to(y_BO)).sum().backward()
    return [y_BO.detach(), *(one.grad for one in (*a_SBL, *W_S, *([] if b_O is None else [b_O])))]


CASES = [(windows, "topk") for windows in WINDOWS] + [("a later one each", "mixed")]


@pytest.mark.parametrize(("windows", "kind"), CASES)
def test_output_and_gradients(backend, dtype, windows, kind, within_budget):
    zipf = windows == "gaps and ragged"
    x_BI, encoders, W_S, b_O, first_S, n_out = problem(backend, windows, dtype, B=70 if zipf else 23, zipf=zipf)
    b_O = None if windows == "one" else b_O
    a_SBL = []
    with torch.no_grad():  # the selection is not what is tested
        for s, encoder in enumerate(encoders):
            a_SBL.append(latents_of(kind, x_BI, *encoder, s).to_dense())
    leaves_SBL = [a_BL.clone().requires_grad_() for a_BL in a_SBL]
    latents_S = []
    for s, a_BL in enumerate(leaves_SBL):
        is_dense = kind == "mixed" and s % 2
        latents_S.append(DenseLatents(a_BL) if is_dense else sparse_of(a_BL, 4))
    y_BO = backend.ops.grouped_decode(latents_S, W_S, b_O, first_S, n_out)
    (y_BO * torch.linspace(-1, 1, y_BO.numel(), device=y_BO.device).view(y_BO.shape).to(dtype)).sum().backward()
    mine = [y_BO.detach(), *(one.grad for one in (*leaves_SBL, *W_S, *([] if b_O is None else [b_O])))]

    def again(to):
        copies = [[one.detach().cpu().to(to).requires_grad_() for one in many] for many in (a_SBL, W_S)]
        return by_hand(*copies, None if b_O is None else b_O.detach().cpu().to(to).requires_grad_(), first_S, n_out)

    truth, eager = again(torch.float64), again(dtype)
    names = ["output", *(f"values {s}" for s in range(len(W_S))), *(f"W {s}" for s in range(len(W_S))), "b"]
    for name, got, plain, exact, s in zip(names, mine, eager, truth, [0, *range(2 * len(W_S)), 0], strict=False):
        kept = 1
        if name.startswith("values") and not isinstance(latents_S[s], DenseLatents):
            kept = (a_SBL[s] > 0).cpu()  # what is not stored has no gradient
        within_budget(got.cpu() * kept, plain * kept, exact * kept, dtype, name)


def sparse_of(a_BL, k):
    """As TopK gives it: k entries of each token, padded with zeros."""
    value_BK, idx_BK = a_BL.topk(k, dim=1)
    return replace(SparseLatents.from_topk(idx_BK.int(), value_BK, a_BL.shape[1]), padded=True)


@pytest.mark.parametrize("windows", ["a later one each", "gaps and ragged"])
@pytest.mark.parametrize("kind", ["batch_topk", "relu", "mixed"])
def test_equals_its_parts(backend, windows, kind):
    ops = backend.ops
    one, other = (problem(backend, windows, zipf=True) for _ in range(2))
    _, mine = run(ops, kind, *one)
    x_BI, encoders, W_S, b_O, first_S, n_out = other
    y_BO = x_BI.new_zeros(x_BI.shape[0], n_out)
    for s, (encoder, W_LO, first) in enumerate(zip(encoders, W_S, first_S, strict=True)):
        part_BO = ops.sparse_decode(latents_of(kind, x_BI, *encoder, s), W_LO, None)
        y_BO = y_BO + torch.nn.functional.pad(part_BO, (first, n_out - first - W_LO.shape[1]))
    y_BO = y_BO + b_O
    (y_BO * torch.linspace(-1, 1, y_BO.numel(), device=y_BO.device).view(y_BO.shape)).sum().backward()
    leaves = [x_BI, *(one for encoder in encoders for one in encoder), *W_S, b_O]
    for got, wanted in zip(mine, [y_BO.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["topk", "mixed"])
def test_the_same_bits_twice(backend, kind):
    runs = [run(backend.ops, kind, *problem(backend, "gaps and ragged", B=70, zipf=True))[1] for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("frozen", ["weights", "a weight", "values", "all"])
def test_what_wants_no_gradient_gets_none(fast_backend, frozen):
    ops = fast_backend.ops
    x_BI, encoders, W_S, b_O, first_S, n_out = problem(fast_backend, "a later one each")
    _, whole = run(ops, "topk", x_BI, encoders, W_S, b_O, first_S, n_out)
    fresh = problem(fast_backend, "a later one each")
    x_BI, encoders, W_S, b_O, first_S, n_out = fresh
    for s, W_LO in enumerate(W_S):
        W_LO.requires_grad_(frozen not in ("weights", "all") and not (frozen == "a weight" and s == 1))
    for leaf in (x_BI, *(one for encoder in encoders for one in encoder)):
        leaf.requires_grad_(frozen not in ("values", "all"))
    _, parts = run(ops, "topk", *fresh)
    for got, wanted in zip(parts, whole, strict=True):
        assert got is None or torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    n_none = {"weights": 3, "a weight": 1, "values": 7, "all": 10}[frozen]
    assert sum(part is None for part in parts) == n_none


@pytest.mark.parametrize(("B", "k"), [(0, 4), (3, 0), (0, 0)])
def test_without_tokens_or_entries_it_is_the_bias(backend, B, k):
    x_BI, encoders, W_S, b_O, first_S, n_out = problem(backend, "a later one each", B=B)
    latents_S = [backend.ops.encode_topk(x_BI, *encoder, k) for encoder in encoders]
    y_BO = backend.ops.grouped_decode(latents_S, W_S, b_O, first_S, n_out)
    assert torch.equal(y_BO, b_O.expand(B, n_out))
    y_BO.sum().backward()
    assert all(W_LO.grad is None or not W_LO.grad.any() for W_LO in W_S)
    assert torch.equal(b_O.grad, torch.full_like(b_O, B))


def test_deferred_gradients_are_those_that_are_computed(fast_backend):
    if fast_backend.ops.name != "triton":
        pytest.skip("an option of triton")
    deferred = resolve_backend("triton:deferred", fast_backend.device)
    _, plain = run(fast_backend.ops, "topk", *problem(fast_backend, "gaps and ragged", B=70, zipf=True))
    _, later = run(deferred, "topk", *problem(fast_backend, "gaps and ragged", B=70, zipf=True))
    for got, wanted in zip(later, plain, strict=True):
        torch.testing.assert_close(got + 0, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["topk", "mixed"])
def test_an_output_without_use_has_no_gradient(backend, kind):
    x_BI, encoders, W_S, b_O, first_S, n_out = problem(backend, "a later one each")
    latents_S = [latents_of(kind, x_BI, *encoder, s) for s, encoder in enumerate(encoders)]
    y_BO = backend.ops.grouped_decode(latents_S, W_S, b_O, first_S, n_out)
    unused = torch._C._functions.UndefinedGrad()(y_BO)  # hands no gradient on, as where nothing used the output
    (unused.sum() + sum(W_LO.sum() for W_LO in W_S)).backward()
    assert all(torch.equal(W_LO.grad, torch.ones_like(W_LO)) for W_LO in W_S)
    assert b_O.grad is None


def test_few_dictionaries_at_a_time_where_partial_sums_would_be_large(fast_backend, monkeypatch):
    if fast_backend.ops.name != "triton":
        pytest.skip("of Triton's kernels")
    from crosscode_kernels.grouped_decode import triton_impl

    _, whole = run(fast_backend.ops, "topk", *problem(fast_backend, "gaps and ragged", B=70, zipf=True))
    monkeypatch.setattr(triton_impl, "MOST_PARTIALS", 2 * (70 * 4 // 64) * 80 * 4 + 1280)
    assert triton_impl.runs_within_memory([280] * 4, 80) == [slice(0, 2), slice(2, 4)]
    _, parts = run(fast_backend.ops, "topk", *problem(fast_backend, "gaps and ragged", B=70, zipf=True))
    for got, wanted in zip(parts, whole, strict=True):  # in tiles of another width
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_compiled_in_one_graph(fast_backend):
    ops = fast_backend.ops
    one, other = (problem(fast_backend, "a later one each") for _ in range(2))

    def total(x_BI, encoders, W_S, b_O, first_S, n_out):
        latents_S = [ops.encode_topk(x_BI, *encoder, 4) for encoder in encoders]
        return ops.grouped_decode(latents_S, W_S, b_O, first_S, n_out).square().sum()

    total(*one).backward()
    torch.compile(total, backend="aot_eager", fullgraph=True)(*other).backward()
    for mine, theirs in zip((one[0], *one[2], one[3]), (other[0], *other[2], other[3]), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_arguments_are_checked(fast_backend):
    ops = fast_backend.ops
    x_BI, encoders, W_S, b_O, first_S, n_out = problem(fast_backend, "a later one each")
    latents_S = [ops.encode_topk(x_BI, *encoder, 4) for encoder in encoders]
    for changed, message in (
        ((latents_S[:2], W_S, b_O, first_S, n_out), "2 latents, 3 weights and 3 first columns"),
        ((latents_S, W_S, b_O, [0, 5, 11], n_out), "a window is 11 to 16; must lie within the 15 columns"),
        ((latents_S, W_S, b_O[1:], first_S, n_out), r"b_dec_O has shape \(14,\); must be \(15,\)"),
        (
            (latents_S, [W_S[0], W_S[1][1:], W_S[2]], b_O, first_S, n_out),
            "latents are over 20 and W_dec_LO has 19 rows",
        ),
        (([latents_S[0], latents_S[1], DenseLatents(x_BI)], W_S, b_O, first_S, n_out), "must be of one size"),
    ):
        with pytest.raises(ValueError, match=f"grouped_decode: .*{message}|{message}"):
            ops.grouped_decode(*changed)


def test_one_launch_each_way_for_all_dictionaries(fast_backend):
    if fast_backend.ops.name != "triton":
        pytest.skip("counts Triton's launches")
    from crosscode_kernels.triton_common.launch import recorded_launches

    for windows in WINDOWS:
        x_BI, encoders, W_S, b_O, first_S, n_out = problem(fast_backend, windows)
        latents_S = [latents_of("topk", x_BI, *encoder, s) for s, encoder in enumerate(encoders)]
        latents_S = [replace(latents, value_N=latents.value_N.detach().requires_grad_()) for latents in latents_S]
        with recorded_launches() as record:
            fast_backend.ops.grouped_decode(latents_S, W_S, b_O, first_S, n_out).sum().backward()
        n_items = len(first_S) * 9 * 4 // 64  # of 9 tokens with 4 entries each: without one there is nothing to add up
        backward = ["_segment_rows_kernel"] * (2 if n_items else 1)
        assert [one.kernel.__name__ for one in record] == ["_grouped_decode_kernel", *backward]


def test_a_captured_graph_finds_its_table_made_and_keeps_it(monkeypatch):
    triton_impl = pytest.importorskip("crosscode_kernels.grouped_decode.triton_impl")
    key = ((0, 0, 0, 8, 0),), torch.device("cuda")
    for name in ("_tables", "_tables_of_graphs"):
        monkeypatch.setattr(triton_impl, name, {})
    monkeypatch.setattr(triton_impl, "cuda", SimpleNamespace(is_current_stream_capturing=lambda: True))
    with pytest.raises(RuntimeError, match="grouped_decode: decoders lie elsewhere at each step"):
        triton_impl._table(*key)
    triton_impl._tables[key] = table_S5 = torch.zeros(1, 5, dtype=torch.int64)
    assert triton_impl._table(*key) is table_S5
    assert triton_impl._tables_of_graphs == {key: table_S5}


def test_few_tables_are_kept(monkeypatch):
    triton_impl = pytest.importorskip("crosscode_kernels.grouped_decode.triton_impl")
    monkeypatch.setattr(triton_impl, "_tables", {})
    for number in range(triton_impl._MOST_TABLES + 3):
        rows_S5, device = ((number, 1, 2, 3, 4),), torch.device("cpu")
        assert triton_impl._table(rows_S5, device).tolist() == [[number, 1, 2, 3, 4]]
    assert triton_impl._table(rows_S5, device) is triton_impl._table(rows_S5, device)
    assert len(triton_impl._tables) == triton_impl._MOST_TABLES
