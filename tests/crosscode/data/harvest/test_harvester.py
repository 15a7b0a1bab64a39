"""The harvester returns what the models compute, whichever way it reads them."""

import threading
from typing import Any

import pytest
import torch

from crosscode.data import ActivationHarvester, wrap_language_model
from crosscode.data.harvest.harvester import _RESIDUAL_NUMBERS_PER_THREAD, _sequences_at_once
from crosscode.data.harvest.hookpoints import find_taps
from crosscode.errors import InputError
from crosscode.stopping import Stopped, StopSignals

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox"]
TOKENS_HS = torch.randint(6, 46, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tap_equals_transformer_bridge(family, build_model, tokenizer):
    model = wrap_language_model(build_model(family), tokenizer, f"tiny/{family}")
    names = sorted(name for name in find_taps(model) if not name.startswith(("blocks.0", "blocks.2")))
    assert len(names) >= 20
    by_width: dict[int, list[str]] = {}
    for name in names:
        widths = ActivationHarvester([model], [name], path="modules").widths_MP
        by_width.setdefault(widths[0][0], []).append(name)
    for same_width in by_width.values():
        fast = ActivationHarvester([model], same_width, path="modules")
        general = ActivationHarvester([model], same_width, path="bridge")
        assert (fast.paths, general.paths) == (["modules"], ["bridge"])
        fast_HSMPD, general_HSMPD = fast.harvest(TOKENS_HS), general.harvest(TOKENS_HS)
        for p, name in enumerate(same_width):
            torch.testing.assert_close(
                fast_HSMPD[:, :, 0, p],
                general_HSMPD[:, :, 0, p],
                atol=2e-5,
                rtol=1e-4,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_equals_hidden_states(family, build_model, tokenizer):
    model = wrap_language_model(build_model(family), tokenizer, "tiny")
    names = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.2.hook_resid_pre"]
    acts_HSMPD = ActivationHarvester([model], names).harvest(TOKENS_HS)
    with torch.no_grad():
        hidden = model.model(TOKENS_HS, output_hidden_states=True).hidden_states
    for p, layer in enumerate([0, 1, 2]):
        torch.testing.assert_close(acts_HSMPD[:, :, 0, p], hidden[layer])


def test_several_models_and_hookpoints_fill_their_own_places(model_pair):
    names = ["blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"]
    both = ActivationHarvester(model_pair, names)
    assert both.dims == (2, 2, 16)
    acts_HSMPD = both.harvest(TOKENS_HS)
    for m, model in enumerate(model_pair):
        for p, name in enumerate(names):
            alone = ActivationHarvester([model], [name]).harvest(TOKENS_HS)
            assert torch.equal(acts_HSMPD[:, :, m, p], alone[:, :, 0, 0])


def test_narrower_vectors_end_in_zeros(model_pair):
    names = ["blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"]
    both = ActivationHarvester(model_pair[:1], names)
    assert both.dims == (1, 2, 24) and both.widths_MP == ((16, 24),)
    acts_HSPD = both.harvest(TOKENS_HS)[:, :, 0]
    for p, (name, width) in enumerate(zip(names, both.widths_MP[0], strict=True)):
        alone_HSD = ActivationHarvester(model_pair[:1], [name]).harvest(TOKENS_HS)[:, :, 0, 0]
        assert torch.equal(acts_HSPD[:, :, p, :width], alone_HSD) and not acts_HSPD[:, :, p, width:].any()


def test_the_run_stops_after_the_last_wanted_module(model_pair):
    model = model_pair[0]
    ran = []
    handles = [
        block.register_forward_hook(lambda _m, _i, _o, layer=layer: ran.append(layer))
        for layer, block in enumerate(model.model.model.layers)
    ]
    harvester = ActivationHarvester([model], ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"])
    ran.clear()
    harvester.harvest(TOKENS_HS)
    for handle in handles:
        handle.remove()
    assert ran == [0]


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_that_run_apart_give_what_they_give_together(family, build_model, tokenizer, monkeypatch):
    model = wrap_language_model(build_model(family), tokenizer, "tiny")
    harvester = ActivationHarvester([model], ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"])
    tokens_HS = torch.randint(0, harvester.vocab_size, (7, 9))
    segments_HS = torch.arange(9).div(4, rounding_mode="floor").expand(7, 9) + torch.arange(7)[:, None].ge(5)
    n_runs = []
    model.model.register_forward_pre_hook(lambda *_: n_runs.append(1))
    for segments in (None, segments_HS):
        together = harvester.harvest(tokens_HS, segments)
        n_runs.clear()
        monkeypatch.setattr("crosscode.data.harvest.harvester._sequences_at_once", lambda *_: 3)
        apart = harvester.harvest(tokens_HS, segments)
        monkeypatch.undo()
        assert len(n_runs) == 3
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)


def test_a_cpu_runs_few_long_sequences_and_many_short_ones_at_once(build_model, tokenizer, monkeypatch):
    model = wrap_language_model(build_model("llama"), tokenizer, "tiny")
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    n_numbers = 2 * _RESIDUAL_NUMBERS_PER_THREAD // model.d_model
    assert [_sequences_at_once(model, 16, n_numbers // n) for n in (1, 4)] == [1, 4]
    assert _sequences_at_once(model, 16, 10 * n_numbers) == 1


def test_no_hook_stays_behind(model_pair):
    ActivationHarvester(model_pair, ["blocks.1.hook_resid_post"]).harvest(TOKENS_HS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model_pair[0].model.modules())


def test_names_without_a_module_go_through_the_bridge_and_leave_the_model_alone(model_pair):
    before = {name: type(module) for name, module in model_pair[0].model.named_modules()}
    harvester = ActivationHarvester([model_pair[0]], ["blocks.1.ln2.hook_normalized", "blocks.1.hook_resid_post"])
    assert harvester.paths == ["bridge"]
    direct = ActivationHarvester([model_pair[0]], ["blocks.1.hook_resid_post"])
    torch.testing.assert_close(
        harvester.harvest(TOKENS_HS)[:, :, :, 1:], direct.harvest(TOKENS_HS), atol=1e-5, rtol=1e-4
    )
    assert {name: type(module) for name, module in model_pair[0].model.named_modules()} == before


def test_module_paths_are_hookpoints_too(model_pair):
    names = ["model.layers.1.mlp", "blocks.1.hook_mlp_out", "model.layers.1.mlp:in", "blocks.1.mlp.hook_in"]
    acts_HSMPD = ActivationHarvester([model_pair[0]], names).harvest(TOKENS_HS)
    assert torch.equal(acts_HSMPD[..., 0, :], acts_HSMPD[..., 1, :])
    assert torch.equal(acts_HSMPD[..., 2, :], acts_HSMPD[..., 3, :])


def test_output_dtype(model_pair):
    exact = ActivationHarvester(model_pair, ["blocks.1.hook_resid_post"]).harvest(TOKENS_HS)
    rounded = ActivationHarvester(model_pair, ["blocks.1.hook_resid_post"], dtype="bfloat16").harvest(TOKENS_HS)
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("blocks.1.hook_resid_pos", "blocks.1.hook_resid_post"),
        ("blocks.9.hook_resid_post", "blocks.0 to blocks.2"),
        ("hook_resid_post", "blocks."),
    ],
)
def test_an_unknown_hookpoint_is_refused_with_near_matches(name, hint, model_pair):
    with pytest.raises(InputError, match=name) as error:
        ActivationHarvester(model_pair, [name])
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one"),
        (["blocks.1.hook_resid_post"] * 2, "named twice"),
    ],
)
def test_bad_hookpoints_are_refused(names, message, model_pair):
    with pytest.raises(InputError, match=message):
        ActivationHarvester(model_pair, names)


def test_models_of_different_tokenizers_are_told_apart(model_pair, build_model, build_tokenizer):
    others = [wrap_language_model(build_model("llama"), build_tokenizer([*"abc"]), name) for name in ("one", "two")]
    harvester = ActivationHarvester([model_pair[0], others[0], model_pair[1], others[1]], ["blocks.1.hook_resid_post"])
    assert harvester.reads_M == [0, 1, 0, 1]
    assert harvester.other_tokenizers == [(others[0].tokenizer, 64)]
    with pytest.raises(InputError, match="'tiny-0', 'one', 'tiny-1', 'two' have different tokenizers: token ids"):
        harvester.harvest(TOKENS_HS)
    with pytest.raises(InputError, match=r"'tiny-0' and 'ids' have different tokenizers: one of them has none"):
        ActivationHarvester(
            [model_pair[0], wrap_language_model(build_model("llama"), None, "ids")], harvester.hookpoints
        )


def test_bad_tokens_are_refused(model_pair):
    harvester = ActivationHarvester(model_pair, ["blocks.1.hook_resid_post"])
    with pytest.raises(InputError, match="sequence_length: 65 is above"):
        harvester.harvest(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(InputError, match="id -100 is outside the vocabulary of 46"):
        harvester.harvest(torch.tensor([[7, -100, 9]]))
    with pytest.raises(InputError, match="id 46 is outside the vocabulary of 46"):
        harvester.harvest(torch.full((1, 4), 46))


@pytest.mark.parametrize("family", FAMILIES)
def test_document_isolation_equals_running_each_document_alone(family, build_model, tokenizer):
    model = wrap_language_model(build_model(family), tokenizer, "tiny")
    harvester = ActivationHarvester([model], ["blocks.2.hook_resid_post"])
    segments_HS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2], [0] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 1]])
    acts_HSMPD = harvester.harvest(TOKENS_HS, segments_HS)
    for h, spans in enumerate([[(0, 3), (3, 4), (4, 9)], [(0, 9)], [(0, 1), (1, 9)]]):
        for first, last in spans:
            alone = harvester.harvest(TOKENS_HS[h : h + 1, first:last])
            torch.testing.assert_close(acts_HSMPD[h, first:last], alone[0], atol=1e-5, rtol=1e-4)


