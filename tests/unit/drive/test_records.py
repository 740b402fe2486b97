"""Records of procedures: what goes in comes out, and nothing is half written."""

from __future__ import annotations

import pytest
import torch

from prunus.drive.records import read_record, write_record
from prunus.errors import FormatError, ValueRangeError


def test_records_hold_what_they_were_given(tmp_path):
    value = {
        "a": [1, 2.5, None, True, "x"],
        3: (torch.arange(6).reshape(2, 3).t(), torch.tensor(1.5)),
        "empty": {},
        "inf": float("inf"),
        "bits": torch.tensor([True, False]),
    }
    write_record(tmp_path / "r.safetensors", value)
    found = read_record(tmp_path / "r.safetensors")
    assert list(found) == list(value)
    assert found["a"] == value["a"]
    assert isinstance(found[3], tuple)
    assert torch.equal(found[3][0], value[3][0])
    assert torch.equal(found["bits"], value["bits"])
    assert found["inf"] == float("inf")
    with pytest.raises(ValueRangeError, match=r"record\.z\[1\] is a set"):
        write_record(tmp_path / "r.safetensors", {"z": [1, {2}]})
    assert read_record(tmp_path / "r.safetensors")["a"] == value["a"], "the old record is whole"
    (tmp_path / "r.safetensors").write_bytes(b"nothing")
    with pytest.raises(FormatError, match="damaged"):
        read_record(tmp_path / "r.safetensors")
    assert list(tmp_path.glob(".*")) == []
