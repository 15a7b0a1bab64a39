"""Chats: which tokens the messages wrote, and what is refused."""

import pytest
import transformers

from crosscode.data import TokenSequenceLoader, wrap_documents
from crosscode.data.text.chats import message_spans
from crosscode.errors import InputError

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content']|trim }} </s> {% endfor %}"


def used_tokens(messages, tokenizer, template_tokens="mask"):
    loader = TokenSequenceLoader(
        wrap_documents([messages]), tokenizer, sequence_length=16, epochs=1, bos="none", keep_first_position=True,
        template_tokens=template_tokens,
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


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("m['content']|trim", "m['content'][1:]|trim")])
def test_only_what_the_assistant_says_is_an_answer(template, build_tokenizer):
    texts = (("user", " w1 w2"), ("assistant", " w2 w3"), ("user", " w1"), ("assistant", " w4"))
    messages = [{"role": role, "content": text} for role, text in texts]
    found = used_tokens(messages, build_tokenizer(chat_template=template), "answers")
    # user w1 w2 </s> assistant w2 w3 </s> user w1 </s> assistant w4 </s>
    assert [place for place, _ in found] == [5, 6, 12]


def test_plain_text_holds_no_answer(build_tokenizer):
    tokenizer = build_tokenizer(chat_template=TEMPLATE)
    chat = [{"role": "assistant", "content": "w1 w2"}]
    rules = {"sequence_length": 16, "epochs": 1, "bos": "document", "keep_first_position": True}
    loader = TokenSequenceLoader(
        wrap_documents(["w5 w6 w7", chat, [9, 9]], column=None), tokenizer, **rules, template_tokens="answers"
    )
    (batch,) = loader
    whole = next(iter(loader.fresh(template_tokens="keep")))
    assert batch.tokens_HS.tolist() == whole.tokens_HS.tolist()
    answer = tokenizer("w1 w2", add_special_tokens=False)["input_ids"]
    assert batch.tokens_HS[batch.mask_HS].tolist() == answer


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


LOOP = "{% for m in messages %}[{{ m['role'] }}]{{ BODY }}|{% endfor %}"
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ (first if loop.first else '') + m['content'] | trim }}|{% endfor %}"
)
MISTRAL = (
    "{% set system = messages[0]['content'] %}{% for m in messages[1:] %}"
    "[{{ m['role'] }}]{{ (system + '\n\n' if loop.last else '') + m['content'] }}|{% endfor %}"
)
THINKING = LOOP.replace("BODY", "m['content'].split('</think>')[-1].lstrip('\n') if not loop.last else m['content']")
THOUGHT = "<think>\nno user here\n</think>\n\nuser two"


@pytest.mark.parametrize(
    ("template", "contents", "text", "written"),
    [
        (THINKING, ["user", THOUGHT, "three"], "[r]user|[r]user two|[r]three|", ["user", "user two", "three"]),
        (THINKING, ["a", THOUGHT], f"[r]a|[r]{THOUGHT}|", ["a", THOUGHT]),
        (THINKING, [THOUGHT, "a <b> c"], "[r]user two|[r]a <b> c|", ["user two", "a <b> c"]),
        (
            GEMMA,
            ["system be brief", " system ", "r"],
            "[r]system be brief\n\nsystem|[r]r|",
            ["system be brief", "system", "r"],
        ),
        (MISTRAL, ["be r", "r", "one", "r"], "[r]r|[r]one|[r]be r\n\nr|", ["r", "one", "be r", "r"]),
        (LOOP.replace("BODY", "m['content'].lstrip()"), ["  a b ", " r"], "[r]a b |[r]r|", ["a b", "r"]),
        (LOOP.replace("BODY", "m['content'].split('[/x]')[1]"), ["a[/x]r", "a[/x]b"], "[r]r|[r]b|", ["r", "b"]),
        (LOOP.replace("BODY", "m['content'] + m['content'] | trim"), [" a"], "[r] aa|", ["a", "a"]),
        (LOOP.replace("BODY", "m['content'] | upper"), ["a", "B"], "[r]A|[r]B|", ["B"]),
    ],
)
def test_turns_that_a_template_cuts_merges_or_reorders(template, contents, text, written, build_tokenizer):
    messages = [
        {"role": "system" if i == 0 and template is GEMMA else "r", "content": content}
        for i, content in enumerate(contents)
    ]
    rendered, found, _ = message_spans(build_tokenizer(chat_template=template), messages)
    assert rendered == text
    assert [rendered[begin:end] for (begin, end), _ in found] == written


@pytest.mark.parametrize(
    "body", ["m['content'] | replace('w', 'www')", "m['content'] | tojson | tojson", "m['content'] | urlencode"]
)
def test_a_template_that_leaves_no_place_known_is_refused(body, build_tokenizer):
    tokenizer = build_tokenizer(chat_template=LOOP.replace("BODY", body))
    with pytest.raises(InputError, match=r"rewrites a chat .* set template_tokens: keep"):
        message_spans(tokenizer, [{"role": "r", "content": 'w1 "w2"'}])


def test_a_tokenizer_without_offsets_is_refused_in_words():
    tokenizer = transformers.ByT5Tokenizer(chat_template=LOOP.replace("BODY", "m['content']"))
    chats = wrap_documents([[{"role": "r", "content": "w1"}]])
    loader = TokenSequenceLoader(chats, tokenizer, sequence_length=16, epochs=1, template_tokens="mask")
    with pytest.raises(InputError, match=r"template_tokens: mask takes .* a ByT5Tokenizer does not; .* keep"):
        next(iter(loader))
    assert next(iter(loader.fresh(template_tokens="keep"))).tokens_HS.shape == (1, 16)
