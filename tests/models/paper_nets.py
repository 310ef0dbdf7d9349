"""Small nets with the operators of papers on restoration and generation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- P70, P11: recurrent video super-resolution


class Residual(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


def trunk(inputs: int, width: int, blocks: int) -> nn.Sequential:
    first = nn.Conv2d(inputs, width, 3, padding=1)
    return nn.Sequential(first, nn.LeakyReLU(0.1), *(Residual(width) for _ in range(blocks)))


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """x (B, C, H, W) read at each pixel plus its flow (B, 2, H, W), in pixels; zeros outside."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, dtype=x.dtype, device=x.device)
    columns = torch.arange(width, dtype=x.dtype, device=x.device)
    across = (columns[None, None] + flow[:, 0]) * 2 / (width - 1) - 1
    down = (rows[None, :, None] + flow[:, 1]) * 2 / (height - 1) - 1
    return F.grid_sample(x, torch.stack([across, down], -1), align_corners=True)


class VideoSuperResolution(nn.Module):
    """Cleans a clip until little is left to clean, then carries features back and forth in time.

    Clips (B, T, 3, H, W) to (B, T, 3, 4H, 4W). Cleaning stops when the mean residue is below
    `enough`; `masked` writes that as a mask, which any number of passes up to three equals.
    """

    def __init__(self, width: int = 8, enough: float = 0.02, masked: bool = True) -> None:
        super().__init__()
        self.enough, self.masked, self.width = enough, masked, width
        self.clean = nn.Sequential(trunk(3, width, 1), nn.Conv2d(width, 3, 3, padding=1))
        self.flow = nn.Sequential(nn.Conv2d(6, width, 5, padding=2), nn.ReLU(),
                                  nn.Conv2d(width, 2, 3, padding=1))  # fmt: skip
        self.back, self.forth = (trunk(3 + width, width, 1) for _ in range(2))
        self.up = nn.Conv2d(2 * width, 48, 3, padding=1)

    def cleaned(self, x: Tensor) -> Tensor:
        going = torch.ones((), dtype=x.dtype, device=x.device)
        for _ in range(3):
            residue = self.clean(x)
            if self.masked:
                x = x + going * residue
                going = going * (residue.abs().mean() >= self.enough).to(x.dtype)
            else:
                x = x + residue
                if residue.abs().mean() < self.enough:
                    break
        return x

    def carried(self, frames: list[Tensor], net: nn.Module) -> list[Tensor]:
        state = torch.zeros_like(frames[0][:, :1]).expand(-1, self.width, -1, -1)
        found = []
        for index, frame in enumerate(frames):
            if index:
                flow = self.flow(torch.cat([frame, frames[index - 1]], 1))
                state = warp(state, flow)
            state = net(torch.cat([frame, state], 1))
            found.append(state)
        return found

    def forward(self, clip: Tensor) -> Tensor:
        batch, length = clip.shape[:2]
        clip = self.cleaned(clip.flatten(0, 1)).unflatten(0, (batch, length))
        frames = list(clip.unbind(1))
        back = self.carried(frames[::-1], self.back)[::-1]
        forth = self.carried(frames, self.forth)
        found = []
        for frame, behind, ahead in zip(frames, back, forth, strict=True):
            fine = F.pixel_shuffle(self.up(torch.cat([behind, ahead], 1)), 4)
            found.append(fine + F.interpolate(frame, scale_factor=4.0, mode="bilinear"))
        return torch.stack(found, 1)


# ---- P65: a discriminator of patches that is told where they are, and a ray march


