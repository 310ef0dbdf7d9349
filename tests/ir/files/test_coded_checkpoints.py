"""Checkpoints of GPTQ, AWQ and compressed-tensors: packed here, bit by bit, from the formats' own
descriptions; read; written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import graphwright as gw
from graphwright.ir.errors import ModelError
from graphwright.ir.files import load_model
from graphwright.ir.files.export_checkpoint import export_checkpoint
from graphwright.ir.layers.products import weight_value
from graphwright.ir.layers.selectors import layers

Array = np.ndarray[Any, Any]
OUT, IN, BLOCK = 32, 64, 16


def net() -> nn.Module:
    """What the checkpoints belong to; named in the spec as its factory."""
    return nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, 8))


SECTION = {"factory": f"{__name__}:net"}


def words(length: int, places: list[tuple[int, int, int]]) -> Array:
    """(value, first bit, bits) written one bit at a time into `length` words of 32 bits."""
    bits = [0] * (32 * length)
    for value, first, count in places:
        for i in range(count):
            bits[first + i] = value >> i & 1
    packed = [sum(bits[32 * w + i] << i for i in range(32)) for w in range(length)]
    return np.array(packed, dtype=np.uint32).view(np.int32)


def sample(bits: int, symmetric: bool, seed: int = 0) -> tuple[Array, Array, Array]:
    """q (out, in), scale and zero (out, groups)."""
    random = np.random.default_rng(seed)
    q = random.integers(0, 2**bits, (OUT, IN))
    groups = IN // BLOCK
    scale = random.uniform(0.01, 0.02, (OUT, groups)).astype(np.float16)
    zero = random.integers(0, 2**bits, (OUT, groups))
    return q, scale, np.full_like(zero, 2 ** (bits - 1)) if symmetric else zero


def value(q: Array, scale: Array, zero: Array, group: Array) -> Array:
    return (q - zero[:, group]) * scale.astype(np.float32)[:, group]


def gptq(q: Array, scale: Array, zero: Array, bits: int, offset: int, group: Array) -> Any:
    columns = [words(IN * bits // 32, [(int(q[o, i]), i * bits, bits) for i in range(IN)])
               for o in range(OUT)]  # fmt: skip
    stored = (zero - offset) % 2**bits
    rows = [words(OUT * bits // 32, [(int(stored[o, g]), o * bits, bits) for o in range(OUT)])
            for g in range(zero.shape[1])]  # fmt: skip
    return {"qweight": np.stack(columns, 1), "qzeros": np.stack(rows), "scales": scale.T,
            "g_idx": group.astype(np.int32)}  # fmt: skip


def awq(q: Array, scale: Array, zero: Array) -> Any:
    def row(codes: Array) -> Array:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        places = [
            (int(codes[8 * w + o]), 32 * w + 4 * nibble, 4)
            for w in range(OUT // 8)
            for nibble, o in enumerate(order)
        ]
        return words(OUT // 8, places)

    return {"qweight": np.stack([row(q[:, i]) for i in range(IN)]),
            "qzeros": np.stack([row(zero[:, g]) for g in range(zero.shape[1])]),
            "scales": scale.T}  # fmt: skip


def compressed(q: Array, scale: Array, zero: Array | None, bits: int) -> Any:
    each = 32 // bits

    def row(codes: Array) -> Array:
        places = [(int(c), i // each * 32 + i % each * bits, bits) for i, c in enumerate(codes)]
        return words(-(-len(codes) // each), places)

    found = {"weight_packed": np.stack([row(q[o]) for o in range(OUT)]), "weight_scale": scale,
             "weight_shape": np.array([OUT, IN])}  # fmt: skip
    if zero is not None:
        rows = [row(zero[:, g]) for g in range(zero.shape[1])]
        found["weight_zero_point"] = np.stack(rows, 1)
    return found


def write(folder: Path, parts: Any, config: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    plain = {k: v for k, v in net().state_dict().items() if k != "0.weight"}
    packed = {f"0.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in parts.items()}
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({**plain, **packed}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder / "model.safetensors"


def compressed_config(bits: int, symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group",
               "group_size": BLOCK}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip


IN_ORDER = np.arange(IN) // BLOCK
REORDERED = np.random.default_rng(5).permutation(IN_ORDER)

CASES: dict[str, Any] = {
    **{f"gptq-{bits}": ("gptq", bits, False, IN_ORDER, 1) for bits in (2, 3, 4, 8)},
    "gptq-symmetric": ("gptq", 4, True, IN_ORDER, 1),
    "gptq-version 2": ("gptq", 4, False, IN_ORDER, 0),
    "gptq-act order": ("gptq", 4, False, REORDERED, 1),
    "awq": ("awq", 4, False, IN_ORDER, 0),
    **{
        f"compressed-{bits}": ("compressed-tensors", bits, False, IN_ORDER, 0) for bits in (3, 4, 8)
    },
    "compressed-symmetric": ("compressed-tensors", 4, True, IN_ORDER, 0),
}


def made(case: str, folder: Path) -> tuple[Path, Array]:
    """The file of a case, and the weight it stands for."""
    method, bits, symmetric, group, offset = CASES[case]
    q, scale, zero = sample(bits, symmetric)
    if method == "gptq":
        parts = gptq(q, scale, zero, bits, offset, group)
        config = {"quant_method": "gptq", "bits": bits, "group_size": BLOCK,
                  "checkpoint_format": "gptq" if offset else "gptq_v2"}  # fmt: skip
    elif method == "awq":
        parts = awq(q, scale, zero)
        config = {"quant_method": "awq", "bits": 4, "group_size": BLOCK, "version": "gemm"}
    else:
        parts = compressed(q, scale, None if symmetric else zero, bits)
        config = compressed_config(bits, symmetric)
    return write(folder, parts, config), value(q, scale, zero, group)


def traced(file: Path) -> gw.Program:
    module = load_model(file, section=SECTION).module
    assert module is not None
    return gw.trace(module, (torch.ones(3, IN),), {"input": {0: "batch"}})


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_becomes_codes_in_the_graph(case: str, tmp_path: Path) -> None:
    file, weight = made(case, tmp_path / "m")
    program = traced(file)
    reference = net()
    torch.manual_seed(0)
    reference.load_state_dict({**net().state_dict(), "0.weight": torch.from_numpy(weight).float()})
    x = torch.randn(5, IN)
    torch.testing.assert_close(program(x), reference(x))
    ops = [str(node.target) for node in program.graph.nodes]
    assert ops.count("graphwright.dequantize_blocks.default") == 1
    assert [each.name for each in layers(program, {"linear"})] == ["0", "2"]


@pytest.mark.parametrize("case", [c for c in CASES if c != "gptq-version 2"])
def test_written_back_it_is_the_same_file(case: str, tmp_path: Path) -> None:
    file, _ = made(case, tmp_path / "m")
    notes = export_checkpoint(traced(file), tmp_path / "again", CASES[case][0])
    assert notes == []
    first, second = (
        safetensors.torch.load_file(f) for f in (file, tmp_path / "again" / "model.safetensors")
    )
    second = {n: t.to(first[n].dtype) for n, t in second.items()}
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    x = torch.randn(2, IN)
    assert torch.equal(traced(tmp_path / "again" / "model.safetensors")(x), traced(file)(x))


@pytest.mark.parametrize("format", ["gptq", "awq", "compressed-tensors"])
def test_what_a_pass_has_quantized_goes_out_and_comes_back(format: str, tmp_path: Path) -> None:
    program = gw.trace(net().eval(), (torch.randn(3, IN),), {"input": {0: "batch"}})
    batches = [(torch.randn(40, IN),)]
    first = gw.passes.quantize.Gptq(block=16, targets=["0"])(program, calibration=batches)
    export_checkpoint(first, tmp_path / "m", format)  # type: ignore[arg-type]
    again = traced(tmp_path / "m" / "model.safetensors")
    assert torch.equal(again(batches[0][0]), first(batches[0][0]))
    weights = [weight_value(p, layers(p, {"linear"})[0]) for p in (first, again)]
    assert torch.equal(weights[0], weights[1])


def test_tables_in_codes_are_written_as_floats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(24, 32), nn.Linear(32, 32)).eval()
    ids = torch.randint(0, 24, (2, 7))
    rounded = gw.passes.quantize.Rtn(block=16)(gw.trace(module, (ids,)))
    assert export_checkpoint(rounded, tmp_path / "m") == ["0.weight is written as floats"]
    stored = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(stored["0.weight"], weight_value(rounded, layers(rounded)[0]))


def test_a_model_folder_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path / "float")
    example = {"input_ids": torch.randint(0, 50, (2, 8))}
    program = gw.trace(model, (example["input_ids"],))
    rounded = gw.passes.quantize.Rtn(block=16, targets=["encoder.*"])(program)
    export_checkpoint(rounded, tmp_path / "coded", "compressed-tensors", like=tmp_path / "float")
    loaded = load_model(tmp_path / "coded").module
    assert loaded is not None
    again = gw.trace(loaded, (example["input_ids"],))
    torch.testing.assert_close(again(**example), rounded(**example))
    ops = [str(node.target) for node in again.graph.nodes]
    assert ops.count("graphwright.dequantize_blocks.default") == 6


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    file, _ = made("gptq-4", tmp_path / "m")
    config = file.parent / "config.json"
    for wrong, says in [
        ({"quant_method": "aqlm"}, "'aqlm'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "groups of 32"),
        ({**compressed_config(4, True), "format": "float-quantized"}, "'float-quantized'"),
    ]:
        config.write_text(json.dumps({"quantization_config": wrong}))
        with pytest.raises(ModelError, match=says):
            load_model(file, section=SECTION)
    config.unlink()
    with pytest.raises(ModelError, match="nothing beside it"):
        load_model(file, section=SECTION)
    tensors = safetensors.torch.load_file(file)
    del tensors["0.scales"]
    safetensors.torch.save_file(tensors, file)
    config.write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match="incomplete"):
        load_model(file, section=SECTION)


def test_what_a_checkpoint_cannot_hold_is_refused(tmp_path: Path) -> None:
    program = gw.trace(net().eval(), (torch.randn(3, IN),), {"input": {0: "batch"}})
    with pytest.raises(ModelError, match="no linear layer in codes"):
        export_checkpoint(program, tmp_path)
    batches = [(torch.randn(40, IN) * torch.linspace(0.1, 9, IN),)]
    scaled = gw.passes.quantize.Awq(block=16, targets=["0"])(program, calibration=batches)
    with pytest.raises(ModelError, match=r"quantize.awq put in"):
        export_checkpoint(scaled, tmp_path)
    first = gw.passes.quantize.Rtn(block=16, targets=["0"])(program)
    mixed = gw.passes.quantize.Rtn(block=16, bits=3, targets=["2"])(first)
    with pytest.raises(ModelError, match="layers differ"):
        export_checkpoint(mixed, tmp_path)
    with pytest.raises(ModelError, match="do not fill"):
        export_checkpoint(gw.passes.quantize.Rtn(block=16, bits=3)(program), tmp_path)
