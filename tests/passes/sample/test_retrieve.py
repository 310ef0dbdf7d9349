"""sample.retrieve: brute force, an index that helps, a bundle that searches, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import denoisers
from models.shown_file import shown_file
from torch import Tensor

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.sampling.retrieval import Retriever
from graphwright.ir.sampling.sampler import Sampler

NET = {
    "schedule": {"kind": "edm", "sigma_min": 0.02, "sigma_max": 10.0, "time": "sigma"},
    "grid": {"spacing": "karras"}, "unconditional": {"context": 0.0},
}  # fmt: skip
ITEMS = torch.randn(60, 2, generator=torch.Generator().manual_seed(3)) * 2
FILE = shown_file("index.npy", lambda path: np.save(path, ITEMS.numpy()))
CHAIN = ("neighbours", [("sample.denoiser", NET), ("sample.retrieve", {"index": str(FILE)})])


@pytest.fixture(scope="module")
def denoiser() -> gw.Program:
    return gw.passes.sample.Denoiser(**NET)(denoisers.around())


def retrieved(program: gw.Program, check: bool = False, **options: Any) -> gw.Program:
    return gw.passes.sample.Retrieve(**{"index": str(FILE), **options})(program, check=check)


def drawn(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_neighbours_are_those_of_brute_force() -> None:
    items, queries = drawn(80, 7, 0), drawn(9, 7, 1)
    search = Retriever(items, 5)
    cosine = torch.nn.functional.normalize(queries.double()) @ torch.nn.functional.normalize(
        items.double()
    ).T  # fmt: skip
    assert torch.equal(search(queries), cosine.topk(5).indices)
    assert torch.equal(search(100 * queries), search(queries))
    assert torch.equal(search.context(queries), items[cosine.topk(5).indices])
    # an item is its own nearest neighbour, and is left out where that is asked for
    own = torch.arange(9)
    itself = torch.nn.functional.normalize(items[:9].double()) @ torch.nn.functional.normalize(
        items.double()
    ).T  # fmt: skip
    assert torch.equal(search(items[:9]), itself.topk(5).indices)
    assert torch.equal(search(items[:9], without=own), itself.topk(6).indices[:, 1:])
    assert torch.equal(search(queries, without=torch.full((9,), -1)), search(queries))


def test_their_order_is_nothing_and_another_index_is_given_by_hand(denoiser: gw.Program) -> None:
    sampler = Sampler.of(retrieved(denoiser, check=True))
    assert sorted(sampler.parts) == ["full", "look_up"]
    noise, queries = drawn(5, 2, 5), drawn(5, 2, 6)
    mine = sampler.sample(noise, queries=queries, steps=6)
    found = Retriever(ITEMS, 4).context(queries)
    assert torch.equal(sampler.retriever.vectors, ITEMS)
    for context in (found, found.flip(1)):
        by_hand = sampler.sample(noise, {"context": context}, steps=6)
        torch.testing.assert_close(by_hand, mine, rtol=1e-4, atol=1e-5)
    other = Retriever(ITEMS + 5, 4).context(queries)
    moved = sampler.sample(noise, {"context": other}, steps=6)
    wanted = Sampler.of(denoiser).sample(noise, {"context": other}, steps=6)
    torch.testing.assert_close(moved, wanted)


def test_neighbours_say_more_than_the_whole(denoiser: gw.Program) -> None:
    """MSE of the data at a level, with the neighbours of the data and with all items."""
    g = torch.Generator().manual_seed(7)
    data = ITEMS[torch.randint(60, (200,), generator=g)] + denoisers.SPREAD**0.5 * drawn(200, 2, 8)
    x, s = data + 1.5 * drawn(200, 2, 9), torch.full((200,), 1.5)
    ask = {"x": x, "sigma_in": s, "alpha": torch.ones(200), "sigma": s}
    errors = []
    for context in (Retriever(ITEMS, 4).context(data), ITEMS.expand(200, 60, 2)):
        found = denoiser(**ask, context=context)["denoised"]
        errors.append(float((found - data).square().mean()))
    assert errors[0] < 0.7 * errors[1]


SPEC = """
version: 1
passes:
  - sample.denoiser:
      schedule: {{kind: edm, sigma_min: 0.02, sigma_max: 10.0, time: sigma}}
      grid: {{spacing: karras}}
      unconditional: {{context: 0.0}}
  - sample.cfg: {{guidance_scale: 1.5}}
  - sample.retrieve: {{index: {file}, neighbours: 3}}
lower: [onnxruntime]
"""


def test_a_spec_becomes_a_bundle_that_searches(denoiser: gw.Program, tmp_path: Path) -> None:
    denoisers.around().save(tmp_path / "net.pt2")
    (tmp_path / "spec.yaml").write_text(SPEC.format(file=FILE))
    gw.optimize(tmp_path / "net.pt2", tmp_path / "spec.yaml", out=tmp_path / "out")
    bundle = gw.load(tmp_path / "out")
    noise, queries = drawn(5, 2, 5), drawn(5, 2, 6)
    mine = bundle.sample(noise, queries=queries, steps=6)
    guided = Sampler.of(gw.passes.sample.Cfg(guidance_scale=1.5)(denoiser, check=False))
    context = Retriever(ITEMS, 3).context(queries)
    wanted = guided.sample(noise, {"context": context}, steps=6)
    torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)
    # no neighbours are tokens of zeros
    away = guided.plan(5, {"context": context}, steps=6)
    assert set(away.given) == {"context"}


def test_refusals(denoiser: gw.Program, tmp_path: Path) -> None:
    def refused(kind: Any, text: str, table: Any = None, **options: Any) -> None:
        if table is not None:
            np.save(tmp_path / "index.npy", table)
            options["index"] = str(tmp_path / "index.npy")
        with pytest.raises(kind, match=text):
            retrieved(denoiser, **options)

    few, wide = np.ones((3, 2), np.float32), np.ones((9, 3), np.float32)
    refused(ArgumentError, "the index has 3 items, and 4 neighbours are asked for", few)
    refused(ModelError, "vectors of the index have 3 numbers, and the condition", wide)
    refused(ArgumentError, r"not \(9,\) of float32", np.ones(9, np.float32))
    refused(ArgumentError, "of int64", np.ones((9, 2), np.int64))
    refused(ArgumentError, "item 1 of the index has the length 0", np.eye(9, 2, dtype=np.float32)[
        [0, 5, 1, 0, 1]
    ])  # fmt: skip
    refused(ArgumentError, "no index can be read", index=str(tmp_path / "none.npy"))
    refused(ModelError, "has .'context'. of that form", condition="sigma_in")
    with pytest.raises(ModelError, match="the denoiser has none of that form"):
        retrieved(denoisers.conv_denoiser())
    with pytest.raises(ArgumentError, match="queries are for a program with an index"):
        Sampler.of(denoiser).sample(drawn(2, 2, 0), queries=drawn(2, 2, 1), steps=2)
    with pytest.raises(ArgumentError, match=r"queries have the shape \(2, 5\)"):
        Retriever(ITEMS, 4)(drawn(2, 5, 0))
    with pytest.raises(ArgumentError, match="none is left for 60 neighbours without"):
        Retriever(ITEMS, 60)(ITEMS, torch.arange(60))
