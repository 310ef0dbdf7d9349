"""Elementwise operators: functions, mixed dtypes, rounding modes, forms that write in place."""

from __future__ import annotations

import torch
from sweep.cases import Theme, bools, ints, positive, real, signed, ties, tiny, unit
from torch.nn import functional as F

unary = Theme("unary")
unary.functions(
    {
        "abs": torch.abs,
        "atan": torch.atan,
        "asinh": torch.asinh,
        "ceil": torch.ceil,
        "cos": torch.cos,
        "cosh": torch.cosh,
        "erf": torch.erf,
        "erfc": torch.erfc,
        "exp2": torch.exp2,
        "floor": torch.floor,
        "frac": torch.frac,
        "trunc": torch.trunc,
        "sgn": torch.sgn,
        "signbit": torch.signbit,
        "sinc": torch.sinc,
        "sinh": torch.sinh,
        "square": torch.square,
        "deg2rad": torch.deg2rad,
        "rad2deg": torch.rad2deg,
        "round to one decimal": lambda x: torch.round(x, decimals=1),
        "round to tens": lambda x: torch.round(x * 40, decimals=-1),
        "isfinite of a quotient": lambda x: torch.isfinite(x / (x > 0)),
        "isinf of a quotient": lambda x: torch.isinf(x / (x > 0)) | torch.isposinf(x / (x > 0)),
        "isneginf of a quotient": lambda x: torch.isneginf(x / (x > 0)),
        "nan_to_num of a quotient": lambda x: torch.nan_to_num((x > 0) / (x > 1), 0.5, 2.0),
        "nan_to_num with bounds": lambda x: torch.nan_to_num(x / (x > 0), 1.0, 9.0, -9.0),
    },
    x=real("n", 5),
)
unary.functions(
    {
        "acos": torch.acos,
        "asin": torch.asin,
        "atanh": torch.atanh,
        "erfinv": torch.erfinv,
        "logit": lambda x: torch.logit(x * 0.5 + 0.5),
        "logit with eps": lambda x: torch.logit(x, eps=0.1),
        "special.entr": torch.special.entr,
    },
    x=unit("n", 5),
)
unary.functions(
    {
        "log": torch.log,
        "log2": torch.log2,
        "log10": torch.log10,
        "log1p": torch.log1p,
        "rsqrt": torch.rsqrt,
        "sqrt": torch.sqrt,
        "reciprocal": torch.reciprocal,
        "lgamma": torch.lgamma,
        "digamma": torch.digamma,
        "i0": torch.i0,
        "acosh": lambda x: torch.acosh(x + 1),
    },
    x=positive("n", 5),
)
unary.functions(
    {
        "log1p near zero": torch.log1p,
        "expm1 near zero": torch.expm1,
        "sinh near zero": torch.sinh,
        "tanh near zero": torch.tanh,
        "asinh near zero": torch.asinh,
        "atanh near zero": torch.atanh,
    },
    x=tiny("n", 5),
)
unary.functions(
    {
        "sigmoid of integers": torch.sigmoid,
        "reciprocal of integers": lambda x: torch.reciprocal(x + 10),
        "abs of integers": torch.abs,
        "sign of integers": torch.sign,
        "bitwise_not of integers": torch.bitwise_not,
        "exp of integers": torch.exp,
        "square of integers": torch.square,
        "relu of integers": torch.relu,
        "clamp of integers": lambda x: x.clamp(-2, 3),
        "clamp of integers by a float": lambda x: x.clamp(max=2.5),
        "neg of integers": torch.neg,
    },
    x=signed(8, "n", 5),
)
unary.function("sqrt of integers", torch.sqrt, x=ints(50, "n", 5))

