"""The drawn scenes: deterministic, true captions, and combinations that training never shows."""

import itertools
import json
import os
import random
import re

import numpy as np
import pytest
from PIL import Image

from data_tools.build import build_shards
from data_tools.errors import UserError
from data_tools.scenes import (
    COLOURS,
    OPPOSITE,
    SHAPES,
    choose_held_out,
    draw_scenes,
    make_training_scene,
)

COUNT, VAL_COUNT = 300, 120
RELATION_OF_PHRASE = {
    "left of": "left of",
    "right of": "right of",
    "on its left": "right of",  # "b with a on its left": read from left to right, b is right of a
    "on its right": "left of",
    "above it": "below",
    "below it": "above",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
}
NAME = rf"(?:(?P<size>small|medium|large) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "out"
    draw_scenes(out, COUNT, VAL_COUNT, seed=3, processes=2)
    return out


@pytest.fixture(scope="module")
def descriptions(drawn):
    rows = [json.loads(line) for line in (drawn / "scenes.jsonl").read_text().splitlines()]
    return {row["filename"]: row for row in rows}


def read_table(path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def get_kinds(description: dict) -> list[tuple[str, str]]:
    return [(item["colour"], item["shape"]) for item in description["objects"]]


def read_split(drawn, split: str) -> list[str]:
    return (drawn / "splits" / f"{split}.txt").read_text().split()


def lies(first: dict, relation: str, second: dict) -> bool:
    """Whether the boxes are clearly apart along the relation's axis, and the centres differ little across it."""
    axis, across, sign = {
        "left of": ("x_px", "y_px", 1),
        "right of": ("x_px", "y_px", -1),
        "above": ("y_px", "x_px", 1),
        "below": ("y_px", "x_px", -1),
    }[relation]
    along = sign * (second[axis] - first[axis])
    gap = along - (first["width_px"] + second["width_px"]) / 2
    return gap >= 4.9 and abs(second[across] - first[across]) <= 0.31 * along


def test_the_bytes_depend_on_the_seed_alone(tmp_path, drawn):
    draw_scenes(tmp_path / "one", COUNT, VAL_COUNT, seed=3, processes=1)
    draw_scenes(tmp_path / "other", 20, 0, seed=4, processes=1)
    files = sorted(str(path.relative_to(drawn)) for path in drawn.rglob("*.*"))
    assert len(files) == COUNT + VAL_COUNT + 7
    assert files == sorted(str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*.*"))
    assert all((drawn / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in files)
    assert (tmp_path / "other/images/000000.jpg").read_bytes() != (drawn / "images/000000.jpg").read_bytes()


def test_a_picture_does_not_depend_on_the_counts(tmp_path, drawn):
    draw_scenes(tmp_path / "small", 10, 5, seed=3, processes=1)
    for number in range(10):
        name = f"images/{number:06d}.jpg"
        assert (tmp_path / "small" / name).read_bytes() == (drawn / name).read_bytes()
    for place in range(5):
        small, large = f"images/{10 + place:06d}.jpg", f"images/{COUNT + place:06d}.jpg"
        assert (tmp_path / "small" / small).read_bytes() == (drawn / large).read_bytes()


def test_held_out_pairs_are_in_validation_alone(drawn, descriptions):
    pairs = {
        split: {
            frozenset(pair)
            for name in read_split(drawn, split)
            for pair in itertools.combinations(get_kinds(descriptions[name]), 2)
        }
        for split in ("train", "val")
    }
    assert pairs["val"] <= choose_held_out(3)
    assert not pairs["train"] & pairs["val"]
    seen = {kind for name in read_split(drawn, "train") for kind in get_kinds(descriptions[name])}
    assert seen == set(itertools.product(COLOURS, SHAPES))


@pytest.mark.parametrize("seed", range(5))
def test_every_seed_holds_out_a_fifth(seed):
    assert 0.15 < len(choose_held_out(seed)) / (48 * 47 / 2) < 0.25
    for number in range(200):
        scene = make_training_scene(random.Random(number), number, seed)
        assert not any(
            frozenset(pair) in choose_held_out(seed)
            for pair in itertools.combinations([i.kind for i in scene.items], 2)
        )


def test_objects_are_where_the_relations_say(descriptions):
    counts = {2: 0, 3: 0}
    for description in descriptions.values():
        objects = description["objects"]
        counts[len(objects)] += 1
        assert len(description["relations"]) == len(objects) - 1
        for first, relation, second in description["relations"]:
            assert lies(objects[first], relation, objects[second]), description
        for first, second in itertools.combinations(objects, 2):
            reach = (first["width_px"] + second["width_px"]) / 2
            assert max(abs(first["x_px"] - second["x_px"]), abs(first["y_px"] - second["y_px"])) > reach + 3
        assert all(
            item["width_px"] / 2 + 2.9 <= item[axis] <= 96 - item["width_px"] / 2 - 2.9
            for item in objects
            for axis in ("x_px", "y_px")
        )
    assert 0.6 < counts[2] / (COUNT + VAL_COUNT) < 0.8


def test_the_pixels_show_the_description(drawn, descriptions):
    for name in list(descriptions)[::7]:
        pixels = np.asarray(Image.open(drawn / "images" / name)).astype(int)
        assert pixels.shape == (96, 96, 3)
        assert pixels[0, 0].min() > 210
        for item in descriptions[name]["objects"]:
            y, x = round(item["y_px"]), round(item["x_px"])
            assert np.abs(pixels[y, x] - COLOURS[item["colour"]]).max() < 30, (name, item)


def parse_caption(caption: str) -> tuple[list[dict], list[str]]:
    """The named objects in order of mention and the relations in words, without the program's own templates."""
    names = [match.groupdict() for match in re.finditer(NAME, caption)]
    phrases = re.findall("|".join(sorted(RELATION_OF_PHRASE, key=len, reverse=True)), caption)
    return names, [RELATION_OF_PHRASE[phrase] for phrase in phrases]


def test_captions_are_true_and_differ(drawn, descriptions):
    captions: dict[str, list[str]] = {}
    for name, caption in read_table(drawn / "captions.tsv")[1:]:
        captions.setdefault(name, []).append(caption)
    assert captions.keys() == descriptions.keys()
    for name, texts in captions.items():
        assert 3 <= len(texts) == len(set(texts)) <= 5
        assert "small" in texts[0] or "medium" in texts[0] or "large" in texts[0]
        objects = {(item["colour"], item["shape"]): item for item in descriptions[name]["objects"]}
        for text in texts:
            names, relations = parse_caption(text)
            if re.search(" there is an? (?!.*there is)", text) and not text.startswith("there is"):
                names = names[::-1]  # "left of b there is a"
            items = [objects[part["colour"], part["shape"]] for part in names]
            assert all(part["size"] in (None, item["size"]) for part, item in zip(names, items, strict=True)), text
            mentioned = [
                item for item, following in zip(items, [*items[1:], None], strict=True) if item is not following
            ]
            assert len(mentioned) == len(objects) == len(relations) + 1, text
            for first, relation, second in zip(mentioned, relations, mentioned[1:], strict=False):
                assert lies(first, relation, second), (name, text)


def test_captions_vary(drawn):
    texts = [caption for _, caption in read_table(drawn / "captions.tsv")[1:]]
    unsized = [text for text in texts if not re.search("small|medium|large", text)]
    assert 0.15 < len(unsized) / len(texts) < 0.6
    first_words = {text.split()[0] for text in texts}
    assert {"a", "an", "there", "to", "left", "over"} <= first_words
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]", text) for text in texts)


def test_validation_scenes_differ_in_words_and_a_third_are_twins(drawn, descriptions):
    names = read_split(drawn, "val")
    wordings = [json.dumps(sorted(tell(descriptions[name]))) for name in names]
    assert len(set(wordings)) == len(names)
    twins = [name for name in names if descriptions[name]["twin_of"]]
    assert 0.2 < len(twins) / len(names) < 0.45
    kinds = {"colours": 0, "relations": 0}
    for name in twins:
        twin, origin = descriptions[name], descriptions[descriptions[name]["twin_of"]]
        words = [sorted(word for kind in get_kinds(part) for word in kind) for part in (twin, origin)]
        assert words[0] == words[1]
        kinds["relations" if set(get_kinds(twin)) == set(get_kinds(origin)) else "colours"] += 1
    assert min(kinds.values()) > 5


def tell(description: dict) -> list[tuple]:
    """Each relation in both directions, without sizes."""
    kinds = get_kinds(description)
    told = [(kinds[first], relation, kinds[second]) for first, relation, second in description["relations"]]
    return told + [(second, OPPOSITE[relation], first) for first, relation, second in told]


def test_questions_have_the_right_answer(drawn, descriptions):
    table = read_table(drawn / "questions.tsv")
    assert table[0] == ["filename", "question", "answer", "kind"]
    answers = {"yes": 0, "no": 0}
    for name, question, answer, kind in table[1:]:
        objects, told = descriptions[name]["objects"], tell(descriptions[name])
        if kind == "count":
            assert (question, answer) == ("how many objects are there?", str(len(objects)))
        elif kind == "colour":
            shape = re.fullmatch(r"what colour is the (\w+)\?", question)[1]
            assert [item["colour"] for item in objects if item["shape"] == shape] == [answer]
        elif kind == "shape":
            colour = re.fullmatch(r"what shape is the (\w+) object\?", question)[1]
            assert [item["shape"] for item in objects if item["colour"] == colour] == [answer]
        elif kind == "size":
            wanted = re.fullmatch(r"what size is the (\w+) (\w+)\?", question).groups()
            assert [item["size"] for item in objects if (item["colour"], item["shape"]) == wanted] == [answer]
        elif kind == "relation":
            relation, *wanted = re.fullmatch(r"what is (.+) the (\w+) (\w+)\?", question).groups()
            reference = next(item for item in objects if [item["colour"], item["shape"]] == wanted)
            right = [item for item in objects if item is not reference and lies(item, relation, reference)]
            assert [f"{item['colour']} {item['shape']}" for item in right] == [answer]
        elif question.startswith("is there"):
            answers[answer] += 1
            wanted = re.fullmatch(r"is there an? (\w+) (\w+)\?", question).groups()
            assert answer == ("yes" if wanted in get_kinds(descriptions[name]) else "no")
        else:
            answers[answer] += 1
            *first, relation, colour, shape = re.fullmatch(
                r"is the (\w+) (\w+) (.+) the (\w+) (\w+)\?", question
            ).groups()
            assert kind == "yes-no"
            assert answer == ("yes" if (tuple(first), relation, (colour, shape)) in told else "no")
    assert 0.3 < answers["no"] / sum(answers.values()) < 0.7


def test_drawing_again_does_nothing_and_other_arguments_are_refused(drawn, capsys):
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    draw_scenes(drawn, COUNT, VAL_COUNT, seed=3)
    assert "are there already" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"drawn with --seed 3 --count {COUNT}. Give the same values"):
        draw_scenes(drawn, COUNT + 1, VAL_COUNT, seed=4)
    assert before == {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}


def test_an_interrupted_drawing_is_finished(tmp_path, start_data_tools):
    arguments = ["--count", 3000, "--val-count", 100, "--processes", 2]
    process = start_data_tools("scenes", tmp_path / "out", *arguments)
    images = tmp_path / "out" / "images"
    while not images.exists() or len(os.listdir(images)) < 100:
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not (tmp_path / "out" / "scenes.json").exists()
    with pytest.raises(UserError, match="drawn with --count 3000"):
        draw_scenes(tmp_path / "out", 20, 100)
    draw_scenes(tmp_path / "out", 3000, 100, processes=2)
    assert len(os.listdir(images)) == 3100
    assert not (tmp_path / "out" / "drawing.json").exists()
    (tmp_path / "out" / "mine.txt").touch()
    draw_scenes(tmp_path / "out", 20, 5, restart=True, processes=1)
    assert len(os.listdir(images)) == 25
    assert (tmp_path / "out" / "mine.txt").exists()


def test_arguments_and_folders_are_checked(tmp_path):
    (tmp_path / "notes.txt").touch()
    for restart in (False, True):
        with pytest.raises(UserError, match=r"holds other files \(such as notes.txt\)"):
            draw_scenes(tmp_path, 5, restart=restart)
    with pytest.raises(UserError, match="--count 0"):
        draw_scenes(tmp_path / "out", 0)
    with pytest.raises(UserError, match="--size 8"):
        draw_scenes(tmp_path / "out", 5, size=8)
    assert not (tmp_path / "out").exists()


def test_the_size_scales_the_picture(tmp_path, drawn):
    draw_scenes(tmp_path / "out", 3, 0, seed=3, size=48, processes=1)
    small = np.asarray(Image.open(tmp_path / "out/images/000000.jpg")).astype(int)
    large = np.asarray(Image.open(drawn / "images/000000.jpg").reduce(2)).astype(int)
    assert small.shape == (48, 48, 3)
    assert np.abs(small - large).mean() < 3


def test_drawn_scenes_build_into_shards(tmp_path, drawn):
    for split, samples in (("train", COUNT), ("val", VAL_COUNT)):
        keep = drawn / "splits" / f"{split}.txt"
        out = tmp_path / split
        manifest = build_shards(drawn / "captions.tsv", out, drawn / "images", keep_list=keep, processes=1)
        assert (manifest.samples, manifest.failures) == (samples, 0)
