"""Columns of types: parquet and Arrow, with pictures inside or names of pictures."""

import abc
import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data_tools.errors import UserError
from data_tools.image import PictureError
from data_tools.inputs import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    NOT_UTF8,
    ExtraColumns,
    InputFile,
    InputOptions,
    Row,
    Source,
    choose_column,
    is_url,
    make_rows,
    open_input,
    plain_name,
)
from data_tools.parquet_footer import Footer, FooterError, RowGroup, read_footer

if TYPE_CHECKING:
    import pyarrow

BYTES_COLUMNS = ("image", "image_bytes", "img", "img_bytes", "bytes", "picture", "jpg", "jpeg", "png", "webp")
"""Columns of bytes with such a name hold the pictures, where no --image-column is given."""

_BATCH_ROWS = 1024
_WINDOW_BYTES = 32 * 2**20
_LARGEST_WINDOW_ROWS = 2**20  # whatever a footer says


class _ColumnarSource(Source):
    """Files of typed columns. The pictures are a column of bytes, or of Hugging Face's struct{bytes, path}, or names."""

    def __init__(self, input: str, files: Sequence[InputFile], options: InputOptions) -> None:
        super().__init__(input, files, options)
        self._extra: ExtraColumns | None = None
        schema = self._load_schema(self._files[0])
        self._image, self._caption = self._choose_columns(self._files[0], schema)
        self.embedded = self.reads_by_group = _holds_pictures(schema.field(self._image).type)
        self._image_is_struct = self.embedded and not _is_bytes(schema.field(self._image).type)

    @abc.abstractmethod
    def _read_schema(self, file: InputFile) -> "pyarrow.Schema": ...

    def _load_schema(self, file: InputFile) -> "pyarrow.Schema":
        """A file's schema, whose names can be read. Raises UserError."""
        with _refuse_damaged(file):
            schema = self._read_schema(file)
            _check_names(schema)
            return schema

    @abc.abstractmethod
    def _read_batches(
        self, file: InputFile, columns: list[str]
    ) -> "Iterator[tuple[str, int, pyarrow.RecordBatch, Sequence[bool]]]":
        """The batches of a file with those columns, and the image column or its paths.

        Each with the name of its group, its first row's place in the group, and which of its rows hold a picture.
        """

    @abc.abstractmethod
    def _read_cell(self, number: int, group: int, row: int) -> Any:
        """The image column's value at a row of a group of file `number`."""

    def extra_columns(self) -> "dict[str, pyarrow.DataType]":
        return self._learn_extra().types()

    def rows(self) -> Iterator[Row]:
        extra_columns = self._learn_extra()
        for number, file in enumerate(self._files):
            kept = self._kept(file)
            row = 0
            with _refuse_damaged(file):
                for group, start, batch, present in self._read_batches(file, [self._caption, *kept]):
                    captions = _to_values(batch.column(self._caption))
                    names = self._read_names(batch)
                    extras = zip(*(_to_values(batch.column(name)) for name in kept), strict=True) if kept else ()
                    rendered = (extra_columns.render(dict(zip(kept, values, strict=True))) for values in extras)
                    for place, (caption, name, is_present) in enumerate(zip(captions, names, present, strict=True)):
                        extra = next(rendered, "")
                        label = f"{file.name}/{row}"
                        row += 1
                        if is_present:
                            yield from make_rows(label, caption, extra, f"{number}/{group}/{start + place}", label)
                        elif name is None and self.embedded:
                            yield Row(label, "", "no picture", extra)
                        else:
                            yield from make_rows(
                                name, caption, extra, "", label if self.embedded else self._locate(file, f"row {row}")
                            )

    def _read_names(self, batch: "pyarrow.RecordBatch") -> list[Any]:
        """The names of pictures, for rows without their bytes."""
        import pyarrow.compute

        if self._image not in batch.schema.names:
            return [None] * batch.num_rows
        column = batch.column(self._image)
        if not self.embedded:
            return _to_values(column)
        if not self._image_is_struct or column.type.get_field_index("path") < 0:
            return [None] * batch.num_rows
        return _to_values(pyarrow.compute.struct_field(column, "path"))

    def _read(self, place: str) -> bytes:
        number, group, row = map(int, place.split("/"))
        try:
            value = self._read_cell(number, group, row)
        except _arrow_errors() as error:
            if getattr(error, "errno", None):
                raise
            raise PictureError("damaged container", f"{self._files[number].path}: {_one_line(error)}") from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise PictureError("no picture", f"{self._files[number].path} at {place}")
        return data

    def _choose_columns(self, file: InputFile, schema: "pyarrow.Schema") -> tuple[str, str]:
        import pyarrow

        kinds = {field.name: field.type for field in schema}
        structs = [name for name, kind in kinds.items() if pyarrow.types.is_struct(kind) and _holds_pictures(kind)]
        bytes_columns = [name for name, kind in kinds.items() if _is_bytes(kind) and plain_name(name) in BYTES_COLUMNS]
        texts = [name for name, kind in kinds.items() if _kind_of_type(kind) == "string" and not _is_list(kind)]
        captions = [name for name, kind in kinds.items() if _holds_texts(kind)]
        asked = self._options.image_column
        pictures = structs or bytes_columns
        known = [plain_name(name) for name in pictures] or IMAGE_COLUMNS
        image = choose_column(file.path, known, pictures or texts, list(kinds), asked, "image")
        caption = choose_column(
            file.path, CAPTION_COLUMNS, captions, list(kinds), self._options.caption_column, "caption"
        )
        if not _holds_pictures(kinds[image]) and not _holds_texts(kinds[image]):
            raise UserError(f"{file.path}: the column '{image}' of {kinds[image]} holds neither pictures nor names")
        if not _holds_texts(kinds[caption]):
            raise UserError(
                f"{file.path}: the column '{caption}' of {kinds[caption]} holds no texts nor lists of texts"
            )
        return image, caption

    def _kept(self, file: InputFile) -> list[str]:
        """The other columns that a file has and that can be kept."""
        keep = self._options.keep_columns
        return [
            field.name
            for field in self._checked_schema(file)
            if field.name not in (self._image, self._caption)
            and (keep is None or field.name in keep)
            and _kind_of_type(field.type) is not None
        ]

    def _checked_schema(self, file: InputFile) -> "pyarrow.Schema":
        """A file's schema. Raises UserError when it lacks a column, or has it of another sort, than the first file."""
        schema = self._load_schema(file)
        for name in (self._image, self._caption):
            if schema.get_field_index(name) < 0:
                raise UserError(
                    f"{file.path}: no column '{name}', which {self._files[0].path} has, or it is there twice"
                )
        kind = schema.field(self._image).type
        if _holds_pictures(kind) != self.embedded or (self.embedded and _is_bytes(kind) == self._image_is_struct):
            raise UserError(f"{file.path}: the column '{self._image}' is {kind}, unlike that of {self._files[0].path}")
        return schema

    def _learn_extra(self) -> ExtraColumns:
        if self._extra is None:
            extra = ExtraColumns(self._input, self._options.keep_columns)
            others: dict[str, None] = {}
            if self._options.keep_columns != ():
                for file in self._files:
                    schema = self._checked_schema(file)
                    others |= dict.fromkeys((self._image, self._caption))
                    for name in self._kept(file):
                        kind = _kind_of_type(schema.field(name).type)
                        extra.observe_kind(name, None if kind == "null" else kind)
            self._extra = extra.finish(others)
        return self._extra


