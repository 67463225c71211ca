"""How well near duplicates are found among real pictures, and what the index costs for a million.

    python benchmarks/dedup.py pictures FOLDER              (precision and recall on planted copies, by distance)
    python benchmarks/dedup.py index --samples 1000000      (seconds and bytes a sample, on synthetic hashes)

`pictures` copies each of the first --planted pictures of FOLDER once, in one of the ways below in turn, builds shards of
those, their originals and the pictures after them as `python -m data_tools build` does, and runs `dedup` on them.
Recall: the share of copies that are found to be duplicates of their original. Precision: the share of true ones among
all that are found; a duplicate that FOLDER itself holds counts as wrong there, so the pairs are listed. Cuts are of both
width and height, at a random place.

`index` draws hashes of which 1 in 100 is a copy with up to 6 bits changed, and captions of words as frequent as in
natural text, of which 1 in 100 is a copy with a word changed.
"""

import argparse
import io
import itertools
import random
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image

from data_tools.build import build_shards
from data_tools.dedup import (
    CAPTION_SIMILARITY,
    COLUMNS,
    DISTANCE,
    Matches,
    Relation,
    choose_leaders,
    choose_rows,
    find_duplicates,
    find_similar_texts,
    group_equal,
    identify_texts,
    relate_pictures,
    shingle_texts,
    sign_texts,
)
from data_tools.errors import UserError, run_command
from data_tools.image import ImagePolicy
from data_tools.shards import Manifest

DISTANCES = (0, 2, 4, 6, 8, 10, 12)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("pictures", help="precision and recall on planted copies of real pictures")
    command.add_argument("folder", type=Path)
    command.add_argument("--planted", type=int, default=1000, metavar="N", help="pictures to copy (1000)")
    command.add_argument("--others", type=int, default=4000, metavar="N", help="pictures without a copy (4000)")
    command.add_argument("--resize", type=int, default=256, metavar="PX", help="as in `build` (256)")
    command.add_argument("--processes", type=int, default=None, metavar="N")
    command.set_defaults(run=measure_pictures)
    command = commands.add_parser("index", help="seconds and memory of the comparison")
    command.add_argument("--samples", type=int, default=1_000_000, metavar="N")
    command.add_argument("--distance", type=int, default=DISTANCE, metavar="N")
    command.set_defaults(run=measure_index)
    options = vars(parser.parse_args())
    return run_command(options.pop("run"), **options)


