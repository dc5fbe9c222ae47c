"""A file gives back what was written, says where it came from, and is refused where it is something else."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_steering import directions, llama

from lit_reason.errors import UserError
from lit_reason.steering.direction_file import (
    check_gguf,
    check_model,
    export_gguf,
    model_facts,
    read_directions,
    save_directions,
)
from lit_reason.steering.probe import Probe


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.mark.parametrize("pieces", [None, 2])
def test_there_and_back(model, tmp_path, pieces):
    from dataclasses import replace

    probe = Probe(torch.randn(2, 32), torch.randn(2))
    there = replace(directions(model, pieces=pieces, method="confident", first=1), probe=probe)
    save_directions(there, tmp_path / "new/d.safetensors")
    back = read_directions(tmp_path / "new/d.safetensors")
    assert list(back.vectors) == back.names == ["a", "b"]
    assert all(torch.equal(back.vectors[n], there.vectors[n]) for n in "ab")
    assert torch.equal(back.probe.weight_KF, probe.weight_KF) and torch.equal(back.probe.bias_K, probe.bias_K)
    assert (back.layer, back.residual_norm) == (there.layer, there.residual_norm)
    assert {k: back.facts[k] for k in there.facts} == there.facts
    assert back.facts["hook_point"] == "block_output" and back.facts["layer_index_base"] == 0
    check_model(back, model_facts(model))


def test_what_is_no_file_of_directions_is_refused(model, tmp_path):
    save_directions(directions(model), tmp_path / "good.safetensors")
    with pytest.raises(UserError, match=r"god.safetensors does not exist \(did you mean 'good.safetensors'\?\)"):
        read_directions(tmp_path / "god.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(UserError, match="cannot read .*broken"):
        read_directions(tmp_path / "broken.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds no directions at block_output; it has w"):
        read_directions(tmp_path / "model.safetensors")
    meta = {"hook_point": json.dumps("block_output"), "format_version": "99"}
    save_file({"direction.a.layer_0": torch.ones(2)}, tmp_path / "later.safetensors", metadata=meta)
    with pytest.raises(UserError, match="has format 99, this version reads 1"):
        read_directions(tmp_path / "later.safetensors")


def test_control_vectors(model, tmp_path):
    gguf = pytest.importorskip("gguf")
    there = directions(model, layer=2)
    files = export_gguf(there, tmp_path)
    assert [f.name for f in files] == ["a.gguf", "b.gguf"]
    reader = gguf.GGUFReader(files[0])
    (tensor,) = reader.tensors
    wanted = there.vectors["a"] * there.residual_norm / there.vectors["a"].norm()
    assert tensor.name == "direction.2" and tensor.data.dtype == np.float32
    np.testing.assert_allclose(tensor.data, wanted.numpy(), rtol=1e-6)
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["general.architecture"].contents() == "controlvector"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": 0}, "cannot be at layer 0"),
        ({"layer": 1, "pieces": 2}, "has one token, and these directions cover several"),
    ],
)
def test_what_a_control_vector_cannot_say(model, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        export_gguf(directions(model, **fields), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sci/tech", "/tmp"])
def test_a_label_that_cannot_name_a_control_vector_is_refused(name):
    with pytest.raises(UserError, match="cannot name a file"):
        check_gguf([1], ["good", name])