class ParquetSource(_ColumnarSource):
    """Parquet, streamed by row groups and pages: planning does not read the column of pictures."""

    def _read_schema(self, file: InputFile) -> "pyarrow.Schema":
        with contextlib.ExitStack() as files:
            return _open_parquet(file, files).schema_arrow

    def _picture_leaf(self) -> str:
        return f"{self._image}.bytes" if self._image_is_struct else self._image

    def _read_batches(self, file: InputFile, columns: list[str]) -> "Iterator[tuple[str, int, Any, Sequence[bool]]]":
        # Columns that are not there, such as the paths of a struct without them, are passed over.
        columns = [*columns, *([f"{self._image}.path"] if self._image_is_struct else [])]
        with contextlib.ExitStack() as files:
            parquet = _open_parquet(file, files)
            for group, facts in enumerate(_read_parquet_footer(file).row_groups):
                chunk = facts.chunks.get(self._picture_leaf())
                nulls = None if chunk is None else chunk.nulls
                known = not self.embedded or nulls in (0, facts.rows)
                wanted = columns if known and self.embedded else [*columns, self._picture_leaf()]
                size = _BATCH_ROWS if known else self._window_rows(facts)
                start = 0
                for batch in parquet.iter_batches(size, row_groups=[group], columns=wanted):
                    present = [self.embedded and nulls == 0] * batch.num_rows
                    if not known:
                        present = self._read_pictures(batch).is_valid().to_pylist()
                    yield str(group), start, batch, present
                    start += batch.num_rows

    def _read_pictures(self, batch: "pyarrow.RecordBatch") -> "pyarrow.Array":
        import pyarrow.compute

        column = batch.column(self._image)
        return pyarrow.compute.struct_field(column, "bytes") if self._image_is_struct else column

    def _window_rows(self, group: RowGroup) -> int:
        """As many rows as have about 32 MiB of pictures."""
        chunk = group.chunks.get(self._picture_leaf())
        unpacked_bytes = 0 if chunk is None else chunk.unpacked_bytes
        return max(1, min(group.rows, _WINDOW_BYTES * group.rows // max(1, unpacked_bytes), _LARGEST_WINDOW_ROWS))

    def _read_cell(self, number: int, group: int, row: int) -> Any:
        held = self._hold(number, lambda files: self._open_window(self._files[number], files))
        if held.group != group or row < held.start:
            size = self._window_rows(held.row_groups[group])
            held.begin(group, held.parquet.iter_batches(size, row_groups=[group], columns=[self._picture_leaf()]))
        while row >= held.start + len(held.pictures):
            held.go_on(self._read_pictures)
        return held.pictures[row - held.start].as_py()

    def _open_window(self, file: InputFile, files: contextlib.ExitStack) -> "_ParquetWindow":
        return _ParquetWindow(_open_parquet(file, files), _read_parquet_footer(file).row_groups)

    def identity(self) -> str:
        """Beside the names: the footers, and the stored bytes of every column but the pictures."""
        digest = self._hash_names()
        for file in self._files:
            footer = _read_parquet_footer(file)
            digest.update(footer.data)
            with open_input(file.path) as stream:
                for group in footer.row_groups:
                    for path, chunk in group.chunks.items():
                        if not self.embedded or path != self._picture_leaf():
                            _hash_range(digest, stream, chunk.start, chunk.stored_bytes)
        return digest.hexdigest()


class _ParquetWindow:
    """A run of decoded pictures in a row group, which moves forward. After damage it stays where it was."""

    def __init__(self, parquet: Any, row_groups: Sequence[RowGroup]) -> None:
        self.parquet = parquet
        self.row_groups = row_groups
        self.group, self.start = -1, 0
        self.pictures: Any = ()
        self._batches: Iterator[Any] = iter(())
        self._damage: dict[int, tuple[int, Exception]] = {}

    def begin(self, group: int, batches: Iterator[Any]) -> None:
        self.group, self.start, self.pictures, self._batches = group, 0, (), batches

    def go_on(self, read_pictures: Callable[[Any], Any]) -> None:
        end = self.start + len(self.pictures)
        if self.group in self._damage and end >= self._damage[self.group][0]:
            raise self._damage[self.group][1]  # reading the group up to here for each of its rows would take for ever
        try:
            batch = next(self._batches, None)
            if batch is None:
                raise OSError("the row group has fewer rows than were counted")
            pictures = read_pictures(batch)
        except _arrow_errors() as error:
            self._damage[self.group] = (end, error)
            raise
        self.start, self.pictures = end, pictures


class ArrowSource(_ColumnarSource):
    """Arrow streams and files, as Hugging Face's `save_to_disk` writes them. They are mapped into memory, not read."""

    @classmethod
    def list_folder(cls, folder: str, suffixes: Sequence[str]) -> list[InputFile]:
        state = os.path.join(folder, "state.json")
        if is_url(folder) or not os.path.isfile(state):
            return super().list_folder(folder, suffixes)
        try:
            names = [entry["filename"] for entry in json.loads(Path(state).read_bytes())["_data_files"]]
            if not names or any("/" in name or name.startswith(".") for name in names):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{state}: does not list the dataset's .arrow files. Save the dataset again") from None
        absent = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
        if absent:
            raise UserError(f"{folder}: {len(absent)} of {len(names)} files are missing (first: {absent[0]})")
        return [InputFile(os.path.join(folder, name), name) for name in names]

    def _read_schema(self, file: InputFile) -> "pyarrow.Schema":
        with contextlib.ExitStack() as files, _refuse_damaged(file):
            return _open_arrow(file, files)[0]

    def _read_batches(self, file: InputFile, columns: list[str]) -> "Iterator[tuple[str, int, Any, Sequence[bool]]]":
        with contextlib.ExitStack() as files:
            _, batches = _open_arrow(file, files)
            for group, batch in enumerate(batches):
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    part = batch.select([*columns, self._image]).slice(start, _BATCH_ROWS)
                    for column in part.columns:
                        _check_array(column)
                    present: Sequence[bool] = [False] * part.num_rows
                    if self.embedded:
                        present = self._read_pictures(part.column(self._image)).is_valid().to_pylist()
                    yield str(group), start, part, present

    def _read_pictures(self, column: "pyarrow.Array") -> "pyarrow.Array":
        import pyarrow.compute

        return pyarrow.compute.struct_field(column, "bytes") if self._image_is_struct else column

    def _read_cell(self, number: int, group: int, row: int) -> Any:
        batches, images = self._hold(number, lambda files: (_open_arrow(self._files[number], files)[1], []))
        while len(images) <= group:  # only the places of the buffers are read here, not the pictures
            batch = next(batches, None)
            images.append(None if batch is None else _check_pictures(batch.column(self._image)))
        if images[group] is None:
            raise OSError("the batch is damaged")
        return self._read_pictures(images[group].slice(row, 1))[0].as_py()

    def identity(self) -> str:
        """Beside the names: the values of every column, but only the sizes of the pictures."""
        digest = self._hash_names()
        for file in self._files:
            with _refuse_damaged(file), contextlib.ExitStack() as files:
                schema, batches = _open_arrow(file, files)
                digest.update(str(schema.remove_metadata()).encode())
                for batch in batches:
                    digest.update(b"%d\n" % batch.num_rows)
                    for name, column in zip(schema.names, batch.columns, strict=True):
                        _hash_array(digest, column, self.embedded and name == self._image)
        return digest.hexdigest()


def _open_parquet(file: InputFile, files: contextlib.ExitStack) -> Any:
    """Raises UserError for a file that is not whole parquet."""
    import pyarrow.parquet

    stream = files.enter_context(open_input(file.path)) if is_url(file.path) else file.path
    with _refuse_damaged(file):
        # Neither option reads a whole column chunk into memory: a row group may have gigabytes of pictures.
        return files.enter_context(pyarrow.parquet.ParquetFile(stream, buffer_size=2**20, pre_buffer=False))


def _read_parquet_footer(file: InputFile) -> Footer:
    with open_input(file.path) as stream:
        try:
            return read_footer(stream)
        except FooterError as error:
            raise UserError(f"{file.path}: truncated or damaged ({error}). Fetch or write it again") from None


def _open_arrow(file: InputFile, files: contextlib.ExitStack) -> tuple[Any, Iterator[Any]]:
    """The schema and the batches of an Arrow stream, or of an Arrow file."""
    import pyarrow

    if is_url(file.path):
        raise UserError(f"{file.path}: .arrow files are read from a disk only. Fetch it, or give parquet")
    stream = files.enter_context(pyarrow.memory_map(file.path))
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(stream)
        return reader.schema, map(reader.get_batch, range(reader.num_record_batches))
    reader = files.enter_context(pyarrow.ipc.open_stream(stream))
    return reader.schema, iter(reader)


def _arrow_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return (pyarrow.ArrowException, OSError, UnicodeDecodeError)  # the last for the name of a column


@contextlib.contextmanager
def _refuse_damaged(file: InputFile) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not isinstance(error, _arrow_errors()) or getattr(error, "errno", None):
            raise
        raise UserError(f"{file.path}: truncated or damaged ({_one_line(error)}). Fetch or write it again") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _hash_range(digest: Any, stream: BinaryIO, start: int, size: int) -> None:
    stream.seek(start)
    while size and (chunk := stream.read(min(size, 2**20))):
        digest.update(chunk)
        size -= len(chunk)


def _hash_array(digest: Any, array: "pyarrow.Array", is_picture: bool) -> None:
    """The array's buffers as they are stored; of a picture's bytes only the offsets."""
    import pyarrow

    if is_picture and pyarrow.types.is_struct(array.type):
        _hash_array(digest, array.is_valid(), False)
        for place in range(array.type.num_fields):
            _hash_array(digest, array.field(place), array.type.field(place).name == "bytes")
        return
    for buffer in array.buffers()[: 2 if is_picture else None]:
        digest.update(b"-" if buffer is None else b"%d:" % buffer.size)
        if buffer is not None:
            digest.update(buffer)


def _check_names(fields: "Iterable[pyarrow.Field]") -> None:
    """Raise UnicodeDecodeError for a name that is not UTF-8: pyarrow decodes a name only when it is used."""
    import pyarrow

    for field in fields:
        if field.name and pyarrow.types.is_nested(field.type):
            _check_names(map(field.type.field, range(field.type.num_fields)))


def _check_array(array: "pyarrow.Array") -> None:
    """Check what Arrow believes when it maps a file: a damaged offset would read outside of it."""
    import pyarrow

    kind = array.type
    if pyarrow.types.is_struct(kind):
        array.validate()
        for place in range(kind.num_fields):
            _check_array(array.field(place))
        return
    if pyarrow.types.is_string(kind):
        array = array.view(pyarrow.binary())  # texts are judged one by one
    elif pyarrow.types.is_large_string(kind):
        array = array.view(pyarrow.large_binary())
    array.validate(full=True)


def _check_pictures(array: "pyarrow.Array") -> "pyarrow.Array | None":
    try:
        _check_array(array)
    except _arrow_errors():
        return None
    return array


def _to_values(array: "pyarrow.Array") -> list[Any]:
    """Python values; times, decimals and the like as text, and NOT_UTF8 where a text cannot be decoded."""
    import pyarrow

    kind = array.type
    if pyarrow.types.is_temporal(kind) or pyarrow.types.is_decimal(kind):
        try:
            array = array.cast(pyarrow.string())
        except pyarrow.ArrowException:
            return [str(value) if value.is_valid else None for value in array]
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_to_value(value) for value in array]


def _to_value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return NOT_UTF8


def _is_bytes(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _is_list(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    return pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)


def _holds_pictures(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    if pyarrow.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _is_bytes(kind.field(place).type)
    return _is_bytes(kind)


def _holds_texts(kind: "pyarrow.DataType") -> bool:
    import pyarrow

    if _is_list(kind):
        kind = kind.value_type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _kind_of_type(kind: "pyarrow.DataType") -> str | None:
    """How a column is kept: string, int64, float64, bool, json or null; None for bytes, which are not."""
    import pyarrow

    types = pyarrow.types
    if isinstance(kind, pyarrow.ExtensionType):
        return _kind_of_type(kind.storage_type)
    if types.is_dictionary(kind):
        return _kind_of_type(kind.value_type)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return None
    if types.is_nested(kind):
        inner = [kind.field(place).type for place in range(kind.num_fields)]
        return None if any(_kind_of_type(part) is None for part in inner) else "json"
    if types.is_null(kind):
        return "null"
    if types.is_boolean(kind):
        return "bool"
    if types.is_floating(kind):
        return "float64"
    if types.is_integer(kind):
        return "json" if types.is_uint64(kind) else "int64"
    return "string"
