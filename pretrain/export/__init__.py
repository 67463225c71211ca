"""Weights in the formats that people fine-tune with; each export is reloaded and compared before it counts as done.

`export_run` is the command; `load` gives a native export back as a model that is ready to use.
"""

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from safetensors import SafetensorError

from data_tools.errors import UserError
from data_tools.files import TEMPORARY_SUFFIX, lock_folder, sync_folder
from pretrain.export import blip, huggingface, native, open_clip
from pretrain.export.card import render_card
from pretrain.export.compare import build_probes, compare
from pretrain.export.native import LoadedModel, load
from pretrain.restore import load_run

__all__ = ["EXPORTS", "LoadedModel", "export_run", "load"]

# Each has write(source, folder, final) -> Guide, which fills `folder`, and reload(folder) -> Reloaded.
EXPORTS: dict[str, ModuleType] = {"open_clip": open_clip, "huggingface": huggingface, "blip": blip, "native": native}


def export_run(run: str | Path, to: str, out: str | Path, ema: bool = False) -> int:
    """Write the run's newest weights, or their average, as format `to` into the new or empty folder `out`; returns the exit
    code.

    The folder appears under its name only after its own library has loaded it and given the run's embeddings.
    Raises UserError, and leaves nothing behind, if `out` is in use, the format cannot hold the model, or what comes
    back differs.
    """
    out, export = Path(out).resolve(), EXPORTS[to]
    refuse_used(out)
    source = load_run(run, ema)
    probes = build_probes(source.config)
    with make_folder(out) as folder:
        try:
            guide = export.write(source, folder, out)
        except SafetensorError as error:  # how it tells of a full disk
            raise UserError(f"{out}: cannot write the weights: {error}. Free space and run the command again") from None
        comparison = compare(source, export.reload(folder), probes, out)
        (folder / "README.md").write_text(render_card(source, to, out.name, guide, comparison), encoding="utf-8")
    try:
        export.reload(out)  # where it lies now: open_clip finds a BERT tower by its absolute path
    except BaseException:
        shutil.rmtree(out)
        raise
    print(f"{run}, step {source.step}: reloaded with {comparison.library} and compared in fp32:")
    for line in comparison.lines:
        print(f"  {line}")
    for limit in guide.limits:
        print(f"  note: {limit}")
    print(f"written: {out}")
    return 0


def refuse_used(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file. Give a new or empty folder")
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty. Give a new or empty folder")


def remove_killed(out: Path) -> None:
    """Remove what exports to `out` have left that were killed: their locks went with them."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.????????{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(UserError, OSError), lock_folder(left):
            shutil.rmtree(left)


@contextlib.contextmanager
def make_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out`, flushed to disk, when the block ends without an error.

    On an error it is removed, and so are the parents that were made for it.
    """
    missing = [parent for parent in out.parents if not parent.exists()]
    remove_killed(out)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        temporary.mkdir(parents=True)
        with lock_folder(temporary):
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                else:
                    sync_folder(path)
            sync_folder(temporary)
            refuse_used(out)  # meanwhile somebody else may have written there
            os.replace(temporary, out)
        sync_folder(out.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise
