"""Hugging Face's `load_dataset("webdataset")` makes a row of every sample, with its picture, caption and JSON."""

import pytest


@pytest.mark.parametrize("streaming", [False, True], ids=["loaded", "streamed"])
def test_load_dataset_reads_every_sample(built, read_in, check, streaming):
    found = read_in("huggingface", f"{built.folder}/*.tar", int(streaming))
    check(found, built)
    assert {sample["licence"] for sample in found} == {"CC0"}
