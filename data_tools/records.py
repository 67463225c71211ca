"""Inputs of one record a picture whose fields have no declared types: JSON, COCO, folders and tars of samples."""

import abc
import codecs
import errno
import itertools
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from data_tools.errors import UserError
from data_tools.files import read_regular_file
from data_tools.image import PictureError
from data_tools.inputs import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LINE_TOO_LONG,
    NOT_UTF8,
    PICTURE_SUFFIXES,
    ExtraColumns,
    InputFile,
    InputOptions,
    Row,
    Source,
    choose_column,
    clean_text,
    is_url,
    is_utf8,
    list_files,
    make_rows,
    name_row,
    open_input,
    open_unpacked,
    parse_json,
    plain_name,
    read_lines,
)
from data_tools.tar import DEVICE, FILE, FOLDER, LINK, Member, TarError, read_headers

if TYPE_CHECKING:
    import pyarrow

MAX_PICTURE_BYTES = 512 * 2**20
MAX_TEXT_FILE_BYTES = 4 * 2**20
_LOOKED_AT_ROWS = 1000
_LARGEST_GROUP = 1000


class _Record(NamedTuple):
    """One picture of the input before its captions are judged; `refusal` is why there are none."""

    image: Any
    captions: Any
    refusal: str
    extra: Mapping[str, Any]
    place: str
    location: str


class _RecordSource(Source):
    """An input whose fields have no declared types: a first pass over it learns them."""

    def __init__(self, input: str, files: Sequence[InputFile], options: InputOptions) -> None:
        super().__init__(input, files, options)
        self._learned: tuple[str, ExtraColumns] | None = None

    @abc.abstractmethod
    def _records(self, digest: Any = None) -> Iterator[_Record]:
        """The records, in order; `digest` is fed with all that decides them."""

    def _learn(self) -> tuple[str, ExtraColumns]:
        if self._learned is None:
            digest = self._hash_names()
            extra_columns = ExtraColumns(self._input, self._options.keep_columns)
            for record in self._records(digest):
                extra_columns.observe(record.extra)
            self._learned = digest.hexdigest(), extra_columns.finish()
        return self._learned

    def identity(self) -> str:
        return self._learn()[0]

    def extra_columns(self) -> "dict[str, pyarrow.DataType]":
        return self._learn()[1].types()

    def rows(self) -> Iterator[Row]:
        # Without columns to keep there is nothing to learn first.
        keep = self._options.keep_columns
        extra_columns = ExtraColumns(self._input, ()).finish() if keep == () else self._learn()[1]
        for image, captions, refusal, extra, place, location in self._records():
            if refusal:
                yield Row(name_row(image, location), "", refusal, "", place)
            else:
                yield from make_rows(image, captions, extra_columns.render(extra), place, location)


class JsonLinesSource(_RecordSource):
    """A JSON object a line. A line that is none is a refused row."""

    def __init__(self, input: str, files: Sequence[InputFile], options: InputOptions) -> None:
        super().__init__(input, files, options)
        fields: dict[str, None] = {}
        for _, _, value in itertools.islice(self._values(self._files[:1]), _LOOKED_AT_ROWS):
            fields |= dict.fromkeys(value if isinstance(value, dict) else ())
        names, path = list(fields), self._files[0].path
        self._image = choose_column(path, IMAGE_COLUMNS, names, names, options.image_column, "image")
        self._caption = choose_column(path, CAPTION_COLUMNS, names, names, options.caption_column, "caption")

    def _values(self, files: Iterable[InputFile], digest: Any = None) -> Iterator[tuple[InputFile, int, Any]]:
        for file in files:
            with open_unpacked(file) as stream:
                for number, line in read_lines(stream, digest):
                    if line is None:
                        yield file, number, LINE_TOO_LONG
                    elif line.strip():
                        yield file, number, parse_json(line)

    def _records(self, digest: Any = None) -> Iterator[_Record]:
        for file, number, value in self._values(self._files, digest):
            location = self._locate(file, f"line {number}")
            if isinstance(value, dict):
                image, captions = value.pop(self._image, None), value.pop(self._caption, None)
                yield _Record(image, captions, "", value, "", location)
            else:
                refusal = value if value is LINE_TOO_LONG else "line that is not a JSON object"
                yield _Record(None, None, refusal, {}, "", location)


