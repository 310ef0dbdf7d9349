"""The one seam for independent work: the same function on many items, here or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from graphwright.ir.errors import ArgumentError

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """Maps a function over items: in this process, or on a Ray cluster.

    The result of an item depends on the item alone, so it is the same wherever it is computed.

    Args:
        jobs: threads of this process (the arithmetic runs outside the interpreter's lock), or
            `ray`: the cluster of the environment, else one of this machine.
    """

    def __init__(self, jobs: int | str = 1) -> None:
        self.jobs = jobs

    @property
    def width(self) -> int:
        """Items worth having at hand at a time."""
        if isinstance(self.jobs, int):
            return max(1, self.jobs)
        return max(1, int(_ray().cluster_resources().get("CPU", 1)))

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """Results in the order of the items.

        Raises:
            ArgumentError: Ray is asked for and not installed.
        """
        if self.jobs == "ray":
            return _map_with_ray(function, items)
        if self.width == 1 or len(items) < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(min(self.width, len(items))) as pool:
            return list(pool.map(function, items))


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ArgumentError(
            "jobs is 'ray', and Ray is not installed",
            fix="pip install 'graphwright[ray]', or give a number of jobs.",
        ) from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    return ray


def _map_with_ray(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    ray = _ray()
    shared = ray.put(function)
    remote = ray.remote(_call)
    return list(ray.get([remote.remote(shared, item) for item in items]))


def _call(function: Callable[[T], R], item: T) -> R:
    return function(item)
