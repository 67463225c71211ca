"""Retrieval: recall at 1, 5 and 10 both ways, by contrastive score and after reranking the best k by the match head.

The reranking score is the match head's log-odds plus the scaled similarity. Half of the head's negatives were drawn in
proportion to exp(scaled similarity), so its log-odds tell what the similarity leaves open (noise-contrastive estimation,
Gutmann and Hyvarinen 2010), and the sum is what ranks; BLIP adds the two as well.

The ranks share the work: each reads and embeds every R-th picture, and scores the match pairs of its own pictures, so
no image tokens cross the network or outlive a batch.

Shape legend: I pictures, T captions, E embedding, L text tokens, Q queries, M items, k candidates a query, P pairs.
"""

import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data_tools.errors import UserError
from data_tools.files import write_json_atomic
from data_tools.shards import Manifest, ShardReader
from pretrain.data.decode import BadSample, eval_pixels
from pretrain.data.loader import find_picture, read_captions
from pretrain.data.text import Tokenizer
from pretrain.model.model import ImageTextModel
from pretrain.model.towers import unit
from pretrain.restore import load_run
from pretrain.world import World

log = logging.getLogger(__name__)

RECALL_AT = (1, 5, 10)
PAIRS_AT_ONCE = 256  # that go through the fusion together
DECODE_THREADS = 2


@dataclass
class Dataset:
    """Shards in storage order, prepared for evaluation."""

    reader: ShardReader
    image_size: int

    def read(self, picture: int) -> tuple[Tensor, list[str]]:
        """One picture [3,S,S] uint8 and its captions. Raises UserError for a sample that cannot be used."""
        raw = self.reader.read(picture)
        try:
            return eval_pixels(find_picture(raw.fields), self.image_size), read_captions(raw.fields)
        except BadSample as error:
            raise UserError(f"{raw.shard}: sample {raw.key}: {error}. Build the evaluation shards again") from None


@dataclass
class Embedded:
    """Both sides of a dataset, the same on every rank; captions in picture order."""

    ids: Tensor  # [T,L] int64
    mask: Tensor  # [T,L] bool
    picture_of: Tensor  # [T] int64, the picture of each caption
    image_embed: Tensor  # [I,E] unit norm
    text_embed: Tensor  # [T,E] unit norm


def evaluate_run(run: str, shards: str, rerank: int, batch_size: int, json_path: str | None, world: World) -> int:
    """The command: measure `run` on the dataset `shards`, print a table, write `json_path`. Collective."""
    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise UserError(f"--json {json_path}: its folder does not exist")
    loaded = load_run(run)
    data = Dataset(ShardReader(Manifest.load(shards)), loaded.config.model.image.image_size)
    if rerank and loaded.model.match_head is None:
        log.info("%s: the model has no match head to rerank with", run)
        rerank = 0
    results = evaluate_retrieval(loaded.model.to(world.device), loaded.tokenizer, data, rerank, batch_size, world)
    if world.is_main:
        print(render_table(results))
        if json_path:
            write_json_atomic(Path(json_path), {"run": run, "shards": shards, "step": loaded.step, **results})
    return 0


