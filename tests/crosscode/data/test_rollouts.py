"""What a language model writes: against `generate` itself, kept, and gone on with after a kill at any point."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from crosscode.config.sources import Rollouts
from crosscode.data import TokenSequenceLoader, wrap_documents, wrap_language_model
from crosscode.data.rollouts import RolloutFolder, stop_ids, wrap_rollouts
from crosscode.errors import InputError
from crosscode.seeds import derived_seed

sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))
from crash_points import counted, in_child

TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ ' ' + m['role'] + ' ' + m['content'] + ' <pad> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant ' }}{% endif %}"
)
CHATS = [
    [{"role": "user", "content": "w1 w2"}],
    [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}],  # the same prompt
    [{"role": "user", "content": "w5 w6 w7 w8 w9"}],
    [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w2"}, {"role": "user", "content": "w9"}],
    [{"role": "user", "content": "w11"}],
    [{"role": "assistant", "content": "w11"}],  # nothing to answer
]
MODEL = {"path": "tiny", "name": "tiny"}


@pytest.fixture(scope="module")
def lm(build_model, build_tokenizer):
    return wrap_language_model(build_model("llama"), build_tokenizer(chat_template=TEMPLATE), "tiny")


@pytest.fixture
def make(lm, tmp_path):
    """`make(documents, folder, **rules)`: the folder, filled."""

    def fill(documents, folder="rollouts", lm=lm, **rules):
        rules = Rollouts.model_validate(
            {"type": "rollouts", "model": MODEL, "prompts": {"type": "demo"}, "batch_size": 2, "max_new_tokens": 6}
            | rules
        )
        recipe = rules.model_dump(mode="json", exclude={"type", "model", "prompts", "folder"})
        made = RolloutFolder(tmp_path / folder, recipe)
        made.fill(rules, wrap_documents(documents), lm, lambda done, n: None)
        return made

    return fill


def generated(lm, prompts, seed, n_new=6, **how):
    """New ids of one batch, by `generate` alone."""
    S = max(map(len, prompts))
    pad = lm.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (S - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (S - len(one)) + [1] * len(one) for one in prompts])
    torch.manual_seed(seed)
    out = lm.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=n_new, pad_token_id=pad, eos_token_id=[2, 3], **how
    )
    answers = [row[S:] for row in out.tolist()]
    return [one[: min([one.index(end) for end in (2, 3) if end in one], default=len(one))] for one in answers]


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_chats_are_answered_as_generate_answers_them(temperature, lm, make):
    how = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": 0}
    found = make(CHATS, sampling={"temperature": temperature}, seed=3).whole()
    prompts = [CHATS[0], CHATS[2], CHATS[3], CHATS[4]]
    ids = [
        lm.tokenizer.apply_chat_template(one, tokenize=True, add_generation_prompt=True)["input_ids"] for one in prompts
    ]
    answers = [answer for i in (0, 1) for answer in generated(lm, ids[2 * i : 2 * i + 2], derived_seed(3, i), **how)]
    assert len({*map(tuple, answers)}) > 1
    texts = [lm.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    expected = [[*one, {"role": "assistant", "content": text}] for one, text in zip(prompts, texts, strict=True)]
    assert found == [one for one in expected if one[-1]["content"]]


def test_texts_and_token_ids_are_gone_on_with(lm, make):
    texts = ["w1 w2 w3 w4 w5", "w8 w9"]
    ids = [lm.tokenizer(text)["input_ids"][:3] for text in texts]
    (first, second) = generated(lm, [[1, *one] for one in ids], 0, do_sample=True, top_k=0)
    found = make(texts, prompt_tokens=3).whole()
    assert found == [
        lm.tokenizer.decode(a + b, skip_special_tokens=True) for a, b in zip(ids, (first, second), strict=True)
    ]
    answers = generated(lm, ids, 0, do_sample=True, top_k=0)
    assert make(ids, "ids", prompt_tokens=3).whole() == [a + b for a, b in zip(ids, answers, strict=True)]


def test_an_adapter_writes_as_peft_does(tmp_path, build_model, build_tokenizer, make):
    peft = pytest.importorskip("peft")
    from crosscode.data import load_language_model

    tokenizer = build_tokenizer(chat_template=TEMPLATE)
    build_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    whole = peft.get_peft_model(build_model("llama"), config)
    whole.save_pretrained(tmp_path / "lora")
    adapted = load_language_model(str(tmp_path / "base"), adapter=str(tmp_path / "lora"))
    found = make(CHATS[:1], lm=adapted, max_new_tokens=20).whole()
    ids = tokenizer.apply_chat_template(CHATS[0], tokenize=True, add_generation_prompt=True)["input_ids"]
    torch.manual_seed(0)
    out = whole.eval().generate(
        input_ids=torch.tensor([ids]), max_new_tokens=20, do_sample=True, top_k=0, pad_token_id=3, eos_token_id=[2, 3]
    )
    assert found[0][-1]["content"] == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    assert found != make(CHATS[:1], "plain", max_new_tokens=20).whole()


def test_a_text_without_a_token_is_left_out(build_model, build_tokenizer, make):
    tokenizer = build_tokenizer()
    tokenizer.bos_token = None
    without_bos = wrap_language_model(build_model("llama"), tokenizer, "tiny")
    (one,) = make([" ", "w1 w2"], lm=without_bos, prompt_tokens=1).whole()
    assert one.startswith("w1 ")
    with pytest.raises(InputError, match="has none that can be used"):
        make([" "], "none", lm=without_bos)


def test_what_ends_an_answer(lm, build_tokenizer, build_model):
    assert stop_ids(lm) == [2, 3]  # </s>, and the <pad> with which the template ends a message
    model = build_model("llama")
    model.generation_config.eos_token_id = [7, 2]
    assert stop_ids(wrap_language_model(model, build_tokenizer(), "tiny")) == [7, 2]


def test_thinking_that_the_template_opens_belongs_to_the_answer(build_model, build_tokenizer, make):
    thinks = wrap_language_model(
        build_model("llama"), build_tokenizer(chat_template=TEMPLATE.replace("' assistant '", "' assistant <think>\n'"))
    )
    for chat in make(CHATS[:1], lm=thinks).whole():
        assert chat[-1]["content"].startswith("<think>\nw")


def test_what_was_written_before_is_not_kept_again(lm, make):
    texts = ["w1 w2", "w1 w2 w3", "w1 w2 w4", "w8 w9"]
    found = make(texts, prompt_tokens=2, sampling={"temperature": 0}, batch_size=1).whole()
    assert len(found) == len({*found}) == 2
    assert make([*texts, *texts], "n", prompt_tokens=2, n_prompts=2, sampling={"temperature": 0}).whole() == found[:1]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.name != "lock"}


def test_a_kill_at_any_point_loses_no_batch_and_changes_none(make, tmp_path):
    expected = contents(make(CHATS, seed=1).path)
    count, said = tmp_path / "count", tmp_path / "said"
    assert in_child(lambda: counted(None, said, None, count, lambda: make(CHATS, "counted", seed=1) and 0)) == 0
    assert contents(tmp_path / "counted") == expected
    n_before = []
    for point in range(1, int(count.read_text()) + 1):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        assert (
            in_child(lambda at=point: counted(None, said, at, None, lambda: make(CHATS, "killed", seed=1) and 0)) == -9
        )
        left = [
            name
            for name in (contents(tmp_path / "killed") if (tmp_path / "killed").is_dir() else {})
            if "rollouts-" in name
        ]
        n_before.append(len([name for name in left if name.startswith("rollouts-")]))
        assert contents(make(CHATS, "killed", seed=1).path) == expected, point
    assert {*n_before} == {0, 1, 2}


def test_what_is_there_is_not_written_again(make, lm, monkeypatch):
    folder = make(CHATS)
    before = contents(folder.path)
    monkeypatch.setattr(type(lm.model), "generate", None)
    assert contents(make(CHATS).path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 9}, "holds other rollouts: seed is 0 there and 9 here; name another folder"),
        ({"sampling": {"top_p": 0.5}}, r"sampling.top_p is 1.0 there and 0.5 here"),
    ],
)
def test_rollouts_of_another_recipe_are_refused(changes, message, make):
    make(CHATS)
    with pytest.raises(InputError, match=message):
        make(CHATS, **changes)


def test_damage_and_foreign_files_are_refused(make, tmp_path):
    folder = make(CHATS)
    (first, second) = sorted(folder.path.glob("rollouts-*"))
    whole = second.read_bytes()
    second.write_bytes(whole.replace(b"w", b"v", 1))
    with pytest.raises(InputError, match=r"rollouts-000001-.* is damaged"):
        folder.whole()
    second.unlink()
    with pytest.raises(InputError, match="1 of its 2 batches are there"):
        folder.whole()
    second.write_bytes(whole)
    first.unlink()
    with pytest.raises(InputError, match="a batch before it is missing"):
        folder.whole()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(InputError, match=r"holds other files \(notes.txt\)"):
        make(CHATS, "mine")


def test_prompts_that_leave_no_room_are_left_out(make, lm):
    long = " ".join(["w1"] * 60)
    assert len(make([[{"role": "user", "content": long}], CHATS[0]], batch_size=1).whole()) == 1
    with pytest.raises(InputError, match=r"has none that can be used \(1 are too long\)"):
        make([[{"role": "user", "content": long}]], "none")


def test_they_are_read_like_any_chats(make, lm):
    source = wrap_rollouts(make(CHATS).whole(), Rollouts(type="rollouts", model="tiny", prompts={"type": "demo"}))
    loader = TokenSequenceLoader(
        source, lm.tokenizer, sequence_length=64, epochs=1, positions={"roles": ["assistant"]}, shuffle=False
    )
    said = [int(token) for batch in loader for token in batch.tokens_HS[batch.mask_HS]]
    answers = " ".join(one["content"] for chat in source.open() for one in chat if one["role"] == "assistant")
    assert said == lm.tokenizer(answers, add_special_tokens=False)["input_ids"]
