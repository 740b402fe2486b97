"""Recipes: what is read, and that every mistake names file, line and remedy."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from torch import nn

from prunus.bench import Dataset
from prunus.cli import recipe
from prunus.cli.experiment import Training
from prunus.cli.recipe import load_recipe
from prunus.errors import RecipeError

CODE = """
import numpy as np
import torch
from torch import nn

def network(width=8):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))

def normed():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

def points(n=40, seed=None):
    x = np.random.default_rng(seed).normal(size=(2 * n, 5)).astype("float32")
    y = x[:, :3].argmax(1)
    return x[:n], y[:n], x[n:], y[n:]

def changed(part, to):
    parts = list(points(seed=0))
    parts[part] = to(parts[part])
    return parts

def nan():
    parts = points(seed=0)
    parts[2][7, 1] = np.nan
    return parts

def short(): return changed(1, lambda y: y[:-1])
def no_test(): return [p[: (40, 40, 0, 0)[i]] for i, p in enumerate(points(seed=0))]
def float_targets(): return changed(3, lambda y: y.astype("float32"))
def negative(): return changed(1, lambda y: y - 1)
def one_hot(): return changed(1, lambda y: np.eye(3)[y])
def doubles(): return changed(0, lambda x: x.astype("float64"))
def many(): return changed(3, lambda y: y + 2)
def three(): return points(seed=0)[:3]
def raises(): return {}["width"]
def number(): return 3
def nothing_to_train(): return nn.ReLU()
def other_inputs(): return nn.Linear(6, 3)
def two_outputs(): return nn.Linear(5, 2)
def flat(): return nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))
def poisoned():
    model = network()
    model[0].weight.data.fill_(float("inf"))
    return model
