"""Equations as MathML, made when the site is built, for MkDocs (``hooks`` in ``mkdocs.yml``): a browser then needs no script.

``pymdownx.arithmatex`` finds them in a page, ``$...$`` and fences of ``math``, which GitHub shows too;
``math_core`` draws them. What is copied from a page is the LaTeX, which is there unseen (``site.css``): of MathML Chromium
copies each symbol as a line.
"""

from __future__ import annotations

import re
from html import escape, unescape
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

FOUND = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
CONVERTER = LatexToMathML()


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Draws what was found. Equations on lines of their own stay out of the search index, which would make them one word."""

    def drawn(match: re.Match[str]) -> str:
        block, latex = match[1] == "div", unescape(match[2]).strip()
        try:
            mathml = CONVERTER.convert_with_local_state(latex, displaystyle=block)
        except LatexError as e:
            raise PluginError(f"{page.file.src_uri}: {latex}: {e}") from None
        both = f'<span class="latex" aria-hidden="true" data-search-exclude>{escape(latex)}</span>{mathml}'
        return f'<div class="equation" data-search-exclude>{both}</div>' if block else both

    return FOUND.sub(drawn, html)
