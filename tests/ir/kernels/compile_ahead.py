"""Compile every kernel for named GPUs on a machine that has none; print what came out as JSON.

Run as a process of its own, without TRITON_INTERPRET: the choice between interpreter and
compiler is made when a kernel is decorated. `python compile_ahead.py` prints a list of records,
`python compile_ahead.py blocks_gemv` those of the kernels whose names begin so.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphwright.ir.kernels import (
    activation,
    adapted_linear,
    attention,
    blocks,
    cached_attention,
    codebook,
    codebook_linear,
    divisor_norm,
    epilogue,
    expand_2_4,
    experts,
    float8,
    int8_linear,
    low_bit,
    low_bit_linear,
    low_rank,
    norm,
    quantize,
    quantize_cache,
    routed_low_rank,
    selective_scan,
    table,
)  # sets triton's environment
from graphwright.ir.ops.table import NF4

TARGETS = (80, 90)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """One specialization of a kernel: argument types, constants, launch parameters."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    weights: int = 0
    """Weights that one pass of the loop decodes in the whole program; 0 where there are none."""
    warps: int = 4
    stages: int = 3


def sizes(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def floats(dtype: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{dtype}")


def cases() -> Iterator[Case]:
    yield Case(
        "bias_act-gelu-fp32",
        activation.bias_act_kernel,
        floats("fp32", "x", "bias", "y") | sizes("columns", "x_stride"),
        {"HAS_BIAS": True, "ACTIVATION": "gelu", "BLOCK": 1024},
    )
    yield Case(
        "gated_act-silu-bf16",
        activation.gated_act_kernel,
        floats("bf16", "gate", "up", "y") | sizes("columns", "gate_stride", "up_stride"),
        {"ACTIVATION": "silu", "BLOCK": 1024},
    )
    yield Case(
        "scale_mask-bf16",
        activation.scale_mask_kernel,
        floats("bf16", "x", "mask", "y")
        | {"scale": "fp32"}
        | sizes("columns", "x_stride", "size1", "size2", "stride0", "stride1", "stride2"),
        {"stride3": 1, "BLOCK": 1024},
    )
    for columns, centered in [(4096, False), (norm.WIDEST_ROW, True)]:
        yield Case(
            f"norm-{columns}-bf16",
            norm.norm_kernel,
            floats("bf16", "x", "residual", "weight", "bias", "y", "total")
            | sizes("columns", "x_stride", "residual_stride")
            | {"eps": "fp32"},
            {
                "HAS_RESIDUAL": True,
                "KEEP_SUM": True,
                "HAS_WEIGHT": True,
                "HAS_BIAS": centered,
                "CENTERED": centered,
                "BLOCK": columns,
            },
            warps=norm.warps_for(columns),
        )
    yield Case(
        "divisor_norm-bf16",
        divisor_norm.divisor_norm_kernel,
        floats("bf16", "x", "weight", "bias", "y")
        | sizes("columns", "stride")
        | {"width": "i32", "eps": "fp32"},
        {"HAS_WEIGHT": True, "HAS_BIAS": True, "BLOCK": 4096},
        warps=norm.warps_for(4096),
    )
    yield Case(
        "add_low_rank-bf16",
        low_rank.add_low_rank_kernel,
        floats("bf16", "weight", "b", "a", "y") | sizes("rows", "columns", "rank"),
        {"PRECISION": "tf32", "ROWS": 64, "COLUMNS": 64, "RANKS": 32},
    )
    yield Case(
        "dequantize-bf16",
        quantize.dequantize_kernel,
        floats("bf16", "scale", "y") | {"codes": "*i8", "zero_point": "*i8"}
        | sizes("count", "channels", "inner"),
        {"HAS_ZERO": False, "BLOCK": quantize.BLOCK},
    )  # fmt: skip
    yield Case(
        "fake_quantize-fp32",
        quantize.fake_quantize_kernel,
        floats("fp32", "x", "scale", "zero_point", "y") | sizes("count")
        | {"low": "fp32", "high": "fp32"},
        {"EXACT": quantize.EXACT, "BLOCK": quantize.BLOCK},
    )  # fmt: skip
    yield Case(
        "expand_2_4-bf16",
        expand_2_4.expand_2_4_kernel,
        floats("bf16", "values", "y") | {"places": "*u8"} | sizes("count", "groups", "stored"),
        {"BLOCK": expand_2_4.BLOCK},
    )
    for bits in (2, 4):  # codes of other widths are read byte by byte
        yield Case(
            f"dequantize_blocks-{bits}-bf16",
            blocks.dequantize_blocks_kernel,
            floats("bf16", "scale", "y") | {"codes": "*u8", "zero_point": "*u8"}
            | sizes("rows", "columns", "blocks", "block", "block_bytes", "zero_bytes"),
            {"BITS": bits, "HAS_ZERO": True, "ROWS": blocks.ROWS, "WIDTH": blocks.WIDTH},
        )  # fmt: skip
    yield Case(
        "dequantize_float8-bf16",
        float8.dequantize_float8_kernel,
        floats("bf16", "scale", "y") | {"codes": "*u8"} | sizes("count", "channels", "inner"),
        {"BLOCK": float8.BLOCK},
    )
    yield Case(
        "fake_quantize_float8-fp32",
        float8.fake_quantize_float8_kernel,
        floats("fp32", "x", "scale", "y") | sizes("count", "row"),
        {"EXACT": float8.EXACT, "BLOCK": float8.BLOCK},
    )
    for rows, dtype in ((16, "bf16"), (256, "fp16")):
        tiles = experts.tiles_for(rows)
        yield Case(
            f"expert_gemm-{rows}-{dtype}",
            experts.expert_gemm_kernel,
            floats(dtype, "x", "weight", "bias", "y")
            | dict.fromkeys(("order", "tile_expert", "tile_start", "tile_end"), "*i64")
            | sizes("n", "k", "x_stride", "expert_stride", "out_stride"),
            {"in_stride": 1, "HAS_BIAS": True, "PRECISION": "tf32"}
            | {"COMPUTE": tl.float16 if dtype == "fp16" else tl.bfloat16}
            | {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k},
            warps=tiles.warps,
            stages=tiles.stages,
        )
    rows, keys, warps = attention.tiles_for(256, 512)
    yield Case(
        "attention-bf16",
        attention.attention_kernel,
        floats("bf16", "q", "k", "v", "sinks", "y") | {"mask": "*u8"}
        | sizes("heads", "groups", "length", "keys", "width", "wide")
        | {"scale": "fp32", "softcap": "fp32"}
        | sizes("mask_batch", "mask_head", "mask_row"),
        {"mask_key": 1, "HAS_MASK": True, "IS_TRUTH": True, "HAS_CAP": True, "HAS_SINKS": True}
        | {"COMPUTE": tl.bfloat16, "M": rows, "N": keys, "D": 256, "W": 256},
        warps=warps,
    )  # fmt: skip
    yield from int8_cases()
    yield from lookup_cases()
    yield from scan_cases()
    yield from cache_cases()
    yield from dot_cases()
    yield from tile_cases()
    yield from adapter_cases()


def lookup_cases() -> Iterator[Case]:
    for name, bits in [("nf4", 4), ("dynamic", 8)]:
        yield Case(
            f"dequantize_table-{name}-fp16",
            table.dequantize_table_kernel,
            floats("fp16", "y") | floats("fp32", "scale", "levels") | {"codes": "*u8"}
            | sizes("count", "stored", "block"),
            {"BITS": bits, "BYTES": table.BYTES},
        )  # fmt: skip
    for bits, words in [(16, "*i16"), (12, "*u8")]:
        yield Case(
            f"dequantize_codebook-{bits}-fp16",
            codebook.dequantize_codebook_kernel,
            floats("fp16", "codebooks", "y") | {"indices": words}
            | sizes("vectors", "rows", "columns", "stride", "groups", "size"),
            {"BITS": bits, "WIDTH": 8, "PADDED": 8}
            | {"ROWS": codebook.ROWS, "COLUMNS": codebook.COLUMNS},
        )  # fmt: skip


def scan_cases() -> Iterator[Case]:
    """Selective scans with few states a channel, as in Mamba, and with as many as fit."""
    for states, dtype in [(16, "bf16"), (256, "fp32")]:
        channels, padded, warps = selective_scan.tiles_for(states)
        tile = {"CHUNK": selective_scan.CHUNK, "D": channels, "N": padded}
        walked = sizes("length", "width", "size", "chunks")
        yield Case(
            f"chunk_state-{states}-{dtype}",
            selective_scan.chunk_state_kernel,
            floats(dtype, "x", "delta", "a", "b") | floats("fp32", "states", "decays") | walked,
            tile,
            warps=warps,
        )
        yield Case(
            f"chunk_output-{states}-{dtype}",
            selective_scan.chunk_output_kernel,
            floats(dtype, "x", "delta", "a", "b", "c", "y") | floats("fp32", "starts") | walked,
            {"HAS_START": True, **tile},
            warps=warps,
        )
    yield Case(
        "carry_state-fp32",
        selective_scan.carry_state_kernel,
        floats("fp32", "states", "decays", "starts", "first", "last") | sizes("count", "chunks"),
        {"HAS_FIRST": True, "BLOCK": 512},
    )


def cache_cases() -> Iterator[Case]:
    """Attention over a cache: steps and prompts, floats and codes, whole rows and blocks."""
    walked = sizes("tokens", "shared", "width", "block", "columns")
    strides = sizes("row_stride", "head_stride", "token_stride")
    whole = {"lengths": "*i32", "table": "*i32"}
    for name, bits, rows, split, dtype in [
        ("step", 0, 3, 8, "bf16"), ("prompt", 0, 4096, 1, "bf16"), ("step", 8, 4, 8, "fp16"),
        ("prompt", 4, 4096, 1, "fp16"), ("step", 0, 3, 8, "fp32"),
    ]:  # fmt: skip
        codes = {0: dtype, 8: "i8", 4: "u8"}[bits]
        compute = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype]
        count, slots, warps = cached_attention.tiles_for(rows, 128, compute)
        paged, is_step = bits == 0, name == "step"
        yield Case(
            f"attend-{name}-{bits}-{dtype}",
            cached_attention.attend_kernel,
            floats(dtype, "q", "sinks", "y") | floats(codes, "keys", "values") | whole
            | floats("fp32", "key_scale", "value_scale", "partial", "tops", "sums")
            | walked | sizes("window", "groups") | strides | {"scale": "fp32", "softcap": "fp32"},
            {"BITS": bits, "KEY_TOKEN": False, "VALUE_TOKEN": bits > 0, "PAGED": paged}
            | {"WINDOW": is_step, "CAPPED": is_step, "HAS_SINK": is_step, "SPLIT": split}
            | {"COMPUTE": compute, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
            | {"ROWS": count, "SLOTS": slots, "DIM": 128},
            warps=warps,
            stages=2,
        )  # fmt: skip
    for bits, kind in [(0, "bf16"), (8, "i8"), (4, "u8")]:
        yield Case(
            f"append-{bits}-bf16",
            cached_attention.append_kernel,
            floats("bf16", "new") | floats(kind, "buffer") | floats("fp32", "scale") | whole
            | walked | strides,
            {"PAGED": True, "BITS": bits, "BY_TOKEN": bits == 8}
            | {"EXACT": cached_attention.EXACT, "DIM": 128},
            warps=1,
        )  # fmt: skip
    yield Case(
        "combine-bf16",
        cached_attention.combine_kernel,
        floats("fp32", "partial", "tops", "sums") | floats("bf16", "sinks", "y")
        | sizes("tokens", "groups", "shared", "width"),
        {"HAS_SINK": True, "SPLIT": 16, "DIM": 128},
    )  # fmt: skip
    yield Case(
        "quantize_cache-bf16",
        quantize_cache.quantize_cache_kernel,
        floats("bf16", "x", "y") | floats("fp32", "scale") | sizes("tokens", "heads", "width"),
        {"BITS": 8, "BY_TOKEN": False, "EXACT": cached_attention.EXACT, "DIM": 128},
        warps=1,
    )


def int8_cases() -> Iterator[Case]:
    epilogue = {"HAS_BIAS": True, "ACTIVATION": "silu"}
    yield Case(
        "int8_gemv-fp16",
        int8_linear.gemv_kernel,
        floats("fp16", "x", "scale", "bias", "y")
        | {"weight": "*i8"}
        | sizes("n", "k", "weight_stride"),
        epilogue | {"BLOCK_N": 4, "BLOCK_K": 1024},
        weights=4 * 1024,
    )
    for tokens, split, dtype in [(16, 4, "bf16"), (128, 1, "fp16"), (4096, 1, "bf16")]:
        tiles = int8_linear.tiles_for(tokens)
        blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k}
        compute = tl.float16 if dtype == "fp16" else tl.bfloat16
        yield Case(
            f"int8_gemm-{tokens}-{dtype}",
            int8_linear.gemm_kernel,
            floats(dtype, "x", "scale", "bias", "y")
            | {"weight": "*i8", "partial": "*fp32"}
            | sizes("m", "n", "k", "x_stride", "weight_stride"),
            epilogue
            | blocks
            | {"COMPUTE": compute, "PRECISION": "tf32", "SPLIT": split, "GROUP": 8},
            weights=tiles.block_n * tiles.block_k,
            warps=tiles.warps,
            stages=tiles.stages,
        )
    yield Case(
        "int8_reduce-bf16",
        int8_linear.reduce_kernel,
        floats("bf16", "scale", "bias", "y") | {"partial": "*fp32"} | sizes("m", "n"),
        {"HAS_BIAS": True, "ACTIVATION": "silu", "SPLIT": 4, "BLOCK": 512},
    )


REST = {"HAS_BIAS": True, "RANKS": 32, "HAS_ADDED": True, "ACTIVATION": "silu"}
"""A full epilogue."""


def rest(dtype: str) -> dict[str, str]:
    return floats(dtype, "x", "bias", "low", "b", "added", "y") | floats("fp32", "partial")


def dot_cases() -> Iterator[Case]:
    """Compressed weights and few tokens: bits, tokens, block, levels of a table."""
    for bits, tokens, block, levels in [
        (4, 1, 128, 0),
        (4, 2, 128, 0),
        (8, 1, 128, 0),
        (4, 1, 64, 1),
    ]:
        tiles = low_bit_linear.gemv_tiles(tokens, 14336, bits)[0]
        words, pieces = block * bits // 32, tiles.block_k // block
        yield Case(
            f"{'table' if levels else 'blocks'}_gemv-{bits}-{tokens}-bf16",
            low_bit.gemv_kernel,
            rest("bf16") | floats("fp32", "levels") | floats("bf16", "scale")
            | {"words": "*i32", "zero_point": "*u8"}
            | sizes("m", "n", "k", "pieces", "zero_bytes", "rank", "x_stride"),
            REST | {"repeat": 1, "TABLE": bool(levels), "BITS": bits, "HAS_ZERO": not levels}
            | {"SPLIT": 1, "TOKENS": tokens, "ROWS": tiles.block_n}
            | {"PIECES": pieces, "WORDS": words},
            weights=tiles.block_n * pieces * block,
            warps=tiles.warps,
        )  # fmt: skip
    yield Case(
        "codebook_gemv-12-fp16",
        codebook_linear.codebook_gemv_kernel,
        rest("fp16") | {"indices": "*u8", "codebooks": "*fp16"}
        | sizes("m", "n", "k", "vectors", "stride", "size", "rank", "x_stride"),
        REST | {"groups": 1, "BITS": 12, "WIDTH": 8, "PADDED": 8}
        | {"SPLIT": 1, "ROWS": 4, "COLUMNS": 128},
        weights=4 * 8 * 128,
    )  # fmt: skip
    yield Case(
        "sum_parts-bf16",
        epilogue.sum_parts_kernel,
        {name: kind for name, kind in rest("bf16").items() if name != "x"}
        | sizes("m", "n", "rank"),
        REST | {"SPLIT": 4, "BLOCK": epilogue.REDUCED},
    )


def tile_cases() -> Iterator[Case]:
    """Compressed weights and more tokens."""
    for tokens, bits, split, dtype in [
        (16, 4, 4, "bf16"), (128, 4, 1, "fp16"), (256, 4, 1, "bf16"), (16, 2, 4, "bf16"),
    ]:  # fmt: skip
        yield tile_case("blocks", tokens, bits, split, dtype)
    for tokens, split in [(16, 4), (128, 1)]:
        yield tile_case("table", tokens, 4, split, "bf16")


def adapter_cases() -> Iterator[Case]:
    """A float layer with an adapter, and a batch with an adapter for every sample."""
    for tokens, split, dtype in [(16, 4, "bf16"), (128, 1, "fp16"), (256, 1, "bf16")]:
        tiles = adapted_linear.tiles_for(tokens)
        yield Case(
            f"adapted_gemm-{tokens}-{dtype}",
            adapted_linear.gemm_kernel,
            rest(dtype) | floats(dtype, "weight")
            | sizes("m", "n", "k", "rank", "x_stride", "weight_stride"),
            REST | {"COMPUTE": tl.float16 if dtype == "fp16" else tl.bfloat16}
            | {"PRECISION": "tf32", "SPLIT": split, "GROUP": 8}
            | {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k},
            warps=tiles.warps,
            stages=tiles.stages,
        )  # fmt: skip
    for tokens, rank in [(1, 16), (128, 64)]:
        count, ranks = routed_low_rank.tiles_for(tokens, rank)
        same = {"COMPUTE": tl.bfloat16, "PRECISION": "tf32", "TOKENS": count, "RANKS": ranks}
        common = {"which": "*i64", "low": "*fp32"} | sizes("tokens", "rank", "adapters")
        yield Case(
            f"to_rank-{tokens}-{rank}-bf16",
            routed_low_rank.to_rank_kernel,
            floats("bf16", "x", "a") | common | sizes("k"),
            same | {"BLOCK_K": routed_low_rank.BLOCK_K},
        )
        yield Case(
            f"from_rank-{tokens}-{rank}-bf16",
            routed_low_rank.from_rank_kernel,
            floats("bf16", "b", "added", "y") | common | sizes("n"),
            same | {"BLOCK_N": routed_low_rank.BLOCK_N},
        )


def tile_case(form: str, tokens: int, bits: int, split: int, dtype: str) -> Case:
    tiles = low_bit_linear.gemm_tiles(tokens)[0]
    piece = 128 if form == "blocks" else 64
    block_k = min(tiles.block_k, piece)
    return Case(
        f"{form}_gemm-{tokens}-{bits}-{dtype}",
        low_bit.gemm_kernel,
        rest(dtype) | floats(dtype, "scale") | {"codes": "*u8", "zero_point": "*u8"}
        | sizes("m", "n", "k", "pieces", "row_bytes", "zero_bytes", "rank", "x_stride"),
        REST | {"repeat": 1, "LEVELS": NF4 if form == "table" else (), "BITS": bits}
        | {"HAS_ZERO": form == "blocks", "PIECE": piece, "SPLIT": split, "GROUP": 8}
        | {"COMPUTE": tl.float16 if dtype == "fp16" else tl.bfloat16, "PRECISION": "tf32"}
        | {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": block_k},
        weights=tiles.block_n * block_k,
        warps=tiles.warps,
        stages=tiles.stages,
    )  # fmt: skip


def build(case: Case, capability: int) -> Any:
    """Compile with the divisibility hints that a launch on ordinary sizes would give."""
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types[n] for n in names}
    aligned = [
        (names.index(name),) for name, kind in case.types.items() if kind[0] == "*" or kind == "i32"
    ]
    source = ASTSource(
        case.kernel, signature, case.constants, {k: [["tt.divisibility", 16]] for k in aligned}
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def disassemble(cubin: bytes) -> str:
    """Resource usage and machine code of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loop_body(sass: str) -> list[str]:
    """Instructions of the largest loop: between a branch backwards and its target."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", sass)
    place = {int(address, 16): index for index, (address, _) in enumerate(code)}
    loops = []
    for index, (address, text) in enumerate(code):
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < int(address, 16):
            loops.append([line for _, line in code[place[int(jump[1], 16)] : index + 1]])
    return max(loops, key=len, default=[])


def describe(case: Case, capability: int) -> dict[str, Any]:
    compiled = build(case, capability)
    sass = disassemble(compiled.asm["cubin"])
    body = loop_body(sass)
    ptx = compiled.asm["ptx"]
    return {
        "name": case.name,
        "kernel": case.kernel.__name__,
        "capability": capability,
        "registers": int(re.search(r"REG:(\d+)", sass)[1]),  # type: ignore[index]
        "stack": int(re.search(r"STACK:(\d+)", sass)[1]),  # type: ignore[index]
        "shared": compiled.metadata.shared,
        "loop": len(body),
        "loop_spills": sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in body),
        "per_weight": len(body) * 32 * case.warps / case.weights if case.weights else None,
        "vector_loads": len(
            re.findall(r"ld\.global\S*\.v[248]|cp\.async\S* .*?, 0x10|, 16[,;]", ptx)
        ),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"mma\.sync", ptx)),
        "flushes": ptx.count(".ftz"),
    }


if __name__ == "__main__":
    wanted = [c for c in cases() if c.name.startswith(tuple(sys.argv[1:]) or "")]
    sys.stdout.write(json.dumps([describe(case, target) for case in wanted for target in TARGETS]))
