"""Which positions are used, against rendering the same conversation message by message, for chat templates of real models."""

import re

import pytest

from crosscode.config.checked import checked
from crosscode.config.data import TokenPolicy
from crosscode.config.positions import PositionRules
from crosscode.data import TokenSequenceLoader, wrap_documents
from crosscode.data.text.labels import ROLES
from crosscode.errors import InputError

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}",
    "llama3": "{{ '<s>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}",
    "gemma": "{{ '<s>' }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) "
    "+ '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}",
    "mistral": "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}",
    "phi3": "{{ '<s>' }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}",
    "vicuna": "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + '</s>' }}{% endif %}{% endfor %}",
}
CHAT = [
    {"role": "user", "content": "user says assistant"},
    {"role": "assistant", "content": "<think>\nhm, user\n</think>\n\nassistant: 4"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "4 again, user"},
]


def used(tokenizer, documents, **rules):
    """The places that are used in the one sequence that the documents fill, and its characters."""
    loader = TokenSequenceLoader(
        wrap_documents(documents, column=None), tokenizer, sequence_length=1024, epochs=1, bos="none",
        separator="none", keep_first_position=True, shuffle=False, positions=rules,
    )  # fmt: skip
    (batch,) = loader
    return batch.mask_HS[0].nonzero()[:, 0].tolist()


def by_hand(tokenizer, messages):
    """For each message where its content begins and ends: in what rendering one message more adds."""
    places = []
    for i, message in enumerate(messages):
        before, after = (tokenizer.apply_chat_template(messages[:n], tokenize=False) if n else "" for n in (i, i + 1))
        assert after.startswith(before)
        at = after.rindex(message["content"])
        assert at >= len(before)
        places.append((at, at + len(message["content"])))
    return places


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_roles_are_those_of_rendering_message_by_message(name, role, tokenizer_of):
    tokenizer = tokenizer_of(TEMPLATES[name])
    expected = [
        place
        for (begin, end), message in zip(by_hand(tokenizer, CHAT), CHAT, strict=True)
        if message["role"] == role
        for place in range(begin, end)
    ]
    assert used(tokenizer, [CHAT], roles=[role]) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_thinking_and_the_turns_beginnings(name, tokenizer_of):
    tokenizer = tokenizer_of(TEMPLATES[name])
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    places = by_hand(tokenizer, CHAT)
    think = range(*re.search("<think>.*</think>", text, re.DOTALL).span())
    answers = [place for i in (1, 3) for place in range(*places[i])]
    assert used(tokenizer, [CHAT], thinking="only") == [*think]
    assert used(tokenizer, [CHAT], thinking="drop") == [place for place in range(len(text)) if place not in think]
    assert used(tokenizer, [CHAT], roles=["assistant"], thinking="drop") == [p for p in answers if p not in think]
    for window, roles in (((-3, 5), ["assistant"]), ((0, 0), None), ((1, 200), ["user"]), ((-200, -1), None)):
        expected = set()
        for i, (begin, end) in enumerate(places):
            before = places[i - 1][1] if i else 0
            if roles is None or CHAT[i]["role"] in roles:
                expected |= {p for p in range(begin + window[0], begin + window[1] + 1) if before <= p < end}
        assert used(tokenizer, [CHAT], around_turn=list(window), **({"roles": roles} if roles else {})) == sorted(
            expected
        )


def test_what_a_template_marks_as_the_assistants_is_its_role(tokenizer_of):
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_of(template)
    expected = [
        place for i in (1, 3) for place in range(by_hand(tokenizer, CHAT)[i][0], by_hand(tokenizer, CHAT)[i][1] + 4)
    ]
    assert used(tokenizer, [CHAT], roles=["assistant"]) == expected
    mask = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert [place for place, one in enumerate(mask) if one] == expected


