"""Published networks at their full depth and a narrow width, in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {}
"""Builder and input shape by name."""


def family(name: str, *shape: int) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def add(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        FAMILIES[name] = (make, shape)
        return make

    return add


def conv_bn(
    a: int, b: int, k: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    conv = nn.Conv2d(a, b, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b), *([act] if act is not None else []))


class Head(nn.Module):
    """Features, global mean, a linear classifier."""

    def __init__(self, features: nn.Module, width: int) -> None:
        super().__init__()
        self.features, self.classifier = features, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


# ---- VGG16-BN


@family("vgg16_bn", 2, 3, 64, 64)
def vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for stage, depth in zip((8, 16, 32, 64, 64), (2, 2, 3, 3, 3), strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, stage, 3, 1, 1), nn.BatchNorm2d(stage), nn.ReLU()]
            channels = stage
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
        nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 5),
    )  # fmt: skip


# ---- ResNet


class Residual(nn.Module):
    """A basic block, or a bottleneck when `expansion` is 4."""

    def __init__(self, a: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        out, relu = width * expansion, nn.ReLU
        if expansion == 1:
            self.body = nn.Sequential(
                conv_bn(a, width, 3, stride, act=relu()), conv_bn(width, width, 3)
            )
        else:
            self.body = nn.Sequential(
                conv_bn(a, width, 1, act=relu()), conv_bn(width, width, 3, stride, act=relu()),
                conv_bn(width, out, 1),
            )  # fmt: skip
        plain = a == out and stride == 1
        self.shortcut = nn.Identity() if plain else conv_bn(a, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(depths: Sequence[int], expansion: int) -> nn.Module:
    parts: list[nn.Module] = [conv_bn(3, 6, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    channels = 6
    for stage, depth in enumerate(depths):
        width = 6 * 2**stage
        for i in range(depth):
            stride = 2 if stage and i == 0 else 1
            parts.append(Residual(channels, width, stride, expansion))
            channels = width * expansion
    return Head(nn.Sequential(*parts), channels)


@family("resnet18", 2, 3, 48, 48)
def resnet18() -> nn.Module:
    return resnet((2, 2, 2, 2), 1)


@family("resnet50", 2, 3, 48, 48)
def resnet50() -> nn.Module:
    return resnet((3, 4, 6, 3), 4)


# ---- DenseNet-121


class DenseLayer(nn.Module):
    def __init__(self, a: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(a), nn.Conv2d(a, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, new], 1)


@family("densenet121", 2, 3, 64, 64)
def densenet121() -> nn.Module:
    growth, channels = 4, 8
    parts: list[nn.Module] = [conv_bn(3, 8, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    for stage, depth in enumerate((6, 12, 24, 16)):
        if stage:
            narrow = nn.Conv2d(channels, channels // 2, 1, bias=False)
            parts += [nn.BatchNorm2d(channels), nn.ReLU(), narrow, nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            parts.append(DenseLayer(channels, growth))
            channels += growth
    return Head(nn.Sequential(*parts, nn.BatchNorm2d(channels), nn.ReLU()), channels)


# ---- ConvNeXt


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(c, c, 7, 1, 3, groups=c), nn.LayerNorm(c)
        self.fc1, self.fc2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.gamma = nn.Parameter(torch.full((c,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.fc2(F.gelu(self.fc1(y))).permute(0, 3, 1, 2)
        return x + y * self.gamma.view(1, -1, 1, 1)


class PooledNorm(nn.Module):
    """The classifier of ConvNeXt: mean, norm, linear."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.fc = LayerNorm2d(c), nn.Linear(c, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(F.adaptive_avg_pool2d(x, 1)).flatten(1))


@family("convnext_tiny", 2, 3, 64, 64)
def convnext() -> nn.Module:
    widths, parts = (6, 12, 24, 48), [nn.Conv2d(3, 6, 4, 4), LayerNorm2d(6)]
    for stage, depth in enumerate((3, 3, 9, 3)):
        if stage:
            before = widths[stage - 1]
            parts += [LayerNorm2d(before), nn.Conv2d(before, widths[stage], 2, 2)]
        parts += [ConvNextBlock(widths[stage]) for _ in range(depth)]
    return nn.Sequential(*parts, PooledNorm(48))


# ---- ShuffleNetV2


