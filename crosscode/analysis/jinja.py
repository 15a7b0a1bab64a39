"""Jinja for the pages: texts are escaped, and what a template lacks is an error."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def environment() -> Environment:
    """Of the templates beside this file; `raw` is for what we made ourselves."""
    made = Environment(
        loader=PackageLoader("crosscode.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["raw"] = Markup
    return made
