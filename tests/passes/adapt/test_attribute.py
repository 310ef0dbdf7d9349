from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models.adapters import gradients, moved
from models.generator import Generator, features
from torch import Tensor, nn

import graphwright as gw
from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.tune import Hook, TuneOptions, tune
from graphwright.passes.adapt.attribute import game, truncated
from graphwright.passes.training import training_hooks

CHAIN = ("text", [("adapt.attribute", {"targets": ["query", "key", "value"]})])

STYLES = ["style_1", "style_2"]
FEATURES = "models.generator:features"


def net(seed: int = 0) -> Generator:
    torch.manual_seed(seed)
    return Generator().eval()


def program(seed: int = 0) -> gw.Program:
    return gw.trace(net(seed), {"z": torch.randn(4, 4)}, {"z": {0: "batch"}})


def data(image: Tensor | None = None, count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    image = torch.zeros(10) if image is None else image
    found = []
    for _ in range(count):
        noise = 0.05 * torch.randn(16, 10, generator=generator)  # variants of one image
        found.append({"z": torch.randn(16, 4, generator=generator), "labels": image + noise})
    return found


def made(**options: Any) -> gw.Program:
    choice = {"targets": STYLES, **options}
    return gw.passes.adapt.Attribute(**choice)(program(), training=data())


@pytest.mark.parametrize("per_layer", [False, True])
def test_it_starts_as_the_program_and_merges_into_its_readers(
    per_layer: bool, tmp_path: Path
) -> None:
    before, adapted = program(), made(per_layer=per_layer)
    z = torch.randn(5, 4)
    torch.testing.assert_close(adapted(z), before(z), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in adapted.trainable().values()) == 2 * 6 * (2 if per_layer else 1)
    changed = moved(adapted)
    assert set(gradients(changed, z)) == set(adapted.trainable())
    names = adapted.facts["adapters"]["default"]["layers"]
    own = net()
    for layer in STYLES:
        a, b = (changed.state[names[layer][f"latent_{x}"]].detach() for x in ("scale", "shift"))
        getattr(own, layer).register_forward_pre_hook(
            lambda _, args, a=a, b=b: (args[0] * a + b,))  # fmt: skip
    wanted = own(z).detach()
    torch.testing.assert_close(changed(z).detach(), wanted, rtol=1e-5, atol=1e-6)
    merged = gw.passes.adapt.Merge()(changed)
    torch.testing.assert_close(merged(z).detach(), wanted, rtol=1e-5, atol=1e-5)
    assert [n.name for n in merged.graph.nodes] == [n.name for n in before.graph.nodes]
    assert set(merged.state) == set(before.state)
    changed.save(tmp_path / "a.pt2")
    assert torch.equal(gw.load(tmp_path / "a.pt2")(z).detach(), changed(z).detach())
    for backend in ("onnxruntime", "triton"):
        torch.testing.assert_close(gw.lower(changed, backend)(z).detach(), wanted,
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_latents_are_brought_nearer_to_their_mean_in_training_alone() -> None:
    adapted = moved(made(truncation=0.5))
    mapped = torch.cat([net().mapping(batch["z"]) for batch in data()]).detach()
    mean = torch.tensor(adapted.facts["adapters"]["default"]["options"]["mean"])
    torch.testing.assert_close(mean.float(), mapped.mean(0), rtol=1e-5, atol=1e-6)

    class Seen(Hook):
        def on_loss(self, at: Any, loss: Any, outputs: Any, batch: Any) -> Any:
            self.outputs, self.z = outputs.detach(), batch["z"]
            return loss

    seen = Seen()
    options = TuneOptions(steps=1, loss="mse")
    tune(adapted, data(), options, gw.Context(), hooks=[*training_hooks(adapted), seen])
    own = net()
    own.mapping.register_forward_hook(lambda _, __, w: truncated(w, tuple(mean.tolist()), 0.5))
    a, b = (adapted.state[f"latent.latent_{x}.default"].detach() for x in ("scale", "shift"))
    for layer in STYLES:
        getattr(own, layer).register_forward_pre_hook(lambda _, args: (args[0] * a + b,))
    torch.testing.assert_close(seen.outputs, own(seen.z).detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(seen.outputs, adapted(seen.z).detach(), rtol=1e-2, atol=1e-2)


def test_neither_side_of_the_game_moves_the_other() -> None:
    torch.manual_seed(0)
    fake, real, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True)
                                for s in ((5, 3), (4, 3), (1, 3), (1,)))  # fmt: skip
    adaptor, classifier = game(fake, real, weight, bias)
    of_fake, of_real = (x @ weight[0] + bias for x in (fake, real))
    torch.testing.assert_close(adaptor, (1 + (-of_fake).exp()).log().mean())
    wanted = (1 + (-of_real).exp()).log().mean() + (1 + of_fake.exp()).log().mean()
    torch.testing.assert_close(classifier, wanted)
    assert torch.autograd.grad(adaptor, weight, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(classifier, fake, allow_unused=True)[0] is None


def diversity(images: Tensor) -> float:
    return float(torch.pdist(images).mean())


def whole(before: Generator, image: Tensor, steps: int) -> nn.Module:
    """The same game with all of the generator in training, and without truncation."""
    torch.manual_seed(0)
    own, seen = copy.deepcopy(before).train(), features().requires_grad_(False)
    weight, bias = torch.zeros(1, 24, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([*own.parameters(), weight, bias], lr=0.003, weight_decay=0)
    batches = data(image)
    for step in range(steps):
        batch = batches[step % len(batches)]
        optimizer.zero_grad()
        sum(game(seen(own(batch["z"])), seen(batch["labels"]), weight, bias)).backward()
        optimizer.step()
    return own


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_image_moves_the_look_and_leaves_the_differences(seed: int) -> None:
    """Toward the mean image of latents shifted one way. All of the generator, tuned in the same
    game, ends farther from it than it started (the paper's baselines collapse)."""
    own = net(seed)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.mul_(1.5 if parameter.dim() == 2 else 1)  # images that differ
    before = gw.trace(own, {"z": torch.randn(4, 4)}, {"z": {0: "batch"}})
    z = torch.randn(64, 4, generator=torch.Generator().manual_seed(9))
    shift = 2 * torch.randn(6, generator=torch.Generator().manual_seed(seed))
    shifted = copy.deepcopy(own)
    shifted.mapping.register_forward_hook(lambda _, __, w: w + shift)
    image = shifted(z).detach().mean(0)
    options = {"steps": 200, "lr": 0.01, "loss": "mse", "schedule": "constant",
               "betas": [0.5, 0.99]}  # fmt: skip
    passed = gw.passes.adapt.Attribute(targets=STYLES, discriminator=FEATURES, tune=options)
    adapted = passed(before, training=data(image))
    assert all(torch.equal(adapted.state[n], t) for n, t in before.state.items())
    assert {n for n in adapted.state if n not in before.state} == set(adapted.trainable())
    source, found = before(z).detach(), adapted(z).detach()
    tuned = whole(own, image, 200)(z).detach()
    start, end, other = (float((x.mean(0) - image).norm()) for x in (source, found, tuned))
    assert end < 0.75 * start < start < other
    assert diversity(found) > 0.8 * diversity(source)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"targets": ["style_1", "mix"]}, ModelError, "do not read one latent"),
        ({"targets": ["style_1", "mapping.2"]}, ModelError, "do not read one latent"),
        ({"direct": 1.0}, ArgumentError, "belong to training with a discriminator"),
        ({"discriminator": "models.generator:of_hidden"}, ArgumentError, "does not take"),
        ({"discriminator": "models.generator:nothing"}, ArgumentError, "has no 'nothing'"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        made(**options)


def test_a_layer_without_a_bias_takes_no_shift_in() -> None:
    own = net()
    own.style_2 = nn.Linear(6, 12, bias=False)
    before = gw.trace(own, {"z": torch.randn(4, 4)})
    rows = [{"z": b["z"][:4], "labels": b["labels"][:4]} for b in data()]
    adapted = gw.passes.adapt.Attribute(targets=STYLES)(before, training=rows)
    with pytest.raises(ModelError, match="has no bias"):
        gw.passes.adapt.Merge()(moved(adapted))


def test_it_goes_over_codes() -> None:
    coded = gw.passes.quantize.Nf4(block=16, targets=STYLES)(program())
    adapted = gw.passes.adapt.Attribute(targets=STYLES)(coded, training=data())
    assert set(gradients(moved(adapted), torch.randn(3, 4))) == set(adapted.trainable())
