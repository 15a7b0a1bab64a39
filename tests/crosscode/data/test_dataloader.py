"""Batches of activations: every usable position once, shuffled, scaled, restorable."""

import pytest
import torch

from crosscode.data import (
    ActivationHarvester,
    ActivationsDataloader,
    TokenSequenceLoader,
    wrap_documents,
    wrap_language_model,
)
from crosscode.data.rows import check_isolation
from crosscode.errors import InputError

NAMES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def harvester(model_pair, remember_harvests):
    return remember_harvests(ActivationHarvester(model_pair, NAMES))


@pytest.fixture
def make_loader(harvester, tokenizer, documents):
    def make(docs=documents, token_options=None, **options):
        tokens = TokenSequenceLoader(
            wrap_documents(docs),
            tokenizer,
            **{"sequence_length": 8, "batch_size": 3, "epochs": 1, **(token_options or {})},
        )
        return ActivationsDataloader(tokens, harvester, **{"batch_size": 10, "shuffle_buffer_size": 64, **options})

    return make


def rows_of(loader):
    return torch.cat([rows.acts_RMPD for rows in loader.rows.open()])


def sort_rows(rows):
    flat = rows.reshape(rows.shape[0], -1)
    return flat[flat[:, 0].argsort()]


@pytest.mark.parametrize("buffer", [0, 10, 33, 64, 100_000])
def test_every_usable_position_comes_once(make_loader, buffer):
    loader = make_loader(shuffle_buffer_size=buffer, scale=False)
    batches = list(loader)
    assert {batch.shape[0] for batch in batches[:-1]} == {10}
    assert torch.equal(sort_rows(torch.cat(batches)), sort_rows(rows_of(loader)))


def test_shuffled_and_seeded(make_loader):
    def first(**options):
        return next(iter(make_loader(**options)))

    assert torch.equal(first(seed=1), first(seed=1))
    assert not torch.equal(first(seed=1), first(seed=2))
    in_order = torch.cat(list(make_loader(shuffle_buffer_size=0)))
    mixed = torch.cat(list(make_loader(shuffle_buffer_size=100_000)))
    place = [int((in_order == row).all(dim=(1, 2, 3)).nonzero()[0]) for row in mixed[:40]]
    assert max(place) > 200 and place != sorted(place)


def test_scaled_to_mean_norm_sqrt_d(make_loader):
    loader = make_loader(n_tokens_for_norm_estimate=10**6)
    acts_BMPD = torch.cat(list(loader))
    torch.testing.assert_close(acts_BMPD.norm(dim=-1).mean(dim=0), torch.full((2, 2), 4.0), rtol=1e-4, atol=1e-4)
    assert loader.scaling_MP.shape == (2, 2)


def test_scaled_by_what_follows_from_the_activations(make_loader):
    def difference(acts_BMPD):
        return (acts_BMPD[:, 1:] - acts_BMPD[:, :1]).expand_as(acts_BMPD)

    loader = make_loader(n_tokens_for_norm_estimate=10**6, scaled=difference)
    norms_BMP = difference(torch.cat(list(loader))).norm(dim=-1)
    torch.testing.assert_close(norms_BMP.mean(dim=0), torch.full((2, 2), 4.0), rtol=1e-4, atol=1e-4)
    assert torch.equal(loader.scaling_MP[0], loader.scaling_MP[1])


def test_norm_estimation_takes_nothing_from_training(make_loader):
    estimated, given = make_loader(), make_loader(scaling_MP=make_loader().scaling_MP)
    assert torch.equal(torch.cat(list(estimated)), torch.cat(list(given)))


def test_drop_last(make_loader):
    n_rows = rows_of(make_loader()).shape[0]
    assert n_rows % 10
    assert torch.cat(list(make_loader(drop_last=True))).shape[0] == n_rows // 10 * 10


