"""Masks are even and independent, and depend on the sample and the place in the model, not on the layout of a batch."""

import itertools
import os
import shutil

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pretrain.config import ConfigError
from pretrain.model.noise import (
    Noise,
    PositionDropout,
    PositionDropPath,
    PositionPatchDropout,
    drop_patches,
    pair_keys,
    replace_dropouts,
    row_keys,
)
from pretrain.torchvision_ops import prepare_torchvision

# Quantiles of chi-square at 99.99 %, by degrees of freedom.
LIMITS = {1: 15.14, 3: 21.11, 19: 50.80}


def chi_square(observed: list[float], expected: list[float]) -> float:
    return sum((found - wanted) ** 2 / wanted for found, wanted in zip(observed, expected, strict=True))


def drawn(share: float, keys: torch.Tensor, elements: int, name: str = "3") -> torch.Tensor:
    """[rows,elements] bool: what was dropped."""
    noise = Noise()
    with noise.using(keys):
        return PositionDropout(share, noise, name)(torch.ones(len(keys), elements)) == 0


def assert_independent(first: torch.Tensor, second: torch.Tensor, share: float) -> None:
    cells = [(first == a).logical_and(second == b).sum().item() for a, b in itertools.product((True, False), repeat=2)]
    odds = [a * b * first.numel() for a, b in itertools.product((share, 1 - share), repeat=2)]
    assert chi_square(cells, odds) < LIMITS[3]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_independently(share: float) -> None:
    keys = row_keys(5, torch.arange(1000))
    dropped = drawn(share, keys, 1000)
    total = dropped.numel()
    counts = [dropped.sum().item(), (~dropped).sum().item()]
    assert chi_square(counts, [share * total, (1 - share) * total]) < LIMITS[1]
    assert_independent(dropped[:, 1:], dropped[:, :-1], share)  # neighbours in a row
    assert_independent(dropped[1:], dropped[:-1], share)  # rows of neighbouring positions
    assert_independent(
        dropped[1:, 1:] ^ dropped[:-1, 1:], dropped[1:, :-1] ^ dropped[:-1, :-1], 2 * share * (1 - share)
    )
    assert_independent(dropped, drawn(share, keys, 1000, name="4"), share)
    assert_independent(dropped, drawn(share, row_keys(6, torch.arange(1000)), 1000), share)
    for dim in (0, 1):  # the number dropped varies from row to row, and from place to place, as that of coins
        spread = ((dropped.sum(dim) - 1000 * share) ** 2 / (1000 * share * (1 - share))).sum().item()
        assert abs(spread - 1000) < 4 * 2000**0.5


def test_every_subset_of_patches_is_equally_likely() -> None:
    draws, noise = 40_000, Noise()
    with noise.using(row_keys(1, torch.arange(draws))):
        kept = drop_patches(torch.arange(6.0).expand(draws, 6)[..., None], 0.5, noise, torch.tensor(8))
    assert kept.shape == (draws, 3, 1) and (kept[:, 1:] > kept[:, :-1]).all()
    counts = torch.bincount((2 ** kept[..., 0]).sum(1).long(), minlength=64)
    counts = counts[counts > 0].tolist()
    assert len(counts) == 20 and chi_square(counts, [draws / 20] * 20) < LIMITS[19]


def test_masks_follow_the_sample_not_the_layout() -> None:
    keys = row_keys(0, torch.tensor([40, 7, 12345678901, 3]))
    dropped = drawn(0.5, keys, 64)
    assert torch.equal(drawn(0.5, keys[[2, 0]], 64), dropped[[2, 0]])
    assert not torch.equal(dropped[0], dropped[1])
    pairs = drawn(0.5, pair_keys(keys[[0, 1, 0]], keys[[1, 0, 0]]), 64)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(pairs, 2))


