"""Random texts and chats in two tokenizers, whole, cut and packed, against a search over characters that knows what the
templates write without asking them."""

import itertools
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from crosscode.data import (
    ActivationHarvester,
    TokenSequenceLoader,
    harvest_to_store,
    wrap_documents,
    wrap_language_model,
)
from crosscode.data.store.joined import JoinedStores
from crosscode.data.store.writer import ActivationCacheWriter
from crosscode.data.text.labels import ROLES
from crosscode.data.text.mixture import MixedDocuments
from crosscode.demo import demo_model_path
from crosscode.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[3] / "helpers"))

from forked import in_child

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
    """What a loader is to give: rows of ids of the first, ids of the other, which document each of these is of, partners, and of
    the first's ids which document each is of and where in it; all of them."""

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
        self.documents = [document for document, *_ in of_documents]  # by the numbers of rows: those that have tokens
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
        return ids, others, segments, partners, [(None, 0)] * has_bos + [(number, place) for _, number, place in taken]

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


def drawn_pair(tokenizers, rng):
    """Two of them, and the frames of the chat templates that they are given."""
    pair, frames = rng.sample(tokenizers, 2), [rng.choice(FRAMES) for _ in range(2)]
    for tokenizer, frame in zip(pair, frames, strict=True):
        tokenizer.chat_template = template(frame)
    return pair, frames


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 12))])
def test_random_cases(seed, tokenizers):
    n_partners = 0
    for case in range(20):
        rng = random.Random(f"{seed} {case}")
        pair, frames = drawn_pair(tokenizers, rng)
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
            others, segments, partners, _ = by_tokens[own]
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


def test_a_chat_that_cannot_be_aligned_is_refused_with_what_would_help(tokenizers):
    first, other = tokenizers[0], tokenizers[3]
    first.chat_template, other.chat_template = template(FRAMES[1]), THINKS
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think> </think>"}]
    loader = TokenSequenceLoader(wrap_documents([chat]), first, others=[(other, None)], sequence_length=60, epochs=1)
    with pytest.raises(InputError, match=r"rewrites a chat .*; leave such chats out: models of different tokenizers"):
        next(iter(loader))


class Whole:
    """What a store is to hold: of each kept position, in order, role, source, document, and both models' activations, found by
    running each model on each sequence by itself."""

    def __init__(self, pair, frames, options, models, sources):
        self.expected, self.pair, self.options, self.models = Expected(pair, frames, options), pair, options, models
        self.sources = sources

    def rows(self, documents):
        kept = []
        for ids, others, segments, partners, where in self.expected.rows(documents):
            if not partners:
                continue
            acts = [self.run(0, ids, [number for number, _ in where]), self.run(1, others, segments)]
            for s, t in sorted(partners.items()):
                number, place = where[s]
                if number is None or self.leaves_out(s, t, ids, others, segments, where):
                    continue
                document = self.expected.documents[number]
                role, is_used = self.said_by(document, place)
                if is_used:
                    kept.append((role, self.sources(document), document, acts[0][s], acts[1][t]))
        return kept

    def leaves_out(self, s, t, ids, others, segments, where):
        special = self.options["mask_special_tokens"]
        first, other = self.pair
        if special and (ids[s] in first.all_special_ids or others[t] in other.all_special_ids):
            return True
        if self.options["keep_first_position"]:
            return False
        behind_bos = s == 1 and self.options["bos"] == "sequence"
        begins = s == 0 or (self.options["isolate_documents"] and where[s][1] == 0 and not behind_bos)
        begins_other = t == 0 or (self.options["isolate_documents"] and segments[t] != segments[t - 1])
        return begins or begins_other

    def said_by(self, document, place):
        """Whose words a token begins with, and whether they are used."""
        wanted = self.options.get("template_tokens", "keep")
        if isinstance(document, str):
            return "text", wanted != "answers"
        text, _ = rendered(document, self.expected.frames[0], self.pair[0].bos_token)
        before, behind, has_bos, trims = self.expected.frames[0]
        at, role_of = len(self.pair[0].bos_token) * has_bos, {}
        for message in document:
            own = message["content"].strip() if trims else message["content"]
            at += len(before.format(message["role"]))
            role_of |= dict.fromkeys(range(at, at + len(own)), message["role"])
            at += len(own) + len(behind)
        encoding = self.pair[0](text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoding["input_ids"]
        n_bos = self.options["bos"] == "document" and ids[0] != self.pair[0].bos_token_id
        begin, end = encoding["offset_mapping"][place - n_bos]
        if begin == end:  # white space, of which places are trimmed: what no token before it covers
            begin = max((one for _, one in encoding["offset_mapping"][: place - n_bos]), default=0)
        roles = [role_of[c] for c in range(begin, end) if c in role_of]
        return (roles[0] if roles else "template"), wanted == "keep" or wanted == "mask" or "assistant" in roles

    @torch.no_grad()
    def run(self, m, ids, segments):
        """The residual stream behind the first block; of isolated documents one by one."""
        if not self.options["isolate_documents"]:
            segments = [0] * len(ids)
        segments = [next((one for one in segments[s:] if one is not None), 0) for s in range(len(segments))]
        runs = [list(group) for _, group in itertools.groupby(range(len(ids)), key=lambda s: segments[s])]
        found = [self.models[m](torch.tensor([[ids[s] for s in run]]), output_hidden_states=True) for run in runs]
        return torch.cat([one.hidden_states[1][0] for one in found])


@pytest.fixture(scope="module")
def language_models():
    def make(seed, width):
        torch.manual_seed(seed)
        shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
        config = LlamaConfig(
            vocab_size=2100, hidden_size=width, intermediate_size=24, max_position_embeddings=2048, **shape
        )
        return LlamaForCausalLM(config).eval()

    return make(0, 16), make(1, 24)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 9))])
