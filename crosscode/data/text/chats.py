"""A chat through its tokenizer's template: the text, and which of it the messages wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from crosscode.errors import InputError, first_line

Span = tuple[int, int]

# Neither in a template nor, in all likelihood, in a chat: two characters for private use around the message's number.
_MARK = "\ue0f1{}\ue0f2"
# The last planes are for private use, a character for each of a chat's.
_FIRST_PRIVATE, _N_PRIVATE = 0xF0000, 0x110000 - 0xF0000
_GENERATION = re.compile(r"\{%-?\s*generation\b")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SPACE = re.compile(r"\s+")
_LOOKED_FOR = re.compile(r"\s+|<[^<>\s]*>|\[[^\[\]\s]*\]")


_KEEP = "set template_tokens: keep, and no roles, turns or thinking in positions"


def message_spans(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, would_help: str = _KEEP
) -> tuple[str, list[tuple[Span, int]], frozenset[int]]:
    """The text of `messages`; where in it what their contents say begins and ends, in order, each with the number of its message;
    and the messages of which the template changed something, which has no place. `would_help`: what to do where that is unknown.

    Raises InputError for messages without role or content, and where the template refuses them, or changes contents in
    a way that leaves the places of all unknown.
    """
    text = chat_text(tokenizer, messages)
    by_marks = _spans_by_marks(tokenizer, messages, text)
    if by_marks is not None:
        return text, by_marks, frozenset()
    found = _spans_by_characters(tokenizer, messages, text, _SPACE)
    if found is None or found[1]:
        again = _spans_by_characters(tokenizer, messages, text, _LOOKED_FOR)
        found = again if found is None or (again and not again[1]) else found
    if found is None:
        raise places_unknown(text, would_help)
    return text, *found


def places_unknown(text: str, would_help: str = _KEEP) -> InputError:
    return InputError(
        "dataset: the chat template rewrites a chat so that what its messages wrote cannot be told from what the "
        f"template adds ({text[:60]!r}...); {would_help}"
    )


def marked_by_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], text: str) -> list[Span] | None:
    """What the template itself marks as the assistant's (`{% generation %}`), a place for each of its messages; None where it
    marks nothing."""
    template = tokenizer.chat_template
    if not isinstance(template, str) or not _GENERATION.search(template):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    found: Any = render_jinja_template(
        [[dict(message) for message in messages]],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    rendered, marked = found
    n_answers = sum(message["role"] == "assistant" for message in messages)
    return list(marked[0]) if rendered[0] == text and len(marked[0]) == n_answers else None


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, to_answer: bool = False) -> str:
    """The text of `messages`, with errors as `message_spans` has them. `to_answer`: up to where the answer begins."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("dataset: it holds chats, but the tokenizer has no chat template")
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & {*message}:
            raise InputError(f'dataset: a chat message is {str(message)[:60]!r}; "role" and "content" are needed')
    return _apply(tokenizer, messages, to_answer)


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, Any]], to_answer: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_answer)
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        roles = ", ".join(str(message["role"]) for message in messages)
        raise InputError(
            f"dataset: the tokenizer's chat template refuses a chat (roles {roles[:80]}): {first_line(error)}"
        ) from error


