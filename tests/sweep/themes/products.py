"""Padding, matrix products and einsum, complex numbers and Fourier transforms."""

from __future__ import annotations

import torch
from sweep.cases import Theme, With, ints, real
from torch import Tensor, nn
from torch.nn import functional as F

pads = Theme("padding")
IMAGE = real("b", 2, "h", "w")
for _name, _function in {
    "constant": lambda x: F.pad(x, (1, 2), value=3.0),
    "constant of two axes": lambda x: F.pad(x, (1, 2, 0, 3), value=-1.0),
    "constant of all axes": lambda x: F.pad(x, (1, 0, 0, 1, 2, 2, 1, 1)),
    "constant, cropping": lambda x: F.pad(x, (-1, -2)),
    "constant, cropping and growing": lambda x: F.pad(x, (-1, 2, 3, -1), value=2.0),
    "constant of minus infinity": lambda x: F.pad(x, (1, 1), value=float("-inf")),
    "constant of integers": lambda x: F.pad((x * 5).long(), (1, 1), value=7),
    "constant of bools": lambda x: F.pad(x > 0, (1, 1), value=True),
    "reflect": lambda x: F.pad(x, (2, 1, 1, 2), mode="reflect"),
    "reflect of three axes": lambda x: F.pad(x[:, None], (1, 1, 1, 1, 1, 1), mode="reflect"),
    "replicate": lambda x: F.pad(x, (2, 1, 0, 4), mode="replicate"),
    "replicate, cropping": lambda x: F.pad(x, (-1, 2, 1, -1), mode="replicate"),
    "circular": lambda x: F.pad(x, (2, 1, 1, 3), mode="circular"),
    "circular of one axis": lambda x: F.pad(x[:, 0], (2, 2), mode="circular"),
    "zero pad before max pool": lambda x: F.max_pool2d(F.pad(x - 5, (1, 1, 1, 1)), 3, 2),
    "zero pad before average pool": lambda x: F.avg_pool2d(F.pad(x, (0, 1, 1, 0)), 3, 1),
}.items():
    pads.function(_name, _function, x=IMAGE, blames=("pad",))

products = Theme("products")
products.functions(
    {
        "matmul with a vector": lambda x, y: x @ y[0],
        "matmul of a vector": lambda x, y: y[0] @ x.mT,
        "matmul, batched and broadcast": lambda x, y: x[:, None] @ y.mT[None, None],
        "bmm": lambda x, y: torch.bmm(x, x.mT),
        "addmm": lambda x, y: torch.addmm(x[:, 0, :2], x[:, 1], y.T[:, :2], beta=0.5, alpha=2),
        "addbmm": lambda x, y: torch.addbmm(y[:3, :3], x, x.mT, beta=0.5),
        "baddbmm": lambda x, y: torch.baddbmm(y[:3, :3], x, x.mT, beta=0.5, alpha=2),
        "addmv": lambda x, y: torch.addmv(x[:, 0, 0], x[:, 0], y[0]),
        "addr": lambda x, y: torch.addr(x[:, 0, :4], x[:, 0, 0], y[:, 0]),
        "dot": lambda x, y: torch.dot(y[0], y[1]) + x,
        "vdot and inner": lambda x, y: torch.vdot(y[0], y[1]) + torch.inner(x, y),
        "tensordot": lambda x, y: torch.tensordot(x, y, ([2], [1])),
        "chain_matmul": lambda x, y: torch.linalg.multi_dot([x[:, 0], y.T, y]),
        "einsum of a product": lambda x, y: torch.einsum("b i d, k d -> b i k", x, y),
        "einsum of a trace": lambda x, y: torch.einsum("bii->b", x[..., :3]),
        "einsum of a diagonal": lambda x, y: torch.einsum("bii->bi", x[..., :3]),
        "einsum with ellipsis": lambda x, y: torch.einsum("...d,kd->...k", x, y),
        "einsum without output": lambda x, y: torch.einsum("bid,kd", x, y),
        "einsum of capitals": lambda x, y: torch.einsum("Bid,Kd->KB", x, y),
        "einsum of three": lambda x, y: torch.einsum("bid,kd,bjd->bijk", x, y, x),
        "einsum of one": lambda x, y: torch.einsum("bid->dbi", x) + y[0, 0],
        "einsum with a sum": lambda x, y: torch.einsum("bid->b", x) * y.sum(),
        "bilinear form": lambda x, y: F.bilinear(x, x, y.repeat(5, 2)[None, :5, :5]),
        "matrix_power": lambda x, y: torch.matrix_power(x[..., :3], 3),
        "cumulative product of matrices": lambda x, y: (x @ x.mT) @ (x @ x.mT),
        "softmax of scores": lambda x, y: (x @ x.mT / 5**0.5).softmax(-1) @ x,
    },
    x=real("n", 3, 5),
    y=real(4, 5),
)
products.module(
    "einsum of integers with floats",
    lambda: With(
        lambda m, x: x + torch.einsum("i,j->ij", torch.arange(3), m.f).sum(), f=torch.rand(4)
    ),
    blames=("einsum",),
)
products.module(
    "einsum of positions with frequencies",
    lambda: With(
        lambda m, x: x + torch.einsum("i,j->ij", torch.arange(x.shape[0]), m.f), f=torch.rand(5)
    ),
    blames=("einsum",),
)
products.function(
    "einsum of integers", lambda x: torch.einsum("ni,mi->nm", x, x), x=ints(9, "n", 5)
)
products.function("matmul of integers", lambda x: x @ x.T, x=ints(9, "n", 5))
products.function("outer of mixed dtypes", lambda x: torch.outer(x[:, 0], x[:, 1] * 0.5),
                  x=ints(9, "n", 5))  # fmt: skip


