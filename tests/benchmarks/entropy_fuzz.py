"""A million damaged streams of the entropy coder: each is refused, or gives the very tensor.

    python tests/benchmarks/entropy_fuzz.py [--streams 1000000] [--seed 1]

Streams are cut, flipped, overwritten, lengthened and given other headers; half of them then get a
checksum that fits. Any other end (another error, another tensor) stops the script.
"""

from __future__ import annotations

import argparse

import _paths  # noqa: F401  puts tests/ on the path
from hostile.streams import fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    refused = fuzz(given.streams, given.seed)
    print(f"{given.streams} streams: {refused} refused, the others are the very tensor")


if __name__ == "__main__":
    main()
