"""A report as headings, paragraphs, tables and figures, told once and rendered as Markdown or HTML.

Texts are plain: whatever a label, a flag or a comment holds, only the renderers add markup, after escaping.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

JOINERS = "\u200c\u200d"  # Bangla and other scripts spell with them, though they print nothing themselves


@dataclass(frozen=True)
class Strong:
    """Words that matter."""

    text: str


@dataclass(frozen=True)
class Typed:
    """A command or a flag, as it is typed."""

    text: str


@dataclass(frozen=True)
class Link:
    """A way to another report, whose file ends in .md or .html like the one it stands in."""

    text: str
    target: str


@dataclass(frozen=True)
class Hidden:
    """A text that shows only after a click on `summary`; Markdown, which cannot hide, shows nothing."""

    summary: str
    text: str


Inline = str | Strong | Typed | Link | Hidden
Text = Inline | tuple[Inline, ...]


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    content: Text


@dataclass(frozen=True)
class Bullets:
    items: Sequence[Text]


@dataclass(frozen=True)
class Table:
    """Cells by row; columns past the first `text_columns` hold numbers and align right."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Text]]
    text_columns: int = 1


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Figure:
    """An image by its path below the document's folder, with what it shows in words."""

    path: str
    caption: str


Block = Heading | Paragraph | Bullets | Table | Code | Figure


@dataclass(frozen=True)
class Document:
    title: str
    blocks: list[Block] = field(default_factory=list)


def parts_of(content: Text) -> tuple[Inline, ...]:
    return content if isinstance(content, tuple) else (content,)


def one_line(text: str) -> str:
    """Return a text without line breaks and unprintable characters."""
    return " ".join("".join(char if char.isprintable() or char in JOINERS else " " for char in text).split())


def render_markdown(document: Document) -> str:
    blocks = ["# " + escape_markdown(document.title), *map(_markdown_block, document.blocks)]
    return "\n\n".join(blocks) + "\n"


def escape_markdown(text: str) -> str:
    """Make a text safe in a paragraph or a table cell: no markup, no HTML, one line.

    An underscore inside a word is no markup and stays as it is, since flags and metrics are full of them.
    """
    return re.sub(r"([\\`*\[\]|~$#]|(?<!\w)_|_(?!\w))", r"\\\1", html.escape(one_line(text), quote=False))


def fence(text: str) -> str:
    """Return a code block that `text` cannot close."""
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}bash\n{text}\n{marks}"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text):
            return "## " + escape_markdown(text)
        case Paragraph(content):
            return _markdown_text(content)
        case Bullets(items):
            return "\n".join("- " + _markdown_text(item) for item in items)
        case Code(text):
            return fence(text)
        case Figure(path, caption):
            return f"![{escape_markdown(caption)}]({path})"
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
        case str(text):
            # Blanks at either end part the text from its neighbours.
            lead, tail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
            return f"{lead[:1]}{escape_markdown(text)}{tail[:1] if text.strip() else ''}"


def is_harmless(char: str) -> bool:
    """Say whether a character may stand in an HTML text: every one but controls, which HTML forbids."""
    return char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs")
