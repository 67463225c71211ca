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
    for add in (_add_scenes, _add_build, _add_info, _add_index, _add_verify, _add_view, _add_reshard):
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


def _add_index(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "index",
        help="make a dataset of tars that others wrote, by reading their headers",
        description="Write an index for each tar (as NVIDIA Energon does), sizes.json and manifest.json, beside the "
        "tars or into a folder of their own. The tars stay as they are. Indexes that are there and fit are kept.",
        epilog="example: python -m data_tools index 's3://bucket/cc12m/{00000..01242}.tar' --out cc12m --prefix-keys",
    )
    command.add_argument(
        "tars",
        nargs="+",
        metavar="TARS",
        help="tars, URLs of tars, patterns ('{00000..00099}.tar', '*.tar') or a folder",
    )
    command.add_argument("--out", metavar="DIR", help="folder for what is written (default: beside the tars)")
    command.add_argument(
        "--prefix-keys", action="store_true", help="put the tar's name before each key, where keys are not unique"
    )
    command.add_argument(
        "--sidecars",
        action="store_true",
        help="read the samples too, and write a .parquet for each tar that has none (views and most tools need it)",
    )
    command.add_argument(
        "--hash", action="store_true", help="read the tars wholly, and keep their SHA-256 for `verify`"
    )
    _add_report_options(command)
    command.set_defaults(run=_index)


def _add_verify(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "verify",
        help="check every byte of a dataset against its hashes",
        description="Check tars, indexes, sidecars, statistics, sizes.json and manifest.json of a dataset or a view, "
        "and say in which shard and sample a damage lies. Exit code 1 when something is wrong.",
        epilog="example: python -m data_tools verify shards --decode --quarantine",
    )
    command.add_argument("directory", metavar="DIR", help="dataset or view")
    command.add_argument("--decode", action="store_true", help="decode every picture wholly, too")
    command.add_argument(
        "--quarantine", action="store_true", help="write quarantine.json, so that readers leave out what is damaged"
    )
    _add_report_options(command)
    command.set_defaults(run=_verify)


def _add_view(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "view",
        help="select samples by an expression, without writing tars",
        description="Write a folder that stands for the samples for which an SQL expression (DuckDB's) over the "
        "sidecars' columns is true. Columns besides those of the sidecars: caption_words, caption_chars, captions_count, "
        "aspect, shard, place, and those of joined files.",
        epilog="example: python -m data_tools view shards good --join scores.parquet "
        '--where "width >= 256 and caption_words between 3 and 40 and similarity > 0.25"',
    )
    command.add_argument("directory", metavar="DIR", help="dataset or view")
    command.add_argument("out", metavar="OUT", help="folder to write: new or empty")
    command.add_argument("--where", required=True, metavar="EXPRESSION", help="what the samples to keep have")
    command.add_argument(
        "--join",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="parquet files with more columns, joined by `key` (or by `sha256` where they have no key)",
    )
    command.add_argument("--restart", action="store_true", help="replace the view that OUT holds")
    command.add_argument("--json", action="store_true", dest="as_json", help="print the outcome as JSON")
    command.set_defaults(run=_view)


def _add_reshard(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "reshard",
        help="merge, split, shuffle or sample datasets into new shards",
        description="Write new shards with the samples of datasets, views or indexed tars, in order or shuffled. "
        "Pictures are copied as they are; keys are made anew, and the old ones kept as original_key. A run that was "
        "interrupted goes on where it was when the same command is run again.",
        epilog="example: python -m data_tools reshard cc3m cc12m merged --samples-per-shard 10000 --shuffle --seed 7",
    )
    command.add_argument("sources", nargs="+", metavar="SRC", help="datasets or views")
    command.add_argument("out", metavar="OUT", help="folder to write: new, empty, or with an unfinished run")
    size = command.add_mutually_exclusive_group()
    size.add_argument(
        "--samples-per-shard", type=int, metavar="N", help="samples a tar (default: 1000, unless --shard-bytes)"
    )
    size.add_argument("--shard-bytes", type=int, metavar="B", help="about so many bytes a tar instead")
    command.add_argument("--shuffle", action="store_true", help="put the samples in an order that --seed draws")
    command.add_argument("--seed", type=int, default=0, help="of --shuffle and --sample (default: %(default)s)")
    command.add_argument(
        "--sample", metavar="N", help="draw so many samples: a number (5000) or a share of all (0.1, 10%%)"
    )
    _add_report_options(command)
    command.add_argument(
        "--restart", action="store_true", help="remove what is in OUT from an earlier run of this command"
    )
    command.set_defaults(run=_reshard)


def _add_report_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a processor)")
    command.add_argument("--json", action="store_true", dest="as_json", help="print the outcome as JSON")


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


def _index(**options) -> None:
    from data_tools.index import index_tars

    index_tars(**options)


def _verify(**options) -> int:
    from data_tools.verify import verify_dataset

    return 0 if verify_dataset(**options) else 1


def _view(**options) -> None:
    from data_tools.view import make_view

    make_view(**options)


def _reshard(**options) -> None:
    from data_tools.reshard import reshard

    reshard(**options)


if __name__ == "__main__":
    sys.exit(main())
