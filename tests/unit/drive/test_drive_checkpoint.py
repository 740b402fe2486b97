"""The state in `optimizer.state_dict()`: what comes back, and what is refused."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import prunus as pr
from prunus.core import Site, State
from prunus.drive.checkpoint import KEY, VERSION, from_blob, to_blob
from prunus.errors import AttachError

SITES = (Site("a", (3, 5)), Site("b", (4, 4)))


def state():
    generator = torch.Generator().manual_seed(0)
    masks = {s.name: torch.rand(s.shape, generator=generator) < 0.5 for s in SITES}
    child = State(seed=5, step=7, round=1, masks={"a": masks["a"]}, sparsity={"a": 0.5})
    return State(
        seed=3,
        step=11,
        round=2,
        masks=masks,
        sparsity={"a": 0.25, "b": 0.75},
        statistics={"momentum": {"b": torch.randn(4, 4, generator=generator)}},
        children=(child, State()),
        trained={"b": ~masks["b"]},
    )


def same(a, b):
    assert (a.seed, a.step, a.round, a.sparsity) == (b.seed, b.step, b.round, b.sparsity)
    assert a.masks.keys() == b.masks.keys()
    assert all(torch.equal(a.masks[n], b.masks[n]) for n in a.masks)
    assert a.trained.keys() == b.trained.keys()
    assert all(torch.equal(a.trained[n], b.trained[n]) for n in a.trained)
    assert a.statistics.keys() == b.statistics.keys()
    for kind, values in a.statistics.items():
        assert all(torch.equal(values[n], b.statistics[kind][n]) for n in values)
    assert len(a.children) == len(b.children)
    for one, other in zip(a.children, b.children, strict=True):
        same(one, other)


def test_all_of_a_state_comes_back_from_a_file_of_plain_values():
    file = io.BytesIO()
    torch.save(to_blob(state()), file)
    file.seek(0)
    same(state(), from_blob(torch.load(file, weights_only=True), SITES))


def test_a_blob_does_not_change_with_the_state_it_came_from():
    living = state()
    blob = to_blob(living)
    living.statistics["momentum"]["b"].zero_()
    living.masks["a"].logical_not_()
    same(state(), from_blob(blob, SITES))


@pytest.mark.parametrize("version", [0, VERSION + 1, None, "1"])
def test_other_versions_are_refused(version):
    with pytest.raises(AttachError, match=f"version {version!r}.*reads version {VERSION}"):
        from_blob({**to_blob(state()), "version": version}, SITES)


def test_a_mask_of_another_size_is_refused_by_name():
    with pytest.raises(AttachError, match=r"mask of 'b'.*2 bytes.*\(40, 4\).*20.*another model"):
        from_blob(to_blob(state()), (SITES[0], Site("b", (40, 4))))


@pytest.mark.parametrize("key", ["masks", "step", "seed", "statistics", "children", "sparsity"])
def test_a_damaged_state_is_refused(key):
    for damage in ("missing", None, 1.5j):
        blob = to_blob(state())
        blob.pop(key) if damage == "missing" else blob.update({key: damage})
        with pytest.raises(AttachError, match="damaged"):
            from_blob(blob, SITES)
    with pytest.raises(AttachError, match="version None"):
        from_blob([], SITES)  # pyright: ignore[reportArgumentType]


def begin(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    opt = torch.optim.SGD(model.parameters(), 0.1)
    return opt, pr.attach(method, model, opt)


def test_a_combination_takes_no_state_of_a_plain_method_nor_the_other_way_round():
    plain = pr.methods.one_shot_magnitude(0.5)
    both = pr.combine.then(plain, 3, pr.methods.one_shot_magnitude(0.75))
    for made_with, loaded_with in ((plain, both), (both, plain)):
        (source, _), (opt, attached) = begin(made_with), begin(loaded_with)
        saved = copy.deepcopy(source.state_dict())
        with pytest.raises(AttachError, match="another method or combination of methods"):
            opt.load_state_dict(saved)
        assert attached.sparsity == 0.5


def test_the_state_is_in_what_is_saved_and_not_in_the_living_groups():
    opt, attached = begin(pr.methods.one_shot_magnitude(0.5))
    assert KEY not in opt.param_groups[0]
    saved = opt.state_dict()
    assert saved["param_groups"][0][KEY]["step"] == 0
    opt.load_state_dict(saved)
    assert KEY not in opt.param_groups[0]
    attached.detach()
    assert KEY not in opt.state_dict()["param_groups"][0]


def test_a_checkpoint_of_another_method_is_refused_and_other_arguments_are_not():
    (source, _), (opt, attached) = (
        begin(pr.methods.one_shot_magnitude(0.5)),
        begin(pr.methods.random_pruning(0.75)),
    )
    saved = copy.deepcopy(source.state_dict())
    with pytest.raises(AttachError, match=r"made with .*one_shot_magnitude.*than random_pruning"):
        opt.load_state_dict(saved)
    assert attached.sparsity == 0.75
    other, attached = begin(pr.methods.one_shot_magnitude(0.9))
    other.load_state_dict(copy.deepcopy(saved))
    assert attached.sparsity == 0.5
    del saved["param_groups"][0][KEY]["method"]  # as written before methods were named
    opt.load_state_dict(saved)
