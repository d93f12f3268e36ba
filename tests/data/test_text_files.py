"""Files, folders and patterns that `data.train` names."""

from pathlib import Path

import pytest

from grok.data.text_files import text_files
from grok.errors import DataError


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "text/2.md", "text/1.txt", "text/deep/3.txt", "text/.hidden", "x[1].txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("a")
    Path("text/empty.txt").touch()
    assert text_files(["b.txt"]) == ["b.txt"]
    folder = ["text/1.txt", "text/2.md", "text/deep/3.txt"]
    assert text_files(["text"]) == folder
    assert text_files(["b.txt", "text/*.txt"]) == ["b.txt", "text/1.txt"]
    assert text_files(["text/**/*.txt"]) == ["text/1.txt", "text/deep/3.txt"]
    # A file of that name is no pattern.
    assert text_files(["x[1].txt"]) == ["x[1].txt"]
    # What is not there is refused when it is read.
    assert text_files(["nowhere.txt"]) == ["nowhere.txt"]


def test_nothing_to_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("none").mkdir()
    with pytest.raises(DataError, match="source none has no files"):
        text_files(["none"])
    Path("none/empty.txt").touch()
    with pytest.raises(DataError, match="folder none has only empty files"):
        text_files(["none"])
    with pytest.raises(DataError, match=r"no file with text matches none/\*\.txt"):
        text_files(["none/*.txt"])
