"""Checkpoints of programs with a cache: written in codes, read back, and traced again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.gguf_files import tiny

import graphwright as gw
from graphwright.ir.files import load_model
from graphwright.ir.files.coded.modules import BlocksLinear
from graphwright.ir.generation.trace import trace_decoder
from graphwright.ir.program import Program

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several shards."""
    place = tmp_path_factory.mktemp("sharded")
    tiny("llama").save_pretrained(place, max_shard_size="60KB")
    assert (place / "model.safetensors.index.json").is_file()
    return place


@pytest.fixture(scope="module")
def program(folder: Path) -> Program:
    return decoder(load_model(folder).module, folder)


def decoder(module: Any, folder: Path) -> Program:
    return trace_decoder(module, folder=folder, check=False)


def logits(program: Program) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = program.run_flat(program.bind(IDS))[0]
    return found


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_codes_go_out_and_come_back(
    format: Any, folder: Path, program: Program, tmp_path: Path
) -> None:
    coded = gw.passes.quantize.Rtn(bits=4, block=32, targets=["*_proj"])(program)
    gw.export_checkpoint(coded, tmp_path, format, like=folder)
    module: Any = load_model(tmp_path).module
    layers = [m for m in module.modules() if isinstance(m, BlocksLinear)]
    assert len(layers) == 14
    wanted = logits(coded)
    with torch.no_grad():
        torch.testing.assert_close(module(IDS).logits, wanted, rtol=1e-3, atol=1e-3)
    if format == "gptq":
        again = decoder(module, tmp_path)
        assert [spec.name for spec in again.signature.inputs][-1] == "past_value_1"
        torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4)