def needs(width): return network(width)
value = 5
"""
OK = {"model": "rcode:network", "data": "rcode:points", "method": "{name: snip, sparsity: 0.5}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "rcode.py").write_text(CODE)
    (folder / "rsyntax.py").write_text("def x(:")
    (folder / "rinner.py").write_text("import there_is_no_such_module_either\n")
    return folder


@pytest.fixture(autouse=True)
def _at_home(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(folder)


def _text(**changes):
    return "".join(f"{k}: {v}\n" for k, v in {**OK, **changes}.items() if v is not None)


def _load(folder, text):
    (folder / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe("r.yaml")


def _refused(folder, text):
    with pytest.raises(RecipeError) as caught:
        _load(folder, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


METHOD = "\n  name: gradual_magnitude\n  sparsity: 0.9\n  "
KEYS = "allowed: name, model, data, method, sites, training, seeds, sweep, outputs"

WRONG = [
    # text of a key, its line, words of the message
    ({"epoch": 3}, 4, f"unknown key 'epoch'; {KEYS}"),
    ({"training": "{epochs: 1.5}"}, 4, "epochs is 1.5; allowed: whole numbers from 1"),
    ({"training": "{epochs: true}"}, 4, "epochs is True; allowed: whole numbers from 1"),
    ({"training": "\n  epochs: 2\n  batch_size: 0"}, 6, "batch_size is 0"),
    ({"training": "{lr: fast}"}, 4, "lr is 'fast'; allowed: numbers above 0"),
    ({"training": "{lr: '1e-3'}"}, 4, "lr is '1e-3'"),
    ({"training": "{lr: 0}"}, 4, "lr is 0"),
    ({"training": "{lr: .inf}"}, 4, "lr is inf"),
    ({"training": "{weight_decay: -1}"}, 4, "weight_decay is -1; allowed: numbers from 0"),
    ({"training": "{label_smoothing: 1}"}, 4, "numbers from 0 to below 1"),
    ({"training": "{optimizer: [sgd]}"}, 4, "allowed: adam, adamw, sgd"),
    ({"training": "{schedule: steps}"}, 4, "allowed: cosine, linear, constant"),
    ({"training": "{start: pruned}"}, 4, "allowed: trained, initial"),
    ({"training": "{momentum: 0.9}"}, 4, "unknown key 'momentum'; allowed: epochs, batch_size"),
    ({"training": "[]"}, 4, "training is []; allowed: a mapping with the keys epochs"),
    ({"method": "gradual"}, 3, "unknown method 'gradual'; allowed: "),
    ({"method": "[snip]"}, 3, "unknown method ['snip']"),
    ({"method": "lottery_ticket"}, 3, "unknown method 'lottery_ticket'"),
    ({"method": "snip"}, 3, "snip needs 'sparsity'; allowed: sparsity, structure, allocation"),
    ({"method": "{sparsity: 0.5}"}, 3, "unknown method None"),
    ({"method": METHOD + "speed: 3"}, 6, "no argument 'speed'; allowed: sparsity, steps, begin"),
    ({"method": METHOD + "every: true"}, 6, "every is True; allowed: a whole number"),
    ({"method": METHOD + "every: 0"}, 6, "every >= 1"),
    ({"method": METHOD + "end: 5000"}, None, "ramp ends at step 5000, but training stops after 20"),
    ({"method": METHOD + "steps: 500"}, 3, "acts last at optimizer step 375, but the training has"),
    (
        {"method": METHOD + "structure: blok"},
        6,
        "unknown structure 'blok'; allowed: block, channel",
    ),
    ({"method": METHOD + "structure: {block: 4}"}, 6, "called as block(height, width)"),
    ({"method": METHOD + "structure: {block: [7, 5]}"}, 3, "'0.weight': block(7, 5): shape (8, 5)"),
    ({"method": METHOD + "structure: {n_of_m: [2, 4]}"}, None, "pins its own sparsity of 0.5"),
    ({"method": METHOD + "allocation: {floor: 5}"}, 6, "unknown allocation 5; allowed: "),
    ({"method": METHOD + "allocation: {floor: [er, many]}"}, 6, "allocation floor: "),
    ({"method": METHOD + "allocation: {floor: [er, 99]}"}, 3, "cannot be met: floor holds"),
    ({"method": METHOD + "allocation: {overrides: [erk, {x: 0.5}]}"}, 3, "override 'x' matches no"),
    ({"method": "{name: snip, sparsity: 1.2}"}, 3, "lies between 0 and 1, got 1.2"),
    ({"method": "\n  name: snip\n  sparsity: 95"}, 5, "got 95; did you mean 0.95?"),
    ({"method": "{name: snip, sparsity: '0.9'}"}, 3, "sparsity is '0.9'; allowed: a number"),
    ({"method": "{name: snip, sparsity: 90%}"}, 3, "sparsity is '90%'; allowed: a number"),
    ({"method": "{name: snip, sparsity: ~}"}, 3, "sparsity is None; allowed: a number"),
    ({"model": None}, 1, "'model' is missing"),
    ({"model": "~"}, 1, "'model' is missing"),
    ({"model": "rcode.network"}, 1, "not of the form package.module:function"),
    ({"model": "{width: 3}"}, 1, "allowed: module:function, {call: module:function, ...}"),
    ({"model": "rcode:networ"}, 1, "rcode.py) is not there"),
    ({"model": "rcode:value"}, 1, "is int, not a function"),
    ({"model": "rcod:network"}, 1, "there is no module 'rcod' in"),
    ({"model": "rsyntax:x"}, 1, "importing 'rsyntax': SyntaxError"),
    ({"model": "rinner:x"}, 1, "No module named 'there_is_no_such_module_either' ("),
    ({"model": "rcode:raises"}, 1, "rcode:raises: KeyError: 'width' ("),
    ({"model": "rcode:number"}, 1, "returned int; return a torch.nn.Module"),
    ({"model": "rcode:nothing_to_train"}, 1, "has no parameter to train"),
    ({"model": "rcode:other_inputs"}, 1, "does not run on inputs [2, 5] of torch.float32"),
    ({"model": "rcode:two_outputs"}, 1, "has 2 logits, but the targets reach class 2; give it 3"),
    ({"model": "rcode:flat"}, 1, "makes [2] of inputs [2, 5]; expected a tensor of logits"),
    ({"model": "rcode:poisoned"}, 1, "not finite"),
    ({"model": "rcode:needs"}, 1, "needs the argument 'width'; write {call: rcode:needs, width"),
    ({"model": "\n  call: rcode:network\n  wdth: 3"}, 3, "no argument 'wdth'; allowed: width"),
    ({"data": "mnist"}, 2, "unknown data 'mnist'; allowed: digits, fashion-mnist, module:function"),
    ({"data": "{call: digits, n: 3}"}, 2, "unknown key 'n'; allowed: none"),
    ({"data": "rcode:nan"}, 2, "test_inputs[7] holds NaN or infinity"),
    ({"data": "rcode:short"}, 2, "hold 40 examples"),
    ({"data": "rcode:no_test"}, 2, "test_inputs hold 0 examples"),
    ({"data": "rcode:float_targets"}, 2, "test_targets are torch.float32; expected class numbers"),
    ({"data": "rcode:negative"}, 2, "expected class numbers 0, 1, 2"),
    ({"data": "rcode:one_hot"}, 2, "train_targets [40, 3]; expected [n, ...] and [n]"),
    ({"data": "rcode:doubles"}, 1, "of torch.float64: RuntimeError"),
    ({"data": "rcode:many"}, 1, "has 3 logits, but the targets reach class 4; give it 5"),
    ({"data": "rcode:three"}, 2, "return the four tensors (train_inputs, train_targets"),
    ({"sites": "{include: nowhere}"}, 4, "'nowhere' matches no prunable weight; there are: 0.we"),
    ({"sites": "\n  exclude: ['0', 5]"}, 5, "allowed: a name or pattern, or a list of them"),
    ({"sites": "{includes: a}"}, 4, "unknown key 'includes'; allowed: include, exclude"),
    ({"seeds": 0}, 4, "seeds is 0; allowed: how many, from 1, or a list"),
    ({"seeds": "true"}, 4, "seeds is True"),
    ({"seeds": "[0, -1]"}, 4, "seeds is [0, -1]"),
    ({"seeds": "[1, 1]"}, 4, "seeds is [1, 1]"),
    ({"seeds": "!!int abc"}, 4, "not a value"),
    ({"sweep": "[0.5, 95]"}, 4, "allowed: a list of sparsities above 0 and below 1"),
    ({"sweep": 0.5}, 4, "sweep is 0.5"),
    ({"name": "a/b"}, 4, "name is 'a/b'; allowed: a text of letters"),
    ({"outputs": "{folder: 5}"}, 4, "folder is 5; allowed: a path"),
    ({"outputs": "{file: x}"}, 4, "unknown key 'file'; allowed: folder"),
    ({"model": "rcode:normed", "training": "{batch_size: 39}"}, 4, "batch norm cannot train"),
]


@pytest.mark.parametrize(("changes", "line", "words"), WRONG)
def test_a_mistake_names_its_line_and_what_is_allowed(folder, changes, line, words):
    message = _refused(folder, _text(**changes))
    assert words in message
    assert message.startswith(f"r.yaml:{line}: " if line else "r.yaml:")
    assert message.count("r.yaml:") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "r.yaml:1: the file is empty; a recipe is a mapping with the keys name"),
        ("# a comment\n", "r.yaml:1: the file is empty"),
        ("- a\n", "r.yaml:1: a recipe is a mapping"),
        ("model: [a\n", "r.yaml:2: not valid YAML"),
        ("model:\n\tx: 1\n", "r.yaml:2: not valid YAML: found character '\\t' that cannot start"),
        ("model:\n\tx: 1\n", "indent with spaces"),
        (
            _text() + "model: x\n",
            "r.yaml:4: 'model' is given a second time; the first is in line 1",
        ),
        ("model: !!python/object:os.system x\n", "r.yaml:1: not valid YAML: could not determine"),
        ("model: &a [*a]\n", "nested without end"),
        (_text() + "---\na: 1\n", "r.yaml:4: not valid YAML"),
        (_text() + "<<: {a: 1}\n", "r.yaml:4: unknown key '<<'"),
        ("model: \x00\n", "not valid YAML: special characters"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
    ],
)
def test_what_is_no_recipe_is_refused(folder, text, words):
    assert words in _refused(folder, text)


def test_an_absent_recipe_and_a_folder_are_refused(folder):
    with pytest.raises(RecipeError, match=r"cannot read the recipe none.yaml: No such file"):
        load_recipe("none.yaml")
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*: Is a directory"):
        load_recipe(folder)


def test_everything_is_read(folder):
    job = _load(
        folder,
        """
