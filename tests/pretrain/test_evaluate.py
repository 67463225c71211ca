"""Retrieval against a naive twin, on one rank and on two."""

import json
from pathlib import Path

import pytest
import torch
from paths import TINY
from ranks import run_on_ranks

from data_tools.shards import Manifest, ShardReader
from pretrain.config import load_config
from pretrain.data.text import build_tokenizer
from pretrain.evaluate.retrieval import Dataset, evaluate_retrieval, place_of_true, rerank_places
from pretrain.model.model import build_model
from pretrain.model.towers import unit
from pretrain.train import RunConfig
from pretrain.world import World

RERANK = 5


def evaluate(world: World, shards: str) -> dict[str, float]:
    model, tokenizer, data = prepare(shards)
    return evaluate_retrieval(model, tokenizer, data, RERANK, 7, world)


def prepare(shards: str):
    config = load_config(TINY, [], RunConfig)
    tokenizer = build_tokenizer(config.model.tokenizer, config.model.text.context_length)
    model = build_model(config.model, tokenizer, 0).eval()
    torch.manual_seed(0)
    for parameter in model.fusion.parameters():  # a match head with opinions
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model, tokenizer, Dataset(ShardReader(Manifest.load(shards)), config.model.image.image_size)


@torch.inference_mode()
def naive(shards: str) -> dict[str, float]:
    """The same numbers, one query and one pair at a time."""
    model, tokenizer, data = prepare(shards)
    samples = [data.read(picture) for picture in range(len(data.reader))]
    texts = [(picture, text) for picture, (_, captions) in enumerate(samples) for text in captions]
    images = [model.encode_image(image[None]) for image, _ in samples]
    encoded = [(tokenizer([text])[1], model.encode_text(*tokenizer([text]))) for _, text in texts]

    def contrastive(text: int, picture: int) -> float:
        return float(unit(encoded[text][1].pooled)[0] @ unit(images[picture].pooled)[0])

    def reranked(text: int, picture: int) -> float:
        mask, tower = encoded[text]
        logits = model.match_pairs(tower.tokens, mask, images[picture].tokens)[0]
        return float(logits[1] - logits[0]) + float(model.logit_scale()) * contrastive(text, picture)

    scores = torch.tensor(
        [[contrastive(text, picture) for picture in range(len(images))] for text in range(len(texts))]
    )
    results = {}
    for way, table in (("text_to_image", scores), ("image_to_text", scores.T)):
        hits = {(method, k): 0 for method in ("contrastive", "rerank") for k in (1, 5, 10)}
        for query, row in enumerate(table):
            order = row.argsort(descending=True).tolist()
            if way == "text_to_image":
                first = sorted(order[:RERANK], key=lambda picture: -reranked(query, picture))
                true = {texts[query][0]}
            else:
                first = sorted(order[:RERANK], key=lambda text: -reranked(text, query))
                true = {number for number, (picture, _) in enumerate(texts) if picture == query}
            for method, ranking in (("contrastive", order), ("rerank", first + order[RERANK:])):
                for k in (1, 5, 10):
                    hits[method, k] += bool(true & set(ranking[:k]))
        results |= {f"{method}/{way}/recall_at_{k}": count / len(table) for (method, k), count in hits.items()}
    return results


def test_it_equals_the_naive_twin_on_one_rank_and_on_two(shards: Path) -> None:
    path = str(shards / "val")
    expected = naive(path)
    alone = evaluate(World(), path)
    on_two = run_on_ranks(evaluate, 2, path)
    assert on_two[0] == on_two[1]
    for name, value in expected.items():
        assert alone[name] == pytest.approx(value, abs=1e-9), name
        assert on_two[0][name] == pytest.approx(value, abs=1e-9), name
    assert alone["pictures"] == 24 and alone["captions"] == Manifest.load(path).captions
    assert expected["rerank/text_to_image/recall_at_1"] != expected["contrastive/text_to_image/recall_at_1"]


def test_ties_count_against_the_true_item() -> None:
    scores, true = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[True, False, False]])
    assert place_of_true(scores, true).tolist() == [1]
    assert place_of_true(torch.zeros(1, 3), torch.tensor([[False, True, True]])).tolist() == [1]


def test_queries_whose_truth_is_no_candidate_keep_their_place() -> None:
    places, true = torch.tensor([9, 1]), torch.tensor([[False, False], [False, True]])
    assert rerank_places(places, true, torch.tensor([[1.0, 2.0], [0.0, 3.0]])).tolist() == [9, 0]


def test_the_command_refuses_what_is_no_run(tmp_path: Path, shards: Path, fork_pretrain) -> None:
    code, _, stderr = fork_pretrain("evaluate", "retrieval", "--run", tmp_path, "--shards", shards / "val")
    assert code == 2 and "not a run folder" in stderr and "Traceback" not in stderr


def test_the_written_numbers_are_the_printed_ones(tmp_path: Path, shards: Path, fork_pretrain) -> None:
    run = tmp_path / "run"
    code, _, stderr = fork_pretrain(
        "train", TINY, f"run={run}", f"data.path={shards / 'train'}", "train.duration=2 steps", "engine.precision=bf16"
    )
    assert code == 0, stderr
    out = tmp_path / "retrieval.json"
    code, stdout, stderr = fork_pretrain(
        "evaluate", "retrieval", "--run", run, "--shards", shards / "val", "--rerank", "4", "--json", out
    )
    assert code == 0, stderr
    results = json.loads(out.read_text())
    assert results["step"] == 2 and results["rerank"] == 4
    assert f"{100 * results['contrastive/text_to_image/recall_at_10']:.1f}" in stdout
    assert all(len(line) <= 80 for line in stdout.splitlines())
