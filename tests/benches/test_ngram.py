"""The n-gram baselines: proper distributions, and the numbers that the definition gives by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram import NGramModel, as_bytes

from crosscode.errors import InputError

A, B, C = 0, 1, 2


def test_a_bigram_model_agrees_with_a_hand_computation():
    # "a b a b a c" over {a, b, c}: bigrams (start a) 1, (a b) 2, (b a) 2, (a c) 1; the estimate of the discounts needs
    # counts of 3 and 4 too, so all of them are 1/2.
    model = NGramModel([np.array([A, B, A, B, A, C])], order=2, vocab_size=3)
    # Distinct left neighbours: a has {start, b}, b has {a}, c has {a}: 4 in all, each count less 1/2, and the 3/2 left
    # over go to the uniform distribution.
    below_a, below_b, below_c = (1.5 + 1.5 / 3) / 4, (0.5 + 1.5 / 3) / 4, (0.5 + 1.5 / 3) / 4
    # After a: b twice, c once, so 1 of 3 is left over.
    after_a = [(0 + 1 * below_a) / 3, (1.5 + 1 * below_b) / 3, (0.5 + 1 * below_c) / 3]
    for symbol, expected in zip((A, B, C), after_a, strict=True):
        assert model.probabilities(np.array([A, symbol]))[1] == pytest.approx(expected)
    # c was never a history: the lower order speaks alone.
    assert model.probabilities(np.array([C, A]))[1] == pytest.approx(below_a)
    # At the start of a document a was seen once.
    assert model.probabilities(np.array([A]))[0] == pytest.approx((0.5 + 0.5 * below_a) / 1)


def test_discounts_are_chen_and_goodmans_where_the_counts_allow():
    # Unigram counts 1 1 1 2 2 3 4: n1 = 3, n2 = 2, n3 = 1, n4 = 1, so Y = 3 / 7.
    sequence = np.repeat(np.arange(7), [1, 1, 1, 2, 2, 3, 4])
    model = NGramModel([sequence], order=1, vocab_size=8)
    y = 3 / 7
    d1, d2, d3 = 1 - 2 * y * 2 / 3, 2 - 3 * y * 1 / 2, 3 - 4 * y * 1 / 1
    left_over = 3 * d1 + 2 * d2 + 2 * d3
    expected = [(1 - d1 + left_over / 8) / 14, (2 - d2 + left_over / 8) / 14, (4 - d3 + left_over / 8) / 14]
    np.testing.assert_allclose(model.probabilities(np.array([0, 3, 6])), expected)
    np.testing.assert_allclose(model.probabilities(np.array([7])), left_over / 8 / 14)


documents = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=4)


@settings(deadline=None, max_examples=40)
@given(documents, st.lists(st.integers(0, 3), max_size=6), st.integers(1, 5))
def test_probabilities_sum_to_one_after_any_history(train, history, order):
    model = NGramModel([np.array(sequence) for sequence in train], order, vocab_size=4)
    total = sum(model.probabilities(np.array([*history, symbol]))[-1] for symbol in range(4))
    assert total == pytest.approx(1.0)


def test_a_longer_history_helps_where_it_tells_something():
    sequence = np.tile([0, 1, 2, 0, 2, 1], 200)
    bits = [NGramModel([sequence], order, 3).bits([sequence]) / len(sequence) for order in (1, 2, 3)]
    assert bits[0] == pytest.approx(np.log2(3), abs=0.01)
    assert bits[0] > bits[1] + 0.3 > bits[2] + 0.6


def test_bits_of_the_training_text_itself_are_few():
    texts = ["for i in range(10):\n    print(i)\n" * 30]
    model = NGramModel(as_bytes(texts), 5, 256)
    assert model.bits(as_bytes(texts)) / len(texts[0]) < 0.5


@pytest.mark.parametrize(
    ("sequences", "order", "vocab_size", "message"),
    [
        ([], 2, 4, "sequences: 0 symbols"),
        ([[4]], 2, 4, r"symbols 4\.\.4 must lie in 0\.\.3"),
        ([[0]], 0, 4, "order: 0"),
        ([[0]], 6, 2048, "order: 6 with vocab_size 2048 must be >= 1 and fit 63 bits"),
    ],
)
def test_bad_arguments_are_named(sequences, order, vocab_size, message):
    with pytest.raises(InputError, match=message):
        NGramModel([np.array(sequence) for sequence in sequences], order, vocab_size)
