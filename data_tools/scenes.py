"""Draws the demo data: small pictures of two or three coloured shapes in stated relations, with captions and questions.

The scenes are simple enough to learn in minutes and hard enough to mean something: a pair of coloured shapes that
occurs in a validation picture occurs in no training picture, and about a third of the validation pictures are twins of
another one, made of the same words ("a red circle left of a blue square", "a blue circle left of a red square").

A picture is a pure function of (seed, split, place in the split): neither the counts nor the number of processes change
it. Lengths are in pixels of a picture of 96 x 96; other sizes are scaled.
"""

import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageDraw

from data_tools.errors import UserError
from data_tools.files import TEMPORARY_SUFFIX, lock_folder, write_atomic, write_json_atomic
from data_tools.workers import Report, choose_processes, open_progress_bar, run_tasks

VERSION = 1
COLOURS = {
    "red": (214, 32, 38),
    "orange": (245, 130, 20),
    "yellow": (240, 218, 20),
    "green": (28, 150, 58),
    "cyan": (40, 200, 218),
    "blue": (32, 66, 210),
    "purple": (140, 48, 176),
    "black": (24, 24, 28),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES_PX = {"small": 14.0, "medium": 22.0, "large": 34.0}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_DIRECTION = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
"""Where the second of two objects lies, seen from the first, when the first is "left of" (...) the second."""
_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_BESIDE = {"left of": "on its left", "right of": "on its right", "above": "above it", "below": "below it"}
_PAIR_TEMPLATES = (
    "{a} {ab} {b}",
    "{a} is {ab} {b}",
    "there is {a} {ab} {b}",
    "a picture of {a} {ab} {b}",
    "{ab} {b} there is {a}",
    "{b} with {a} {beside}",
)
_CHAIN_TEMPLATES = (
    "{a} {ab} {b}, which is {bc} {c}",
    "{a} is {ab} {b} and {the_b} is {bc} {c}",
    "there is {a} {ab} {b} that is {bc} {c}",
    "a picture of {a} {ab} {b}, with {the_b} {bc} {c}",
    "{a} is {ab} {b}, {the_b} is {bc} {c}",
)

_PICTURE_PX = 96
_MARGIN_PX, _GAP_PX, _SPREAD_PX, _DRIFT_PX = 3.0, 5.0, 22.0, 8.0
_INNER_PX = _PICTURE_PX - 2 * _MARGIN_PX
_SUPERSAMPLING = 4
_HELD_OUT_SHARE = 0.2
_THREE_OBJECTS_SHARE = 0.3
_TWIN_CHANCE = 0.5
_QUESTIONS = 4
_CHUNK_PICTURES = 200
_PLAN_ATTEMPTS = 200

_STATE_NAME, _FINISHED_NAME = "drawing.json", "scenes.json"
_TABLE_NAMES = ("captions.tsv", "questions.tsv", "scenes.jsonl", "splits/train.txt", "splits/val.txt", "README.md")

Option = TypeVar("Option")


@dataclass(frozen=True)
class Item:
    """One object, in words."""

    size: str
    colour: str
    shape: str

    @property
    def kind(self) -> tuple[str, str]:
        """Colour and shape: what held-out pairs are made of."""
        return self.colour, self.shape

    def name(self, article: str, sized: bool) -> str:
        """ "a small red circle", "an orange star", "the blue square"."""
        words = f"{self.size} {self.colour} {self.shape}" if sized else f"{self.colour} {self.shape}"
        if article == "a" and words[0] in "aeiou":
            article = "an"
        return f"{article} {words}"


@dataclass(frozen=True)
class Scene:
    """Two or three items of different kinds; item k is `relations[k]` item k + 1."""

    items: tuple[Item, ...]
    relations: tuple[str, ...]

    @property
    def reversed(self) -> "Scene":
        """The same scene told from its other end."""
        return Scene(self.items[::-1], tuple(OPPOSITE[relation] for relation in self.relations[::-1]))

    def identity(self, sized: bool) -> tuple:
        """Equal for two scenes exactly when the same words describe them (with or without the words for sizes)."""
        tellings = (self, self.reversed)
        return min((tuple(item.name("a", sized) for item in telling.items), telling.relations) for telling in tellings)


@dataclass(frozen=True)
class Picture:
    """A scene with everything that is needed to draw it: centre and width of each item, and the background."""

    scene: Scene
    boxes: tuple[tuple[float, float, float], ...]
    background: tuple[int, int, int]


def draw_scenes(
    out: str | Path,
    count: int = 20_000,
    val_count: int = 1_000,
    seed: int = 0,
    size: int = _PICTURE_PX,
    processes: int | None = None,
    restart: bool = False,
) -> None:
    """Draw `count` training and `val_count` validation pictures of `size` x `size` pixels into the folder `out`.

    Writes images/, captions.tsv, questions.tsv, scenes.jsonl (what is where), splits/ and, last, scenes.json. A run
    that was cut short goes on; a finished one is left alone. Raises UserError for counts that cannot be drawn and for a
    folder that holds other things, unless `restart` and they are scenes: then those are removed first.
    """
    out = Path(out)
    if count < 1 or val_count < 0:
        raise UserError(f"--count {count} --val-count {val_count}: give at least 1 and at least 0")
    if not 32 <= size <= 1024:
        raise UserError(f"--size {size}: give 32 to 1024 pixels")
    processes = choose_processes(processes)
    plan = {"version": VERSION, "seed": seed, "count": count, "val_count": val_count, "size": size}
    _plan_validation(seed, val_count)
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        if _is_finished(out, plan, restart):
            print(f"{out}: {count} + {val_count} scenes are there already")
            return
        write_json_atomic(out / _STATE_NAME, plan)
        for folder in ("images", "splits"):
            (out / folder).mkdir(exist_ok=True)
        numbers = range(0, count + val_count, _CHUNK_PICTURES)
        tasks = [_Chunk(out, seed, size, count, val_count, start) for start in numbers]
        chunks: list[tuple[str, str, str]] = [("", "", "")] * len(tasks)
        with open_progress_bar(count + val_count, "scene") as report:
            with closing(run_tasks(_draw_chunk, tasks, processes, report)) as results:
                for number, tables in results:
                    chunks[number] = tables
        captions, questions, descriptions = ("".join(tables) for tables in zip(*chunks, strict=True))
        train = "".join(f"{_file_name(number)}\n" for number in range(count))
        val = "".join(f"{_file_name(number)}\n" for number in range(count, count + val_count))
        contents = (
            f"filename\tcaption\n{captions}",
            f"filename\tquestion\tanswer\tkind\n{questions}",
            descriptions,
            train,
            val,
            _README.format(**plan),
        )
        for name, content in zip(_TABLE_NAMES, contents, strict=True):
            write_atomic(out / name, content.encode())
        write_json_atomic(out / _FINISHED_NAME, plan)
        (out / _STATE_NAME).unlink()
    print(f"{out}: drew {count} + {val_count} scenes")


_README = """# Drawn scenes

{count} training and {val_count} validation pictures of {size} x {size} pixels, seed {seed}: two or three coloured
shapes in stated relations.

- captions.tsv: filename, caption; three to five a picture
- questions.tsv: filename, question, answer, kind
- scenes.jsonl: what is where: objects (pixels), relations, and the picture's twin
- splits/train.txt, splits/val.txt: file names

No pair of coloured shapes in a validation picture occurs in a training picture. About a third of the validation
pictures (fewer of several thousand) are twins of another one: colours are swapped, or the relations turned round.
"""


def _is_finished(out: Path, plan: dict[str, Any], restart: bool) -> bool:
    """Whether `out` holds these scenes. Raises UserError when it holds other things; removes scenes to restart."""
    state = next((out / name for name in (_STATE_NAME, _FINISHED_NAME) if (out / name).exists()), None)
    found = _read_plan(state) if state else None
    if found is None or found.keys() != plan.keys():
        foreign = [name for name in os.listdir(out) if not name.endswith(TEMPORARY_SUFFIX)]
        if foreign:
            raise UserError(f"{out}: holds other files (such as {min(foreign)}). Give an empty or a new folder")
        return False
    if restart:
        _remove_scenes(out, found)
        return False
    if found != plan:
        differing = [f"--{key.replace('_', '-')} {found.get(key)}" for key in plan if found.get(key) != plan[key]]
        raise UserError(
            f"{out}: holds scenes drawn with {' '.join(differing)}. Give the same values, another folder, or --restart"
        )
    return state.name == _FINISHED_NAME


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _remove_scenes(out: Path, found: dict[str, Any]) -> None:
    """Remove what a run with the arguments `found` has written, and nothing else.

    The folder counts as unfinished from the first moment to the last.
    """
    write_json_atomic(out / _STATE_NAME, found)
    (out / _FINISHED_NAME).unlink(missing_ok=True)
    for number in range(found["count"] + found["val_count"]):
        path = out / "images" / _file_name(number)
        path.unlink(missing_ok=True)
        path.with_suffix(TEMPORARY_SUFFIX).unlink(missing_ok=True)
    for name in (*_TABLE_NAMES, _STATE_NAME):
        (out / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Chunk:
    out: Path
    seed: int
    size: int
    count: int
    val_count: int
    start: int


def _draw_chunk(chunk: _Chunk, report: Report) -> tuple[str, str, str]:
    """Draw the chunk's missing pictures; return its lines for captions.tsv, questions.tsv and scenes.jsonl."""
    captions, questions, descriptions = [], [], []
    for number in range(chunk.start, min(chunk.start + _CHUNK_PICTURES, chunk.count + chunk.val_count)):
        name = _file_name(number)
        if number < chunk.count:
            generator = random.Random(f"{chunk.seed}/train/{number}")
            scene, twin_of = make_training_scene(generator, number, chunk.seed), None
        else:
            place = number - chunk.count
            generator = random.Random(f"{chunk.seed}/val/{place}")
            scene, twin = _plan_validation(chunk.seed, chunk.val_count)[place]
            twin_of = None if twin is None else _file_name(chunk.count + twin)
        picture = arrange(generator, scene)
        captions += (f"{name}\t{caption}\n" for caption in write_captions(generator, scene))
        questions += (f"{name}\t" + "\t".join(row) + "\n" for row in write_questions(generator, scene))
        descriptions.append(json.dumps({"filename": name, "twin_of": twin_of, **_describe(picture, chunk.size)}) + "\n")
        path = chunk.out / "images" / name
        if not path.exists():
            # No fsync: pictures are drawn again for nothing, and thousands of them would take minutes to sync.
            temporary = path.with_suffix(TEMPORARY_SUFFIX)
            temporary.write_bytes(render_picture(picture, chunk.size))
            os.replace(temporary, path)
        report(1)
    return "".join(captions), "".join(questions), "".join(descriptions)


def _file_name(number: int) -> str:
    return f"{number:06d}.jpg"


def _pick(generator: random.Random, options: Sequence[Option]) -> Option:
    """Uses random() alone, the one method whose sequence Python promises to keep."""
    return options[int(generator.random() * len(options))]


def _shuffle(generator: random.Random, options: Sequence[Option]) -> list[Option]:
    return sorted(options, key=lambda _: generator.random())


# Which scenes: the words


@functools.lru_cache(maxsize=4)
def choose_held_out(seed: int) -> frozenset[frozenset[tuple[str, str]]]:
    """The pairs of (colour, shape) kept for validation: about a fifth of all pairs, drawn by a seeded hash.

    Two colours and two shapes make two pairs, which swapping the colours exchanges; they are held out together, so that
    a twin with swapped colours is a validation picture too.
    """
    groups: dict[tuple, list[frozenset]] = {}
    for first, second in itertools.combinations(itertools.product(COLOURS, SHAPES), 2):
        group = (*sorted((first[0], second[0])), *sorted((first[1], second[1])))
        groups.setdefault(group, []).append(frozenset((first, second)))
    drawn = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}/{'/'.join(group)}".encode()).digest())
    return frozenset(pair for group in drawn[: round(_HELD_OUT_SHARE * len(drawn))] for pair in groups[group])


def make_training_scene(generator: random.Random, number: int, seed: int) -> Scene:
    """A scene without held-out pairs; 48 scenes in a row show every coloured shape."""
    kinds = list(itertools.product(COLOURS, SHAPES))
    held_out = choose_held_out(seed)
    total = 3 if generator.random() < _THREE_OBJECTS_SHARE else 2
    chosen = [kinds[number % len(kinds)]]
    while len(chosen) < total:
        kind = _pick(generator, kinds)
        if kind not in chosen and all(frozenset((kind, other)) not in held_out for other in chosen):
            chosen.append(kind)
    return _make_scene(generator, chosen)


@functools.lru_cache(maxsize=4)
def _plan_validation(seed: int, count: int) -> tuple[tuple[Scene, int | None], ...]:
    """`count` different scenes of held-out pairs alone, each with the place of the scene that it is a twin of, if any.

    Scenes differ without the words for sizes for as long as there are such scenes, and always with them; a longer plan
    begins with the shorter ones.
    """
    generator = random.Random(f"{seed}/plan")
    held_out = choose_held_out(seed)
    pairs = sorted(sorted(pair) for pair in held_out)
    triples = [
        [*pair, kind]
        for pair in pairs
        for kind in itertools.product(COLOURS, SHAPES)
        if kind > pair[1] and all(frozenset((kind, other)) in held_out for other in pair)
    ]
    plan: list[tuple[Scene, int | None]] = []
    seen: set[tuple] = set()

    def add(scene: Scene, twin_of: int | None, sized: bool) -> bool:
        if scene.identity(sized) in seen:
            return False
        seen.update((scene.identity(False), scene.identity(True)))
        plan.append((scene, twin_of))
        return True

    sized = {2: False, 3: False}  # whether scenes of so many objects differ by their sizes alone from here on
    while len(plan) < count:
        total = 3 if triples and generator.random() < _THREE_OBJECTS_SHARE else 2
        for attempt in range(2 * _PLAN_ATTEMPTS):
            scene = _make_scene(generator, _pick(generator, triples if total == 3 else pairs))
            sized[total] |= attempt >= _PLAN_ATTEMPTS
            if add(scene, None, sized[total]):
                break
        else:
            raise UserError(f"--val-count {count}: there are not that many different scenes. Give at most {len(plan)}")
        if generator.random() < _TWIN_CHANCE:
            twins = _shuffle(generator, list(_make_twins(scene)))
            any(add(twin, len(plan) - 1, sized=False) for twin in twins)
    return tuple(plan[:count])


def _make_twins(scene: Scene) -> Iterator[Scene]:
    """The scene with its relations turned round and, for two objects that differ in both, with colours swapped."""
    yield Scene(scene.items, tuple(OPPOSITE[relation] for relation in scene.relations))
    if len(scene.items) == 2:
        first, second = scene.items
        swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        if {item.kind for item in swapped} != {first.kind, second.kind}:
            yield replace(scene, items=swapped)


def _make_scene(generator: random.Random, kinds: Sequence[tuple[str, str]]) -> Scene:
    """Put the kinds in some order and give them sizes and relations: three make a row, a column or a corner."""
    relations = [_pick(generator, list(OPPOSITE))]
    if len(kinds) == 3:
        relations.append(_pick(generator, [relation for relation in OPPOSITE if relation != OPPOSITE[relations[0]]]))
    in_line = len(set(relations)) == 1
    while True:
        sizes = [_pick(generator, list(SIZES_PX)) for _ in kinds]
        if not in_line or sum(SIZES_PX[size] for size in sizes) <= _INNER_PX - _GAP_PX * len(relations):
            break
    shuffled = _shuffle(generator, kinds)
    items = tuple(Item(size, colour, shape) for size, (colour, shape) in zip(sizes, shuffled, strict=True))
    return Scene(items, tuple(relations))


# How they look


def arrange(generator: random.Random, scene: Scene) -> Picture:
    """Place the items: along the stated direction they are clearly apart, across it they differ by little."""
    widths = [SIZES_PX[item.size] for item in scene.items]
    for attempt in itertools.count():
        # Less and less room between the items, so that three large ones in a row end up touching both margins.
        spread = _SPREAD_PX * max(0.0, 1 - attempt / 32)
        centres = [(0.0, 0.0)]
        for relation, (before, after) in zip(scene.relations, itertools.pairwise(widths), strict=True):
            along = (before + after) / 2 + _GAP_PX + spread * generator.random()
            across = min(_DRIFT_PX, 0.3 * along) * (2 * generator.random() - 1)
            step_x, step_y = _DIRECTION[relation]
            x, y = centres[-1]
            centres.append((x + along * step_x + across * step_y, y + along * step_y + across * step_x))
        lows, highs = zip(*(_find_extent(centres, widths, axis) for axis in (0, 1)), strict=True)
        fits = all(high - low <= _INNER_PX + 1e-6 for low, high in zip(lows, highs, strict=True))
        if fits and _are_apart(centres, widths):
            break
    shift_x, shift_y = (
        _MARGIN_PX - low + (_INNER_PX - (high - low)) * generator.random()
        for low, high in zip(lows, highs, strict=True)
    )
    boxes = tuple((x + shift_x, y + shift_y, width) for (x, y), width in zip(centres, widths, strict=True))
    light = 226 + 22 * generator.random()
    background = tuple(round(light + 6 * (2 * generator.random() - 1)) for _ in range(3))
    return Picture(scene, boxes, background)


def _find_extent(centres: Sequence[tuple[float, float]], widths: Sequence[float], axis: int) -> tuple[float, float]:
    """The lowest and the highest coordinate of the items on one axis."""
    low = min(centre[axis] - width / 2 for centre, width in zip(centres, widths, strict=True))
    high = max(centre[axis] + width / 2 for centre, width in zip(centres, widths, strict=True))
    return low, high


def _are_apart(centres: Sequence[tuple[float, float]], widths: Sequence[float]) -> bool:
    """Whether all boxes keep nearly the usual gap between them."""
    return all(
        max(abs(x - other_x), abs(y - other_y)) >= (width + other_width) / 2 + _GAP_PX - 1
        for ((x, y), width), ((other_x, other_y), other_width) in itertools.combinations(
            zip(centres, widths, strict=True), 2
        )
    )


def render_picture(picture: Picture, size: int) -> bytes:
    """Draw the picture as a JPEG of `size` x `size` pixels, at four times the size and then averaged: smooth edges."""
    canvas = Image.new("RGB", (size * _SUPERSAMPLING, size * _SUPERSAMPLING), picture.background)
    drawing = ImageDraw.Draw(canvas)
    scale = size * _SUPERSAMPLING / _PICTURE_PX
    for item, box in zip(picture.scene.items, picture.boxes, strict=True):
        x, y, width = (scale * value for value in box)
        if item.shape == "circle":
            drawing.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=COLOURS[item.colour])
        else:
            outline = [(x + width / 2 * dx, y + width / 2 * dy) for dx, dy in _outline(item.shape)]
            drawing.polygon(outline, fill=COLOURS[item.colour])
    buffer = io.BytesIO()
    canvas.reduce(_SUPERSAMPLING).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


