"""`grok export hf --push`: an exported folder onto the Hugging Face hub."""

import os

from grok import hub, storage
from grok.errors import CheckpointError
from grok.weights.checksums import sample_checksum
from grok.weights.huggingface.export import as_exported
from grok.weights.huggingface.files import CONFIG
from grok.weights.huggingface.source import HuggingFaceSource
from grok.weights.source import Source


def check_name(repo: str) -> None:
    """Raises CheckpointError unless `repo` is ORG/NAME."""
    with storage.errors(f"--push {repo}", CheckpointError, "cannot be a model's name"):
        hub.check_repo(repo)


def is_exported(
    source: Source, folder: str | os.PathLike[str], dtype: str, family: str | None = None
) -> bool:
    """Returns True where the local `folder` is a complete export of `source` in `dtype`, and in the
    layout of `family` if one is asked for, as far as a small sample of the values tells: an upload
    that was interrupted then needs no new export."""
    if storage.is_remote(folder) or not storage.exists(storage.join(folder, CONFIG)):
        return False
    try:
        stored = HuggingFaceSource(folder, source.config)
    except CheckpointError:
        return False  # unfinished, or of another model
    if family not in (None, stored.adapter.name):
        return False
    return sample_checksum(stored) == sample_checksum(as_exported(source, dtype))


def push(folder: str | os.PathLike[str], repo: str, public: bool) -> str:
    """Uploads an exported folder to the model `repo`, ORG/NAME, and returns its address; the model
    is made, private unless `public`, where there is none. The same call continues an interrupted
    upload. Raises CheckpointError for what the hub refuses."""
    with storage.errors(f"{hub.SCHEME}{repo}", CheckpointError, "cannot be uploaded"):
        return hub.upload(folder, repo, public)