binary = Theme("binary")
binary.functions(
    {
        "atan2": lambda x, y: torch.atan2(x, y),
        "hypot": torch.hypot,
        "copysign": torch.copysign,
        "fmod": lambda x, y: torch.fmod(x * 4, y + 2),
        "fmod with negative divisor": lambda x, y: torch.fmod(x * 4, y.sign() * 0.75),
        "remainder": lambda x, y: torch.remainder(x * 4, y.sign() * 0.75),
        "remainder of a number": lambda x, y: torch.remainder(2.0, y.sign() * 0.75) + x,
        "floor_divide": lambda x, y: torch.floor_divide(x * 4, y.sign() * 0.75),
        "div with trunc": lambda x, y: torch.div(x * 4, y.sign() * 0.75, rounding_mode="trunc"),
        "div with floor": lambda x, y: torch.div(x * 4, y.sign() * 0.75, rounding_mode="floor"),
        "logaddexp": torch.logaddexp,
        "logaddexp2": torch.logaddexp2,
        "fmax and fmin": lambda x, y: torch.fmax(x, y) - torch.fmin(x, y),
        "fmax of NaN": lambda x, y: torch.fmax(x.sqrt(), y),
        "maximum of NaN": lambda x, y: torch.maximum(x.sqrt(), y),
        "heaviside": torch.heaviside,
        "add with alpha": lambda x, y: torch.add(x, y, alpha=0.5),
        "rsub with alpha": lambda x, y: torch.rsub(x, y, alpha=3),
        "lerp by a tensor": lambda x, y: torch.lerp(x, y, y),
        "addcmul": lambda x, y: torch.addcmul(x, y, x, value=0.3),
        "addcdiv": lambda x, y: torch.addcdiv(x, x, y.abs() + 1, value=0.3),
        "clamp by tensors": lambda x, y: torch.clamp(x, min=y, max=y + 0.5),
        "clamp between number and tensor": lambda x, y: torch.clamp(x, max=y).clamp(min=-0.5),
        "where": lambda x, y: torch.where(x > y, x, y * 2),
        "where with a number": lambda x, y: torch.where(x > y, 1.5, y),
        "where with two numbers": lambda x, y: torch.where(x > y, 1, 0) + x,
        "isclose": lambda x, y: torch.isclose(x, x + y * 1e-5),
        "ldexp": lambda x, y: torch.ldexp(x, (y * 3).round().int()),
        "dist": lambda x, y: torch.dist(x, y) + x,
        "xlogy": lambda x, y: torch.xlogy(x, y.abs() + 0.1),
        "pow of tensors": lambda x, y: torch.pow(x.abs() + 0.1, y),
        "float_power": lambda x, y: torch.float_power(x, 3).float() + y,
        "float_power of tensors": lambda x, y: torch.float_power(x.abs() + 0.1, y),
        "pow of a number": lambda x, y: torch.pow(2.0, x) + y,
        "pow with a negative exponent": lambda x, y: (x.abs() + 0.5) ** -1.5 + y,
        "broadcast of outer shapes": lambda x, y: x[:, None] * y[None],
    },
    x=real("n", 5),
    y=real("n", 5),
)
binary.functions(
    {
        "floor_divide of integers": lambda x, y: x // (y * 2 - 1),
        "remainder of integers": lambda x, y: x % (y * 2 - 1),
        "fmod of integers": lambda x, y: torch.fmod(x, y * 2 - 1),
        "div of integers with trunc": lambda x, y: torch.div(x, y + 1, rounding_mode="trunc"),
        "div of integers": lambda x, y: x / (y + 1),
        "pow of integers": lambda x, y: x**y,
        "pow of an integer by a float": lambda x, y: (x + 9) ** 0.5 + y,
        "bitwise and, or, xor": lambda x, y: (x & y) + (x | 3) + (x ^ y),
        "bitwise_left_shift": lambda x, y: (y << 2) + x,
        "bitwise_right_shift": lambda x, y: (y * 9 >> 1) + x,
        "gcd": torch.gcd,
        "integers times a float": lambda x, y: x * 0.5 + y,
        "integers plus a true value": lambda x, y: x + (y > 1),
        "maximum of integer and float": lambda x, y: torch.maximum(x, y * 0.5),
        "int32 times int64": lambda x, y: x.int() * y,
        "add of int32 and a float": lambda x, y: x.int() + 1.5 + y,
        "comparison across dtypes": lambda x, y: (x < y * 0.7) | (x.int() == y),
        "logical_and of integers": lambda x, y: torch.logical_and(x, y),
        "logical_xor of integers": lambda x, y: torch.logical_xor(x, y),
        "uint8 wraps around": lambda x, y: (x.to(torch.uint8) + y.to(torch.uint8)) * 40,
        "int8 wraps around": lambda x, y: (x.to(torch.int8) * 30) + y.to(torch.int8),
        "float to int truncates": lambda x, y: (x * 0.7).to(torch.int64) - (y * 0.6).int(),
        "float to bool": lambda x, y: (x * 0.5).bool() ^ y.bool(),
    },
    x=signed(9, "n", 5),
    y=ints(4, "n", 5),
)
binary.functions(
    {
        "bool times float": lambda x, y: x * y,
        "sub of bool and float": lambda x, y: y - x.float() + ~x,
        "sum of bools": lambda x, y: (x + (y > 0)).float() + x.sum(),
        "where over a bool mask": lambda x, y: y.masked_fill(x, -1.5) + y.masked_fill(~x, 0.0),
        "masked_fill with a tensor": lambda x, y: y.masked_fill(x, y.max()),
        "masked_select sum": lambda x, y: torch.masked_select(y, x).sum() + y,
        "eq of bools": lambda x, y: (x == (y > 0)) & (x != (y > 1)),
    },
    x=bools("n", 5),
    y=real("n", 5),
)

