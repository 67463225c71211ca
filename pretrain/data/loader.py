"""Samples to batches. What a rank yields is a pure function of (datasets, seed, global batch size, position).

Threads read, decode and tokenise ahead; they change when work is done, never what comes out. A batch is filled in place,
a few rows a task, so that the training thread has nothing left to copy.

Shape legend: B pairs per rank, G = B x world, C captions a picture, L text tokens, S pixels.
"""

import logging
import math
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import pydantic
import torch

from data_tools.errors import UserError
from data_tools.shards import PICTURE_EXTENSIONS, RawSample, find_captions
from pretrain.config import ConfigError, ConfigModel, Count, Ratio
from pretrain.contract import Batch
from pretrain.data.augment import AugmentConfig, Draws, draw, train_pixels
from pretrain.data.cache import CacheConfig
from pretrain.data.decode import BadSample
from pretrain.data.fields import decode_fields
from pretrain.data.order import Places
from pretrain.data.record import BadSamples
from pretrain.data.stages import Rejected, StageConfig, load_stages
from pretrain.data.streaming import StreamConfig
from pretrain.data.supply import BAD_READS, Draw, open_supply
from pretrain.data.tally import Part, Tally
from pretrain.data.text import Tokenizer
from pretrain.randomness import stable_id
from pretrain.world import World

log = logging.getLogger(__name__)

MAX_BAD_IN_A_ROW = 100
MAX_REJECTED_IN_A_ROW = 10_000  # by stages of the user, which may well want one sample in a hundred
JUDGE_AFTER_SAMPLES = 1000  # a share of bad samples says nothing before
MAX_AHEAD_BATCHES = 32  # however small they are
MAX_ROWS_A_TASK = 16
AGREE_EVERY_S = 1.0  # that a rank waits for its data before all hear of it
POLL_S = 0.1  # between looks whether somebody asks to stop, while there is no batch
ADVICE = "Find and leave out what is bad: python -m data_tools verify --decode --quarantine"


class DatasetConfig(ConfigModel):
    """One dataset of a blend."""

    path: str  # as `data.path`
    weight: Ratio | None = None  # its share of the samples, over the sum of all weights
    epochs: Ratio | None = None  # instead: how often each of its samples comes while an epoch of the blend goes by
    captions: Literal["random", "turn"] | None = None  # instead of `data.captions`


class DataConfig(ConfigModel):
    """Where the training pairs come from, and what is done to them. A list instead is short for `datasets`."""

    # A folder or URL of `python -m data_tools build` or `view`, tars as "x/{000..099}.tar", or "pipe:...".
    path: str | None = None
    datasets: list[DatasetConfig] | None = pydantic.Field(default=None, min_length=1)  # instead of `path`: a blend
    captions: Literal["random", "turn"] = "random"  # of several: drawn anew each epoch, or one after the other
    fields: list[str] = []  # other files of a sample to hand on, decoded, in `Batch.extra`; e.g. [json, cls]
    stages: list[StageConfig] = []  # functions of yours on each sample before it is decoded
    augment: AugmentConfig = AugmentConfig()
    threads: int = pydantic.Field(default=2, ge=0)  # that read and decode, a rank; 0 = the training thread does it
    prefetch_mib: Count = 128  # decoded ahead, a rank, `fields` included; two batches at least
    window_samples: Count = 100_000  # that are mixed with each other, over all ranks
    max_bad_share: float = pydantic.Field(default=0.05, ge=0, le=1)  # more samples replaced than this end the run
    cache: CacheConfig = CacheConfig()
    stream: StreamConfig = StreamConfig()  # of a "pipe:..."

    @pydantic.model_validator(mode="before")
    @classmethod
    def accept_list(cls, value: Any) -> Any:
        return {"datasets": value} if isinstance(value, list) else value

    @pydantic.model_validator(mode="after")
    def check_datasets(self) -> "DataConfig":
        if (self.path is None) == (self.datasets is None):
            raise ValueError("give either data.path, or several datasets in data.datasets")
        given = [(entry.weight is not None, entry.epochs is not None) for entry in self.datasets or []]
        if (True, True) in given:
            raise ValueError("data.datasets: a dataset has a weight or epochs, not both")
        if len(given) > 1 and set(given) not in ({(True, False)}, {(False, True)}):
            raise ValueError("data.datasets: give each a weight, or each its epochs")
        if len({entry.path for entry in self.datasets or []}) < len(self.datasets or []):
            raise ValueError("data.datasets: a path stands there twice; give it once, with a greater weight")
        return self

    def entries(self) -> list[DatasetConfig]:
        """The datasets, one or many, with their own settings filled in."""
        entries = self.datasets or [DatasetConfig(path=self.path)]
        return [entry.model_copy(update={"captions": entry.captions or self.captions}) for entry in entries]

    @property
    def names(self) -> str:
        """What the datasets are called, without where they lie."""
        return ", ".join(Path(entry.path).name for entry in self.entries())