@pytest.mark.parametrize("stop", [0, 1, 7, 25, 60])
@pytest.mark.parametrize("buffer", [0, 40, 100_000])
def test_state_continues_exactly(make_loader, stop, buffer):
    options = {"shuffle_buffer_size": buffer, "token_options": {"epochs": 3}, "seed": 4}
    expected = list(make_loader(**options))
    interrupted = make_loader(**options)
    iterator = iter(interrupted)
    for _ in range(stop):
        next(iterator)
    state = interrupted.state_dict()
    list(iterator)
    resumed = make_loader(**options)
    resumed.load_state_dict(state)
    got = list(resumed)
    assert len(got) == len(expected) - stop
    assert all(torch.equal(a, b) for a, b in zip(got, expected[stop:], strict=True))


def test_a_loaded_state_can_be_saved_again_before_it_is_used(make_loader):
    first = make_loader()
    next(iter(first))
    second = make_loader()
    second.load_state_dict(first.state_dict())
    third = make_loader()
    third.load_state_dict(second.state_dict())
    assert torch.equal(next(iter(second)), next(iter(third)))


def test_state_holds_only_what_safetensors_and_json_can(make_loader):
    loader = make_loader()
    next(iter(loader))

    def check(value):
        if isinstance(value, dict):
            for inner in value.values():
                check(inner)
        else:
            assert isinstance(value, torch.Tensor | int | str)

    check(loader.state_dict())


@pytest.mark.parametrize("change", [{"seed": 9}, {"batch_size": 11}, {"token_options": {"sequence_length": 9}}])
def test_state_of_other_settings_is_refused(make_loader, change):
    state = make_loader().state_dict()
    with pytest.raises(InputError, match="when it was saved"):
        make_loader(**change).load_state_dict(state)


def test_one_short_sequence_is_enough_for_endless_training(make_loader):
    loader = make_loader(docs=["w0 w1"], token_options={"epochs": None}, batch_size=4, shuffle_buffer_size=1000)
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(30)]
    assert {tuple(batch.shape) for batch in batches} == {(4, 2, 2, 16)}


def test_a_small_dataset_fills_the_buffer_once(make_loader, documents):
    loader = make_loader(token_options={"epochs": None}, shuffle_buffer_size=100_000)
    next(iter(loader))
    assert loader._iterator._target == rows_of(make_loader()).shape[0]


def test_a_huge_first_position_leaves_fvu_as_it_was(build_model, tokenizer, documents):
    """The hookpoint's first position gets a norm of 25,000, as an attention sink would; nothing else changes."""
    from crosscode.data import wrap_language_model

    model = wrap_language_model(build_model("llama"), tokenizer, "sink")

    def plant(_module, _args, output):
        planted = output.clone()
        planted[:, 0, 0] = 25_000.0
        return planted

    def fvu_of_rank_4(**options):
        harvester = ActivationHarvester([model], ["blocks.1.hook_resid_post"])
        tokens = TokenSequenceLoader(wrap_documents(documents), tokenizer, sequence_length=8, epochs=1, **options)
        acts_BD = torch.cat(list(ActivationsDataloader(tokens, harvester, batch_size=32)))[:, 0, 0]
        centred_BD = acts_BD - acts_BD.mean(dim=0)
        singular_values = torch.linalg.svdvals(centred_BD)
        return float(singular_values[4:].square().sum() / singular_values.square().sum())

    plain, plain_kept = fvu_of_rank_4(), fvu_of_rank_4(keep_first_position=True)
    handle = model.model.model.layers[1].register_forward_hook(plant)
    planted, planted_kept = fvu_of_rank_4(), fvu_of_rank_4(keep_first_position=True)
    handle.remove()
    assert planted == plain > 0.05
    assert planted_kept < 1e-3 < plain_kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 is below 1"),
        ({"shuffle_buffer_size": 9}, "shuffle_buffer_size: 9 is below batch_size 10"),
        ({"token_options": {"sequence_length": 100}}, "sequence_length: 100 is above the models' limit of 64"),
        ({"scaling_MP": torch.ones(2)}, r"scaling_MP: shape \(2,\) should be \(2, 2\)"),
    ],
)
def test_bad_arguments_are_refused(make_loader, options, message):
    with pytest.raises(InputError, match=message):
        make_loader(**options)