def encode(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def scale(image: Image.Image, factor: float) -> Image.Image:
    size = [max(1, round(side * factor)) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC)


def cut(image: Image.Image, share: float, generator: random.Random) -> Image.Image:
    width, height = (round(side * (1 - share)) for side in image.size)
    left, top = generator.randint(0, image.width - width), generator.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


WAYS: dict[str, Callable[[Image.Image, random.Random], bytes]] = {
    "resized to 50 %": lambda image, generator: encode(scale(image, 0.5)),
    "resized to 150 %": lambda image, generator: encode(scale(image, 1.5)),
    "recompressed, quality 50": lambda image, generator: encode(image, 50),
    "recompressed, quality 20": lambda image, generator: encode(image, 20),
    "brighter by 20 %": lambda image, generator: encode(image.point(lambda value: min(255, int(value * 1.2)))),
    "cropped 2 %": lambda image, generator: encode(cut(image, 0.02, generator)),
    "cropped 5 %": lambda image, generator: encode(cut(image, 0.05, generator)),
    "cropped 10 %": lambda image, generator: encode(cut(image, 0.10, generator)),
    "50 %, cropped 5 %, quality 50": lambda image, generator: encode(cut(scale(image, 0.5), 0.05, generator), 50),
}


def measure_pictures(folder: Path, planted: int, others: int, resize: int, processes: int | None) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    names = names[: planted + others]
    if len(names) <= planted:
        raise UserError(f"{folder}: {len(names)} pictures. Give a folder with more than --planted {planted}")
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as root:
        ways = plant(folder, names, planted, Path(root))
        build_shards(
            Path(root, "all.tsv"),
            Path(root, "shards"),
            Path(root),
            images=ImagePolicy(resize=resize),
            processes=processes,
        )
        print(f"{len(names)} pictures of {folder}, {planted} copies")
        rows = {distance: find(Path(root, "shards"), distance, processes) for distance in DISTANCES}
        report(ways, rows)


def plant(folder: Path, names: list[str], planted: int, root: Path) -> dict[str, str]:
    """Write the copies and the table, originals first; return the way that each copy was made in."""
    generator = random.Random(0)
    (root / "originals").symlink_to(folder.resolve())
    (root / "copies").mkdir()
    ways = {}
    for name, way in zip(names[:planted], itertools.cycle(WAYS)):
        copy = Path(name).stem + ".jpg"
        with Image.open(folder / name) as image:
            (root / "copies" / copy).write_bytes(WAYS[way](image.convert("RGB"), generator))
        ways[f"copies/{copy}"] = way
    lines = ["filename\tcaption", *(f"originals/{name}\tx" for name in names), *(f"{copy}\tx" for copy in ways)]
    (root / "all.tsv").write_text("\n".join(lines) + "\n")
    return ways


def find(shards: Path, distance: int, processes: int | None) -> dict[str, str]:
    """What is found: duplicate -> kept one, by the names in the table."""
    manifest = Manifest.load(shards)
    out = shards.parent / "duplicates.parquet"
    find_duplicates(shards, out, kinds=["bytes", "pixels", "near"], distance=distance, processes=processes)
    sources = {}
    for shard in manifest.shards:
        table = pyarrow.parquet.read_table(shards / f"{Path(shard.name).stem}.parquet", columns=["key", "source"])
        sources |= zip(table["key"].to_pylist(), table["source"].to_pylist(), strict=True)
    rows = pyarrow.parquet.read_table(out).to_pylist()
    return {sources[row["key"]]: sources[row["duplicate_of"]] for row in rows if not row["keep"]}


def report(ways: dict[str, str], rows: dict[int, dict[str, str]]) -> None:
    totals = Counter(ways.values())
    print(f"{'share of copies found at distance':<34}" + "".join(f"{distance:>8}" for distance in rows))

    def is_right(copy: str, kept: str) -> bool:
        return copy in ways and Path(copy).stem == Path(kept).stem

    for way, total in totals.items():
        found = [
            sum(ways.get(copy) == way and is_right(copy, kept) for copy, kept in pairs.items())
            for pairs in rows.values()
        ]
        print(f"  {way:<32}" + "".join(f"{count / total:>8.3f}" for count in found))
    right = [sum(is_right(*pair) for pair in pairs.items()) for pairs in rows.values()]
    print(f"{'recall':<34}" + "".join(f"{count / len(ways):>8.3f}" for count in right))
    shares = [count / max(1, len(pairs)) for count, pairs in zip(right, rows.values(), strict=True)]
    print(f"{'precision':<34}" + "".join(f"{share:>8.4f}" for share in shares))
    print(f"{'found':<34}" + "".join(f"{len(pairs):>8}" for pairs in rows.values()))
    print(f"not planted, at distance {DISTANCE}:")
    for copy, kept in rows[DISTANCE].items():
        if not is_right(copy, kept):
            print(f"  {copy} = {kept}")


def measure_index(samples: int, distance: int) -> None:
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as root:
        copies = draw_columns(Path(root), samples)
        tracemalloc.start()
        started_s = time.monotonic()
        classes = group_equal(np.load(Path(root, "codes.npy"), mmap_mode="r")[:2], empty=0)
        exact_s = time.monotonic() - started_s
        near = relate_pictures(Path(root), distance)
        near_s = time.monotonic() - started_s - exact_s
        matches = Matches.none(samples)
        choose_leaders([Relation("bytes", classes), near], matches)
        total_s = time.monotonic() - started_s
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        found = int((matches.leader[-copies:] >= 0).sum())
    print(f"{samples} hashes, distance {distance}: {found} of {copies} copies found, {len(near.edges[0])} edges")
    print(f"  equal ones {exact_s:.1f} s, near ones {near_s:.1f} s, all {total_s:.1f} s")
    print(
        f"  memory at most {peak_bytes / samples:.0f} bytes a sample, and pages of mapped files, which the system may drop"
    )
    texts, copies = draw_texts(samples)
    started_s = time.monotonic()
    shingles = shingle_texts(texts)
    bands = sign_texts(shingles, choose_rows(CAPTION_SIMILARITY))
    signed_s = time.monotonic() - started_s
    classes = group_equal(identify_texts(shingles), empty=0)
    leaders = np.flatnonzero(classes == np.arange(samples))
    relation = Relation("caption", classes, find_similar_texts(shingles, bands, leaders, CAPTION_SIMILARITY).collect())
    matches = Matches.none(samples)
    choose_leaders([relation], matches)
    print(
        f"{samples} captions, similarity {CAPTION_SIMILARITY}: {int((matches.leader[-copies:] >= 0).sum())} of {copies}"
    )
    print(f"  made in {signed_s:.1f} s (one process), compared in {time.monotonic() - started_s - signed_s:.1f} s")


def draw_columns(root: Path, samples: int) -> int:
    """Columns as `dedup` makes them; the last 1 in 100 are copies. All thumbnails are equal, so all candidates pass."""
    generator = np.random.default_rng(0)
    copies = samples // 100
    for name, (kind, before, behind) in COLUMNS.items():
        np.lib.format.open_memmap(root / f"{name}.npy", "w+", kind, (*before, samples, *behind))
    codes = np.load(root / "codes.npy", mmap_mode="r+")
    for variant in range(len(codes)):
        codes[variant] = generator.integers(0, 2**64, samples, dtype=np.uint64)
    flips = np.zeros(copies, np.uint64)
    for _ in range(6):
        flips ^= np.uint64(1) << generator.integers(0, 64, copies, dtype=np.uint64)
    codes[0, -copies:] = codes[0, :copies] ^ flips
    np.load(root / "decoded.npy", mmap_mode="r+")[:] = True
    return copies


def draw_texts(samples: int) -> tuple[list[list[str]], int]:
    generator = np.random.default_rng(0)
    copies = samples // 100
    words = [f"w{number}" for number in range(50_000)]
    drawn = np.minimum(generator.zipf(1.2, (samples, 24)), len(words)) - 1
    drawn[-copies:] = drawn[:copies]
    drawn[-copies:, 12] = 7
    return [[" ".join(words[number] for number in row)] for row in drawn.tolist()], copies


if __name__ == "__main__":
    sys.exit(main())