activations = Theme("activations")
activations.functions(
    {
        "celu": F.celu,
        "celu with alpha": lambda x: F.celu(x, alpha=0.3),
        "elu with alpha": lambda x: F.elu(x, alpha=0.7),
        "selu": F.selu,
        "gelu": F.gelu,
        "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
        "glu": lambda x: F.glu(x, dim=-1),
        "hardshrink": F.hardshrink,
        "softshrink": lambda x: F.softshrink(x, 0.2),
        "tanhshrink": F.tanhshrink,
        "hardsigmoid": F.hardsigmoid,
        "hardswish": lambda x: F.hardswish(x * 3),
        "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7),
        "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
        "logsigmoid": lambda x: F.logsigmoid(x * 20),
        "mish": F.mish,
        "relu6": lambda x: F.relu6(x * 5),
        "rrelu": F.rrelu,
        "silu": F.silu,
        "softplus": lambda x: F.softplus(x * 20, beta=2, threshold=5),
        "softsign": F.softsign,
        "softmin": lambda x: F.softmin(x, dim=0),
        "softmax over the free axis": lambda x: F.softmax(x * 50, dim=0),
        "log_softmax": lambda x: F.log_softmax(x * 50, dim=1),
        "softmax to float64": lambda x: F.softmax(x, dim=1, dtype=torch.float64),
        "threshold": lambda x: F.threshold(x, 0.1, -20.0),
        "normalize": lambda x: F.normalize(x, p=3, dim=1),
        "cosine_similarity": lambda x: F.cosine_similarity(x, x.flip(0), dim=1),
        "pairwise_distance": lambda x: F.pairwise_distance(x, x.flip(0)),
        "multi_margin": lambda x: F.multi_margin_loss(x, torch.zeros(x.shape[0]).long()),
        "smooth_l1_loss": lambda x: F.smooth_l1_loss(x, x.flip(0)),
        "kl_div": lambda x: F.kl_div(F.log_softmax(x, 1), F.softmax(x.roll(1, 1), 1)),
        "cross_entropy": lambda x: F.cross_entropy(x, torch.zeros(x.shape[0]).long()),
        "binary_cross_entropy": lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).float()),
    },
    x=real("n", 6),
)