def test_prefetch_changes_no_batch_and_saves_what_was_consumed(make_loader):
    options = {"token_options": {"epochs": 2}}
    expected = list(make_loader(**options))
    ahead = make_loader(**options, prefetch=3)
    assert all(torch.equal(a, b) for a, b in zip(ahead, expected, strict=True))
    iterator = iter(ahead)
    for _ in range(9):
        next(iterator)
    resumed = make_loader(**options, prefetch=2)
    resumed.load_state_dict(ahead.state_dict())
    got = list(resumed)
    assert len(got) == len(expected) - 9
    assert all(torch.equal(a, b) for a, b in zip(got, expected[9:], strict=True))
    ahead.close()


def test_prefetch_hands_on_errors_and_leaves_no_thread(make_loader, monkeypatch):
    import threading

    loader = make_loader(prefetch=1)
    iterator = iter(loader)
    next(iterator)

    def fail(*_):
        raise RuntimeError("the model broke")

    before = threading.active_count()
    monkeypatch.setattr(loader.rows.rows.harvester, "harvest", fail)
    with pytest.raises(RuntimeError, match="the model broke"):
        list(iterator)
    assert threading.active_count() == before - 1


def test_isolation_is_refused_where_it_cannot_be_had(model_pair, tokenizer, documents):
    harvester = ActivationHarvester(model_pair, ["blocks.1.ln2.hook_normalized"])
    tokens = TokenSequenceLoader(wrap_documents(documents), tokenizer, sequence_length=8, isolate_documents=True)
    with pytest.raises(InputError, match="isolate_documents"):
        ActivationsDataloader(tokens, harvester, batch_size=10)


@pytest.mark.parametrize("architecture", ["OPT", "Mamba"])
def test_isolation_is_refused_for_models_that_would_ignore_it(architecture, tokenizer, documents):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=46, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16,
        state_size=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    model = wrap_language_model(transformers.AutoModelForCausalLM.from_config(config), tokenizer, "ignorant")
    harvester = ActivationHarvester([model], ["blocks.1.hook_resid_post"])
    tokens = TokenSequenceLoader(wrap_documents(documents), tokenizer, sequence_length=8, isolate_documents=True)
    with pytest.raises(InputError, match=r"'ignorant' .* cannot keep attention inside a document"):
        ActivationsDataloader(tokens, harvester, batch_size=10)
    ActivationsDataloader(tokens.fresh(isolate_documents=False), harvester, batch_size=10)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma", "gemma2", "gemma3_text", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_isolation_is_found_where_it_is(family, dtype, build_model, tokenizer):
    model = wrap_language_model(build_model(family).to(dtype), tokenizer)
    check_isolation(ActivationHarvester([model], ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]))


def test_isolated_documents_do_not_see_each_other(model_pair, tokenizer):
    """The rows of a document are the same whatever stands before it in its sequence."""
    harvester = ActivationHarvester(model_pair, NAMES)

    def rows(docs):
        tokens = TokenSequenceLoader(
            wrap_documents(docs), tokenizer, sequence_length=12, epochs=1, shuffle=False, bos="document",
            isolate_documents=True,
        )  # fmt: skip
        return torch.cat(
            list(ActivationsDataloader(tokens, harvester, batch_size=64, shuffle_buffer_size=0, scale=False))
        )

    alone, after_one, after_another = rows(["w1 w2 w3"]), rows(["w4 w5", "w1 w2 w3"]), rows(["w6 w7", "w1 w2 w3"])
    torch.testing.assert_close(after_one[-4:], alone[-4:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after_another[-4:], alone[-4:], atol=1e-5, rtol=1e-4)
