"""The shared pass: which tokens are seen, in which scale, and that sparse and dense latents say the same."""

import pytest
import torch
from crosscode_kernels.sparse import DenseLatents, SparseLatents

from crosscode.analysis.encoded import active_entries, collect, encode_heldout
from crosscode.errors import InputError
from crosscode.models.architecture import split_for

SPLIT = split_for("model_hookpoint_acausal")


def test_entries_of_sparse_and_dense_latents_are_the_same_and_stored_zeros_are_left_out():
    sparse = SparseLatents(
        torch.tensor([0, 2, 2, 4], dtype=torch.int32),
        torch.tensor([1, 3, 0, 2], dtype=torch.int32),
        torch.tensor([0.5, 0.0, 2.0, 1.0]),
        n_latents=5,
    )
    for latents in (sparse, DenseLatents(sparse.to_dense())):
        entries = active_entries(latents)
        assert entries.token_N.tolist() == [0, 2, 2]
        assert entries.latent_N.tolist() == [1, 0, 2]
        assert entries.value_N.tolist() == [0.5, 2.0, 1.0]
        assert entries.n_latents == 5


@pytest.mark.parametrize("max_tokens", [1, 30, 4096])
def test_only_usable_tokens_are_encoded_and_the_size_of_the_pieces_does_not_matter(
    make_model, make_heldout, max_tokens
):
    model, heldout = make_model(), make_heldout()
    batches = list(encode_heldout(model, heldout, SPLIT, max_tokens))
    tokens = torch.cat([b.tokens_HS.flatten()[b.position_B] for b in batches])
    assert torch.equal(tokens, torch.cat([b.tokens_HS[b.mask_HS] for b in heldout]))
    assert [b.first_sequence for b in batches][-1] + batches[-1].tokens_HS.shape[0] == 8
    raw = torch.cat([b.acts_HSMPD[b.mask_HS] for b in heldout])
    scaling_X1 = model.folded_scaling_out_Xo.flatten()[:, None]
    with torch.no_grad():
        expected = model(raw).flatten(1, 2) * scaling_X1
    torch.testing.assert_close(torch.cat([b.target_BXD for b in batches]), raw.flatten(1, 2) * scaling_X1)
    torch.testing.assert_close(torch.cat([b.output_BXD for b in batches]), expected, rtol=1e-4, atol=1e-4)


def test_collect_shows_every_batch_to_every_collector(make_model, make_heldout):
    class Counter:
        n = 0

        def update(self, batch):
            self.n += batch.position_B.shape[0]

    first, second = Counter(), Counter()
    heldout = make_heldout()
    n_tokens = collect(encode_heldout(make_model(), heldout, SPLIT), first, second)
    assert n_tokens == first.n == second.n == sum(int(b.mask_HS.sum()) for b in heldout)


def test_a_training_model_is_evaluated_and_left_in_train_mode(make_model, make_heldout):
    model = make_model().train()
    list(encode_heldout(model, make_heldout(), SPLIT))
    assert model.training


def test_batches_whose_parts_do_not_fit_are_refused(make_model, make_heldout):
    batch = make_heldout()[0]
    batch.mask_HS = batch.mask_HS[:, :-1]
    with pytest.raises(InputError, match=r"mask_HS \(5, 11\)"):
        list(encode_heldout(make_model(), [batch], SPLIT))