def test_thinking_that_the_template_writes_is_the_assistants(tokenizer_of):
    """As Qwen3: from a field of its own, and cut out of earlier turns."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.reasoning_content and loop.last %}"
        "{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    chat = [CHAT[0], {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}]
    tokenizer = tokenizer_of(template)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    think = range(*re.search("<think>.*</think>", text, re.DOTALL).span())
    four = text.rindex("4")
    assert used(tokenizer, [chat], thinking="only") == [*think]
    assert used(tokenizer, [chat], roles=["assistant"]) == [*think, four]
    assert used(tokenizer, [chat], roles=["assistant"], thinking="drop") == [four]


def test_what_a_user_writes_is_no_thinking(tokenizer_of):
    tokenizer = tokenizer_of(TEMPLATES["chatml"])
    chat = [{"role": "user", "content": "<think>a</think>"}, {"role": "assistant", "content": "b <think>c"}]
    begin = by_hand(tokenizer, chat)[1][0] + 2
    assert used(tokenizer, [chat], thinking="only") == [*range(begin, begin + len("<think>c"))]


def test_at_most_so_many_of_each_document(tokenizer_of):
    tokenizer = tokenizer_of(TEMPLATES["chatml"])
    assert used(tokenizer, ["abcdefghij", "kl", "mnopq"], at_most_per_document=3) == [0, 3, 6, 10, 11, 12, 13, 15]
    answer = used(tokenizer, [CHAT], roles=["assistant"])
    few = used(tokenizer, [CHAT], roles=["assistant"], at_most_per_document=4)
    assert len(few) == 4
    assert {*few} < {*answer}


@pytest.mark.parametrize("bos", ["sequence", "document", "none"])
@pytest.mark.parametrize("rules", [{"roles": ["assistant"]}, {"thinking": "only"}, {"at_most_per_document": 2}, {}])
def test_a_bos_before_each_sequence_is_nobodys(rules, bos, tokenizer_of):
    """Rows of 8 of a document of many, whose first positions are kept: by the documents' own positions alone."""
    tokenizer = tokenizer_of(TEMPLATES["chatml"])
    tokenizer.bos_token = "~"
    policy = {"sequence_length": 8, "epochs": 1, "separator": "none", "bos": bos, "shuffle": False}
    loader = TokenSequenceLoader(
        wrap_documents([CHAT], column=None), tokenizer, **policy, positions={**rules, "keep_first": True}
    )
    found = [token for batch in loader for token in batch.tokens_HS[batch.mask_HS].tolist()]
    of_documents = bos == "document" and rules in ({}, {"at_most_per_document": 2})
    assert (tokenizer.bos_token_id in found) == (of_documents or (bos == "sequence" and not rules))
    if "at_most_per_document" in rules:
        assert len(found) == 2


@pytest.mark.parametrize(
    "more", [{"pack": False}, {"isolate_documents": True}, {"mask_special_tokens": True, "bos": "document"}]
)
def test_none_of_so_many_is_spent_on_a_position_that_is_left_out(more, tokenizer_of):
    tokenizer = tokenizer_of(TEMPLATES["chatml"])
    tokenizer.bos_token = "~"
    policy = {"sequence_length": 64, "epochs": 1, "bos": "none", "separator": "none", "shuffle": False} | more
    documents = wrap_documents(["abcdefghij", "klm", "~no"], column=None)
    for n in (1, 2, 3):
        loader = TokenSequenceLoader(documents, tokenizer, **policy, positions={"at_most_per_document": n})
        found = [token for batch in loader for token in tokenizer.convert_ids_to_tokens(batch.tokens_HS[batch.mask_HS])]
        of_each = [sum(token in document for token in found) for document in ("abcdefghij", "klm", "no")]
        assert of_each == [n, min(n, 3 if "bos" in more else 2), min(n, 2)], (n, found)


def test_plain_text_has_no_role(tokenizer_of):
    tokenizer = tokenizer_of(TEMPLATES["chatml"])
    for rules in ({"roles": ["user"]}, {"around_turn": [0, 3]}, {"thinking": "only"}):
        places = used(tokenizer, ["plain text", CHAT], **rules)
        assert places[0] >= len("plain text")
    assert used(tokenizer, ["ab<think>c"], thinking="drop") == [*range(10)]


def test_rules_that_leave_nothing_are_named(tokenizer_of):
    with pytest.raises(
        InputError, match=r"1 documents hold no position that positions = \{'roles': \['asistant'\].* leaves"
    ):
        used(tokenizer_of(TEMPLATES["chatml"]), [CHAT], roles=["asistant"])


