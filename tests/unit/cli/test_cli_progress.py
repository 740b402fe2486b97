"""Progress in a log and on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from prunus.cli.progress import Work


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def _work(monkeypatch, stream, quiet=False):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    with Work(4.0, quiet=quiet) as work:
        with work.phase("mlp, seed 0: dense", 1.0) as on_step:
            for step in range(100):
                on_step(step + 1, 100)
        with work.phase("mlp, seed 0: sparse [0.9]", 3.0) as on_step:
            on_step(1, 2)
            middle = work._bar.tasks[0].completed
    return stream.getvalue(), middle


def test_a_log_gets_one_plain_line_per_phase(monkeypatch):
    text, middle = _work(monkeypatch, io.StringIO())
    assert text.splitlines() == [
        "prunus:     0 s  mlp, seed 0: dense",
        "prunus:     0 s  mlp, seed 0: sparse [0.9]",
    ]
    assert middle == pytest.approx(2.5)


def test_colours_asked_for_by_the_environment_do_not_bring_control_characters(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text, _ = _work(monkeypatch, io.StringIO())
    assert "\x1b" not in text


def test_quiet_is_silent(monkeypatch):
    assert _work(monkeypatch, io.StringIO(), quiet=True)[0] == ""
    assert _work(monkeypatch, _Terminal(), quiet=True)[0] == ""


def test_a_terminal_gets_a_bar_in_one_line_that_goes_away(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text, _ = _work(monkeypatch, _Terminal())
    assert "mlp, seed 0: sparse [0.9]" in text
    assert "100%" in text
    assert "left" in text
    assert text.count("\n") <= 2
    assert "prunus:" not in text


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    text, _ = _work(monkeypatch, _Terminal())
    assert "\x1b" not in text
    assert text.count("\n") == 2
