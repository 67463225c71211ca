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
    for add in (_add_scenes, _add_build, _add_info, _add_preview, _add_privacy):
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
        description="Print counts, picture sizes, caption lengths, scripts, failures by reason, examples and the "
        "fingerprint of a build.",
        epilog="example: python -m data_tools info shards/ --json",
    )
    command.add_argument("directory", metavar="DIR", help="folder that `build` wrote")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    command.set_defaults(run=_info)


def _add_preview(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "preview",
        help="write a page with sample pictures, captions and histograms of a shard folder",
        description="Write one HTML file that needs no other: thumbnails with captions of samples drawn by seed, "
        "histograms of sizes, shapes and caption lengths, and failures by reason. It holds no scripts.",
        epilog="example: python -m data_tools preview shards/ shards.html --count 48",
    )
    command.add_argument("directory", metavar="DIR", help="folder that `build` wrote")
    command.add_argument("out", metavar="OUT.html", help="file to write")
    command.add_argument("--count", type=int, default=60, metavar="N", help="samples to show (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="other seeds draw other samples (default: %(default)s)")
    command.set_defaults(run=_preview)


def _add_privacy(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "privacy",
        help="copy a shard folder without personal data: captions masked, faces blurred, opt-outs removed",
        description="Write a shard folder anew, shard for shard, without personal data. Captions: e-mail and IP "
        "addresses, phone and card numbers and social handles are found by their shape; names and street addresses "
        "are not. Faces: OpenCV's Haar cascades find upright frontal and side faces; they miss small, tilted, covered "
        "and dark ones, and blur some things that are no faces. Where faces must be gone, find them with a stronger "
        "detector and give its --boxes. A run that was interrupted goes on when the same command is run again.",
        epilog="example: python -m data_tools privacy shards/ clean/ --remove opt-outs.txt",
    )
    command.add_argument("directory", metavar="DIR", help="folder that `build` wrote; it is not changed")
    command.add_argument("out", metavar="OUT", help="folder to write: new, empty, or with an unfinished run")
    command.add_argument(
        "--captions",
        choices=("mask", "drop", "keep"),
        default="mask",
        help="put [email], [phone], ... in their place, drop such samples, or leave captions (default: %(default)s)",
    )
    command.add_argument(
        "--faces",
        choices=("blur", "keep"),
        default="blur",
        help="hide faces for good, with margins; only changed pictures are encoded again (default: %(default)s)",
    )
    command.add_argument(
        "--boxes",
        metavar="FILE.parquet",
        help="hide these instead of what OpenCV finds: key, x, y, width, height in pixels of the stored picture",
    )
    command.add_argument(
        "--remove",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="lists of what has to go: one key, source, URL or SHA-256 of a stored picture a line",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    _add_work_options(command)
    command.set_defaults(run=_privacy)


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


def _info(**options) -> None:
    from data_tools.info import print_info

    print_info(**options)


def _preview(**options) -> None:
    from data_tools.preview import write_preview

    write_preview(**options)


def _privacy(**options) -> None:
    from data_tools.privacy import clean_dataset

    clean_dataset(**options)


if __name__ == "__main__":
    sys.exit(main())
