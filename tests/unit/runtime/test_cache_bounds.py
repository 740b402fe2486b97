"""The folder of measured times stays small, whoever shares it."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from prunus.runtime import cache

NAMES = frozenset({"csr", "dense"})
TIMES = {"csr": 1.0, "dense": 2.0}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    return tmp_path


def aged(path, days):
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def test_the_longest_unused_answers_go_first(folder, monkeypatch):
    monkeypatch.setattr(cache, "MOST_FILES", 5)
    for number in range(12):
        cache.put({"number": number}, TIMES)
        place = cache._place({"number": number})
        assert place is not None
        aged(place, 100 - number)
    cache.get({"number": 0}, NAMES)  # used: the youngest from now on
    assert cache.prune(folder) == 7
    kept = [n for n in range(12) if cache.get({"number": n}, NAMES) == TIMES]
    assert kept == [0, 8, 9, 10, 11]


def test_old_answers_go_and_young_ones_stay(folder):
    for number, days in enumerate((cache.MOST_DAYS + 1, cache.MOST_DAYS - 1, 0)):
        cache.put({"number": number}, TIMES)
        aged(cache._place({"number": number}), days)
    assert cache.prune(folder) == 1
    assert cache.get({"number": 0}, NAMES) is None
    assert cache.get({"number": 1}, NAMES) == TIMES
    assert cache.get({"number": 2}, NAMES) == TIMES


def test_nothing_else_in_the_folder_is_touched(folder, monkeypatch):
    monkeypatch.setattr(cache, "MOST_FILES", 0)
    others = ["notes.json", "a" * 31 + ".json", "thesis.tmp", "prunus-1.txt", "A" * 32 + ".json"]
    for name in others:
        (folder / name).write_text("{}")
        aged(folder / name, 10_000)
    (folder / "prunus-young.tmp").write_text("")  # a writer may be at it
    (folder / "prunus-dead.tmp").write_text("")
    aged(folder / "prunus-dead.tmp", 2)
    cache.put({"number": 0}, TIMES)
    cache.prune(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*others, "prunus-young.tmp"])


def test_writing_bounds_the_folder(folder, monkeypatch):
    monkeypatch.setattr(cache, "MOST_FILES", 20)
    monkeypatch.setattr(cache, "PRUNE_EVERY", 10)
    for number in range(100):
        cache.put({"number": number}, TIMES)
        assert len(list(folder.iterdir())) <= 30


def test_a_folder_that_is_not_there_is_no_error(tmp_path):
    assert cache.prune(tmp_path / "absent") == 0


WORK = """
import sys
from prunus.runtime import cache
cache.MOST_FILES, cache.PRUNE_EVERY = 8, 2
names = frozenset({"a"})
for step in range(150):
    key = {"number": (step * 7 + int(sys.argv[1])) % 40}
    found = cache.get(key, names)
    assert found in (None, {"a": 1.0 + key["number"]}), found
    if found is None:
        cache.put(key, {"a": 1.0 + key["number"]})
"""


@pytest.mark.slow
def test_processes_that_write_and_prune_at_once_do_not_fail(folder):
    children = [
        subprocess.Popen([sys.executable, "-c", WORK, str(i)], stderr=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    assert not list(folder.glob("*.tmp"))
    assert 0 < len(list(folder.iterdir())) <= 8 + 3 * 2
