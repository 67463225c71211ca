"""Finds samples that are duplicates of one another, or of evaluation sets. Nothing is deleted: the result is a table.

    bytes     the stored pictures are equal
    pixels    the decoded pictures are equal (such as a PNG and a WebP without loss of the same picture)
    near      the same picture resized, recompressed or cut a little: perceptual hashes within a Hamming distance, then
              confirmed on small thumbnails
    caption   the same text but for small changes: the Jaccard similarity of the pairs of neighbouring words

Neighbours are found through indexes (`find_neighbours`, `find_similar_texts`), never by comparing all with all. What
was read of each sample lies in FILE.work until the result is there, so an interrupted run goes on where it was, and
memory holds a column at a time. The result depends on the samples only, not on the number of processes.

Of the duplicates of each other the first in the order of the dataset is kept, and every other is a duplicate of a kept
one: a chain of ever so little different pictures does not become one cluster.

Sources: pHash (Zauner, 2010; DCT signs against their median); multi-index hashing (Norouzi et al., arXiv:1307.2982) with
several blocks a table (Manku et al., WWW 2007); MinHash with LSH bands (Broder, 1997; Leskovec et al., chapter 3).
"""

import hashlib
import io
import itertools
import json
import math
import pickle
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from data_tools.errors import UserError
from data_tools.files import TEMPORARY_SUFFIX, lock_folder, open_atomic, write_json_atomic
from data_tools.shards import Manifest, RawSample, ShardReader
from data_tools.workers import Report, choose_processes, open_progress_bar, run_tasks

VERSION = 1
KINDS = ("bytes", "pixels", "near", "caption")
"""From the strongest to the weakest: a sample that is a duplicate in several ways is listed by the first."""
AGAINST = "against"
DISTANCE = 6
MAX_DISTANCE = 12
CAPTION_SIMILARITY = 0.8
WORK_SUFFIX = ".work"

_DEFAULT_SUFFIX = ".duplicates.parquet"
_STATE_NAME = "state.json"

_PICTURE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_MIN_CHUNK, _MAX_CHUNK = 256, 8192
_REPORT_EVERY = 64
_BATCH = 2**17


# Perceptual hashes

_SIDE = 20
"""Pixels of a thumbnail's side, so that cutting one row off is cutting 5 %."""
_WINDOWS = (
    np.s_[:, :, :],
    np.s_[:, :-1, :-1],
    np.s_[:, :-1, 1:],
    np.s_[:, 1:, :-1],
    np.s_[:, 1:, 1:],
)
"""The whole thumbnail and its four corners, each without 5 % of both sides; the cut in the middle is computed apart."""
VARIANTS = len(_WINDOWS) + 1
_HASHED = [(row, column) for total in range(1, 11) for row in range(total + 1) for column in (total - row,)][:64]
_COMPARED = [(row, column) for total in range(1, 15) for row in range(total + 1) for column in (total - row,)]
_MIN_CORRELATION = 0.85
_MAX_COLOUR_DIFFERENCE = 8.0
_MAX_LIGHT_DIFFERENCE = 48.0
_FLAT = 1.0


