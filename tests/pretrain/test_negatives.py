import numpy as np
import torch
from ranks import run_on_ranks

from pretrain.contract import Identity
from pretrain.model.negatives import draw_negatives, find_true_pairs, gather_identity
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


def test_a_row_without_candidates_does_not_count() -> None:
    _, valid = draw_negatives(
        torch.zeros(2, 2), torch.tensor([[True, True], [True, False]]), torch.tensor([0.5, 0.5]), 0.5
    )
    assert valid.tolist() == [False, True]


def test_extreme_scores_neither_overflow_nor_underflow() -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]])
    columns, valid = draw_negatives(scores, torch.eye(2, 3, dtype=torch.bool), torch.tensor([0.999999, 0.0]), 0.5)
    assert valid.all() and columns.tolist() == [2, 0]
