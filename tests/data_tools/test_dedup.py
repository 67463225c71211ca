"""Planted copies of drawn pictures through real shards, and every index against its naive twin."""

import io
import itertools
import json
import random
import time

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image, ImageDraw, ImageFilter

from data_tools import dedup
from data_tools.build import build_shards
from data_tools.dedup import (
    Edges,
    Matches,
    Relation,
    choose_leaders,
    choose_rows,
    count_bits,
    count_tables,
    find_duplicates,
    find_neighbours,
    find_similar_texts,
    group_equal,
    identify_texts,
    match_against,
    measure_similarity,
    shingle_texts,
    sign_texts,
)
from data_tools.errors import UserError
from data_tools.image import ImagePolicy


def draw(seed: int) -> Image.Image:
    """A picture with large and small shapes all over, as unlike any other seed's as photographs are."""
    generator = random.Random(seed)
    image = Image.new("RGB", (200, 150), tuple(generator.randrange(256) for _ in range(3)))
    drawing = ImageDraw.Draw(image)
    for number in range(40):
        x, y, size = generator.randrange(200), generator.randrange(150), generator.randrange(8, 90 - 2 * number)
        colour = tuple(generator.randrange(256) for _ in range(3))
        shape = drawing.ellipse if generator.random() < 0.5 else drawing.rectangle
        shape((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=colour)
    return image.filter(ImageFilter.GaussianBlur(1))


def cut(image: Image.Image, share: float, seed: int) -> Image.Image:
    generator = random.Random(seed)
    width, height = (round(side * (1 - share)) for side in image.size)
    left, top = generator.randint(0, image.width - width), generator.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def recompress(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


WAYS = {
    "resized": lambda image, seed: image.resize((100, 75), Image.Resampling.BICUBIC),
    "recompressed": lambda image, seed: recompress(image, 25),
    "cropped": lambda image, seed: cut(image, 0.05, seed),
}


@pytest.fixture
def build(tmp_path):
    """Build shards of (picture or bytes, captions) under a name; every sample's source is its number."""

    def make(name: str, samples: list, samples_per_shard: int = 40):
        folder = tmp_path / f"{name}-images"
        folder.mkdir()
        rows = ["filename\tcaption"]
        for number, (picture, captions) in enumerate(samples):
            path = folder / f"{number}.jpg"
            if isinstance(picture, bytes):
                path.write_bytes(picture)
            else:
                picture.save(path, quality=90)
            rows += [f"{number}.jpg\t{caption}" for caption in captions]
        (folder / "table.tsv").write_text("\n".join(rows) + "\n")
        build_shards(
            folder / "table.tsv",
            tmp_path / name,
            folder,
            samples_per_shard=samples_per_shard,
            images=ImagePolicy(resize=0),
            processes=1,
        )
        return tmp_path / name

    return make


def read_rows(path, shards_size: int = 40) -> dict[int, dict]:
    """The rows of a result by the number of the sample."""

    def number(key: str | None) -> int | None:
        return None if key is None else int(key[:5]) * shards_size + int(key[5:])

    rows = pyarrow.parquet.read_table(path).to_pylist()
    result = {number(row["key"]): {**row, "duplicate_of": number(row["duplicate_of"])} for row in rows}
    assert len(result) == len(rows), "one row a key"
    return result


def test_planted_copies_are_found_and_nothing_else(build, tmp_path):
    """60 pictures, 60 copies in three ways, 60 others: measured recall 1.0 and precision 1.0 on these drawings."""
    originals = [draw(seed) for seed in range(60)]
    ways = list(itertools.islice(itertools.cycle(WAYS), 60))
    copies = [WAYS[way](image, seed) for seed, (way, image) in enumerate(zip(ways, originals, strict=True))]
    others = [draw(1000 + seed) for seed in range(60)]
    shards = build("shards", [(picture, [f"picture {n}"]) for n, picture in enumerate(originals + copies + others)])
    facts = find_duplicates(shards, tmp_path / "d.parquet", kinds=["near"], processes=1)
    rows = read_rows(tmp_path / "d.parquet")
    found = {number: row["duplicate_of"] for number, row in rows.items() if not row["keep"]}
    right = {copy for copy, original in found.items() if copy - 60 == original}
    for way in WAYS:
        planted = {60 + place for place, used in enumerate(ways) if used == way}
        assert len(planted & right) >= 0.95 * len(planted), way
    assert len(right) >= 0.99 * len(found)
    assert facts["kept"] == 180 - len(found) and facts["duplicates"] == {"near": len(found)}
    assert all(row["kind"] == row["match"] == "near" and row["distance"] <= dedup.DISTANCE for row in rows.values())
    assert all(rows[row["duplicate_of"]]["keep"] for row in rows.values() if not row["keep"])


def test_kinds_from_the_strongest_to_the_weakest(build, tmp_path):
    base, noise = draw(1), draw(2)
    buffer = io.BytesIO()
    base.save(buffer, "JPEG", quality=90)
    profile = b"\xff\xe2\x00\x14ICC_PROFILE\0\x01\x01ABCD"  # which a copy keeps
    same_pixels = buffer.getvalue().replace(b"\xff\xdb", profile + b"\xff\xdb", 1)
    assert (np.asarray(Image.open(io.BytesIO(same_pixels))) == np.asarray(Image.open(buffer))).all()
    long = "a small brown dog runs over a wide green field while two children watch it from the old wooden fence"
    samples = [
        (base, ["first"]),
        (noise, [long]),
        (base, ["second"]),
        (same_pixels, ["third"]),
        (recompress(base, 40), ["fourth"]),
        (draw(3), [long.replace("wooden", "stone") + "!"]),
        (draw(4), ["nothing of the kind"]),
    ]
    find_duplicates(build("shards", samples), tmp_path / "d.parquet", processes=1)
    rows = read_rows(tmp_path / "d.parquet")
    assert [(n, row["kind"], row["keep"], row["duplicate_of"], row["cluster"]) for n, row in rows.items()] == [
        (0, "bytes", True, None, 0),
        (1, "caption", True, None, 1),
        (2, "bytes", False, 0, 0),
        (3, "pixels", False, 0, 0),
        (4, "near", False, 0, 0),
        (5, "caption", False, 1, 1),
    ]
    assert all(row["evalset"] is None and row["shard"] == "00000.tar" for row in rows.values())
    assert rows[2]["distance"] == rows[3]["distance"] == 0
    assert 0 < rows[5]["distance"] <= 0.2


def test_against_evaluation_sets(build, tmp_path):
    evaluation = build("eval", [(draw(1), ["a cat on a mat", "the cat sits"]), (draw(2), ["a red bus in the rain"])])
    other = build("other", [(draw(3), ["three birds on a wire"])])
    samples = [
        (draw(1), ["no caption of it"]),
        (recompress(draw(3), 30), ["nor of that"]),
        (draw(10), ["something new", "A red bus, in the rain."]),
        (draw(11), ["kept"]),
        (draw(11), ["a copy within"]),
        (draw(12), ["cat"]),
    ]
    facts = find_duplicates(build("train", samples), tmp_path / "d.parquet", against=[evaluation, other], processes=1)
    rows = read_rows(tmp_path / "d.parquet")
    assert [
        (
            n,
            row["kind"],
            row["match"],
            row["keep"],
            row["evalset"] and row["evalset"].split("/")[-1],
            row["duplicate_of"],
        )
        for n, row in rows.items()
    ] == [
        (0, "against", "bytes", False, "eval", 0),
        (1, "against", "near", False, "other", 0),
        (2, "against", "caption", False, "eval", 1),
        (3, "bytes", "bytes", True, None, None),
        (4, "bytes", "bytes", False, None, 3),
    ]
    assert facts["against"] == {"bytes": 1, "near": 1, "caption": 1} and facts["duplicates"] == {"bytes": 1}
    assert facts["kept"] == 2 and len({row["cluster"] for row in rows.values()}) == 4


def test_the_same_result_for_any_number_of_processes(build, tmp_path, run_data_tools, monkeypatch):
    samples = [(draw(seed % 25), [f"caption number {seed % 40} of a few"]) for seed in range(50)]
    shards = build("shards", samples)
    monkeypatch.setattr(dedup, "_MIN_CHUNK", 7)
    find_duplicates(shards, tmp_path / "one.parquet", processes=1)
    find_duplicates(shards, tmp_path / "two.parquet", processes=2)
    monkeypatch.undo()
    done = run_data_tools("dedup", shards, "--json")
    assert done.returncode == 0, done.stderr
    expected = (tmp_path / "one.parquet").read_bytes()
    assert expected == (tmp_path / "two.parquet").read_bytes()
    assert expected == (tmp_path / "shards.duplicates.parquet").read_bytes()
    facts = json.loads(done.stdout)
    assert facts["samples"] == 50 and facts["duplicates"] == {"bytes": 25} and facts["undecoded"] == 0
    assert not list(tmp_path.glob("*.work")) and not list(tmp_path.glob("*.tmp"))


def test_an_interrupted_run_goes_on(build, tmp_path, monkeypatch):
    shards = build("shards", [(draw(seed % 20), [f"caption {seed}"]) for seed in range(40)])
    find_duplicates(shards, tmp_path / "whole.parquet", processes=1)
    monkeypatch.setattr(dedup, "_MIN_CHUNK", 10)
    real, calls = dedup._hash_range, []

    def stop_at_third(task, report):
        calls.append(task.start)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(task, report)

    monkeypatch.setattr(dedup, "_hash_range", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        find_duplicates(shards, tmp_path / "d.parquet", processes=1)
    assert not (tmp_path / "d.parquet").exists()
    find_duplicates(shards, tmp_path / "d.parquet", processes=1)
    assert calls == [0, 10, 20, 20, 30]  # what was done is not done again
    assert (tmp_path / "d.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_what_is_left_of_other_options_is_not_used(build, tmp_path, monkeypatch):
    shards = build("shards", [(draw(seed), [f"caption {seed}"]) for seed in range(3)])
    work = tmp_path / "d.parquet.work"
    monkeypatch.setattr(dedup, "_compare", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find_duplicates(shards, tmp_path / "d.parquet", kinds=["bytes"], processes=1)
    monkeypatch.undo()
    assert (work / "state.json").exists()
    assert find_duplicates(shards, tmp_path / "d.parquet", processes=1)["undecoded"] == 0
    work.mkdir()
    (work / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files of something else"):
        find_duplicates(shards, tmp_path / "d.parquet", processes=1)
    assert (work / "mine.txt").exists()


def test_refusals(build, tmp_path):
    shards = build("shards", [(draw(1), ["one"])])
    for options, text in (
        ({"distance": 13}, "give 0 to 12"),
        ({"caption_similarity": 0.1}, "give 0.3 to 1"),
        ({"kinds": ["colour"]}, "valid are bytes"),
        ({"against": [shards]}, "the dataset itself"),
        ({"processes": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=text):
            find_duplicates(shards, tmp_path / "d.parquet", **options)
    assert not (tmp_path / "d.parquet").exists()


def test_pictures_that_cannot_be_decoded_are_counted_and_compared_by_bytes(build, tmp_path, monkeypatch):
    shards = build("shards", [(draw(1), ["one"]), (draw(1), ["two"]), (draw(2), ["three"])])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    facts = find_duplicates(shards, tmp_path / "d.parquet", processes=1)
    assert facts["undecoded"] == 3 and facts["duplicates"] == {"bytes": 1}


# The indexes against their naive twins


@pytest.mark.parametrize("radius", range(dedup.MAX_DISTANCE + 1))
def test_neighbours_are_those_of_comparing_all_with_all(radius):
    generator = np.random.default_rng(radius)
    codes = generator.integers(0, 2**64, 300, dtype=np.uint64)
    copies = codes[generator.integers(0, 300, 300)]
    for flips in range(14):  # from 0 to 14 bits away, so on both sides of every radius
        copies[flips * 20 :] ^= np.uint64(1) << generator.integers(0, 64, dtype=np.uint64)
    queries = np.concatenate([copies, codes[:50]])
    expected = {
        (query, code): distance
        for query, code in itertools.product(range(len(queries)), range(len(codes)))
        if (distance := int(queries[query] ^ codes[code]).bit_count()) <= radius
    }
    calls = []
    pieces = list(find_neighbours(codes, queries, radius, lambda done, failed: calls.append(done)))
    found = [
        ((query, code), distance)
        for piece in pieces
        for query, code, distance in zip(*map(np.ndarray.tolist, piece), strict=True)
    ]
    assert len(found) == len(expected) >= 50  # each once
    assert dict(found) == expected
    assert len(calls) == count_tables(len(codes), len(queries), radius)


def test_many_neighbours_come_in_pieces(monkeypatch):
    monkeypatch.setattr(dedup, "_BATCH", 50)
    codes = np.arange(40, dtype=np.uint64)
    pieces = list(find_neighbours(codes, codes, 3))
    assert max(len(piece[0]) for piece in pieces) <= 50
    expected = sum((one ^ other).bit_count() <= 3 for one in range(40) for other in range(40))
    assert sum(len(piece[0]) for piece in pieces) == expected


def test_bits_are_counted():
    values = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    values[:2] = 0, 2**64 - 1
    assert count_bits(values).tolist() == [int(value).bit_count() for value in values]


def test_the_index_does_not_compare_all_with_all():
    """20 times the hashes in far less than 400 times the time; all with all would be 40 billion comparisons."""
    codes = np.random.default_rng(0).integers(0, 2**64, 200_000, dtype=np.uint64)
    codes[-1000:] = codes[:1000] ^ np.uint64(0b10000000100000001)
    started_s = time.monotonic()
    found = sum(int((piece[0] != piece[1]).sum()) for piece in find_neighbours(codes, codes, 4))
    assert found == 2000
    assert time.monotonic() - started_s < 30


def naive_pairs(caption: str) -> set[tuple[str, str]]:
    words = ["<", *caption.lower().replace(",", " ").replace(".", " ").split(), ">"]
    return set(itertools.pairwise(words)) if len(words) > 2 else set()


def test_similarity_of_texts_is_that_of_sets():
    generator = random.Random(0)
    words = ["dog", "cat", "red", "on", "the", "mat"]
    texts = [[" ".join(generator.choices(words, k=generator.randint(0, 9))) for _ in range(2)] for _ in range(80)]
    made = shingle_texts(texts)
    first, second = (np.array(side) for side in zip(*itertools.product(range(80), repeat=2), strict=True))
    sets = [set().union(*map(naive_pairs, captions)) for captions in texts]
    expected = [len(sets[i] & sets[j]) / max(1, len(sets[i] | sets[j])) for i, j in zip(first, second, strict=True)]
    assert measure_similarity(made, first, second).tolist() == pytest.approx(expected)
    classes = group_equal(identify_texts(made), empty=0)
    assert [classes[i] == classes[j] for i, j in zip(first, second, strict=True)] == [
        i == j or (sets[i] == sets[j] and bool(sets[i])) for i, j in zip(first, second, strict=True)
    ]


def test_words_of_any_script():
    made = shingle_texts([["Ａ Café!"], ["a cafe\u0301"], ["一只狗"], ["一 只 狗"], ["..."], []])
    assert np.diff(made.starts).tolist() == [3, 3, 4, 4, 0, 0]
    assert measure_similarity(made, np.array([0, 2]), np.array([1, 3])).tolist() == [1, 1]


@pytest.mark.parametrize("similarity", (0.5, 0.8, 0.95))
def test_similar_texts_are_those_of_comparing_all_with_all(similarity):
    generator = random.Random(1)
    words = [f"w{number}" for number in range(400)]
    texts = []
    for _ in range(150):
        first = generator.choices(words, k=generator.randint(5, 160))
        second = list(first)
        for _ in range(generator.randint(0, 4)):
            second[generator.randrange(len(second))] = generator.choice(words)
        texts += [[" ".join(first)], [" ".join(second)]]
    made = shingle_texts(texts)
    places = np.flatnonzero(group_equal(identify_texts(made), empty=0) == np.arange(len(texts)))
    bands = sign_texts(made, choose_rows(similarity))
    first, second, distance = find_similar_texts(made, bands, places, similarity).collect()
    every = np.array(list(itertools.combinations(places.tolist(), 2)))
    alike = measure_similarity(made, every[:, 0], every[:, 1])
    expected = {tuple(pair) for pair in every[alike >= similarity].tolist()}
    found = set(zip(first.tolist(), second.tolist(), strict=True))
    assert found <= expected  # verified, so none is wrong
    assert len(found) >= 0.98 * len(expected) > 10
    assert (distance <= 1 - similarity + 1e-6).all()


# Who is a duplicate of whom


def naive_leaders(relations: list[Relation], count: int) -> list[tuple[int, int]]:
    """(leader, kind) of each, straight from the rule: none of the kept ones is alike."""
    result, kept = [], []
    for place in range(count):
        best = None
        for kind, relation in enumerate(relations):
            near = {}
            for one, other, distance in zip(*relation.edges, strict=True):
                near[one, other] = near[other, one] = distance
            own = relation.classes[place]
            options = []
            for leader in kept:
                theirs = relation.classes[leader]
                if own == theirs:
                    options.append((-1, leader))
                elif (own, theirs) in near:
                    options.append((near[own, theirs], leader))
            if options:
                best = (min(options)[1], kind)
                break
        if best is None:
            kept.append(place)
        result.append(best or (-1, 0))
    return result


@pytest.mark.parametrize("seed", range(20))
def test_leaders_are_those_of_the_rule(seed):
    generator = np.random.default_rng(seed)
    count, relations = 40, []
    for kind in ("bytes", "near", "caption"):
        classes = group_equal(generator.integers(0, 30, (1, count)))
        leaders = np.unique(classes)
        edges = Edges()
        if kind != "bytes":
            edges.add(*generator.choice(leaders, (2, 8)), generator.integers(1, 7, 8))
        relations.append(Relation(kind, classes, edges.collect()))
    matches = Matches.none(count)
    choose_leaders(relations, matches)
    kinds = {"bytes": 0, "near": 2, "caption": 3}
    named = [kinds[relations[kind].kind] if leader >= 0 else 0 for leader, kind in naive_leaders(relations, count)]
    assert matches.leader.tolist() == [leader for leader, _ in naive_leaders(relations, count)]
    assert matches.kind.tolist() == named


def test_the_nearest_evaluation_sample_counts():
    edges = Edges()
    edges.add(np.array([0, 5, 2, 4]), np.array([4, 2, 4, 6]), np.array([5, 3, 2, 1]))
    near = Relation("near", np.array([0, 0, 2, 3, 4, 5, 6]), edges.collect())
    same = Relation("bytes", np.array([0, 1, 2, 3, 4, 1, 6]))
    matches = match_against([same, near], 3)
    assert matches.leader.tolist() == [-1, -1, -1, -1, 2, 1, -1]
    assert matches.kind.tolist()[4:6] == [2, 0] and matches.distance.tolist()[4:6] == [2, 0]


def test_edges_keep_the_least_distance_and_no_loops():
    edges = Edges()
    edges.add(np.array([3, 1, 2]), np.array([1, 3, 2]), np.array([4, 2, 0]))
    edges.collect()
    edges.add(np.array([1]), np.array([3]), np.array([3]))
    assert [part.tolist() for part in edges.collect()] == [[1], [3], [2]]
