"""What a run was made with, left in its folder: config, commands, versions, and the code itself."""

import functools
import hashlib
import importlib.metadata
import io
import platform
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from data_tools.files import write_atomic, write_json_atomic
from pretrain import __version__
from pretrain.config import ConfigModel, render_config

ROOT = Path(__file__).parent.parent
PACKAGES = ("data_tools", "pretrain")


def describe_run(run: str | Path, config: ConfigModel) -> None:
    """Leave in the run folder what is needed to understand and repeat it."""
    run, code = Path(run), pack_code()
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / "config.yaml", render_config(config).encode())
    name = f"code-{hashlib.sha256(code).hexdigest()[:12]}.zip"
    if not (run / name).exists():  # a life with other code leaves another
        write_atomic(run / name, code)
    with open(run / "commands.txt", "a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} {name} {shlex.join(sys.argv)}\n")
    write_json_atomic(run / "versions.json", versions())


def pack_code() -> bytes:
    """The sources of this package and of the one below it as a zip, from which Python can import; same code, same bytes."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
            member = zipfile.ZipInfo(path.relative_to(ROOT).as_posix())  # dated 1980, the same for all
            archive.writestr(member, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return target.getvalue()


@functools.cache  # the code that runs is that of the start, whatever its folder holds by now
def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, and the code's git revision where there is one."""
    found = {
        name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers", "open_clip_torch")
    }
    return found | {
        "python": platform.python_version(),
        "pretrain": __version__,
        "code_revision": code_revision(),
    }


def code_revision() -> str:
    """The git revision of this package's code; "" where it is installed without."""
    if not shutil.which("git"):
        return ""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
