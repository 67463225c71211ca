"""transformers' own classes: CLIPModel for ViT and CLIP text, VisionTextDualEncoderModel for ViT and BERT text.

Each comes with a processor (image settings and tokenizer), so `CLIPProcessor` or `VisionTextDualEncoderProcessor`, and
`AutoModel` with `AutoProcessor`, read the folder.
"""

import copy
import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_tools.errors import UserError
from data_tools.files import write_atomic, write_json_atomic
from pretrain.export.card import Guide, list_bias_limits, list_contrastive_limits
from pretrain.export.compare import Reloaded
from pretrain.model.model import MAX_LOGIT_SCALE
from pretrain.model.names import IMAGE_NAMES, TEXT_NAMES, clip_to_huggingface
from pretrain.model.towers import ImageConfig, normalise
from pretrain.restore import LoadedRun
from pretrain.torchvision_ops import prepare_torchvision

CLASSES = {  # by text tower
    "clip": ("CLIPModel", "CLIPProcessor"),
    "bert": ("VisionTextDualEncoderModel", "VisionTextDualEncoderProcessor"),
}
START, END, PADDING = "<|startoftext|>", "<|endoftext|>", "!"  # of CLIP's vocabulary; padding is id 0

USAGE = """
from PIL import Image
from transformers import {model}, {processor}

model, processor = {model}.from_pretrained("{name}"), {processor}.from_pretrained("{name}")
inputs = processor(images=Image.open("picture.jpg"), text=["a dog", "a cat"], padding="max_length", truncation=True,
                   return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(dim=-1))
"""

LIMITS = [
    "transformers rounds the corner of the centre crop down, the run rounds halves to the even number: pictures whose "
    "longer side, resized, is 4k+3 pixels too long are cropped one pixel to the side.",
]
CLIP_TOKENIZER_LIMITS = [
    "transformers' tokenizer only lower-cases and joins white space; the run's first mends broken Unicode (ftfy) and "
    "HTML entities (html.unescape, twice). Do so to texts from the web.",
    "Padding is id 0, which is also the sign '!': `split_special_tokens` in tokenizer_config.json keeps them apart.",
]


def write(source: LoadedRun, folder: Path, final: Path) -> Guide:
    """Fill `folder`; it does not depend on where it will lie. Raises UserError for towers without a class."""
    config = source.config.model
    if config.image.kind != "vit":
        raise UserError(
            f"--to huggingface: transformers has no class for the image tower '{config.image.kind}' (model.image) beside "
            "a text tower. Use --to open_clip or --to native"
        )
    if config.text.kind not in CLASSES:
        raise UserError(
            f"--to huggingface: takes a text tower of kind {' or '.join(CLASSES)}; this is '{config.text.kind}' "
            "(model.text). Use --to open_clip or --to native"
        )
    if config.text.kind == "bert" and (config.text.pooling != "pooler" or config.text.projection_bias):
        raise UserError(
            "--to huggingface: VisionTextDualEncoderModel projects BERT's pooler, without a bias; this model has other "
            "model.text.pooling or projection_bias. Use --to native"
        )
    if config.text.kind == "clip" and source.tokenizer.end_id == 2:
        raise UserError(
            "--to huggingface: the tokenizer's end mark is id 2, for which transformers' CLIPModel pools at the largest id "
            "instead (it mends an old mistake so). Use --to open_clip or --to native"
        )
    prepare_torchvision()
    import transformers

    model_class, processor_class = CLASSES[config.text.kind]
    settings = build_config(source)
    settings.architectures, settings.dtype = [model_class], "float32"
    settings.save_pretrained(folder)
    save_file(convert_weights(source), folder / "model.safetensors", {"format": "pt"})
    pictures = build_image_processor(config.image)
    pictures.save_pretrained(folder)  # preprocessor_config.json, where transformers 4 looks
    limits = [*list_contrastive_limits(source, "transformers"), *list_bias_limits(source), *LIMITS]
    if config.tokenizer.kind == "clip":
        tokenizer = build_clip_tokenizer(folder, config.text.context_length)
        limits += CLIP_TOKENIZER_LIMITS
    else:
        tokenizer = copy.deepcopy(source.tokenizer.inner)
        tokenizer.model_max_length = config.text.context_length
    getattr(transformers, processor_class)(pictures, tokenizer).save_pretrained(folder)
    edit_tokenizer_files(folder, config.text.kind, config.tokenizer.kind)
    return Guide("transformers", USAGE.format(model=model_class, processor=processor_class, name=final.name), limits)


def build_image_processor(image: ImageConfig) -> Any:
    """The evaluation transform: the shorter side to the tower's size, then the centre, and its pixel statistics."""
    import transformers

    return transformers.CLIPImageProcessor(
        size={"shortest_edge": image.image_size},
        crop_size={"height": image.image_size, "width": image.image_size},
        image_mean=list(image.pixel_mean),
        image_std=list(image.pixel_std),
    )


