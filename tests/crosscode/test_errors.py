"""Where an error says that it is."""

import pytest

from crosscode.errors import InputError, at_field, in_section


@pytest.mark.parametrize(
    ("message", "joined", "put_before"),
    [
        ("k = 0: too small", "part.k = 0: too small", "part.k = 0: too small"),
        ("k.0.name: unknown", "part.k.0.name: unknown", "part.k.0.name: unknown"),
        ("kk = 0: too small", "kk = 0: too small", "part: kk = 0: too small"),
        ("k is nothing: really", "k is nothing: really", "part: k is nothing: really"),
        ("elsewhere.k = 0: too small", "elsewhere.k = 0: too small", "part: elsewhere.k = 0: too small"),
    ],
)
def test_a_field_and_its_section_become_one_path(message, joined, put_before):
    with pytest.raises(InputError) as caught, in_section("part", {"k"}):
        raise InputError(message)
    assert str(caught.value) == joined
    with pytest.raises(InputError) as caught, at_field("part", {"k"}):
        raise InputError(message)
    assert str(caught.value) == put_before
