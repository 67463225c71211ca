"""The commands of `python -m data_tools`; each imports what it needs, so that --help is quick."""

import argparse
import sys

from data_tools.errors import run_command


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code (see errors.py)."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools", description="Make and look at shards of image-text pairs."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_CommandParser)
    for add in (
        _add_scenes,
        _add_build,
        _add_finish,
        _add_retry,
        _add_info,
        _add_preview,
        _add_verify,
        _add_index,
        _add_view,
        _add_reshard,
        _add_dedup,
        _add_score,
        _add_privacy,
        _add_tokenizer,
    ):
        add(commands)
    options = vars(parser.parse_args(arguments))
    return run_command(options.pop("run"), **options)


class _ExamplesAsTheyAre(argparse.HelpFormatter):
    """Wraps the description, but leaves the lines of examples, so that they can be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example") else super()._fill_text(text, width, indent)


class _CommandParser(argparse.ArgumentParser):
    def __init__(self, **options) -> None:
        super().__init__(formatter_class=_ExamplesAsTheyAre, **options)


def _add_scenes(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "scenes",
        help="draw demo data: coloured shapes with captions and questions",
        description="Draw pictures of coloured shapes in stated relations, with captions, questions and a validation "
        "split of combinations that the training split does not have. The same arguments make the same bytes.",
        epilog="example:\n  python -m data_tools scenes scenes --count 2000 --val-count 200",
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
        help="build shards from captioned pictures",
        usage="%(prog)s [options] INPUT OUT",
        description="Build tar shards from captioned pictures: a table (.tsv, .csv, .jsonl, .parquet), a folder, COCO "
        "captions, tars, a Hugging Face dataset on disk. Rows of one image become one sample with all their captions. A "
        "build that was interrupted goes on where it was when the same command is run again.",
        epilog="examples:\n"
        "  python -m data_tools build captions.tsv shards --image-root pictures\n"
        "  python -m data_tools build urls.parquet shards --image-column url --seed 1\n"
        "  python -m data_tools build 'laion/{00000..00009}.tar' s3://bucket/shards \\\n"
        "    --task 3/16",
    )
    command.add_argument("input", metavar="INPUT", help="file, folder, pattern or URL")
    command.add_argument("out", metavar="OUT", help="folder or URL to write: new, empty, or with an unfinished build")
    source = command.add_argument_group("what is read")
    source.add_argument("--kind", metavar="KIND", help="kind of input, where its name does not tell")
    source.add_argument(
        "--image-root", metavar="DIR", help="folder or URL that image names start from (default: where INPUT lies)"
    )
    source.add_argument("--image-column", metavar="NAME", help="column of names, URLs or bytes (default: by its name)")
    source.add_argument("--caption-column", metavar="NAME", help="column of captions (default: by its name)")
    source.add_argument(
        "--keep-columns", type=_split, metavar="A,B", help="other columns to keep in .json and .parquet (default: all)"
    )
    source.add_argument(
        "--keep-list", metavar="FILE", help="build only the images named in FILE, one a line (such as a split)"
    )
    source.add_argument("--seed", type=int, help="shuffle the samples by this seed (default: input order)")
    images = command.add_argument_group("pictures")
    images.add_argument(
        "--resize",
        type=int,
        default=256,
        metavar="PX",
        help="shrink pictures to PX pixels, never enlarge; 0 keeps every size (default: %(default)s)",
    )
    images.add_argument(
        "--resize-mode",
        choices=("keep_ratio", "center_crop", "border", "squash", "no"),
        default="keep_ratio",
        metavar="MODE",
        help="keep_ratio: PX is the shorter side; center_crop, border, squash: a square of PX; no: as they are (default: "
        "%(default)s)",
    )
    images.add_argument("--format", choices=("jpg", "webp", "png"), default="jpg", help="default: %(default)s")
    images.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="of jpg and webp, 1 to 100 (default: %(default)s)"
    )
    images.add_argument("--min-size", type=int, default=0, metavar="PX", help="refuse a shorter side below PX")
    images.add_argument("--max-pixels", type=int, metavar="N", help="refuse more pixels (default: 89 million)")
    images.add_argument("--max-aspect", type=float, default=0.0, metavar="R", help="refuse longer over shorter above R")
    images.add_argument(
        "--check",
        choices=("full", "structure"),
        default="full",
        metavar="HOW",
        help="whether JPEGs that keep their bytes are whole. full: decode each; structure: look at segments, tables and "
        "ends, which costs next to nothing and finds files that were cut short, but no damage in the midst of a picture "
        "(default: %(default)s)",
    )
    captions = command.add_argument_group("captions")
    captions.add_argument("--fix-text", action="store_true", help="mend broken Unicode, HTML entities and white space")
    captions.add_argument("--min-words", type=int, default=0, metavar="N", help="refuse captions of fewer words")
    captions.add_argument("--max-words", type=int, default=0, metavar="N", help="refuse captions of more words")
    captions.add_argument("--min-chars", type=int, default=0, metavar="N", help="refuse captions of fewer characters")
    captions.add_argument("--max-chars", type=int, metavar="N", help="refuse captions of more characters")
    captions.add_argument("--blocklist", metavar="FILE", help="refuse captions with one of these words, one a line")
    _add_fetch_options(command)
    work = command.add_argument_group("work")
    work.add_argument(
        "--samples-per-shard",
        type=int,
        default=1000,
        metavar="N",
        help="input samples a tar (default: %(default)s)",
    )
    work.add_argument(
        "--task", type=_parse_task, metavar="K/N", help="make the K-th of N parts; `finish` when all are done"
    )
    _add_work_options(work)
    command.set_defaults(run=_build)


def _add_fetch_options(command: argparse.ArgumentParser) -> None:
    download = command.add_argument_group("pictures behind URLs")
    download.add_argument("--timeout", type=float, metavar="S", help="seconds for one picture (default: 30)")
    download.add_argument(
        "--retries", type=int, metavar="N", help="further attempts after a time-out or 5xx (default: 2)"
    )
    download.add_argument("--concurrency", type=int, metavar="N", help="downloads at once a process (default: 64)")
    download.add_argument("--per-host", type=int, metavar="N", help="downloads at once from one host (default: 16)")
    download.add_argument("--max-bytes", type=int, metavar="N", help="refuse larger files (default: 64 MiB)")
    download.add_argument("--user-agent", metavar="TEXT", help="who asks; robots.txt is read for its first word")
    download.add_argument("--allow-private", action="store_true", help="also connect to private and loopback addresses")
    download.add_argument(
        "--ignore-opt-out", action="store_true", help="do not ask robots.txt and X-Robots-Tag: for servers of your own"
    )


def _add_finish(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "finish",
        help="write the manifest of a build whose tasks are done",
        description="Write the manifest of a build that was made with --task, when all its tasks are done. It says "
        "which shards are missing where some are not.",
        epilog="example:\n  python -m data_tools finish shards",
    )
    command.add_argument("out", metavar="OUT", help="OUT of the tasks")
    command.set_defaults(run=_finish)


def _add_retry(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "retry",
        help="try again what failed for a reason that can heal",
        description="Try again the pictures of a finished build that failed for a reason that can heal, such as a time-out, "
        "a server error or a name server that did not answer, and write what comes as added shards. What is there stays as "
        "it is. Pictures that are not there (404) or opted out are not asked for again.",
        epilog="example:\n  python -m data_tools retry shards --timeout 60 --retries 4",
    )
    command.add_argument("out", metavar="DIR", help="folder that `build` wrote")
    _add_fetch_options(command)
    command.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a processor)")
    command.set_defaults(run=_retry)


def _add_info(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "info",
        help="print what a shard folder holds",
        description="Print counts, picture sizes, caption lengths, scripts, failures by reason, examples and the "
        "fingerprint of a build.",
        epilog="example:\n  python -m data_tools info shards --json",
    )
    command.add_argument("directory", metavar="DIR", help="folder that `build` wrote")
    command.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    command.set_defaults(run=_info)


def _add_index(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "index",
        help="make a dataset of tars that others wrote, by reading their headers",
        description="Write an index for each tar (as NVIDIA Energon does), sizes.json and manifest.json, beside the "
        "tars or into a folder of their own. The tars stay as they are. Indexes that are there and fit are kept.",
        epilog="example:\n  python -m data_tools index 's3://bucket/cc12m/{00000..01242}.tar' \\\n"
        "    --out cc12m --prefix-keys",
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
        epilog="example:\n  python -m data_tools verify shards --decode --quarantine",
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
        epilog="example:\n  python -m data_tools view shards good --join scores.parquet \\\n"
        '    --where "width >= 256 and caption_words >= 3 and clip_score > 0.2"',
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
        epilog="example:\n  python -m data_tools reshard cc3m cc12m merged --samples-per-shard 10000 \\\n"
        "    --shuffle --seed 7",
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


def _add_dedup(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "dedup",
        help="find duplicate pictures and captions, and samples of evaluation sets",
        description="Find samples that are duplicates of one another (or of evaluation sets), and write them to a "
        "parquet file, one row a sample. Nothing is deleted: a view leaves them out.",
        epilog="example:\n  python -m data_tools dedup train --against coco-test --out dups.parquet\n"
        "  python -m data_tools view train clean --join dups.parquet \\\n"
        '    --where "keep is not false"',
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


def _add_score(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "score",
        help="score how well pictures and captions belong together, by a model",
        description="Write the cosine of each picture with each of its captions, as a CLIP-like model embeds them, to a "
        "parquet table; `view` can then select by it. A run that was interrupted goes on when the same command is run "
        "again.",
        epilog="example:\n  python -m data_tools score shards --model runs/vit_b16/native \\\n    --out scores.parquet\n"
        "  python -m data_tools view shards good --join scores.parquet \\\n"
        '    --where "clip_score > 0.2"',
    )
    command.add_argument("directory", metavar="DIR", help="dataset or view")
    command.add_argument(
        "--model",
        required=True,
        metavar="EXPORT",
        help="folder of `python -m pretrain export --to native` or --to open_clip, or what open_clip loads: "
        "local-dir:DIR, hf-hub:ORG/NAME, NAME:TAG (such as ViT-B-32:laion2b_s34b_b79k)",
    )
    command.add_argument("--out", metavar="FILE", help="table to write (default: DIR.scores.parquet, beside DIR)")
    command.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="pictures at a time (default: %(default)s)"
    )
    command.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one"
    )
    command.add_argument("--threads", type=int, metavar="N", help="decoding threads (default: one a processor)")
    command.add_argument("--json", action="store_true", dest="as_json", help="print the outcome as JSON")
    command.set_defaults(run=_score)


def _add_tokenizer(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "tokenizer",
        help="train a tokeniser on the captions",
        description="Train a tokeniser on all captions of a dataset, in any language, and save it as a folder that "
        "transformers' AutoTokenizer loads. The same captions make the same files.",
        epilog="example:\n  python -m data_tools tokenizer train tokenizer-20k --vocab-size 20000",
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


def _add_preview(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "preview",
        help="write a page with sample pictures, captions and histograms of a shard folder",
        description="Write one HTML file that needs no other: thumbnails with captions of samples drawn by seed, "
        "histograms of sizes, shapes and caption lengths, and failures by reason. It holds no scripts.",
        epilog="example:\n  python -m data_tools preview shards shards.html --count 48",
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
        epilog="example:\n  python -m data_tools privacy shards clean --remove opt-outs.txt",
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


def _add_work_options(command: argparse._ActionsContainer) -> None:
    command.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a processor)")
    command.add_argument(
        "--restart", action="store_true", help="remove what is in OUT from an earlier run of this command"
    )


def _split(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _parse_task(text: str) -> tuple[int, int]:
    number, slash, tasks = text.partition("/")
    if not slash or not number.isdigit() or not tasks.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}': give the task's number, from 1, and the number of tasks: 3/16")
    return int(number), int(tasks)


def _scenes(**options) -> None:
    from data_tools.scenes import draw_scenes

    draw_scenes(**options)


def _build(
    resize: int,
    resize_mode: str,
    format: str,
    quality: int,
    min_size: int,
    max_pixels: int | None,
    max_aspect: float,
    check: str,
    fix_text: bool,
    min_words: int,
    max_words: int,
    min_chars: int,
    max_chars: int | None,
    blocklist: str | None,
    **options,
) -> None:
    from data_tools.build import build_shards
    from data_tools.captions import CaptionPolicy, load_blocklist
    from data_tools.fetch import FetchOptions
    from data_tools.image import ImagePolicy
    from data_tools.workers import keep_pandas_out

    keep_pandas_out()
    images = {
        "resize": resize,
        "mode": resize_mode,
        "format": format,
        "quality": quality,
        "min_size": min_size,
        "max_aspect": max_aspect,
        "check": check,
    }
    if max_pixels is not None:
        images["max_pixels"] = max_pixels
    captions = {"fix_text": fix_text, "min_words": min_words, "max_words": max_words, "min_chars": min_chars}
    if max_chars is not None:
        captions["max_chars"] = max_chars
    if blocklist is not None:
        captions["blocklist"] = load_blocklist(blocklist)
    fetch = FetchOptions(**_take_fetch_options(options))
    build_shards(images=ImagePolicy(**images), captions=CaptionPolicy(**captions), fetch=fetch, **options)


def _take_fetch_options(options: dict) -> dict:
    """The arguments of FetchOptions that the command line gives; they leave `options`."""
    plain = ("timeout", "retries", "concurrency", "per_host", "max_bytes", "user_agent")
    given = {name: value for name in plain if (value := options.pop(name)) is not None}
    if "timeout" in given:
        given["timeout_s"] = given.pop("timeout")
    if options.pop("allow_private"):
        given["allow_private"] = True
    if options.pop("ignore_opt_out"):
        given["respect_opt_out"] = False
    return given


def _finish(out: str) -> None:
    from data_tools.build import finish_build

    finish_build(out)


def _retry(out: str, processes: int | None, **options) -> None:
    from data_tools.build import retry_failures

    retry_failures(out, processes, **_take_fetch_options(options))


def _info(**options) -> None:
    from data_tools.info import print_info

    print_info(**options)


def _preview(**options) -> None:
    from data_tools.preview import write_preview

    write_preview(**options)


def _privacy(**options) -> None:
    from data_tools.privacy import clean_dataset

    clean_dataset(**options)


def _dedup(**options) -> None:
    from data_tools.dedup import print_duplicates

    print_duplicates(**options)


def _score(**options) -> None:
    from data_tools.score import print_scores

    print_scores(**options)


def _tokenizer(**options) -> None:
    from data_tools.tokenizer import print_tokenizer

    print_tokenizer(**options)


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
