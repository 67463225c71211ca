import numpy as np
import torch

from pretrain.model.negatives import draw_negatives, find_true_pairs
from pretrain.randomness import uniform


def test_true_pairs_are_same_pictures_and_same_texts() -> None:
    image_id, text_id = torch.tensor([1, 1, 2, 3]), torch.tensor([7, 8, 9, 9])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    assert (find_true_pairs(image_id, text_id, image_id, text_id) == expected).all()


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
