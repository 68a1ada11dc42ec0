"""A report as a list of blocks (headings, paragraphs, tables, figures), rendered as Markdown or as an HTML page.

Texts are plain: whatever a label, a flag or a comment holds, only the renderers add markup, after escaping. The
page is one file that needs no network: template.html names its own style and script by their hashes in a
Content-Security-Policy and holds images as data URIs, so the browser itself refuses anything else, were a label or
a comment ever to get past the escaping.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from jinja2 import Template

JOINERS = "\u200c\u200d"  # Bangla and other scripts spell with them, though they print nothing themselves


@dataclass(frozen=True)
class Strong:
    """Words that matter."""

    text: str
    kind: ClassVar[str] = "strong"


@dataclass(frozen=True)
class Typed:
    """A command or a flag, as it is typed."""

    text: str
    kind: ClassVar[str] = "typed"


@dataclass(frozen=True)
class Link:
    """A link to another report, whose file ends in .md or .html as this one's does."""

    text: str
    target: str
    kind: ClassVar[str] = "link"


@dataclass(frozen=True)
class Hidden:
    """A text that shows only after a click on `summary`; Markdown, which cannot hide, leaves it out."""

    summary: str
    text: str
    kind: ClassVar[str] = "hidden"


@dataclass(frozen=True)
class Below:
    """What belongs to the text before it: smaller and under it on a page, in brackets in Markdown."""

    text: str
    kind: ClassVar[str] = "below"


Inline = str | Strong | Typed | Link | Hidden | Below
Text = Inline | tuple[Inline, ...]


@dataclass(frozen=True)
class Heading:
    """The title of a section."""

    text: str
    kind: ClassVar[str] = "heading"

    @property
    def anchor(self) -> str:
        """The name that a link to the section uses."""
        return re.sub(r"\W+", "-", self.text.lower()).strip("-")


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    content: Text
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Bullets:
    """A list of texts without an order."""

    items: Sequence[Text]
    kind: ClassVar[str] = "bullets"


@dataclass(frozen=True)
class Table:
    """Cells by row; columns past the first `text_columns` hold numbers and align right."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Text]]
    text_columns: int = 1
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Code:
    """A command line, or code of another language."""

    text: str
    language: str = "bash"
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Figure:
    """An image by its path below the document's folder, with what it shows in words."""

    path: str
    caption: str


@dataclass(frozen=True)
class Figures:
    """Images that stand side by side where there is room."""

    figures: Sequence[Figure]
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Box:
    """Blocks set apart from the rest: what a reader must know."""

    blocks: Sequence[Block]
    kind: ClassVar[str] = "box"


Block = Heading | Paragraph | Bullets | Table | Code | Figures | Box


@dataclass(frozen=True)
class Document:
    """A title, which may be empty where the text goes into another one, and the blocks below it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def parts_of(content: Text) -> tuple[Inline, ...]:
    """Return a text as the pieces it is made of."""
    return content if isinstance(content, tuple) else (content,)


def one_line(text: str) -> str:
    """Return a text without line breaks and unprintable characters."""
    return " ".join("".join(char if char.isprintable() or char in JOINERS else " " for char in text).split())


def render_markdown(document: Document) -> str:
    """Return the document as Markdown; figures are links to their files."""
    title = ["# " + escape_markdown(document.title)] if document.title else []
    return "\n\n".join([*title, *map(_markdown_block, document.blocks)]) + "\n"


def escape_markdown(text: str) -> str:
    """Make a text safe in a paragraph or a table cell: no markup, no HTML, one line.

    An underscore inside a word is no markup and stays as it is, since flags and metrics are full of them.
    """
    return re.sub(r"([\\`*\[\]|~$#]|(?<!\w)_|_(?!\w))", r"\\\1", html.escape(one_line(text), quote=False))


def _fence(text: str, language: str) -> str:
    """Return a code block that `text` cannot close."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text}\n{marks}"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text):
            return "## " + escape_markdown(text)
        case Paragraph(content):
            return _markdown_text(content)
        case Bullets(items):
            return "\n".join("- " + _markdown_text(item) for item in items)
        case Code(text, language):
            return _fence(text, language)
        case Figures(figures):
            return "\n\n".join(f"![{escape_markdown(figure.caption)}]({figure.path})" for figure in figures)
        case Box(blocks):
            return "\n\n".join(map(_markdown_block, blocks))
        case Table(_, header, rows, text_columns):
            rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
            lines = [list(map(escape_markdown, header)), rule, *(list(map(_markdown_text, row)) for row in rows)]
            return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _markdown_text(content: Text) -> str:
    return "".join(map(_markdown_inline, parts_of(content)))


def _markdown_inline(inline: Inline) -> str:
    match inline:
        case Strong(text):
            return f"**{escape_markdown(text)}**"
        case Typed(text):
            return f"`{one_line(text).replace('`', '')}`"
        case Link(text, target):
            return f"[{escape_markdown(text)}]({target}.md)"
        case Hidden():
            return ""
        case Below(text):
            return f" ({escape_markdown(text)})"
        case str(text):
            # Blanks at either end part the text from its neighbours.
            lead, tail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
            return f"{lead[:1]}{escape_markdown(text)}{tail[:1] if text.strip() else ''}"


def render_html(document: Document, images: Mapping[str, bytes]) -> str:
    """Return the whole page; `images` holds the PNG of each figure by its path."""
    return _load_template().render(document=document, title=one_line(document.title), images=images)


@functools.cache
def _load_template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # printing a comparison need not wait for it

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"parts": parts_of, "source_hash": _hash_source, "data_uri": _data_uri}
    return environment.get_template("template.html")


def _printable(value: Any) -> Any:
    """Replace what HTML forbids even when it is escaped: control characters and halves of surrogate pairs."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "".join(char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else "\ufffd" for char in value)


def _hash_source(text: str) -> str:
    """Return how a Content-Security-Policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data_uri(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode()