def read_captions(fields: dict[str, bytes]) -> list[str]:
    """All captions of a sample, as its .json or .txt has them. Raises BadSample if there is none."""
    try:
        captions = find_captions(fields)
    except ValueError as error:
        raise BadSample(f"its caption is not readable: {error}") from None
    if not captions:
        raise BadSample("it has no caption")
    return captions


def find_picture(fields: dict[str, bytes]) -> bytes:
    """The encoded picture. Raises BadSample if there is none."""
    for extension in PICTURE_EXTENSIONS:
        if extension in fields:
            return fields[extension]
    raise BadSample(f"no picture among its files: {', '.join(fields)}")


def choose_caption(captions: list[str], how: str, seed: int, epoch: int, key: str) -> str:
    """One of a sample's captions, by (seed, epoch, key); those that come in turn begin at one of (seed, key)."""
    if how == "turn":
        return captions[(stable_id(f"{seed} {key}") + epoch) % len(captions)]
    return captions[stable_id(f"{seed} {epoch} {key}") % len(captions)]


def count_bytes(value: Any) -> int:
    """About what a decoded field, or many, take in memory."""
    if isinstance(value, dict):
        return sum(map(count_bytes, value.values()), sys.getsizeof(value))
    if isinstance(value, list | tuple):
        return sum(map(count_bytes, value), sys.getsizeof(value))
    return value.nbytes if isinstance(value, np.ndarray) else sys.getsizeof(value)


