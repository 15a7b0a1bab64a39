"""A text or a chat that a user typed -> token ids, as training would have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crosscode.config.data import TokenPolicy
from crosscode.data.text.aligned import OtherTokens
from crosscode.data.text.chats import chat_text
from crosscode.data.text.sources import wrap_documents
from crosscode.data.text.tokens import TokenSequenceLoader
from crosscode.errors import InputError

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a chat."""


def prompt_ids(
    tokenizer: Any, prompt: Prompt, *, bos: bool, to_answer: bool = False, max_length: int | None
) -> list[int]:
    """Token ids of a prompt.

    Args:
        prompt: a text, or messages (`{"role": ..., "content": ...}`), which pass through the tokenizer's chat template.
        bos: whether training had a beginning-of-sequence token; one that the template gives is not doubled.
        to_answer: a chat ends where the assistant's answer begins.
        max_length: of the language models; None: no limit is known.

    Raises:
        InputError: no tokenizer, no chat template, no tokens or too many.
    """
    if tokenizer is None:
        raise InputError("text: the language model has no tokenizer")
    if not isinstance(prompt, str):
        if getattr(tokenizer, "chat_template", None) is None:
            raise InputError("text: the tokenizer has no chat template; give plain text")
        try:
            prompt = chat_text(tokenizer, prompt, to_answer=to_answer)
        except InputError as error:
            raise InputError(f"text: {str(error).removeprefix('dataset: ')}") from error
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    bos_id = tokenizer.bos_token_id if bos else None
    if bos_id is not None and ids[:1] != [bos_id]:
        ids.insert(0, bos_id)
    if not ids or (max_length is not None and len(ids) > max_length):
        raise InputError(f"text: {len(ids)} tokens: must be at least 1, at most {max_length or 'as memory allows'}")
    return ids


def in_other_tokens(
    tokenizer: Any, others: Sequence[tuple[Any, int | None]], prompt: Prompt, length: int, *, bos: bool
) -> tuple[OtherTokens, ...]:
    """A prompt, which has `length` tokens of `tokenizer`, for models that read it in tokens of their own (`others`: as
    `ActivationHarvester.other_tokenizers` has them)."""
    if not others:
        return ()
    frame = "document" if bos else "none"
    policy = TokenPolicy(sequence_length=length, pack=False, bos=frame, epochs=1, mask_special_tokens=False)
    return next(iter(TokenSequenceLoader(wrap_documents([prompt]), tokenizer, policy, others=others))).others
