"""A page of headings, texts, figures and tables, as HTML that stands alone and as Markdown."""

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

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


class Block(NamedTuple):
    """A part of a page, in both languages."""

    html: str
    markdown: str


def section(title: str) -> Block:
    """Returns the heading of a section."""
    return Block(f"<h2>{html.escape(title)}</h2>", f"## {title}")


def text(paragraph: str) -> Block:
    """Returns a paragraph."""
    return Block(f"<p>{html.escape(paragraph)}</p>", paragraph)


def command(line: str) -> Block:
    """Returns a line for a shell."""
    return Block(f"<pre><code>{html.escape(line)}</code></pre>", f"    {line}")


def picture(path: str, png: bytes, caption: str) -> Block:
    """Returns a figure: in HTML within the page, in Markdown a link to its file."""
    data, escaped = base64.b64encode(png).decode(), html.escape(caption)
    return Block(
        f'<figure><img src="data:image/png;base64,{data}" alt="{escaped}">'
        f"<figcaption>{escaped}</figcaption></figure>",
        f"![{caption}]({path})\n\n*{caption}*",
    )


def table(cells: pd.DataFrame, *, is_text: bool = False) -> Block:
    """Returns a table of texts without its index; the first column, or all, aligned left."""
    with pd.option_context("display.max_colwidth", None):
        as_html = cells.to_html(index=False, border=0, classes="text" if is_text else None)
    head = list(cells.columns)
    lines = [head, ["---"] * len(head), *cells.to_numpy().tolist()]
    rows = [" | ".join(str(x).replace("|", "\\|").replace("\n", " ") for x in row) for row in lines]
    return Block(f'<div class="scroll">{as_html}</div>', "\n".join(f"| {row} |" for row in rows))


def details(title: str, json: str) -> Block:
    """Returns a long text of JSON that a reader may unfold."""
    escaped = html.escape(title)
    return Block(
        f"<details><summary>{escaped}</summary><pre>{html.escape(json)}</pre></details>",
        f"<details><summary>{title}</summary>\n\n```json\n{json}\n```\n</details>",
    )


def markdown_page(title: str, blocks: Sequence[Block]) -> str:
    """Returns the page as Markdown."""
    return "\n\n".join([f"# {title}", *(block.markdown for block in blocks)]) + "\n"


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """Returns the page as HTML that needs no other file."""
    title = html.escape(title)
    body = "\n".join([f"<h1>{title}</h1>", *(block.html for block in blocks)])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
