"""What Linux tells of other processes, which may end at any moment."""

from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether the process is there and has not ended (as one has that its parent has not waited for)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def list_children(pid: int) -> list[int]:
    """The processes that it has started itself."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def list_working_in(folder: Path, word: str = "") -> list[int]:
    """Processes whose working directory is this folder, and whose command line holds `word`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if (place / "cwd").readlink() == folder and word in (place / "cmdline").read_text():
                found.append(int(place.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found
