"""What a job runs, as it was at submission: the code in RUN/launch/code, the checked run config in RUN/launch/config.yaml.

A job may wait for days, and lives for weeks: what is edited meanwhile must not change it.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from data_tools.errors import UserError, first_line
from data_tools.files import format_bytes, write_atomic
from launch.job import ResolvedJob, build_command

PACKAGES = ("launch", "pretrain", "data_tools")
LARGEST_FILE = 2 * 10**6  # bytes; code is smaller
LARGEST_CODE = 100 * 10**6  # all together
CHECK_S = 300  # importing torch from a cold network file system
MARK = "--- resolved config ---"
ROOT = Path(__file__).parents[1]


def take_code(job: ResolvedJob) -> list[str]:
    """Copy the code of a resolved job into RUN/launch/code; returns what to tell of it.

    That is what git tracks in the repository of the working directory, and what it does not ignore; and these packages,
    where they are not among it. Raises UserError where that is too much to be code.
    """
    target, notes = job.launch / "code", []
    new = target.with_name("code.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    top = find_repository(Path(job.working_directory))
    if top:
        names = list_files(top)
        run = os.path.relpath(job.run, top) + os.sep
        notes += copy_files(top, [name for name in names if not name.startswith(run)], new)
    for package in PACKAGES:
        if not (new / package / "__init__.py").exists():
            names = [str(path.relative_to(ROOT)) for path in sorted((ROOT / package).rglob("*.py"))]
            notes += copy_files(ROOT, names, new)
    old = target.with_name("code.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)
    return notes


def find_repository(folder: Path) -> Path | None:
    """The git repository that holds a folder."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = git(folder, "rev-parse", "--show-toplevel")
        if done.returncode == 0:
            return Path(os.fsdecode(done.stdout).rstrip("\n"))
    return None


def list_files(top: Path) -> list[str]:
    """Files of a repository that git tracks, or does not ignore; symbolic links are left out."""
    done = git(top, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if done.returncode:
        raise UserError(f"{top}: git ls-files: {first_line(UserError(os.fsdecode(done.stderr)))}")
    names = sorted({os.fsdecode(name) for name in done.stdout.split(b"\0") if name})
    return [name for name in names if (top / name).is_file() and not (top / name).is_symlink()]


def git(folder: Path, *words: str) -> subprocess.CompletedProcess:
    # A repository of somebody else's, on a shared file system, is read too.
    command = ["git", "-c", "safe.directory=*", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, timeout=60)


def copy_files(top: Path, names: list[str], target: Path) -> list[str]:
    """Copy files, with their modes; returns a line about those that are too large to be code."""
    large, total = [], 0
    for name in names:
        size = (top / name).stat().st_size
        if size > LARGEST_FILE:
            large.append(f"{name} ({format_bytes(size)})")
            continue
        total += size
        if total > LARGEST_CODE:
            raise UserError(
                f"{top}: more than {format_bytes(LARGEST_CODE)} in files that git tracks or does not ignore: that is no code. "
                "Put data and results into .gitignore"
            )
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(top / name, target / name)
    if not large:
        return []
    more = f" and {len(large) - 3} more" if len(large) > 3 else ""
    return [
        f"left out of the copy of the code, as larger than {format_bytes(LARGEST_FILE)}: {', '.join(large[:3])}{more}"
    ]


def check_config(job: ResolvedJob, code: Path | None) -> tuple[str | None, list[str]]:
    """What `train --check` of this code (none: the working directory's) makes of the run config of a resolved job, in the
    job's own setup: the resolved config.

    Returns None where it cannot be checked on this machine, and what to tell of it. Raises UserError with the trainer's
    words where the config is refused.
    """
    if job.config is None:
        return None, []
    # The trainer's own check, as a rank would see it: same setup, same Python, same code. A container may not run here.
    python = sys.executable if job.container else job.python
    words = [python, *build_command(job)[1:], "--check"]
    lines = ["set -e", *([] if job.container else job.setup)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in job.environment.items()]
    if code is not None:
        lines += [f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1"]
    lines += [
        f"{shlex.quote(python)} -c 'import sys; print(\"{MARK}\", sys.version_info >= (3, 11))'",
        f"exec {shlex.join(words)}",
    ]
    environment = {name: text for name, text in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        done = subprocess.run(
            ["bash", "-c", "\n".join(lines)],
            cwd=job.working_directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHECK_S,
        )
    except subprocess.TimeoutExpired:
        return None, [f"the config is not checked: no answer from {python} in {CHECK_S} s"]
    if done.returncode and job.container and "ModuleNotFoundError" in done.stderr:
        return None, ["the config is not checked: what is in the container is not installed here"]
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise UserError(
            said[-1].removeprefix("error: ") + ("" if done.returncode == 2 else ". That is what --check says")
        )
    _, _, rest = done.stdout.partition(MARK)  # what setup prints comes before
    safe, _, resolved = rest.partition("\n")
    if "True" in safe:
        return resolved, []
    return resolved, [f"{python} is older than 3.11: the ranks take code in working_directory before that of the copy"]


def write_config(job: ResolvedJob, resolved: str | None) -> ResolvedJob:
    """Keep the resolved run config, or else the file as it is, as RUN/launch/config.yaml; the job that uses that."""
    if job.config is None:
        return job
    path = job.launch / "config.yaml"
    if resolved is not None:
        write_atomic(path, resolved.encode())
        return job.model_copy(update={"config": str(path), "overrides": []})
    source = Path(job.working_directory) / job.config
    if source != path:
        write_atomic(path, source.read_bytes())
    return job.model_copy(update={"config": str(path)})