def make_thumbnail(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """An RGB picture's lightness, uint8 [20, 20], and its two colour differences, uint8 [2, 2, 2] (YCbCr)."""
    light, *colours = image.resize((_SIDE, _SIDE), Image.Resampling.BOX).convert("YCbCr").split()
    coarse = [np.asarray(colour, np.float64).reshape(2, _SIDE // 2, 2, _SIDE // 2).mean((1, 3)) for colour in colours]
    return np.asarray(light), np.stack(coarse).round().astype(np.uint8)


def transform_variants(light: np.ndarray) -> Iterator[np.ndarray]:
    """Low frequencies of thumbnails uint8 [n, 20, 20] and of their cuts by 5 %: VARIANTS arrays float64 [n, 16, 16].

    A frequency's value is the same for a picture of any size (a cosine transform scaled by the number of pixels), so
    that a cut of one picture is comparable with the whole of another.
    """
    light = light.astype(np.float64)
    for window in _WINDOWS:
        yield _transform(light[window])
    # The middle: half a pixel off each edge is the mean of the four corners' windows.
    yield _transform(np.mean([light[window] for window in _WINDOWS[1:]], axis=0))


def _transform(light: np.ndarray) -> np.ndarray:
    side = light.shape[1]
    waves = np.cos(np.pi * np.outer(np.arange(16), 2 * np.arange(side) + 1) / (2 * side)) * math.sqrt(2) / side
    waves[0] /= math.sqrt(2)
    # Rounded, so that the last bits of the arithmetic of a processor decide nothing.
    return np.round(waves @ light @ waves.T, 4)


def hash_frequencies(frequencies: np.ndarray) -> np.ndarray:
    """Perceptual hashes uint64 [n]: which of the 64 lowest frequencies are above their median."""
    rows, columns = zip(*_HASHED, strict=True)
    values = frequencies[:, rows, columns]
    bits = values > np.median(values, axis=1, keepdims=True)
    return np.ascontiguousarray(np.packbits(bits, axis=1)).view(">u8").astype(np.uint64).ravel()


def confirm_likeness(
    first: np.ndarray, second: np.ndarray, first_colour: np.ndarray, second_colour: np.ndarray
) -> np.ndarray:
    """Whether pictures are alike, bool [n], by frequencies [n, 16, 16] (one side perhaps of a cut) and colours [n, 8].

    Lightness must correlate and may differ in contrast; a flat picture is like another flat one of its lightness.
    """
    rows, columns = zip(*_COMPARED, strict=True)
    first_wave, second_wave = first[:, rows, columns], second[:, rows, columns]
    lengths = np.linalg.norm(first_wave, axis=1), np.linalg.norm(second_wave, axis=1)
    products = np.einsum("ij,ij->i", first_wave, second_wave)
    alike = (products >= _MIN_CORRELATION * lengths[0] * lengths[1]) & (np.minimum(*lengths) >= _FLAT)
    alike |= np.maximum(*lengths) < _FLAT
    alike &= np.abs(first[:, 0, 0] - second[:, 0, 0]) <= _MAX_LIGHT_DIFFERENCE
    difference = np.abs(first_colour.astype(np.float64) - second_colour.astype(np.float64))
    return alike & (difference.reshape(len(difference), -1).max(1) <= _MAX_COLOUR_DIFFERENCE)


# Neighbours of hashes


def find_neighbours(
    codes: np.ndarray, queries: np.ndarray, radius: int, report: Report = lambda done, failed: None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All pairs of a query and a code that differ in at most `radius` of 64 bits, each once, exactly.

    codes: uint64 [n], queries: uint64 [m]. Yields (places in queries, places in codes, distances) in pieces of at most
    about a hundred thousand pairs. `report` is called once for each of `count_tables(n, m, radius)` tables.

    The bits are cut into radius + k blocks, so two such codes are equal in at least k of them: a table for every choice
    of k blocks finds the pair among the codes that are equal there. A pair is reported by the first such table.
    """
    matched = _choose_matched_blocks(len(codes), len(queries), radius)
    masks = _cut_into_blocks(radius + matched)
    bits = min(26, max(1, len(codes).bit_length()))
    for chosen in itertools.combinations(range(radius + matched), matched):
        mask = np.bitwise_or.reduce(masks[list(chosen)])
        earlier = [masks[block] for block in range(chosen[-1]) if block not in chosen]
        table = _Table(codes, mask, bits)
        for query_places, code_places in table.look_up(queries):
            difference = codes[code_places] ^ queries[query_places]
            distances = count_bits(difference)
            good = distances <= radius
            good &= (difference & mask) == 0
            for other in earlier:
                good &= (difference & other) != 0
            if good.any():
                yield query_places[good], code_places[good], distances[good]
        report(1, 0)


def count_tables(codes: int, queries: int, radius: int) -> int:
    """How many tables `find_neighbours` makes."""
    matched = _choose_matched_blocks(codes, queries, radius)
    return math.comb(radius + matched, matched)


def count_bits(values: np.ndarray) -> np.ndarray:
    """The number of ones of each uint64, as uint8."""
    values = values - ((values >> np.uint64(1)) & np.uint64(0x5555555555555555))
    values = (values & np.uint64(0x3333333333333333)) + ((values >> np.uint64(2)) & np.uint64(0x3333333333333333))
    values = (values + (values >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((values * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)


def _choose_matched_blocks(codes: int, queries: int, radius: int) -> int:
    """The number k of blocks with the least work: more tables, or more codes that are equal in a block by chance."""

    def estimate(matched: int) -> float:
        chance = 2.0 ** -min(64 * matched / (radius + matched), 62)
        return math.comb(radius + matched, matched) * (codes + queries * (1 + codes * chance))

    return min(range(1, 5), key=estimate)


def _cut_into_blocks(count: int) -> np.ndarray:
    """Masks uint64 [count] that share the 64 bits out. Neighbouring frequencies go to different blocks."""
    return np.array([sum(1 << bit for bit in range(block, 64, count)) for block in range(count)], np.uint64)


class _Table:
    """Codes by their bits under a mask: a bucket holds all that are equal there, and few others."""

    def __init__(self, codes: np.ndarray, mask: np.uint64, bits: int) -> None:
        self._mask, self._shift = mask, np.uint64(64 - bits)
        buckets = self._hash(codes)
        self._ends = np.cumsum(np.bincount(buckets.astype(np.int64), minlength=2**bits))
        # Sorting bucket and place in one number is several times as fast as argsort.
        buckets <<= np.uint64(32)
        buckets |= np.arange(len(codes), dtype=np.uint64)
        buckets.sort()
        buckets &= np.uint64(0xFFFFFFFF)
        self._places = buckets.astype(np.uint32)

    def _hash(self, codes: np.ndarray) -> np.ndarray:
        return ((codes & self._mask) * np.uint64(0x9E3779B97F4A7C15)) >> self._shift

    def look_up(self, queries: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (place in queries, place in codes) of equal buckets, about a hundred thousand at a time."""
        for start in range(0, len(queries), _BATCH):
            buckets = self._hash(np.asarray(queries[start : start + _BATCH])).astype(np.int64)
            ends = self._ends[buckets]
            starts = np.where(buckets > 0, self._ends[buckets - 1], 0)
            totals = np.cumsum(ends - starts)
            done = 0
            while done < len(buckets):
                before = totals[done - 1] if done else 0
                stop = max(done + 1, int(np.searchsorted(totals, before + _BATCH, side="right")))
                counts = (ends - starts)[done:stop]
                query_places = np.repeat(np.arange(done, stop), counts)
                within = np.arange(len(query_places)) - np.repeat(totals[done:stop] - counts - before, counts)
                yield query_places + start, self._places[np.repeat(starts[done:stop], counts) + within]
                done = stop


# Texts

_WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # Kana and Han: every character
    "|[^\\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
_EDGE = np.uint64(0)
_BANDS = 16
_MAX_ROWS = 8
_GROUP_WINDOW = 64


@dataclass(frozen=True)
class Texts:
    """Texts as sets of pairs of neighbouring words. Text i is hashes[starts[i]:starts[i + 1]], rising.

    hashes: uint64; starts: int64 [n + 1]. A text without words has none.
    """

    hashes: np.ndarray
    starts: np.ndarray


def shingle_texts(texts: Sequence[Sequence[str]]) -> Texts:
    """Make the set of pairs of each text. A text is a list of captions, taken together.

    Letters are compared without case and in compatibility form; a caption's edges count as words, so n words make n + 1
    pairs. Chinese and Japanese characters count as words.
    """
    known: dict[str, int] = {}

    def number(word: str) -> int:
        if word not in known:
            known[word] = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest()) | 1
        return known[word]

    words, owners = [], []
    for captions in texts:
        before = len(words)
        for caption in captions:
            found = _WORD.findall(unicodedata.normalize("NFKC", caption).casefold())
            words += [0, *map(number, found), 0]
        owners.append(len(words) - before)
    sequence = np.array(words, np.uint64)
    owner = np.repeat(np.arange(len(texts)), owners)
    within = (owner[1:] == owner[:-1]) & ((sequence[1:] != _EDGE) | (sequence[:-1] != _EDGE))
    pairs = _mix(sequence[:-1] * np.uint64(0xC2B2AE3D27D4EB4F) + _mix(sequence[1:]))[within]
    owner = owner[:-1][within]
    order = np.lexsort((pairs, owner))
    pairs, owner = pairs[order], owner[order]
    first = np.ones(len(pairs), bool)
    first[1:] = (pairs[1:] != pairs[:-1]) | (owner[1:] != owner[:-1])
    counts = np.bincount(owner[first], minlength=len(texts))
    return Texts(pairs[first], np.concatenate([[0], np.cumsum(counts)]))


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread uint64 values evenly: the end of SplitMix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def choose_rows(similarity: float) -> int:
    """How many MinHash values make a band, so that texts of this similarity share one of 16 bands in 999 of 1,000."""
    if similarity >= 1:
        return _MAX_ROWS
    needed = 1 - 0.001 ** (1 / _BANDS)
    return max(1, min(_MAX_ROWS, int(math.log(needed) / math.log(similarity))))


def sign_texts(texts: Texts, rows: int) -> np.ndarray:
    """MinHash bands of texts, uint64 [16, n]: texts of Jaccard similarity s share a band with chance s ** rows."""
    full = texts.starts[1:] > texts.starts[:-1]
    bands = np.zeros((_BANDS, len(full)), np.uint64)
    if not full.any():
        return bands
    constants = _mix(np.arange(1, 2 * _BANDS * rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    for place in range(_BANDS * rows):
        values = _mix(texts.hashes * (constants[2 * place] | np.uint64(1)) + constants[2 * place + 1])
        band = bands[place // rows]
        band[full] = _mix(band[full] + np.minimum.reduceat(values, texts.starts[:-1][full]))
    return bands


def identify_texts(texts: Texts) -> np.ndarray:
    """128 bits for each text, uint64 [2, n], equal for equal sets; 0 for a text without words."""
    full = texts.starts[1:] > texts.starts[:-1]
    identity = np.zeros((2, len(full)), np.uint64)
    for row, factor in enumerate((0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93)):
        if full.any():
            identity[row, full] = np.add.reduceat(_mix(texts.hashes * np.uint64(factor)), texts.starts[:-1][full])
    return identity


def measure_similarity(texts: Texts, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jaccard similarity of the texts `first[i]` and `second[i]`, float64 [n]."""
    sizes = [texts.starts[side + 1] - texts.starts[side] for side in (first, second)]
    hashes = np.concatenate([_gather(texts, side) for side in (first, second)])
    pairs = np.concatenate([np.repeat(np.arange(len(first)), size) for size in sizes])
    order = np.lexsort((hashes, pairs))
    hashes, pairs = hashes[order], pairs[order]
    common = (hashes[1:] == hashes[:-1]) & (pairs[1:] == pairs[:-1])
    shared = np.bincount(pairs[1:][common], minlength=len(first))
    return shared / np.maximum(sizes[0] + sizes[1] - shared, 1)


def _gather(texts: Texts, places: np.ndarray) -> np.ndarray:
    counts = texts.starts[places + 1] - texts.starts[places]
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return texts.hashes[np.repeat(texts.starts[places], counts) + within]


def find_similar_texts(
    texts: Texts,
    bands: Sequence[np.ndarray],
    places: np.ndarray,
    similarity: float,
    report: Report = lambda done, failed: None,
) -> "Edges":
    """Pairs among the texts `places` with at least this Jaccard similarity, with 1 - similarity as their distance.

    Candidates share a band; each is compared with the next 64 of its band, so that a template that fills a million
    captions does not cost a million squared.
    """
    edges = Edges()
    for band in bands:
        keys = np.asarray(band)[places]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        active = np.arange(len(keys))
        for step in range(1, _GROUP_WINDOW + 1):
            active = active[active + step < len(keys)]
            active = active[keys[active + step] == keys[active]]
            if not len(active):
                break
            for start in range(0, len(active), _BATCH // 8):
                part = active[start : start + _BATCH // 8]
                first, second = places[order[part]], places[order[part + step]]
                found = measure_similarity(texts, first, second)
                good = found >= similarity - 1e-9
                edges.add(first[good], second[good], 1 - found[good])
        report(1, 0)
    return edges


# Who is a duplicate of whom


class Edges:
    """A growing set of pairs with their least distance, put in order now and then to save memory."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._waiting = 0

    def add(self, first: np.ndarray, second: np.ndarray, distance: np.ndarray) -> None:
        """Add pairs, in any order and of any direction; a pair of one place with itself is none."""
        other = first != second
        first, second = first[other].astype(np.int64), second[other].astype(np.int64)
        distance = distance[other].astype(np.float32)
        self._parts.append((np.minimum(first, second), np.maximum(first, second), distance))
        self._waiting += len(first)
        if self._waiting > 32 * _BATCH:
            self.collect()

    def collect(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lower place, higher place, distance), each pair once, in rising order."""
        empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        first, second, distance = (np.concatenate(parts) for parts in zip(empty, *self._parts, strict=True))
        order = np.lexsort((distance, second, first))
        first, second, distance = first[order], second[order], distance[order]
        new = np.ones(len(first), bool)
        new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        self._parts, self._waiting = [(first[new], second[new], distance[new])], 0
        return self._parts[0]


@dataclass(frozen=True)
class Relation:
    """How samples are alike in one way: those of a class are equal; edges join classes that are alike.

    classes: int64 [n], the place of the first sample of the class; edges: pairs of such places with their distance.
    """

    kind: str
    classes: np.ndarray
    edges: tuple[np.ndarray, np.ndarray, np.ndarray] = field(default_factory=lambda: Edges().collect())


@dataclass(frozen=True)
class Matches:
    """Of each sample the one that it is a duplicate of (-1: none), the place in KINDS of how, and at what distance."""

    leader: np.ndarray
    kind: np.ndarray
    distance: np.ndarray

    @classmethod
    def none(cls, count: int) -> "Matches":
        """No duplicates among `count` samples."""
        return cls(np.full(count, -1, np.int64), np.zeros(count, np.int8), np.zeros(count, np.float32))


def group_equal(columns: np.ndarray, empty: int | None = None) -> np.ndarray:
    """Classes int64 [n] of equal columns of a [k, n] array; columns of `empty` are equal to none."""
    count = columns.shape[1]
    order = np.lexsort(columns)
    new = np.ones(count, bool)
    new[1:] = np.any([row[order[1:]] != row[order[:-1]] for row in columns], axis=0)
    if empty is not None:
        new |= np.all([row[order] == empty for row in columns], axis=0)
    classes = np.empty(count, np.int64)
    # lexsort is stable, so the first of a group is the first in the order of the samples.
    classes[order] = order[new][np.cumsum(new) - 1]
    return classes


def match_against(relations: Sequence[Relation], evaluation: int) -> Matches:
    """Match samples from place `evaluation` on with those before it, which are of the evaluation sets.

    The strongest kind counts, then the least distance, then the first evaluation sample.
    """
    matches = Matches.none(len(relations[0].classes) if relations else evaluation)
    for relation in relations:
        leader, distance = _match_one(relation, evaluation)
        new = (matches.leader < 0) & (leader >= 0)
        new[:evaluation] = False
        matches.leader[new], matches.distance[new] = leader[new], distance[new]
        matches.kind[new] = KINDS.index(relation.kind)
    return matches


def _match_one(relation: Relation, evaluation: int) -> tuple[np.ndarray, np.ndarray]:
    """A class whose first sample is of an evaluation set matches it; others by their nearest neighbour that does."""
    count = len(relation.classes)
    nearest, nearest_distance = np.full(count, -1, np.int64), np.zeros(count, np.float32)
    first, second, distance = relation.edges
    mixed = (first < evaluation) & (second >= evaluation)
    first, second, distance = first[mixed], second[mixed], distance[mixed]
    order = np.lexsort((first, distance, second))
    ends, best = np.unique(second[order], return_index=True)
    nearest[ends], nearest_distance[ends] = first[order][best], distance[order][best]
    inside = relation.classes < evaluation
    leader = np.where(inside, relation.classes, nearest[relation.classes])
    return leader, np.where(inside, 0, nearest_distance[relation.classes]).astype(np.float32)


def choose_leaders(relations: Sequence[Relation], matches: Matches) -> None:
    """Go through the samples in order and keep each that is no duplicate of one that is kept already.

    Fills in `matches`; samples that have a leader there already are duplicates, and are kept by no one. Relations are
    given from the strongest kind to the weakest, which also decides whose duplicate a sample is called.
    """
    count = len(matches.leader)
    involved = np.zeros(count, bool)
    neighbours = []
    for relation in relations:
        sizes = np.bincount(relation.classes, minlength=count)
        first, second, distance = relation.edges
        sizes[first] += 2
        sizes[second] += 2
        involved |= sizes[relation.classes] > 1
        neighbours.append(_link(relation.edges, count))
    kept = [np.full(count, -1, np.int64) for _ in relations]
    involved &= matches.leader < 0
    for place in np.flatnonzero(involved).tolist():
        classes = [int(relation.classes[place]) for relation in relations]
        for relation, own, kept_of, links in zip(relations, classes, kept, neighbours, strict=True):
            found, distance = int(kept_of[own]), 0.0
            if found < 0:
                near = [(step, int(kept_of[other])) for other, step in links(own) if kept_of[other] >= 0]
                distance, found = min(near, default=(0.0, -1))
            if found >= 0:
                matches.leader[place], matches.distance[place] = found, distance
                matches.kind[place] = KINDS.index(relation.kind)
                break
        else:
            for own, kept_of in zip(classes, kept, strict=True):
                if kept_of[own] < 0:
                    kept_of[own] = place


def _link(edges: tuple[np.ndarray, np.ndarray, np.ndarray], count: int) -> Callable[[int], list[tuple[int, float]]]:
    """The neighbours of a place and their distances."""
    first, second, distance = edges
    if not len(first):
        return lambda place: []
    ends, others = np.concatenate([first, second]), np.concatenate([second, first])
    order = np.argsort(ends, kind="stable")
    others, distances = others[order], np.concatenate([distance, distance])[order]
    starts = np.concatenate([[0], np.cumsum(np.bincount(ends, minlength=count))])

    def links(place: int) -> list[tuple[int, float]]:
        start, stop = starts[place], starts[place + 1]
        return list(zip(others[start:stop].tolist(), distances[start:stop].tolist(), strict=True))

    return links


# The command


@dataclass(frozen=True)
class _Task:
    """A range of samples of one dataset, to be read and hashed by one worker. `row` is the first one's in the columns.

    `by_sample`, `by_caption`: whether to make texts of all captions of a sample together, and of each alone.
    """

    manifest: Manifest
    start: int
    stop: int
    row: int
    work: Path
    kinds: tuple[str, ...]
    minhash_rows: int
    by_sample: bool
    by_caption: bool

    def path(self, name: str) -> Path:
        """Where this range's own part of a column of varying length lies."""
        return self.work / f"{self.row:012d}.{name}"


COLUMNS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "key_hash": ("<u8", (), ()),
    "bytes": ("<u8", (2,), ()),
    "pixels": ("<u8", (2,), ()),
    "codes": ("<u8", (VARIANTS,), ()),
    "light": ("u1", (), (_SIDE, _SIDE)),
    "colour": ("u1", (), (2, 2, 2)),
    "decoded": ("?", (), ()),
}
"""Type of each column and its shape before and behind the number of samples. All samples' values lie in one file."""


def find_duplicates(
    directory: str | Path,
    out: str | Path | None = None,
    *,
    against: Sequence[str | Path] = (),
    kinds: Sequence[str] = KINDS,
    distance: int = DISTANCE,
    caption_similarity: float = CAPTION_SIMILARITY,
    processes: int | None = None,
) -> dict[str, Any]:
    """Write the duplicates in the dataset `directory` to the parquet file `out`; return the counts.

    A row for each sample that is in a cluster, in the order of the dataset, one row a key:

        shard, key
        kind          bytes, pixels, near, caption, or against: in which way it is a duplicate, the strongest first; of
                      a kept sample, the strongest of its duplicates
        match         the same, but for `against` the way in which it is a duplicate of the evaluation sample
        cluster       number of the cluster: a kept (or evaluation) sample and its duplicates
        distance      of it to the kept sample: 0 if equal, bits for near, 1 - Jaccard similarity for caption
        keep          true for one sample a cluster, the first; for against always false
        duplicate_of  the key of the kept (or evaluation) sample; null where that is itself
        evalset       for against: the folder of the evaluation set, as given

    Within `directory` a sample's captions are compared taken together; with the evaluation sets each caption alone, and
    one match is enough. A file `out` of an earlier run is replaced. Pictures that cannot be decoded are compared by
    bytes only, and counted as `undecoded`. Raises UserError for options out of range and keys that occur twice.
    """
    directory = Path(directory)
    out = Path(out) if out is not None else directory.resolve().with_name(directory.resolve().name + _DEFAULT_SUFFIX)
    _check_options(directory, against, kinds, distance, caption_similarity)
    processes = choose_processes(processes)
    datasets = [Manifest.load(place) for place in (*against, directory)]
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(out.name + WORK_SUFFIX)
    work.mkdir(exist_ok=True)
    with lock_folder(work):
        tasks = _plan(work, datasets, tuple(kind for kind in KINDS if kind in kinds), choose_rows(caption_similarity))
        _prepare_work(work, tasks)
        undecoded = _hash_samples(tasks, processes)
        facts = _compare(work, tasks, out, list(map(str, against)), kinds, distance, caption_similarity)
        _empty(work)
    work.rmdir()
    return {"out": str(out), **facts, "undecoded": undecoded}


def _check_options(directory: Path, against: Sequence, kinds: Sequence[str], distance: int, similarity: float) -> None:
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UserError(f"--kinds {' '.join(unknown)}: valid are {', '.join(KINDS)}")
    if not 0 <= distance <= MAX_DISTANCE:
        raise UserError(f"--distance {distance}: give 0 to {MAX_DISTANCE} of 64 bits")
    if not 0.3 <= similarity <= 1:
        raise UserError(f"--caption-similarity {similarity}: give 0.3 to 1")
    for place in against:
        if Path(place).resolve() == directory.resolve():
            raise UserError(f"--against {place}: this is the dataset itself. Give evaluation sets")


def _plan(work: Path, datasets: list[Manifest], kinds: tuple[str, ...], minhash_rows: int) -> list[_Task]:
    """Ranges of hundreds or thousands of samples; the evaluation sets' first, the dataset's last."""
    tasks, row = [], 0
    chunk = min(_MAX_CHUNK, max(_MIN_CHUNK, datasets[-1].samples // 64))
    for number, manifest in enumerate(datasets):
        own = number == len(datasets) - 1
        texts = ("caption" in kinds and own, "caption" in kinds and len(datasets) > 1)
        for start in range(0, manifest.samples, chunk):
            stop = min(start + chunk, manifest.samples)
            tasks.append(_Task(manifest, start, stop, row, work, kinds, minhash_rows, *texts))
            row += stop - start
    return tasks


def _prepare_work(work: Path, tasks: list[_Task]) -> None:
    """Make the files of the columns, unless a run of the same samples and options that was cut short has left them."""
    plan = [(task.start, task.stop, task.row, task.kinds, task.minhash_rows) for task in tasks]
    manifests = {id(task.manifest): task.manifest for task in tasks}
    identity = hashlib.sha256(pickle.dumps((VERSION, PIL.__version__, plan, list(manifests.values())))).hexdigest()
    state = work / _STATE_NAME
    if not state.exists() and any(work.iterdir()) and _leftovers(work) != {_STATE_NAME}:
        raise UserError(f"{work}: holds files of something else. Move them, or give another --out")
    if state.exists() and json.loads(state.read_bytes()) == {"identity": identity}:
        return
    _empty(work)
    write_json_atomic(state, {"identity": ""})
    total = tasks[-1].row + tasks[-1].stop - tasks[-1].start
    for name, (kind, before, behind) in COLUMNS.items():
        np.lib.format.open_memmap(work / f"{name}.npy", "w+", kind, (*before, total, *behind))
    write_json_atomic(state, {"identity": identity})


def _leftovers(work: Path) -> set[str]:
    """The names whose temporary files a killed run has left."""
    names = (path.name for path in work.iterdir() if path.name.endswith(TEMPORARY_SUFFIX))
    return {name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[0] for name in names}


def _empty(work: Path) -> None:
    """Remove what is in the work folder, the state last: whatever is cut short is still known as ours."""
    for path in sorted(work.iterdir(), key=lambda path: path.name == _STATE_NAME):
        path.unlink()


def _hash_samples(tasks: list[_Task], processes: int) -> int:
    """Read and hash what is not there yet; return how many pictures could not be decoded."""
    waiting = [task for task in tasks if not task.path("done.json").exists()]
    with open_progress_bar(sum(task.stop - task.start for task in waiting), "sample") as report:
        with closing(run_tasks(_hash_range, waiting, processes, report)) as results:
            for _ in results:
                pass
    return sum(json.loads(task.path("done.json").read_bytes())["undecoded"] for task in tasks)


def _hash_range(task: _Task, report: Report) -> None:
    """Read a range of samples and write its part of the columns, the mark that they are complete last."""
    count = task.stop - task.start
    columns = {name: np.zeros((*before, count, *behind), kind) for name, (kind, before, behind) in COLUMNS.items()}
    keys, shards, captions, undecoded = [], [], [], 0
    decodes = "pixels" in task.kinds or "near" in task.kinds
    with closing(ShardReader(task.manifest, max_open_shards=4)) as reader:
        for place in range(count):
            sample = reader.read(task.start + place)
            keys.append(sample.key.encode())
            shards.append(sample.shard.encode())
            columns["key_hash"][place] = _hash_bytes(keys[-1])[0]
            captions.append(read_captions(sample) if "caption" in task.kinds else [])
            data = next((sample.fields[name] for name in _PICTURE_EXTENSIONS if name in sample.fields), None)
            if data is not None:
                columns["bytes"][:, place] = np.frombuffer(hashlib.sha256(data).digest()[:16], "<u8")
            if decodes and not (data is not None and _hash_picture(data, columns, place)):
                undecoded += 1
            if (place + 1) % _REPORT_EVERY == 0 or place + 1 == count:
                report(place % _REPORT_EVERY + 1, 0)
    for variant, frequencies in enumerate(transform_variants(columns["light"])):
        columns["codes"][variant] = hash_frequencies(frequencies)
    for name, (_, before, _) in COLUMNS.items():
        whole = np.load(task.work / f"{name}.npy", mmap_mode="r+")
        whole[(*(np.s_[:],) * len(before), np.s_[task.row : task.row + count])] = columns[name]
        whole.flush()
    _write_array(task.path("keys.npy"), np.array(keys))
    _write_array(task.path("shards.npy"), np.array(shards))
    if task.by_sample:
        _write_texts(task, "sample", captions, np.arange(count))
    if task.by_caption:
        owners = np.repeat(np.arange(count), [len(texts) for texts in captions])
        _write_texts(task, "caption", [[text] for texts in captions for text in texts], owners)
    write_json_atomic(task.path("done.json"), {"undecoded": undecoded})


def read_captions(sample: RawSample) -> list[str]:
    """The captions of a sample as it lies in its shard: those of its .json, else its .txt; [] when it has neither."""
    try:
        captions = json.loads(sample.fields["json"])["captions"]
        if isinstance(captions, list) and all(isinstance(caption, str) for caption in captions):
            return captions
    except (KeyError, ValueError, TypeError, RecursionError):
        pass
    text = sample.fields.get("txt")
    return [] if text is None else [text.decode("utf-8", errors="replace")]


def _hash_picture(data: bytes, columns: dict[str, np.ndarray], place: int) -> bool:
    """Fill in what comes from the decoded picture; False when it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                return False
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except MemoryError:
        raise
    except Exception:
        return False  # Pillow's decoders answer to damaged files with almost any exception
    columns["pixels"][:, place] = _hash_bytes(b"%d x %d " % image.size + image.tobytes())
    columns["light"][place], columns["colour"][place] = make_thumbnail(image)
    columns["decoded"][place] = True
    return True


def _hash_bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), "<u8")


def _write_texts(task: _Task, name: str, texts: list[list[str]], owners: np.ndarray) -> None:
    made = shingle_texts(texts)
    _write_array(task.path(f"{name}.hashes.npy"), made.hashes)
    _write_array(task.path(f"{name}.counts.npy"), np.diff(made.starts))
    _write_array(task.path(f"{name}.bands.npy"), sign_texts(made, task.minhash_rows))
    _write_array(task.path(f"{name}.identity.npy"), identify_texts(made))
    _write_array(task.path(f"{name}.owners.npy"), owners + task.row)


def _write_array(path: Path, array: np.ndarray) -> None:
    with open_atomic(path) as file:
        np.save(file, array, allow_pickle=False)


def _compare(
    work: Path,
    tasks: list[_Task],
    out: Path,
    against: list[str],
    kinds: Sequence[str],
    distance: int,
    similarity: float,
) -> dict[str, Any]:
    """From the columns to the result."""
    total = tasks[-1].row + tasks[-1].stop - tasks[-1].start
    evaluation = total - tasks[-1].manifest.samples
    _check_keys(work, tasks, evaluation)
    relations = []
    if "bytes" in kinds:
        relations.append(Relation("bytes", group_equal(_load(work, "bytes")[:], empty=0)))
    if "pixels" in kinds:
        relations.append(Relation("pixels", group_equal(_load(work, "pixels")[:], empty=0)))
    if "near" in kinds:
        relations.append(relate_pictures(work, distance))
    matches = match_against(relations, evaluation) if against else Matches.none(total)
    if "caption" in kinds:
        if against:
            _match_captions(work, tasks, evaluation, similarity, matches)
        relations.append(_relate_texts(work, tasks, evaluation, total, similarity))
    matched = matches.leader >= 0
    # What is of an evaluation set keeps nobody and is kept by nobody.
    matches.leader[:evaluation] = 0
    choose_leaders(relations, matches)
    matches.leader[:evaluation] = -1
    return _write_result(out, tasks, against, evaluation, matches, matched)


def _load(work: Path, name: str) -> np.ndarray:
    return np.load(work / f"{name}.npy", mmap_mode="r")


def _check_keys(work: Path, tasks: list[_Task], evaluation: int) -> None:
    hashes = np.sort(_load(work, "key_hash")[evaluation:])
    twice = hashes[1:][hashes[1:] == hashes[:-1]]
    if len(twice):
        for task in tasks:
            rows = np.flatnonzero(_load(work, "key_hash")[task.row : task.row + task.stop - task.start] == twice[0])
            if task.row >= evaluation and len(rows):
                key = np.load(task.path("keys.npy"))[rows[0]].decode()
                raise UserError(
                    f"{task.manifest.directory}: the key {key!r} occurs more than once ({len(twice)} such samples), so "
                    "a table of keys cannot say which sample is meant. Give each shard's keys a prefix first"
                )


def relate_pictures(work: Path, radius: int) -> Relation:
    """Pictures of one hash and likeness are a class; classes are joined by hashes of the whole and of cuts."""
    codes, light, colour = (_load(work, name) for name in ("codes", "light", "colour"))
    decoded = np.flatnonzero(_load(work, "decoded"))
    classes = np.arange(codes.shape[1])
    classes[decoded] = decoded[group_equal(codes[:1][:, decoded])]

    def are_alike(first: np.ndarray, second: np.ndarray, variant: int = 0) -> np.ndarray:
        """Whether the pictures are alike, `first` cut as `variant` says. A few thousand at a time."""
        alike = np.zeros(len(first), bool)
        for start in range(0, len(first), 4096):
            part = np.s_[start : start + 4096]
            one, other = first[part], second[part]
            cut = next(itertools.islice(transform_variants(light[one]), variant, None))
            whole = next(transform_variants(light[other]))
            alike[part] = confirm_likeness(cut, whole, colour[one], colour[other])
        return alike

    _split_classes(classes, are_alike)
    leaders = decoded[classes[decoded] == decoded]
    chosen = np.lib.format.open_memmap(work / "leaders.npy", "w+", "<u8", (VARIANTS, len(leaders)))
    for variant in range(VARIANTS):
        chosen[variant] = codes[variant][leaders]
    edges = Edges()
    own = np.array(chosen[0])
    with open_progress_bar(VARIANTS * count_tables(len(own), len(own), radius), "table") as report:
        for variant in range(VARIANTS):
            for cuts, wholes, distances in find_neighbours(own, chosen[variant], radius, report):
                # Found from both sides where both are whole, and of no use where a cut resembles its own whole.
                useful = cuts < wholes if variant == 0 else cuts != wholes
                cuts, wholes, distances = leaders[cuts[useful]], leaders[wholes[useful]], distances[useful]
                alike = are_alike(cuts, wholes, variant)
                edges.add(cuts[alike], wholes[alike], distances[alike])
    return Relation("near", classes, edges.collect())


def _split_classes(classes: np.ndarray, are_alike: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Leave in a class who is like its first member; the others form classes of their own, in the same way."""
    waiting = np.flatnonzero(classes != np.arange(len(classes)))
    while len(waiting):
        unlike = waiting[~are_alike(waiting, classes[waiting])]
        # The first of the unlike of each class leads the others of them.
        _, first, group = np.unique(classes[unlike], return_index=True, return_inverse=True)
        classes[unlike] = unlike[first][group]
        waiting = unlike[classes[unlike] != unlike]


@dataclass(frozen=True)
class _StoredTexts:
    """The texts of some ranges, put one after another. `owners`: the row of each text's sample."""

    tasks: list[_Task]
    name: str
    texts: Texts
    owners: np.ndarray

    @classmethod
    def gather(cls, work: Path, tasks: list[_Task], name: str) -> "_StoredTexts":
        """Put the hashes into one file, which is mapped and not loaded."""
        path = work / f"{name}.hashes.bin"
        with open(path, "wb") as file:
            for task in tasks:
                np.load(task.path(f"{name}.hashes.npy")).tofile(file)
        hashes = np.memmap(path, "<u8", "r") if path.stat().st_size else np.zeros(0, np.uint64)
        counts = np.concatenate([np.load(task.path(f"{name}.counts.npy")) for task in tasks])
        owners = np.concatenate([np.load(task.path(f"{name}.owners.npy")) for task in tasks])
        return cls(tasks, name, Texts(hashes, np.concatenate([[0], np.cumsum(counts)])), owners)

    def relate(self, similarity: float) -> Relation:
        """Equal texts are a class; similar ones are joined."""
        parts = [np.load(task.path(f"{self.name}.identity.npy")) for task in self.tasks]
        classes = group_equal(np.concatenate(parts, axis=1), empty=0)
        del parts
        full = self.texts.starts[1:] > self.texts.starts[:-1]
        leaders = np.flatnonzero((classes == np.arange(len(classes))) & full)
        if similarity >= 1:
            return Relation("caption", classes)
        bands = (
            np.concatenate([np.load(task.path(f"{self.name}.bands.npy"), mmap_mode="r")[band] for task in self.tasks])
            for band in range(_BANDS)
        )
        with open_progress_bar(_BANDS, "band") as report:
            edges = find_similar_texts(self.texts, bands, leaders, similarity, report)
        return Relation("caption", classes, edges.collect())


def _relate_texts(work: Path, tasks: list[_Task], evaluation: int, total: int, similarity: float) -> Relation:
    """How the samples of the dataset are alike in their captions; those of evaluation sets are like none."""
    own = [task for task in tasks if task.row >= evaluation]
    relation = _StoredTexts.gather(work, own, "sample").relate(similarity)
    first, second, distance = relation.edges
    classes = np.concatenate([np.arange(evaluation), relation.classes + evaluation])
    return Relation("caption", classes, (first + evaluation, second + evaluation, distance))


def _match_captions(work: Path, tasks: list[_Task], evaluation: int, similarity: float, matches: Matches) -> None:
    """Match samples that have a caption like one of an evaluation set, if nothing stronger matched them."""
    stored = _StoredTexts.gather(work, tasks, "caption")
    evaluation_texts = int(np.searchsorted(stored.owners, evaluation))
    found = match_against([stored.relate(similarity)], evaluation_texts)
    places = np.flatnonzero(found.leader >= 0)
    samples, leaders = stored.owners[places], stored.owners[found.leader[places]]
    order = np.lexsort((leaders, found.distance[places], samples))
    samples, first = np.unique(samples[order], return_index=True)
    new = matches.leader[samples] < 0
    matches.leader[samples[new]] = leaders[order][first][new]
    matches.distance[samples[new]] = found.distance[places][order][first][new]
    matches.kind[samples[new]] = KINDS.index("caption")


def _write_result(
    out: Path, tasks: list[_Task], against: list[str], evaluation: int, matches: Matches, matched: np.ndarray
) -> dict[str, Any]:
    """Write the table and return the counts."""
    import pyarrow
    import pyarrow.parquet

    dropped = np.flatnonzero(matches.leader >= 0)
    leaders, cluster = np.unique(matches.leader[dropped], return_inverse=True)
    strongest = np.full(len(leaders), len(KINDS), np.int8)
    np.minimum.at(strongest, cluster, matches.kind[dropped])
    own = leaders >= evaluation
    rows = np.concatenate([dropped, leaders[own]])
    order = np.argsort(rows)
    rows = rows[order]
    keep = np.concatenate([np.zeros(len(dropped), bool), np.ones(own.sum(), bool)])[order]
    clusters = np.concatenate([cluster, np.flatnonzero(own)])[order]
    match = np.concatenate([matches.kind[dropped], strongest[own]])[order]
    names = _read_names(tasks, np.union1d(rows, leaders))
    is_matched = matched[rows]
    leader_names = [None if kept else names[row][1] for kept, row in zip(keep, leaders[clusters].tolist(), strict=True)]
    sets = _name_sets(tasks, against)
    table = pyarrow.table(
        {
            "shard": pyarrow.array([names[row][0] for row in rows.tolist()], pyarrow.string()),
            "key": pyarrow.array([names[row][1] for row in rows.tolist()], pyarrow.string()),
            "kind": pyarrow.array(
                [AGAINST if found else KINDS[kind] for found, kind in zip(is_matched, match, strict=True)],
                pyarrow.string(),
            ),
            "match": pyarrow.array([KINDS[kind] for kind in match], pyarrow.string()),
            "cluster": pyarrow.array(clusters, pyarrow.int64()),
            "distance": pyarrow.array(np.where(keep, 0, matches.distance[rows]), pyarrow.float32()),
            "keep": pyarrow.array(keep, pyarrow.bool_()),
            "duplicate_of": pyarrow.array(leader_names, pyarrow.string()),
            "evalset": pyarrow.array(
                [sets(row) if found else None for found, row in zip(is_matched, leaders[clusters], strict=True)],
                pyarrow.string(),
            ),
        }
    )
    with open_atomic(out) as file:
        pyarrow.parquet.write_table(table, file)

    def count(chosen: np.ndarray) -> dict[str, int]:
        found = Counter(matches.kind[dropped[chosen]].tolist())
        return {KINDS[kind]: found[kind] for kind in sorted(found)}

    return {
        "samples": tasks[-1].manifest.samples,
        "clusters": len(leaders),
        "duplicates": count(~matched[dropped]),
        "against": count(matched[dropped]),
        "kept": tasks[-1].manifest.samples - len(dropped),
    }


def _read_names(tasks: list[_Task], rows: np.ndarray) -> dict[int, tuple[str, str]]:
    """Shard and key of the samples `rows`, which rise."""
    names = {}
    for task in tasks:
        own = rows[np.searchsorted(rows, task.row) : np.searchsorted(rows, task.row + task.stop - task.start)]
        if len(own):
            shards, keys = (np.load(task.path(f"{name}.npy"))[own - task.row].tolist() for name in ("shards", "keys"))
            found = ((shard.decode(), key.decode()) for shard, key in zip(shards, keys, strict=True))
            names |= zip(own.tolist(), found, strict=True)
    return names


def _name_sets(tasks: list[_Task], against: list[str]) -> Callable[[int], str]:
    """The name of the evaluation set of a row."""
    manifests = dict.fromkeys(id(task.manifest) for task in tasks)
    starts = [next(task.row for task in tasks if id(task.manifest) == number) for number in manifests]
    return lambda row: against[int(np.searchsorted(starts, row, side="right")) - 1]


def print_duplicates(directory: str, out: str | None, as_json: bool, **options: Any) -> None:
    """The command: find, write, and print what came of it."""
    facts = find_duplicates(directory, out, **options)
    if as_json:
        print(json.dumps(facts))
        return
    dropped = facts["samples"] - facts["kept"]
    print(f"{directory}: {facts['samples']} samples, {dropped} are duplicates, {facts['kept']} would be kept")
    for name, text in (("duplicates", "of a sample that is kept"), ("against", "of an evaluation sample")):
        if facts[name]:
            print(f"  {text}: " + ", ".join(f"{kind} {number}" for kind, number in facts[name].items()))
    if facts["undecoded"]:
        print(f"  {facts['undecoded']} pictures could not be decoded and were compared by their bytes only")
    print(f"{facts['out']}: {facts['clusters']} clusters. To leave the duplicates out: python -m data_tools view")
    print(f'  {directory} OUT --where "keep is not false" --join {facts["out"]}')