class ShuffleUnit(nn.Module):
    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        half, self.stride = b // 2, stride
        source = a if stride == 2 else a // 2
        if stride == 2:
            self.left = nn.Sequential(
                conv_bn(a, a, 3, 2, groups=a), conv_bn(a, half, 1, act=nn.ReLU())
            )
        self.right = nn.Sequential(
            conv_bn(source, half, 1, act=nn.ReLU()), conv_bn(half, half, 3, stride, groups=half),
            conv_bn(half, half, 1, act=nn.ReLU()),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            parts = (self.left(x), self.right(x))
        else:
            kept, rest = x.chunk(2, 1)
            parts = (kept, self.right(rest))
        y = torch.cat(parts, 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@family("shufflenet_v2", 2, 3, 64, 64)
def shufflenet() -> nn.Module:
    parts: list[nn.Module] = [conv_bn(3, 8, 3, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    channels = 8
    for width, depth in ((16, 4), (32, 8), (64, 4)):
        parts += [ShuffleUnit(channels, width, 2)]
        parts += [ShuffleUnit(width, width, 1) for _ in range(depth - 1)]
        channels = width
    return Head(nn.Sequential(*parts, conv_bn(64, 96, 1, act=nn.ReLU())), 96)


# ---- RepVGG


class RepBlock(nn.Module):
    """Three branches while training, one convolution after `fuse`."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.wide, self.point = conv_bn(a, b, 3, stride), conv_bn(a, b, 1, stride)
        self.same = nn.BatchNorm2d(a) if a == b and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.wide(x) + self.point(x)
        return F.relu(y if self.same is None else y + self.same(x))

    def fuse(self) -> nn.Sequential:
        conv = self.wide[0]
        fused = nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1)
        weight, bias = folded(conv.weight, self.wide[1])
        point, shift = folded(F.pad(self.point[0].weight, (1, 1, 1, 1)), self.point[1])
        weight, bias = weight + point, bias + shift
        if self.same is not None:
            eye = F.pad(torch.eye(conv.in_channels)[..., None, None], (1, 1, 1, 1))
            same, shift = folded(eye.to(weight), self.same)
            weight, bias = weight + same, bias + shift
        fused.weight, fused.bias = nn.Parameter(weight), nn.Parameter(bias)
        return nn.Sequential(fused, nn.ReLU())


def folded(weight: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A convolution without bias and the norm behind it as one: weight and bias."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale


@family("repvgg_a0", 2, 3, 64, 64)
def repvgg() -> nn.Module:
    blocks, channels = [RepBlock(3, 6, 2)], 6
    for width, depth in ((6, 2), (12, 4), (24, 14), (48, 1)):
        for i in range(depth):
            blocks.append(RepBlock(channels, width, 2 if i == 0 else 1))
            channels = width
    return Head(nn.Sequential(*blocks), 48)


# ---- YOLOv8


def silu(a: int, b: int, k: int = 1, stride: int = 1) -> nn.Sequential:
    return conv_bn(a, b, k, stride, act=nn.SiLU())


class Bottleneck(nn.Module):
    def __init__(self, c: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1, self.cv2, self.shortcut = silu(c, c, 3), silu(c, c, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


class C2f(nn.Module):
    """Half of the channels through a chain of bottlenecks, every step of it joined."""

    def __init__(self, a: int, b: int, n: int, shortcut: bool = True) -> None:
        super().__init__()
        self.c = b // 2
        self.cv1, self.cv2 = silu(a, b), silu((2 + n) * self.c, b)
        self.m = nn.ModuleList(Bottleneck(self.c, shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).split((self.c, self.c), 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        return self.cv2(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """SPPF: three max pools of the same, joined."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = silu(c, c // 2), silu(2 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.cv2(torch.cat(parts, 1))


class Detect(nn.Module):
    """Boxes as expectations over 8 bins, and classes, of three scales, joined."""

    bins: Tensor

    def __init__(self, widths: Sequence[int], classes: int = 3) -> None:
        super().__init__()
        self.box = nn.ModuleList(
            nn.Sequential(silu(c, 16, 3), silu(16, 16, 3), nn.Conv2d(16, 32, 1)) for c in widths
        )
        self.kind = nn.ModuleList(
            nn.Sequential(silu(c, 8, 3), silu(8, 8, 3), nn.Conv2d(8, classes, 1)) for c in widths
        )
        self.register_buffer("bins", torch.arange(8.0).view(1, 8, 1, 1))

    def forward(self, levels: list[Tensor]) -> Tensor:
        rows = [torch.cat([box(x), kind(x)], 1).flatten(2)
                for x, box, kind in zip(levels, self.box, self.kind, strict=True)]  # fmt: skip
        box, kind = torch.cat(rows, 2).split((32, 3), 1)
        chances = box.view(box.shape[0], 4, 8, box.shape[-1]).transpose(1, 2).softmax(1)
        return torch.cat([F.conv2d(chances, self.bins).squeeze(1), kind.sigmoid()], 1)


@family("yolov8", 2, 3, 64, 64)
class Yolo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p2 = nn.Sequential(silu(3, 4, 3, 2), silu(4, 8, 3, 2), C2f(8, 8, 1))
        self.p3 = nn.Sequential(silu(8, 16, 3, 2), C2f(16, 16, 2))
        self.p4 = nn.Sequential(silu(16, 24, 3, 2), C2f(24, 24, 2))
        self.p5 = nn.Sequential(silu(24, 32, 3, 2), C2f(32, 32, 1), Pyramid(32))
        self.n4, self.n3 = C2f(32 + 24, 24, 1, False), C2f(24 + 16, 16, 1, False)
        self.d3, self.d4 = silu(16, 16, 3, 2), silu(24, 24, 3, 2)
        self.o4, self.o5 = C2f(16 + 24, 24, 1, False), C2f(24 + 32, 32, 1, False)
        self.detect = Detect((16, 24, 32))

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.p3(self.p2(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat([F.interpolate(p5, scale_factor=2.0), p4], 1))
        n3 = self.n3(torch.cat([F.interpolate(n4, scale_factor=2.0), p3], 1))
        o4 = self.o4(torch.cat([self.d3(n3), n4], 1))
        o5 = self.o5(torch.cat([self.d4(o4), p5], 1))
        return self.detect([n3, o4, o5])


# ---- CARN


class Cascade(nn.Module):
    """Three blocks; every one reads all results so far through a 1x1 convolution."""

    def __init__(self, make: Callable[[], nn.Module], c: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(3))
        self.points = nn.ModuleList(nn.Conv2d((i + 2) * c, c, 1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        seen = out = x
        for block, point in zip(self.blocks, self.points, strict=True):
            seen = torch.cat([seen, block(out)], 1)
            out = F.relu(point(seen))
        return out


class PlainResidual(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, c, 3, 1, 1), nn.ReLU(), nn.Conv2d(c, c, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


@family("carn_x2", 2, 3, 16, 16)
class Carn(nn.Module):
    """Ahn et al. 2018: cascades of cascades, then pixel shuffle to twice the size."""

    mean: Tensor

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.45, 0.44, 0.40]).view(1, 3, 1, 1))
        self.entry, self.exit = nn.Conv2d(3, c, 3, 1, 1), nn.Conv2d(c, 3, 3, 1, 1)
        self.body = Cascade(lambda: Cascade(lambda: PlainResidual(c), c), c)
        self.up = nn.Sequential(nn.Conv2d(c, 4 * c, 3, 1, 1), nn.ReLU(), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(self.up(self.body(self.entry(x - self.mean)))) + self.mean


# ---- stacked U-Nets


class Unet(nn.Module):
    """Three scales; upwards by a transposed convolution or by interpolation."""

    def __init__(self, a: int, c: int, transposed: bool) -> None:
        super().__init__()
        relu, widths = nn.ReLU, (c, 2 * c, 4 * c)
        sources = (a, *widths[:2])
        self.down = nn.ModuleList(
            nn.Sequential(conv_bn(s, w, 3, act=relu()), conv_bn(w, w, 3, act=relu()))
            for s, w in zip(sources, widths, strict=True)
        )
        pairs = ((4 * c, 2 * c), (2 * c, c))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(s, w, 2, 2) if transposed
            else nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(s, w, 1))
            for s, w in pairs
        )  # fmt: skip
        self.join = nn.ModuleList(conv_bn(2 * w, w, 3, act=relu()) for _, w in pairs)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return x


@family("stacked_unets", 2, 3, 32, 32)
class StackedUnets(nn.Module):
    """Two U-Nets, the second on the sum of the first one's result and the stem's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 6, 3, act=nn.ReLU()), nn.Conv2d(12, 4, 1)
        self.first, self.second = Unet(6, 6, True), Unet(6, 6, False)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        first = self.first(stem)
        return self.head(torch.cat([first, self.second(first + stem)], 1))