def _paired(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(x.shape[0], -1, 2).contiguous())


def _rotary(x: Tensor) -> Tensor:
    t = torch.arange(x.shape[0], dtype=torch.float32)
    turns = torch.polar(torch.ones(x.shape[0], 4), torch.outer(t, torch.full((4,), 0.3)))
    return torch.view_as_real(_paired(x) * turns).flatten(1)


complexes = Theme("complex")
complexes.functions(
    {
        "view_as_complex after contiguous": lambda x: torch.view_as_real(_paired(x) * _paired(x)),
        "view_as_complex of a slice": lambda x: torch.view_as_real(_paired(x[:, 2:6])).sum(-1),
        "angle": lambda x: torch.angle(_paired(x)),
        "angle of reals": lambda x: torch.angle(x),
        "abs": lambda x: _paired(x).abs(),
        "conj": lambda x: torch.view_as_real(_paired(x).conj() * _paired(x)),
        "real and imag": lambda x: _paired(x).real - _paired(x).imag,
        "exp": lambda x: torch.view_as_real(torch.exp(_paired(x))),
        "quotient": lambda x: torch.view_as_real(_paired(x) / (_paired(x) + 3)),
        "times a number": lambda x: torch.view_as_real(_paired(x) * 1j + 2.0),
        "polar": lambda x: torch.view_as_real(torch.polar(x.abs(), x)),
        "complex": lambda x: torch.view_as_real(torch.complex(x, x * 2)),
        "sum and mean": lambda x: torch.view_as_real(_paired(x).sum(1) + _paired(x).mean(1)),
        "matmul": lambda x: torch.view_as_real(_paired(x) @ _paired(x).T),
        "cat and reshape": lambda x: torch.view_as_real(
            torch.cat([_paired(x)] * 2, 1).reshape(-1, 4)
        ),
        "rotary positions": _rotary,
        "fft": lambda x: torch.view_as_real(torch.fft.fft(x)),
        "fft and ifft": lambda x: torch.fft.ifft(torch.fft.fft(x)).real,
        "rfft": lambda x: torch.fft.rfft(x).abs(),
        "rfft of the free axis": lambda x: torch.fft.rfft(x, dim=0).abs(),
        "rfft to another length": lambda x: torch.fft.rfft(x, n=12).abs(),
        "rfft, orthonormal": lambda x: torch.fft.rfft(x, norm="ortho").abs(),
        "irfft": lambda x: torch.fft.irfft(torch.fft.rfft(x)),
        "irfft of a slice": lambda x: torch.fft.irfft(torch.fft.rfft(x)[:, :3], n=8),
        "rfft2": lambda x: torch.fft.rfft2(x[:, None].expand(-1, 3, -1)).abs(),
        "fft2 mixing": lambda x: torch.fft.fft2(x[:, None] * torch.ones(3, 1)).real,
        "fft2 over tokens and channels": lambda x: torch.fft.fft(torch.fft.fft(x), dim=0).real,
        "fftshift": lambda x: torch.fft.fftshift(x, dim=1),
        "fftfreq": lambda x: x * torch.fft.fftfreq(8),
        "hann_window": lambda x: x * torch.hann_window(8),
    },
    x=real("n", 8),
)
complexes.function(
    "stft",
    lambda x: torch.view_as_real(
        torch.stft(x, 16, 4, window=torch.hann_window(16), return_complex=True)
    ),
    x=real("b", "s"),
    sizes={"s": (64, 65, 80, 128, 251, 40)},
)
complexes.function(
    "stft without centring",
    lambda x: torch.stft(
        x, 16, 4, window=torch.hann_window(16), center=False, return_complex=True
    ).abs(),
    x=real("b", "s"),
    sizes={"s": (64, 65, 80, 128, 251, 17)},
    blames=("stft",),
)
complexes.function(
    "istft",
    lambda x: torch.istft(
        torch.stft(x, 16, 4, window=torch.hann_window(16), return_complex=True),
        16,
        4,
        window=torch.hann_window(16),
    ),
    x=real("b", "s"),
    sizes={"s": (64, 65, 80, 128, 251, 40)},
)
complexes.function(
    "istft of a masked spectrum",
    lambda x: _masked_spectrum(x),
    x=real("b", "s"),
    sizes={"s": (64, 68, 80, 128, 252, 40)},
    blames=("istft",),
)


def _masked_spectrum(x: Tensor) -> Tensor:
    window = torch.hann_window(16)
    spectrum = torch.stft(x, 16, 4, window=window, return_complex=True)
    mask = torch.sigmoid(spectrum.abs())
    return torch.istft(spectrum * mask, 16, 4, window=window, length=x.shape[-1])


class SpectralConv(nn.Module):
    """The layer of a Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5, 2))

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(x)[..., :5]
        mixed = torch.einsum("bim,iom->bom", modes, torch.view_as_complex(self.weight))
        return torch.fft.irfft(F.pad(mixed, (0, x.shape[-1] // 2 + 1 - 5)), n=x.shape[-1])


complexes.module("rfft in a Fourier neural operator", SpectralConv, x=real("b", 3, 16),
                 blames=("einsum", "fft"))  # fmt: skip
complexes.module(
    "rfft in a Fourier neural operator of free length", SpectralConv, x=real("b", 3, "s"),
    sizes={"s": (16, 18, 20, 32, 66, 10)}, blames=("einsum", "fft"),
)  # fmt: skip

THEMES = (pads, products, complexes)
