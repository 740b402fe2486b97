from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.errors import ShapeError, ValueRangeError
from prunus.metrics import Latency
from prunus.report import (
    Report,
    ReportError,
    accuracy_against_sparsity,
    latency_bars,
    layer_sparsity,
    mask_picture,
    render,
)
from prunus.report.figures import _reduce

CURVES = {"gradual $a$ <b>": {0.5: [0.97, 0.98], 0.95: [0.9, 0.95]}, "random": {0.95: [0.7]}}


def measured(seconds: float) -> Latency:
    return Latency(seconds, seconds * 0.9, seconds * 1.2, seconds, 1, (seconds,), 0)


def figures():
    groups = {
        "batch 1": {"dense": measured(1e-4), "sparse": measured(2e-5)},
        "b": {"x": measured(1)},
    }
    return [
        accuracy_against_sparsity(CURVES, [0.98, 0.99]),
        layer_sparsity([("fc1.$weight$", 0.5, 100), ("x" * 60, 0.95, 1000)]),
        latency_bars(groups),
    ]


def words(svg: str) -> set[str]:
    root = ET.fromstring(svg)
    return {"".join(e.itertext()).strip() for e in root.iter() if e.tag.endswith("}text")}


def test_accuracy_figure_names_curves_and_the_dense_line():
    figure = accuracy_against_sparsity(CURVES, [0.98, 0.99])
    assert {"gradual $a$ <b>", "random", "50%", "95%", "dense 98.5%"} <= words(figure.image)
    assert "gradual $a$ <b>: 97.5% at 50%, 92.5% at 95%" in figure.alt
    assert "2 seeds" in figure.caption
    assert accuracy_against_sparsity({"a": {0.5: [0.9]}}).caption == "One seed."


def test_logit_axis_gives_95_and_98_room():
    curve = {s: [0.9] for s in (0.5, 0.8, 0.9, 0.95, 0.98)}
    svg = accuracy_against_sparsity({"a": curve}).image
    places = re.findall(r"middle;[^>]*translate\(([\d.]+) [^>]*>(\d+)%<", svg)  # matplotlib < 3.11
    places += re.findall(r'middle;[^>]* x="([\d.]+)"[^>]*>(\d+)%<', svg)
    x = {int(label): float(place) for place, label in places}
    logit = {s: np.log(s / (100 - s)) for s in (50, 80, 90, 95, 98)}
    scale = (x[98] - x[50]) / (logit[98] - logit[50])
    for label in (80, 90, 95):
        assert x[label] - x[50] == pytest.approx(scale * (logit[label] - logit[50]), abs=2)


def test_bars_say_what_they_show():
    layers, latency = figures()[1:]
    assert {"fc1.$weight$", "50.0% · 50 kept", "95.0% · 50 kept"} <= words(layers.image)
    assert any("…" in word for word in words(layers.image))
    assert {"batch 1", "dense", "sparse", "100 µs", "20.0 µs"} <= words(latency.image)
    assert "batch 1, dense: 100 µs (90.0–120 µs)" in latency.alt


@pytest.mark.parametrize("index", [0, 1, 2])
def test_svg_follows_the_page_and_shares_it_with_others(index):
    svg, again = figures()[index].image, figures()[index].image
    assert svg == again
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "<metadata" not in svg
    ids = set(re.findall(r'\bid="([^"]+)"', svg))
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    assert used <= ids
    for other in figures()[index + 1 :]:
        assert not ids & set(re.findall(r'\bid="([^"]+)"', other.image))
    render(Report("t", figures=figures()))  # and the page accepts it


def test_no_global_state_of_matplotlib_is_touched():
    code = (
        "import sys, prunus.report as r; r.layer_sparsity([('a', .5, 4)]);"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    path = ":".join(p for p in sys.path if p)
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}).returncode == 0


def pixels(figure) -> np.ndarray:
    from PIL import Image

    head, data = figure.image.split(",", 1)
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image)


def test_small_masks_are_shown_exactly():
    mask = torch.eye(8, 32, dtype=torch.bool)
    figure = mask_picture(mask, name="fc <1>")
    alpha = pixels(figure)[..., 3]
    assert alpha.shape == (128, 512)  # 16 pixels for each weight
    assert np.array_equal(alpha[8::16, 8::16] == 255, mask.numpy())
    assert set(np.unique(alpha)) == {0, 255}
    assert "fc <1>, 8 × 32, 96.88% removed" in figure.caption
    assert "mean" not in figure.caption


def test_large_masks_are_local_means_and_say_so():
    mask = torch.zeros(600, 1300)
    mask[:300] = 1.0
    figure = mask_picture(mask)
    alpha = pixels(figure)[..., 3]
    assert max(alpha.shape) <= 512
    assert alpha[: len(alpha) // 2 - 1].min() == 255
    assert alpha[len(alpha) // 2 + 1 :].max() == 0
    assert "mean of up to 2 × 3 weights" in figure.caption


@settings(max_examples=25)
@given(st.integers(1, 1500), st.integers(1, 700), st.integers(0, 9))
def test_reduction_is_the_mean_of_each_cell(height, width, seed):
    flat = np.random.default_rng(seed).random((height, width))
    cells, (tall, wide) = _reduce(flat)
    assert max(cells.shape) <= 512
    row, column = cells.shape[0] - 1, cells.shape[1] // 2
    cell = flat[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
    assert cells[row, column] == pytest.approx(cell.mean())


def test_convolutions_vectors_and_flat_masks():
    kernels = torch.zeros(4, 2, 3, 3)
    kernels[1, 1] = 1
    figure = mask_picture(kernels)
    alpha = pixels(figure)[..., 3]
    step = alpha.shape[0] // 4, alpha.shape[1] // 18
    sampled = alpha[step[0] // 2 :: step[0], step[1] // 2 :: step[1]]
    assert np.array_equal(sampled == 255, kernels.flatten(1).numpy() == 1)
    assert "18 columns" in figure.caption
    height, width = pixels(mask_picture(torch.ones(10, 1536))).shape[:2]
    assert 3 <= width / height <= 5
    assert pixels(mask_picture(torch.zeros(5)))[..., 3].max() == 0


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueRangeError, match="sparsity 1"):
        accuracy_against_sparsity({"a": {1.0: [0.5]}})
    with pytest.raises(ValueRangeError, match="0 accuracies"):
        accuracy_against_sparsity({"a": {0.5: []}})
    with pytest.raises(ValueRangeError, match="no layers"):
        layer_sparsity([])
    with pytest.raises(ValueRangeError, match="no group empty"):
        latency_bars({"a": {}})
    with pytest.raises(ShapeError, match="nothing to show"):
        mask_picture(torch.zeros(0, 3))


@pytest.mark.parametrize(
    "draw", [lambda: layer_sparsity([("a", 0.5, 2)]), lambda: mask_picture(torch.ones(2, 2))]
)
def test_missing_matplotlib_names_the_extra(monkeypatch, draw):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ReportError, match=r"pip install 'prunus\[report\]'"):
        draw()
