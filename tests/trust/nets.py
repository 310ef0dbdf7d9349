"""Small nets of many styles that no pass was written for, with the data that chains look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphwright as gw


@dataclass(frozen=True)
class Net:
    """A builder and how its one input is drawn.

    Attributes:
        make: builds the module.
        shape: of one sample; 0 is a free length.
        vocabulary: of token ids; 0 for standard normal numbers.
        length: example length where one is free.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int = 0
    length: int = 6

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` samples."""
        shape = [count, *(n or self.length for n in self.shape)]
        if self.vocabulary:
            return torch.randint(0, self.vocabulary, shape, generator=generator)
        return torch.randn(shape, generator=generator)

    def program(self, seed: int = 0) -> gw.Program:
        """The net with seeded weights and moved batch norms, traced with free sizes."""
        torch.manual_seed(seed)
        module = self.make().eval()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.5, 2.0)
        dims = {0: "batch"} | {i + 1: "length" for i, n in enumerate(self.shape) if not n}
        x = self.draw(3, torch.Generator().manual_seed(seed))
        ranges = {"x": (0, self.vocabulary)} if self.vocabulary else {}
        return gw.trace(module, {"x": x}, dynamic={"x": dims}, ranges=ranges)

    def write_data(self, path: Path, program: gw.Program, samples: int = 12) -> None:
        """Samples, and as labels what the program itself says."""
        x = self.draw(samples, torch.Generator().manual_seed(1))
        with torch.no_grad():
            labels = program.run_flat((x,))[0].argmax(-1)
        np.savez(path, x=x.numpy(), labels=labels.numpy())


NETS: dict[str, Net] = {}


def net(*shape: int, vocabulary: int = 0) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Adds a module class to the table."""

    def add(cls: type[nn.Module]) -> type[nn.Module]:
        NETS[cls.__name__] = Net(cls, shape, vocabulary)
        return cls

    return add


@net(16)
class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(F.relu(self.a(x)))))


@net(3, 8, 8)
class ResidualConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.last, self.head = nn.BatchNorm2d(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.last(self.b(F.relu(self.a(x))))
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


@net(4, 8, 8)
class Mobile(nn.Module):
    """Depthwise and grouped convolutions, a gate of its own, hard activations."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.deep = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.mixed, self.norm = nn.Conv2d(16, 16, 1, groups=2), nn.BatchNorm2d(16)
        self.gate, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16 * 4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.mixed(F.relu6(self.deep(F.relu(self.up(x)))))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(F.avg_pool2d(x, 4).flatten(1))


@net(0, 16)
class Attention(nn.Module):
    """Pre-norm attention and a gated product over a free length."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.up, self.gate, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(x.mean(1))


@net(0, vocabulary=50)
class Language(nn.Module):
    """Token ids, a tied head, RMS norms by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.scale = nn.Parameter(torch.rand(16) + 0.5)
        self.q, self.o = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = self.q(self.norm(h)).chunk(3, -1)
        h = h + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        h = h + self.down(F.gelu(self.up(self.norm(h)), approximate="tanh"))
        return F.linear(self.norm(h), self.embed.weight)


@net(16)
class TwoHeads(nn.Module):
    """Outputs of very different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.a(x))
        return {"logits": 100 * self.wide(h), "score": 1e-3 * self.narrow(h)}


@net(2, 16)
class Signal(nn.Module):
    """One-dimensional, transposed and strided, with skips by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 16, 4, 2, 1)
        self.c, self.norm = nn.ConvTranspose1d(16, 8, 4, 2, 1), nn.BatchNorm1d(8)
        self.d = nn.Conv1d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.leaky_relu(self.a(x), 0.1)
        x = F.leaky_relu(self.norm(self.c(F.elu(self.b(skip)))), 0.1)
        return self.d(torch.cat([x, skip], 1)).amax(-1)
