"""Who says each character of odd chats, against changing the chat one character at a time and seeing what comes out changed."""

import json
import random
import re

import pytest

from crosscode.config.positions import PositionRules
from crosscode.data.text.labels import ROLES
from crosscode.data.text.render import ROLE_SHIFT, DocumentRenderer
from crosscode.errors import InputError

EACH = "{% for m in messages %}BODY{% endfor %}"
TEMPLATES = {
    "system first, earlier thinking cut": EACH.replace("BODY", "{% if m.role == 'system' %}{{ m.content }}{% endif %}")
    + EACH.replace("BODY", "{% if m.role != 'system' %}{{ '<|' + m.role + '|>' + m.content.split('</think>')[-1] }}{% endif %}"),
    "system in the last turn": "{% set sys = messages[0].content %}"
    + EACH.replace("BODY", "{{ '[INST] ' + (sys + '\n\n' if loop.last else '') + m.content + '[/INST]' }}"),
    "turns merged": EACH.replace(
        "BODY",
        "{{ '\n' if not loop.first and messages[loop.index0 - 1].role == m.role else '### ' + m.role + ':\n' }}"
        "{{ m.content | trim }}",
    ),
    "lines quoted": EACH.replace("BODY", "{{ m.role }}{% for l in m.content.split('\n') %}{{ '\n> ' + l }}{% endfor %}"),
    "cut short": EACH.replace("BODY", "{{ '<' + m.role + '>' + m.content[:9] }}"),
    "said twice": EACH.replace("BODY", "{{ m.role + ': ' + m.content + '\n' }}") + "{{ 'Again: ' + messages[0].content }}",
    "reasoning apart": EACH.replace(
        "BODY",
        "{% if m.thinking %}{{ '<|analysis|>' + m.thinking }}{% endif %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}",
    ),
}  # fmt: skip
TAGS = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]")
WORDS = [
    "user",
    "assistant",
    "\n",
    "  ",
    "a",
    "it's é",
    "</s>",
    "[INST]",
    "[/INST]",
    "</think>",
    "Again: ",
    "日本",
    "<|end|>",
]


def chats(name, n):
    rng = random.Random(name)
    for _ in range(n):
        found = []
        for _ in range(rng.randint(1, 4)):
            role = rng.choice(["user", "assistant", "system", "tool"])
            content = "".join(rng.choices(WORDS, k=rng.choice([0, 1, 3, 5])))
            thinking = {"thinking": rng.choice(["hm", "[INST]user"])} if rng.random() < 0.3 else {}
            found.append({"role": role, "content": content, **thinking})
        yield found


def owners(render, chat, text):
    """By place of a letter or digit: the roles whose texts decide it."""
    found = {}
    for i, message in enumerate(chat):
        for field in ("content", "thinking"):
            for j, character in enumerate(message.get(field, "")):
                for other in "qZ" if character.isalnum() else "":
                    changed = json.loads(json.dumps(chat))
                    changed[i][field] = message[field][:j] + other + message[field][j + 1 :]
                    out = render(changed)
                    if len(out) == len(text):
                        for place in (p for p, (x, y) in enumerate(zip(out, text, strict=True)) if x != y):
                            found.setdefault(place, set()).add(message["role"])
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_character_is_its_whose_change_changes_it(name, tokenizer_of):
    tokenizer = tokenizer_of(TEMPLATES[name])
    rules = {"bos_id": None, "row_bos_id": None, "separator_id": None, "template_tokens": "keep"}
    renderer = DocumentRenderer(tokenizer, **rules, positions=PositionRules(roles=["assistant"]))
    n_told = 0
    for chat in chats(name, 12):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        try:
            ((_, flags_T, *_),) = renderer([chat], pad_to=None, pad_id=0)
        except InputError:
            continue
        n_told += 1
        expected = owners(lambda one: tokenizer.apply_chat_template(one, tokenize=False), chat, text)
        for place, (character, flag) in enumerate(zip(text, flags_T.tolist(), strict=True)):
            if character.isalnum():
                assert ROLES[flag >> ROLE_SHIFT] in expected.get(place, {"template"}), (chat, text, place)
    assert n_told >= 10


def test_a_chat_is_refused_only_where_all_of_a_message_may_have_been_looked_for(tokenizer_of):
    """Messages of tags alone, beside thinking that is cut: told by writing them down, unless the tag is what cuts."""
    said = "{{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content }}"
    tokenizer = tokenizer_of(EACH.replace("BODY", "{{ '<|' + m.role + '|>' }}" + said))
    rules = {"bos_id": None, "row_bos_id": None, "separator_id": None, "template_tokens": "keep"}
    renderer = DocumentRenderer(tokenizer, **rules, positions=PositionRules(roles=["assistant"]))
    rng = random.Random(0)
    n_told = 0
    for _ in range(200):
        contents = [
            "".join(rng.choices([*WORDS, "a</think>b"], k=rng.choice([0, 1, 1, 3]))) for _ in range(rng.randint(2, 5))
        ]
        chat = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        pieces = []
        for i, one in enumerate(chat):
            cut = one["role"] == "assistant" and i + 1 < len(chat)
            pieces += [(f"<|{one['role']}|>", "template")]
            pieces += [(one["content"].split("</think>")[-1] if cut else one["content"], one["role"])]
        try:
            ((_, flags_T, *_),) = renderer([chat], pad_to=None, pad_id=0)
        except InputError:
            assert any("</think>" in one and not TAGS.sub("", one).strip() for one in contents), chat
            continue
        n_told += 1
        text, expected = "".join(piece for piece, _ in pieces), [role for piece, role in pieces for _ in piece]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == text
        for character, flag, role in zip(text, flags_T.tolist(), expected, strict=True):
            assert character.isspace() or ROLES[flag >> ROLE_SHIFT] == role, chat
    assert n_told > 150


def test_thinking_that_does_not_end_ends_with_its_message(tokenizer_of):
    tokenizer = tokenizer_of(EACH.replace("BODY", "{{ '<' + m.role + '>' + m.content + '|' }}"))
    chat = [
        {"role": "user", "content": "<think>u"},
        {"role": "assistant", "content": "a<think>b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "<think>d</think>e"},
    ]
    renderer = DocumentRenderer(
        tokenizer, bos_id=None, row_bos_id=None, separator_id=None, template_tokens="keep",
        positions=PositionRules(thinking="only"),
    )  # fmt: skip
    ((_, flags_T, *_),) = renderer([chat], pad_to=None, pad_id=0)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert (
        "".join(c for c, flag in zip(text, flags_T.tolist(), strict=True) if not flag & 1) == "<think>b<think>d</think>"
    )
