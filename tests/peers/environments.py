"""The environments of the libraries whose checkpoints are read: folders on top of ours.

Their pins clash with one another and often with ours, so that each is installed without its
dependencies; what it imports and we lack is named here.
"""

from __future__ import annotations

_DATASETS = ("datasets", "dill", "multiprocess", "xxhash", "pandas", "pyarrow", "python-dateutil",
             "tzdata", "zstandard", "httpx", "httpcore", "h11", "anyio", "idna",
             "sniffio")  # fmt: skip
_CT = ("loguru", "psutil")

ENVIRONMENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{f"compressed-tensors-{version}": (
        "compressed_tensors", (f"compressed-tensors=={version}", *_CT))
       for version in ("0.6.0", "0.8.1", "0.9.4", "0.10.2", "0.13.0", "0.17.1", "0.18.0",
                       "0.20.1")},
    "gptqmodel": ("gptqmodel", (
        "gptqmodel==7.7.0", "device-smi", "logbar", "pypcre", "tokenicer", "defuser",
        "threadpoolctl", "torchao", "accelerate", *_DATASETS)),
    "autoawq": ("awq", ("autoawq==0.2.9", "accelerate", *_DATASETS)),
    "bitsandbytes": ("bitsandbytes", ("bitsandbytes==0.50.2", "accelerate")),
    "auto-round": ("auto_round", ("auto-round==0.16.1", "py-cpuinfo", "accelerate", *_DATASETS)),
    "hqq": ("hqq", ("hqq==0.2.8.post1", "einops", "termcolor", "accelerate")),
    "transformers": ("transformers", ("accelerate",)),
}  # fmt: skip
"""By name: the module that the folders come from, and what is installed."""
