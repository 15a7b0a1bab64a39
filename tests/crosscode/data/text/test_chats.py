"""Chats: which tokens the messages wrote, and what is refused."""

import pytest

from crosscode.data import TokenSequenceLoader, wrap_documents
from crosscode.errors import InputError

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content']|trim }} </s> {% endfor %}"


def used_tokens(messages, tokenizer):
    loader = TokenSequenceLoader(
        wrap_documents([messages]), tokenizer, sequence_length=16, epochs=1, bos="none", keep_first_position=True,
        template_tokens="mask",
    )  # fmt: skip
    batch = next(iter(loader))
    return [(i, int(batch.tokens_HS[0, i])) for i in batch.mask_HS[0].nonzero()[:, 0].tolist()]


@pytest.mark.parametrize(
    ("contents", "used"),
    [
        # A content that the template says as well ("user" is token 4, "assistant" 5): the role is not the content.
        (["user", "assistant w1 user"], [(1, 4), (4, 5), (5, 7), (6, 4)]),
        (["  w1 w2 \n", "w1"], [(1, 7), (2, 8), (5, 7)]),
        (["", "w1"], [(3, 7)]),
    ],
)
def test_only_what_the_messages_wrote_is_used(contents, used, build_tokenizer):
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), contents, strict=True)]
    assert used_tokens(messages, build_tokenizer(chat_template=TEMPLATE)) == used


def test_a_content_of_parts_is_found_where_the_template_writes_it(build_tokenizer):
    template = "{% for m in messages %}{{ m['role'] }} {% for p in m['content'] %}{{ p['text'] }} {% endfor %}</s> {% endfor %}"
    parts = [{"type": "text", "text": "w1 w2"}, {"type": "text", "text": "w3"}]
    assert used_tokens([{"role": "user", "content": parts}], build_tokenizer(chat_template=template)) == [
        (1, 7), (2, 8), (3, 9),
    ]  # fmt: skip


def test_a_template_that_changes_contents_masks_what_it_changed(build_tokenizer):
    template = TEMPLATE.replace("m['content']|trim", "m['content']|replace('w1', 'w9')|trim")
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "user", "content": "w3"}]
    assert used_tokens(messages, build_tokenizer(chat_template=template)) == [(5, 9)]


@pytest.mark.parametrize(
    ("messages", "template", "message"),
    [
        ([{"from": "human", "value": "w1"}], TEMPLATE, '"role" and "content" are needed'),
        (
            [{"role": "system", "content": "w1"}],
            "{{ raise_exception('no system role') }}",
            "roles system.*no system role",
        ),
        ([{"role": "user", "content": "w1"}], "{% for m in messages %}", "chat template refuses"),
    ],
)
def test_chats_that_cannot_be_rendered_are_refused(messages, template, message, build_tokenizer):
    with pytest.raises(InputError, match=message):
        used_tokens(messages, build_tokenizer(chat_template=template))
