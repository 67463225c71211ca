"""Which sample stands at which position: a pure function of (number of samples, seed, position).

Positions count samples from the start of the run, without end: position p lies in epoch p // samples. The order knows
nothing of ranks, batches or threads, so any number of them sees the same samples in the same places.
"""

import numpy as np

from pretrain.randomness import hash64

ROUNDS = 6


def sample_at(samples: int, seed: int, positions: np.ndarray) -> np.ndarray:
    """Indices [n] of the samples at `positions` [n]: each epoch is a different permutation of range(samples).

    The permutation is a Feistel network over the next power of four, walked until it lands inside the range, so no
    list of indices is ever held, however large the dataset. Source: Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002.
    """
    positions = np.asarray(positions, dtype=np.int64)
    epoch = (positions // samples).astype(np.uint64)
    half_bits = np.uint64(max(1, ((samples - 1).bit_length() + 1) // 2))
    index = permute((positions % samples).astype(np.uint64), epoch, seed, half_bits)
    while (outside := index >= samples).any():
        index[outside] = permute(index[outside], epoch[outside], seed, half_bits)
    return index.astype(np.int64)


def permute(index: np.ndarray, epoch: np.ndarray, seed: int, half_bits: np.uint64) -> np.ndarray:
    """A bijection of uint64 below 2^(2 x half_bits), another one for every epoch and seed."""
    low_bits = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = index >> half_bits, index & low_bits
    for round_number in range(ROUNDS):
        key = hash64(seed, f"order {round_number}", epoch)
        scrambled = hash64(seed, "order", right + key) & low_bits
        left, right = right, left ^ scrambled
    return (left << half_bits) | right
