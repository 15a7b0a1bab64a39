"""Random texts and chats in two tokenizers, whole, cut and packed, against a search over characters that knows what the
templates write without asking them."""

import random
from collections import Counter

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from crosscode.data import TokenSequenceLoader, wrap_documents
from crosscode.demo import demo_model_path

PARTS = [
    "class", "if x:", " ", "   ", "\n", "\r\n", "\t", "na\u00efve", "e\u0301", "\ufb01ne", "\u4f60\u597d", "<x", ".", "\u0130",
    "\U0001f642", "\U0001f469\u200d\U0001f680", "<mark>", " <mark> ", "CAPS", "12345", "\u200b", "\u2126", "\uff21", "a", "_",
    "\u00bd", "\ud55c",
]  # fmt: skip
FRAMES = [
    ("<|{}|>\n", "\n", False, False),
    ("[{}] ", "</s>", True, True),
    ("", "\n\n", False, True),
    ("{}: ", "", True, False),
]
"""What stands before (with the role) and behind each content, whether a BOS begins, and whether contents are trimmed."""


def fast(model, normalizer, pre_tokenizer, decoder, train_on=None):
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoder
    if train_on is not None:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<s>", "</s>", "<unk>"]
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(train_on, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers():
    texts = [" ".join(PARTS) * 3, "class naive if x fine caps"]
    byte_level, ascii_ = pre_tokenizers.ByteLevel(add_prefix_space=False), [chr(i) for i in range(32, 127)]
    decomposed = fast(models.BPE(), normalizers.NFKD(), byte_level, decoders.ByteLevel(), texts)
    bytes_of = {f"<0x{i:02X}>": i + 3 for i in range(256)}
    own = {piece: 259 + i for i, piece in enumerate(["\u2581", *ascii_[1:], "cl", "as"])}
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, **bytes_of, **own}
    fallback = fast(
        models.BPE(pieces, [("c", "l"), ("a", "s")], unk_token="<unk>", byte_fallback=True, fuse_unk=True),
        normalizers.Replace("\r\n", "\n"), pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(),
    )  # fmt: skip
    known = ["<unk>", "<s>", "</s>", "class", "na", "##ive", "if", "fi", "##ne", *ascii_, *(f"##{c}" for c in ascii_)]
    words = {w: i for i, w in enumerate([*known, "\u4f60", "\u597d", "\U0001f642"])}
    stripped = fast(
        models.WordPiece(words, unk_token="<unk>"),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
        pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(),
    )  # fmt: skip
    stripped.add_tokens([AddedToken("<mark>", lstrip=True, normalized=False)])
    decomposed.add_tokens([AddedToken("<mark>", rstrip=True, special=True)])
    base = AutoTokenizer.from_pretrained(demo_model_path("base"))
    byte_level = fast(models.BPE(), None, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel(), texts)
    byte_level.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return [base, decomposed, fallback, stripped, byte_level]


SPACES = [part for part in PARTS if not part.strip()]


def content(rng):
    if rng.random() < 0.2:
        return "".join(rng.choices(SPACES, k=rng.choice([1, 2, 5])))
    return "".join(rng.choices(PARTS, k=rng.choice([0, 1, 3, 8, 20])))


def rendered(document, frame, bos):
    """The text, and where each content stands in it: all of what it says, but for white space around."""
    if isinstance(document, str):
        return document, [(0, len(document))]
    before, behind, has_bos, trims = frame
    text, spans = bos if has_bos else "", []
    for message in document:
        own = message["content"].strip() if trims else message["content"]
        text += before.format(message["role"])
        begin = len(text) + len(own) - len(own.lstrip())
        spans.append((begin, begin + len(own.strip())))
        text += own + behind
    return text, spans


def template(frame):
    before, behind, has_bos, trims = (part.replace("\n", "\\n") if isinstance(part, str) else part for part in frame)
    each = (
        "{{ '"
        + before.replace("{}", "' + m.role + '")
        + "' }}{{ m.content"
        + " | trim" * trims
        + " }}{{ '"
        + behind
        + "' }}"
    )
    return "{{ bos_token }}" * has_bos + "{% for m in messages %}" + each + "{% endfor %}"