class CocoSource(_RecordSource):
    """COCO's captions: a JSON object with `images` and `annotations`, which is held in memory."""

    def _records(self, digest: Any = None) -> Iterator[_Record]:
        image_column = self._options.image_column or "file_name"
        caption_column = self._options.caption_column or "caption"
        for file in self._files:
            images, captions = self._load(file, caption_column, digest)
            for number, image in enumerate(images):
                location = self._locate(file, f"image {number}")
                if not isinstance(image, dict):
                    yield _Record(None, None, "image entry that is not an object", {}, "", location)
                    continue
                extra = {name: value for name, value in image.items() if name != image_column}
                found = captions.pop(_as_key(image.get("id")), None)
                yield _Record(image.get(image_column), found, "" if found else "no caption", extra, "", location)
            for key in captions:
                location = self._locate(file, f"image_id {key}")
                yield _Record(None, None, "captions of an image that is not listed", {}, "", location)

    def _load(self, file: InputFile, caption_column: str, digest: Any) -> tuple[list[Any], dict[str, list[Any]]]:
        """The images, and the captions by their image's key."""
        with open_unpacked(file) as stream:
            data = stream.read()
        if digest is not None:
            digest.update(data)
        content = parse_json(data)
        images, annotations = (
            content.get(part) if isinstance(content, dict) else None for part in ("images", "annotations")
        )
        if not isinstance(images, list) or not isinstance(annotations, list):
            raise UserError(
                f"{file.path}: not COCO's captions: a JSON object with the lists 'images' and 'annotations'. Is it "
                "whole? One JSON object a line is a .jsonl"
            )
        captions: dict[str, list[Any]] = {}
        for entry in annotations:
            entry = entry if isinstance(entry, dict) else {}
            captions.setdefault(_as_key(entry.get("image_id")), []).append(entry.get(caption_column))
        if captions and not any(text for listed in captions.values() for text in listed):
            raise UserError(f"{file.path}: no annotation has a '{caption_column}'. Give the captions' file")
        return images, captions


def _as_key(value: Any) -> str:
    return json.dumps(value)


class FolderSource(_RecordSource):
    """Pictures in folders, each with its caption beside it: `a.jpg` with `a.txt` (one caption) or `a.json`, or both."""

    embedded = True

    @classmethod
    def list_folder(cls, folder: str, suffixes: Sequence[str]) -> list[InputFile]:
        if is_url(folder):
            raise UserError(f"{folder}: a folder of pictures is read from a disk only. Give a table of their URLs")
        return []

    def __init__(self, input: str, files: Sequence[InputFile], options: InputOptions) -> None:
        if files:
            raise UserError(f"{input}: not a folder")
        super().__init__(input, files, options)

    def _records(self, digest: Any = None) -> Iterator[_Record]:
        suffixes = PICTURE_SUFFIXES if self._options.image_column is None else (self._options.image_column,)
        found = False
        for name in list_files(self._input):
            stem, suffix = os.path.splitext(name)
            if suffix[1:].lower() not in suffixes:
                continue
            found = True
            yield self._read_record(name, stem, digest)
        if not found:
            raise UserError(f"{self._input}: no picture is here or below (.{', .'.join(suffixes)})")

    def _read_record(self, name: str, stem: str, digest: Any) -> _Record:
        texts: dict[str, bytes] = {}
        size, refusal = self._look_up(name)
        for extension in dict.fromkeys(("txt", "json", self._options.caption_column or "txt")):
            try:
                texts[extension] = _read_file(self._input, f"{stem}.{extension}", MAX_TEXT_FILE_BYTES)
            except FileNotFoundError:
                pass
            except (PictureError, PermissionError) as error:
                refusal = (
                    refusal or f"caption file: {error.args[0] if isinstance(error, PictureError) else 'unreadable'}"
                )
        if digest is not None:
            digest.update(repr((name, size, refusal, sorted(texts.items()))).encode())
        captions, extra = _read_captions(self._input, texts, self._options.caption_column)
        refusal = refusal or ("no caption" if captions is None else "")
        return _Record(name, captions, refusal, extra, name if is_utf8(name) else "", clean_text(name))

    def _look_up(self, name: str) -> tuple[int, str]:
        """The picture's size in bytes, and why it is none, or ""."""
        try:
            status = os.stat(os.path.join(self._input, name))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EACCES):
                raise
            return 0, "link that leads nowhere"
        return status.st_size, "" if stat.S_ISREG(status.st_mode) else "not a file"

    def _read(self, place: str) -> bytes:
        try:
            return _read_file(self._input, place, MAX_PICTURE_BYTES)
        except FileNotFoundError:
            raise PictureError("missing picture", place) from None
        except PermissionError as error:
            raise PictureError("unreadable picture", f"{place}: {error.strerror}") from None


