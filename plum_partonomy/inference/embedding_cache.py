"""Cache SAM's image embeddings on disk, for training and evaluation with a frozen image encoder.

    pixel values ──> DIR/<encoder's weights and size>/<precision>/<pixel values>.safetensors ──> embedding
                     └── missing or damaged: encoded alone, rounded to bfloat16, stored

File names are SHA-256 digests of the content that they stand for, so no entry is outdated, runs may share a folder,
and a folder may be deleted at any time. A file also contains the digest of its embedding; a modified one is computed
again.

A run with a cache equals, bit for bit, a run that encodes its images one by one and rounds the embeddings to bfloat16.
It does not depend on the existing entries.

Any number of processes may fill one folder. A file gets its name once it is complete and on disk. A process that is
killed while writing leaves only `writing.partial`, which the next one overwrites.
"""

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from modeling_plum import PlumForConditionalGeneration
from plum_partonomy.masks import DataError

GIB = 1024**3


class EmbeddingCache:
    """The image embeddings of one frozen model."""

    def __init__(self, folder: str | Path, model: PlumForConditionalGeneration):
        """Raises DataError if the folder cannot be created."""
        self.model, self.sam = model, model.sam
        self.folder = Path(folder) / fingerprint_encoder(model)[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--cache_image_embeddings: the folder {folder} cannot be made: {error}") from error

    def copy_sam(self):
        """Encode with a copy of SAM from now on, because the weights of the model are about to be sharded."""
        self.sam = copy.deepcopy(self.sam)

    @torch.no_grad()
    def embed(self, sam_pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Return embeddings `(N, E, G, G)` of pixels `(N, 3, image_size, image_size)`, on their device and in the
        precision of the image encoder; replaces `get_image_embeddings`. SAM is moved there.

        Raises:
            DataError: An embedding cannot be written.
        """
        dtype, device = self.sam.vision_encoder.dtype, sam_pixel_values.device
        precision = dtype
        if torch.is_autocast_enabled(device.type):
            precision = torch.get_autocast_dtype(device.type)
        embeddings = []
        for pixels in sam_pixel_values:
            path = self._path(str(precision), _digest(pixels))
            embedding = self._read(path)
            if embedding is None:
                if self.sam.vision_encoder.device != device:
                    self.sam.to(device)
                embedding = self.model.segmenter.encode(self.sam, pixels[None].to(dtype))[0]
                embedding = embedding.bfloat16().cpu().contiguous()
                self._write(path, embedding)
            embeddings.append(embedding)
        return torch.stack(embeddings).to(device, dtype)

    def describe(self, images: int | None) -> str:
        """Return the disk space for a number of images (None if unknown) as a sentence to print before the run."""
        there = sum(1 for _ in self.folder.rglob("*.safetensors"))
        each = torch.bfloat16.itemsize * self._shape.numel()
        needed = "" if images is None else f" for at most {images} images, {images * each / GIB:.2f} GiB,"
        free = shutil.disk_usage(self.folder).free / GIB
        return (
            f"image embeddings: {each} bytes each,{needed} in {self.folder}, which has {there} of them and {free:.2f} "
            "GiB of free space"
        )

    @property
    def _shape(self) -> torch.Size:
        config = self.model.config
        width = self.model.segmenter.embedding_width(config.sam_config)
        return torch.Size([width, config.sam_grid_size, config.sam_grid_size])

    def _path(self, precision: str, digest: str) -> Path:
        return self.folder / precision.removeprefix("torch.") / digest[:2] / f"{digest}.safetensors"

    def _read(self, path: Path) -> torch.Tensor | None:
        """Return the embedding, or None if the file does not exist or is damaged."""
        try:
            with safe_open(path, framework="pt") as file:
                embedding, checksum = file.get_tensor("embedding"), (file.metadata() or {}).get("sha256")
        except (FileNotFoundError, SafetensorError):
            return None
        whole = embedding.shape == self._shape and embedding.dtype == torch.bfloat16
        return embedding if whole and _digest(embedding) == checksum else None

    def _write(self, path: Path, embedding: torch.Tensor):
        content = save({"embedding": embedding}, metadata={"sha256": _digest(embedding)})
        partial = self.folder / "writing.partial"
        with FileLock(self.folder / "writing.lock"):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(partial, path)
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise DataError(
                    f"--cache_image_embeddings: an embedding of {len(content)} bytes cannot be written to "
                    f"{self.folder}: {error}; make room and start again, what is there will be used"
                ) from error


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy()).hexdigest()


def fingerprint_encoder(model: PlumForConditionalGeneration) -> str:
    """Return a hash of the weights and the configuration of the image encoder, including its image size."""
    config = model.config.sam_config.vision_config.to_dict()
    settings = {name: config[name] for name in sorted(config) if name not in ("dtype", "transformers_version")}
    digest = hashlib.sha256(json.dumps(settings).encode())
    tensors = {}
    for name, part in model.segmenter.image_encoder(model.sam).items():
        own = {"": part} if isinstance(part, torch.nn.Parameter) else part.state_dict()
        tensors |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
