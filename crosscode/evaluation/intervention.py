"""Language models that run with latents added or taken out, through hooks on the plain `transformers` modules.

Steering adds `amount * W_dec[l, position]` of the folded model to the activation at each output position; ablation takes
`a_l * W_dec[l, position]` out and so keeps the error. `a_l` is what the crosscoder finds in the *unmodified* language models
on the same tokens: a crosscoder reads several models and hookpoints at once, which one run of one model does not have. Models of
another tokenizer read the same text; `a_l` is 0 where no token of theirs ends at the same character.

H sequences · S positions of one forward pass · T positions from the start · M models · P hookpoints · D width ·
X output crosscoding positions (flattened) · N latents that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.harvest.hookpoints import Tap, resolve_taps
from crosscode.data.harvest.language_models import LanguageModel
from crosscode.data.text.aligned import OtherTokens
from crosscode.data.text.prompts import in_other_tokens, prompt_ids
from crosscode.errors import InputError
from crosscode.evaluation.splicing import edited
from crosscode.models.base import BaseCrosscoder
from crosscode.models.decoder_vectors import decoder_vectors_NXD
from crosscode.models.split import Split

Positions = Literal["all", "prompt", "generated"] | int
"""Where: everywhere, at the tokens that the model is given at once, at those that it makes after them, or from one on."""

_unmodified: ContextVar[bool] = ContextVar("unmodified", default=False)


@dataclass(frozen=True)
class _Pass:
    """One forward pass of a language model."""

    first: int
    """position of its first token: how many the cache holds"""
    length: int
    prompt_length: int
    ids_HT: Tensor | None
    """all tokens so far; None where the model is given embeddings"""
    is_padded: bool

    def chosen(self, positions: Positions) -> slice:
        """Those of its S positions that are meant."""
        if positions == "all":
            return slice(None)
        bound = self.prompt_length if isinstance(positions, str) else positions
        bound = max(0, bound - self.first)
        return slice(bound) if positions == "prompt" else slice(bound, None)


DeltaOf = Callable[[_Pass], list[Tensor | None]]
"""What is added at each hookpoint: broadcastable to `acts_HSD`, None for nothing."""


class Interventions:
    """Steers and ablates the language models of a harvester by the latents of a crosscoder.

    Args:
        model: folded.

    Raises:
        InputError: a hookpoint that is no module's input or output, so that the plain model cannot be changed there.
    """

    def __init__(self, model: BaseCrosscoder, split: Split, harvester: ActivationHarvester):
        self.model, self.split, self.harvester = model, split, harvester
        self._places_X = split.output_places(*harvester.dims[:2])
        self._taps_M = [_taps(lm, harvester.hookpoints, {p for _, p in self._places_X}) for lm in harvester.models]

    def vectors_NXD(self, latents: Sequence[int]) -> Tensor:
        """Raw decoder vectors at the output positions, float32."""
        return decoder_vectors_NXD(self.model, torch.tensor(list(latents), dtype=torch.long)).float()

    def random_vectors_NXD(self, latents: Sequence[int], seed: int = 0) -> Tensor:
        """Directions drawn at random, of the norm of the decoder vectors at each position."""
        vectors_NXD = self.vectors_NXD(latents)
        generator = torch.Generator().manual_seed(seed)
        random_NXD = torch.randn(vectors_NXD.shape, generator=generator).to(vectors_NXD)
        self.model.widths.clear_(random_NXD.unflatten(1, (len(self.model.widths), -1)))
        return random_NXD * (vectors_NXD.norm(dim=-1) / random_NXD.norm(dim=-1))[..., None]

    @contextmanager
    def steer(
        self,
        amounts: Mapping[int, float],
        models: Sequence[int],
        positions: Positions = "all",
        vectors_NXD: Tensor | None = None,
    ) -> Iterator[None]:
        """Within the block, `amounts[l] * W_dec[l]` is added.

        Args:
            amounts: by latent, in units of its activation.
            models: which of the harvester's models.
            vectors_NXD: in place of the decoder vectors of these latents.
        """
        vectors_NXD = self.vectors_NXD([*amounts]) if vectors_NXD is None else vectors_NXD
        amount_N = torch.tensor([*amounts.values()], dtype=torch.float32, device=vectors_NXD.device)
        sum_XD = torch.einsum("n,nxd->xd", amount_N, vectors_NXD)

        def delta_P(m: int, _pass: _Pass) -> list[Tensor | None]:
            # what adds nothing is not added: not a bit changes
            found = self._by_hookpoint(sum_XD, 1 if self.split.difference else m)
            return [None if delta is None or not bool(delta.any()) else delta for delta in found]

        with self._running(delta_P, models, positions):
            yield

    @contextmanager
    def ablate(
        self,
        latents: Sequence[int],
        models: Sequence[int],
        positions: Positions = "all",
        vectors_NXD: Tensor | None = None,
    ) -> Iterator[None]:
        """Within the block, `a_l * W_dec[l]` is taken out.

        Each forward pass runs all language models once more over the tokens so far. Not for padded prompts, nor for beam
        search, which reorders the cache; nor, where tokenizers differ, for chats, whose templates do.

        Args:
            models: which of the harvester's models.
            vectors_NXD: in place of the decoder vectors of these latents.
        """
        vectors_NXD = self.vectors_NXD(latents) if vectors_NXD is None else vectors_NXD
        latents_N = torch.tensor(list(latents), dtype=torch.long, device=self.model.device)

        def delta_P(m: int, of: _Pass) -> list[Tensor | None]:
            a_HTN = self._activations(m, of, latents_N)
            contribution_HSXD = torch.einsum("hsn,nxd->hsxd", a_HTN[:, of.first :], vectors_NXD)
            return [None if one is None else -one for one in self._by_hookpoint(contribution_HSXD, m)]

        with self._running(delta_P, models, positions):
            yield

    def _by_hookpoint(self, of_positions_XD: Tensor, m: int) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * self.harvester.dims[1]
        for x, (m_of_x, p) in enumerate(self._places_X):
            if m_of_x == m:
                found[p] = of_positions_XD[..., x, :]
        return found

    def _activations(self, m: int, of: _Pass, latents_N: Tensor) -> Tensor:
        """`a_HTN` in the unmodified language models."""
        if of.ids_HT is None or of.is_padded:
            what = "embeddings" if of.ids_HT is None else "padded tokens"
            raise InputError(f"ablate: the language model is given {what}; it must be given token ids without padding")
        if not self.harvester.other_tokenizers:
            return self._found(of.ids_HT, (), latents_N)
        return torch.stack([self._found_by_text(m, ids, of.prompt_length, latents_N) for ids in of.ids_HT.tolist()])

    def _found(self, ids_HT: Tensor, others: Sequence[OtherTokens], latents_N: Tensor) -> Tensor:
        token = _unmodified.set(True)
        try:
            acts_HTMPD = self.harvester.harvest(ids_HT, others=others).float()
        finally:
            _unmodified.reset(token)
        acts_BMPD = acts_HTMPD.flatten(0, 1).to(self.model.device)
        with torch.no_grad():
            latents = self.model.encode_latents(self.split.activations(acts_BMPD)[0])
        return latents.columns_BN(latents_N).detach().reshape(*ids_HT.shape, -1).float()

    def _found_by_text(self, m: int, ids: list[int], n_given: int, latents_N: Tensor) -> Tensor:
        """`a_TN` at tokens of model m, from what each tokenizer makes of their text."""
        harvester, tokenizer = self.harvester, self.harvester.tokenizer_of(m)
        special, bos = set(tokenizer.all_special_ids), ids[0] == tokenizer.bos_token_id
        if special & set(ids[bos:n_given]):
            raise InputError("ablate: models of different tokenizers have no special tokens in common; give plain text")
        a_TN = torch.zeros(len(ids), len(latents_N), device=self.model.device)
        text = _decoded(tokenizer, ids)
        if text:
            first, others = harvester.models[0].tokenizer, harvester.other_tokenizers
            of_first = prompt_ids(first, text, bos=bos, max_length=harvester.max_sequence_length)
            read = in_other_tokens(first, others, text, len(of_first), bos=bos)
            found_SN = self._found(torch.tensor([of_first]), read, latents_N)[0]
            for other in read:
                found_SN[other.place_HS[0] < 0] = 0
            place_of = {end: s for s, end in enumerate(_ends(first, of_first, text)) if end}
            for t, end in enumerate(_ends(tokenizer, ids, text)):
                if end in place_of:
                    a_TN[t] = found_SN[place_of[end]]
        return a_TN

    @contextmanager
    def _running(
        self, delta_of: Callable[[int, _Pass], list[Tensor | None]], models: Sequence[int], positions: Positions
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for m in models:
                delta_of_m: DeltaOf = partial(delta_of, m)
                stack.enter_context(_adding(self.harvester.models[m], self._taps_M[m], delta_of_m, positions))
            yield


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _ends(tokenizer: Any, ids: Sequence[int], text: str) -> Iterator[int]:
    """For each token the character of the text that ends with it; 0: none does."""
    before = 0
    for t in range(len(ids)):
        shown = _decoded(tokenizer, ids[: t + 1])
        ends = len(shown) > before and text.startswith(shown)
        before = len(shown) if ends else before
        yield before if ends else 0


def _taps(lm: LanguageModel, hookpoints: Sequence[str], wanted: set[int]) -> dict[int, Tap]:
    found: dict[int, Tap] = {}
    for p, (name, tap) in enumerate(resolve_taps(lm, hookpoints).items()):
        if p in wanted:
            if tap is None:
                raise InputError(
                    f"hookpoints: {name!r} of {lm.name!r} is not a module's input or output, so that the plain model "
                    "cannot be changed there"
                )
            found[p] = tap
    return found


@contextmanager
def _adding(lm: LanguageModel, taps: Mapping[int, Tap], delta_of: DeltaOf, positions: Positions) -> Iterator[None]:
    """Within the block, each forward pass of the plain model adds what `delta_of` gives for it."""
    current: list[tuple[slice, list[Tensor | None]]] = []
    earlier: list[_Pass] = []

    def begin(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _unmodified.get():
            return
        this = _pass_of(args, kwargs, earlier[-1] if earlier else None)
        earlier[:] = [this]
        current[:] = [(this.chosen(positions), delta_of(this))]

    def add(act: Tensor, p: int) -> Tensor:
        if _unmodified.get() or not current:
            return act
        chosen, delta_P = current[0]
        delta = delta_P[p]
        if delta is None:
            return act
        act = act.clone()
        delta = delta[..., : act.shape[-1]]  # what is narrower is padded
        act[:, chosen] += (delta if delta.ndim == 1 else delta[:, chosen]).to(act)
        return act

    handle = lm.model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with edited(lm, [(tap, partial(add, p=p)) for p, tap in taps.items()]):
            yield
    finally:
        handle.remove()


def _pass_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], before: _Pass | None) -> _Pass:
    ids_HS = args[0] if args else kwargs.get("input_ids")
    given = ids_HS if ids_HS is not None else kwargs.get("inputs_embeds")
    assert given is not None  # else the model itself raises
    cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
    first, length = 0 if cache is None else int(cache.get_seq_length()), given.shape[1]
    ids_HT = ids_HS
    if first and ids_HS is not None:
        known = None if before is None or before.ids_HT is None else before.ids_HT[:, :first]
        fits = known is not None and known.shape == (ids_HS.shape[0], first)
        ids_HT = torch.cat([known, ids_HS.to(known.device)], 1) if fits and known is not None else None
    return _Pass(
        first=first,
        length=length,
        prompt_length=before.prompt_length if first and before is not None else first or length,
        ids_HT=ids_HT,
        is_padded=isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()),
    )