class InThisThread(Executor):
    """Does each task at once."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        done: Future = Future()
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


@dataclass
class Filling:
    """A batch on its way, filled by several tasks, and what they have to tell."""

    batch: Batch
    draw: Draw
    true_text_ids: list[list[int]]  # [B] of all captions of each picture
    failures: list[list[Exception]]  # [B] why samples before the one that was taken could not be used
    rejected: list[int]  # [B] samples before it that stages did not want
    origins: list[tuple[int, int] | None]  # [B] where the samples of the order were read; None: they could not be
    pixels: np.ndarray  # uint8 [B,3,S,S], the memory of `batch.image`
    datasets: int  # that there are
    tasks: list[Future] = field(default_factory=list)
    part: Part | None = None  # of a finished one

    def dataset(self, row: int) -> int:
        return int(self.draw.places.dataset[row])

    def finish(self) -> None:
        """Complete the batch when all tasks are done. Raises what one of them has raised, the first in the order of rows."""
        for task in self.tasks:
            task.result()
        most = max(map(len, self.true_text_ids))
        rows = [ids + ids[:1] * (most - len(ids)) for ids in self.true_text_ids]
        self.batch.true_text_id = torch.tensor(rows)
        if self.batch.image.is_pinned():
            self.batch.true_text_id = self.batch.true_text_id.pin_memory()
        bad = np.array([bool(failures) for failures in self.failures])
        self.part = Part.of_rows(bad, np.array(self.rejected), self.draw.places.dataset, self.datasets)


class Loader:
    """`iter(loader)` gives this rank's `Batches`, without end, from `position` on.

    State: `state()` gives the position of the next global batch and what it depends on; `restore(state)` goes there.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        image_size: int,
        global_batch: int,
        seed: int,
        world: World,
        record: Path | None = None,
    ):
        """`record`: the folder of what is put on record of the data (see record.py); None: nothing is."""
        if global_batch % world.size:
            near = [size for size in range(1, global_batch + 1) if global_batch % size == 0]
            raise ConfigError(
                f"train.batch_size: {global_batch} pairs cannot be shared equally by {world.size} ranks. "
                f"Use a multiple of {world.size}, or one of {', '.join(map(str, near[-8:]))} ranks."
            )
        self.config, self.tokenizer, self.image_size, self.world, self.seed = config, tokenizer, image_size, world, seed
        self.supply = open_supply(config, seed, global_batch, world.rank)
        self.record, self.bad_samples = record, BadSamples(record, world.rank) if record else None
        self.stages = load_stages(config.stages)
        self.captions = [entry.captions for entry in config.entries()]
        self.global_batch, self.rows = global_batch, global_batch // world.size
        self.extra_bytes: int | None = None  # of the largest of `data.fields` in a batch so far
        self.position = 0
        none = (0,) * len(self.supply.names)
        self.tally = Tally(none, none)  # of all ranks up to `position`
        self.last_failure = ""  # of this rank

    def state(self) -> dict[str, Any]:
        """For a checkpoint. Collective."""
        ledger = self.supply.ledger
        return {
            "position": self.position,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "supply": self.supply.describe(),
            "ledger": ledger.state(self.world) if ledger else [],
            "tally": self.tally.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ConfigError when the order would no longer be the same."""
        now = {"seed": self.seed, "global_batch": self.global_batch, **self.supply.describe()}
        then = {"seed": state["seed"], "global_batch": state["global_batch"], **state["supply"]}
        if changes := self.supply.explain_changes(state["supply"], self.record):
            raise ConfigError(
                f"the data have changed since the run was started, so the order of samples would change: {changes}. Put them "
                "back, or start a new run folder."
            )
        for name in now | then:
            if now.get(name) != then.get(name):
                raise ConfigError(
                    f"{', '.join(self.supply.names)}: the run was started with {name} {then.get(name)}, now it is "
                    f"{now.get(name)}, so the order of samples would change. Put it back, or start a new run folder."
                )
        self.position = state["position"]
        none = [0] * len(self.supply.names)  # of a checkpoint from before there were tallies
        self.tally = Tally.of_state(state.get("tally", {"skipped": none, "rejected": none, "in_a_row": 0}))
        if self.supply.ledger:
            self.supply.ledger.restore(state["ledger"], self.position, self.world)

    def close_epochs(self) -> None:
        """Log the proof of each epoch that ended before `position`, or an alarm. Collective, after each step."""
        for report in self.supply.ledger.close_epochs(self.position, self.world) if self.supply.ledger else []:
            log.log(logging.INFO if report.matched else logging.ERROR, report.message)

    def measure(self) -> dict[str, float]:
        """Samples taken, replaced and rejected by stages so far, over all ranks and since the run began."""
        values = {"data/skipped": sum(self.tally.skipped)}
        if self.config.stages:
            values["data/rejected"] = sum(self.tally.rejected)
        if len(self.supply.names) > 1:
            taken = self.supply.count(self.position)
            for name, seen, skipped in zip(self.supply.names, taken, self.tally.skipped, strict=True):
                values |= {f"data/samples/{name}": seen, f"data/skipped/{name}": skipped}
        return values

    def batch_bytes(self) -> int:
        return self.rows * 3 * self.image_size**2

    def ahead(self) -> int:
        """Batches that are under way beside the one that is taken."""
        if not self.config.threads:
            return 0  # the training thread would do all of it before it got the first
        if self.config.fields and self.extra_bytes is None:
            return 2  # until it is known how large they are
        whole = self.batch_bytes() + (self.extra_bytes or 0)
        return min(MAX_AHEAD_BATCHES, max(2, self.config.prefetch_mib * 2**20 // whole))

    def __iter__(self) -> "Batches":
        return Batches(self)

    def start(self, position: int, pool: Executor) -> Filling:
        """Begin this rank's part of the global batch at `position`."""
        rows, length = self.rows, self.tokenizer.context_length
        positions = position + self.world.rank * rows + np.arange(rows)
        pinned = self.world.device.type == "cuda"  # so that copying to the GPU does not stop the host

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, pin_memory=pinned)

        batch = Batch(
            # Channels last in memory, as pictures come out of resizing; the model changes that on its device.
            image=empty(rows, self.image_size, self.image_size, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
            ids=empty(rows, length),
            mask=empty(rows, length, dtype=torch.bool),
            image_id=empty(rows),
            text_id=empty(rows),
            true_text_id=empty(rows, 0),  # as wide as the picture with most captions: see `finish`
            position=positions,
            keys=[""] * rows,
            extra={name: [None] * rows for name in self.config.fields},
        )
        lists = [[[] for _ in range(rows)] for _ in range(2)]
        drawn, datasets = self.supply.draw(positions), len(self.supply.names)
        filling = Filling(batch, drawn, *lists, [0] * rows, [None] * rows, batch.image.numpy(), datasets)
        step = max(1, min(MAX_ROWS_A_TASK, rows // (2 * max(1, self.config.threads))))
        for first in range(0, rows, step):
            filling.tasks.append(pool.submit(self.fill, filling, first, min(rows, first + step)))
        return filling

    def fill(self, filling: Filling, first: int, last: int) -> None:
        """Read, decode and tokenise the rows from `first` to before `last`."""
        batch = filling.batch
        drawn = draw(self.seed, filling.draw.positions[first:last])
        captions = [self.load(filling, row, draws) for row, draws in enumerate(drawn, start=first)]
        batch.ids[first:last], batch.mask[first:last] = self.tokenizer(captions)
        batch.text_id[first:last] = torch.tensor([stable_id(caption) for caption in captions])
        origins = [self.supply.origins[filling.dataset(row)] for row in range(first, last)]
        named = zip(origins, batch.keys[first:last], strict=True)  # two builds may well have the same keys
        batch.image_id[first:last] = torch.tensor([stable_id(f"{origin} {key}") for origin, key in named])

    def load(self, filling: Filling, row: int, draws: Draws) -> str:
        """Fill one row, all but its text; returns the caption.

        A sample that cannot be used is replaced by a rule that depends on nothing but the position.
        """
        failures = filling.failures[row]
        while len(failures) < MAX_BAD_IN_A_ROW:
            try:
                attempt = len(failures) + filling.rejected[row]
                raw = self.supply.read(filling.draw, row, attempt)
                if not attempt:
                    filling.origins[row] = raw.origin
                return self.decode(self.stages(raw), filling, row, draws)
            except Rejected as error:
                filling.rejected[row] += 1
                if filling.rejected[row] == MAX_REJECTED_IN_A_ROW:
                    raise UserError(
                        f"{self.supply.names[filling.dataset(row)]}: data.stages kept none of {MAX_REJECTED_IN_A_ROW:,} samples; "
                        f"of the last one: {error}"
                    ) from None
            except BAD_READS as error:
                failures.append(error.with_traceback(None))
        reason, count = Counter(map(str, failures)).most_common(1)[0]
        raise UserError(
            f"{self.supply.names[filling.dataset(row)]}: {MAX_BAD_IN_A_ROW} samples in a row could not be used at position "
            f"{filling.draw.positions[row]}, {count} of them because: {reason}. {ADVICE}"
        )

    def decode(self, raw: RawSample, filling: Filling, row: int, draws: Draws) -> str:
        """Put a sample into its row; returns the caption that was chosen. Raises BadSample."""
        batch = filling.batch
        captions = read_captions(raw.fields)
        extra = decode_fields({name: raw.fields[name] for name in batch.extra if name in raw.fields})
        pixels = train_pixels(find_picture(raw.fields), self.image_size, self.config.augment, draws)
        filling.pixels[row] = pixels
        batch.keys[row] = raw.key
        for name, value in extra.items():
            batch.extra[name][row] = value
        filling.true_text_ids[row] = [stable_id(caption) for caption in captions]
        epoch = int(filling.draw.places.epoch[row])
        return choose_caption(captions, self.captions[filling.dataset(row)], self.seed, epoch, raw.key)

    def judge(self, filling: Filling, parts: Sequence[Part], world: World) -> Tally:
        """The tally with a global batch more, of which `filling` is this rank's part. Collective.

        Names the first bad sample, and each thousandth. Raises UserError, on every rank, where too many were bad.
        """
        tally, number = self.tally.add(parts), sum(self.tally.skipped)
        number += sum(sum(part.skipped) for part in parts[: world.rank])
        bad = [row for row, failures in enumerate(filling.failures) if failures] if any(filling.part.skipped) else []
        if self.bad_samples:
            self.bad_samples.add(self.describe_bad(filling, row) for row in bad)
        for row in bad:
            number += 1
            name, failures = self.supply.names[filling.dataset(row)], filling.failures[row]
            self.last_failure = f"{name}: {failures[0]}"
            if number == 1 or number % 1000 == 0:
                log.warning("%s: a sample was replaced, %d so far: %s", name, number, failures[0])
        seen, skipped, problem = self.position + self.global_batch, sum(tally.skipped), ""
        names = ", ".join(self.supply.names)
        if tally.longest >= MAX_BAD_IN_A_ROW:
            problem = f"{names}: {MAX_BAD_IN_A_ROW} samples in a row could not be used"
        elif seen >= JUDGE_AFTER_SAMPLES and skipped > self.config.max_bad_share * seen:
            share = f"data.max_bad_share = {self.config.max_bad_share:g}"
            problem = f"{names}: {skipped} of {seen} samples could not be used, more than {share}"
        if problem:
            examples = [example for example in world.gather_objects(self.last_failure) if example]
            told = f"; one of them: {examples[0]}" if examples else ""
            raise UserError(f"{problem}{told}. {ADVICE}")
        return tally

    def describe_bad(self, filling: Filling, row: int) -> dict[str, Any]:
        """Of a row whose sample was replaced: which one, and why."""
        reason = str(filling.failures[row][0])
        where = self.supply.locate(filling.draw, row)
        return {"position": int(filling.draw.positions[row]), **where, "reason": reason}

    def count(self, filling: Filling, tally: Tally) -> None:
        """Take note of a batch that is handed out."""
        self.position += self.global_batch
        self.tally = tally
        if self.supply.ledger:
            self.book(filling)

    def book(self, filling: Filling) -> None:
        """Enter into the ledger what was read for a batch, and of what could not be read, what should have been."""
        rows = [row for row, key in enumerate(filling.batch.keys) if key]  # what did not arrive is not booked
        places = filling.draw.places
        origins = [filling.origins[row] or self.supply.origin(filling.draw, row) for row in rows]
        shard, place = np.array(origins, np.int64).reshape(-1, 2).T
        as_drawn = [not filling.failures[row] and not filling.rejected[row] for row in rows]
        keys = np.where(as_drawn, filling.batch.image_id.numpy()[rows], 0).view(np.uint64)
        self.supply.ledger.add(Places(places.dataset[rows], places.epoch[rows], shard, place), keys)


class Batches:
    """Endless iterator over this rank's batches. Threads make them ahead of their use; `close` ends them.

    Before each `next`, ranks that train together `agree`, so that none waits alone.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.pool: Executor | None = None
        self.pending: deque[Filling] = deque()
        self.submitted = loader.position
        self.problem: UserError | None = None
        self.agreed: Tally | None = None  # that the next batch leads to, once all ranks know it

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """The next batch, which counts as taken from now on.

        Without `agree` before it, this rank waits as long as it takes, and judges by its own rows alone: the way of one that
        is looked at without the others.
        """
        loader = self.loader
        if self.agreed is None:
            try:
                self.wait(lambda: False)
                filling = self.pending[0]
                self.agreed = loader.judge(filling, [filling.part], World())
            except BaseException:
                self.close()
                raise
        filling, tally, self.agreed = self.pending.popleft(), self.agreed, None
        loader.count(filling, tally)
        return filling.batch

    def agree(self, ask: Callable[[], list[bool]] = list) -> list[bool]:
        """Wait until every rank has its next batch, or somebody asks for something. Collective.

        `ask` says what is asked of this rank; returned is what is asked of any. If that is nothing, `next` gives the batch
        at once. This takes one sum over the ranks, another each AGREE_EVERY_S while one of them waits for its data, and where
        there are bad samples one exchange of some numbers. Raises UserError on every rank where one cannot get its data, or
        where too many samples are bad.
        """
        world = self.loader.world
        while True:
            ready = False
            try:
                ready = self.problem is None and self.wait(lambda: any(ask()), AGREE_EVERY_S)
            except UserError as error:
                self.problem = error
            asked = ask()
            dirty = ready and not self.pending[0].part.is_clean
            waiting, failed, dirty, *wanted = world.add([not ready, self.problem is not None, dirty, *asked])
            if any(wanted):
                return [number > 0 for number in wanted]
            if failed:
                raise_everywhere(self.problem, "has no data to go on", world)
            if not waiting:
                filling = self.pending[0]
                numbers = world.gather_numbers(filling.part.numbers()) if dirty else [filling.part.numbers()]
                self.agreed = self.loader.judge(filling, [Part.of_numbers(part) for part in numbers], world)
                return [False] * len(asked)

    def wait(self, interrupted: Callable[[], bool], limit_s: float = math.inf) -> bool:
        """Whether the next batch is whole, for which this waits until the limit, or until it is `interrupted`."""
        self.start_ahead()
        filling, end_s = self.pending[0], time.monotonic() + limit_s
        while waiting := [task for task in filling.tasks if not task.done()]:
            left_s = end_s - time.monotonic()
            if left_s <= 0 or interrupted():
                return False
            futures.wait(waiting, min(left_s, POLL_S))
        if filling.part is None:
            filling.finish()
            if filling.batch.extra:
                self.loader.extra_bytes = max(self.loader.extra_bytes or 0, count_bytes(filling.batch.extra))
        return True

    def start_ahead(self) -> None:
        """Let the threads have as much to do as they may."""
        loader, ahead = self.loader, self.loader.ahead()
        if self.pool is None:
            # Where fields are handed on, more may be under way once it is known how large these are.
            loader.supply.open(self.submitted, 1 + (MAX_AHEAD_BATCHES if loader.config.fields else ahead))
            # What can stall is never read by the training thread, which could not be asked to stop.
            threads = loader.config.threads or int(loader.supply.can_stall)
            self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode") if threads else InThisThread()
        while len(self.pending) <= ahead:  # one is about to be taken: the threads work on while it is trained on
            self.pending.append(loader.start(self.submitted, self.pool))
            self.submitted += loader.global_batch

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            self.loader.supply.close()  # so that no thread waits for a store
            self.pool.shutdown()
            self.pool = None

    __del__ = close


def raise_everywhere(problem: UserError | None, what: str, world: World) -> NoReturn:
    """Raise what is wrong with this rank, or else that of the first rank that has a problem. Collective."""
    told = world.gather_objects((socket.gethostname(), None if problem is None else str(problem)))
    if problem is not None:
        raise problem
    rank, (host, text) = next((rank, said) for rank, said in enumerate(told) if said[1] is not None)
    raise UserError(f"rank {rank} on {host} {what}: {text}")


def open_loader(
    config: DataConfig,
    tokenizer: Tokenizer,
    image_size: int,
    global_batch: int,
    seed: int,
    world: World,
    record: Path | None = None,
) -> Loader:
    """A `Loader` on every rank, of the same data. Collective.

    Raises UserError on every rank where one cannot open its data or has other data than rank 0: it would take other samples,
    and perhaps another number of steps, while the others wait for it.
    """
    loader = problem = None
    try:
        loader = Loader(config, tokenizer, image_size, global_batch, seed, world, record)
    except UserError as error:
        problem = error
    described = loader.supply.describe() if loader else {}
    told = world.gather_objects((socket.gethostname(), str(problem or ""), described))
    if problem:
        raise problem
    for rank, (host, others_problem, others) in enumerate(told):
        if others_problem:
            raise UserError(f"rank {rank} on {host} cannot open its data: {others_problem}")
        if differing := [name for name in described if others.get(name) != told[0][2][name]]:
            raise UserError(
                f"{', '.join(loader.supply.names)}: rank {rank} on {host} sees other data than rank 0 on {told[0][0]} "
                f"({', '.join(differing)} differ). Give all nodes the same shards, manifest.json and quarantine.json"
            )
    return loader
