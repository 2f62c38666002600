"""Foreign text on a page, and tables."""

from __future__ import annotations

import html
from collections.abc import Sequence


def escaped(value: object) -> str:
    """`value` as HTML text; the only way foreign text enters a page."""
    return html.escape(str(value), quote=True)


def shortened(value: object, limit: int) -> str:
    """`value` as text of at most `limit` characters, an ellipsis in the place of what is cut."""
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are HTML already; the first column is the row's name."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
