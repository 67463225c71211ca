from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_on_ranks

from pretrain.contract import Identity
from pretrain.model import negatives
from pretrain.model.negatives import MatchPlan, draw_negatives, find_true_pairs, gather_identity, plan_matches
from pretrain.randomness import uniform
from pretrain.world import World

# (picture, drawn caption, all captions): a picture twice, two pictures that share a caption, and one on its own.
PAIRS = [(1, 7, [7, 8]), (1, 8, [8, 7]), (2, 9, [9, 5]), (3, 6, [6, 9, 4]), (4, 5, [5]), (5, 3, [3])]


def true_pairs_of(world: World) -> tuple[list, list]:
    own = PAIRS[world.rank :: world.size]
    longest = max(len(captions) for _, _, captions in own)
    own_identity = Identity(
        image_id=torch.tensor([image for image, _, _ in own]),
        text_id=torch.tensor([text for _, text, _ in own]),
        true_text_id=torch.tensor([row + row[:1] * (longest - len(row)) for _, _, row in own]),
    )
    return tuple(found.tolist() for found in find_true_pairs(own_identity, gather_identity(own_identity, world)))


def test_true_pairs_are_same_pictures_and_any_of_their_captions() -> None:
    with_text, with_image = true_pairs_of(World())
    # Image 3 has caption 9, which was drawn for picture 2; image 2 has caption 5, which was drawn for picture 4.
    expected = [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 1, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert np.array(with_text, dtype=int).tolist() == expected
    assert np.array(with_image, dtype=int).tolist() == np.transpose(expected).tolist()


def test_true_pairs_are_found_across_ranks() -> None:
    with_text, with_image = true_pairs_of(World())
    order = [*range(0, 6, 2), *range(1, 6, 2)]  # the global batch in rank order
    for rank, (own_text, own_image) in enumerate(run_on_ranks(true_pairs_of, 2)):
        rows = range(rank, 6, 2)
        assert own_text == [[with_text[row][column] for column in order] for row in rows]
        assert own_image == [[with_image[row][column] for column in order] for row in rows]


def test_draws_follow_the_weights_and_are_never_true_pairs() -> None:
    """200,000 draws of one row against 0.9 softmax + 0.1 even: chi-square within its 99.99 % range."""
    draws = 200_000
    scores = torch.tensor([[2.0, 0.0, -1.0, 1.0, -50.0, 3.0]])
    true = torch.tensor([[False, False, True, False, False, True]])
    u = torch.from_numpy(uniform(3, "test", np.arange(draws)))
    columns, valid = draw_negatives(scores.expand(draws, -1), true.expand(draws, -1), u, 0.1)
    counts = torch.bincount(columns, minlength=6).double()
    allowed = ~true[0]
    expected = draws * (
        0.9 * scores.double().masked_fill(true, -torch.inf).softmax(1)[0] + 0.1 * allowed / allowed.sum()
    )
    assert valid.all() and counts[~allowed].sum() == 0 and counts[4] > 0
    assert ((counts - expected)[allowed] ** 2 / expected[allowed]).sum() < 21.1  # 3 degrees of freedom


SHARE, SCALE, COPIES = 0.3, 4.0, 40
# `PAIRS`, and a caption for the second time.
KINDS = [(image, text, (captions * 3)[:3]) for image, text, captions in [*PAIRS, (6, 3, [3])]]
SIDES = torch.nn.functional.normalize(
    torch.randn(2, len(KINDS), 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64), dim=2
)


def draw(seed: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """The texts and the images that a plan draws for a batch that has all `KINDS` so many times, from position `first` on.

    A row's distribution over the kinds is the same as if each were there once.
    """
    rows = len(KINDS) * COPIES
    ids = torch.ones(rows, 2, dtype=torch.int64)
    identity = Identity(*(torch.tensor(part) for part in zip(*KINDS * COPIES, strict=True)))
    batch = SimpleNamespace(identity=identity, position=first + np.arange(rows), ids=ids, mask=ids.bool())
    plan = plan_matches(batch, *SIDES.repeat(1, COPIES, 1), torch.tensor([SCALE]), seed, SHARE, World())
    return plan.hard_text, plan.hard_image


def test_a_plan_draws_both_sides_by_their_weights_and_apart() -> None:
    """Each kind's (text, image), over seeds and positions, against the product of its two distributions by chi-square."""
    kinds, seeds, places = len(KINDS), 10, 5
    counts = np.zeros((kinds, kinds, kinds))
    for seed in range(seeds):
        for place in range(places):
            texts, images = draw(seed, place * kinds * COPIES)
            np.add.at(counts, (np.arange(len(texts)) % kinds, texts % kinds, images % kinds), 1)
    true = np.array([[image == of or text in captions for of, text, _ in KINDS] for image, _, captions in KINDS])
    weights = np.exp(SCALE * (SIDES[0] @ SIDES[1].T).numpy())
    probabilities = []
    for raw, never in ((weights, true), (weights.T, true.T)):
        hard, even = np.where(never, 0, raw), ~never
        hard, even = hard / hard.sum(1, keepdims=True), even / even.sum(1, keepdims=True)
        probabilities.append((1 - SHARE) * hard + SHARE * even)
    expected = seeds * places * COPIES * probabilities[0][:, :, None] * probabilities[1][:, None, :]
    allowed = expected > 0
    assert not counts[~allowed].any() and expected[allowed].min() > 3
    freedom = allowed.sum() - kinds
    assert ((counts - expected)[allowed] ** 2 / expected[allowed]).sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_blocks_of_similarities_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = draw(0, 0)
    for scores in (1, 99 * len(KINDS) * COPIES):  # a row at a time, and 99, the last block short
        monkeypatch.setattr(negatives, "MAX_SCORES", scores)
        np.testing.assert_array_equal(draw(0, 0), whole)


def test_a_row_without_candidates_does_not_count() -> None:
    _, valid = draw_negatives(
        torch.zeros(2, 2), torch.tensor([[True, True], [True, False]]), torch.tensor([0.5, 0.5]), 0.5
    )
    assert valid.tolist() == [False, True]


def test_extreme_scores_neither_overflow_nor_underflow() -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    columns, valid = draw_negatives(scores, torch.eye(2, 3, dtype=torch.bool), torch.tensor([0.999999, 0.0]), 0.5)
    assert valid.all() and columns.tolist() == [2, 0]


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_every_pair_is_computed_once_in_batches_of_one_shape(ranks: int, micro_batches: int) -> None:
    """Image 3 is drawn by six texts, text 5 and image 6 drew nothing."""
    count, length = 8, 2
    hard_text = np.array([1, 2, 7, 0, 1, 6, -1, 3])
    hard_image = np.array([3, 3, 3, 3, 3, -1, 3, 6])
    rows, found, shapes = count // ranks, [], set()
    for rank in range(ranks):
        plan = MatchPlan(
            first=rank * rows,
            hard_text=hard_text,
            hard_image=hard_image,
            weight=ranks / 22,
            ids=torch.arange(count)[:, None].expand(count, length).int(),
            mask=torch.ones(count, length, dtype=torch.bool),
            position=torch.arange(count) + 100,
        )
        size = rows // micro_batches
        for start in range(0, rows, size):
            pairs = plan.pairs(start, start + size)
            first = rank * rows + start
            own = list(range(first, first + size))
            images = own + own + (pairs.incoming + first).tolist()
            texts = own + pairs.ids[:, 0].tolist()
            assert pairs.text.tolist() == pairs.ids[:, 0].tolist() == (pairs.text_position - 100).tolist()
            assert pairs.all_own == (ranks * micro_batches == 1)
            shapes.add((len(pairs.incoming), len(pairs.text), len(pairs.labels), len(pairs.weight)))
            rows_of_pairs = zip(images, texts, pairs.labels.tolist(), pairs.weight.tolist(), strict=True)
            found += [(image, text, label) for image, text, label, weight in rows_of_pairs if weight]
            assert set(pairs.weight.tolist()) <= {0, ranks / 22}
    expected = [(row, row, 1) for row in range(count)]
    expected += [(image, text, 0) for image, text in enumerate(hard_text) if text >= 0]
    expected += [(image, text, 0) for text, image in enumerate(hard_image) if image >= 0]
    assert sorted(found) == sorted(expected) and len(expected) == 22
    assert len(shapes) == 1


def test_a_batch_of_one_picture_has_no_negatives() -> None:
    rows = 3
    batch = SimpleNamespace(
        identity=Identity(torch.zeros(rows), torch.arange(rows), torch.arange(rows)[:, None]),
        position=np.arange(rows),
        ids=torch.ones(rows, 2, dtype=torch.int64),
        mask=torch.ones(rows, 2, dtype=torch.bool),
    )
    embed = torch.nn.functional.normalize(torch.randn(rows, 4), dim=1)
    pairs = plan_matches(batch, embed, embed, torch.ones(1), 0, 0.5, World()).pairs(0, rows)
    assert pairs.weight.tolist() == pytest.approx([1 / 3] * 3 + [0] * 3)
    assert pairs.labels.tolist() == [1] * 3 + [0] * 3
