"""Energon takes a dataset without a question, makes the indexes that are there already, and reads every sample."""

FIELDS = '{"image": "jpg", "caption": "txt"}'


def prepare(run_in, folder) -> None:
    options = (
        "--non-interactive",
        "--split-ratio",
        "1,0,0",
        "--sample-type",
        "CaptioningSample",
        "--field-map",
        FIELDS,
    )
    run_in("energon", "energon", "prepare", *options, folder)


def test_prepare_writes_the_same_indexes(writable, built, run_in):
    for tar in writable.tars:
        tar.with_name(f"{tar.name}.idx").unlink()
    prepare(run_in, writable.folder)
    for tar in built.tars:
        index = f"{tar.name}.idx"
        assert (writable.folder / index).read_bytes() == (built.folder / index).read_bytes()


def test_a_prepared_dataset_is_read_whole_and_passes_lint(writable, run_in, read_in, check):
    prepare(run_in, writable.folder)
    check(read_in("energon", writable.folder), writable)
    run_in("energon", "energon", "lint", writable.folder)