def test_two_threads_may_harvest_from_one_model(model_pair):
    from concurrent.futures import ThreadPoolExecutor

    early = ActivationHarvester(model_pair, ["blocks.0.hook_resid_post"])
    late = ActivationHarvester(model_pair, ["blocks.2.hook_resid_post"])
    expected = early.harvest(TOKENS_HS), late.harvest(TOKENS_HS)
    with ThreadPoolExecutor(2) as pool:
        pairs = [(pool.submit(early.harvest, TOKENS_HS), pool.submit(late.harvest, TOKENS_HS)) for _ in range(40)]
        for one, two in pairs:
            torch.testing.assert_close(one.result(), expected[0], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(two.result(), expected[1], atol=1e-6, rtol=1e-6)


def test_attention_patterns_are_no_activations(model_pair):
    """(sequences, heads, positions, positions): not one vector a position, however many heads there are."""
    with pytest.raises(InputError, match=r"'blocks.1.attn.hook_pattern' of 'tiny-0' .* \(2, 11, width\) is needed"):
        ActivationHarvester(model_pair, ["blocks.1.attn.hook_pattern"])


@pytest.mark.parametrize("path", ["modules", "bridge"])
def test_a_thread_leaves_a_models_run_within_a_block_of_a_signal(path, build_model, tokenizer):
    model = wrap_language_model(build_model("llama"), tokenizer, "tiny")
    harvester = ActivationHarvester([model], ["blocks.2.hook_resid_post"], path=path)
    run: Any = harvester.runs[0]
    blocks = run.bridge.blocks if path == "bridge" else model.model.model.layers
    ran, found = [], []
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    blocks[0].register_forward_hook(lambda *_: setattr(stop, "_received", "SIGTERM"))

    def work():
        try:
            harvester.harvest(TOKENS_HS)
        except Stopped as error:
            found.append(type(error))

    with StopSignals() as stop:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        stop._received = None
    assert (found, ran) == ([Stopped], [0])
