"""Why a life of a job ended: code, data, node, network, storage, time limit, preemption, the user, or it has finished.

Pure: what the supervisors have seen goes in, a verdict comes out. `judge` is the whole of it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended. Neither code nor signal: it still ran when the supervisors ended all."""

    rank: int
    node: str
    local_rank: int
    exit_code: int | None
    signal: int | None
    ended_at: float | None  # unix seconds
    log_tail: str


@dataclass(frozen=True)
class Evidence:
    """What is known when a life has ended."""

    life: int
    started_at: float
    at: float
    step: int | None  # the last that was seen; None: no step was done
    ranks: tuple[RankEnd, ...]
    lost_nodes: dict[str, str]  # node -> frozen | silent | gone
    hang: dict | None = None  # the trainer's `hang` event of this life
    notice: str | None = None  # time_limit | preemption | cancel | stop_file
    node_states: dict[str, str] | None = None  # what Slurm says of its nodes
    saved_step: int | None = None  # of the newest checkpoint; None: not known, and `step` counts as progress


@dataclass(frozen=True)
class Verdict:
    """What ended a life, and what that means for the next one."""

    cause: str  # finished | stopped | code | data | node | network | storage | time_limit | preemption | user | unknown
    node: str | None  # where the first rank to fail ran, or the lost node. To blame only where cause is "node"
    reason: str  # one line
    excerpt: str  # of the first rank's log: its traceback, or what else its end says
    signature: str  # the failure without what differs from one time to the next
    step: int | None
    life: int
    stop: bool  # a further life would end the same way
    exclude: bool = False  # the node is to be left out from now on, and remembered
    saved_step: int | None = None
