"""Blocks of columns give what the whole matrix gives; weights follow their ramp; bad steps are counted and named."""

import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import parity
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_tools.errors import UserError
from pretrain.accumulate import BadSteps, infect
from pretrain.contract import Identity, ModelOutput, TeacherOutput
from pretrain.losses import (
    ContrastiveConfig,
    DistillConfig,
    LossesConfig,
    MatchingConfig,
    Ramp,
    SigmoidConfig,
    compute_losses,
)
from pretrain.world import World

ROWS = 12


def make_output(rows: int = ROWS, width: int = 6) -> ModelOutput:
    """Random unit embeddings in float64; the first three pictures are one, and text 5 is also a caption of picture 7."""
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    image_id, text_id = torch.arange(rows), torch.arange(rows) + 100
    image_id[:3] = 0
    true_text_id = torch.stack([text_id, text_id], dim=1)
    true_text_id[7, 1] = text_id[5]
    return ModelOutput(
        *(torch.nn.functional.normalize(side, dim=1).requires_grad_() for side in sides),
        logit_scale=torch.tensor([9.0], dtype=torch.float64, requires_grad=True),
        logit_bias=torch.tensor([-2.0], dtype=torch.float64, requires_grad=True),
        identity=Identity(image_id, text_id, true_text_id),
    )


def gradients(loss: torch.Tensor, output: ModelOutput) -> list[np.ndarray]:
    leaves = [output.image_embed, output.text_embed, output.logit_scale, output.logit_bias]
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return [gradient.numpy() for gradient in found if gradient is not None]


def assert_same(loss: torch.Tensor, expected: torch.Tensor, output: ModelOutput) -> None:
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    for found, wanted in zip(gradients(loss, output), gradients(expected, output), strict=True):
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("positives", ["own", "soft", "masked"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("chunk", [1, 5, ROWS, 1000])  # of 1 column: a masked one leaves a row nothing in its block
def test_contrastive_in_blocks_equals_the_whole_matrix(positives: str, smoothing: float, chunk: int) -> None:
    output = make_output()
    config = LossesConfig(contrastive=ContrastiveConfig(chunk=chunk, label_smoothing=smoothing, positives=positives))
    loss = compute_losses(config, output, World())["contrastive"]
    assert_same(loss, parity.dense_contrastive(output, World(), smoothing, positives), output)


@pytest.mark.parametrize("positives", ["own", "soft", "masked"])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_sigmoid_in_blocks_equals_the_whole_matrix(positives: str, chunk: int) -> None:
    output = make_output()
    config = LossesConfig(contrastive=None, sigmoid=SigmoidConfig(chunk=chunk, positives=positives))
    loss = compute_losses(config, output, World())["sigmoid"]
    assert_same(loss, parity.dense_sigmoid(output, World(), positives), output)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest result of any operation within the block."""

    def __enter__(self) -> "LargestTensor":
        self.elements = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            self.elements = max(self.elements, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result


@dataclass(eq=False)
class Saved:
    tensor: torch.Tensor


@pytest.mark.parametrize("positives", ["own", "masked"])
def test_no_loss_holds_more_than_a_block(positives: str) -> None:
    rows, chunk, captions = 128, 32, 2
    output = make_output(rows)
    others = make_output(2 * rows)
    output.teacher = TeacherOutput(
        others.image_embed[rows:].detach(), others.text_embed[rows:].detach(), torch.tensor([7.0])
    )
    config = LossesConfig(
        distill=DistillConfig(teacher="-", cosine=1.0, chunk=chunk),
        contrastive=ContrastiveConfig(chunk=chunk, positives=positives),
        sigmoid=SigmoidConfig(chunk=chunk, positives=positives),
    )
    saved = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Saved:
        saved.add(one := Saved(tensor))
        return one

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
            loss = compute_losses(config, output, World())["total"]
        kept = {one.tensor.data_ptr(): one.tensor.numel() for one in saved}  # for the backward pass
        assert sum(kept.values()) < rows * rows  # one matrix of similarities, or all its blocks
        loss.backward()
    assert rows * chunk <= largest.elements <= rows * chunk * captions


def test_weights_follow_their_ramp() -> None:
    linear = ContrastiveConfig(weight=0.5, ramp=Ramp(start=1.0, steps=10))
    assert [linear.weight_at(step) for step in (0, 5, 10, 99)] == [1.0, 0.75, 0.5, 0.5]
    cosine = MatchingConfig(weight=2.0, ramp=Ramp(steps=4, shape="cosine"))
    assert [cosine.weight_at(step) for step in (0, 2, 4)] == pytest.approx([0, 1, 2])
    assert cosine.weight_at(1) == pytest.approx(2 * (1 - np.cos(np.pi / 4)) / 2)
    output, config = make_output(), LossesConfig(contrastive=linear)
    losses = compute_losses(config, output, World(), step=5)
    assert losses["total"].item() == pytest.approx(0.75 * losses["contrastive"].item())


def test_an_infinite_loss_has_no_finite_gradient() -> None:
    """Whichever part is trained: another may be frozen."""
    output = make_output()
    for loss, finite in ((3.0, True), (float("inf"), False)):
        scalar = infect(output.logit_scale.sum() * 0, torch.tensor(loss), output)
        for part in (output.logit_scale, output.image_embed, output.text_embed):
            gradient = torch.autograd.grad(scalar, part, retain_graph=True)[0]
            assert not gradient.any() if finite else gradient.isnan().all()


def take_step(
    bad_steps: BadSteps,
    applied: bool = False,
    loss: float = 1.0,
    bad_rows: tuple[int, ...] = (),
    scale_could_fall: bool = False,
) -> None:
    output = make_output()
    with torch.no_grad():
        output.text_embed[list(bad_rows)] = float("nan")
    batch = SimpleNamespace(keys=[f"key{row}" for row in range(ROWS)])
    bad_steps.check(7, applied, batch, {"total": torch.tensor(loss)}, output, scale_could_fall)


def test_bad_steps_are_named_counted_and_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    bad_steps = BadSteps(3, World())
    take_step(bad_steps, bad_rows=(2, 5))
    assert "step 7" in caplog.text and "rank 0: key2, key5)" in caplog.text
    take_step(bad_steps, loss=float("inf"))
    assert "key0, key1" in caplog.text and "and 4 more" in caplog.text
    take_step(bad_steps, applied=True)  # not in a row any more
    take_step(bad_steps)
    assert "the losses are finite, the gradients are not; rank 0: key0, key1" in caplog.text
    take_step(bad_steps)
    with pytest.raises(UserError, match="step 7.* as in 3 steps in a row"):
        take_step(bad_steps)
    assert bad_steps.total == 5


def test_too_large_a_loss_scale_is_no_bad_step(caplog: pytest.LogCaptureFixture) -> None:
    bad_steps = BadSteps(1, World())
    take_step(bad_steps, scale_could_fall=True)
    assert bad_steps.total == 0 and not caplog.text
    with pytest.raises(UserError, match="key0, key1"):
        take_step(bad_steps, loss=float("nan"), scale_could_fall=True)
    with pytest.raises(UserError, match="the gradients are not"):
        take_step(bad_steps)
