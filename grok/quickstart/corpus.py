"""A corpus that comes with Python, so that it needs no network: the language reference of `help()`.
Its size, and every number measured on it, depend on the Python version."""

import hashlib
import pydoc_data.topics
from collections.abc import Mapping
from pathlib import Path

HELDOUT_SHARE = 0.1
# Shorter paragraphs ("Changed in version 3.8: ...") are shared by chance, not because one topic
# includes another.
MIN_SHARED_CHARACTERS = 60


def write_corpus(folder: str | Path) -> tuple[Path, Path]:
    """Writes `train.txt` and `heldout.txt` (UTF-8) into `folder`; returns both paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    heldout = heldout_topics(pydoc_data.topics.topics)
    paths = folder / "train.txt", folder / "heldout.txt"
    for path, is_heldout in zip(paths, (False, True), strict=True):
        texts = [
            text.strip("\n")
            for topic, text in sorted(pydoc_data.topics.topics.items())
            if (topic in heldout) == is_heldout
        ]
        path.write_bytes(("\n\n".join(texts) + "\n").encode())
    return paths


def heldout_topics(topics: Mapping[str, str]) -> set[str]:
    """The topics to hold out: at most a tenth of the bytes, chosen by hash of their names. Topics
    that share a paragraph stay on one side, so that no held-out text can be memorised."""
    sizes = {topic: len(text.encode()) for topic, text in topics.items()}
    room = HELDOUT_SHARE * sum(sizes.values())
    heldout: set[str] = set()
    for group in sorted(_groups(topics), key=lambda g: hashlib.sha256(g[0].encode()).digest()):
        size = sum(sizes[topic] for topic in group)
        if size <= room:
            heldout.update(group)
            room -= size
    return heldout


def _groups(topics: Mapping[str, str]) -> list[list[str]]:
    """Topics in groups that share paragraphs, directly or through others."""
    groups: list[tuple[set[str], ...]] = []  # members and their paragraphs
    for topic in sorted(topics):
        paragraphs = _paragraphs(topics[topic])
        sharing = [({topic}, paragraphs), *(group for group in groups if group[1] & paragraphs)]
        apart = [group for group in groups if not group[1] & paragraphs]
        groups = [*apart, tuple(set[str]().union(*sets) for sets in zip(*sharing, strict=True))]
    return [sorted(members) for members, _ in groups]


def _paragraphs(text: str) -> set[str]:
    """The longer paragraphs, with white space normalised (included text may be indented)."""
    paragraphs = {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}
    return {p for p in paragraphs if len(p) >= MIN_SHARED_CHARACTERS}
