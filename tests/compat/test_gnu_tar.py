"""GNU tar lists and unpacks the shards without a word of warning, and finds the bytes that went in."""

import hashlib
import json
import shutil
import subprocess

import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar here")


def run_tar(*arguments: object) -> str:
    done = subprocess.run(["tar", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_listings_show_plain_files_of_a_fixed_owner_and_time(built):
    for tar in built.tars:
        lines = run_tar("tvf", tar, "--utc", "--full-time", "--numeric-owner").splitlines()
        assert lines
        for line in lines:
            assert line.startswith("-rw-r--r-- 0/0 ")
            assert " 1970-01-01 00:00:00 " in line


def test_unpacked_files_have_the_bytes_that_went_in(built, tmp_path, check):
    for tar in built.tars:
        run_tar("xf", tar, "-C", tmp_path)
        run_tar("df", tar, "-C", tmp_path)
    found = []
    for picture in sorted(tmp_path.glob("*.jpg")):
        key = picture.stem
        described = json.loads((tmp_path / f"{key}.json").read_bytes())
        with Image.open(picture) as image:
            size = image.size
        digest = hashlib.sha256(picture.read_bytes()).hexdigest()
        caption = (tmp_path / f"{key}.txt").read_bytes().decode()
        assert described["sha256"] == digest
        sample = {"key": key, "caption": caption, "captions": described["captions"], "size": size, "sha256": digest}
        found.append(sample)
    check(found, built)
    assert len(list(tmp_path.iterdir())) == 3 * len(built.samples), "and nothing besides"
