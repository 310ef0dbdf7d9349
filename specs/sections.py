"""The sections of a spec: one declaration for the schema, the help and the typed object."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field

from graphwright.ir.options import Options, Rule
from graphwright.ir.synthesis.options import ShiftOptions, SynthesisOptions
from graphwright.specs.search import SearchSection

FUNCTION = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
DIM = r"^[A-Za-z_]\w*$"

Dtype = Literal[
    "float32", "float16", "bfloat16", "float64",
    "int64", "int32", "int16", "int8", "uint8", "bool",
]  # fmt: skip
Function = Annotated[
    str, Field(pattern=FUNCTION, json_schema_extra={"x-graphwright": {"is": "module:function"}})
]
DimName = Annotated[
    str, Field(pattern=DIM, json_schema_extra={"x-graphwright": {"is": "dimension name"}})
]
Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]


def _unit(unit: str) -> dict[str, Any]:
    return {"x-graphwright": {"unit": unit}}


class InputSection(Options):
    """One input tensor of the model."""

    dtype: Dtype | None = None
    """Element type; left out for a number that is no tensor."""

    shape: tuple[Size | DimName, ...] | None = None
    """Sizes; a name in place of a number is a dynamic dimension, shared by the inputs using it."""

    example: tuple[Size, ...] | None = None
    """Sizes to trace with, one per dimension; 2 or more where the dimension has a name."""

    range: tuple[float, float] | None = None
    """Values lie in [low, high): token ids below the size of the vocabulary, for instance."""

    value: bool | int | float | str | None = None
    """A scalar that is always this: part of the program, and no input of it. With `dtype` and
    `shape: []` the model is given a tensor (a number, where it says int, float or bool); then
    `range: [v, v]` says the same."""

    @property
    def pinned(self) -> bool | int | float | str | None:
        """What a scalar is fixed at; None for an input."""
        if self.value is not None or self.shape != () or self.range is None:
            return self.value
        low, high = self.range
        if low != high:
            return None
        return low if str(self.dtype).startswith(("float", "bfloat")) else int(low)


class ModelSection(Options):
    """Facts that the model file does not hold itself."""

    inputs: dict[str, InputSection] = Field(default={})
    """Inputs by name, in the order the model takes them."""

    factory: Function | None = None
    """`package.module:function` that builds the module a state dict or safetensors file fills.
    It is imported and run: `--no-code` refuses a spec that names one."""

    kwargs: dict[str, Any] = Field(default={})
    """Keyword arguments of the factory."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Floating-point type that the model is traced and compiled in; when left out the stored one,
    or float32 where a backend or a pass of the spec cannot run that."""

    key: Text | None = None
    """Place of the weights in a training checkpoint, as `model_ema` or `state.model`; found by
    itself where only one group of tensors fits the factory's module."""

    strip_prefix: Text | None = None
    """Prefix to take off the tensors' names; those without it are left aside. `module.`,
    `_orig_mod.` and `model.` are found by themselves."""

    task: Literal["generation", "logits"] | None = None
    """Program to make of a language model: `generation`, with the cache of keys and values as
    inputs and outputs, or `logits`, the model's output for a whole text. An encoder-decoder that
    generates is two programs, an encoder and a decoder. When left out, `generation`, unless
    `inputs` are declared or the state is explicit."""

    state: Literal["frozen", "explicit"] = "frozen"
    """Treatment of tensors that the model writes as it runs and reads at its next call: `frozen`
    as they were before the first call, or `explicit`, inputs and outputs of the artifact."""


DATA = (
    "`.npz` or `.safetensors` file or folder of `.npy` files with one array per input, `.txt` file "
    "with one text per line, `module:function` that gives batches (imported and run, unless "
    "`--no-code` is given), or `synthetic`. Paths start at the spec's folder."
)


