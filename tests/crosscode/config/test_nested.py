"""Nested values by dotted path."""

from crosscode.config.nested import flatten


def test_leaves_are_named_by_where_they_stand():
    value = {"b": [{"c": 1}, {"d": [2, 3]}], "a": {"x": None, "empty": {}}}
    assert list(flatten(value)) == [("a.x", None), ("b.0.c", 1), ("b.1.d", [2, 3])]
