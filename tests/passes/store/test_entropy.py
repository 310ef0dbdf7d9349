"""Codes in files as streams: the same bits back, smaller files, damage told, all else as it was."""

from __future__ import annotations

import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.entropy.stream import FACT

Entropy = gw.passes.store.Entropy

CHAIN = ("text", [("quantize.rtn", {"block": 16}), ("store.entropy", {"smallest": 64})])


class Net(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@cache
def coarse() -> gw.Program:
    """int8 whose rows have unlike spread, as with one scale for a whole weight."""
    torch.manual_seed(0)
    program = gw.trace(Net().eval(), (torch.randn(4, 64),), {"x": {0: "batch"}})
    made = gw.passes.quantize.Int8()(program)
    state = dict(made.state)
    for name, tensor in state.items():
        if tensor.dtype == torch.int8:
            spread = 12 * torch.exp(torch.randn(len(tensor), 1)).clamp(max=2)
            state[name] = (spread * torch.randn(tensor.shape)).round().clamp(-63, 63).to(torch.int8)
    return made.replace(state=state)


def streams(path: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(path).namelist() if "/circuit_" in name]


def test_the_file_is_smaller_and_the_bits_are_the_same(tmp_path: Path) -> None:
    program = coarse()
    result = Entropy().execute(program, Context())
    made = result.program
    program.save(tmp_path / "plain.pt2")
    made.save(tmp_path / "coded.pt2")
    sizes = [(tmp_path / name).stat().st_size for name in ("plain.pt2", "coded.pt2")]
    saved = result.metrics["bytes_before"] - result.metrics["bytes_after"]
    assert result.metrics["bytes_before"] == 2 * 64 * 256
    assert abs((sizes[0] - sizes[1]) - saved) < 1024  # the record, and alignment of members
    assert saved > 0.2 * 2 * 64 * 256
    assert result.metrics["bytes_after"] < 1.05 * result.metrics["bytes_order_0"]
    assert len(streams(tmp_path / "coded.pt2")) == 2
    loaded = gw.load(tmp_path / "coded.pt2")
    assert list(loaded.state) == list(made.state)
    for name, tensor in made.state.items():
        assert torch.equal(loaded.state[name], tensor)
        assert loaded.state[name].dtype == tensor.dtype
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), program(x))
    loaded.save(tmp_path / "again.pt2")  # the record is kept, so that the file is
    assert (tmp_path / "again.pt2").read_bytes() == (tmp_path / "coded.pt2").read_bytes()


def test_artifacts_are_what_they_were(tmp_path: Path) -> None:
    made = Entropy()(coarse())
    x = torch.randn(3, 64)
    for backend in ("onnxruntime", "triton"):
        lowered = gw.lower(made, backend)
        lowered.save(tmp_path / backend)
        opened = gw.load(tmp_path / backend)
        torch.testing.assert_close(opened(x), gw.lower(coarse(), backend)(x), rtol=0, atol=0)
    assert any(streams(file) for file in (tmp_path / "triton").rglob("*.pt2"))


def test_every_flip_in_a_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "coded.pt2"
    Entropy()(coarse()).save(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        infos = [i for i in archive.infolist() if "/circuit_" in i.filename]
        data = archive.read(infos[0])
    first = whole.index(data)
    for step in range(9):
        place = first + step * (len(data) - 1) // 8
        broken = bytearray(whole)
        broken[place] ^= 0x10
        path.write_bytes(broken)
        with pytest.raises(ModelError, match=r"damaged|checksum"):
            gw.load(path)


def test_torch_opens_the_plain_file_and_refuses_the_coded_one(tmp_path: Path) -> None:
    coarse().save(tmp_path / "plain.pt2")
    Entropy()(coarse()).save(tmp_path / "coded.pt2")
    torch.export.load(tmp_path / "plain.pt2")
    with pytest.raises(RuntimeError, match="deserializing"):
        torch.export.load(tmp_path / "coded.pt2")


def test_four_bits_in_blocks_report_how_little_there_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 128))
    with torch.no_grad():
        net[0].weight.normal_()
    program = gw.trace(net.eval(), (torch.randn(2, 256),))
    rounded = gw.passes.quantize.Rtn(block=64, bits=4)(program)
    result = Entropy().execute(rounded, Context())
    (action,) = [a for a in result.actions if a.changed]
    assert "bits a code of 4, order-0 entropy 3." in action.what
    assert "1 row type" in action.what
    result.program.save(tmp_path / "coded.pt2")
    loaded = gw.load(tmp_path / "coded.pt2")
    assert all(torch.equal(loaded.state[n], t) for n, t in rounded.state.items())
    uniform = rounded.replace(state={
        n: torch.randint(0, 256, t.shape, dtype=t.dtype) if t.dtype == torch.uint8 else t
        for n, t in rounded.state.items()
    })  # fmt: skip
    said = Entropy().execute(uniform, Context())
    assert "hardly anything to gain" in said.warnings[0]
    assert any("no stream is smaller" in a.reason for a in said.actions)


def test_refusals(tmp_path: Path) -> None:
    program = gw.trace(Net().eval(), (torch.randn(4, 64),))
    with pytest.raises(ModelError, match="no integer weights"):
        Entropy()(program)
    with pytest.raises(ArgumentError, match="latent"):
        Entropy(latent=65)
    wrong = coarse().replace(facts={FACT: {"latent": "many"}})
    with pytest.raises(ArgumentError, match=r"record of store\.entropy"):
        wrong.save(tmp_path / "wrong.pt2")


def test_onnx_files_are_said_to_stay_as_they_are() -> None:
    coded, plain = (gw.lower(p, "onnxruntime").notes["warnings"] for p in (
        Entropy()(coarse()), coarse()))  # fmt: skip
    assert [text for text in coded if text not in plain] == [
        "ONNX files keep codes at their fixed width: what store.entropy saves, it saves in "
        "program.pt2 and in artifacts of the backend triton"
    ]
