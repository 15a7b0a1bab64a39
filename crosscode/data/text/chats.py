"""A chat through its tokenizer's template: the text, and which of it the messages wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crosscode.errors import InputError, first_line

Span = tuple[int, int]

# Neither in a template nor, in all likelihood, in a chat: two characters for private use around the message's number.
_MARK = "\ue0f1{}\ue0f2"


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Span]]:
    """The text of `messages`, and where in it each message's own content begins and ends, in order.

    Raises InputError for messages without role or content, and where the template refuses them.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("dataset: it holds chats, but the tokenizer has no chat template")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & {*message}:
            raise InputError(f'dataset: a chat message is {str(message)[:60]!r}; "role" and "content" are needed')
    text = _apply(tokenizer, messages)
    return text, _spans_by_marks(tokenizer, messages, text) or _spans_by_search(messages, text)


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise InputError(
            f"dataset: the tokenizer's chat template refuses a chat (roles {roles[:80]}): {first_line(error)}"
        ) from error


def _spans_by_marks(tokenizer: Any, messages: Sequence[Mapping[str, Any]], text: str) -> list[Span] | None:
    """Exact places: the template is filled with marks in place of contents, and what stands around them is its own.

    None where a content is no text, or where the template does more with contents than trim them.
    """
    contents = [message["content"] for message in messages if isinstance(message.get("content"), str)]
    if len(contents) != len(messages):
        return None
    marks = [_MARK.format(i) for i in range(len(messages))]
    try:
        frame = _apply(tokenizer, [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
    except InputError:
        return None
    spans, end, frame_end = [], 0, 0
    for content, mark in zip(contents, marks, strict=True):
        at = frame.find(mark, frame_end)
        if at < 0 or frame.count(mark) != 1:
            return None
        begin = end + at - frame_end
        shown = next((form for form in (content, content.strip()) if text.startswith(form, begin)), None)
        if shown is None or text[end:begin] != frame[frame_end:at]:
            return None
        end, frame_end = begin + len(shown), at + len(mark)
        spans.append((begin, end))
    return spans if text[end:] == frame[frame_end:] else None


def _spans_by_search(messages: Sequence[Mapping[str, Any]], text: str) -> list[Span]:
    """Where the contents are found, each after the last; one that the template changed is found nowhere."""
    spans, end = [], 0
    for message in messages:
        for content in _texts(message.get("content")):
            begin = text.find(content, end)
            if begin >= 0:
                end = begin + len(content)
                spans.append((begin, end))
    return spans


def _texts(content: Any) -> list[str]:
    """The texts of a content: itself, or those of its parts ({"type": "text", "text": ...})."""
    parts = [{"text": content}] if isinstance(content, str) else content or ()
    found = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return [text.strip() for text in found if isinstance(text, str) and text.strip()]