@functools.lru_cache(maxsize=len(SHAPES))
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The corners of a shape in the box [-1, 1] x [-1, 1], y downwards."""
    if shape == "star":
        radii = (1.05, 0.45)
        angles = (math.pi * (turn / 5 - 0.5) for turn in range(10))
        return tuple(
            (radii[turn % 2] * math.cos(angle), radii[turn % 2] * math.sin(angle) + 0.05)
            for turn, angle in enumerate(angles)
        )
    side, arm = 0.86, 0.34
    quarter = ((-arm, -1.0), (arm, -1.0), (arm, -arm))
    outlines: dict[str, Callable[[], tuple[tuple[float, float], ...]]] = {
        "square": lambda: ((-side, -side), (side, -side), (side, side), (-side, side)),
        "triangle": lambda: ((0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)),
        "diamond": lambda: ((0.0, -1.0), (0.8, 0.0), (0.0, 1.0), (-0.8, 0.0)),
        "cross": lambda: (
            *quarter,
            *((-y, x) for x, y in quarter),
            *((-x, -y) for x, y in quarter),
            *((y, -x) for x, y in quarter),
        ),
    }
    return outlines[shape]()


def _describe(picture: Picture, size: int) -> dict[str, Any]:
    """What is where, in pixels of the drawn picture, for scenes.jsonl."""
    scale = size / _PICTURE_PX
    objects = [
        {
            "size": item.size,
            "colour": item.colour,
            "shape": item.shape,
            "x_px": round(x * scale, 2),
            "y_px": round(y * scale, 2),
            "width_px": round(width * scale, 2),
        }
        for item, (x, y, width) in zip(picture.scene.items, picture.boxes, strict=True)
    ]
    relations = [[place, relation, place + 1] for place, relation in enumerate(picture.scene.relations)]
    return {"objects": objects, "relations": relations}


# What is said about them


def write_captions(generator: random.Random, scene: Scene) -> list[str]:
    """Three to five different captions, each telling all objects and stated relations.

    The first names sizes; at least one is told from the other end, and at least one leaves the sizes out.
    """
    captions = [_write_caption(generator, scene, sized=True)]
    wanted = 3 + int(generator.random() * 3)
    while len(captions) < wanted:
        telling = scene.reversed if len(captions) == 1 or generator.random() < 0.5 else scene
        sized = len(captions) != 2 and generator.random() < 0.75
        caption = _write_caption(generator, telling, sized)
        if caption not in captions:
            captions.append(caption)
    return captions


def _write_caption(generator: random.Random, scene: Scene, sized: bool) -> str:
    words = dict(zip("abc", (item.name("a", sized) for item in scene.items), strict=False))
    phrases = [_pick(generator, _PHRASES[relation]) for relation in scene.relations]
    words |= {"the_b": scene.items[1].name("the", False), "beside": _BESIDE[scene.relations[0]]}
    words |= dict(zip(("ab", "bc"), phrases, strict=False))
    return _pick(generator, _PAIR_TEMPLATES if len(scene.items) == 2 else _CHAIN_TEMPLATES).format(**words)


def write_questions(generator: random.Random, scene: Scene) -> list[tuple[str, str, str]]:
    """Four (question, answer, kind) of different kinds; each has one right answer in the picture."""
    candidates = _list_questions(generator, scene)
    kinds = _shuffle(generator, [kind for kind in candidates if candidates[kind]])[:_QUESTIONS]
    return [(*_pick(generator, candidates[kind]), kind) for kind in kinds]


def _list_questions(generator: random.Random, scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """Questions and answers by kind. Relations are asked only of neighbours in the telling, where they are clear."""
    items = scene.items
    shapes, colours = ([getattr(item, part) for item in items] for part in ("shape", "colour"))
    tellings = (scene, scene.reversed)
    return {
        "count": [("how many objects are there?", str(len(items)))],
        "colour": [
            (f"what colour is the {item.shape}?", item.colour) for item in items if shapes.count(item.shape) == 1
        ],
        "shape": [
            (f"what shape is the {item.colour} object?", item.shape)
            for item in items
            if colours.count(item.colour) == 1
        ],
        "size": [(f"what size is {item.name('the', False)}?", item.size) for item in items],
        "relation": [
            (f"what is {telling.relations[0]} {telling.items[1].name('the', False)}?", " ".join(telling.items[0].kind))
            for telling in tellings
        ],
        "yes-no": [_ask_about_relation(generator, scene), _ask_about_presence(generator, scene)],
    }


def _ask_about_relation(generator: random.Random, scene: Scene) -> tuple[str, str]:
    place = int(generator.random() * len(scene.relations))
    first, second = (item.name("the", False) for item in scene.items[place : place + 2])
    relation, answer = scene.relations[place], "yes"
    if generator.random() < 0.5:
        relation, answer = OPPOSITE[relation], "no"
    return f"is {first} {relation} {second}?", answer


def _ask_about_presence(generator: random.Random, scene: Scene) -> tuple[str, str]:
    """Ask for an item that is there, or for the colour of one with the shape of another, which is not."""
    first, second = _shuffle(generator, scene.items)[:2]
    mixed = replace(first, shape=second.shape)
    absent = mixed.kind not in {item.kind for item in scene.items}
    asked = mixed if absent and generator.random() < 0.5 else first
    return f"is there {asked.name('a', False)}?", "no" if asked is mixed else "yes"
