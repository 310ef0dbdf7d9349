"""A folder that a diffusers pipeline was saved to: its networks, and what it says of sampling."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphwright.ir.errors import ArgumentError, ModelError
from graphwright.ir.files.detect import read_json
from graphwright.ir.files.model import LoadedModel, load_model
from graphwright.ir.parts import Parts
from graphwright.ir.pipeline.networks import AUTOENCODERS, BATCH, ENCODER, NETWORKS, SEQ, Network
from graphwright.ir.sampling.diffusers import PIPELINE

if TYPE_CHECKING:
    from graphwright.ir.program import Program
    from graphwright.ir.signature import Signature

INDEX = "model_index.json"
CONFIGS = {"scheduler": "scheduler_config.json", "guider": "guider_config.json"}
NOT_NETWORKS = ("scheduler", "guider", "tokenizer", "feature_extractor", "image_processor",
                "processor")  # fmt: skip


@dataclass(frozen=True)
class PartModel(LoadedModel):
    """A network of a pipeline, called as its program is.

    Attributes:
        network: its inputs and its call.
        config: contents of its `config.json`.
    """

    network: Network = NETWORKS["UNet2DModel"]
    config: Mapping[str, Any] | None = None

    def runner(
        self, signature: Signature, pinned: Mapping[str, Any] | None = None
    ) -> Callable[..., Any]:
        """The network as a function of the program's inputs, in signature order."""
        names = [spec.name for spec in signature.inputs]
        return lambda *inputs: self.network.call(
            self.module, **dict(zip(names, inputs, strict=True))
        )


@dataclass(frozen=True)
class LoadedPipeline:
    """The networks of a folder.

    Attributes:
        source: the folder.
        parts: networks by the name of the part, text encoders first and the autoencoder last.
        configs: of the scheduler and the guider, as far as the folder has them.
        left_out: components that become no part, with the reason.
    """

    source: Path
    parts: Mapping[str, PartModel]
    configs: Mapping[str, Any]
    left_out: tuple[str, ...]

    @property
    def warnings(self) -> Iterator[str]:
        """What the user should know, one line each."""
        yield from self.left_out
        for name, part in self.parts.items():
            yield from (f"{name}: {text}" for text in part.warnings)

    def whole(self) -> LoadedModel:
        """The pipeline as one model, for the report: its files, and no module."""
        lines = "".join(f"{part.sha256}  {name}\n" for name, part in self.parts.items())
        sizes = {part.source: part.file_bytes for part in self.parts.values()}
        digest = hashlib.sha256(lines.encode()).hexdigest()
        return LoadedModel(self.source, "a diffusers pipeline", digest, sum(sizes.values()))


def is_pipeline(source: str | Path) -> bool:
    """Whether a path is the folder of a whole pipeline."""
    return (Path(source) / INDEX).is_file()


def load_pipeline(
    source: str | Path, named: tuple[str, ...] = (), *, refusal: Callable[[str], str] | None = None,
    section: Any = None,
) -> LoadedPipeline:  # fmt: skip
    """Opens the networks of a folder.

    Args:
        source: the folder, as `save_pretrained` of a pipeline writes it.
        named: parts that the spec names.
        refusal: why the chosen backends cannot run a dtype; as `load_model` takes it.
        section: the spec's `model` section, of which the dtype counts.

    Raises:
        ModelError: a network is missing, damaged, or of a class that is not known to us.
        ArgumentError: a part is named that the pipeline has not.
    """
    path = Path(source)
    found, left_out = _components(path)
    halves = {part for name in found.values() for part in AUTOENCODERS.get(name, {})}
    known = [name for name in found if found[name] in NETWORKS] + sorted(halves)
    for name in named:
        if name not in known:
            raise ArgumentError(f"the pipeline has no part {name!r}, but {', '.join(known)}",
                                where=f"parts.{name}")  # fmt: skip
    parts: dict[str, PartModel] = {}
    for name, cls in found.items():
        loaded = _opened(path / name, name, section, refusal)
        config = read_json(path / name / "config.json")
        tokenizer = path / name.replace("text_encoder", "tokenizer")
        fields = {**vars(loaded), "tokenizer": tokenizer if tokenizer.is_dir() else None,
                  "config": config}  # fmt: skip
        if cls in NETWORKS:
            parts[name] = PartModel(**fields, network=NETWORKS[cls])
            continue
        for half, network in AUTOENCODERS[cls].items():
            if half != ENCODER or half in named:
                parts[half] = PartModel(**fields, network=network)
    configs = {
        kind: read_json(path / kind / file)
        for kind, file in CONFIGS.items()
        if (path / kind / file).is_file()
    }
    order = {"text": 0, "denoiser": 1, "autoencoder": 2}
    ordered = sorted(parts, key=lambda name: order[parts[name].network.kind])
    return LoadedPipeline(path, {name: parts[name] for name in ordered}, configs, left_out)


