"""Shards to batches. What a rank yields is a pure function of (manifest, seed, global batch size, position).

Threads decode ahead; they change when work is done, never what comes out. Shape legend: B pairs per rank, G = B x world.
"""

import hashlib
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydantic
import torch
from torch import Tensor

from data_tools.errors import UserError
from data_tools.shards import PICTURE_EXTENSIONS, Manifest, ShardError, ShardReader, find_captions
from pretrain.config import ConfigError, ConfigModel
from pretrain.contract import Batch
from pretrain.data.augment import AugmentConfig, train_pixels
from pretrain.data.decode import BadSample, decode_image
from pretrain.data.order import sample_at
from pretrain.data.text import Tokenizer
from pretrain.randomness import generator, hash64
from pretrain.world import World

log = logging.getLogger(__name__)

MAX_BAD_IN_A_ROW = 100


class DataConfig(ConfigModel):
    """Where the training pairs come from and how their pictures are changed."""

    path: str  # folder written by `python -m data_tools build`
    threads: int = pydantic.Field(default=2, ge=1)  # decoding threads a rank
    prefetch_batches: int = pydantic.Field(default=4, ge=1)
    augment: AugmentConfig = AugmentConfig()


@dataclass
class Sample:
    """One decoded pair, as `Batch` collects it."""

    image: Tensor  # [3,S,S] uint8
    caption: str
    captions: list[str]
    key: str
    position: int


def read_captions(fields: dict[str, bytes]) -> list[str]:
    """All captions of a sample, as its .json or .txt has them. Raises BadSample if there is none."""
    try:
        captions = find_captions(fields)
    except ValueError as error:
        raise BadSample(f"its caption is not readable: {error}") from None
    if not captions:
        raise BadSample("it has no caption")
    return captions


def read_image(fields: dict[str, bytes]) -> np.ndarray:
    """[H,W,3] uint8. Raises BadSample if there is none, or it is not a whole picture."""
    return decode_image(find_image(fields))


def find_image(fields: dict[str, bytes]) -> bytes:
    """The encoded picture of a sample. Raises BadSample if there is none."""
    for extension in PICTURE_EXTENSIONS:
        if extension in fields:
            return fields[extension]
    raise BadSample(f"no picture among its files: {', '.join(fields)}")


def stable_id(text: str) -> int:
    """A signed 64-bit number, the same for the same text on every rank and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


class Loader:
    """Endless iterator over this rank's `Batch`es, from `position` on.

    State: `state()` gives the position of the next global batch and what it depends on; `restore(state)` goes there.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, image_size: int, global_batch: int, seed: int, world: World
    ):
        self.config, self.tokenizer, self.image_size, self.world, self.seed = config, tokenizer, image_size, world, seed
        self.manifest = Manifest.load(config.path)
        self.reader = ShardReader(self.manifest)
        if global_batch % world.size:
            near = [size for size in range(1, global_batch + 1) if global_batch % size == 0]
            raise ConfigError(
                f"train.batch_size: {global_batch} pairs cannot be shared equally by {world.size} ranks. "
                f"Use a multiple of {world.size}, or one of {', '.join(map(str, near[-8:]))} ranks."
            )
        if global_batch > self.manifest.samples:
            raise ConfigError(
                f"train.batch_size: {global_batch} is more than the {self.manifest.samples} samples of {config.path}: "
                "a picture would meet itself in every batch. Use a smaller batch or more data."
            )
        self.global_batch = global_batch
        self.position = 0
        self.skipped = 0

    def state(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "dataset": self.manifest.fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ConfigError when the order would no longer be the same."""
        for name, now in self.state().items():
            if name != "position" and state[name] != now:
                raise ConfigError(
                    f"{self.config.path}: the run was started with {name} {state[name]}, now it is {now}, so the order "
                    "of samples would change. Put it back, or start a new run folder."
                )
        self.position = state["position"]

    def __iter__(self) -> Iterator[Batch]:
        rows = self.global_batch // self.world.size
        first_row = self.world.rank * rows
        pending: deque[list[Future[Sample]]] = deque()
        submitted = self.position
        with ThreadPoolExecutor(self.config.threads, thread_name_prefix="decode") as pool:
            try:
                while True:
                    while len(pending) < self.config.prefetch_batches:
                        positions = np.arange(submitted + first_row, submitted + first_row + rows)
                        indices = sample_at(self.manifest.samples, self.seed, positions)
                        pending.append([pool.submit(self.load, *pair) for pair in zip(positions, indices, strict=True)])
                        submitted += self.global_batch
                    batch = self.collate([future.result() for future in pending.popleft()])
                    self.position += self.global_batch
                    yield batch
            finally:
                pool.shutdown(cancel_futures=True)

    def load(self, position: int, index: int) -> Sample:
        """The sample at `position`. A bad one is replaced by a rule that depends on nothing but the position."""
        for attempt in range(MAX_BAD_IN_A_ROW):
            try:
                return self.decode(int(position), int(index))
            except (ShardError, BadSample) as error:
                self.report_bad(int(index), error)
                index = int(hash64(self.seed, f"replacement {attempt}", position) % np.uint64(self.manifest.samples))
        raise UserError(
            f"{self.config.path}: {MAX_BAD_IN_A_ROW} samples in a row could not be read at position {position}. "
            "Check the shards: python -m data_tools info"
        )

    def decode(self, position: int, index: int) -> Sample:
        raw = self.reader.read(index)
        draw = generator(self.seed, "augment", position)
        captions = read_captions(raw.fields)
        caption = captions[int(draw.integers(len(captions)))]
        image = train_pixels(find_image(raw.fields), self.image_size, self.config.augment, draw)
        return Sample(image, caption, captions, raw.key, position)

    def report_bad(self, index: int, error: Exception) -> None:
        self.skipped += 1
        if self.skipped == 1 or self.skipped % 1000 == 0:
            log.warning("sample %d of %s replaced (%d so far): %s", index, self.config.path, self.skipped, error)

    def collate(self, samples: list[Sample]) -> Batch:
        ids, mask = self.tokenizer([sample.caption for sample in samples])
        most = max(len(sample.captions) for sample in samples)
        true_text_ids = [[*map(stable_id, sample.captions)] for sample in samples]
        batch = Batch(
            # NumPy's, as torch would use its own threads, and wait for them while the decoding threads have the cores.
            image=torch.from_numpy(np.stack([sample.image.numpy() for sample in samples])),
            ids=ids,
            mask=mask,
            image_id=torch.tensor([stable_id(sample.key) for sample in samples]),
            text_id=torch.tensor([stable_id(sample.caption) for sample in samples]),
            true_text_id=torch.tensor([row + row[:1] * (most - len(row)) for row in true_text_ids]),
            position=np.array([sample.position for sample in samples]),
            keys=[sample.key for sample in samples],
        )
        return pin(batch) if self.world.device.type == "cuda" else batch


def pin(batch: Batch) -> Batch:
    """Move the tensors to page-locked memory, so that copying to the GPU does not stop the host."""
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(batch, name, value.pin_memory())
    return batch