class DataSection(Options):
    """Data, and how it is read."""

    model_config = ConfigDict(json_schema_extra={"x-graphwright": {"never_empty": True}})

    data: Annotated[Text | None, Field(description=DATA)] = None

    samples: Size | None = None
    """Number of samples to use, the first ones; all when left out (32 when synthetic)."""

    batch_size: Size = 8
    """Samples per batch."""

    tokenizer: Text | None = None
    """Folder with the tokenizer of a `.txt` file, where it is not the model's own."""

    max_length: Size | None = None
    """Tokens per text at most; the tokenizer cuts, and keeps what opens and closes a text."""

    window: Size | None = None
    """Read a `.txt` file as one text, in windows of so many tokens: what perplexities of language
    models are published on. Absent, every line is a text of its own."""

    stride: Size | None = None
    """Tokens between the beginnings of two windows; absent, the `window`. With fewer, windows
    overlap, and a token counts in the first that has it."""

    chat_template: bool = False
    """Put every line of a `.txt` file into the tokenizer's chat template: a line is a JSON list of
    messages with `role` and `content`, or else what a user says."""


class CalibrationSection(DataSection):
    """Inputs that passes may look at while they change the program."""

    source: Literal["bn_synthesis", "domain_shift"] | None = None
    """Where samples come from that are not read: `bn_synthesis` makes images out of the model
    itself, a classifier as it is before the first pass, by what its batch norms remember of the
    data it was trained on; from those of `data`, where that is given, else from noise. 256 when
    `samples` is left out. They have labels. `domain_shift` takes the images of `data` into another
    domain: by night, with noise, or as a camera's sensor sees them."""

    synthesis: SynthesisOptions | None = None
    """Options of `source: bn_synthesis`."""

    shift: ShiftOptions | None = None
    """Options of `source: domain_shift`."""

    filter: Literal["agreement", "metropolis_hastings", "bidirectional"] | None = None
    """Which of the made images are kept: `agreement`, those in which the model sees what they are
    meant to be (the image that others were made of takes their place, if there is one);
    `metropolis_hastings`, the states of a chain that accepts by how real images are beside those of
    `data`; `bidirectional`, those whose features and outputs tell those of `data`, and the other
    way round. All when left out. The last two are for `source: bn_synthesis` with `data`."""

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """For `agreement`: the probability of the class, or the share of the labelled elements, that a
    kept image is above."""

    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    """For `bidirectional`: share of the images that is kept."""

    def filled(self) -> Self:
        """The section with the defaults of the options that its source has."""
        own = {
            "bn_synthesis": ("synthesis", SynthesisOptions),
            "domain_shift": ("shift", ShiftOptions),
        }
        key, options = own.get(self.source or "", ("", Options))
        if not key or getattr(self, key) is not None:
            return self
        return self.model_copy(update={key: options()})


class TrainingSection(CalibrationSection):
    """Data that passes train on: samples with their labels (an array `labels`, or one
    value more in each batch). Batches are per process."""


class EvaluateSection(DataSection):
    """Measures the result on data that no pass has seen."""

    data: Annotated[Text, Field(description=DATA)]

    rules = (
        Rule("steps", "steps is None or metric == 'agreement'", "steps are for `agreement`"),
        Rule(
            "length_normalized",
            "not length_normalized or metric == 'multiple_choice'",
            "length_normalized is for `multiple_choice`",
        ),
        Rule(
            "metric",
            "metric != 'multiple_choice' or not {'window', 'stride', 'max_length', 'chat_template'}"
            " & given",
            "multiple_choice reads questions, which are not cut: leave out window, stride, "
            "max_length and chat_template",
        ),
    )

    metric: (
        Literal["cosine", "accuracy", "perplexity", "snr_db", "agreement", "multiple_choice"]
        | Function
    ) = "cosine"
    """Metric, of the original and of the result; `module:function` is one of your own, which is
    imported and run. `agreement`: share of greedy steps behind each text at which the result names
    the original's token. `multiple_choice`: share of right answers to the questions of a `.jsonl`
    file, with `question`, `choices` and `answer` (the index of the right one) per line."""

    steps: Size | None = None
    """Greedy steps behind each text for `agreement`; 64 when left out."""

    length_normalized: bool = False
    """Divide the log-likelihood of a choice by its number of characters, for `multiple_choice`."""


