"""A compile job in a process of its own, with passes slow enough to be killed in.

Run as `python jobs.py FOLDER`: reads FOLDER/model.pt2 and FOLDER/spec.yaml, writes FOLDER/out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import graphwright as gw
from graphwright.ir.context import Context
from graphwright.ir.edit import Editor


@gw.register("test.jitter")
class Jitter(gw.Pass):
    """Adds seeded noise to every weight, slowly: a stand-in for a pass that trains."""

    contract = "lossy"

    def run(self, program: gw.Program, context: Context) -> gw.Result:
        editor = Editor(program, by=self.id)
        for name, tensor in program.state.items():
            time.sleep(0.03)
            noise = torch.randn(tensor.shape, generator=context.generator(name))
            editor.set_state(name, torch.nn.Parameter(tensor.detach() + 1e-3 * noise))
        with (Path(sys.argv[1]) / "finished.txt").open("a") as log:
            log.write(f"{context.scope[0]}\n")
        return gw.Result(editor.finish())


def main(folder: Path) -> None:
    gw.optimize(
        folder / "model.pt2", folder / "spec.yaml", out=folder / "out", checkpoint_seconds=0.0
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
