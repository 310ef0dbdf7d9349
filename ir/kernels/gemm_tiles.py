"""Parts shared by the tiled products: a program's tile, the division of k, the precision."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from graphwright.ir.kernels.tuning import Tiles

PROGRAMS = 264
"""Two for every multiprocessor of an H100."""


@triton.jit
def tile_of_program(
    m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Rows and channels of this program's tile.

    GROUP row blocks at a time walk along n together, so that their weights come from L2.
    """
    blocks_m, blocks_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * blocks_n)
    height = min(blocks_m - group * GROUP, GROUP)
    block_m = group * GROUP + program % (GROUP * blocks_n) % height
    block_n = program % (GROUP * blocks_n) // height
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, channel


def grid_of(m: int, n: int, tiles: Tiles, split: int) -> tuple[int, int]:
    """A program for every tile and part of the inner dimension."""
    return triton.cdiv(m, tiles.block_m) * triton.cdiv(n, tiles.block_n), split


def split_for(m: int, n: int, k: int, tiles: Tiles) -> int:
    """Parts of the inner dimension, so that about two programs per multiprocessor are running."""
    programs, _ = grid_of(m, n, tiles, 1)
    most = max(1, triton.cdiv(k, tiles.block_k) // 4)
    return int(max(1, min(PROGRAMS // programs, most, 8)))


def sums_for(m: int, n: int, split: int, device: torch.device) -> Tensor:
    """Room for the float32 sums of the parts; a placeholder where there is one part."""
    return torch.empty((split, m, n) if split > 1 else (1,), device=device)


def precision() -> str:
    """Of float32 products, as torch is set."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def compute_type(x: Tensor) -> tl.dtype:
    """The precision of the multiplication, for inputs like `x`."""
    if x.dtype == torch.float16:
        return tl.float16
    # the interpreter (the only way a CPU tensor gets here) multiplies bfloat16 bit patterns
    return tl.bfloat16 if x.dtype == torch.bfloat16 and x.is_cuda else tl.float32
