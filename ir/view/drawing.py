"""A program as an SVG picture, without outside programs; readable in light and dark."""

from __future__ import annotations

import html
from collections.abc import Hashable
from itertools import pairwise
from typing import Literal

import networkx as nx

from graphwright.ir.program import Program
from graphwright.ir.view.layout import layered
from graphwright.ir.view.table import Block, module_blocks, op_blocks

_CHARACTER = 6.9  # mean width of a character at the title's font size
_LONGEST = 44  # characters of a title; the tooltip has the rest
_LONGEST_DETAIL = 60
_MARGIN = 14.0

# Chosen to keep a contrast of 4.5 for text and 3 for borders on both backgrounds.
STYLE = """
.gw-graph{--gw-bg:#fff;--gw-ink:#1c2430;--gw-dim:#5a6675;--gw-edge:#8a96a6;--gw-box:#f6f8fa;
--gw-product:#2563c9;--gw-attention:#8a3fd1;--gw-norm:#0b7a75;--gw-activation:#a35b00;
--gw-lookup:#5d6b1f;--gw-own:#c02667;--gw-other:#75818f;--gw-input:#1c2430;--gw-output:#1c2430}
@media(prefers-color-scheme:dark){.gw-graph{--gw-bg:#12161c;--gw-ink:#e6ebf2;--gw-dim:#a3afbd;
--gw-edge:#6b7887;--gw-box:#1b212a;--gw-product:#6ea3ff;--gw-attention:#c08cff;--gw-norm:#46c4bb;
--gw-activation:#f0a94b;--gw-lookup:#b3c45c;--gw-own:#ff7fae;--gw-other:#7d8996;
--gw-input:#e6ebf2;--gw-output:#e6ebf2}}
.gw-graph rect.bg{fill:var(--gw-bg)}
.gw-graph text{font:12px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--gw-ink)}
.gw-graph text.d{font-size:10.5px;fill:var(--gw-dim)}
.gw-graph text.n{font-weight:600;font-size:11px;fill:var(--gw-bg)}
.gw-graph path{fill:none;stroke:var(--gw-edge);stroke-width:1.2}
.gw-graph marker path{fill:var(--gw-edge);stroke:none}
.gw-graph .b{fill:var(--gw-box);stroke-width:1}
""" + "".join(
    f".gw-graph .{f} .b{{stroke:var(--gw-{f})}}.gw-graph .{f} .s{{fill:var(--gw-{f})}}"
    for f in ("product", "attention", "norm", "activation", "lookup", "own", "other", "input",
              "output")
)  # fmt: skip

FAMILY_TITLES = {
    "product": "matrix product, convolution",
    "attention": "attention",
    "norm": "normalisation",
    "activation": "activation",
    "lookup": "lookup",
    "own": "compressed or fused",
    "other": "everything else",
}
"""The meaning of the colours."""

Level = Literal["module", "op"]


def draw(program: Program, level: Level = "module") -> str:
    """The program as an SVG document: `module` folds it to a few blocks, `op` shows every call.

    Names come from the model and are escaped; the text holds no script and no link.
    """
    return draw_blocks(module_blocks(program) if level == "module" else op_blocks(program))


def draw_blocks(graph: nx.DiGraph) -> str:
    """SVG of an acyclic graph whose nodes carry a `block` (a `Block`)."""
    blocks: dict[Hashable, Block] = nx.get_node_attributes(graph, "block")
    sizes = {node: _size(block) for node, block in blocks.items()}
    layout = layered(graph, sizes)
    width, height = layout.width + 2 * _MARGIN, layout.height + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="gw-graph" role="img" '
        f'aria-label="graph of the program" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{-_MARGIN:.0f} {-_MARGIN:.0f} {width:.0f} {height:.0f}">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="gw-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0.8L8 4L0 7.2z"/></marker></defs>',
        f'<rect class="bg" x="{-_MARGIN:.0f}" y="{-_MARGIN:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}"/>',
    ]
    parts += [_edge(points) for points in layout.routes.values()]
    parts += [_box(block, layout.centers[node], sizes[node]) for node, block in blocks.items()]
    return "".join([*parts, "</svg>"])


def _size(block: Block) -> tuple[float, float]:
    longest = max(
        len(_cut(block.title)) * _CHARACTER,
        len(_cut(block.detail, _LONGEST_DETAIL)) * _CHARACTER * 0.9,
    )
    badge = 30.0 if block.count > 1 else 0.0
    return max(64.0, longest + 22.0 + badge), 38.0 if block.detail else 26.0


def _box(block: Block, center: tuple[float, float], size: tuple[float, float]) -> str:
    (x, y), (w, h) = center, size
    left, top = x - w / 2, y - h / 2
    parts = [
        f'<g class="{block.family}"><title>{clean(block.tooltip or block.title)}</title>'
        f'<rect class="b" x="{left:.1f}" y="{top:.1f}" width="{w:.1f}" height="{h:.1f}" rx="6"/>'
        f'<rect class="s" x="{left:.1f}" y="{top + 5:.1f}" width="3.5" height="{h - 10:.1f}" '
        f'rx="1.5"/>',
        f'<text x="{left + 12:.1f}" y="{top + (16 if block.detail else 17):.1f}">'
        f"{clean(_cut(block.title))}</text>",
    ]
    if block.detail:
        parts.append(
            f'<text class="d" x="{left + 12:.1f}" y="{top + 30:.1f}">'
            f"{clean(_cut(block.detail, _LONGEST_DETAIL))}</text>"
        )
    if block.count > 1:
        text = f"×{block.count}"
        wide = 10.0 + 7.0 * len(text)
        parts.append(
            f'<rect class="s" x="{left + w - wide - 5:.1f}" y="{top + 4:.1f}" '
            f'width="{wide:.1f}" height="15" rx="7.5"/>'
            f'<text class="n" text-anchor="middle" x="{left + w - wide / 2 - 5:.1f}" '
            f'y="{top + 15.2:.1f}">{text}</text>'
        )
    return "".join([*parts, "</g>"])


def _edge(points: list[tuple[float, float]]) -> str:
    (x0, y0) = points[0]
    path = [f"M{x0:.1f} {y0:.1f}"]
    for (xa, ya), (xb, yb) in pairwise(points):
        if abs(xa - xb) < 0.5:
            path.append(f"L{xb:.1f} {yb:.1f}")
        else:  # leaves and arrives upright
            middle = (ya + yb) / 2
            path.append(f"C{xa:.1f} {middle:.1f} {xb:.1f} {middle:.1f} {xb:.1f} {yb:.1f}")
    return f'<path marker-end="url(#gw-tip)" d="{"".join(path)}"/>'


def _cut(text: str, longest: int = _LONGEST) -> str:
    if len(text) <= longest:
        return text
    keep = longest // 2 - 1
    return f"{text[:keep]}…{text[-keep:]}"


def clean(text: str) -> str:
    """Text for XML: special characters escaped, characters that XML forbids replaced."""
    allowed = (
        c if c in "\t\n" or (ord(c) >= 32 and not 0xD800 <= ord(c) < 0xE000) else "�" for c in text
    )
    return html.escape("".join(allowed).replace("\ufffe", "�").replace("\uffff", "�"))
