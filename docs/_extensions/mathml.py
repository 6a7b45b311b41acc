"""Equations become MathML while the site is built: browsers draw it themselves, without a script or a font."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number

BAR = '<mo stretchy="false">&#x0007C;</mo>'


def mathml(latex: str, display: str) -> str:
    """`display`: inline or block."""
    # Of a fixed size, the closing one of a pair would not grow where it has an exponent.
    if len(re.findall(r"\\[Bb]igg?l\b", latex)) == len(re.findall(r"\\[Bb]igg?r\b", latex)):
        latex = re.sub(r"\\[Bb]igg?([lr])\b", lambda side: r"\left" if side[1] == "l" else r"\right", latex)
    # A bar is a fence here, as in |x|, and has no room around it.
    return str(convert(latex, display=display)).replace(BAR, BAR.replace("<mo", '<mo lspace="0" rspace="0"'))


def visit_inline(self: Any, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(mathml(node.astext(), "block"))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
