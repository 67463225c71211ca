"""The commands of `python -m data_tools`; each imports what it needs, so that --help is quick."""

import argparse
import sys

from data_tools.errors import run_command


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code (see errors.py)."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools", description="Make and look at shards of image-text pairs."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_scenes, _add_build, _add_info, _add_dedup, _add_tokenizer):
        add(commands)
    options = vars(parser.parse_args(arguments))
    return run_command(options.pop("run"), **options)


def _add_scenes(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "scenes",
        help="draw demo data: coloured shapes with captions and questions",
        description="Draw pictures of coloured shapes in stated relations, with captions, questions and a validation "
        "split of combinations that the training split does not have. The same arguments make the same bytes.",
    )
    command.add_argument("out", metavar="OUT", help="folder to write")
    command.add_argument("--count", type=int, default=20_000, help="training pictures (default: %(default)s)")
    command.add_argument("--val-count", type=int, default=1_000, help="validation pictures (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="other seeds draw other scenes (default: %(default)s)")
    command.add_argument("--size", type=int, default=96, help="width and height in pixels (default: %(default)s)")
    _add_work_options(command)
    command.set_defaults(run=_scenes)


def _add_build(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "build",
        help="build shards from a table of captions and a folder of pictures",
        description="Build tar shards from a .tsv or .csv table. Rows of one image become one sample with all their "
        "captions. A build that was interrupted goes on where it was when the same command is run again.",
    )
    command.add_argument("input", metavar="INPUT", help="table with a header: .tsv (no quoting) or .csv (RFC 4180)")
    command.add_argument("out", metavar="OUT", help="folder to write: new, empty, or with an unfinished build")
    command.add_argument("--image-root", required=True, metavar="DIR", help="folder that the image names start from")
    command.add_argument("--image-column", default="filename", metavar="NAME", help="default: %(default)s")
    command.add_argument("--caption-column", default="caption", metavar="NAME", help="default: %(default)s")
    command.add_argument(
        "--keep-list", metavar="FILE", help="build only the images named in FILE, one a line (such as a split)"
    )
    command.add_argument(
        "--samples-per-shard",
        type=int,
        default=1000,
        metavar="N",
        help="input samples a tar (default: %(default)s)",
    )
    command.add_argument(
        "--resize",
        type=int,
        default=256,
        metavar="PX",
        help="shrink pictures to a shorter side of PX pixels; 0 keeps every size (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, help="shuffle the samples by this seed (default: input order)")
    _add_work_options(command)
    command.set_defaults(run=_build)


def _add_info(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "info",
        help="print what a shard folder holds",
        description="Print counts, picture sizes, failures by reason, examples and the fingerprint of a build.",
    )
    command.add_argument("directory", metavar="DIR", help="folder that `build` wrote")
    command.set_defaults(run=_info)


def _add_dedup(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "dedup",
        help="find duplicate pictures and captions, and samples of evaluation sets",
        description="Find samples that are duplicates of one another (or of evaluation sets), and write them to a "
        "parquet file, one row a sample. Nothing is deleted: a view leaves them out.",
        epilog="example: python -m data_tools dedup train --against coco-test --out dups.parquet && "
        'python -m data_tools view train train-clean --where "keep is not false" --join dups.parquet',
    )
    command.add_argument("directory", metavar="DIR", help="a finished build, or a view of one")
    command.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="EVALSET",
        help="also mark samples of DIR that are in these datasets",
    )
    command.add_argument("--out", metavar="FILE", help="parquet file to write (default: DIR.duplicates.parquet)")
    command.add_argument(
        "--kinds",
        nargs="+",
        choices=("bytes", "pixels", "near", "caption"),
        default=["bytes", "pixels", "near", "caption"],
        metavar="KIND",
        help="what to look for: bytes, pixels, near, caption (default: all; without pixels and near, no picture is "
        "decoded)",
    )
    command.add_argument(
        "--distance",
        type=int,
        default=6,
        metavar="N",
        help="near: bits of 64 in which the hashes of two pictures may differ, 0 to 12 (default: %(default)s)",
    )
    command.add_argument(
        "--caption-similarity",
        type=float,
        default=0.8,
        metavar="X",
        help="caption: the share of pairs of words that two texts must have in common (default: %(default)s)",
    )
    command.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a processor)")
    command.add_argument("--json", action="store_true", dest="as_json", help="print the counts as JSON")
    command.set_defaults(run=_dedup)


def _add_tokenizer(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "tokenizer",
        help="train a tokeniser on the captions",
        description="Train a tokeniser on all captions of a dataset, in any language, and save it as a folder that "
        "transformers' AutoTokenizer loads. The same captions make the same files.",
        epilog="example: python -m data_tools tokenizer train tokenizer-20k --vocab-size 20000",
    )
    command.add_argument("directory", metavar="DIR", help="a finished build, or a view of one")
    command.add_argument("out", metavar="OUT", help="folder to write: new or empty")
    command.add_argument("--vocab-size", type=int, required=True, metavar="N", help="entries, special tokens included")
    command.add_argument(
        "--kind",
        choices=("wordpiece", "bpe"),
        default="wordpiece",
        help="as BERT's or RoBERTa's (default: %(default)s)",
    )
    command.add_argument(
        "--lowercase", action=argparse.BooleanOptionalAction, default=True, help="lower all letters (default: yes)"
    )
    command.add_argument("--json", action="store_true", dest="as_json", help="print the facts as JSON")
    command.set_defaults(run=_tokenizer)


def _add_work_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a processor)")
    command.add_argument(
        "--restart", action="store_true", help="remove what is in OUT from an earlier run of this command"
    )


def _scenes(**options) -> None:
    from data_tools.scenes import draw_scenes

    draw_scenes(**options)


def _build(**options) -> None:
    from data_tools.build import build_shards

    build_shards(**options)


def _info(directory: str) -> None:
    from data_tools.info import print_info

    print_info(directory)


def _dedup(**options) -> None:
    from data_tools.dedup import print_duplicates

    print_duplicates(**options)


def _tokenizer(**options) -> None:
    from data_tools.tokenizer import print_tokenizer

    print_tokenizer(**options)


if __name__ == "__main__":
    sys.exit(main())
