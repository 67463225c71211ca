"""Randomness as a pure function of (seed, what it is for, position): no generator state to save, none to lose.

Whatever is random in a run (order, crops, captions, hard negatives, dropout) is derived here from the run's seed and a
position, never from process ids, clocks or hidden global state, so it does not depend on ranks, threads or restarts.
"""

import hashlib
import zlib

import numpy as np
import torch

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(value: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that looks random (the finaliser of SplitMix64, Steele et al. 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def hash64(seed: int, purpose: str, positions: np.ndarray | int) -> np.ndarray:
    """uint64 hashes of `positions` (any shape) for this seed and purpose."""
    base = np.uint64((seed * _GAMMA + zlib.crc32(purpose.encode())) & _MASK)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is what is meant
        counter = np.asarray(positions).astype(np.uint64) * np.uint64(_GAMMA)
        return mix(mix(base) + counter + np.uint64(_GAMMA))


def uniform(seed: int, purpose: str, positions: np.ndarray | int) -> np.ndarray:
    """float64 in [0, 1), one a position."""
    return (hash64(seed, purpose, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(seed: int, purpose: str, position: int) -> np.random.Generator:
    """A NumPy generator for the several draws that belong to one position."""
    return np.random.Generator(np.random.SFC64(int(hash64(seed, purpose, position))))


def stable_id(text: str) -> int:
    """A signed 64-bit number, the same for the same text on every rank and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def seed_torch(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators for one step of one rank: what a library draws from them replays after a resume."""
    torch.manual_seed(int(hash64(int(hash64(seed, "dropout", step)), "rank", rank)) >> 1)
