"""A document as one HTML page that needs nothing else: no network, no font, no script but its own few lines.

The page's own style and script are named by their hashes in its Content-Security-Policy, and images are data
URIs, so the browser itself refuses anything else, were a label or a comment ever to get past the escaping.
"""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
from collections.abc import Mapping

from research.report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Figure,
    Heading,
    Hidden,
    Inline,
    Link,
    Paragraph,
    Strong,
    Table,
    Text,
    Typed,
    is_harmless,
    one_line,
    parts_of,
)

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; color: #1a1a1a; background: #fff;
  font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans Bengali", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .6rem; padding-top: .6rem; border-top: 1px solid #d0d0d0; }
p, ul { max-width: 48rem; margin: .6rem 0; overflow-wrap: anywhere; }
a { color: #0b57a4; }
.scroll { overflow-x: auto; margin: .8rem 0; }
.scroll:focus-visible, button:focus-visible, summary:focus-visible { outline: 3px solid #0b57a4; outline-offset: 1px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding: 0 0 .35rem; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e2e2e2; }
thead th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; padding: 0; }
tbody th { font-weight: 500; }
th.n, td.n { text-align: right; white-space: nowrap; }
tbody tr:hover { background: #f4f7fa; }
thead button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; cursor: pointer;
  padding: .3rem .6rem; width: 100%; text-align: inherit; }
thead button::after { content: "\\00a0\\2195"; color: #8a8a8a; }
th[aria-sort=ascending] button::after { content: "\\00a0\\2191"; color: inherit; }
th[aria-sort=descending] button::after { content: "\\00a0\\2193"; color: inherit; }
p code, li code { white-space: nowrap; font-size: .9em; }
pre { padding: .8rem; background: #f5f5f5; border: 1px solid #e2e2e2; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: .85rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; max-width: 32rem; }
figure img { width: 100%; height: auto; }
figcaption { font-size: .875rem; color: #444; }
details { max-width: 32rem; }
details[open] { min-width: 16rem; }
summary { cursor: pointer; color: #0b57a4; white-space: nowrap; }
details p { margin: .3rem 0 0; white-space: pre-wrap; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  h2, figcaption { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  thead button { padding: .2rem .3rem; }
  thead button::after { content: none !important; }
}
"""
# Cells that hold no value stay at the end in either direction.
SCRIPT = """
"use strict";
for (const table of document.querySelectorAll("table")) {
  const headers = Array.from(table.tHead.rows[0].cells);
  const number = text => /^[<\\[+-]*\\d/.test(text) ? parseFloat(text.replace(/[<\\[,]/g, "")) : NaN;
  const compare = (a, b) => {
    const difference = number(a) - number(b);
    return Number.isNaN(difference) ? a.localeCompare(b) : difference;
  };
  headers.forEach((header, column) => header.querySelector("button").addEventListener("click", () => {
    const descending = header.getAttribute("aria-sort") === "ascending";
    for (const other of headers) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const text = row => row.cells[column].textContent.trim();
    const isEmpty = row => text(row) === "" || text(row) === "\\u2013";
    const rows = Array.from(table.tBodies[0].rows);
    rows.sort((a, b) => isEmpty(a) - isEmpty(b) || compare(text(a), text(b)) * (descending ? -1 : 1));
    table.tBodies[0].append(...rows);
  }));
}
"""


def render_html(document: Document, images: Mapping[str, bytes]) -> str:
    """Return the whole page; `images` holds the PNG of each figure by its path, figures without one are left out."""
    body = "\n".join(_html_blocks(document.blocks, images))
    title = escape(one_line(document.title))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash_source(STYLE)}'; script-src '{_hash_source(SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def escape(text: str) -> str:
    """Make a text safe between tags and in quoted attributes."""
    return html.escape("".join(char if is_harmless(char) else "\ufffd" for char in text))


def _hash_source(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _html_blocks(blocks: list[Block], images: Mapping[str, bytes]) -> list[str]:
    """Render the blocks; figures that follow each other stand side by side where there is room."""
    rendered = []
    for is_figure, group in itertools.groupby(blocks, lambda block: isinstance(block, Figure)):
        if is_figure:
            figures = [
                _html_figure(block, images[block.path]) for block in group if isinstance(block, Figure) and block.path in images
            ]
            rendered.append(f'<div class="figures">{"".join(figures)}</div>')
        else:
            rendered += map(_html_block, group)
    return rendered


def _html_figure(figure: Figure, image: bytes) -> str:
    caption = escape(figure.caption)
    source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _html_block(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(content):
            return f"<p>{_html_text(content)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_html_text(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Table():
            return _html_table(block)
        case _:
            raise TypeError(block)


def _html_table(table: Table) -> str:
    kinds = ["" if column < table.text_columns else ' class="n"' for column in range(len(table.header))]
    header = "".join(
        f'<th scope="col" aria-sort="none"{kind}><button type="button">{escape(name)}</button></th>'
        for name, kind in zip(table.header, kinds, strict=True)
    )
    rows = []
    for row in table.rows:
        first, *others = (_html_text(cell) for cell in row)
        cells = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(others, kinds[1:], strict=True))
        rows.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    caption = escape(table.caption)
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>'
        f"<thead><tr>{header}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _html_text(content: Text) -> str:
    return "".join(map(_html_inline, parts_of(content)))


def _html_inline(inline: Inline) -> str:
    match inline:
        case Strong(text):
            return f"<strong>{escape(text)}</strong>"
        case Typed(text):
            return f"<code>{escape(text)}</code>"
        case Link(text, target):
            return f'<a href="{escape(target)}.html">{escape(text)}</a>'
        case Hidden(summary, text):
            return f'<details><summary>{escape(summary)}</summary><p dir="auto">{escape(text)}</p></details>'
        case str(text):
            return escape(text).replace(" %", "\u00a0%")
