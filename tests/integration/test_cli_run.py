"""The commands from end to end on a small recipe, as a newcomer would type them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from safetensors.torch import save_file

import prunus as pr
from prunus.bench import mlp
from prunus.cli import commands, main
from prunus.report import percent

RECIPE = Path(__file__).with_name("recipe_digits.yaml")
PRUNUS = [sys.executable, "-m", "prunus"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which the recipe was run once: (folder, what stdout and stderr got)."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copy(RECIPE, folder / "tiny.yaml")
    done = subprocess.run(
        [*PRUNUS, "run", "tiny.yaml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


@pytest.fixture(autouse=True)
def _at_home(home, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(home[0])


def _results(folder):
    return json.loads((folder / "out" / "results.json").read_text())


def test_run_writes_a_packed_file_the_results_and_a_page(home):
    folder, out, _ = home
    assert {p.name for p in (folder / "out").iterdir()} == {
        "tiny-seed0.safetensors",
        "results.json",
        "report.html",
    }
    run = _results(folder)["tiny"]["runs"][0]
    row = run["evidence"]
    model = pr.load(folder / run["file"], mlp(hidden=(96, 48)))
    nonzeros = sum(int(p.count_nonzero()) for p in model.parameters())
    assert row["sparse"]["nonzeros"] == nonzeros
    assert row["sparse"]["bytes"] == os.path.getsize(folder / run["file"])
    weights = [p for p in model.parameters() if p.dim() == 2]
    zeros = 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.9, abs=1e-3)
    assert list(run["curve"]) == ["0.5", "0.9"]
    for side in ("dense", "sparse"):
        assert percent(row[side]["accuracy"]["value"], 2) in out
        assert f"{row[side]['nonzeros']:,}" in out
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_terminal_shows_at_most_80_columns_and_no_cut_labels(home):
    _, out, err = home
    assert max(map(cell_len, out.splitlines())) <= 80
    labels = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert "peak memory, batch 64" in labels
    assert "correct / (logits × P)" in labels
    assert "layers.fc1" in labels
    assert "" not in labels  # a cell went to a second line
    assert "\x1b" not in out + err
    assert re.fullmatch(r"(prunus: +\d+ s  tiny, seed 0: [\w .,]+\n)+", err)
    assert "report.html" in out


def test_json_is_all_of_stdout_and_says_what_the_file_says(home, capfd, monkeypatch):
    folder, _, _ = home
    (folder / "talking.py").write_text(
        "from prunus.bench import mlp\nprint('imported')\n"
        "def net(seed):\n    print('built')\n    return mlp(hidden=(32,), seed=seed)\n"
    )
    text = RECIPE.read_text().replace("{call: prunus.bench:mlp, hidden: [96, 48]}", "talking:net")
    (folder / "talk.yaml").write_text(text.replace("folder: out", "folder: talk"))
    assert main(["run", "talk.yaml", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == json.loads((folder / "talk" / "results.json").read_text())
    assert out.count("\n") == 1
    assert "imported" in err
    assert "built" in err
    assert "prunus:" not in err  # no progress


def test_quiet_prints_one_table_and_leaves_a_page_out_without_matplotlib(
    home, capfd, monkeypatch, tmp_path
):
    def find_spec(name):
        return None if name == "matplotlib" else object()

    monkeypatch.setattr(commands.importlib.util, "find_spec", find_spec)
    text = RECIPE.read_text().replace("epochs: 2", "epochs: 1").replace("[0.5]", "[]")
    (tmp_path / "q.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "q.yaml", "--quiet"]) == 0
    out, err = capfd.readouterr()
    assert err == (
        "prunus: no report page, as matplotlib is not installed; "
        "run: pip install 'prunus[report]'\n"
    )
    assert out.count("┏") == 1
    assert not (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "results.json").exists()


def test_without_scikit_learn_the_digits_are_refused_before_training(home, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["run", "tiny.yaml"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("prunus: tiny.yaml:4: the digits come with scikit-learn")
    assert "pip install" in err


def test_an_interrupted_run_ends_with_130_and_leaves_nothing_half_written(home, tmp_path):
    text = RECIPE.read_text().replace("epochs: 2", "epochs: 100000")
    (tmp_path / "long.yaml").write_text(text)
    process = subprocess.Popen(
        [*PRUNUS, "run", "long.yaml"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs ignore the signal, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    assert process.stderr is not None
    assert "seed 0: dense" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err == "prunus: interrupted; the files that were written are whole\n"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "words"),
    [("tiny.yaml", "tiny.yaml: is a file; name a folder"), ("/proc/none/x", "/proc/none")],
)
def test_a_folder_that_cannot_be_written_is_refused_before_training(home, capfd, folder, words):
    Path("bad.yaml").write_text(RECIPE.read_text().replace("folder: out", f"folder: {folder}"))
    assert main(["run", "bad.yaml"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_the_demo_refuses_a_folder_as_its_report(capfd, tmp_path):
    assert main(["demo", "--folder", str(tmp_path / "f"), "--report", str(tmp_path)]) == 1
    assert "is a folder; name a file" in capfd.readouterr().err


def test_inspect_shows_every_tensor(home, capfd):
    file = "out/tiny-seed0.safetensors"
    assert main(["inspect", file, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    model = pr.load(file, mlp(hidden=(96, 48)))
    state = model.state_dict()
    assert set(found["tensors"]) == set(state)
    for name, tensor in found["tensors"].items():
        assert tuple(tensor["shape"]) == tuple(state[name].shape)
        assert tensor["nonzeros"] == int(state[name].count_nonzero())
    assert main(["inspect", file]) == 0
    out = capfd.readouterr().out
    assert "layers.fc2.weight" in out
    assert "90.0%" in out
    assert "all checksums match" in out


def test_inspect_keeps_commands_to_the_terminal_out(home, capfd):
    pr.save(torch.nn.ModuleDict({"a\x1b[31m": torch.nn.Linear(2, 2)}), "evil.safetensors")
    assert main(["inspect", "evil.safetensors"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert "a?[31m" in out


def test_inspect_and_bench_explain_what_they_cannot_read(home, capfd):
    whole = Path("out/tiny-seed0.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:-10])
    Path("flipped.safetensors").write_bytes(whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])
    Path("empty.safetensors").write_bytes(b"")
    save_file({"a": torch.zeros(2, 2)}, "plain.safetensors")
    cases = {
        "cut.safetensors": "cut.safetensors: ",
        "flipped.safetensors": "does not match its checksum",
        "empty.safetensors": "the file is empty",
        "plain.safetensors": "without a prunus header; open it with safetensors",
        "tiny.yaml": "it is truncated or no safetensors file",
        "out": "out: Is a directory",
        "none.safetensors": "none.safetensors: No such file or directory",
    }
    for command in ("inspect", "bench"):
        for name, words in cases.items():
            assert main([command, name]) == 1
            out, err = capfd.readouterr()
            assert out == ""
            assert words in err
            assert err.startswith("prunus: ")
            assert err.count("\n") == 1


def test_bench_times_every_sparse_layer_at_every_batch_size(home, capfd):
    file = "out/tiny-seed0.safetensors"
    assert main(["bench", file, "--batch", "2, 3", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    state = pr.load(file)
    sparse = [n for n, t in state.items() if t.dim() == 2]
    asked = [(name, batch) for name in sparse for batch in (2, 3)]
    assert [(row["name"], row["batch"]) for row in found["rows"]] == asked
    for row in found["rows"]:
        weight = state[row["name"]]
        assert row["sparsity"] == pytest.approx(1 - int(weight.count_nonzero()) / weight.numel())
        assert min(row["speedup"], row["dense_seconds"], row["sparse_seconds"]) > 0
    assert found["threads"] == 1
    assert main(["bench", file, "--batch", "2"]) == 0
    out = capfd.readouterr().out
    assert max(map(cell_len, out.splitlines())) <= 80
    assert "96 × 64" in out


def test_bench_times_a_network(home, capfd):
    Path("tinynet.py").write_text(
        "from prunus.bench import mlp\ndef net(): return mlp(hidden=(96, 48))\n"
    )
    file = "out/tiny-seed0.safetensors"
    network = ["--model", "tinynet:net", "--input", "1,8,8"]
    assert main(["bench", file, *network, "--batch", "4", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [(r["name"], r["batch"]) for r in rows] == [("tinynet:net", 4)]
    assert rows[0]["shape"] == "11,386 parameters"
    for wrong, words in (
        (["--model", "tinynet:net"], "--model and --input go together"),
        (["--model", "tinynet:net", "--input", "5"], "does not run on --input [5]: Value"),
        (["--model", "prunus.bench:mlp", "--input", "1,8,8"], "does not fit the model"),
        (["--model", "prunus.bench:MLP", "--input", "64"], "needs the argument 'inputs'"),
    ):
        assert main(["bench", file, *wrong]) == 1
        assert words in capfd.readouterr().err


def test_bench_of_a_dense_network_says_that_there_is_nothing_sparse(home, capfd):
    pr.save(mlp(hidden=(8,)), "dense.safetensors")
    assert main(["bench", "dense.safetensors"]) == 1
    assert "holds no sparse weight" in capfd.readouterr().err


def test_methods_lists_every_public_slot_with_a_line(capfd):
    assert main(["methods", "--json"]) == 0
    listing = json.loads(capfd.readouterr().out)
    assert set(listing) == set(commands.SLOTS)
    assert all(line for names in listing.values() for line in names.values())
    assert {"gradual_magnitude", "rigl", "lottery_ticket"} <= set(listing["methods"])
    assert "Ticket" not in listing["methods"]
    assert main(["methods"]) == 0
    out = capfd.readouterr().out
    assert all(name in out for names in listing.values() for name in names)


@pytest.mark.parametrize("arguments", [["methods"], ["methods", "--json"]])
def test_a_reader_that_leaves_early_is_no_error(arguments):
    command = f"{sys.executable} -m prunus {' '.join(arguments)} | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    assert done.stderr == ""


def test_a_terminal_without_unicode_gets_question_marks_and_no_error(home):
    done = subprocess.run(
        [*PRUNUS, "inspect", "out/tiny-seed0.safetensors"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "80"},
        check=True,
    )
    assert b"96 ? 64" in done.stdout
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: command"),
        (["demo", "--seeds", "0"], "'0' is not a whole number from 1"),
        (["demo", "--seeds", "x"], "'x' is not a whole number from 1"),
        (["bench", "f", "--batch", "1,,2"], "'' is not a whole number from 1"),
        (["bench", "f", "--threads", "-1"], "'-1' is not a whole number from 1"),
        (["grow"], "invalid choice: 'grow'"),
    ],
)
def test_wrong_arguments_are_refused_by_the_parser(arguments, words, capfd):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in capfd.readouterr().err