@torch.inference_mode()
def evaluate_retrieval(
    model: ImageTextModel, tokenizer: Tokenizer, data: Dataset, rerank: int, batch_size: int, world: World
) -> dict[str, float]:
    """Recalls in [0,1] by name, `contrastive/text_to_image/recall_at_1` and so on; with `rerank` k > 0 also `rerank/...`.

    Image-to-text counts a hit when any caption of the picture is among the first; text-to-image asks for the caption's
    own picture. A tie counts against the true one. Collective.
    """
    model.eval()
    both = embed(model, tokenizer, data, batch_size, world)
    pictures = torch.arange(len(both.image_embed))
    ways = {
        "text_to_image": (both.text_embed, both.image_embed, both.picture_of, pictures),
        "image_to_text": (both.image_embed, both.text_embed, pictures, both.picture_of),
    }
    results: dict[str, float] = {"pictures": len(pictures), "captions": len(both.picture_of), "rerank": rerank}
    found = {way: search(*sides, max(1, rerank)) for way, sides in ways.items()}
    for way, (places, _, _) in found.items():
        results |= recalls(f"contrastive/{way}", places)
    if rerank:
        to_image, to_text = found["text_to_image"][1], found["image_to_text"][1]
        pairs = torch.cat([index_pairs(to_image), index_pairs(to_text).flip(1)])  # [P,2] caption, picture
        scores = score_pairs(model, both, data, pairs, batch_size, world).split([to_image.numel(), to_text.numel()])
        scale = model.logit_scale().item()
        for (way, (places, candidates, similarity)), score in zip(found.items(), scores, strict=True):
            _, _, query_picture, item_picture = ways[way]
            true = item_picture[candidates] == query_picture[:, None]
            score = score.view_as(candidates) + scale * similarity
            results |= recalls(f"rerank/{way}", rerank_places(places, true, score))
    return results


def embed(model: ImageTextModel, tokenizer: Tokenizer, data: Dataset, batch_size: int, world: World) -> Embedded:
    """Embed every picture and caption, each on one rank. Collective."""
    count = len(data.reader)
    own = torch.arange(count)[world.rank :: world.size]
    image_embed = torch.zeros(count, model.config.embed_dim)
    captions: dict[int, list[str]] = {}
    for pictures, images in read_batches(data, own, batch_size, captions, "embed", world):
        image_embed[pictures] = unit(model.encode_image(images).pooled).cpu()
    for others in world.gather_objects(captions):
        captions |= others
    ids, mask = tokenizer([text for picture in range(count) for text in captions[picture]])
    picture_of = torch.repeat_interleave(torch.tensor([len(captions[picture]) for picture in range(count)]))
    text_embed = torch.zeros(len(ids), model.config.embed_dim)
    for rows in torch.arange(len(ids))[world.rank :: world.size].split(4 * batch_size):
        text = model.encode_text(ids[rows].to(world.device), mask[rows].to(world.device))
        text_embed[rows] = unit(text.pooled).cpu()
    return Embedded(ids, mask, picture_of, fill_in(image_embed, world), fill_in(text_embed, world))


