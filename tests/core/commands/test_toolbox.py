"""`graphwright inspect`, `compare` and `bench` on a saved program and its ONNX artifact."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright.cli import main


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.head(x)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A program, the same with a scaled head, one with another input name, and an artifact."""
    folder = tmp_path_factory.mktemp("toolbox")
    torch.manual_seed(0)
    model = Net().eval()
    program = gw.trace(model, {"x": torch.randn(2, 8)}, dynamic={"x": {0: "batch"}})
    program.save(folder / "a.pt2")
    with torch.no_grad():
        model.head.weight.mul_(1.01)
        model.head.bias.mul_(1.01)
    scaled = gw.trace(model, {"x": torch.randn(2, 8)}, dynamic={"x": {0: "batch"}})
    scaled.save(folder / "scaled.pt2")
    gw.trace(nn.Linear(8, 3), {"input": torch.randn(2, 8)}).save(folder / "other.pt2")
    gw.lower(program, "onnxruntime").save(folder / "onnx")
    gw.lower(program, "triton").save(folder / "triton")
    np.savez(folder / "none.npz", x=np.ones((0, 8), np.float32))
    np.savez(folder / "rows.npz", x=np.ones((5, 8), np.float32))
    return folder


def test_inspect_prints_layers_and_totals(files, capsys):
    assert main(["inspect", str(files / "a.pt2")]) == 0
    text = capsys.readouterr().out
    for part in ("input   x: float32 (batch, 8)", "blocks.1", "linear", "parameters  243",
                 "432 at batch 2", "= 216*batch"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(("level", "text"), [("module", "blocks.0–2"), ("op", "linear")])
def test_inspect_draws(files, tmp_path, capsys, level, text):
    target = tmp_path / "graph.svg"
    assert main(["inspect", str(files / "a.pt2"), "--svg", str(target), "--level", level]) == 0
    assert "drawn into" in capsys.readouterr().out
    found = ET.parse(target).iter("{http://www.w3.org/2000/svg}text")
    assert text in [element.text for element in found]


def test_inspect_cannot_write(files, capsys):
    assert main(["inspect", str(files / "a.pt2"), "--svg", "/no/such/folder/x.svg"]) == 2
    assert "cannot write --svg" in capsys.readouterr().err


def test_compare_program_with_its_artifact(files, capsys):
    assert main(["compare", str(files / "a.pt2"), str(files / "onnx")]) == 0
    text = capsys.readouterr().out
    assert "16 samples of synthetic data" in text
    assert "broken" not in text


def test_a_folder_of_the_triton_backend_is_an_artifact(files, capsys):
    assert main(["compare", str(files / "a.pt2"), str(files / "triton")]) == 0
    assert "16 samples of synthetic data" in capsys.readouterr().out
    assert main(["bench", str(files / "a.pt2"), str(files / "triton"), "--seconds", "0.1"]) == 0
    assert "1.00x" in capsys.readouterr().out
    loaded = gw.load(files / "triton")
    x = torch.ones(2, 8)
    torch.testing.assert_close(loaded(x), gw.load(files / "scaled.pt2")(x))  # the module's own


@pytest.mark.parametrize("samples", ["0", "-3"])
def test_compare_on_no_samples_is_an_error(files, samples, capsys):
    arguments = ["compare", str(files / "a.pt2"), str(files / "scaled.pt2")]
    assert main([*arguments, "--samples", samples]) == 2
    assert f"--samples {samples}: nothing would be compared" in capsys.readouterr().err
    assert main([*arguments, "--data", str(files / "none.npz")]) == 2
    assert "no" in capsys.readouterr().err


def test_compare_measures_a_known_difference(files, capsys):
    arguments = ["compare", str(files / "a.pt2"), str(files / "scaled.pt2")]
    assert main([*arguments, "--data", str(files / "rows.npz"), "--samples", "4"]) == 0
    text = capsys.readouterr().out
    assert "0.01 " in text  # every output times 1.01
    assert "40.0 dB" in text
    assert "4 samples" in text


def test_compare_of_different_inputs(files, capsys):
    assert main(["compare", str(files / "a.pt2"), str(files / "other.pt2")]) == 2
    assert "different inputs: ['x'] and ['input']" in capsys.readouterr().err


def test_bench_times_in_alternation(files, capsys):
    names = [str(files / "a.pt2"), str(files / "onnx")]
    assert main(["bench", *names, "--seconds", "0.2"]) == 0
    text = capsys.readouterr().out
    assert "1.00x" in text
    assert f"x (2, 8); {torch.get_num_threads()} torch threads" in text


def test_bench_refuses_what_makes_no_sense(files, capsys):
    program = str(files / "a.pt2")
    assert main(["bench", program, "--seconds", "0"]) == 2
    assert main(["bench", program, "--threads", "0"]) == 2
    assert main(["bench", program, str(files / "other.pt2")]) == 2
    text = capsys.readouterr().err
    for part in ("no time to measure in", "not a number of threads", "takes the inputs ['input']"):
        assert part in text


def test_missing_files_are_named(capsys):
    for command in (["inspect", "gone.pt2"], ["compare", "gone.pt2", "b"], ["bench", "gone.pt2"]):
        assert main(command) == 3
        assert "gone.pt2" in capsys.readouterr().err
