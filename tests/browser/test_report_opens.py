"""The page of a run in a real browser: offline, without errors, readable on a phone."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from prunus.cli import main
from prunus.report import byte_size, count, percent

RECIPE = Path(__file__).parents[1] / "integration" / "recipe_digits.yaml"


@pytest.fixture(scope="module")
def run(chromium, tmp_path_factory):
    """The folder of a small run (after `chromium`, so that a skip costs nothing)."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        assert main(["run", str(RECIPE), "--quiet"]) == 0
    return folder / "out"


@pytest.fixture
def page(chromium, run):
    """The report, loaded with the network switched off."""
    chromium.events.clear()
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    chromium.call("Network.emulateNetworkConditions", **offline)
    chromium.call("Page.navigate", url=(run / "report.html").as_uri())
    chromium.wait_for("Page.loadEventFired")
    return chromium


def _seen(page, *methods):
    return [event for event in page.events if event.get("method") in methods]


def test_it_asks_nothing_of_anyone_and_reports_no_error(page):
    urls = [e["params"]["request"]["url"] for e in _seen(page, "Network.requestWillBeSent")]
    assert [url for url in urls if url.startswith("file:")] == urls[:1]
    assert all(url.startswith("data:") for url in urls[1:])
    errors = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert _seen(page, *errors, "Network.loadingFailed") == []


def test_it_says_what_was_measured(page, run):
    text = page.value("document.body.innerText").replace("\u2060", "").replace("\u00a0", " ")
    row = json.loads((run / "results.json").read_text())["tiny"]["runs"][0]["evidence"]
    for side in ("dense", "sparse"):
        assert percent(row[side]["accuracy"]["value"], 2) in text
        assert count(row[side]["nonzeros"]) in text
        assert byte_size(row[side]["bytes"]) in text
    for layer in row["plan"]["rows"]:
        assert layer["name"] in text
        assert layer["reason"] in text
    assert "prunus run" in text
    assert row["environment"]["processor"] in text
    assert page.value("document.title") == "prunus run: tiny"
    assert page.value("document.documentElement.lang") == "en"


def test_every_picture_is_drawn_and_described(page):
    pictures = page.value(
        "[...document.querySelectorAll('figure img, figure svg')].map(e => ({kind: e.tagName,"
        "alt: e.getAttribute('alt') || e.getAttribute('aria-label') || '',"
        "width: e.getBoundingClientRect().width, height: e.getBoundingClientRect().height,"
        "whole: e.tagName != 'IMG' || e.naturalWidth > 0}))"
    )
    assert len(pictures) == 4  # the curve, the layers, a mask, the latencies
    for picture in pictures:
        assert len(picture["alt"]) > 20
        assert picture["whole"]
        assert min(picture["width"], picture["height"]) > 50


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_it_is_readable_at_the_width_of_a_desk_and_of_a_phone(page, width, scheme):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.call("Emulation.setDeviceMetricsOverride", **metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.call("Emulation.setEmulatedMedia", features=features)
    assert page.value("document.documentElement.scrollWidth") <= width  # nothing sticks out
    shot = page.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
    picture = imread(io.BytesIO(base64.b64decode(shot["data"])), format="png")[..., :3]
    assert picture.shape[1] == width
    ink = np.abs(picture - picture[2, 2]).max(axis=-1) > 0.3
    assert ink.mean() > 0.01
    assert (picture[2, 2].mean() < 0.5) == (scheme == "dark")
    thirds = np.array_split(ink, 3)
    assert all(third.mean() > 0.002 for third in thirds)  # and not only the heading


def test_it_can_be_read_without_eyes(page):
    rows = page.value("document.querySelectorAll('tbody tr').length")
    heads = page.value("document.querySelectorAll('tbody th[scope=row]').length")
    assert rows == heads > 10
    assert page.value("document.querySelectorAll('h1').length") == 1
    assert page.value("[...document.querySelectorAll('h1,h2')].every(e => e.innerText.trim())")