def read_batches(
    data: Dataset, pictures: Tensor, batch_size: int, captions: dict[int, list[str]], what: str, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (picture numbers, images [B,3,S,S] on the device), decoded ahead in threads; fill in `captions`."""
    hidden = not world.is_main or not sys.stderr.isatty()
    with (
        ThreadPoolExecutor(DECODE_THREADS) as pool,
        tqdm(total=len(pictures), desc=what, unit="picture", dynamic_ncols=True, disable=hidden) as bar,
    ):
        batches = pictures.split(batch_size) if len(pictures) else ()
        ahead = [pool.submit(data.read, picture) for picture in batches[0].tolist()] if batches else []
        for number, batch in enumerate(batches):
            now, ahead = ahead, []
            if number + 1 < len(batches):
                ahead = [pool.submit(data.read, picture) for picture in batches[number + 1].tolist()]
            samples = [future.result() for future in now]
            captions.update((picture, texts) for picture, (_, texts) in zip(batch.tolist(), samples, strict=True))
            yield batch, torch.stack([image for image, _ in samples]).to(world.device)
            bar.update(len(batch))


def fill_in(rows: Tensor, world: World) -> Tensor:
    """Rows that each rank has filled in part (zero elsewhere), whole on every rank, on the CPU. Collective."""
    return world.all_reduce(rows.to(world.device)).cpu()


def search(query: Tensor, item: Tensor, query_picture: Tensor, item_picture: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Place of the best true item [Q] (0 = first) and the best min(k, M) items [Q,k] of each query, by dot product.

    Args: query [Q,E], item [M,E]; query_picture [Q] and item_picture [M] agree where a pair is true.
    """
    found = []
    for rows in torch.arange(len(query)).split(1024):
        scores = query[rows] @ item.T
        true = query_picture[rows, None] == item_picture
        best = scores.topk(min(k, len(item)), dim=1)
        found.append((place_of_true(scores, true), best.indices, best.values))
    places, candidates, similarity = (torch.cat(parts) for parts in zip(*found, strict=True))
    return places, candidates, similarity


def place_of_true(scores: Tensor, true: Tensor) -> Tensor:
    """How many false items score at least as high as the best true one: [Q,M], [Q,M] bool -> [Q]."""
    best = scores.masked_fill(~true, float("-inf")).amax(1, keepdim=True)
    return ((scores >= best) & ~true).sum(1)


def rerank_places(places: Tensor, true: Tensor, scores: Tensor) -> Tensor:
    """New places [Q]: the candidates [Q,k] in order of their new scores, and behind them the rest as it was."""
    return torch.where(true.any(1), place_of_true(scores, true), places)


def recalls(name: str, places: Tensor) -> dict[str, float]:
    return {f"{name}/recall_at_{k}": (places < k).double().mean().item() for k in RECALL_AT}


def index_pairs(candidates: Tensor) -> Tensor:
    """[Q,k] items -> [Q*k,2] (query, item)."""
    queries = torch.arange(len(candidates))[:, None].expand_as(candidates)
    return torch.stack([queries, candidates], dim=-1).flatten(0, 1)


def score_pairs(
    model: ImageTextModel, both: Embedded, data: Dataset, pairs: Tensor, batch_size: int, world: World
) -> Tensor:
    """Match scores [P] (log-odds of a match) of `pairs` [P,2] (caption, picture), each on its picture's rank. Collective."""
    scores = torch.zeros(len(pairs))
    order = pairs[:, 1].argsort(stable=True)
    starts = torch.searchsorted(pairs[order, 1], torch.arange(len(both.image_embed) + 1))
    own = torch.arange(len(both.image_embed))[world.rank :: world.size]
    for pictures, images in read_batches(data, own, batch_size, {}, "rerank", world):
        image_tokens = model.encode_image(images).tokens
        wanted = [order[starts[picture] : starts[picture + 1]] for picture in pictures]
        row_of = torch.repeat_interleave(torch.tensor([len(part) for part in wanted]))
        wanted = torch.cat(wanted)
        captions, caption_of = pairs[wanted, 0].unique(return_inverse=True)
        mask = both.mask[captions].to(world.device)
        text_tokens = model.encode_text(both.ids[captions].to(world.device), mask).tokens
        lengths = both.mask[captions].sum(1)[caption_of]
        for part in lengths.argsort().split(PAIRS_AT_ONCE):  # texts of like length together, to leave the padding out
            longest = int(lengths[part[-1]])
            text_rows, image_rows = caption_of[part].to(world.device), row_of[part].to(world.device)
            text, text_mask = text_tokens[text_rows, :longest], mask[text_rows, :longest]
            used, rows = image_rows.unique(return_inverse=True)
            logits = model.match_pairs(text, text_mask, image_tokens[used], rows=rows)
            scores[wanted[part]] = (logits[:, 1] - logits[:, 0]).cpu()
    return fill_in(scores, world)


def render_table(results: dict[str, float]) -> str:
    """The recalls in percent, a line a way and method."""
    methods = {"contrastive": "contrastive", "rerank": f"match rerank, top {results['rerank']}"}
    lines = [
        f"{results['pictures']} pictures, {results['captions']} captions; recall in %",
        f"{'':<16}{'by':<24}" + "".join(f"{'R@' + str(k):>8}" for k in RECALL_AT),
    ]
    for way, title in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
        for method, label in methods.items():
            if f"{method}/{way}/recall_at_1" in results:
                values = "".join(f"{100 * results[f'{method}/{way}/recall_at_{k}']:8.1f}" for k in RECALL_AT)
                lines.append(f"{title:<16}{label:<24}{values}")
    return "\n".join(lines)