def _read_file(folder: str, name: str, limit: int) -> bytes:
    path = os.path.join(folder, name)
    return read_regular_file(path, limit, PictureError, path)


def _read_captions(where: str, texts: Mapping[str, bytes], asked: str | None) -> tuple[Any, dict[str, Any]]:
    """The captions that stand beside a picture, None for none, and the other fields of its .json.

    `texts` has the files by extension. Without `asked` the list `captions` of the .json comes first, then the .txt,
    then whichever field of the .json has a usual name.
    """
    fields = parse_json(texts["json"]) if "json" in texts else {}
    fields = fields if isinstance(fields, dict) else {}
    if asked is not None:
        captions = _decode_text(texts[asked]) if asked in texts and asked != "json" else fields.get(asked)
        return captions, {name: value for name, value in fields.items() if name != asked}
    known = [name for name in fields if plain_name(name) in CAPTION_COLUMNS]
    extra = {name: value for name, value in fields.items() if name not in ("caption", "captions")}
    if isinstance(fields.get("captions"), list) and fields["captions"]:
        return fields["captions"], extra
    if "txt" in texts:
        return _decode_text(texts["txt"]), extra
    if len(known) > 1:
        raise UserError(
            f"{where}: the caption could be any of {', '.join(known)} in the .json files. Name one with --caption-column"
        )
    extra = {name: value for name, value in extra.items() if name not in known}
    return (fields[known[0]] if known else None), extra


def _decode_text(data: bytes) -> Any:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return NOT_UTF8