def build_config(source: LoadedRun) -> Any:
    """A CLIPConfig or a VisionTextDualEncoderConfig."""
    import transformers

    config, vocab_size = source.config.model, source.tokenizer.vocab_size
    image, text = config.image, config.text
    vision = transformers.CLIPVisionConfig(
        image_size=image.image_size,
        patch_size=image.patch_size,
        hidden_size=image.width,
        num_hidden_layers=image.layers,
        num_attention_heads=image.width // image.head_width,
        intermediate_size=int(image.width * image.mlp_ratio),
        hidden_act=image.activation,
        projection_dim=config.embed_dim,
    )
    if text.kind == "bert":
        return transformers.VisionTextDualEncoderConfig(
            vision_config=vision.to_dict(),
            text_config=build_bert_config(source).to_dict(),
            projection_dim=config.embed_dim,
        )
    marks = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": 0}
    if config.tokenizer.kind != "clip":
        padding = source.tokenizer.inner.pad_token_id
        marks = {"bos_token_id": None, "eos_token_id": source.tokenizer.end_id, "pad_token_id": padding}
    words = transformers.CLIPTextConfig(
        vocab_size=vocab_size,
        max_position_embeddings=text.context_length,
        hidden_size=text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        intermediate_size=int(text.width * text.mlp_ratio),
        hidden_act=text.activation,
        projection_dim=config.embed_dim,
        **marks,
    )
    return transformers.CLIPConfig(
        vision_config=vision.to_dict(), text_config=words.to_dict(), projection_dim=config.embed_dim
    )


def build_bert_config(source: LoadedRun) -> Any:
    """The BERT tower's own config, with the tokenizer's padding id, by which open_clip masks."""
    config = copy.deepcopy(source.model.text_tower.inner.config)
    config.pad_token_id = 0 if source.config.model.tokenizer.kind == "clip" else source.tokenizer.inner.pad_token_id
    return config


def convert_weights(source: LoadedRun) -> dict[str, Tensor]:
    """The two towers and the logit scale under transformers' names, each in memory of its own."""
    image, text = select_weights(source, "image_tower.inner."), select_weights(source, "text_tower.inner.")
    weights = {"logit_scale": cap_log_scale(source), "visual_projection.weight": image.pop("proj").T}
    image = clip_to_huggingface(image, IMAGE_NAMES)
    if source.config.model.text.kind == "bert":
        # Twice, as transformers 4 names it; 5 reads that as well, but 4 would not read the single name of 5.
        weights |= {f"vision_model.vision_model.{name}": value for name, value in image.items()}
        weights |= {f"text_model.{name}": value for name, value in text.items()}
        weights["text_projection.weight"] = source.model.text_tower.projection.weight.detach()
    else:
        weights["text_projection.weight"] = text.pop("text_projection").T
        weights |= {f"vision_model.{name}": value for name, value in image.items()}
        weights |= {f"text_model.{name}": value for name, value in clip_to_huggingface(text, TEXT_NAMES).items()}
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()}


def select_weights(source: LoadedRun, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): value for k, value in source.model.state_dict().items() if k.startswith(prefix)}


def cap_log_scale(source: LoadedRun) -> Tensor:
    """The logarithm of the logit scale, a scalar, with the model's own limit: other libraries do not clamp it."""
    return source.model.logit_scale.log_scale.detach().clamp(max=math.log(MAX_LOGIT_SCALE)).reshape(())


def build_clip_tokenizer(folder: Path, context_length: int) -> Any:
    """transformers' CLIP tokenizer over open_clip's vocabulary, which it leaves in `folder`: the same ids, padding too.

    transformers needs a token to pad with, and id 0 is "!". As a special token it would be cut out of texts as well
    ("wow!" has "!" at a word's end, id 256); `split_special_tokens` reads special tokens in texts as plain text.
    """
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizerFast

    simple = SimpleTokenizer()
    vocabulary = dict(simple.encoder)
    vocabulary[START], vocabulary[END] = vocabulary.pop("<start_of_text>"), vocabulary.pop("<end_of_text>")
    merges = "".join(f"{left} {right}\n" for left, right in simple.bpe_ranks)
    write_json_atomic(folder / "vocab.json", vocabulary)
    write_atomic(folder / "merges.txt", f"#version: 0.2\n{merges}".encode())
    return CLIPTokenizerFast.from_pretrained(
        folder, pad_token=PADDING, model_max_length=context_length, split_special_tokens=True
    )


def edit_tokenizer_files(folder: Path, text: str, tokenizer: str) -> None:
    """What the tokenizer's files have to say, and cannot be told through its class."""
    if tokenizer == "clip":  # no special token for padding: not every reader knows `split_special_tokens`
        path = folder / "tokenizer.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] != PADDING]
        write_json_atomic(path, settings)
    elif text == "clip":  # CLIPModel takes no token types, which BERT's tokenizer gives
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        write_json_atomic(path, settings | {"model_input_names": ["input_ids", "attention_mask"]})


def reload(folder: Path) -> Reloaded:
    """What transformers makes of the folder. The hub is not asked."""
    prepare_torchvision()
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import AutoModel, AutoProcessor, CLIPTokenizerFast

    model = AutoModel.from_pretrained(folder, local_files_only=True)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    statistics = processor.image_processor.image_mean, processor.image_processor.image_std
    any_picture = torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2)

    def read(texts: list[str]) -> Any:
        return processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")

    def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
        inputs = read(texts)
        return inputs["input_ids"], inputs["attention_mask"].bool()

    @torch.no_grad()
    def embed_images(pixels: Tensor) -> Tensor:
        return model(pixel_values=normalise(pixels, *statistics), **read(["any"])).image_embeds

    @torch.no_grad()
    def embed_texts(texts: list[str]) -> Tensor:
        return model(pixel_values=any_picture, **read(texts)).text_embeds

    return Reloaded(
        library=f"transformers {importlib.metadata.version('transformers')}",
        tokenize=tokenize,
        preprocess=lambda picture: processor(images=picture, return_tensors="pt")["pixel_values"][0],
        embed_images=embed_images,
        embed_texts=embed_texts,
        logit_scale=model.logit_scale.exp().item(),
        clean=SimpleTokenizer().clean_fn if isinstance(processor.tokenizer, CLIPTokenizerFast) else str,
        rounds_crop_down=True,
    )