class PatchDiscriminator(nn.Module):
    """Reads a patch of each image, and scales its channels by what the patch's place says.

    Images (B, 3, H, W), scale (B,) in (0, 1] and offset (B, 2) in [0, 1 - scale] to (B,).
    """

    def __init__(self, patch: int = 8, width: int = 16) -> None:
        super().__init__()
        self.patch = patch
        self.register_buffer("waves", 2.0 ** torch.arange(4) * math.pi)
        self.place = nn.Sequential(nn.Linear(24, 32), nn.LeakyReLU(0.2))
        self.first, self.second = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(width, width, 3, 2, 1),
        )
        self.scales = nn.ModuleList(nn.Linear(32, width) for _ in range(2))
        self.head, self.judged = nn.Linear(width * (patch // 2) ** 2, 32), nn.Linear(32, 32)

    def grid(self, scale: Tensor, offset: Tensor) -> Tensor:
        """(B, patch, patch, 2): where the patch's pixels are, in [-1, 1]."""
        steps = torch.linspace(-1, 1, self.patch, dtype=scale.dtype, device=scale.device)
        lines = (steps[None] + 1) * scale[:, None] - 1
        across, down = (lines + 2 * offset[:, k : k + 1] for k in range(2))
        shape = (scale.shape[0], self.patch, self.patch)
        return torch.stack([across[:, None].expand(shape), down[:, :, None].expand(shape)], -1)

    def forward(self, image: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        x = F.grid_sample(image, self.grid(scale, offset), align_corners=True)
        where = torch.cat([scale[:, None], offset], 1)
        angles = (where[:, :, None] * self.get_buffer("waves")).flatten(1)
        place = self.place(torch.cat([angles.sin(), angles.cos()], 1))
        for conv, scales in zip((self.first, self.second), self.scales, strict=True):
            x = F.leaky_relu(conv(x) * (1 + scales(place))[:, :, None, None], 0.2)
        return (self.head(x.flatten(1)) * self.judged(place)).sum(1) / math.sqrt(32)


class RayMarch(nn.Module):
    """Densities and colours along rays to a colour: alpha compositing over a tri-plane.

    Planes (B, 3, C, N, N), origins and directions (B, R, 3) to (B, R, 3).
    """

    def __init__(self, channels: int = 4, samples: int = 6) -> None:
        super().__init__()
        self.samples = samples
        self.mlp = nn.Sequential(nn.Linear(channels, 16), nn.Softplus(), nn.Linear(16, 4))

    def forward(self, planes: Tensor, origin: Tensor, direction: Tensor) -> Tensor:
        depth = torch.linspace(0.2, 1.8, self.samples, dtype=origin.dtype, device=origin.device)
        points = origin[:, :, None] + depth[:, None] * direction[:, :, None]
        axes = ((0, 1), (0, 2), (1, 2))
        read = sum(
            F.grid_sample(planes[:, k], points[..., list(pair)], align_corners=True)
            for k, pair in enumerate(axes)
        )  # (B, C, R, S)
        found = self.mlp(read.permute(0, 2, 3, 1))
        opaque = 1 - torch.exp(-F.softplus(found[..., 0] - 1) * (1.6 / self.samples))
        clear = torch.cat([torch.ones_like(opaque[..., :1]), 1 - opaque + 1e-10], -1)
        weight = opaque * clear.cumprod(-1)[..., :-1]
        return (weight[..., None] * found[..., 1:].sigmoid()).sum(-2)


# ---- P57: Gaussians that spawn finer ones


def rotation(q: Tensor) -> Tensor:
    """(..., 3, 3) of quaternions (..., 4), written entry by entry."""
    w, x, y, z = F.normalize(q, dim=-1).unbind(-1)
    found = torch.zeros(*q.shape[:-1], 3, 3, dtype=q.dtype, device=q.device)
    found[..., 0, 0], found[..., 0, 1] = 1 - 2 * (y * y + z * z), 2 * (x * y - w * z)
    found[..., 0, 2], found[..., 1, 0] = 2 * (x * z + w * y), 2 * (x * y + w * z)
    found[..., 1, 1], found[..., 1, 2] = 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)
    found[..., 2, 0], found[..., 2, 1] = 2 * (x * z - w * y), 2 * (y * z + w * x)
    found[..., 2, 2] = 1 - 2 * (x * x + y * y)
    return found


class GaussianDecoder(nn.Module):
    """Latents (B, N, D) to Gaussians of every level: centres, log scales, quaternions, the rest.

    Every Gaussian has `split` children in its own frame, none larger than itself.
    """

    def __init__(self, width: int = 16, levels: int = 3, split: int = 4, near: int = 4) -> None:
        super().__init__()
        self.split, self.near = split, near
        self.start = nn.Linear(width, 14)
        self.mix = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(levels - 1))
        self.spread = nn.ModuleList(nn.Linear(width, split * width) for _ in range(levels - 1))
        self.change = nn.ModuleList(nn.Linear(width, 14) for _ in range(levels - 1))

    def neighbours(self, x: Tensor, centre: Tensor) -> Tensor:
        """(B, N, D): the largest of the differences to the nearest points."""
        distance = (centre[:, :, None] - centre[:, None]).square().sum(-1)
        index = distance.topk(self.near, dim=-1, largest=False).indices
        picked = torch.gather(
            x[:, None].expand(-1, x.shape[1], -1, -1), 2,
            index[..., None].expand(-1, -1, -1, x.shape[-1]),
        )  # fmt: skip
        return (picked - x[:, :, None]).amax(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first = self.start(x)
        centre, scale = torch.tanh(first[..., :3]), -1 - F.softplus(first[..., 3:6])
        turn, rest = first[..., 6:10], first[..., 10:]
        levels = [(centre, scale, turn, rest)]
        for mix, spread, change in zip(self.mix, self.spread, self.change, strict=True):
            x = F.silu(mix(torch.cat([x, self.neighbours(x, centre)], -1)))
            wide = spread(x).unflatten(-1, (self.split, -1)).flatten(1, 2)
            x = (wide + x.repeat_interleave(self.split, 1)) / math.sqrt(2)
            centre, scale, turn, rest = (
                part.repeat_interleave(self.split, 1) for part in (centre, scale, turn, rest)
            )
            moved = change(x)
            inside = scale.exp() * torch.tanh(moved[..., :3])
            centre = centre + (rotation(turn) @ inside[..., None])[..., 0]
            scale = (scale - F.softplus(-moved[..., 3:6])).clamp(-8, 0)
            turn, rest = turn + moved[..., 6:10], rest + moved[..., 10:]
            levels.append((centre.clamp(-1, 1), scale, turn, rest))
        parts = tuple(torch.cat(part, 1) for part in zip(*levels, strict=True))
        return parts[0], parts[1], parts[2], parts[3]


# ---- P56: a variational autoencoder of images with attributes


class ConditionalVae(nn.Module):
    """Images (B, 1, 8, 8) and attributes (B, A) to (reconstruction, mean, log variance).

    `noise` (B, Z) is drawn where it is not given.
    """

    def __init__(self, attributes: int = 3, latent: int = 4) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(1 + attributes, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
            nn.Flatten(),
        )  # fmt: skip
        self.mean, self.spread = nn.Linear(64, latent), nn.Linear(64, latent)
        self.decode = nn.Sequential(
            nn.Linear(latent + attributes, 64), nn.ReLU(), nn.Unflatten(1, (16, 2, 2)),
            nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 1, 4, 2, 1),
        )  # fmt: skip

    def forward(
        self, image: Tensor, attributes: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        maps = attributes[:, :, None, None].expand(-1, -1, *image.shape[-2:])
        h = self.encode(torch.cat([image, maps], 1))
        mean, log_variance = self.mean(h), self.spread(h)
        noise = torch.randn_like(mean) if noise is None else noise
        z = mean + torch.exp(0.5 * log_variance) * noise
        return self.decode(torch.cat([z, attributes], 1)).sigmoid(), mean, log_variance


# ---- P68: a camera pipeline of learned atoms


class Camera(nn.Module):
    """RGB (B, 3, H, W) in [0, 1] to a mosaic (B, 1, H, W), and back to full size with `to_rgb`.

    Gains and colour matrices are convex combinations of atoms by weights that a small net gives.
    """

    def __init__(self, atoms: int = 4) -> None:
        super().__init__()
        self.look = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                  nn.Flatten(), nn.Linear(8, 2 * atoms))  # fmt: skip
        self.gains = nn.Parameter(0.5 + torch.rand(atoms, 3))
        matrices = torch.eye(3) + 0.1 * torch.randn(atoms, 3, 3)
        self.matrices = nn.Parameter(matrices / matrices.sum(2, keepdim=True))

    def parameters_of(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        """Gains (B, 3) and matrices (B, 3, 3)."""
        first, second = self.look(rgb).chunk(2, 1)
        mixed = torch.einsum("ba,aij->bij", second.softmax(1), self.matrices)
        return first.softmax(1) @ self.gains, mixed

    def to_linear(self, rgb: Tensor, gains: Tensor, matrix: Tensor) -> Tensor:
        x = 0.5 - torch.sin(torch.asin((1 - 2 * rgb).clamp(-1, 1)) / 3)
        x = (x + 1e-8) ** 2.2
        x = (torch.linalg.inv(matrix) @ x.flatten(2)).unflatten(2, rgb.shape[2:])
        return x / gains[:, :, None, None]

    def to_rgb(self, linear: Tensor, gains: Tensor, matrix: Tensor) -> Tensor:
        x = linear * gains[:, :, None, None]
        x = (matrix @ x.flatten(2)).unflatten(2, linear.shape[2:])
        x = (x.clamp(min=0) + 1e-8) ** (1 / 2.2)
        return 3 * x**2 - 2 * x**3

    def forward(self, linear: Tensor) -> tuple[Tensor, Tensor]:
        """Linear light to (RGB, mosaic of the light): red, green / green, blue."""
        gains, matrix = self.parameters_of(linear)
        mosaic = torch.stack([linear[:, 0, ::2, ::2], linear[:, 1, ::2, 1::2],
                              linear[:, 1, 1::2, ::2], linear[:, 2, 1::2, 1::2]], 1)  # fmt: skip
        return self.to_rgb(linear, gains, matrix), F.pixel_shuffle(mosaic, 2)