class TarSource(_RecordSource):
    """Tars of samples, as webdataset reads them: members `KEY.jpg`, `KEY.txt`, `KEY.json` that stand together.

    Planning reads headers, and the data of captions only. A key may hold dots and may come again: the row is then named
    `TAR/KEY.jpg#2`. Links, devices and samples that are not whole are refused rows.
    """

    embedded = True

    def _records(self, digest: Any = None) -> Iterator[_Record]:
        for number, file in enumerate(self._files):
            used: set[str] = set()
            for record in self._read_tar(number, file, digest):
                name, again = record.location, 1
                while name in used:
                    again += 1
                    name = f"{record.location}#{again}"
                used.add(name)
                yield record._replace(image=name, location=name)

    def _read_tar(self, number: int, file: InputFile, digest: Any) -> Iterator[_Record]:
        """The records of one tar; `location` is the name, not yet made unique."""
        with open_input(file.path) as stream:
            group: dict[str, dict[str, Member]] = {}  # members by key (up to the last dot) and extension
            group_start = None
            count = 0
            try:
                for member in read_headers(partial(_read_range, stream), stream.seek(0, 2)):
                    if digest is not None:
                        digest.update(repr((member.name, member.kind, member.size)).encode())
                    if member.kind != FILE:
                        if member.kind != FOLDER:
                            yield self._refuse(
                                f"{file.name}/{member.name}",
                                _REFUSED_MEMBERS.get(member.kind, "unknown kind of member"),
                            )
                        continue
                    folder, _, name = member.name.rpartition("/")
                    key, _, extension = member.name.rpartition(".")
                    extension = extension.lower()
                    if name.startswith(".") or "." not in name or not self._is_wanted(extension):
                        continue
                    start = (folder, name.partition(".")[0])
                    crowded = count >= _LARGEST_GROUP and key not in group
                    if start != group_start or extension in group.get(key, ()) or crowded:
                        yield from self._make_records(number, file, stream, group, digest)
                        group, group_start, count = {}, start, 0
                    group.setdefault(key, {})[extension] = member
                    count += 1
            except TarError as error:
                yield from self._make_records(number, file, stream, group, digest)
                if digest is not None:
                    digest.update(repr((error.text, error.offset)).encode())
                yield self._refuse(f"{file.name}/byte {error.offset}", "tar that is damaged or cut short from here on")
            else:
                yield from self._make_records(number, file, stream, group, digest)

    def _is_wanted(self, extension: str) -> bool:
        asked = (self._options.image_column, self._options.caption_column)
        return extension in PICTURE_SUFFIXES or extension in ("txt", "json") or extension in asked

    def _is_picture(self, extension: str) -> bool:
        asked = self._options.image_column
        return extension in PICTURE_SUFFIXES if asked is None else extension == asked

    def _refuse(self, location: str, refusal: str) -> _Record:
        return _Record(None, None, refusal, {}, "", clean_text(location))

    def _make_records(
        self, number: int, file: InputFile, stream: BinaryIO, group: dict[str, dict[str, Member]], digest: Any
    ) -> Iterator[_Record]:
        """The samples among members whose names agree up to their first dot.

        A dot may be part of the key (`example.com_1.jpg`) or of the extension (`a.jpg` with `a.mask.png`, `a.img.jpg` with
        `a.txt`): a picture takes the captions of its own key, or all of the group's when it is the only one.
        """
        pictures = {key: [name for name in members if self._is_picture(name)] for key, members in group.items()}
        only = sum(map(len, pictures.values())) == 1
        whole = {key for key, found in pictures.items() if found and len(found) < len(group[key])}
        for key, members in group.items():
            part_of_other = any(key.startswith(f"{other}.") for other in whole if other != key)
            found = pictures[key]
            if not found:
                if not only and not part_of_other:
                    yield self._refuse(f"{file.name}/{key}", "captions without a picture")
                continue
            if part_of_other:
                continue
            picture = members[found[0]]
            location = f"{file.name}/{picture.name}"
            if len(found) > 1:
                yield self._refuse(location, "several pictures of one key: name an extension with --image-column")
                continue
            texts = {name: text for other in group.values() for name, text in other.items()} if only else {}
            texts |= members
            texts = {name: text for name, text in texts.items() if not self._is_picture(name)}
            place = f"{number}:{picture.start}:{picture.size}"
            yield self._read_record(file, stream, texts, digest)._replace(place=place, location=clean_text(location))

    def _read_record(self, file: InputFile, stream: BinaryIO, texts: Mapping[str, Member], digest: Any) -> _Record:
        if any(member.size > MAX_TEXT_FILE_BYTES for member in texts.values()):
            return self._refuse("", f"caption file of more than {MAX_TEXT_FILE_BYTES} bytes")
        contents = {}
        for name in texts:
            stream.seek(texts[name].start)
            contents[name] = stream.read(texts[name].size)
            if digest is not None:
                digest.update(contents[name])
        captions, extra = _read_captions(file.path, contents, self._options.caption_column)
        return _Record(None, captions, "no caption" if captions is None else "", extra, "", "")

    def _read(self, place: str) -> bytes:
        number, offset, size = map(int, place.split(":"))
        path = self._files[number].path
        if size > MAX_PICTURE_BYTES:
            raise PictureError("file too large", f"{size} bytes in {path}, at most {MAX_PICTURE_BYTES} are read")
        stream = self._hold(number, lambda files: files.enter_context(open_input(path)))
        stream.seek(offset)
        data = stream.read(size)
        if len(data) < size:
            raise PictureError("tar cut short", f"{path} has {len(data)} of {size} bytes at {offset}")
        return data


def _read_range(stream: BinaryIO, start: int, end: int) -> bytes:
    stream.seek(start)
    return stream.read(end - start)


_REFUSED_MEMBERS = {LINK: "link in a tar", DEVICE: "device in a tar"}