def encoded(tokenizer, text):
    """Ids, and of each token where it ends: in characters, None where another one ends the same character behind it."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in found["offset_mapping"]]
    return found["input_ids"], [None if end in ends[i + 1 : i + 2] else end for i, end in enumerate(ends)]


class Expected:
    """What a loader is to give: rows of `(ids of the first, ids of the other, partners)`, all of them."""

    def __init__(self, pair, frames, options):
        self.pair, self.frames, self.options = pair, frames, options

    def rows(self, documents):
        first, length = self.pair[0], self.options["sequence_length"]
        stream = []  # (id, document, place in it)
        of_documents = []
        for document in documents:
            text, spans = rendered(document, self.frames[0], first.bos_token)
            ids, ends = encoded(first, text)
            if not ids:
                continue
            if self.options["bos"] == "document" and ids[0] != first.bos_token_id:
                ids, ends = [first.bos_token_id, *ids], [None, *ends]
            if self.options["separator"] == "eos" and ids[-1] != first.eos_token_id:
                ids, ends = [*ids, first.eos_token_id], [*ends, None]
            stream += [(token, len(of_documents), place) for place, token in enumerate(ids)]
            of_documents.append((document, text, spans, ids, ends))
        rows, at = [], 0
        while at < len(stream):
            has_bos = self.options["bos"] == "sequence" and stream[at][0] != first.bos_token_id
            taken = stream[at : at + length - has_bos]
            at += len(taken)
            rows.append(self.row(taken, has_bos, of_documents))
        return rows

    def row(self, taken, has_bos, of_documents):
        first, other = self.pair
        ids = [first.bos_token_id] * has_bos + [token for token, _, _ in taken]
        others, segments, partners = [], [], {}
        numbers = list(dict.fromkeys(number for _, number, _ in taken))
        for n, number in enumerate(numbers):
            document, text, spans, own_ids, own_ends = of_documents[number]
            places = [place for _, one, place in taken if one == number]
            at_row = {place: has_bos + i for i, (_, one, place) in enumerate(taken) if one == number}
            begin = max([0, *(end for end in own_ends[: places[0]] if end is not None)])
            end = max([begin, *(own_ends[place] for place in places if own_ends[place] is not None)])
            is_first, is_last = places[0] == 0, places[-1] == len(own_ids) - 1
            text_other, spans_other = rendered(document, self.frames[1], other.bos_token)
            begin_other = 0 if is_first else self.across(begin, text, text_other, spans, spans_other)
            end_other = len(text_other) if is_last else self.across(end, text, text_other, spans, spans_other)
            ids_other, ends_other = encoded(other, text_other[begin_other:end_other])
            if (
                (self.options["bos"] == "sequence" and n == 0) or (self.options["bos"] == "document" and is_first)
            ) and ids_other[:1] != [other.bos_token_id]:
                ids_other, ends_other = [other.bos_token_id, *ids_other], [None, *ends_other]
            if is_last and self.options["separator"] == "eos" and ids_other[-1:] != [other.eos_token_id]:
                ids_other, ends_other = [*ids_other, other.eos_token_id], [*ends_other, None]
            for (a, b), (a_other, _) in zip(spans, spans_other, strict=True):
                for k in range(1, b - a + 1):
                    here = [place for place in places if own_ends[place] == a + k and a + k > begin]
                    there = [
                        t for t, end in enumerate(ends_other) if end is not None and begin_other + end == a_other + k
                    ]
                    if here and there:
                        partners[at_row[here[-1]]] = len(others) + there[-1]
            others += ids_other
            segments += [n] * len(ids_other)
        return ids, others, segments, partners

    def across(self, edge, text, text_other, spans, spans_other):
        if edge >= len(text):
            return len(text_other)
        found = 0
        for (a, b), (a_other, b_other) in zip(spans, spans_other, strict=True):
            if a <= edge < b:
                return a_other + edge - a
            if edge >= b > a:  # what says nothing is nowhere
                found = b_other
        return found


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 12))])
def test_random_cases(seed, tokenizers):
    n_partners = 0
    for case in range(20):
        rng = random.Random(f"{seed} {case}")
        pair, frames = rng.sample(tokenizers, 2), [rng.choice(FRAMES) for _ in range(2)]
        for tokenizer, frame in zip(pair, frames, strict=True):
            tokenizer.chat_template = template(frame)
        options = {
            "sequence_length": rng.choice([5, 17, 60, 400]), "bos": rng.choice(["sequence", "document", "none"]),
            "separator": rng.choice(["eos", "none"]), "isolate_documents": rng.random() < 0.5, "shuffle": False, "epochs": 1,
            "batch_size": rng.choice([1, 3]), "n_workers": rng.choice([0, 0, 2]), "keep_first_position": rng.random() < 0.5,
            "mask_special_tokens": rng.random() < 0.5,
        }  # fmt: skip
        chats = [["user", "assistant"], ["system", "user", "assistant"] * 2]
        documents = [
            content(rng) if rng.random() < 0.4 else [{"role": role, "content": content(rng)} for role in rng.choice(chats)]
            for _ in range(rng.choice([1, 4]))
        ]  # fmt: skip
        if any(isinstance(document, list) for document in documents) and rng.random() < 0.5:
            options["template_tokens"] = rng.choice(["mask", "answers"])
        n_partners += check(pair, frames, options, documents, rng)
    assert n_partners > 200


def check(pair, frames, options, documents, rng):
    first, other = pair
    expected = Expected(pair, frames, options).rows(documents)
    make = lambda others: TokenSequenceLoader(wrap_documents(documents), first, others=others, **options)  # noqa: E731
    try:
        alone = {tuple(ids): (mask, roles) for ids, mask, roles in rows_of(make([]))}
        batches = list(make([(other, None)]))
    except Exception as error:
        if "usable position" in str(error) or "is empty" in str(error):
            return 0
        raise
    n_like = Counter(tuple(ids) for ids, *_ in expected)
    by_tokens = {tuple(ids): rest for ids, *rest in expected}
    n = 0
    for batch in batches:
        (aligned,) = batch.others
        for h, tokens in enumerate(batch.tokens_HS.tolist()):
            own = next(tuple(tokens[:k]) for k in range(len(tokens), 0, -1) if tuple(tokens[:k]) in by_tokens)
            if n_like[own] > 1:
                continue  # which of them this is cannot be told
            others, segments, partners = by_tokens[own]
            assert aligned.tokens_HT[h, : len(others)].tolist() == others, (options, documents)
            usable = [True] * len(others)
            for t, token in enumerate(others):
                starts = t == 0 or (options["isolate_documents"] and segments[t] != segments[t - 1])
                special = options["mask_special_tokens"] and token in other.all_special_ids
                usable[t] = not special and (options["keep_first_position"] or not starts)
            partners = {s: t for s, t in partners.items() if usable[t]}
            assert {s: t for s, t in enumerate(aligned.place_HS[h].tolist()) if t >= 0} == partners, (
                options,
                documents,
            )
            assert aligned.usable_HT[h].nonzero()[:, 0].tolist() == [
                t for t, is_usable in enumerate(usable) if is_usable
            ]
            mask, roles = alone[tuple(tokens)]
            assert batch.mask_HS[h].tolist() == [one and s in partners for s, one in enumerate(mask)]
            assert batch.labels.role_T[h].tolist() == roles
            n += int(batch.mask_HS[h].sum())
    resumed(make, other, batches, rng.randrange(len(batches) + 1))
    return n


def rows_of(loader):
    for batch in loader:
        yield from zip(batch.tokens_HS.tolist(), batch.mask_HS.tolist(), batch.labels.role_T.tolist(), strict=True)


def resumed(make, other, batches, at):
    loader = make([(other, None)])
    stream = iter(loader)
    for _ in range(at):
        next(stream)
    again = make([(other, None)])
    again.load_state_dict(loader.state_dict())
    for one, two in zip(again, batches[at:], strict=True):
        for name in ("tokens_HT", "usable_HT", "place_HS"):
            assert torch.equal(getattr(one.others[0], name), getattr(two.others[0], name))
        assert torch.equal(one.tokens_HS, two.tokens_HS) and torch.equal(one.mask_HS, two.mask_HS)
        assert torch.equal(one.labels.role_T, two.labels.role_T)


THINKS = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content.split('</think>')[-1] | trim }}\n{% endfor %}"
"""Drops what was thought: by marks it cannot be told what a message says."""


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("first_said", ["", " ", "\n\n", "<think>if x:</think> a fine class"])
def test_what_one_template_leaves_out_of_a_message_costs_no_other_message_its_partners(first_said, order, tokenizers):
    pair = tokenizers[0], tokenizers[3]
    pair[0].chat_template, pair[1].chat_template = THINKS, template(FRAMES[1])
    later = ["CAPS 12345.", "na\u00efve class", "if x: a_."]
    roles = ["assistant", "user", "assistant", "user"]
    chat = [{"role": role, "content": one} for role, one in zip(roles, [first_said, *later], strict=True)]
    first, other = (pair[i] for i in order)
    (batch,) = TokenSequenceLoader(
        wrap_documents([chat]), first, others=[(other, None)], sequence_length=200, batch_size=1, epochs=1,
        template_tokens="mask", mask_special_tokens=False,
    )  # fmt: skip
    text = first.apply_chat_template(chat, tokenize=False)
    ids_S, ends_S = encoded(first, text)
    n_bos = ids_S[:1] != [first.bos_token_id]
    for one in later:
        s = ends_S.index(text.index(one) + len(one)) + n_bos
        assert int(batch.others[0].place_HS[0, s]) >= 0, one
