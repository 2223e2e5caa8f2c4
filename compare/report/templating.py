"""The templates of the pages: autoescaped, so that a label of a result file is text wherever it stands."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    autoescape=True,
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def render(name: str, values: dict[str, object]) -> str:
    """Renders the template ``NAME.html.j2``. Raises jinja2.UndefinedError for a value that is missing."""
    return _TEMPLATES.get_template(f"{name}.html.j2").render(values)


def trusted(text: str) -> Markup:
    """Marks text as markup that a template inserts unescaped.

    For this project's own output alone: SVG that an XML writer serialized, JSON escaped by `pictures.for_script`,
    the style sheet and the script. Never for a text of a result file.
    """
    return Markup(text)
