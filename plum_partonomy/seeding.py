"""Random generators that depend on a key alone: not on the process, its hash seed, nor on earlier draws."""

import hashlib

import numpy as np


def seeded_generator(*key: str | int) -> np.random.Generator:
    """The generator of a key such as (seed, split, index)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
