"""HTML pages of the ``fused-res`` commands; each is a single file."""

from __future__ import annotations

import html
from collections.abc import Sequence

COLORS = {"PyTorch": "#8a8f98", "fused_res": "#0f766e"}

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2024; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: break-word; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; } h3 { margin-bottom: .3rem; }
img { max-width: 100%; } img.strip { width: 100%; image-rendering: pixelated; border-radius: 4px; }
table { border-collapse: collapse; margin: .5rem 0 1rem; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #dde1e6; text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; color: #5b626b; }
.wide { overflow-x: auto; } .note { color: #5b626b; }
@media (max-width: 40rem) { h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; }
  h3 { font-size: 1rem; } table { font-size: .8rem; }
  th, td { padding: .3rem .4rem; } }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[object]], kind: str = "") -> str:
    """A table of text, which is escaped; ``kind`` is its CSS class. The header may be empty."""

    def line(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    lines = [line("th", header)] if header else []
    body = "\n".join(lines + [line("td", row) for row in rows])
    return f'<div class="wide"><table class="{kind}">\n{body}\n</table></div>'


def change(before: float, after: float, better: str, worse: str) -> str:
    """The change of a quantity that is better when lower: ``1.23x faster``, or ``within 2 %``."""
    ratio = before / after
    if abs(ratio - 1) < 0.02:
        return "within 2 %"
    return f"{ratio:.2f}x {better}" if ratio > 1 else f"{1 / ratio:.2f}x {worse}"


def document(title: str, sections: Sequence[str], style: str = "") -> str:
    """The text of a page. The title is escaped, the sections are HTML, ``style`` is more CSS."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}{style}</style></head><body>",
            *sections,
            "</body></html>\n",
        ]
    )
