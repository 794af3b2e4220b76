"""
A process that fills a cache of image embeddings, once it is told to, and may be killed by itself while it writes.

    python -m tests.fill_embedding_cache FOLDER NUMBER

says "ready" and waits for a line; NUMBER is the embedding in whose middle it dies, 0 for none.
"""

import os
import signal
import sys

import torch

from embedding_cache import EmbeddingCache
from tests.tiny import IMAGE_SIZE, tiny_model

IMAGES = 12


def pixels(count: int = IMAGES) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def main(folder: str, dies_at: int):
    written, write_through = [], os.fsync

    def die_in_the_middle(file):
        written.append(file)
        if len(written) == dies_at:
            os.ftruncate(file, 100)
            os.kill(os.getpid(), signal.SIGKILL)
        write_through(file)

    os.fsync = die_in_the_middle
    cache = EmbeddingCache(folder, tiny_model())
    print("ready", flush=True)
    sys.stdin.readline()
    cache.embed(pixels())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
