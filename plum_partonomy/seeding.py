"""Random generators that depend only on a key, not on the process, its hash seed or earlier draws."""

import hashlib

import numpy as np


def seeded_generator(*key: str | int) -> np.random.Generator:
    """Return the generator of a key such as (seed, split, index)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
