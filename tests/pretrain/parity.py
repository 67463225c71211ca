"""What one rank computes in the parity tests: importable, so that spawned processes can run it."""

import contextlib
import copy
import gc
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import pretrain.engine as engine_module
from data_tools.errors import UserError
from pretrain.accumulate import BadSteps, compute_gradients
from pretrain.config import check_config
from pretrain.contract import Batch, Identity, ModelOutput, TeacherOutput
from pretrain.data.text import ClipTokenizerConfig, Tokenizer
from pretrain.ema import Ema, EmaConfig
from pretrain.engine import (
    EngineConfig,
    apply_gradients,
    build_engine,
    deepspeed_config,
    gradient_norm,
    import_deepspeed,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from pretrain.losses import (
    CaptioningConfig,
    ContrastiveConfig,
    DistillConfig,
    LossesConfig,
    MaskedLanguageConfig,
    MatchingConfig,
    MomentumConfig,
    Ramp,
    SigmoidConfig,
    compute_losses,
)
from pretrain.model.model import ModelConfig, build_model
from pretrain.model.negatives import gather_identity
from pretrain.model.noise import derive_keys, pair_keys
from pretrain.model.towers import Tower, unit
from pretrain.momentum import Momentum
from pretrain.world import World

GLOBAL_BATCH = 16
VOCAB_SIZE = 1001
TOKENIZER = Tokenizer(
    ClipTokenizerConfig(), VOCAB_SIZE, 12, None, end_id=VOCAB_SIZE - 1, mask_id=1, special_ids=(0, VOCAB_SIZE - 1)
)
LOSSES = LossesConfig(matching=MatchingConfig())
STEP = 2  # whose gradients are compared: in the midst of the ramps
# Blocks of 5 and 3 columns: several even for one rank, and the last one short.
PAIR_LOSSES = LossesConfig(
    contrastive=ContrastiveConfig(chunk=5, label_smoothing=0.1, positives="soft", ramp=Ramp(start=2.0, steps=4)),
    sigmoid=SigmoidConfig(chunk=3, positives="masked", weight=0.3),
    matching=MatchingConfig(weight=2.0, ramp=Ramp(start=3.0, steps=4, shape="cosine")),
    momentum=MomentumConfig(
        chunk=7, label_smoothing=0.1, queue_samples=24, weight=0.7, alpha_ramp=Ramp(start=0.2, steps=4), decay=0.8
    ),
    distill=DistillConfig(teacher="of the test", cosine=0.5, chunk=5),
)
ALL_LOSSES = PAIR_LOSSES.model_copy(
    update={
        "captioning": CaptioningConfig(label_smoothing=0.1, weight=0.5),
        "masked_language": MaskedLanguageConfig(weight=2.0),
    }
)
VIT = {"kind": "vit", "image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
IMAGE_TOWERS = {
    "vit": VIT,
    "vit_dropping": {**VIT, "patch_dropout": 0.25},
    "timm_dropping": {
        "kind": "timm",
        "name": "test_vit",
        "image_size": 32,
        "patch_dropout": 0.25,
        "settings": {"drop_path_rate": 0.4, "proj_drop_rate": 0.1},
    },
    "resnet": {"kind": "resnet", "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
}
BERT = {"kind": "bert", "context_length": 12, "width": 32, "heads": 2, "layers": 2, "dropout": 0.0}
TEXT_TOWERS = {
    "clip": {"kind": "clip", "context_length": 12, "width": 32, "heads": 2, "layers": 2},
    "bert": BERT,
    "bert_dropping": {**BERT, "dropout": 0.2},
}
CROSS = {"kind": "cross", "width": 32, "layers": 1, "heads": 2}
DROPPING = {**CROSS, "dropout": 0.2}
FUSIONS = {
    "cross": CROSS,
    "text_to_image": DROPPING,
    "image_to_text": {**DROPPING, "direction": "image_to_text"},
    "both": {**DROPPING, "direction": "both"},
    "shared": {**DROPPING, "kind": "shared"},
    "weighted": {**DROPPING, "kind": "weighted"},
    "weighted_middle": {**DROPPING, "kind": "weighted", "from_layer": 1},
    "med": {"kind": "med", "dropout": 0.2},
    "med_own": {"kind": "med", "dropout": 0.2, "layers": 1, "from_layer": 1},
    "of_embeddings": {**CROSS, "from_layer": 0},
    "from_layer": {**CROSS, "from_layer": 1},
}


class Case(NamedTuple):
    """Towers and fusion by name, and losses. Those that drop do so in training: patches, hidden states, branches."""

    image: str = "vit_dropping"
    text: str = "bert_dropping"
    fusion: str = "med"
    losses: LossesConfig = ALL_LOSSES
    frozen: str | None = None


def model_config(case: Case) -> ModelConfig:
    heads = {"captioning": {}, "masked_language": {"mask_share": 0.3}}
    values = {
        **{name: head for name, head in heads.items() if getattr(case.losses, name)},
        "embed_dim": 16,
        "image": IMAGE_TOWERS[case.image],
        "text": TEXT_TOWERS[case.text],
        "fusion": FUSIONS[case.fusion],
        "init_logit_bias": -3.0,
        "freeze": [case.frozen] if case.frozen else [],
    }
    return check_config(values, ModelConfig, "test")


def make_batch(config: ModelConfig, step: int, world: World) -> Batch:
    """This rank's rows of a random global batch. Of 4 ranks, and of 2: pictures, captions, and captions that are also those of
    another row's picture, are the same within the first rank, within another one, and across ranks."""
    size, length = config.image.image_size, config.text.context_length
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (GLOBAL_BATCH, 3, size, size), generator=generator, dtype=torch.uint8)
    ids = torch.randint(1, 1000, (GLOBAL_BATCH, length), generator=generator)
    image_id, text_id = torch.arange(GLOBAL_BATCH), torch.arange(GLOBAL_BATCH)
    image_id[[1, 10, 12]] = torch.tensor([0, 9, 5])
    text_id[[3, 15, 13]] = torch.tensor([2, 14, 6])
    image, ids = image[image_id], ids[text_id]
    others = text_id.clone()
    others[[0, 1, 9, 10, 5, 12, 8, 4, 7]] = text_id[[1, 0, 10, 9, 12, 5, 11, 11, 15]]
    ends, places = 3 + text_id % 7, torch.arange(length)  # texts of 4 to 10 tokens
    ids = ids.where(places < ends[:, None], 0).where(places != ends[:, None], VOCAB_SIZE - 1)
    rows = GLOBAL_BATCH // world.size
    own = slice(world.rank * rows, (world.rank + 1) * rows)
    return Batch(
        image=image[own],
        ids=ids[own],
        mask=(places <= ends[:, None])[own],
        image_id=image_id[own],
        text_id=text_id[own],
        true_text_id=torch.stack([text_id, others], dim=1)[own],
        position=np.arange(GLOBAL_BATCH)[own] + step * GLOBAL_BATCH,
        keys=[str(row) for row in range(GLOBAL_BATCH)[own]],
    )


class PlainEngine:
    """What a step asks of DeepSpeed's engine, in plain PyTorch: gradients stay in `p.grad`, averaged by whoever reads."""

    def __init__(self, model: torch.nn.Module):
        self.module = model
        self.no_sync = contextlib.nullcontext
        self.optimizer = None

    def __call__(self, *arguments, **options):
        return self.module(*arguments, **options)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def zero_optimization_stage(self) -> int:
        return 0

    def fp16_enabled(self) -> bool:
        return False

    def allreduce_gradients(self) -> None:
        pass


def losses_and_gradients(
    world: World, case: Case, micro_batches: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Losses and every parameter's gradient in float64, each averaged over the ranks."""
    config = model_config(case)
    model = build_model(config, TOKENIZER, 0, world).double().train()
    batch, size = make_batch(config, 0, world), GLOBAL_BATCH // world.size // micro_batches
    teacher = build_teacher(config, torch.float64) if case.losses.distill else None
    engine = PlainEngine(model)
    momentum = build_momentum(config, case.losses.momentum, engine, size, world)
    losses, _ = compute_gradients(engine, batch, case.losses, STEP, size, world, teacher, momentum)
    return averages(world, model, losses)


def build_momentum(
    config: ModelConfig, settings: MomentumConfig | None, engine: PlainEngine, micro_batch_size: int, world: World
) -> Momentum | None:
    """Averages that began as other weights and have followed for two steps, whose batches are in the queue."""
    if settings is None:
        return None
    others = build_model(config, TOKENIZER, 2).state_dict()
    restored = {f"momentum.weights.{name}": value for name, value in others.items()}
    momentum = Momentum(settings, config, TOKENIZER, engine, world, restored)
    for step in (0, 1):
        momentum.follow(momentum.compare(make_batch(config, step + 7, world), micro_batch_size, step), step)
    return momentum


def build_teacher(config: ModelConfig, dtype: torch.dtype) -> Callable[[Batch], TeacherOutput]:
    """A model of other weights, in evaluation mode."""
    model = build_model(config, TOKENIZER, 1).to(dtype).eval()

    @torch.no_grad()
    def teacher(batch: Batch) -> TeacherOutput:
        output = model(batch, heads=False)
        return TeacherOutput(output.image_embed, output.text_embed, output.logit_scale)

    return teacher


def averages(world: World, model: torch.nn.Module, losses: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Means over the ranks, of all in one collective; running statistics of batch normalisation as they are."""
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    parts = [part.detach().reshape(-1) for part in (*losses.values(), *named.values())]
    mean = world.mean(torch.cat(parts)).split([len(part) for part in parts])
    means = {name: value.item() for name, value in zip(losses, mean, strict=False)}
    gradients = {
        name: value.view_as(grad).numpy()
        for (name, grad), value in zip(named.items(), mean[len(losses) :], strict=True)
    }
    buffers = {name: buffer.numpy() for name, buffer in model.named_buffers() if "running" in name}
    return means, gradients | buffers


def all_losses_and_gradients(world: World, cases: list[tuple[Case, int]]) -> list:
    return [losses_and_gradients(world, *case) for case in cases]


GATHERED = Case(fusion="text_to_image", losses=ALL_LOSSES.model_copy(update={"distill": None}))


def gather_tokens(world: World, case: Case) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The reference: all tokens and embeddings gathered, as BLIP-2 does, and the losses written with whole matrices; in the
    total, with the weights of `STEP`."""
    config = model_config(case)
    model = build_model(config, TOKENIZER, 0, world).double().train()
    batch = make_batch(config, 0, world)
    output = model(batch, heads=False)
    momentum = build_momentum(config, case.losses.momentum, PlainEngine(model), len(batch.ids), world)
    output.momentum = momentum.compare(batch, len(batch.ids), STEP)
    keys = model.sample_keys(torch.from_numpy(batch.position))
    image, text = model.encode_image(batch.image, keys), model.encode_text(batch.ids, batch.mask, keys)
    images, texts, masks, all_keys = map(world.all_gather, (image.tokens, text.tokens, batch.mask, keys))
    plan = model.plan(batch, output)
    own = np.arange(len(keys)) + world.rank * len(keys)
    image_rows = np.concatenate([own, own, plan.hard_image[own]])
    text_rows = np.concatenate([own, plan.hard_text[own], own])
    assert (image_rows >= 0).all() and (text_rows >= 0).all()
    logits = model.match_pairs(
        texts[text_rows],
        masks[text_rows],
        images[image_rows],
        keys=pair_keys(all_keys[image_rows], all_keys[text_rows]),
    )
    labels = torch.tensor([1] * len(own) + [0] * 2 * len(own))
    losses = {
        "contrastive": dense_contrastive(output, world, 0.1, "soft"),
        "sigmoid": dense_sigmoid(output, world, "masked"),
        "matching": torch.nn.functional.cross_entropy(logits, labels),
        "momentum": dense_momentum(output, world, 0.1, "soft"),
        **gather_token_losses(world, model, batch, image.tokens),
    }
    weights = {"contrastive": 1.5, "sigmoid": 0.3, "matching": 2.5, "momentum": 0.7}
    weights |= {"captioning": 0.5, "masked_language": 2.0}
    losses["total"] = sum(weight * losses[name] for name, weight in weights.items())
    losses["total"].backward()
    return averages(world, model, losses)


def gather_token_losses(
    world: World, model: torch.nn.Module, batch: Batch, image: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Captioning and masked language as one mean over all tokens of the global batch, whose logits all ranks have."""
    keys = model.sample_keys(torch.from_numpy(batch.position))
    with model.noise.using(derive_keys(keys, "captioning")):
        next_tokens = model.fusion.decode(model.text_tower.causal_tokens(batch.ids, batch.mask), batch.mask, image)
    masked_ids, chosen = model.mask_tokens(batch)
    with model.noise.using(derive_keys(keys, "masked language")):
        tokens = model.fusion(model.text_tower(masked_ids, batch.mask).tokens, batch.mask, image).tokens
    embedding = model.text_tower.embedding.weight

    def loss(head: torch.nn.Module, tokens: torch.Tensor, ids: torch.Tensor, smoothing: float) -> torch.Tensor:
        logits, labels = world.all_gather(head(tokens, embedding)), world.all_gather(ids)
        return torch.nn.functional.cross_entropy(logits.mT, labels, label_smoothing=smoothing)  # without labels of -100

    following = batch.ids.masked_fill(~batch.mask, -100)[:, 1:]
    return {
        "captioning": loss(model.caption_head, next_tokens[:, :-1], following, 0.1),
        "masked_language": loss(model.masked_head, tokens, batch.ids.masked_fill(~chosen, -100), 0.0),
    }


def whole_true_pairs(rows: Identity, columns: Identity) -> list[torch.Tensor]:
    """Which of the rows' images belong to which of the columns' texts, and which of the rows' texts to which of the columns'
    images, [rows,columns] bool, pair by pair."""

    def belong(images: Identity, texts: Identity) -> torch.Tensor:
        pictures = list(zip(images.image_id.tolist(), images.true_text_id.tolist(), strict=True))
        captions = list(zip(texts.image_id.tolist(), texts.text_id.tolist(), strict=True))
        return torch.tensor([[image == of or text in true for of, text in captions] for image, true in pictures])

    return [belong(rows, columns), belong(columns, rows).T]


def dense_contrastive(output: ModelOutput, world: World, smoothing: float, positives: str) -> torch.Tensor:
    """The contrastive loss with its matrices of [B,G] targets and similarities."""
    true_pairs = whole_true_pairs(output.identity, gather_identity(output.identity, world))
    sides = [(output.image_embed, output.text_embed), (output.text_embed, output.image_embed)]
    settings = (output.logit_scale, world, smoothing, positives)
    return sum(
        dense_softmax(rows, world.all_gather(partners), true, *settings) / 2
        for (rows, partners), true in zip(sides, true_pairs, strict=True)
    )


def dense_momentum(output: ModelOutput, world: World, smoothing: float, positives: str) -> torch.Tensor:
    """The momentum loss with matrices of targets and similarities with all candidates."""
    averaged, candidates = output.momentum, output.momentum.candidates
    true_pairs = whole_true_pairs(output.identity, candidates.identity)
    sides = [
        (output.image_embed, averaged.image_embed, candidates.text_embed),
        (output.text_embed, averaged.text_embed, candidates.image_embed),
    ]
    settings = (output.logit_scale, world, smoothing, positives)
    return sum(
        dense_softmax(rows, columns, true, *settings, target_rows, averaged.alpha) / 2
        for (rows, target_rows, columns), true in zip(sides, true_pairs, strict=True)
    )


def dense_softmax(
    rows: torch.Tensor,
    columns: torch.Tensor,
    true: torch.Tensor,
    scale: torch.Tensor,
    world: World,
    smoothing: float,
    positives: str,
    target_rows: torch.Tensor | None = None,
    alpha: float = 0.0,
) -> torch.Tensor:
    own = torch.zeros_like(true)
    own[torch.arange(len(rows)), torch.arange(len(rows)) + world.rank * len(rows)] = True
    counted = own | ~true if positives == "masked" else torch.ones_like(true)
    positive = true if positives == "soft" else own
    target = (1 - smoothing) * positive.double() / positive.sum(1, keepdim=True)
    target = target + smoothing * counted.double() / counted.sum(1, keepdim=True)
    if alpha:
        soft = (scale.detach() * target_rows @ columns.T).masked_fill(~counted, -1e30).softmax(1)
        target = (1 - alpha) * target + alpha * soft
    logs = (scale * rows @ columns.T).masked_fill(~counted, -1e30).log_softmax(1)
    return -(target * logs).sum(1).mean()


def dense_sigmoid(output: ModelOutput, world: World, positives: str) -> torch.Tensor:
    scores = output.logit_scale * output.image_embed @ world.all_gather(output.text_embed).T + output.logit_bias
    true = whole_true_pairs(output.identity, gather_identity(output.identity, world))[0]
    own = torch.zeros_like(true)
    rows = torch.arange(len(true))
    own[rows, rows + world.rank * len(true)] = True
    positive = true if positives == "soft" else own
    counted = own | ~true if positives == "masked" else torch.ones_like(true)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(scores, positive.to(scores.dtype), reduction="none")
    return (losses * counted).sum() / len(true)


def of_positives(world: World, positives: str, dense: bool = False) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The contrastive and the sigmoid loss of random embeddings with `make_batch`'s true pairs, and their gradients, averaged
    over the ranks; `dense`: written with whole matrices."""
    generator, rows = torch.Generator().manual_seed(0), GLOBAL_BATCH // world.size
    sides = unit(torch.randn(2, GLOBAL_BATCH, 6, generator=generator, dtype=torch.float64))
    leaves = torch.nn.ParameterDict({"image": sides[0], "text": sides[1]})
    leaves |= {name: torch.tensor([value], dtype=torch.float64) for name, value in (("scale", 9.0), ("bias", -2.0))}
    own = slice(world.rank * rows, (world.rank + 1) * rows)
    identity = make_batch(model_config(Case()), 0, world).identity
    output = ModelOutput(leaves["image"][own], leaves["text"][own], leaves["scale"], leaves["bias"], identity)
    if dense:
        losses = {
            "contrastive": dense_contrastive(output, world, 0.1, positives),
            "sigmoid": dense_sigmoid(output, world, positives),
        }
        losses["total"] = losses["contrastive"] + losses["sigmoid"]
    else:
        contrastive = ContrastiveConfig(chunk=5, label_smoothing=0.1, positives=positives)
        config = LossesConfig(contrastive=contrastive, sigmoid=SigmoidConfig(chunk=3, positives=positives))
        losses = compute_losses(config, output, world)
    losses["total"].sum().backward()
    return averages(world, leaves, losses)


def losses_of_both(world: World) -> dict[str, list[tuple[str, float, list[np.ndarray]]]]:
    """(ours and open_clip's, loss, gradients) of the contrastive and the sigmoid loss, on the same embeddings."""
    from pretrain.torchvision_ops import prepare_torchvision

    prepare_torchvision()
    from open_clip.loss import ClipLoss, SigLipLoss

    generator = torch.Generator().manual_seed(world.rank)
    sides = [torch.randn(4, 16, generator=generator, dtype=torch.float64) for _ in range(2)]

    def evaluate(loss_of) -> tuple[float, list[np.ndarray]]:
        image, text = (torch.nn.functional.normalize(side, dim=-1).requires_grad_() for side in sides)
        scale, bias = (torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (14.0, -3.0))
        loss = loss_of(image, text, scale, bias)
        loss.sum().backward()
        gradients = [leaf.grad.numpy() for leaf in (image, text, scale, bias) if leaf.grad is not None]
        return loss.item(), gradients

    def ours(config: LossesConfig):
        return lambda *leaves: compute_losses(config, ModelOutput(*leaves), world)["total"]

    ranks = {"rank": world.rank, "world_size": world.size}
    clip = ClipLoss(local_loss=True, gather_with_grad=True, **ranks)
    results = {
        "contrastive": [
            ("chunks", *evaluate(ours(LossesConfig(contrastive=ContrastiveConfig(chunk=5))))),
            ("whole", *evaluate(ours(LossesConfig()))),
            ("open_clip", *evaluate(lambda image, text, scale, bias: clip(image, text, scale))),
        ],
        "sigmoid": [
            ("chunks", *evaluate(ours(LossesConfig(contrastive=None, sigmoid=SigmoidConfig(chunk=5))))),
            ("whole", *evaluate(ours(LossesConfig(contrastive=None, sigmoid=SigmoidConfig())))),
        ],
    }
    for exchange in ("bidir", "shift", "reduce", "gather"):
        results["sigmoid"].append((exchange, *evaluate(SigLipLoss(dist_impl=exchange, **ranks))))
    return results


BAD_STEP = 2


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on CPUs, which is slow there and works."""
    accelerator = import_deepspeed().get_accelerator()
    type(accelerator).is_fp16_supported = lambda self: True


def shard_everything() -> None:
    """ZeRO-3 keeps weights of less than 100,000 numbers whole on every rank, which is all that these models have."""

    def configured(*arguments) -> dict:
        settings = deepspeed_config(*arguments)
        if settings["zero_optimization"]["stage"] == 3:
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return settings

    engine_module.deepspeed_config = configured


class Run(NamedTuple):
    """How DeepSpeed trains."""

    zero_stage: int
    micro_batches: int
    precision: str = "fp32"
    offload: str = "none"


def train_losses(world: World, runs: list[Run], steps: int, case: Case) -> list[tuple[list, list[str]]]:
    """Steps of DeepSpeed for each run: total losses (means over ranks) with the norms of the gradients, and what was said of
    the steps that were skipped: in one, the first image of each of rank 1's micro-batches becomes NaN."""
    shard_everything()
    config, results = model_config(case), []
    teacher = build_teacher(config, torch.float32) if case.losses.distill else None
    for run in runs:
        settings = EngineConfig(
            zero_stage=run.zero_stage, precision=run.precision, offload=run.offload, lr=1e-3, warmup_steps=3
        )
        model = build_model(config, TOKENIZER, 0, world).train()
        engine = build_engine(model, settings, GLOBAL_BATCH, world)
        if run.precision == "fp16":  # no overflow: all steps count
            (getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config).cur_scale = 64.0
        momentum = None
        if case.losses.momentum:
            momentum = Momentum(case.losses.momentum, config, TOKENIZER, engine, world, {})
        losses, skipped = [], []
        for step in range(steps):
            set_learning_rate(engine, learning_rate(settings, step, steps))
            batch = make_batch(config, step, world)
            spoil = step == BAD_STEP and world.rank == 1
            hook = model.image_tower.register_forward_hook(spoil_first_row) if spoil else None
            size = len(batch.ids) // run.micro_batches
            values, output = compute_gradients(engine, batch, case.losses, step, size, world, teacher, momentum)
            if hook:
                hook.remove()
            norm = gradient_norm(engine)
            applied = apply_gradients(engine)
            if momentum and applied:
                momentum.follow(output.momentum, step)
            try:
                BadSteps(1, world).check(step, applied, batch, values, output)
            except UserError as error:
                skipped.append(str(error))
            losses.append((world.mean(values["total"]).item(), norm))
        results.append((losses, skipped))
        engine.destroy()
    return results


def layers(width: int, count: int) -> torch.nn.Sequential:
    """The first is frozen."""
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(count)))
    model[0].requires_grad_(False)
    return model


def held_state(world: World, settings: list[EngineConfig], width: int, count: int) -> list[dict[str, int]]:
    """Bytes that a rank holds more than before after the second step's backward pass, by what it is. Each storage counts
    once; `bucket` is the largest."""
    return [held_by(world, config, width, count) for config in settings]


def held_by(world: World, config: EngineConfig, width: int, count: int) -> dict[str, int]:
    gc.collect()
    before = storages()  # which stay, so that no address is given again
    model = layers(width, count)
    engine = build_engine(model, config, world.size, world)
    ema = Ema(EmaConfig(), engine, world, {})
    rows = torch.ones(1, width, dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32)
    for step in range(2):
        engine.backward(engine(rows).sum())
        if step == 0:
            apply_gradients(engine)
    gc.collect()
    held = sorted(part.nbytes() for place, part in storages().items() if place not in before)
    bucket = held.pop() if config.zero_stage == 3 else 0
    assert ema.averages
    engine.destroy()
    return {"bucket": bucket, "rest": sum(held)}


def storages() -> dict[int, torch.UntypedStorage]:
    """Those of all tensors that Python knows, by address."""
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    parts = [tensor.untyped_storage() for tensor in tensors]
    return {part.data_ptr(): part for part in parts if part.nbytes()}


def spoil_first_row(module: torch.nn.Module, arguments: tuple, tower: Tower) -> Tower:
    pooled = tower.pooled.clone()
    pooled[0] = float("nan")
    return Tower(tower.tokens, pooled)


class Albef:
    """The momentum objective in plain PyTorch for one process: whole matrices, the queue one list, and after ALBEF's way of
    writing it."""

    def __init__(self, model: torch.nn.Module, settings: MomentumConfig):
        self.model, self.averaged, self.settings = model, copy.deepcopy(model).eval(), settings
        self.past: list[tuple[torch.Tensor, ...]] = []  # image, text, and their identity

    def loss(self, batch: Batch, output: ModelOutput, step: int) -> torch.Tensor:
        with torch.no_grad():
            now = self.averaged(batch, heads=False)
        self.batch = list(zip(now.image_embed, now.text_embed, *batch.identity, strict=True))
        queue = self.past[-self.settings.queue_samples :] if self.settings.queue_samples else []
        images, texts, *identity = map(torch.stack, zip(*self.batch, *queue, strict=True))
        scale, alpha, total = output.logit_scale, self.settings.alpha_at(step), 0
        for rows, averaged, columns, true in zip(
            (output.image_embed, output.text_embed),
            (now.image_embed, now.text_embed),
            (texts, images),
            whole_true_pairs(batch.identity, Identity(*identity)),
            strict=True,
        ):
            own = torch.eye(*true.shape, dtype=torch.bool)
            hidden = (true & ~own) * (-1e9 if self.settings.positives == "masked" else 0.0)
            positive = (true if self.settings.positives == "soft" else own).to(images.dtype)
            hard = positive / positive.sum(1, keepdim=True)
            smooth, candidates = self.settings.label_smoothing, (hidden == 0).to(images.dtype)
            hard = (1 - smooth) * hard + smooth * candidates / candidates.sum(1, keepdim=True)
            soft = (scale.detach() * averaged @ columns.T + hidden).softmax(1)
            logs = (scale * rows @ columns.T + hidden).log_softmax(1)
            total = total - ((alpha * soft + (1 - alpha) * hard) * logs).sum(1).mean() / 2
        return total

    @torch.no_grad()
    def follow(self) -> None:
        for average, weight in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
            average.copy_(self.settings.decay * average + (1 - self.settings.decay) * weight)
        self.past += self.batch


def plain_losses(steps: int, case: Case) -> list[tuple[float, float]]:
    """The same in plain PyTorch: one process, the whole batch at once, fp32, no update in the bad step."""
    config = model_config(case)
    settings = EngineConfig(precision="fp32", lr=1e-3, warmup_steps=3)
    teacher = build_teacher(config, torch.float32) if case.losses.distill else None
    model = build_model(config, TOKENIZER, 0).train()
    groups = parameter_groups(model, settings.weight_decay, settings.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.epsilon)
    albef = Albef(model, case.losses.momentum) if case.losses.momentum else None
    others = case.losses.model_copy(update={"momentum": None})
    results = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, steps)
        batch = make_batch(config, step, World())
        output = model(batch)
        output.teacher = teacher(batch) if teacher else None
        loss = compute_losses(others, output, World(), step)["total"]
        if albef:
            loss = loss + case.losses.momentum.weight * albef.loss(batch, output, step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        if step != BAD_STEP:
            optimizer.step()
            if albef:
                albef.follow()
        results.append((loss.item(), norm.item()))
    return results
