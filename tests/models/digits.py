"""Real images and small nets: scikit-learn's digits, 8x8 pixels, and nets in four styles.

from models import digits

x, labels, x_test, labels_test = digits.data()
model = digits.trained("resnet")                  # cached under out/models/
program = digits.traced(model)
digits.accuracy(program)                          # on the held-out images
batches = digits.training(program)                # for passes that train: shuffled, labelled
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.data.batches import Batches, load_data

CACHE = Path(__file__).parents[2] / "out" / "models"
TEST_IMAGES = 500
EPOCHS = 25
"""Epochs of `train` where nothing else is said."""
VIT_EPOCHS = 60
"""The transformer learns slower."""
LR, WEIGHT_DECAY, BATCH = 2e-3, 1e-2, 64


@cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 1, 8, 8) in [0, 1] and labels: 1297 to train on, then 500 held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return images[train], labels[train], images[test], labels[test]


# ---- nets


class _Net(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def vgg() -> nn.Module:
    """VGG's form: 3x3 convolutions with batch norm, pooling, two linear layers."""
    torch.manual_seed(0)
    layers = [*_block(1, 32), *_block(32, 32), nn.MaxPool2d(2)]
    layers += [*_block(32, 64), *_block(64, 64), nn.MaxPool2d(2), *_block(64, 128)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
    return _Net(*layers, *head)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first, second = _block(inputs, outputs, stride=stride), _block(outputs, outputs)[:2]
        self.branch = nn.Sequential(*first, *second)
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(*_block(inputs, outputs, 1, stride)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.short(x))


def resnet() -> nn.Module:
    """ResNet's form: three stages of two basic blocks."""
    torch.manual_seed(0)
    layers, width = _block(1, 16), 16
    for outputs, stride in ((16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)):
        layers.append(_Residual(width, outputs, stride))
        width = outputs
    return _Net(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class _Dense(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


def densenet() -> nn.Module:
    """DenseNet's form: two blocks of four concatenations with a transition between them."""
    torch.manual_seed(0)
    width, growth = 16, 12
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, 1, 1, bias=False)]
    for stage in range(2):
        for _ in range(4):
            layers.append(_Dense(width, growth))
            width += growth
        if stage == 0:
            layers += [
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width // 2, 1, bias=False),
            ]
            layers.append(nn.AvgPool2d(2))
            width //= 2
    layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return _Net(*layers, nn.Linear(width, 10))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(n, t, width))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class _Vit(nn.Module):
    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, 2)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def vit() -> nn.Module:
    """A vision transformer: 16 patches of 2x2 pixels, width 64, 4 layers of 4 heads."""
    torch.manual_seed(0)
    return _Vit()


NETS: dict[str, Callable[[], nn.Module]] = {
    "vgg": vgg, "resnet": resnet, "densenet": densenet, "vit": vit,
}  # fmt: skip


# ---- training


def train(model: nn.Module, seed: int = 0, epochs: int = EPOCHS) -> nn.Module:
    """Trains a model in place (AdamW, cosine schedule); returns it in inference mode."""
    x, labels, _, _ = data()
    order = torch.Generator().manual_seed(seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        for _ in range(epochs):
            drawn = torch.randperm(len(x), generator=order)
            for rows in drawn[: len(x) // BATCH * BATCH].split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def reset(model: nn.Module, seed: int) -> nn.Module:
    """The model with fresh weights of another seed, in place."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


def trained(name: str, seed: int = 0, epochs: int | None = None) -> nn.Module:
    """A net of `NETS` trained from the weights of `seed`; from out/models/ when it is there."""
    epochs = epochs or (VIT_EPOCHS if name == "vit" else EPOCHS)
    model = reset(NETS[name](), seed)
    path = CACHE / f"digits-{name}-{seed}-{epochs}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, seed, epochs)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{id(model)}.part")
    torch.save(model.state_dict(), part)
    part.replace(path)
    return model


def traced(model: nn.Module) -> gw.Program:
    """The program of a model, any batch size."""
    return gw.trace(model.eval(), (data()[0][:4],), dynamic={"x": {0: "batch"}})


def training(program: gw.Program, size: int = BATCH, images: int | None = None) -> Batches:
    """The first `images` training images (all of them when absent), drawn anew in every epoch."""
    x, labels = (part[:images] for part in data()[:2])
    path = CACHE / f"digits-train-{len(x)}.npz"
    name = program.signature.inputs[0].name
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{id(program)}.part")
    with part.open("wb") as file:
        np.savez(file, **{name: x.numpy(), "labels": labels.numpy()})
    part.replace(path)
    return load_data({"data": str(path), "batch_size": size}, program.signature, 0)


def accuracy(model: Any, behind: int | None = None) -> float:
    """Share of images that a model or a program labels right.

    Of the held-out ones; or of the training images behind the first `behind`, to choose a setting
    by: `training(program, images=behind)` leaves these out.
    """
    x, labels, x_test, labels_test = data()
    x, labels = (x_test, labels_test) if behind is None else (x[behind:], labels[behind:])
    if isinstance(model, nn.Module):
        model.eval()
    with torch.no_grad():
        return float((model(x).argmax(-1) == labels).float().mean())
