"""A comparison's folder: its tables, its figures, and a page with all of it."""

from __future__ import annotations

from pathlib import Path

from research.compare.figures import plot_comparison
from research.compare.scores import Comparison
from research.compare.tables import FORMATS, build_page
from research.errors import InputError
from research.report.document import render_html
from research.runs.formats import write_text_atomic

OUTPUT_FILES = {"table.csv": "csv", "table.md": "markdown", "table.tex": "latex", "comparison.json": "json"}


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write the tables, the figures that the swept flags allow, and report.html with all of it into `folder`.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, style in OUTPUT_FILES.items():
            write_text_atomic(folder / name, FORMATS[style](comparison))
        figures = plot_comparison(comparison, folder)
        page = render_html(build_page(comparison, figures), {path.name: path.read_bytes() for path in figures})
        write_text_atomic(folder / "report.html", page)
    except OSError as error:
        raise InputError(f"--output {folder} cannot be written: {error.strerror}.") from None