name: my own
model: {call: rcode:network, width: 12}
data: rcode:points
method:
  name: rigl
  sparsity: 0.8
  every: 2
  structure: {channel: {axis: 1}}
  allocation: {overrides: {base: {floor: [er, 1]}, sparsities: {"2": 0.7}}}
sites: {include: ["0.weight", "2"], exclude: []}
training: {epochs: 3, batch_size: 8, optimizer: sgd, lr: 1e-3, weight_decay: 1.5e2,
           schedule: linear, label_smoothing: 0.1}
seeds: [4, 2]
sweep: [0.7]
outputs: {folder: a/b}
""",
    )
    assert job.training == Training(3, 8, "sgd", 1e-3, 150.0, "linear", 0.1)
    assert (job.name, str(job.folder), tuple(job.seeds)) == ("my own", "a/b", (4, 2))
    assert (job.include, job.exclude, job.sweep) == (("0.weight", "2"), (), (0.7,))
    assert job.trained is False  # RigL starts from initialisation
    assert job.model(0)[0].out_features == 12
    assert job.method(None, 100).target == 0.8
    assert job.method(0.25, 100).target == 0.25
    assert job.method(None, 100).last == 74


def test_defaults_are_those_of_the_library(folder):
    job = _load(folder, _text(method="{name: gradual_magnitude, sparsity: 0.5}", training="~"))
    assert job.training == Training()
    assert (job.name, str(job.folder), tuple(job.seeds)) == ("r", "prunus-r", (0,))
    assert job.trained is True
    assert _load(folder, _text(training="{start: trained}")).trained is True
    assert _load(folder, _text(seeds=3)).seeds == range(3)
    assert _load(folder, _text(sites="{exclude: '0'}")).exclude == ("0",)


def test_training_keys_are_the_fields_of_training_and_start():
    assert set(recipe.TRAINING) == {f.name for f in dataclasses.fields(Training)} | {"start"}


def test_models_and_data_follow_the_seed_and_leave_torch_alone(folder):
    job = _load(folder, _text())
    torch.manual_seed(11)
    before = torch.get_rng_state()
    a, b, other = job.model(1), job.model(1), job.model(2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a[0].weight, b[0].weight)
    assert not torch.equal(a[0].weight, other[0].weight)
    data = job.data(1)
    assert isinstance(data, Dataset)
    assert data.classes == 3
    assert data.train_targets.dtype == torch.int64
    assert job.data(1) is data
    assert not torch.equal(job.data(2).train_inputs, data.train_inputs)


def test_a_given_seed_argument_wins(folder):
    job = _load(folder, _text(data="{call: rcode:points, seed: 9, n: 20}"))
    assert torch.equal(job.data(0).train_inputs, job.data(1).train_inputs)
    assert len(job.data(0).train_inputs) == 20


def test_modules_beside_the_recipe_are_found(folder, tmp_path, monkeypatch):
    (tmp_path / "rbeside.py").write_text(CODE)
    (tmp_path / "r.yaml").write_text(_text(model="rbeside:network", data="rbeside:points"))
    monkeypatch.chdir("/")
    assert isinstance(load_recipe(tmp_path / "r.yaml").model(0), nn.Module)


def test_the_recipes_of_this_repository_are_valid(pytestconfig, monkeypatch):
    root = pytestconfig.rootpath
    job = load_recipe(root / "tests" / "integration" / "recipe_digits.yaml")
    assert job.data(0).name == "digits"
    # Fashion-MNIST may not be installed: its shape is enough to try the recipe.
    data = Dataset(*[torch.zeros(300, 1, 28, 28), torch.arange(300) % 10] * 2, 10, "fashion")  # pyright: ignore
    monkeypatch.setitem(recipe.DATA, "fashion-mnist", lambda seed: data)
    job = load_recipe(root / "examples" / "recipe_fashion.yaml")
    assert sum(p.numel() for p in job.model(0).parameters()) == 266_610
