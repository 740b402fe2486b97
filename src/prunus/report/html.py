"""One self-contained HTML file: inline style, no script, no request to anywhere."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from html import escape
from pathlib import Path
from xml.etree import ElementTree

from prunus.report.content import Figure, Report, Table
from prunus.report.errors import ReportError
from prunus.report.style import STYLE
from prunus.report.table import cell_text

# The page may use its own style and embedded pictures; nothing may be fetched, nothing may run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"

_PNG = re.compile(r"data:image/png;base64,[A-Za-z0-9+/]+=*\Z")
_ACTIVE = frozenset({"script", "foreignobject", "iframe", "image", "a", "object", "embed"})
_OUTSIDE = re.compile(r"url\(\s*[\"']?(?!#)|@import", re.IGNORECASE)


def write_report(path: str | os.PathLike[str], content: Report) -> None:
    """Write the page to `path`, whole or not at all. Raises ReportError as render() does."""
    target = Path(path)
    page = render(content).encode("utf-8")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def render(content: Report) -> str:
    """The page as text; all text is escaped.

    Raises ReportError for a figure that is neither plain SVG nor an embedded PNG.
    """
    title = escape(content.title)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<header><h1>{title}</h1>",
            *(f"<p>{escape(line)}</p>" for line in content.summary),
            "</header>",
            *_highlights(content),
            *(_table(table) for table in content.tables),
            *(_figure(figure) for figure in content.figures),
            *_origin(content),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _highlights(content: Report) -> Iterator[str]:
    if not content.highlights:
        return
    yield '<ul class="highlights">'
    for item in content.highlights:
        yield f"<li><strong>{escape(item.value)}</strong> <span>{escape(item.label)}</span></li>"
    yield "</ul>"


def _table(table: Table) -> str:
    align = [' class="number"' if numeric else "" for numeric in table.numeric()]
    columns = "".join(
        f'<th scope="col"{side}>{escape(name)}</th>'
        for side, name in zip(align, table.columns, strict=True)
    )
    rows = []
    for row in table.rows:
        first, *rest = (_cell(cell_text(cell)) for cell in row)
        cells = "".join(f"<td{side}>{c}</td>" for side, c in zip(align[1:], rest, strict=True))
        rows.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    # The wrapper scrolls on narrow screens and must therefore be reachable by keyboard.
    label = escape(table.title, quote=True)
    return (
        f"<section><h2>{escape(table.title)}</h2>"
        f'<div class="wide" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{note}</section>"
    )


def _cell(text: str) -> str:
    """Escaped; numbers, their units, ranges and products do not part at a line's end."""
    text = re.sub(r"(?<=\d) (?=[nµmkMG]?[sB]\b)|(?<=\d) (?=×)|(?<=×) (?=\d)", "\u00a0", text)
    return escape(re.sub(r"(?<=\d)–(?=\d)", "\u2060–\u2060", text))


def _figure(figure: Figure) -> str:
    alt = escape(figure.alt, quote=True)
    if _PNG.match(figure.image):
        picture = f'<img src="{figure.image}" alt="{alt}">'
    elif figure.image.startswith("<svg") and _is_plain_svg(figure.image):
        picture = figure.image.replace("<svg", f'<svg role="img" aria-label="{alt}"', 1)
    else:
        raise ReportError(
            f"figure {figure.title!r}: the image must be one <svg> element without scripts and "
            "outside references, or a 'data:image/png;base64,' address"
        )
    return (
        f"<section><h2>{escape(figure.title)}</h2>"
        f'<figure><div class="picture">{picture}</div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure></section>"
    )


def _is_plain_svg(image: str) -> bool:
    """Whether it is one well-formed element without scripts, handlers and outside references."""
    try:
        elements = list(ElementTree.fromstring(image).iter())
    except ElementTree.ParseError:
        return False
    for element in elements:
        kind = _local(element.tag)
        if kind in _ACTIVE or (kind == "style" and _OUTSIDE.search(element.text or "")):
            return False
        for name, value in element.attrib.items():
            outside = _local(name) == "href" and not value.startswith("#")
            if outside or _local(name).startswith("on") or _OUTSIDE.search(value):
                return False
    return True


def _local(name: str) -> str:
    """A name without its XML namespace, in lower case."""
    return name.rsplit("}", 1)[-1].lower()


def _origin(content: Report) -> Iterator[str]:
    if not content.command and not content.environment:
        return
    yield '<section class="origin"><h2>How this was made</h2>'
    if content.command:
        yield f"<pre><code>{escape(content.command)}</code></pre>"
    if content.environment:
        yield "<dl>"
        for key, value in content.environment.items():
            yield f"<div><dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd></div>"
        yield "</dl>"
    yield "</section>"