def test_a_template_that_rewrites_what_is_said_is_refused(tokenizer_of):
    tokenizer = tokenizer_of("{% for m in messages %}{{ m['content']|tojson }}{% endfor %}")
    with pytest.raises(InputError, match="rewrites a chat so that what its messages wrote cannot be told"):
        used(tokenizer, [[{"role": "assistant", "content": 'w1 "w2"'}]], roles=["assistant"])


UPPER = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | upper }}|{% endfor %}"


@pytest.mark.parametrize("rules", [{"roles": ["assistant"]}, {"around_turn": [0, 3]}, {"thinking": "drop"}])
@pytest.mark.parametrize("body", ["upper", "replace('r', 's')", "title"])
def test_a_template_that_changes_what_is_said_is_refused_where_it_is_asked_who_says_what(rules, body, tokenizer_of):
    tokenizer = tokenizer_of(UPPER.replace("upper", body))
    chats = [[{"role": "user", "content": "ONE 2"}, {"role": "assistant", "content": "three or four"}]]
    with pytest.raises(InputError, match="rewrites a chat so that what its messages wrote cannot be told"):
        used(tokenizer, chats, **rules)
    plain = TokenSequenceLoader(
        wrap_documents(chats), tokenizer, sequence_length=128, epochs=1, bos="none", template_tokens="keep"
    )
    with pytest.raises(InputError, match="rewrites a chat so that what its messages wrote cannot be told"):
        next(iter(plain.fresh(template_tokens="answers")))
    batch = next(iter(plain))  # nobody asks
    assert {ROLES[role] for role in batch.labels.role_T[batch.mask_HS].tolist()} == {"unknown"}


def test_what_a_template_marks_of_the_assistant_it_may_change(tokenizer_of):
    marked = "{% generation %}{{ m['content'] | upper }}{% endgeneration %}"
    template = UPPER.replace(
        "{{ m['content'] | upper }}",
        f"{{% if m['role'] == 'assistant' %}}{marked}{{% else %}}{{{{ m['content'] }}}}{{% endif %}}",
    )
    tokenizer = tokenizer_of(template)
    chat = [{"role": "user", "content": "ONE 2"}, {"role": "assistant", "content": "three"}]
    found = used(tokenizer, [chat], roles=["assistant"])
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert "".join(text[slice(*offsets[p])] for p in found) == "THREE"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"around_turn": [3, -1]}, r"around_turn = \[3, -1\]: must be \[first, last\]"),
        ({"roles": []}, "roles"),
        ({"thinking": "maybe"}, "thinking = 'maybe'"),
        ({"at_most_per_document": 0}, "at_most_per_document = 0"),
    ],
)
def test_rules_that_say_nothing_are_refused(rules, message):
    with pytest.raises(InputError, match=message):
        checked(PositionRules, rules)


def test_what_says_nothing_of_positions_is_recorded_as_it_was():
    assert "positions" not in TokenPolicy(sequence_length=8).recorded()
    recorded = TokenPolicy(sequence_length=8, positions=PositionRules(roles=["assistant"])).recorded()
    assert recorded["positions"]["roles"] == ["assistant"]


def test_white_space_whose_place_is_trimmed_is_of_who_says_it():
    """Of GPT-NeoX's kind: tokens of white space alone have an end and no beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
    chat = [{"role": "user", "content": "\n\na  b\n"}, {"role": "assistant", "content": " c "}]
    (batch,) = TokenSequenceLoader(
        wrap_documents([chat]), fast, sequence_length=40, batch_size=1, epochs=1, separator="none",
        template_tokens="answers", keep_first_position=True,
    )  # fmt: skip
    text = fast.apply_chat_template(chat, tokenize=False)
    roles = [ROLES[role] for role in batch.labels.role_T[0].tolist()[: len(text)]]
    expected = ["template"] * 6 + ["user"] * 7 + ["template"] * 12 + ["assistant"] * 3 + ["template"]
    assert text == "[user]\n\na  b\n;[assistant] c ;" and roles == expected
    assert batch.mask_HS[0, : len(text)].tolist() == [role == "assistant" for role in expected]
