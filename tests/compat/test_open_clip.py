"""open_clip's trainer finds the number of samples in sizes.json and reads each of them, by its own pipeline."""


def test_training_and_evaluation_read_every_sample(built, read_in):
    pattern = f"{built.folder}/{{00000..{len(built.tars) - 1:05d}}}.tar"
    expected = sorted((sample.caption, list(sample.size)) for sample in built.samples.values())
    lines = read_in("open_clip", pattern)
    counts = lines.pop(0)
    assert counts == {"num_samples": len(built.samples), "num_batches": len(built.samples)}, "from sizes.json"
    for is_train in (True, False):
        found = [(line["caption"], line["size"]) for line in lines if line["is_train"] is is_train]
        assert sorted(found) == expected
