"""A report as one HTML file that can be sent as it is, made of Markdown and pictures."""

import base64
import math
from collections.abc import Mapping
from html import escape
from typing import Any

from markdown_it import MarkdownIt

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 68rem; margin: 2rem auto;
  padding: 0 1rem }
h1, h2 { line-height: 1.2; margin: 2rem 0 .7rem } h1 { font-size: 1.7rem } h2 { font-size: 1.25rem }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: .87rem;
  font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 2px solid #999; vertical-align: bottom; white-space: normal }
th:first-child { text-align: left }
tr:hover td { background: #f5f8fb }
img { max-width: 100%; display: block; margin: .5rem 0 }
pre { background: #f5f5f5; padding: .7rem .9rem; border-radius: 4px; white-space: pre-wrap;
  font-size: .82rem }
code { font-size: .9em }
blockquote { margin: 1rem 0; padding: .4rem 1rem; border-left: 4px solid #c77700; background: #fff7e8 }
em { color: #555 }
"""


def html_page(title: str, text: str, pictures: Mapping[str, bytes]) -> str:
    """Markdown as a page, pictures inside.

    Args:
        title: of the page.
        text: Markdown, without HTML, that shows each picture by its name: `![what it shows](name.png)`.
        pictures: PNG files by their names.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for name, picture in pictures.items():
        data = base64.b64encode(picture).decode()
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{data}"')
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n{body}</html>\n'
    )


def finite(value: Any) -> Any:
    """A tree of dicts and lists with null for what is no number, of which JSON has none."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