def test_stores_of_chats_hold_what_each_model_reads(seed, tokenizers, language_models, tmp_path):
    """Harvested whole, killed and gone on with, and apart and joined: the same rows, as `Whole` finds them."""
    n_rows = 0
    for case in range(4):
        rng = random.Random(f"store {seed} {case}")
        pair, frames = drawn_pair(tokenizers, rng)
        options = {
            "sequence_length": rng.choice([17, 60]), "bos": rng.choice(["sequence", "document", "none"]),
            "separator": rng.choice(["eos", "none"]), "isolate_documents": rng.random() < 0.5, "shuffle": False, "epochs": 1,
            "batch_size": 2, "keep_first_position": rng.random() < 0.5, "mask_special_tokens": rng.random() < 0.5,
            "template_tokens": rng.choice(["keep", "mask", "answers"]),
        }  # fmt: skip
        chats = [
            [{"role": role, "content": content(rng)} for role in ["system", "user", "assistant", "user", "assistant"]]
            for _ in range(6)
        ]
        mixed = MixedDocuments(
            [wrap_documents([content(rng) for _ in range(6)], name="texts"), wrap_documents(chats, name="chats")],
            [1, 2],
        )
        documents = list(mixed.open())
        models = [wrap_language_model(*both) for both in zip(language_models, pair, strict=True)]
        expected = Whole(pair, frames, options, language_models, lambda one: int(not isinstance(one, str))).rows(
            documents
        )
        if not expected:
            continue
        loader = TokenSequenceLoader(mixed, pair[0], others=[(pair[1], None)], **options)
        folder = tmp_path / str(case)

        def harvest(name, of=models, loader=loader, folder=folder, models=models):
            harvester = ActivationHarvester(of, ["blocks.0.hook_resid_post"], readers=models)
            return harvest_to_store(loader.fresh(), harvester, folder / name, shard_bytes=3000)

        whole = harvest("whole")
        rows = whole.read_rows(torch.arange(whole.n_rows))
        labels = whole.labels()
        assert [ROLES[role] for role in labels.role_T.tolist()] == [row[0] for row in expected], (options, documents)
        assert labels.source_T.tolist() == [row[1] for row in expected]
        numbers = [documents.index(row[2]) for row in expected]
        assert len({*zip(labels.document_T.tolist(), numbers, strict=True)}) == len({*numbers})
        assert len({*labels.document_T.tolist()}) == len({*numbers})
        torch.testing.assert_close(rows[:, 0, 0, :16], torch.stack([row[3] for row in expected]), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(rows[:, 1, 0], torch.stack([row[4] for row in expected]), atol=1e-5, rtol=1e-4)
        assert not rows[:, 0, 0, 16:].any()

        n_taken = rng.randrange(1, 5)

        def killed(n=n_taken, harvest=harvest):
            write, calls = ActivationCacheWriter.append, itertools.count()
            ActivationCacheWriter.append = lambda *args: (  # of this process, which ends
                os.kill(os.getpid(), signal.SIGKILL) if next(calls) == n else write(*args)
            )
            harvest("killed")
            return 0

        assert in_child(killed) in (0, -signal.SIGKILL)
        again = harvest("killed")
        joined = JoinedStores([harvest(f"apart{m}", [models[m]]).path for m in range(2)])
        for store in (again, joined):
            assert torch.equal(store.read_rows(torch.arange(store.n_rows)), rows)
            assert torch.equal(store.labels().packed_R3(), labels.packed_R3())
        n_rows += whole.n_rows
    assert n_rows > 50
