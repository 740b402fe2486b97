from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus import sites
from prunus.core import Site
from prunus.errors import PrunusError, SiteError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.norm = nn.LayerNorm(6)
        self.encoder = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(6, 9)


def compiled(model):
    return torch.compile(model, backend="eager")


def names(found):
    return [site.name for site in found]


def test_weights_of_products_are_found_in_order_and_nothing_else():
    found = sites.find(Net())
    assert names(found) == ["encoder.0.weight", "encoder.1.weight", "conv.weight", "head.weight"]
    assert [site.shape for site in found] == [(6, 6), (6, 6), (4, 3, 3, 3), (9, 6)]
    assert found[2].size == 108
    assert found[0] == Site("encoder.0.weight", (6, 6))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("encoder", None, ["encoder.0.weight", "encoder.1.weight"]),
        ("encoder.1", None, ["encoder.1.weight"]),
        ("*.1.weight", None, ["encoder.1.weight"]),
        (["head", "conv.*"], None, ["conv.weight", "head.weight"]),
        (None, "head.weight", ["encoder.0.weight", "encoder.1.weight", "conv.weight"]),
        (None, ["encoder", "conv"], ["head.weight"]),
        ("encoder", "encoder.0", ["encoder.1.weight"]),
        ("embed", None, ["embed.weight"]),
        (("*[01].weight",), (), ["encoder.0.weight", "encoder.1.weight"]),
    ],
)
def test_patterns_are_names_prefixes_and_wildcards(include, exclude, expected):
    assert names(sites.find(Net(), include, exclude)) == expected


@pytest.mark.parametrize(
    ("include", "exclude", "culprit"),
    [
        ("enc", None, "enc"),
        (None, "norm", "norm"),
        (["encoder", "decoder"], None, "decoder"),
        ("head.bias", None, "head.bias"),
        ("ENCODER", None, "ENCODER"),
    ],
)
def test_a_pattern_without_a_match_is_an_error_that_lists_what_there_is(include, exclude, culprit):
    with pytest.raises(SiteError, match=rf"pattern '{culprit}'.*conv\.weight"):
        sites.find(Net(), include, exclude)


def test_nothing_left_is_an_error():
    with pytest.raises(SiteError, match="no prunable weight left"):
        sites.find(nn.Sequential(nn.Linear(2, 2)), exclude="*")
    with pytest.raises(SiteError, match="LayerNorm has no prunable weight"):
        sites.find(nn.LayerNorm(3))
    assert issubclass(SiteError, PrunusError)


def test_tied_weights_are_one_site_with_all_their_names():
    model = Net()
    model.head.weight = model.embed.weight
    model.encoder[1] = model.encoder[0]
    found = {site.name: site for site in sites.find(model)}
    assert found["embed.weight"].aliases == ("head.weight",)
    assert found["encoder.0.weight"].aliases == ("encoder.1.weight",)
    assert len(found) == 3
    assert names(sites.find(model, exclude="head")) == ["encoder.0.weight", "conv.weight"]
    assert names(sites.find(model, include="head")) == ["embed.weight"]


class DistributedDataParallel(nn.Module):
    """Named and shaped like the wrapper of torch."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class DataParallel(DistributedDataParallel):
    pass


def test_names_are_the_users_own_below_every_wrapper():
    plain = sites.find(Net())
    assert sites.find(DistributedDataParallel(Net())) == plain
    assert sites.find(torch.nn.DataParallel(Net())) == plain
    assert sites.find(compiled(Net())) == plain
    wrapped = compiled(DistributedDataParallel(compiled(Net())))
    assert sites.find(wrapped) == plain
    model = Net()
    assert sites.unwrap(compiled(DataParallel(model))) is model


def test_a_module_of_the_user_that_is_called_module_is_not_unwrapped():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert names(sites.find(Holder())) == ["module.weight"]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.MultiheadAttention(4, 2), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (nn.LSTM(3, 4, num_layers=2, proj_size=2), [
            "weight_ih_l0", "weight_hh_l0", "weight_hr_l0",
            "weight_ih_l1", "weight_hh_l1", "weight_hr_l1",
        ]),
        (nn.GRUCell(3, 4), ["weight_ih", "weight_hh"]),
        (nn.Bilinear(2, 3, 4), ["weight"]),
        (nn.ConvTranspose1d(2, 3, 3), ["weight"]),
        (nn.Conv3d(2, 3, 3), ["weight"]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_recurrent_attention_and_convolution_weights(module, expected):
    assert names(sites.find(module)) == expected


def test_the_transposed_linear_of_transformers_is_found_by_its_name():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 5))
            self.bias = nn.Parameter(torch.ones(5))

    assert names(sites.find(nn.Sequential(Conv1D()))) == ["0.weight"]


def test_lazy_modules_are_refused_until_they_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(SiteError, match=r"'0\.weight' has no shape yet: run the model once"):
        sites.find(model)
    model(torch.ones(1, 4))
    assert names(sites.find(model)) == ["0.weight", "1.weight"]


def test_parametrized_weights_are_no_sites():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match=r"^0\.weight cannot be pruned"):
        assert names(sites.find(model)) == ["1.weight"]


def test_parameters_are_live_and_weights_share_their_memory():
    model = Net()
    found = sites.find(compiled(model), include="head")
    live = sites.parameters(model, found)
    assert live["head.weight"] is model.head.weight
    seen = sites.weights(live)["head.weight"]
    assert not seen.requires_grad
    assert seen.data_ptr() == model.head.weight.data_ptr()


def test_with_unit_leaves_the_site_as_it_is():
    site = Site("a", (4, 4), ("b",))
    assert sites.with_unit(site, 4) == Site("a", (4, 4), ("b",), unit=4)
    assert site.unit == 1


def test_evaluating_brings_back_the_mode_of_every_module():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)), nn.Linear(2, 2))
    model[1].eval()
    before = [module.training for module in model.modules()]

    def interrupted():
        with sites.evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [module.training for module in model.modules()] == before
