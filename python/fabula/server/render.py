"""Markdown to HTML for the page: markdown-it-py without raw HTML, code colored by Pygments, the result cleaned by nh3.

A text is rendered block by block (a paragraph, a list, a fence ...). Appending to a text changes only its last block,
so a page that shows a growing answer keeps the earlier blocks and sends only the text from `last_line` on. Link
definitions are the exception: they affect other blocks, and take effect when the whole answer is rendered at its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

MAX_COLORED = 20_000  # characters of a code block; coloring takes about a millisecond per thousand
MAX_NESTED = 20  # levels of quotes and lists; deeper ones are left out
MAX_MARKED = 100_000  # characters of a block of prose; a table takes ten microseconds per character
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)")
ALIGNS = ("left", "center", "right")

_TAGS = {
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em", "strong", "s", "a"),
    *("br", "hr", "table", "thead", "tbody", "tr", "th", "td", "span", "div"),
}
_CLASSES = {
    "span": {name for name in STANDARD_TYPES.values() if name},
    "th": set(ALIGNS),
    "td": set(ALIGNS),
    "pre": {"code", "plain"},
}
_ATTRIBUTES = {"a": {"href", "title"}, "ol": {"start"}, "pre": {"data-language"}}


@dataclass(frozen=True, slots=True)
class Rendered:
    """A text as HTML.

    Attributes:
        blocks: clean HTML of each block at the top level.
        last_line: the line, from 0, where the last block starts; appended text cannot change what precedes it.
    """

    blocks: list[str]
    last_line: int


def render(text: str) -> Rendered:
    """Renders markdown to HTML.

    Every block is clean on its own: no scripts, styles, images or events, and links only to http, https and mailto.
    """
    text = text.replace("\0", "�")
    if _longest_prose(text) > MAX_MARKED:
        return Rendered([_CLEANER.clean(f'<pre class="plain">{escape(text)}</pre>')], 0)
    tokens = _MARKDOWN.parse(text)
    blocks, last_line = [], 0
    for block in _top_blocks(tokens):
        html = _MARKDOWN.renderer.render(block, _MARKDOWN.options, {})
        blocks.append(_CLEANER.clean(html))
        if block[0].map is not None:
            last_line = block[0].map[0]
    return Rendered(blocks, last_line)


def _top_blocks(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each block at the top level."""
    block: list[Token] = []
    for token in tokens:
        block.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield block
            block = []


def _longest_prose(text: str) -> int:
    """Length in characters of the longest run of lines without an empty one, outside of fences."""
    most = length = 0
    fence = ""
    for line in text.splitlines():
        mark = _FENCE.match(line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) and not mark[2].strip() else fence
        elif mark:
            fence, length = mark[1], 0
        else:
            length = length + len(line) + 1 if line.strip() else 0
            most = max(most, length)
    return most


# ---- How tokens become HTML -----------------------------------------------------------------------------------------


class _Renderer(RendererHTML):
    """Colors code; renders images as links, since nothing is fetched; alignment as a class, since styles are out."""

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        del options, env
        token = tokens[idx]
        language = token.info.strip().split(maxsplit=1)[0][:40] if token.info.strip() else ""
        return _code(token.content, language)

    def code_block(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        del options, env
        return _code(tokens[idx].content, "")

    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        token = tokens[idx]
        text = self.renderInlineAsText(token.children, options, env) or str(token.attrs.get("src", ""))
        return f'<a href="{escape(str(token.attrs.get("src", "")))}">{escape(text)}</a>'

    def th_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        del options, env
        return _cell(tokens[idx])

    def td_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        del options, env
        return _cell(tokens[idx])


def _cell(token: Token) -> str:
    align = str(token.attrs.get("style", "")).removeprefix("text-align:")
    return f'<{token.tag} class="{align}">' if align in ALIGNS else f"<{token.tag}>"


def _code(code: str, language: str) -> str:
    inner = escape(code)
    if language and len(code) <= MAX_COLORED:
        with suppress(ClassNotFound):
            inner = highlight(code, get_lexer_by_name(language, stripnl=False, ensurenl=False), _COLORS)
    return f'<pre class="code" data-language="{escape(language)}"><code>{inner}</code></pre>\n'


def _is_good_link(url: str) -> bool:
    return url.lower().startswith(("http://", "https://", "mailto:"))


def _markdown() -> MarkdownIt:
    options = {"html": False, "linkify": False, "typographer": False, "maxNesting": MAX_NESTED}
    found = MarkdownIt("commonmark", options, renderer_cls=_Renderer).enable(["table", "strikethrough"])
    found.validateLink = _is_good_link  # type: ignore[method-assign]
    return found


_COLORS: HtmlFormatter[str] = HtmlFormatter(nowrap=True)
_MARKDOWN = _markdown()
_CLEANER = nh3.Cleaner(
    tags=_TAGS,
    attributes=_ATTRIBUTES,
    allowed_classes=_CLASSES,
    url_schemes={"http", "https", "mailto"},
    url_relative="deny",
    link_rel="noopener noreferrer nofollow",
    set_tag_attribute_values={"a": {"target": "_blank"}},
)
