"""Files of text that `data.train` and `data.validation` name: files, folders and patterns."""

import glob
import os
from collections.abc import Iterator, Sequence

from grok import storage
from grok.data.prepare.sources import find_files
from grok.errors import DataError

PATTERN_CHARACTERS = "*?["


def text_files(paths: Sequence[str]) -> list[str]:
    """The files in order: a file as it is named; of a folder, here or at gs://, all that are not
    hidden or empty, by name; of a pattern, such as `text/*.txt` or `text/**/*.md`, its matches.
    DataError where a path is not there, or has no such files."""
    return [file for path in paths for file in _files(path)]


def _files(path: str) -> Iterator[str]:
    if storage.is_remote(path) or os.path.isdir(path):
        yield from _of_folder(path)
    elif os.path.exists(path) or not any(character in path for character in PATTERN_CHARACTERS):
        yield path  # reading it says what is wrong with one that is not there
    else:
        yield from _of_pattern(path)


def _of_folder(path: str) -> list[str]:
    files = find_files([path])
    if files[0].name == path:  # a file at gs://
        return [path]
    if not (with_text := [file.name for file in files if file.bytes]):
        raise DataError(f"folder {path} has only empty files; one with text would work.")
    return with_text


def _of_pattern(path: str) -> list[str]:
    matches = sorted(glob.glob(path, recursive=True))
    files = [match for match in matches if os.path.isfile(match) and os.path.getsize(match)]
    if not files:
        raise DataError(f"no file with text matches {path}; a file, a folder or a pattern would.")
    return files
