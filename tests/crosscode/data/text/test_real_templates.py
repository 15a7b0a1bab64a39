"""Who says each token, by the chat templates of real models, against writing the same conversation down message by message.

The templates are those that the models' tokenizers ship (of Qwen2.5 and Qwen3 without tools).
"""

import random

import pytest

from crosscode.data import TokenSequenceLoader, wrap_documents
from crosscode.data.text.labels import ROLES

ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # noqa: E501
QWEN3 = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in message.content %}
                {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
                {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""  # noqa: E501
TEMPLATES = {  # as they are written: no line is cut
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"  # noqa: E501
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen2.5": QWEN25,
    "qwen3": QWEN3,
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"  # noqa: E501
    "{% for message in messages %}"
    + ALTERNATE
    + "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "mistral": "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}",
    "phi3": "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"  # noqa: E501
    "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}"  # noqa: E501
    "\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "tulu3": "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    + ALTERNATE
    + "{% if loop.index0 == 0 and "
    "system_message != false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
}
WITHOUT_SYSTEM = ("gemma", "mistral", "llama2")


def written(name, messages):
    """The conversation as (text, role) pieces, by hand; `template` is what no message says."""
    last, frame = len(messages) - 1, "template"
    pieces = []
    if name in ("llama3", "gemma", "mistral"):
        pieces.append(("<s>", frame))
    if name == "qwen2.5" and messages[0]["role"] != "system":
        pieces.append(
            (
                "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n",
                frame,
            )
        )
    for i, message in enumerate(messages):
        role, said = message["role"], message["content"]
        if name in ("llama3", "gemma", "llama2"):
            said = said.strip()
        is_user = role == "user"
        before, after = {
            "chatml": (f"<|im_start|>{role}\n", "<|im_end|>\n"),
            "qwen2.5": (f"<|im_start|>{role}\n", "<|im_end|>\n"),
            "qwen3": (f"<|im_start|>{role}\n", "<|im_end|>\n"),
            "llama3": (f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
            "gemma": (f"<start_of_turn>{'user' if is_user else 'model'}\n", "<end_of_turn>\n"),
            "mistral": ("[INST] ", " [/INST]") if is_user else ("", "</s>"),
            "phi3": (f"<|{role}|>\n", "<|end|>\n"),
            "zephyr": (f"<|{role}|>\n", "</s>\n"),
            "tulu3": (f"<|{role}|>\n", "\n" if role != "assistant" else "</s>" if i == last else "</s>\n"),
            "llama2": ("<s>[INST] ", " [/INST]") if is_user else (" ", " </s>"),
        }[name]
        if name == "qwen3" and role == "assistant" and i == last:
            pieces += [
                (before, frame),
                ("<think>\n\n</think>", role),
                ("\n\n", frame),
                (said.lstrip("\n"), role),
                (after, frame),
            ]
        else:
            pieces += [(before, frame), (said, role), (after, frame)]
    return [*pieces, ("</s>", frame)] if name == "phi3" else pieces


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each character but for BOS and EOS."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {character: i for i, character in enumerate(["<unk>", *map(chr, range(10, 127))])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def chats(name, n=60):
    """Conversations whose messages look like one another, like the template, and like nothing at all."""
    rng = random.Random(name)
    words = [
        "user",
        "assistant",
        "model",
        "\n",
        " ",
        "a",
        "it's é",
        "</s>",
        "<|im_end|>",
        "[INST]",
        "<|user|>\n",
        "system",
        "?",
    ]
    for _ in range(n):
        contents = ["".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 6))]
        found = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
        if name not in WITHOUT_SYSTEM and rng.random() < 0.4:
            found.insert(0, {"role": "system", "content": rng.choice(words)})
        yield found


def roles_in(tokenizer, chat, **rules):
    loader = TokenSequenceLoader(
        wrap_documents([chat]), tokenizer, sequence_length=2048, epochs=1, bos="none", separator="none",
        keep_first_position=True, **rules,
    )  # fmt: skip
    (batch,) = loader
    return batch.mask_HS[0].tolist(), [ROLES[role] for role in batch.labels.role_T[0].tolist()]


@pytest.mark.parametrize("name", TEMPLATES)
def test_roles_are_those_of_writing_it_down_message_by_message(name, tokenizer):
    tokenizer.chat_template = TEMPLATES[name]
    n_told = 0
    for chat in chats(name):
        pieces = written(name, chat)
        text = "".join(piece for piece, _ in pieces)
        if name == "zephyr":  # its newlines around blocks are the renderer's affair
            text, pieces = aligned(tokenizer.apply_chat_template(chat, tokenize=False), pieces)
        assert tokenizer.apply_chat_template(chat, tokenize=False) == text
        of_character = [role for piece, role in pieces for _ in piece]
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        expected = [
            next((role for role in of_character[begin:end] if role != "template"), "template") for begin, end in offsets
        ]
        mask, roles = roles_in(tokenizer, chat)
        roles = roles[: len(expected)]
        if {*roles} == {"unknown"}:
            continue
        n_told += 1
        assert roles == expected, chat
        for role in ("user", "assistant"):
            if role in expected:
                mask, _ = roles_in(tokenizer, chat, positions={"roles": [role]})
                assert [at for at, use in enumerate(mask) if use] == [
                    at for at, one in enumerate(expected) if one == role
                ]
    assert n_told > 50


def aligned(text, pieces):
    """The pieces with the newlines that stand between them in the text."""
    found, at = [], 0
    for piece, role in pieces:
        begin = at
        while not text.startswith(piece, at) and text[at] == "\n":
            at += 1
        found += [(text[begin:at], "template"), (piece, role)]
        at += len(piece)
    return text, [*found, (text[at:], "template")] if set(text[at:]) <= {"\n"} else found


def test_a_system_message_inside_a_turn_is_the_systems(tokenizer):
    tokenizer.chat_template = TEMPLATES["llama2"]
    chat = [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ok"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    places = [
        place for place, _ in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ]
    _, roles = roles_in(tokenizer, chat)
    for message in chat:
        at = text.rindex(message["content"])
        own = [places.index(place) for place in range(at, at + len(message["content"]))]
        assert [roles[t] for t in own] == [message["role"]] * len(own)


def test_thinking_that_qwen3_takes_out_of_earlier_turns(tokenizer):
    tokenizer.chat_template = TEMPLATES["qwen3"]
    chat = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "<think>\nwell\n</think>\n\nfour"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert "hm" not in text
    _, roles = roles_in(tokenizer, chat)
    said = {
        "one": "user",
        "two": "assistant",
        "three": "user",
        "<think>\nwell\n</think>": "assistant",
        "four": "assistant",
    }
    for content, role in said.items():
        at = text.rindex(content)
        assert {*roles[at : at + len(content)]} == {role}
    assert roles.count("assistant") == len("two" + "<think>\nwell\n</think>\n\nfour")
