from __future__ import annotations

import pytest
import torch
from torch import nn

from prunus.errors import ShapeError
from prunus.metrics import counts, counts_of_tensors, dense_bytes, file_bytes


class Packed(nn.Module):
    """Stands in for a runtime module: weight in a byte buffer, bias a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(8))
        self.register_buffer("packed", torch.zeros(13, dtype=torch.uint8))

    def sparse_counts(self) -> dict[str, tuple[tuple[int, ...], int]]:
        return {"weight": ((8, 16), 12)}


def test_counts_nonzeros_per_site_and_in_total():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with torch.no_grad():
        model[0].weight.fill_(1.0)[:, 1:] = 0.0
        model[0].bias.fill_(2.0)
    result = counts(model)
    assert result.sites["0.weight"] == ((3, 4), 12, 3)
    assert result.sites["0.weight"].sparsity == 0.75
    assert (result.parameters, result.nonzeros) == (12 + 3 + 6, 3 + 3 + 3)  # batch norm bias is 0
    assert result.sparsity == 1 - 9 / 21


def test_tied_parameters_count_once_also_in_a_state_dict():
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    model[1].weight = model[0].weight
    assert counts(model).parameters == 25
    assert list(counts(model).sites) == ["0.weight"]
    assert counts_of_tensors(model.state_dict()).parameters == 25
    assert dense_bytes(model) == 100


def test_slices_of_one_memory_are_different_tensors():
    memory = torch.ones(10)
    result = counts_of_tensors({"a": memory[:5], "b": memory[5:], "n": torch.tensor(3)})
    assert result.parameters == 10
    assert "n" not in result.sites


def test_reported_sparse_weights_count_as_parameters():
    result = counts(nn.Sequential(Packed(), nn.Linear(8, 2, bias=False)))
    assert result.sites["0.weight"] == ((8, 16), 128, 12)
    assert result.parameters == 128 + 8 + 16


def test_lazy_and_meta_parameters_are_refused_by_name():
    with pytest.raises(ShapeError, match=r"0\.weight.*forward pass"):
        counts(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ShapeError, match="meta"):
        counts(nn.Linear(2, 2, device="meta"))


def test_empty_model_has_sparsity_zero():
    assert counts(nn.ReLU()).sparsity == 0.0


def test_file_bytes_of_files_and_folders(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 7)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"x" * 5)
    assert file_bytes(tmp_path / "a") == 7
    assert file_bytes(tmp_path) == 12


def test_dense_bytes_counts_buffers_and_types():
    model = nn.BatchNorm1d(4).half()  # 4 vectors of 4 halves and one int64
    assert dense_bytes(model) == 4 * 4 * 2 + 8
