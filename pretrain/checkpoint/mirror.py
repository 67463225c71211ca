"""Copies of whole checkpoints behind an fsspec URL (s3://, gs://, a path): for the day on which the run folder is gone.

TARGET/step_00000100/ holds the same files; `state.json` goes last, so a folder without it is no checkpoint. A copy that
fails costs the run nothing but a warning: the run folder is what the run relies on.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.errors import UserError, first_line

log = logging.getLogger(__name__)

STATE = "state.json"


class Mirror:
    """Copies in a thread, one checkpoint at a time; of several that wait, the newest."""

    def __init__(self, target: str, keep: Callable[[list[int]], set[int]]) -> None:
        self.target, self.keep = target, keep
        self.thread: threading.Thread | None = None
        self.waiting: Path | None = None
        self.copied: Path | None = None  # now

    def push(self, folder: Path) -> None:
        """Begin to copy a whole checkpoint, now or after the one that is under way."""
        self.waiting = folder
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self.work, name="mirror", daemon=True)
            self.thread.start()

    def finish(self) -> None:
        """Wait until everything is copied."""
        if self.thread:
            self.thread.join()
        if self.waiting:
            self.work()

    def work(self) -> None:
        while self.waiting:
            self.copied = folder = self.waiting
            self.waiting = None
            try:
                copy_out(folder, self.target)
                prune(self.target, self.keep)
            except Exception as error:  # stores raise whatever their libraries do
                log.warning("%s: no copy of %s: %s. The run goes on", self.target, folder.name, first_line(error))
            self.copied = None


def open_store(target: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there. Raises UserError for a URL that nothing can read."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(target)
    except (ImportError, ValueError) as error:
        raise UserError(f"checkpoint.target: {target}: {error}") from None


def copy_out(folder: Path, target: str) -> None:
    store, root = open_store(target)
    text = (folder / STATE).read_bytes()
    place = f"{root}/{folder.name}"
    if store.exists(f"{place}/{STATE}"):
        if store.cat_file(f"{place}/{STATE}") == text:  # it went last, so all is there
            return
        store.rm_file(f"{place}/{STATE}")  # of the same step, from before a rollback
    for name in [*json.loads(text)["files"], STATE]:
        store.makedirs(os.path.dirname(f"{place}/{name}"), exist_ok=True)
        store.put_file(str(folder / name), f"{place}/{name}")


def steps_at(target: str) -> dict[int, str]:
    """The places of the checkpoints that are whole there, by step."""
    store, root = open_store(target)
    try:
        names = [path.rstrip("/").rpartition("/")[2] for path in store.ls(root, detail=False)]
    except FileNotFoundError:
        return {}
    found = {int(name[5:]): f"{root}/{name}" for name in names if name.startswith("step_") and name[5:].isdigit()}
    return {step: place for step, place in sorted(found.items()) if store.exists(f"{place}/{STATE}")}


def prune(target: str, keep: Callable[[list[int]], set[int]]) -> None:
    store, _ = open_store(target)
    found = steps_at(target)
    for step in found.keys() - keep(list(found)):
        store.rm_file(f"{found[step]}/{STATE}")
        store.rm(found[step], recursive=True)


def fetch_newest(target: str, parent: Path, check: Callable[[Path], None]) -> Path | None:
    """Copy the newest checkpoint there that is whole into `parent` (RUN/checkpoints); None if there is none at all.

    `check` raises UserError for a folder that is not whole. Raises UserError when the store cannot be read, or holds only
    damaged ones: to begin anew would be to lose what it holds.
    """
    advice, problem = "Mend it, or set checkpoint.target=null to begin anew", ""
    try:
        found = steps_at(target)
        store, _ = open_store(target)
        for step in sorted(found, reverse=True):
            final = parent / found[step].rpartition("/")[2]
            temporary = final.with_name(f"tmp_{final.name}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                copy_in(store, found[step], temporary)
                check(temporary)
            except (UserError, FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
                problem = f"{found[step]} is not whole: {first_line(error)}"
                log.warning("checkpoint.target: %s; trying the one before", problem)
                shutil.rmtree(temporary)
                continue
            os.replace(temporary, final)
            return final
    except UserError:
        raise
    except Exception as error:  # stores raise whatever their libraries do
        raise UserError(f"checkpoint.target: {target}: cannot be read: {first_line(error)}. {advice}") from None
    if problem:
        raise UserError(
            f"checkpoint.target: {target}: none of its {len(found)} checkpoints is whole ({problem}). {advice}"
        )
    return None


def copy_in(store: Any, place: str, folder: Path) -> None:
    store.get_file(f"{place}/{STATE}", str(folder / STATE))
    for name in json.loads((folder / STATE).read_text())["files"]:
        (folder / name).parent.mkdir(exist_ok=True)
        store.get_file(f"{place}/{name}", str(folder / name))