def _components(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Networks of the index by name, each with its class; and what becomes no part, and why."""
    index = read_json(path / INDEX)
    if not isinstance(index, dict):
        raise ModelError(f"{INDEX} holds no object", where=str(path))
    found, left_out, denoisers = {}, [], []
    for name, entry in index.items():
        is_component = isinstance(entry, list) and len(entry) == 2 and entry[1] is not None
        if not is_component or name.startswith(NOT_NETWORKS) or not name.isidentifier():
            continue
        cls = str(entry[1])
        if name in ("unet", "transformer"):
            denoisers.append(name)
            if cls not in NETWORKS or NETWORKS[cls].kind != "denoiser":
                known = [n for n, network in NETWORKS.items() if network.kind == "denoiser"]
                raise ModelError(
                    f"the pipeline's {name} is a {cls}, whose inputs are not known to us",
                    where=str(path / name),
                    fix=f"Known are {', '.join(known)}; compile its folder by itself, with its "
                    "inputs declared.",
                )
        if cls in NETWORKS or cls in AUTOENCODERS:
            found[name] = cls
        else:
            left_out.append(f"{name} ({cls}) is not compiled: its inputs are not known to us")
    if not denoisers:
        raise ModelError("the pipeline has neither a unet nor a transformer", where=str(path))
    return found, tuple(left_out)


def _opened(path: Path, name: str, section: Any, refusal: Any) -> LoadedModel:
    if not path.is_dir():
        raise ModelError(
            f"the pipeline has no weights of its {name}: {INDEX} names it, and its folder is not "
            "there",
            where=str(path),
            fix="Save the pipeline again, whole.",
        )
    try:
        wanted = {"dtype": getattr(section, "dtype", None)}
        return load_model(path, section=wanted, refusal=refusal)
    except ModelError as error:
        raise ModelError(f"the pipeline's {name}: {error.message}", where=error.where or str(path),
                         fix=error.fix, details=error.details) from error  # fmt: skip


def trace_pipeline(loaded: LoadedPipeline, seed: int) -> Parts:
    """The program of every part.

    Sizes of latents are those of the denoiser's configuration; batch and length of the text are
    free.

    Raises:
        ModelError: a network cannot be traced.
    """
    (denoiser,) = (p for p in loaded.parts.values() if p.network.kind == "denoiser")
    assert denoiser.config is not None
    sizes = _sizes(denoiser.config)
    return Parts({name: _traced(part, sizes, loaded, seed) for name, part in loaded.parts.items()})


def _sizes(config: Mapping[str, Any]) -> tuple[int, ...]:
    size = config.get("sample_size")
    if size is None:
        raise ModelError("the configuration of the pipeline's denoiser has no sample_size")
    return tuple(size) if isinstance(size, (list, tuple)) else (int(size),) * 2


def _traced(part: PartModel, sizes: tuple[int, ...], loaded: LoadedPipeline, seed: int) -> Program:
    import torch

    from graphwright.ir.data.batches import synthetic_inputs
    from graphwright.ir.signature import DimRange, Signature, TensorSpec
    from graphwright.ir.trace.capture import trace

    assert part.module is not None
    assert part.config is not None
    inputs = part.network.inputs(part.config, sizes)
    dtype = str(next(part.module.parameters()).dtype).removeprefix("torch.")
    specs = tuple(
        TensorSpec(name, _dtype(name, one["dtype"], dtype), one["shape"], one.get("range"))
        for name, one in inputs.items()
    )
    limit = int(part.config.get("max_position_embeddings") or 0)
    length = min(limit, 8) if limit else 8
    generator = torch.Generator().manual_seed(seed)
    examples = synthetic_inputs(Signature(specs, (), None), {BATCH: 2, SEQ: length}, generator)
    free = {s.name: {i: d for i, d in enumerate(s.shape) if isinstance(d, str)} for s in specs}
    longest = {SEQ: DimRange(1, limit)} if limit and any(SEQ in s.shape for s in specs) else None
    program = trace(
        part.module, dict(examples), dynamic=free, dims=longest,
        ranges={s.name: s.range for s in specs if s.range is not None}, call=part.network.call,
    )  # fmt: skip
    if part.network.kind != "denoiser":
        return program
    return replace(program, facts={**program.facts, PIPELINE: dict(loaded.configs)})


def _dtype(name: str, declared: str, weights: str) -> str:
    """Floats are in the dtype of the weights, but for the time, which is finer."""
    return declared if name == "timestep" or not declared.startswith("float") else weights