class RequireSection(Options):
    """Bounds the result has to keep; a missed one ends the run with exit status 6."""

    max_drop: Annotated[float | None, Field(ge=0, json_schema_extra=_unit("share"))] = None
    """Largest loss of the metric from the original to the result, in units of the metric."""

    perplexity_ratio: Annotated[float | None, Field(gt=0, json_schema_extra=_unit("times"))] = None
    """Largest perplexity of the result divided by that of the original."""

    min_speedup: Annotated[float | None, Field(gt=0, json_schema_extra=_unit("times"))] = None
    """Least latency of the original divided by that of the result, for every backend."""

    max_file_mb: Annotated[float | None, Field(gt=0, json_schema_extra=_unit("MB"))] = None
    """Largest artifact, in MB (10^6 bytes)."""

    min_cosine: Annotated[float | None, Field(gt=0, le=1)] = None
    """Least cosine of the outputs with the original's, on the inputs that passes are checked on."""

    max_latency_ms: Annotated[float | None, Field(gt=0, json_schema_extra=_unit("ms"))] = None
    """Longest median time of one call, in milliseconds, for every backend."""

    max_rss_gb: Annotated[float | None, Field(gt=0, json_schema_extra=_unit("GB"))] = None
    """Largest resident memory of the run, in GB (10^9 bytes)."""

    max_minutes: Annotated[float | None, Field(gt=0, json_schema_extra=_unit("minutes"))] = None
    """Longest run, in minutes."""

    integer_kernels: Literal["all"] | None = None
    """`all`: every layer that was quantized to int8 has to be an integer kernel in every artifact,
    as ONNX Runtime really runs it. A backend that does not tell misses the bound."""


class LockSection(Options):
    """Facts of the run that wrote this file: versions, digests, thread count."""

    model_config = ConfigDict(extra="allow")

    folder: Text = "."
    """Folder of the original spec as seen from this file; relative paths of data start there."""

    behind: tuple[Text, ...] = ()
    """Passes that the model has been through already: they count as standing in front of the
    spec's own, for a saved program that an earlier run folded or quantized."""


class PartSection(Options):
    """Chain of one part of a model that is several programs, in the place of the spec's own."""

    passes: tuple[Any, ...] = ()
    """Passes of this part in order; those of the spec are not run on it."""

    calibration: CalibrationSection | None = None
    """Inputs of this part that its passes may look at; the spec's section when absent."""


class Document(Options):
    """A Graphwright spec: what to do to a model, in which order, and what must hold after."""

    version: Literal[1]
    """Version of the spec language."""

    model: ModelSection = ModelSection()
    """Facts that the model file does not hold itself."""

    calibration: CalibrationSection | None = None
    """Inputs that passes may look at while they change the program."""

    training: TrainingSection | None = None
    """Data that passes train on."""

    evaluate: EvaluateSection | None = None
    """Measures the result on data that no pass has seen."""

    require: RequireSection = RequireSection()
    """Bounds the result has to keep; a missed one ends the run with exit status 6."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random stream of the run."""

    passes: tuple[Any, ...] = ()
    """Passes in order: an id, or one id with its options."""

    parts: dict[str, PartSection] = Field(default={})
    """Chains of single parts of a model that is several programs, by the name of the part: of a
    diffusers pipeline `unet` or `transformer`, `text_encoder`, `vae_decoder` and so on. Parts that
    are not named take `passes`. `vae_encoder`, which making images from texts does without, is
    compiled where it is named."""

    lower: tuple[Any, ...] = ()
    """Backends that the program is lowered to: a name, or one name with its options."""

    export: tuple[Any, ...] = ()
    """Checkpoints that other tools read, written beside the artifacts: a format, or one format with
    its options. The tokenizer's and generation files of the model's folder go with them."""

    search: SearchSection | None = None
    """Looks for the best spec; see [search](search.md)."""

    lock: LockSection | None = None
    """Facts of the run that wrote this file (`spec.lock.yaml`)."""
