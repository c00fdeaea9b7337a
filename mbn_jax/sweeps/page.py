"""A page of headings, texts, figures and tables, as HTML that stands alone and as Markdown."""

import base64
import dataclasses
import html
from collections.abc import Sequence
from typing import Any, Protocol

import pandas as pd

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto;
       max-width: 62rem; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
figure { margin: 1.5rem 0; break-inside: avoid; } img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #333; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap;
         border-bottom: 1px solid #ccc; }
th { border-bottom: 2px solid #111; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
pre { overflow-x: auto; background: #f4f4f4; padding: .7rem; font-size: .85rem; }
code { overflow-wrap: anywhere; }
@media print { body { max-width: none; font-size: 11pt; } pre { white-space: pre-wrap; } }
"""


class Block(Protocol):
    """A part of a page."""

    def html(self) -> str:
        """Returns the block as HTML."""

    def markdown(self) -> str:
        """Returns the block as Markdown."""


@dataclasses.dataclass(frozen=True)
class Section:
    """The heading of a section."""

    title: str

    def html(self) -> str:
        """Returns the block as HTML."""
        return f"<h2>{html.escape(self.title)}</h2>"

    def markdown(self) -> str:
        """Returns the block as Markdown."""
        return f"## {self.title}"


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str

    def html(self) -> str:
        """Returns the block as HTML."""
        return f"<p>{html.escape(self.text)}</p>"

    def markdown(self) -> str:
        """Returns the block as Markdown."""
        return self.text


@dataclasses.dataclass(frozen=True)
class Command:
    """A line for a shell."""

    line: str

    def html(self) -> str:
        """Returns the block as HTML."""
        return f"<pre><code>{html.escape(self.line)}</code></pre>"

    def markdown(self) -> str:
        """Returns the block as Markdown."""
        return f"    {self.line}"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure: in HTML within the page, in Markdown as a link to its file.

    Attributes:
      path: of the file, seen from the page.
      png: its content.
      caption: what it shows.
    """

    path: str
    png: bytes
    caption: str

    def html(self) -> str:
        """Returns the block as HTML."""
        data, caption = base64.b64encode(self.png).decode(), html.escape(self.caption)
        return (
            f'<figure><img src="data:image/png;base64,{data}" alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )

    def markdown(self) -> str:
        """Returns the block as Markdown."""
        return f"![{self.caption}]({self.path})\n\n*{self.caption}*"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts, without its index.

    Attributes:
      cells: the texts, with different names of columns.
      is_text: whether to align all columns left; default: the first one, others right.
    """

    cells: pd.DataFrame
    is_text: bool = False

    def html(self) -> str:
        """Returns the block as HTML."""
        with pd.option_context("display.max_colwidth", None):
            table = self.cells.to_html(
                index=False, border=0, classes="text" if self.is_text else None
            )
        return f'<div class="scroll">{table}</div>'

    def markdown(self) -> str:
        """Returns the block as Markdown."""
        head = list(self.cells.columns)
        lines = [head, ["---"] * len(head), *self.cells.to_numpy().tolist()]
        return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)


@dataclasses.dataclass(frozen=True)
class Details:
    """A long text of JSON that a reader may unfold."""

    title: str
    json: str

    def html(self) -> str:
        """Returns the block as HTML."""
        title, text = html.escape(self.title), html.escape(self.json)
        return f"<details><summary>{title}</summary><pre>{text}</pre></details>"

    def markdown(self) -> str:
        """Returns the block as Markdown."""
        return f"<details><summary>{self.title}</summary>\n\n```json\n{self.json}\n```\n</details>"


def _markdown_cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def markdown_page(title: str, blocks: Sequence[Block]) -> str:
    """Returns the page as Markdown."""
    return "\n\n".join([f"# {title}", *(block.markdown() for block in blocks)]) + "\n"


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """Returns the page as HTML that needs no other file."""
    title = html.escape(title)
    body = "\n".join([f"<h1>{title}</h1>", *(block.html() for block in blocks)])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
