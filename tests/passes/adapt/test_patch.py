from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.shown_file import shown_file
from torch import Tensor, nn
from torch.nn import functional

import graphwright as gw
from graphwright.ir.adapters.patch import (
    Patch,
    decode,
    encode,
    extract_patch,
    load_patch,
    save_patch,
    signature,
)
from graphwright.ir.errors import ArgumentError, ModelError

PATCH = Patch({"up.weight": torch.linspace(-0.1, 0.1, 512).reshape(32, 16)})
FILE = shown_file("text-patch.safetensors", lambda path: save_patch(PATCH, path))
CHAIN = ("text", [("adapt.patch", {"patches": {str(FILE): 0.5}})])


class Net(nn.Module):
    """Three convolutions and a classifier for the digits of scikit-learn."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


@cache
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images = torch.from_numpy(found.images[order]).float()[:, None] / 16
    return images, torch.from_numpy(found.target[order])


TEST = slice(1200, None)


def fog(x: Tensor) -> Tensor:
    return 0.4 * x + 0.6


def trained(start: Net, rows: slice, seed: int, steps: int = 150, foggy: bool = False) -> Net:
    net = Net()
    net.load_state_dict(start.state_dict())
    x, y = (t[rows] for t in digits())
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        picked = torch.randint(len(x), (64,), generator=generator)
        images = fog(x[picked]) if foggy and step % 2 else x[picked]
        loss = functional.cross_entropy(net(images), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@cache
def nets() -> dict[str, Any]:
    torch.manual_seed(0)
    start = trained(Net(), slice(0, 400), 0)
    return {
        "start": start,
        "standard": trained(start, slice(0, 800), 1),
        "robust": trained(start, slice(0, 800), 2, steps=300, foggy=True),
        "other": trained(start, slice(400, 1200), 3),
    }


def program(name: str) -> gw.Program:
    return gw.trace(nets()[name], {"x": digits()[0][:4]}, dynamic={"x": {0: "batch"}})


def accuracy(model: Any) -> tuple[float, float]:
    """Of held-out digits: clean ones, and in fog."""
    x, y = (t[TEST] for t in digits())
    with torch.no_grad():
        clean, foggy = ((model(part).argmax(1) == y).double().mean() for part in (x, fog(x)))
    return float(clean), float(foggy)


@cache
def found() -> Patch:
    robust, start = (nets()[name].state_dict() for name in ("robust", "start"))
    return extract_patch(program("standard"), robust, start, first=2)


def test_the_signature_is_orthogonal_to_training_and_projecting_twice_changes_nothing() -> None:
    torch.manual_seed(0)
    start, d, u = (torch.randn(6, 5, dtype=torch.float64) for _ in range(3))
    s = signature(start + d, start, start + u)
    assert abs(float((s * u).sum() / (s.norm() * u.norm()))) < 1e-12
    torch.testing.assert_close(signature(start + s, start, start + u), s)
    flat = u.flatten()[:, None]  # the published form, with the matrix of the projection
    projection = flat @ flat.T / float((flat.T @ flat).item())
    torch.testing.assert_close(s.flatten(), d.flatten() - projection @ d.flatten())
    torch.testing.assert_close(signature(start + d, start, start), d)


@pytest.mark.parametrize("codes", ["linear", "log", "tanh"])
@pytest.mark.parametrize("bits", [3, 8])
def test_codes_come_back_within_half_a_step(codes: str, bits: int) -> None:
    change = 0.1 * torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    packed, low, high = encode(change, bits, codes)
    assert len(packed) == -(-35 * bits // 8)
    row = {"bits": bits, "codes": codes, "low": low, "high": high, "shape": [7, 5]}
    again = decode(packed, row)
    levels = 2 ** (bits - (codes == "log")) - 1
    forth = {"linear": lambda t: t, "tanh": torch.tanh, "log": lambda t: t.abs().log2()}[codes]
    off = (forth(again.double()) - forth(change.double())).abs().max()
    assert float(off) <= (high - low) / levels / 2 + 1e-6
    assert codes != "log" or torch.equal(again.sign(), change.sign())


def test_a_patch_makes_another_model_robust_and_comes_off_byte_by_byte(tmp_path: Path) -> None:
    other = program("other")
    results = {}
    for bits in (None, 8):
        file = tmp_path / f"fog-{bits}.safetensors"
        save_patch(found(), file, bits=bits)
        patched = gw.passes.adapt.Patch(patches={str(file): 1.0})(other)
        results[bits] = accuracy(patched)
    assert (tmp_path / "fog-8.safetensors").stat().st_size < 0.5 * (
        tmp_path / "fog-None.safetensors").stat().st_size  # fmt: skip
    clean, foggy = accuracy(other)
    assert results[None][0] > clean - 0.05
    assert results[None][1] > foggy + 0.15
    assert all(abs(a - b) <= 0.01 for a, b in zip(results[8], results[None], strict=True))
    for name, tensor in other.state.items():
        assert torch.equal(patched.state[name], tensor) == (name not in found().changes)
    assert len(found().changes) == 4  # two convolutions with biases; never the classifier
    back = gw.passes.adapt.Unmerge()(patched, teacher=other)
    assert all(torch.equal(back.state[n], t) for n, t in other.state.items())


def test_patches_scale_add_up_and_commute(tmp_path: Path) -> None:
    other = program("other")
    files = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        changes = {n: 0.05 * torch.randn(t.shape, generator=generator)
                   for n, t in found().changes.items()}  # fmt: skip
        files.append(str(tmp_path / f"{'ba'[seed]}.safetensors"))
        save_patch(Patch(changes), files[-1], bits=None)
    a, b = files
    one = gw.passes.adapt.Patch(patches={a: 0.5, b: -2.0})(other)
    two = gw.passes.adapt.Patch(patches={b: -2.0, a: 0.5})(other)
    for name in found().changes:
        assert torch.equal(one.state[name], two.state[name])
        wanted = (other.state[name].detach().double() + 0.5 * load_patch(a).changes[name].double()
                  - 2 * load_patch(b).changes[name].double())  # fmt: skip
        assert torch.equal(one.state[name].detach(), wanted.float())
    chained = gw.passes.adapt.Patch(patches={a: 0.5})(gw.passes.adapt.Patch(patches={b: -2})(other))
    back = gw.passes.adapt.Unmerge()(chained, teacher=other)
    assert all(torch.equal(back.state[n], t) for n, t in other.state.items())
    out = [
        gw.lower(one, backend)(digits()[0][:3]).detach() for backend in ("onnxruntime", "triton")
    ]
    for found_here in out:
        torch.testing.assert_close(found_here, one(digits()[0][:3]).detach(), rtol=1e-4, atol=1e-5)


def test_batch_norms_ask_for_a_decision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = []
    for _ in range(3):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
        with torch.no_grad():
            net(torch.randn(16, 1, 8, 8))
        models.append(gw.trace(net.eval(), (torch.randn(2, 1, 8, 8),)))
    start, standard, robust = models
    file = str(tmp_path / "p.safetensors")
    save_patch(extract_patch(standard, robust, start), file, bits=None)
    with pytest.raises(ArgumentError, match=r"Set `norms: robust`"):
        gw.passes.adapt.Patch(patches={file: 1.0})(standard)
    kept = gw.passes.adapt.Patch(patches={file: 0.25}, norms="keep")(standard)
    mixed = gw.passes.adapt.Patch(patches={file: 0.25}, norms="robust")(standard)
    name = "1.running_mean"
    assert torch.equal(kept.state[name], standard.state[name])
    wanted = 0.75 * standard.state[name] + 0.25 * robust.state[name]
    torch.testing.assert_close(mixed.state[name], wanted)


def test_refusals(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    save_patch(found(), file)
    wrong = nn.Sequential(nn.Conv2d(1, 4, 3)).eval()
    other = gw.trace(wrong, (torch.ones(1, 1, 8, 8),))
    with pytest.raises(
        ModelError, match=r"4 tensors do not fit[^$]*body.0.weight: \(16, 1, 3, 3\)"
    ):
        gw.passes.adapt.Patch(patches={str(file): 1.0})(other)
    with pytest.raises(ModelError, match="the robust model is of another architecture"):
        extract_patch(program("standard"), wrong.state_dict(), nets()["start"].state_dict())
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(bytes(content))
    with pytest.raises(ModelError, match="the patch is damaged"):
        gw.passes.adapt.Patch(patches={str(broken): 1.0})(program("other"))
    broken.write_bytes(bytes(content[:200]))
    with pytest.raises(ModelError):
        gw.passes.adapt.Patch(patches={str(broken): 1.0})(program("other"))
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, broken)
    with pytest.raises(ModelError, match="this is no patch"):
        gw.passes.adapt.Patch(patches={str(broken): 1.0})(program("other"))
    with pytest.raises(ArgumentError, match="bits of a patch are 2 to 8"):
        save_patch(found(), file, bits=1)
    with pytest.warns(UserWarning, match="nothing is projected out"):
        extract_patch(program("standard"), program("robust"), program("standard"), first=1)
