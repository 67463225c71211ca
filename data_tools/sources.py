"""Images and captions as people have them -> rows. A new kind of input is a class and a line in SOURCES.

Names inside a container (`00000.tar/000012.jpg`, `part-0.parquet/17`) are labels that do not depend on the machine; where
the picture lies is the row's `place`, which only `Source.read_embedded` understands.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.columns import ArrowSource, ParquetSource
from data_tools.errors import UserError, suggest
from data_tools.inputs import (
    PICTURE_SUFFIXES,
    InputOptions,
    Row,
    Source,
    expand_pattern,
    is_folder,
    list_files,
    name_files,
    suffix_of,
)
from data_tools.records import CocoSource, FolderSource, JsonLinesSource, TarSource
from data_tools.tables import (
    Conceptual12MSource,
    ConceptualCaptionsSource,
    CsvSource,
    Flickr30kSource,
    TsvSource,
    recognise_table,
)

__all__ = ["SOURCES", "Row", "Source", "open_source", "read_rows"]

_LOOKED_AT_FILES = 1000


def open_source(
    input: str | Path,
    *,
    kind: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    keep_columns: Sequence[str] | None = None,
) -> Source:
    """Open the table, container, folder or pattern (`{000..099}`, `*`) at a path or an fsspec URL.

    `kind` is a key of SOURCES; without it the suffix, or what lies in the folder, decides. The columns are found by their
    usual names (IMAGE_COLUMNS, CAPTION_COLUMNS) when they are not given. `keep_columns` are the other columns to keep,
    None for all. For tars and folders `image_column` is the extension of the pictures, and `caption_column` that
    of the caption's file or a key of the .json.

    Raises UserError for an input that is not there, is of no known kind, or whose columns are not clear.
    """
    input = os.fspath(input)
    if kind is not None:
        found = next((name for name in (kind, f".{kind}") if name in SOURCES), None)
        if found is None:
            valid = [name.removeprefix(".") for name in SOURCES]
            raise UserError(f"{input}: unknown kind '{kind}'.{suggest(kind, valid)} Valid: {', '.join(valid)}")
        kind = found
    options = InputOptions(image_column, caption_column, None if keep_columns is None else tuple(keep_columns))
    if is_folder(input):
        source = SOURCES[kind or _guess_kind_of_folder(input)]
        suffixes = [suffix for suffix, other in SOURCES.items() if other is source and suffix.startswith(".")]
        return source(input, source.list_folder(input, suffixes), options)
    files = name_files(expand_pattern(input))
    if kind is None:
        kinds = {suffix_of(file.path): file for file in files}
        unknown = [suffix for suffix in kinds if suffix not in SOURCES]
        if unknown:
            valid = ", ".join(SOURCES)
            raise UserError(f"{kinds[unknown[0]].path}: unknown kind of table '{unknown[0]}'. Valid: {valid}")
        if len({SOURCES[suffix] for suffix in kinds}) > 1:
            raise UserError(f"{input}: matches files of several kinds: {', '.join(kinds)}. Give a narrower pattern")
        kind = next(iter(kinds))
    source = SOURCES[kind]
    if kind in (".csv", ".tsv") and image_column is None and caption_column is None:
        source = recognise_table(files[0]) or source
    packed = [file.path for file in files if file.path.lower().endswith(".gz")]
    if packed and issubclass(source, (TarSource, ParquetSource, ArrowSource)):
        raise UserError(f"{packed[0]}: pictures inside gzip cannot be reached one by one. Unpack it first")
    return source(input, files, options)


def read_rows(path: str | Path, image_column: str, caption_column: str) -> Iterator[Row]:
    """The rows of the input at `path`, without its other columns. Raises UserError as `open_source` does."""
    return open_source(path, image_column=image_column, caption_column=caption_column, keep_columns=()).rows()


def _guess_kind_of_folder(folder: str) -> str:
    """What the first files of a folder show it to be. Raises UserError for one that could be several things."""
    names = list(itertools.islice(list_files(folder), _LOOKED_AT_FILES))
    if "dataset_dict.json" in names:
        splits = sorted({name.partition("/")[0] for name in names if name.endswith("/state.json")})
        raise UserError(
            f"{folder}: holds the splits {', '.join(splits)}. Give one of them, such as {folder}/{splits[0]}"
        )
    if "state.json" in names and "dataset_info.json" in names:
        return ".arrow"
    suffixes = dict.fromkeys(map(suffix_of, names))
    kinds = [suffix for suffix in suffixes if suffix in SOURCES and suffix != ".json"]
    if ".tar" in kinds:
        kinds = [".tar"]  # the tables beside tars tell about them
    if any(suffix[1:] in PICTURE_SUFFIXES for suffix in suffixes):
        kinds = ["folder", *(kind for kind in kinds if kind in (".tar", ".parquet", ".arrow"))]
    if len({SOURCES[kind] for kind in kinds}) == 1:
        return kinds[0]
    found = f"could be any of {', '.join(kinds)}" if kinds else "holds nothing that is known"
    raise UserError(f"{folder}: {found}. Give a file or a pattern in it, or the kind, one of: {', '.join(SOURCES)}")


SOURCES: dict[str, type[Source]] = {
    ".tsv": TsvSource,
    ".csv": CsvSource,
    ".jsonl": JsonLinesSource,
    ".ndjson": JsonLinesSource,
    ".json": CocoSource,
    ".token": Flickr30kSource,
    ".parquet": ParquetSource,
    ".arrow": ArrowSource,
    ".tar": TarSource,
    "folder": FolderSource,
    "coco": CocoSource,
    "flickr30k": Flickr30kSource,
    "cc3m": ConceptualCaptionsSource,
    "cc12m": Conceptual12MSource,
    "webdataset": TarSource,
}
"""By suffix, or by a name for `--kind`."""
