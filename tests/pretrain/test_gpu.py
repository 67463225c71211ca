"""What only a CUDA device can show; skipped without one."""

import json
from pathlib import Path

import pytest
import torch
from paths import TINY

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_it_trains_on_a_gpu(precision: str, shards: Path, tmp_path: Path, run_pretrain) -> None:
    run = tmp_path / "run"
    code, _, stderr = run_pretrain(
        "train", TINY, f"run={run}", f"data.path={shards / 'train'}", f"engine.precision={precision}"
    )
    assert code == 0, stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and all(0 < line["loss/total"] < 20 for line in lines)
    assert lines[0]["memory/peak_gib"] > 0