def _spans_by_marks(tokenizer: Any, messages: Sequence[Mapping[str, Any]], text: str) -> list[tuple[Span, int]] | None:
    """Exact places, each with its message's number: the template is filled with marks in place of contents, and what stands
    around them is its own.

    None where a content is no text, or where the template does more with contents than trim them.
    """
    contents = [message["content"] for message in messages if isinstance(message.get("content"), str)]
    if len(contents) != len(messages) or any(_reasoning(message) for message in messages):
        return None
    marks = [_MARK.format(i) for i in range(len(messages))]
    try:
        frame = _apply(tokenizer, [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
    except InputError:
        return None
    places = [frame.find(mark) for mark in marks]
    if min(places, default=0) < 0 or places != sorted(places) or any(frame.count(mark) != 1 for mark in marks):
        return None
    edges = [0, *(edge for at, mark in zip(places, marks, strict=True) for edge in (at, at + len(mark))), len(frame)]
    first, *after = [frame[begin:end] for begin, end in zip(edges[::2], edges[1::2], strict=True)]
    spans, end = [], len(first)
    for content, own in zip(contents, after, strict=True):
        # What follows decides between the two: white space at its end may be the content's or the template's.
        shown = next((form for form in (content, content.strip()) if text.startswith(form + own, end)), None)
        if shown is None:
            return None
        spans.append((end, end + len(shown)))
        end += len(shown) + len(own)
    found = list(zip(spans, range(len(spans)), strict=True))
    return found if text.startswith(first) and end == len(text) else None


def _spans_by_characters(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], text: str, kept: re.Pattern[str]
) -> tuple[list[tuple[Span, int]], frozenset[int]] | None:
    """Places for a template that cuts or reorders contents (drops earlier thinking, puts the system into a turn).

    Each character of a content that is not `kept` (white space alone, or also the tags and brackets that templates look for)
    is replaced by one for private use of its own; where these come out is where the content does; of a content without another
    character its tags are replaced as well. None where the text around them is not that of the real contents. A content that
    is changed, not cut, has no span; where its tags are not kept, None: they may have been looked for.
    """
    originals: list[tuple[int, str, int]] = []  # by number: which text, the text, which character of it
    message_of: list[int] = []  # by text
    without_tags: set[int] = set()  # texts

    def tagged(content: str, message: int) -> str:
        n_texts = len(message_of)
        message_of.append(message)
        own = kept if kept.sub("", content) else _SPACE
        if own is _SPACE:
            without_tags.add(n_texts)
        parts, at = [], 0
        for stays in [*own.finditer(content), None]:
            end = len(content) if stays is None else stays.start()
            parts += [chr(_FIRST_PRIVATE + len(originals) + i) for i in range(end - at)]
            originals.extend((n_texts, content, i) for i in range(at, end))
            if stays is not None:
                parts.append(stays[0])
                at = stays.end()
        return "".join(parts)

    contents = [text for one in messages for text in [*_texts(one.get("content")), *_reasoning(one).values()]]
    if sum(map(len, contents)) > _N_PRIVATE:
        return None
    twins = []
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, str):
            content = tagged(content, number)
        elif isinstance(content, list):
            content = [
                {**part, "text": tagged(part["text"], number)} if isinstance(part, Mapping) and _texts([part]) else part
                for part in content
            ]
        reasoning = {name: tagged(text, number) for name, text in _reasoning(message).items()}
        twins.append({**message, **({"content": content} if "content" in message else {}), **reasoning})
    try:
        frame = _apply(tokenizer, twins)
    except InputError:
        return None
    if len(frame) != len(text):
        return None
    spans: list[Span] = []
    changed: set[int] = set()
    last: tuple[int, int, int] | None = None  # which text, which character of it, where it came out
    owners: list[int] = []
    for place, (shown, mark) in enumerate(zip(text, frame, strict=True)):
        number = ord(mark) - _FIRST_PRIVATE
        if not 0 <= number < len(originals):
            if shown != mark:
                return None
            continue
        owner, content, i = originals[number]
        if content[i] != shown:
            changed.add(owner)
        if last and last[0] == owner and last[1] < i and content[last[1] + 1 : i] == text[last[2] + 1 : place]:
            spans[-1] = (spans[-1][0], place + 1)
        else:
            first, since = i, spans[-1][1] if spans else 0
            for stays in reversed([*kept.finditer(content, 0, i)]):  # tags and brackets before it that came out, too
                if stays.end() != first or not text.endswith(content[stays.start() : i], since, place):
                    break
                first = stays.start()
            spans.append((place - len(content[first:i].lstrip()), place + 1))
            owners.append(owner)
        last = (owner, i, place)
        end = content[i + 1 :].rstrip()
        if end and not kept.sub("", end) and text.startswith(end, place + 1):
            spans[-1] = (spans[-1][0], place + 1 + len(end))
    if changed & without_tags:
        return None
    found = [(span, message_of[owner]) for span, owner in zip(spans, owners, strict=True) if owner not in changed]
    return found, frozenset(message_of[owner] for owner in changed)


def _reasoning(message: Mapping[str, Any]) -> dict[str, str]:
    """What a message says beside its content, by field."""
    found = {name: message.get(name) for name in _REASONING}
    return {name: text for name, text in found.items() if isinstance(text, str) and text.strip()}


def _texts(content: Any) -> list[str]:
    """The texts of a content: itself, or those of its parts ({"type": "text", "text": ...})."""
    parts = [{"text": content}] if isinstance(content, str) else content or ()
    found = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return [text for text in found if isinstance(text, str) and text.strip()]
