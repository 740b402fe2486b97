from __future__ import annotations

import os
from html.parser import HTMLParser

import pytest

from prunus.report import Figure, Highlight, Report, ReportError, Table, render, write_report

EVIL = "<script>alert('1')</script> & \"quoted\""
SVG = '<svg xmlns="http://www.w3.org/2000/svg"><text>url(http://a) onload=1</text></svg>'
PNG = "data:image/png;base64,iVBORw0KGgo="


class Reader(HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not close in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def full() -> Report:
    return Report(
        title=EVIL,
        summary=[EVIL],
        highlights=[Highlight(EVIL, EVIL)],
        tables=[Table(EVIL, [EVIL, "n"], [[EVIL, EVIL], ["x", 1234]], note=EVIL)],
        figures=[Figure(EVIL, SVG, EVIL, EVIL), Figure("p", PNG, "c", EVIL)],
        environment={EVIL: EVIL},
        command=EVIL,
    )


def test_all_text_is_escaped_and_arrives_unchanged():
    reader = read(render(full()))
    assert "script" not in [tag for tag, _ in reader.tags]
    # title twice, summary, highlight twice, table title, column, two cells, note,
    # figure title and caption, environment twice, command
    assert reader.text.count(EVIL) == 15
    svg = next(attributes for tag, attributes in reader.tags if tag == "svg")
    image = next(attributes for tag, attributes in reader.tags if tag == "img")
    assert svg["aria-label"] == image["alt"] == EVIL
    assert svg["role"] == "img"


def test_nothing_is_fetched_and_nothing_runs():
    reader = read(render(full()))
    policy = [a["content"] for _, a in reader.tags if a.get("http-equiv")]
    assert policy == [
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    ]
    for tag, attributes in reader.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert (attributes.get("src") or "data:").startswith("data:")
        assert "href" not in attributes


def test_tables_have_scopes_and_aligned_numbers():
    page = render(Report("t", tables=[Table("T", ["", "n"], [["a", 1234], ["b", None]])]))
    assert '<th scope="row">a</th><td class="number">1,234</td>' in page
    assert '<td class="number">—</td>' in page


def test_units_and_ranges_do_not_break():
    cell = "61 µs (60–66 µs), 10 × 20"
    page = render(Report("t", tables=[Table("T", ["", "n"], [["a", cell]])]))
    glue, joiner = "\u00a0", "\u2060"
    expected = f"61{glue}µs (60{joiner}–{joiner}66{glue}µs), 10{glue}×{glue}20"
    assert expected in page


@pytest.mark.parametrize(
    "image",
    [
        "https://example.org/a.png",
        "data:image/svg+xml;base64,AAAA",
        PNG + '" onerror="alert(1)',
        "<svg><script>1</script></svg>",
        '<svg onload="x()"></svg>',
        '<svg xmlns="http://www.w3.org/2000/svg"><a href="#x"/></svg>',
        '<svg><image href="http://example.org/a.png"/></svg>',
        '<svg xmlns:x="http://www.w3.org/1999/xlink"><use x:href="http://example.org/a.svg#a"/></svg>',
        '<svg><rect fill="url(http://example.org/a)"/></svg>',
        "<svg><style>@import 'http://example.org'</style></svg>",
        "<svg></svg><p>more</p>",
        "",
    ],
)
def test_pictures_that_are_not_self_contained_are_refused(image):
    with pytest.raises(ReportError, match="figure 'bad'"):
        render(Report("t", figures=[Figure("bad", image, "", "")]))


def test_an_empty_report_is_a_page():
    assert "<h1>only a title</h1>" in render(Report("only a title"))


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.html"
    write_report(path, Report("first"))
    assert path.read_text(encoding="utf-8") == render(Report("first"))

    with pytest.raises(ReportError):
        write_report(path, Report("t", figures=[Figure("bad", "", "", "")]))

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, Report("second"))
    assert path.read_text(encoding="utf-8") == render(Report("first"))
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
