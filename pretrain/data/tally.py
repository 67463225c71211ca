"""Bad samples, counted over all ranks and all parts of a run, in the order of positions.

Each rank sums up its rows of a global batch in a `Part`. The parts of all ranks, one after the other, are the batch, whatever
the number of ranks: what is decided by them is the same on any.

Shape legend: B rows of a rank, D datasets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Part:
    """What is to be known of some rows in a row."""

    rows: int
    first: int  # bad ones before the first good one
    last: int  # and after the last good one
    longest: int  # bad ones without a good one between them
    skipped: tuple[int, ...]  # [D] bad ones, by dataset
    rejected: tuple[int, ...]  # [D] samples that stages did not want

    @classmethod
    def of_rows(cls, bad: np.ndarray, rejected: np.ndarray, dataset: np.ndarray, datasets: int) -> "Part":
        """Of `bad` bool [B], `rejected` int [B] and the number of each row's dataset [B], of so many."""
        edges = np.diff(np.concatenate([[0], bad.astype(np.int8), [0]]))
        begins, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        lengths = (ends - begins).tolist()
        return cls(
            len(bad),
            lengths[0] if lengths and begins[0] == 0 else 0,
            lengths[-1] if lengths and ends[-1] == len(bad) else 0,
            max(lengths, default=0),
            tuple(np.bincount(dataset[bad], minlength=datasets).tolist()),
            tuple(np.bincount(dataset, rejected, minlength=datasets).astype(np.int64).tolist()),
        )

    @classmethod
    def of_numbers(cls, numbers: Sequence[int]) -> "Part":
        """Of what `numbers` gave."""
        by_dataset = (len(numbers) - 4) // 2
        return cls(*numbers[:4], tuple(numbers[4 : 4 + by_dataset]), tuple(numbers[4 + by_dataset :]))

    def numbers(self) -> list[int]:
        """As whole numbers, equally many on each rank."""
        return [self.rows, self.first, self.last, self.longest, *self.skipped, *self.rejected]

    @property
    def is_clean(self) -> bool:
        return not any(self.skipped) and not any(self.rejected)


@dataclass(frozen=True)
class Tally:
    """Counts since a run began: part of a checkpoint."""

    skipped: tuple[int, ...]  # [D] samples that were replaced, by dataset
    rejected: tuple[int, ...]  # [D] samples that stages did not want
    in_a_row: int = 0  # bad ones since the last good one
    longest: int = 0  # in a row, in the batch that was added last

    def add(self, parts: Sequence[Part]) -> "Tally":
        """With a global batch more, given as its parts in the order of their rows."""
        in_a_row = longest = self.in_a_row
        for part in parts:
            longest = max(longest, in_a_row + part.first, part.longest)
            in_a_row = in_a_row + part.rows if part.first == part.rows else part.last
        return Tally(
            tuple(map(sum, zip(self.skipped, *(part.skipped for part in parts), strict=True))),
            tuple(map(sum, zip(self.rejected, *(part.rejected for part in parts), strict=True))),
            in_a_row,
            longest,
        )

    def state(self) -> dict[str, object]:
        return {"skipped": list(self.skipped), "rejected": list(self.rejected), "in_a_row": self.in_a_row}

    @classmethod
    def of_state(cls, state: dict) -> "Tally":
        return cls(tuple(state["skipped"]), tuple(state["rejected"]), state["in_a_row"])
