"""What a user reads when something goes wrong, and files that are whole or not there."""

import contextlib
import errno
import json
import os
import re
import subprocess
import sys

import pytest

from data_tools import files
from data_tools.errors import UserError, run_command, suggest
from data_tools.files import (
    Folder,
    format_bytes,
    format_counts,
    hash_file,
    lock_folder,
    open_atomic,
    read_open_file,
    write_atomic,
)


def raise_error(error):
    raise error


def test_a_command_returns_its_exit_code():
    assert run_command(lambda: None) == 0
    assert run_command(lambda code: code, 3) == 3


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a.yaml: bad. Valid: good"), 2, "error: a.yaml: bad. Valid: good\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x.tar"),
            1,
            "error: /data/x.tar: the disk is full. Free space and run the same command again\n",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "/data/t.tsv"),
            2,
            "error: /data/t.tsv: No such file or directory. Check the path and its permissions\n",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted. Run the same command again to go on\n"),
    ],
)
def test_a_users_mistake_is_one_line(capsys, error, code, text):
    assert run_command(raise_error, error) == code
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("error", [KeyError("x"), OSError(errno.EIO, "I/O error", "f"), FileNotFoundError(2, "none")])
def test_a_mistake_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(raise_error, error)


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    code = "from data_tools.errors import run_command\ndef p():\n for i in range(99999): print('line', i)\n"
    command = [sys.executable, "-c", code + "raise SystemExit(run_command(p))"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(30) == 0


def test_the_nearest_word_is_suggested():
    assert suggest("captoin", ["caption", "image"]) == " Did you mean 'caption'?"
    assert suggest("zzz", ["caption", "image"]) == ""


def test_an_atomic_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(KeyError), open_atomic(path) as file:
        file.write(b"half of the new")
        raise KeyError
    assert path.read_bytes() == b"old"
    with open_atomic(path) as file:
        file.write(b"new")
        temporary = [name for name in os.listdir(tmp_path) if name != "file"]
        assert len(temporary) == 1 and re.fullmatch(r"file\.[0-9a-f]{8}\.tmp", temporary[0])
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_while_writing_names_the_final_path(tmp_path):
    with pytest.raises(OSError) as caught, open_atomic(tmp_path / "file"), open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError) as caught:
        write_atomic(tmp_path / "none" / "file", b"")
    assert caught.value.filename == str(tmp_path / "none" / "file")


def test_files_that_are_written_together_appear_together_and_in_order(tmp_path, monkeypatch):
    (tmp_path / "b").write_bytes(b"old")
    renamed, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (renamed.append(new.name), replace(old, new)))
    folder = Folder(tmp_path)
    with folder.together() as together:
        for name in ("c", "a", "b"):
            together.write(name, name.encode())
        assert folder.read("b") == b"old" and folder.size("a") is None and renamed == []
    assert renamed == ["c", "a", "b"]
    assert {name: folder.read(name) for name in folder.names()} == {"a": b"a", "b": b"b", "c": b"c"}


def test_of_files_that_are_written_together_none_appears_when_one_fails(tmp_path, monkeypatch):
    folder, sync = Folder(tmp_path), os.fsync

    def fail_for_large_files(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_for_large_files)
    with pytest.raises(OSError) as raised, folder.together() as together:
        together.write("a", b"a")
        together.write("b", b"large")
    assert raised.value.filename == str(tmp_path / "b")
    with pytest.raises(UserError), folder.together() as together:
        together.write("a", b"a")
        raise UserError("no more")
    assert folder.names() == []


def test_ctrl_c_right_after_a_file_was_made_leaves_nothing(tmp_path, monkeypatch):
    def make_and_interrupt(*arguments):
        open(*arguments).close()
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "open", make_and_interrupt, raising=False)
    with pytest.raises(KeyboardInterrupt), open_atomic(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("said", [0, 1, 4, 5, 6, 100])
def test_a_file_is_read_whole_whatever_was_said_of_its_size(tmp_path, said):
    (tmp_path / "a").write_bytes(b"12345")
    with open(tmp_path / "a", "rb") as file:
        assert read_open_file(file.fileno(), said) == b"12345"


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(UserError, match="another process is writing here"), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path):
        pass


def test_a_file_that_goes_while_a_folder_is_listed_is_not_in_it(tmp_path, monkeypatch):
    """As the temporary file of another task does when it gets its name."""
    for name in ("kept", "kept.0123abcd.tmp"):
        (tmp_path / name).write_bytes(b"12345")

    def list_late(path, scan=os.scandir):
        with scan(path) as entries:
            found = list(entries)
        (tmp_path / "kept.0123abcd.tmp").unlink()
        return contextlib.nullcontext(found)

    monkeypatch.setattr(files.os, "scandir", list_late)
    assert Folder(tmp_path).sizes() == {"kept": 5}


def test_sizes_and_counts_are_readable(tmp_path):
    assert [format_bytes(count) for count in (0, 999, 1500, 20 * 10**9)] == ["0 B", "999 B", "1.5 kB", "20.0 GB"]
    assert format_counts({"a": 1, "b": 3}) == "b 3, a 1"
    (tmp_path / "f").write_text(json.dumps([]))
    assert hash_file(tmp_path / "f") == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
