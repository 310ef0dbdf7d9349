"""Checkpoints in codes, packed here bit by bit, stand for the weights that their formats say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import coded
from models.coded import BLOCK, IN, IN_ORDER, OUT, REORDERED
from torch import nn

import graphwright as gw
from graphwright.ir.files import load_model
from graphwright.ir.layers.selectors import layers
from graphwright.ir.ops.float8 import bytes_of
from graphwright.ir.ops.table import levels

GPTQ = {"quant_method": "gptq", "group_size": BLOCK}
GPTQMODEL = {**GPTQ, "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:2.0.0"]}}

Made = tuple[dict[str, Any], dict[str, Any], Any]
"""A layer's tensors, their description, and the weight they stand for."""


def of_gptq(bits: int, offset: int = 1, symmetric: bool = False, group: Any = IN_ORDER,
            pack: Any = coded.string, **more: Any) -> Made:  # fmt: skip
    q, scale, zero = coded.sample(bits, symmetric)
    parts = coded.gptq(q, scale, zero, bits, offset, group, pack)
    version = "gptq" if offset else "gptq_v2"
    config = {**GPTQ, "bits": bits, "checkpoint_format": version, **more}
    return parts, config, coded.value(q, scale, zero, group)


def borrowed() -> Made:
    """GPTQModel takes one from all zero points of a word at once, so that zeros borrow."""
    q, scale, zero = coded.sample(4, False)
    zero[::3] = 0
    parts = coded.gptq(q, scale, zero, 4, 0, IN_ORDER)
    parts["qzeros"] = (parts["qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    return parts, {**GPTQMODEL, "bits": 4}, coded.value(q, scale, zero, IN_ORDER)


def of_awq() -> Made:
    q, scale, zero = coded.sample(4, False)
    config = {"quant_method": "awq", "bits": 4, "group_size": BLOCK, "version": "gemm"}
    return coded.awq(q, scale, zero), config, coded.value(q, scale, zero, IN_ORDER)


def of_compressed(bits: int, pack: Any = coded.fields, symmetric: bool = False,
                  signed: bool = False, **config: Any) -> Made:  # fmt: skip
    q, scale, zero = coded.sample(bits, symmetric)
    parts = coded.compressed(q, scale, None if symmetric else zero, bits, pack)
    if signed:
        parts["weight_zero_point"] = (zero - 2 ** (bits - 1)).astype(np.int8)
    description = coded.compressed_config(bits, symmetric, **config)
    return parts, description, coded.value(q, scale, zero, IN_ORDER)


def auto_round(bits: int, offset: int, packing: str, **more: Any) -> Made:
    parts, _, weight = of_gptq(bits, offset)
    config = {"quant_method": "auto-round", "bits": bits, "group_size": BLOCK, "sym": False,
              "data_type": "int", "packing_format": packing, **more}  # fmt: skip
    return parts, config, weight


def described(made: Made, **more: Any) -> Made:
    return made[0], {**made[1], **more}, made[2]


BLOCKS: dict[str, Any] = {
    **{f"gptq {bits} bits": lambda b=bits: of_gptq(b) for bits in (2, 3, 4, 8)},
    "gptq symmetric": lambda: of_gptq(4, symmetric=True),
    "gptq version 2": lambda: of_gptq(4, 0),
    "gptq act order": lambda: of_gptq(4, group=REORDERED),
    "gptq planes of 3 bits": lambda: of_gptq(3, 0, pack=coded.planes, checkpoint_format="gptq_p"),
    "gptq planes of 7 bits": lambda: of_gptq(7, 0, pack=coded.planes, checkpoint_format="gptq_p"),
    "gptq bits by layer": lambda: described(of_gptq(8), bits=4, dynamic={r"\d$": {"bits": 8}}),
    "gptq zero points that borrow": borrowed,
    "awq": of_awq,
    "auto-round as gptq": lambda: auto_round(4, 1, "auto_round:auto_gptq"),
    "auto-round of its own": lambda: auto_round(5, 0, "auto_round"),
    "auto-round, a layer of its own": lambda: described(
        auto_round(8, 0, "auto_round"), bits=4, extra_config={"0": {"bits": 8}}),
    **{f"compressed {bits} bits": lambda b=bits: of_compressed(b) for bits in (3, 4, 8)},
    **{f"compressed {bits} bits as a string": lambda b=bits: of_compressed(
        b, coded.string, version="0.19.0") for bits in (3, 5, 6, 7)},
    "compressed symmetric": lambda: of_compressed(4, symmetric=True),
    "compressed, zero points in bytes": lambda: of_compressed(4, signed=True),
}  # fmt: skip


def module_of(folder: Path, parts: Any, config: Any) -> Any:
    file = coded.write(folder / "m", parts, config)
    return load_model(file, section=coded.SECTION).module


@pytest.mark.parametrize("case", BLOCKS)
def test_codes_stand_for_the_weight(case: str, tmp_path: Path) -> None:
    parts, config, weight = BLOCKS[case]()
    found = module_of(tmp_path, parts, config)[0].weight
    torch.testing.assert_close(found, torch.from_numpy(weight).float())


def test_zero_points_that_wrap_are_said(tmp_path: Path) -> None:
    q, scale, zero = coded.sample(4, False)
    parts = coded.gptq(q, scale, zero, 4, 1, IN_ORDER)
    file = coded.write(tmp_path / "m", parts, {**GPTQ, "bits": 4})
    says = f"{int((zero == 0).sum())} zero points are stored as -1"
    assert [w for w in load_model(file, section=coded.SECTION).warnings if says in w]
    file = coded.write(tmp_path / "m", parts, {**GPTQMODEL, "bits": 4})
    assert not [w for w in load_model(file, section=coded.SECTION).warnings if "stored as -1" in w]


def of_nf4(double: bool) -> Made:
    """bitsandbytes: blocks over the flattened weight, two codes a byte, the first high."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, OUT * IN)
    table = levels("nf4").numpy()
    absmax = random.uniform(0.5, 2, OUT * IN // 64).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [OUT, IN], "dtype": "float32"}
    parts: dict[str, Any] = {
        "weight": (codes[0::2] << 4 | codes[1::2]).astype(np.uint8).reshape(-1, 1),
        "weight.quant_map": table, "weight.absmax": absmax,
    }  # fmt: skip
    if double:
        inner = random.integers(0, 256, absmax.size)
        dynamic = levels("dynamic").numpy()
        parts |= {"weight.absmax": inner.astype(np.uint8), "weight.nested_quant_map": dynamic,
                  "weight.nested_absmax": np.array([0.25], np.float32)}  # fmt: skip
        state |= {"nested_blocksize": 256, "nested_offset": 1.5, "nested_dtype": "float32"}
        absmax = dynamic[inner] * np.float32(0.25) + np.float32(1.5)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    parts["weight.quant_state.bitsandbytes__nf4"] = text
    weight = table[codes].reshape(-1, 64) * absmax[:, None]
    return parts, {"quant_method": "bitsandbytes", "load_in_4bit": True}, weight.reshape(OUT, IN)


def of_int8() -> Made:
    """bitsandbytes: int8 codes, 127 times the scale of every row."""
    random = np.random.default_rng(0)
    q, scale = random.integers(-127, 128, (OUT, IN)), random.uniform(0.5, 2, OUT)
    parts = {"weight": q.astype(np.int8), "SCB": scale.astype(np.float32)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return parts, config, q * scale[:, None] / 127


def float8() -> torch.Tensor:
    values = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 90
    return bytes_of(values).view(torch.float8_e4m3fn)


def of_tiles(rows: int, columns: int) -> Made:
    """DeepSeek's: one scale for every tile; the last tile of a side may be cut off."""
    codes = float8()
    scale = (torch.rand(-(-OUT // rows), -(-IN // columns)) + 0.5) / 100
    wide = scale.repeat_interleave(rows, 0)[:OUT].repeat_interleave(columns, 1)[:, :IN]
    config = {"quant_method": "fp8", "weight_block_size": [rows, columns]}
    return {"weight": codes, "weight_scale_inv": scale}, config, codes.float() * wide


def of_scheme(weights: dict[str, Any], format: str, parts: dict[str, Any], weight: Any) -> Made:
    scheme = {"targets": ["re:.*"], "weights": weights}
    config = {"quant_method": "compressed-tensors", "format": format,
              "config_groups": {"group_0": scheme}}  # fmt: skip
    return parts, config, weight


def of_integers(zero: bool) -> Made:
    random = np.random.default_rng(0)
    q, scale = random.integers(-128, 128, (OUT, IN)), random.uniform(0.5, 2, (OUT, 1)) / 100
    middle = random.integers(-9, 9, (OUT, 1)) if zero else np.zeros((OUT, 1), int)
    parts = {"weight": q.astype(np.int8), "weight_scale": scale.astype(np.float32)}
    if zero:
        parts["weight_zero_point"] = middle.astype(np.int8)
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": not zero}
    return of_scheme(weights, "int-quantized", parts, (q - middle) * scale)


def of_float8(strategy: str) -> Made:
    codes, shape = float8(), (OUT, 1) if strategy == "channel" else (1,)
    scale = (torch.rand(shape) + 0.5) / 100
    weights = {"num_bits": 8, "type": "float", "strategy": strategy}
    parts = {"weight": codes, "weight_scale": scale}
    return of_scheme(weights, "float-quantized", parts, codes.float() * scale)


def of_block(rows: int, columns: int) -> Made:
    """compressed-tensors' tiles."""
    parts, _, weight = of_tiles(rows, columns)
    parts = {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}
    weights = {"num_bits": 8, "type": "float", "strategy": "block",
               "block_structure": [rows, columns]}  # fmt: skip
    return of_scheme(weights, "float-quantized", parts, weight)


def of_hqq() -> Made:
    """HQQ: rows of groups, the first half of them in the high bits; zero points are floats."""
    random = np.random.default_rng(0)
    q = random.integers(0, 16, (OUT * IN // BLOCK, BLOCK)).astype(np.uint8)
    scale, zero = (random.uniform(0.1, 9, (len(q), 1)).astype(np.float32) for _ in range(2))
    half = len(q) // 2
    numbers = {"nbits": 4, "axis": 1, "group_size": BLOCK}
    parts = {"W_q": q[:half] << 4 | q[half:], "scale": scale, "zero": zero,
             "shape": np.array([OUT, IN])}  # fmt: skip
    parts |= {key: np.array(number) for key, number in numbers.items()}
    return parts, {"quant_method": "hqq"}, ((q - zero) * scale).reshape(OUT, IN)


OTHERS: dict[str, tuple[Any, str]] = {
    "nf4": (lambda: of_nf4(False), "dequantize_table"),
    "nf4, scales in codes": (lambda: of_nf4(True), "dequantize_table"),
    "int8 of bitsandbytes": (of_int8, "dequantize"),
    "float8 in tiles": (lambda: of_tiles(16, 32), "dequantize_float8"),
    "float8 in tiles that are cut off": (lambda: of_block(24, 48), "dequantize_float8"),
    "float8 in one tile": (lambda: of_tiles(128, 128), "dequantize_float8"),
    "int8": (lambda: of_integers(False), "dequantize"),
    "int8, zero points": (lambda: of_integers(True), "dequantize"),
    "float8 per channel": (lambda: of_float8("channel"), "dequantize_float8"),
    "float8 per tensor": (lambda: of_float8("tensor"), "dequantize_float8"),
    "hqq": (of_hqq, ""),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_forms_stay_codes_in_the_graph(case: str, tmp_path: Path) -> None:
    parts, config, weight = OTHERS[case][0]()
    module = module_of(tmp_path, parts, config)
    torch.testing.assert_close(module[0].weight, torch.as_tensor(weight).float())
    for each in module.modules():
        each.rounding = None  # rounded inputs have a test of their own
    reference = nn.functional.linear
    x = torch.randn(5, IN)
    program = gw.trace(module, (x,), {"input": {0: "batch"}})
    hidden = reference(x, torch.as_tensor(weight).float(), module[0].bias).relu()
    torch.testing.assert_close(program(x), reference(hidden, module[2].weight, module[2].bias))
    ops = {str(node.target) for node in program.graph.nodes if "graphwright" in str(node.target)}
    assert ops == ({f"graphwright.{OTHERS[case][1]}.default"} if OTHERS[case][1] else set())
    assert [each.name for each in layers(program, {"linear"})] == ["0", "2"]


ROUNDED = {
    "int8 per token": ({"type": "int", "strategy": "token", "dynamic": True}, {}),
    "float8 per token": ({"type": "float", "strategy": "token", "dynamic": True}, {}),
    "float8 per group": (
        {"type": "float", "strategy": "group", "group_size": 32, "dynamic": True}, {}),
    "float8 per group, the last one short": (
        {"type": "float", "strategy": "group", "group_size": 48, "dynamic": True},
        {},
    ),
    "int8 stored": (
        {"type": "int", "strategy": "tensor", "symmetric": False},
        {"input_scale": np.float32([0.03]), "input_zero_point": np.int8([5])}),
    "float8 stored": ({"type": "float", "strategy": "tensor"},
                      {"input_scale": np.float32([0.01])}),
}  # fmt: skip


@pytest.mark.parametrize("case", ROUNDED)
def test_inputs_are_rounded_as_the_checkpoint_asks(case: str, tmp_path: Path) -> None:
    arguments, stored = ROUNDED[case]
    is_int = arguments["type"] == "int"
    parts, config, _ = of_integers(False) if is_int else of_float8("channel")
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, **arguments}
    file = coded.write(tmp_path / "m", {**parts, **stored}, config)
    loaded = load_model(file, section=coded.SECTION)
    assert [w for w in loaded.warnings if "inputs of 1 layers are rounded" in w]
    assert loaded.module is not None
    x = torch.randn(5, IN)
    group = arguments.get("group_size", IN)
    rows = nn.functional.pad(x, (0, -IN % group)).unflatten(-1, (-1, group))
    largest = rows.abs().amax(-1, keepdim=True)
    if is_int:
        scale = torch.tensor(0.03) if stored else largest / 127.5
        zero = 5 if stored else 0
        rounded = (torch.clamp((rows / scale).round() + zero, -128, 127) - zero) * scale
    else:
        scale = torch.tensor(0.01) if stored else largest / 448
        rounded = (rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    layer: Any = loaded.module[0]  # type: ignore[index]
    wanted = nn.functional.linear(rounded.flatten(1)[:, :IN], layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    program = gw.trace(loaded.module, (x,), {"input": {0: "batch"}})
    torch.testing.assert_close(program(x), loaded.module(x))


def test_scales_keep_their_precision(tmp_path: Path) -> None:
    """Half-precision scales in a bfloat16 model: the weight is rounded once, at the end."""
    parts, config, weight = of_gptq(4)
    layer = module_of(tmp_path, parts, config)[0]
    exact = torch.from_numpy(weight).float()
    narrow = layer.to(torch.bfloat16)
    assert torch.equal(narrow.weight.to(torch.bfloat16), exact.to(torch.bfloat16))
    x = torch.eye(IN, dtype=torch.bfloat16)
    assert narrow(x).dtype == torch.bfloat16
    assert torch.equal(narrow.to(torch.float32).weight, exact)
    half = layer.to(torch.float16)
    assert half.weight_scale.dtype == torch.float16
