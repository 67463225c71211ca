"""The model card of an export: README.md, for whoever finds the folder without the run."""

from dataclasses import dataclass

from pretrain import __version__
from pretrain.export.compare import Comparison
from pretrain.restore import LoadedRun


@dataclass(frozen=True)
class Guide:
    """What a format says of itself: the hub's name of its library, code that loads it, what differs from the run."""

    library_name: str | None
    usage: str
    limits: list[str]


def render_card(source: LoadedRun, to: str, name: str, guide: Guide, comparison: Comparison) -> str:
    """README.md as text; `name` is that of the folder."""
    config, model = source.config, source.config.model
    heads = {"match": model.match_head, "caption": model.captioning, "masked language": model.masked_language}
    match = (
        "fusion with heads: " + ", ".join(name for name, has in heads.items() if has) if model.fusion else "no fusion"
    )
    facts = {
        "model": f"{model.image.kind} image tower, {model.text.kind} text tower, {match}",
        "embedding": f"{model.embed_dim} numbers, compared at unit norm",
        "picture": f"{model.image.image_size} x {model.image.image_size} pixels, RGB: the shorter side resized "
        "(bicubic, antialiased), then the centre",
        "pixel mean": ", ".join(map(str, model.image.pixel_mean)),
        "pixel deviation": ", ".join(map(str, model.image.pixel_std)),
        "text": f"{model.text.context_length} tokens at most, tokenizer {model.tokenizer.kind}",
        "trained on": config.data.names,
        "steps": f"{source.step:,}",
        "samples seen": f"{source.step * config.train.batch_size:,}",
        "written by": f"pretrain {__version__}, format {to}",
    }
    limits = [*guide.limits, "The optimiser's state is not here: training goes on from the run folder."]
    header = {"library_name": guide.library_name, "pipeline_tag": "zero-shot-image-classification", "tags": "[clip]"}
    return "\n".join(
        [
            "---",
            *(f"{key}: {value}" for key, value in header.items() if value),
            "---",
            "",
            f"# {name}",
            "",
            "An image-text model: pictures and texts become vectors, near each other where they belong together.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in facts.items()),
            "",
            "## How to load it",
            "",
            "```python",
            guide.usage.strip(),
            "```",
            "",
            "## What is missing or different",
            "",
            *(f"- {limit}" for limit in limits),
            "",
            "## Verification",
            "",
            f"Reloaded with {comparison.library} and compared with the run's own model, in fp32:",
            "",
            *(f"- {line}" for line in comparison.lines),
            "",
        ]
    )


def list_contrastive_limits(source: LoadedRun, library: str) -> list[str]:
    """What the run has and a library of contrastive models does not."""
    model, limits = source.config.model, []
    if model.fusion:
        limits.append(f"The fusion and its heads are not here: {library} has no place for them. `native` holds them.")
    return limits + list_training_limits(source)


def list_training_limits(source: LoadedRun) -> list[str]:
    """What the run does in training and no other library's model does by itself."""
    patch_dropout = getattr(source.config.model.image, "patch_dropout", 0)
    return [f"Patch dropout, {patch_dropout:g} in training, is off."] if patch_dropout else []


def list_bias_limits(source: LoadedRun) -> list[str]:
    """For classes of contrastive models without a bias; the order of similarities does not need it."""
    if not source.model.logit_bias:
        return []
    return [f"The class has no logit bias, which is {source.model.logit_bias().item():g}: add it to the logits."]