def test_what_is_kept_is_scaled_up_and_evaluation_is_untouched() -> None:
    noise, x = Noise(), torch.randn(3, 4, 5)
    dropout, patches = PositionDropout(0.75, noise, "1"), PositionPatchDropout(0.5, noise, "2")
    with noise.using(row_keys(0, torch.arange(3))):
        y = dropout(x)
        assert patches(x).shape == (3, 2, 5) and torch.equal(patches(x)[:, 0], x[:, 0])
    assert torch.equal(y[y != 0], (4 * x)[y != 0]) and (y == 0).any()
    with pytest.raises(RuntimeError, match="keys"):
        dropout(x)
    assert torch.equal(dropout.eval()(x), x) and torch.equal(patches.eval()(x), x)


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_whole_branches_are_dropped_independently(share: float) -> None:
    noise, rows = Noise(), 200_000
    with noise.using(row_keys(5, torch.arange(rows))):
        one, other = (PositionDropPath(share, noise, name)(torch.ones(rows, 2, 3)) for name in "34")
    assert torch.equal(one, one[:, :1, :1].expand_as(one))
    assert one.unique().tolist() == pytest.approx([0, 1 / (1 - share)])
    dropped = one[:, 0, 0] == 0
    counts = [dropped.sum().item(), (~dropped).sum().item()]
    assert chi_square(counts, [share * rows, (1 - share) * rows]) < LIMITS[1]
    assert_independent(dropped[1:], dropped[:-1], share)
    assert_independent(dropped, other[:, 0, 0] == 0, share)


def test_drop_path_of_the_libraries_is_replaced() -> None:
    prepare_torchvision()
    from timm.layers import DropPath
    from transformers.models.dinov2.modeling_dinov2 import Dinov2DropPath

    noise, never = Noise(), DropPath(0.0)
    model = nn.Sequential(DropPath(0.25), DropPath(0.25, scale_by_keep=False), Dinov2DropPath(0.25), never)
    replace_dropouts(model, noise)
    assert model[3] is never and all(isinstance(place, PositionDropPath) for place in model[:3])
    x = torch.ones(64, 2)
    with noise.using(row_keys(0, torch.arange(64))):
        assert [place(x).max().item() for place in model] == pytest.approx([4 / 3, 1, 4 / 3, 1])
    assert torch.equal(model.eval()(x), x)


@pytest.mark.faults
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_compiled_masks_are_the_same() -> None:
    noise, x = Noise(), torch.randn(16, 5, 8)
    dropout, drop_path = PositionDropout(0.25, noise, "1"), PositionDropPath(0.25, noise, "2")
    compiled = torch.compile(lambda x: drop_path(dropout(x)), fullgraph=True)
    with noise.using(row_keys(0, torch.arange(16))):
        y = compiled(x)
        assert torch.equal(y, drop_path(dropout(x))) and 0 < (y == 0).all((1, 2)).sum() < 16


def test_rows_that_are_no_samples_are_refused() -> None:
    noise = Noise()
    with noise.using(row_keys(0, torch.arange(2))), pytest.raises(ConfigError, match="8 rows for 2 samples"):
        PositionDropout(0.5, noise, "1")(torch.ones(8, 3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.never = nn.Dropout(0.5), nn.Dropout(0.5), nn.Dropout(0.0)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.linear(self.first(self.never(x))))


def test_every_dropout_of_a_model_is_replaced_with_masks_of_its_own() -> None:
    noise, model = Noise(), nn.Sequential(Block(), Block())
    replace_dropouts(model, noise)
    places = [module for module in model.modules() if isinstance(module, PositionDropout)]
    assert len(places) == 4 and isinstance(model[0].never, nn.Dropout)
    with noise.using(row_keys(0, torch.arange(2))):
        masks = [place(torch.ones(2, 64)) for place in places]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(masks, 2))


def test_recomputation_in_backward_drops_what_forward_dropped() -> None:
    noise, model = Noise(), nn.Sequential(Block(), Block())
    replace_dropouts(model, noise)
    x = torch.randn(3, 16)
    results = []
    for again in (False, True):
        model.zero_grad()
        with noise.using(row_keys(0, torch.arange(3))):
            y = x
            for block in model:
                options = {"use_reentrant": False, "context_fn": noise.checkpoint_contexts}
                y = checkpoint(block, y, **options) if again else block(y)
        with noise.using(row_keys(9, torch.arange(3))):  # as the fusion's rows would be by then
            y.square().sum().backward()
        results.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
