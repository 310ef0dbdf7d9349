"""Adapters of Hugging Face PEFT: theirs load here, ours load there, with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models.adapters import moved
from torch import nn

import graphwright as gw
from graphwright.ir.adapters.record import adapters
from graphwright.ir.adapters.save import save_adapter
from graphwright.ir.errors import ModelError

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.body = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})
        self.head = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + self.conv(x.unsqueeze(1)).mean(1)
        return self.head(x + self.body["down"](self.body["up"](x).relu()))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


IDS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(3))
LINEAR = ["up", "down"]
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=[*LINEAR, "table", "conv"], rank_pattern={"down": 2},
        alpha_pattern={"up": 3}, modules_to_save=["head"]),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, use_rslora=True),
    "dora": lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=[*LINEAR, "conv"], use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=[*LINEAR, "conv"], feedforward_modules=["down"]),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=[*LINEAR, "conv"]),
    "lokr_both": lambda: peft.LoKrConfig(
        r=1, alpha=3, target_modules=LINEAR, decompose_both=True, decompose_factor=2),
}  # fmt: skip


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
            assert "lora" in name or "ia3" in name or "lokr" in name or "modules_to_save" in name
    return model.eval()


def program() -> gw.Program:
    return gw.trace(net(), {"ids": IDS}, dynamic={"ids": {0: "batch"}})


@pytest.mark.parametrize("case", CONFIGS)
def test_theirs_loads_here(case: str, tmp_path: Path) -> None:
    model = shaken(peft.get_peft_model(net(), CONFIGS[case]()))
    model.save_pretrained(str(tmp_path))
    wanted = model(IDS).detach()
    loaded = gw.passes.adapt.Load(path=str(tmp_path))(program())
    torch.testing.assert_close(loaded(IDS).detach(), wanted, rtol=1e-5, atol=1e-5)
    merged = gw.passes.adapt.Merge()(loaded)
    torch.testing.assert_close(merged(IDS).detach(), wanted, rtol=1e-4, atol=1e-5)


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("Lora", {"rank": 4, "alpha": 6.0, "ranks": {"body.down": 2}, "also_train": ["head"],
                      "targets": ["body.*", "table", "conv"]}),
    "dora": ("Dora", {"rank": 4, "alpha": 6.0, "targets": ["body.*", "conv"]}),
    "ia3": ("Ia3", {"targets": ["body.*", "conv"], "feedforward": ["body.down"]}),
    "krona": ("Krona", {"factor_out": 2, "factor_in": 2, "targets": ["body.*"]}),
    "pissa": ("Pissa", {"rank": 3, "targets": ["body.*", "conv"]}),
    "loldu": ("Loldu", {"rank": 3, "targets": ["body.*", "conv"]}),
    "lora_xs": ("LoraXs", {"rank": 3, "targets": ["body.*", "conv"]}),
    "pego": ("Pego", {"rank": 2, "count": 3, "targets": ["body.*"]}),
    "allora": ("Allora", {"rank": 3, "targets": ["body.*"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_ours_loads_there(case: str, tmp_path: Path) -> None:
    before = program()
    name, options = OURS[case]
    changed = moved(getattr(gw.passes.adapt, name)(**options)(before), size=0.2)
    save_adapter(changed, tmp_path, base=before)
    model = peft.PeftModel.from_pretrained(net(), str(tmp_path)).eval()
    torch.testing.assert_close(model(IDS).detach(), changed(IDS).detach(), rtol=1e-4, atol=1e-5)
    again = gw.passes.adapt.Load(path=str(tmp_path), name="again")(before)
    assert list(adapters(again)) == ["again"]
    torch.testing.assert_close(again(IDS).detach(), changed(IDS).detach(), rtol=1e-4, atol=1e-5)


def test_factors_that_peft_does_not_make_are_not_written(tmp_path: Path) -> None:
    made = gw.passes.adapt.Krona(factor_out=2, factor_in=4, targets=["body.up"])(program())
    with pytest.raises(ModelError, match="by one number"):
        save_adapter(made, tmp_path)


def test_a_folder_of_another_model_is_refused_with_the_names(tmp_path: Path) -> None:
    save_adapter(gw.passes.adapt.Lora(targets=["body.*"], rank=2)(program()), tmp_path)

    class Other(nn.Module):
        def __init__(self, size: int = 9) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"up": nn.Linear(8, size), "below": nn.Linear(size, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body["below"](self.body["up"](x))

    other = gw.trace(Other().eval(), (torch.randn(2, 8),))
    with pytest.raises(ModelError, match=r"no layer 'body.down'") as caught:
        gw.passes.adapt.Load(path=str(tmp_path))(other)
    assert "body.below" in str(caught.value.fix)
    Other.__init__.__defaults__ = (9,)
    wrong = Other()
    wrong.body["down"] = wrong.body["below"]
    wrong.forward = lambda x: wrong.body["down"](wrong.body["up"](x))  # type: ignore[method-assign]
    del wrong.body["below"]
    with pytest.raises(ModelError, match=r"lora_B of 'body.up' has shape"):
        gw.passes.adapt.Load(path=str(tmp_path))(gw.trace(wrong.eval(), (torch.randn(2, 8),)))


def test_a_layer_that_cannot_take_its_part_refuses_the_whole_adapter(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.mix = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.mix.bias, self.fc(x), self.mix.weight.t(), beta=0.5)

    class Plain(Scaled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(self.fc(x))

    x = torch.randn(3, 8)
    made = gw.passes.adapt.Lora(targets=["*"], rank=2)(gw.trace(Plain().eval(), (x,)))
    save_adapter(made, tmp_path)
    with pytest.raises(ModelError, match=r"beside 'mix'|no layer 'mix'"):
        gw.passes.adapt.Load(path=str(tmp_path))(gw.trace(Scaled().eval(), (x,)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "type PREFIX_TUNING"),
        ({"init_lora_weights": "pissa_niter_4"}, "starts from pissa_niter_4"),
    ],
)
def test_what_has_no_form_is_refused(change: dict[str, str], says: str, tmp_path: Path) -> None:
    save_adapter(gw.passes.adapt.Lora(targets=["body.*"], rank=2)(program()), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match=says):
        gw.passes.adapt.Load(path=str(tmp_path))(program())


def test_a_damaged_or_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder of an adapter"):
        gw.passes.adapt.Load(path=str(tmp_path))(program())
    save_adapter(gw.passes.adapt.Lora(targets=["body.*"], rank=2)(program()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="damaged or cut short"):
        gw.passes.adapt.Load(path=str(tmp_path))(program())
    file.unlink()
    with pytest.raises(ModelError, match="no adapter_model"):
        gw.passes.adapt.Load(path=str(tmp_path))(program())
