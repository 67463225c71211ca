"""`python -m data_tools` as a user meets it."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import build
from data_tools.__main__ import main
from data_tools.build import build_shards
from data_tools.captions import CaptionPolicy
from data_tools.fetch import FetchOptions
from data_tools.image import ImagePolicy
from data_tools.info import print_info
from data_tools.preview import write_preview
from data_tools.privacy import clean_dataset
from data_tools.scenes import draw_scenes

ROOT = Path(__file__).resolve().parents[2]


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom data_tools.__main__ import main\n"
        "try:\n    main(['build', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'pyarrow', 'PIL', 'tqdm', 'pretrain', 'launch'} & sys.modules.keys()))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    assert "--keep-list" in output


def test_no_tool_imports_torch_or_the_upper_floors():
    modules = ", ".join(f"data_tools.{path.stem}" for path in (ROOT / "data_tools").glob("[a-z]*.py"))
    code = f"import sys, {modules}\nprint([m for m in ('torch', 'pretrain', 'launch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("scenes", draw_scenes),
        ("info", print_info),
        ("preview", write_preview),
        ("privacy", clean_dataset),
    ],
)
def test_a_command_has_its_functions_options_and_defaults(command, function, monkeypatch):
    """Same names, same defaults: a call from Python and a command line without options do the same."""
    from data_tools import __main__ as program

    taken = {}
    monkeypatch.setattr(program, f"_{command}", lambda **options: taken.update(options))
    needed = {"scenes": ["OUT"], "info": ["DIR"]}
    arguments = needed.get(command, ["DIR", "OUT"])
    assert program.main([command, *arguments]) == 0
    parameters = inspect.signature(function).parameters
    assert taken.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert parameter.default in (inspect.Parameter.empty, taken[name]), name


def test_build_without_options_is_build_shards_without_arguments(monkeypatch):
    taken = {}
    monkeypatch.setattr(build, "build_shards", lambda *places, **options: taken.update(options))
    assert main(["build", "INPUT", "OUT"]) == 0
    assert (taken.pop("images"), taken.pop("captions"), taken.pop("fetch")) == (
        ImagePolicy(),
        CaptionPolicy(),
        FetchOptions(),
    )
    parameters = inspect.signature(build_shards).parameters
    assert taken.keys() == parameters.keys() - {"images", "captions", "fetch"}
    for name in taken.keys() - {"input", "out"}:
        assert taken[name] == parameters[name].default, name


def test_options_of_build_reach_the_policies(monkeypatch, tmp_path):
    taken = {}
    monkeypatch.setattr(build, "build_shards", lambda *places, **options: taken.update(options))
    (tmp_path / "block.txt").write_text("spam\n")
    line = "build I O --resize 64 --resize-mode squash --format webp --quality 7 --min-size 3 --max-pixels 9 --max-aspect 4"
    line += f" --fix-text --min-words 1 --max-words 9 --min-chars 2 --max-chars 8 --blocklist {tmp_path}/block.txt"
    line += " --timeout 3 --retries 0 --concurrency 5 --per-host 2 --max-bytes 77 --user-agent me --allow-private"
    line += " --ignore-opt-out --task 2/3 --keep-columns a,b"
    assert main(line.split()) == 0
    assert taken["images"] == ImagePolicy(64, "squash", "webp", 7, 3, 9, 4)
    assert taken["captions"] == CaptionPolicy(True, 1, 9, 2, 8, ("spam",))
    assert taken["fetch"] == FetchOptions(
        timeout_s=3,
        retries=0,
        concurrency=5,
        per_host=2,
        max_bytes=77,
        user_agent="me",
        allow_private=True,
        respect_opt_out=False,
    )
    assert (taken["task"], taken["keep_columns"]) == ((2, 3), ["a", "b"])


def test_a_users_mistakes_are_one_line(tmp_path, run_data_tools):
    cases = [
        ["info", tmp_path / "none"],
        ["build", tmp_path / "none.tsv", tmp_path / "out", "--image-root", tmp_path],
        ["build", tmp_path / "none.tsv", tmp_path / "out", "--image-root", tmp_path / "none"],
        ["scenes", tmp_path / "out", "--count", "0"],
    ]
    for arguments in cases:
        run = run_data_tools(*arguments)
        assert run.returncode == 2
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr


def test_the_way_from_scenes_to_info(tmp_path, run_data_tools):
    scenes, shards = tmp_path / "scenes", tmp_path / "shards"
    assert run_data_tools("scenes", scenes, "--count", 12, "--val-count", 3, "--processes", 1).returncode == 0
    keep = ["--keep-list", scenes / "splits" / "train.txt"]
    build = ["build", scenes / "captions.tsv", shards, "--image-root", scenes / "images", *keep, "--processes", 1]
    assert run_data_tools(*build).returncode == 0
    info = run_data_tools("info", shards)
    assert (info.returncode, info.stderr) == (0, "")
    assert "samples      12, " in info.stdout


COMMANDS = ["scenes", "build", "finish", "retry", "info", "index", "verify", "view", "reshard", "dedup", "score"]
COMMANDS += ["tokenizer", "preview", "privacy"]


def test_the_list_of_commands_is_whole(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    ([a-z]+)(?: |$)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_and_ends_with_an_example_that_the_command_takes(command, capsys, monkeypatch):
    from data_tools import __main__ as program

    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    _, _, examples = text.rpartition("\nexample")
    lines = examples.partition("\n")[2].replace("\\\n", " ").splitlines()
    calls = [shlex.split(line) for line in lines]
    assert calls and all(call[:3] == ["python", "-m", "data_tools"] for call in calls)
    assert calls[0][3] == command
    for call in calls:
        taken = {}
        monkeypatch.setattr(program, f"_{call[3]}", lambda taken=taken, **options: taken.update(options))
        assert main(call[3:]) == 0 and taken
