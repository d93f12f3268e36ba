"""Exports a run's parameters, without training state: an import of our own checkpoint."""

import os
import tempfile
from pathlib import Path

from grok import storage
from grok.config.load import from_dict
from grok.errors import CheckpointError
from grok.storage import StrPath, join
from grok.weights.cast import measured
from grok.weights.detect import open_source
from grok.weights.importing.importer import Imported, import_weights
from grok.weights.orbax.metadata import read_meta
from grok.weights.orbax.source import step_folder
from grok.weights.source import OnProgress, no_progress


def export_params(
    src: StrPath, dst: StrPath, dtype: str | None = None, on_progress: OnProgress = no_progress
) -> Imported:
    """Writes the parameters of the checkpoint at `src` (a run, its `checkpoints`, or a step), local
    or gs://, in `dtype`, to the new local folder `dst`, with the run's config and tokenizer.

    Raises CheckpointError for no finished checkpoint of ours, or anything else in `dst`.
    """
    step = step_folder(os.fspath(src))
    source = open_source(step)
    meta = read_meta(step)
    if "config" not in meta:
        raise CheckpointError(f"{step}: does not say what run it is of.")
    run = from_dict(meta["config"], join(step, "meta", "metadata"))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _tokenizer(step, Path(folder))
        source = measured(source, dtype or source.dtype)
        return import_weights(source, dst, run, tokenizer, on_progress)


def _tokenizer(step: str, folder: Path) -> Path | None:
    """The tokenizer of the run that a checkpoint is of, as a local file, where there is one."""
    beside = join(os.path.dirname(os.path.dirname(step)), "tokenizer.model")
    try:
        if not storage.exists(beside):
            return None
        storage.copy(beside, folder / "tokenizer.model")
    except OSError as error:
        raise CheckpointError(f"{beside}: cannot be copied: {storage.reason(error)}.") from error
    return folder / "tokenizer.model"