in_place = Theme("in place")
in_place.functions(
    {
        "pow_": lambda x: x.clone().pow_(2),
        "pow_ by a tensor": lambda x: x.abs().pow_(x),
        "float_power_": lambda x: x.double().float_power_(2),
        "add_ with alpha": lambda x: x.clone().add_(x, alpha=2),
        "div_ with floor": lambda x: (x * 3).div_(0.7, rounding_mode="floor"),
        "clamp_": lambda x: x.clone().clamp_(-0.3, 0.4),
        "fill_ of a slice": lambda x: _written(x, lambda y: y[:, 1:3].fill_(2.0)),
        "mul_ of every second": lambda x: _written(x, lambda y: y[:, ::2].mul_(3)),
        "copy_ into a column": lambda x: _written(x, lambda y: y[:, 0].copy_(x[:, 1])),
        "add_ to a row of a free axis": lambda x: _written(x, lambda y: y[0].add_(1)),
        "assignment by a mask": lambda x: _set(x, x > 0, 0.5),
        "assignment by a mask of a tensor": lambda x: _set(x, x > 0, x.max()),
        "assignment by an index list": lambda x: _set(x, (slice(None), [0, 2]), -1.0),
        "assignment by an index tensor": lambda x: _set(
            x, (slice(None), torch.tensor([3, 1])), x[:, :2]
        ),
        "assignment to the last row": lambda x: _set(x, -1, 7.0),
        "index_put_ that adds": lambda x: x.clone().index_put_(
            (torch.tensor([0, 0]),), x[:1].expand(2, -1), accumulate=True
        ),
        "index_add_": lambda x: x.clone().index_add_(1, torch.tensor([0, 0, 2]), x[:, :3]),
        "index_copy_": lambda x: x.clone().index_copy_(1, torch.tensor([4, 0]), x[:, 1:3]),
        "index_fill_": lambda x: x.clone().index_fill_(1, torch.tensor([4, 0]), 9.0),
        "scatter_": lambda x: x.clone().scatter_(1, x.argsort(dim=1, stable=True), x * 2),
        "masked_scatter_": lambda x: x.clone().masked_scatter_(x > 0, x.flip(1)),
        "masked_fill_": lambda x: x.clone().masked_fill_(x > 0, float("-inf")),
        "unsqueeze_ and transpose_": lambda x: (x + 1).unsqueeze_(0).transpose_(0, 1),
        "squeeze_": lambda x: (x[:, None] + 1).squeeze_(1),
        "tril_": lambda x: x.clone().tril_(-1),
        "zero_ of a view": lambda x: _written(x, lambda y: y.view(-1)[::5].zero_()),
        "relu_ of a shared value": lambda x: (lambda y: y.relu_() + y)(x + 1),
        "sigmoid_, neg_, exp_": lambda x: x.clone().sigmoid_().neg_().exp_(),
        "lerp_ and addcmul_": lambda x: x.clone().lerp_(x * 2, 0.3).addcmul_(x, x, value=-1),
        "swap of two columns": lambda x: _swapped(x),
        "diagonal written to": lambda x: _written(
            x[:, :, None] * x[:, None], lambda y: y.diagonal(dim1=1, dim2=2).fill_(0)
        ),
        "loop that writes rows": lambda x: _written(
            x, lambda y: [y[:, i].mul_(i) for i in range(x.shape[1])]
        ),
        "logical_not_ of a comparison": lambda x: (x > 0).logical_not_(),
        "out argument": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    },
    x=real("n", 5),
)
in_place.function(
    "pow_ of integers", lambda x: x.clone().pow_(2), x=signed(9, "n", 5), blames=("pow",)
)
in_place.function("floor_divide_ of ties", lambda x: x.clone().floor_divide_(2), x=ties("n", 5))


def _written(x: torch.Tensor, write: object) -> torch.Tensor:
    y = x.clone()
    write(y)  # type: ignore[operator]
    return y


def _set(x: torch.Tensor, where: object, value: object) -> torch.Tensor:
    y = x.clone()
    y[where] = value  # type: ignore[index]
    return y


def _swapped(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 0], y[:, 1] = x[:, 1], x[:, 0]
    return y


THEMES = (unary, binary, activations, in_place)
