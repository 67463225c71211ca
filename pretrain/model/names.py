"""The towers' weights under the names of other libraries, both ways: CLIP's transformers and BLIP's whole model.

Everywhere `weights` maps names to tensors; what has no counterpart on the other side keeps out of the result.
"""

import torch
from torch import Tensor

# transformers' name for each of open_clip's, outside the blocks and inside one.
IMAGE_NAMES = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
TEXT_NAMES = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
BLOCKS, THEIR_BLOCKS = "transformer.resblocks.", "encoder.layers."
BLOCK_NAMES = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_to_huggingface(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """An open_clip transformer's weights (without projection) as transformers' CLIP names them: query, key, value apart."""
    converted = {}
    for name, value in weights.items():
        if not name.startswith(BLOCKS):
            converted[names[name]] = value
            continue
        number, _, rest = name.removeprefix(BLOCKS).partition(".")
        block = f"{THEIR_BLOCKS}{number}."
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")  # weight or bias
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                converted[f"{block}self_attn.{part}_proj.{kind}"] = rows
        else:
            module, _, kind = rest.rpartition(".")
            converted[f"{block}{BLOCK_NAMES[module]}.{kind}"] = value
    return converted


def clip_from_huggingface(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """The way back. `weights` are of transformers' CLIPVisionTransformer or CLIPTextTransformer."""
    ours = {theirs: own for own, theirs in names.items()}
    in_block = {theirs: own for own, theirs in BLOCK_NAMES.items()}
    converted = {}
    for name, value in weights.items():
        if name in ours:
            converted[ours[name]] = value
        if not name.startswith(THEIR_BLOCKS):
            continue
        number, _, rest = name.removeprefix(THEIR_BLOCKS).partition(".")
        module, _, kind = rest.rpartition(".")
        if module == "self_attn.q_proj":
            parts = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            converted[f"{BLOCKS}{number}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif module in in_block:
            converted[f"{BLOCKS}{number}.{in_block[module]}.{kind}"] = value
    return converted


# Ours for BLIP's (transformers' BlipForImageTextRetrieval), by the beginning of the name.
BLIP_PREFIXES = {
    "image_tower.inner.": "vision_model.",
    "image_tower.projection.": "vision_proj.",
    "text_tower.inner.": "text_encoder.",
    "text_tower.projection.": "text_proj.",
    "match_head.": "itm_head.",
}
CROSS, BLIP_LAYERS = "fusion.cross.", "text_encoder.encoder.layer."
CROSS_NAMES = {
    "attention.query": "self.query",
    "attention.out": "output.dense",
    "norm": "output.LayerNorm",
}
TOKEN_TYPES = "text_tower.inner.embeddings.token_type_embeddings.weight"
POSITIONS = "text_tower.inner.embeddings.position_embeddings.weight"


def to_blip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model of a BLIP vision tower, BERT and `med` with all layers shared, as BlipForImageTextRetrieval.

    BLIP has no token types: what BERT adds to every token goes into the positions. Its projections have biases.
    """
    converted = {}
    for name, value in weights.items():
        if name == TOKEN_TYPES or name.startswith(("logit_", "caption_head.", "masked_head.")):
            continue
        if name == POSITIONS:
            value = value + weights[TOKEN_TYPES][0]
        if name.startswith(CROSS):
            number, _, rest = name.removeprefix(CROSS).partition(".")
            module, _, kind = rest.rpartition(".")
            layer = f"{BLIP_LAYERS}{number}.crossattention."
            if module == "attention.key_value":
                converted[f"{layer}self.key.{kind}"], converted[f"{layer}self.value.{kind}"] = value.chunk(2)
            else:
                converted[f"{layer}{CROSS_NAMES[module]}.{kind}"] = value
            continue
        ours = next(prefix for prefix in BLIP_PREFIXES if name.startswith(prefix))
        converted[BLIP_PREFIXES[ours] + name.removeprefix(ours)] = value
    for projection in ("vision_proj", "text_proj"):
        weight = converted[f"{projection}.weight"]
        converted.setdefault(f"{projection}.bias", weight.new_zeros(len(weight)))
    return converted


def from_blip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The way back; the token types, which BLIP does not have, are 0."""
    in_cross = {theirs: own for own, theirs in CROSS_NAMES.items()}
    converted = {}
    for name, value in weights.items():
        layer, cross, rest = name.partition(".crossattention.")
        if cross:
            module, _, kind = rest.rpartition(".")
            number = layer.removeprefix(BLIP_LAYERS)
            if module == "self.key":
                both = torch.cat([value, weights[name.replace("self.key", "self.value")]])
                converted[f"{CROSS}{number}.attention.key_value.{kind}"] = both
            elif module in in_cross:
                converted[f"{CROSS}{number}.{in_cross[module]}.{kind}"] = value
            continue
        for ours, theirs in BLIP_PREFIXES.items():
            if name.startswith(theirs):
                converted[ours + name.removeprefix(theirs)] = value
    if POSITIONS in converted:
        converted[TOKEN_TYPES] = torch.zeros(2, converted[POSITIONS].shape[1])
    return converted
