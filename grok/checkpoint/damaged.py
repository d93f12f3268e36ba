"""Damaged checkpoints of a run, which are set aside in the folder `damaged`."""

import itertools
from collections.abc import Callable

from grok import storage
from grok.checkpoint.file_list import find_damage, is_unfinished, read_step
from grok.errors import CheckpointError
from grok.storage import join

DAMAGED = "damaged"


def newest_good(folder: str, log: Callable[[str], object]) -> tuple[int | None, bool]:
    """The newest step in `folder` whose files are as they were saved, and True where that is none
    but there are damaged ones. Moves damaged steps after it, and deletes unfinished saves; `log` is
    called with a sentence for each. Raises CheckpointError where they cannot be read."""
    with storage.errors(folder, CheckpointError, "checkpoints cannot be read"):
        if not storage.exists(folder):
            return None, False
        present = _without_unfinished(folder, log)
        for step in sorted((int(name) for name in present if name.isdecimal()), reverse=True):
            problem = find_damage(join(folder, str(step)))
            if problem is None:
                return step, False
            log(set_aside(folder, step, problem))
        return None, storage.exists(join(folder, DAMAGED))


def set_aside(folder: str, step: int, problem: str) -> str:
    """Moves the checkpoint of `step` to the folder of damaged ones; returns a sentence about it,
    with its `problem`."""
    names = itertools.chain([f"{step}"], (f"{step}.{number}" for number in itertools.count(2)))
    targets = (join(folder, DAMAGED, name) for name in names)
    target = next(target for target in targets if not storage.exists(target))
    storage.move(join(folder, str(step)), target)
    return f"the checkpoint of step {step} {problem}; it is now in {target}"


def _without_unfinished(folder: str, log: Callable[[str], object]) -> list[str]:
    """The names of the folders that are left when unfinished saves are deleted."""
    names = []
    for name, size in storage.list_files(folder).items():
        path = join(folder, name)
        if size is None and is_unfinished(path):
            storage.remove(path)
            log(f"{path} was not saved to its end, and is deleted")
        elif size is None:
            names.append(name)
            if not name.isdecimal() and (step := _renamed_step(path)) is not None:
                log(f"{path} is the checkpoint of step {step} under another name, and is not used")
    return names


def _renamed_step(folder: str) -> int | None:
    """The step of the checkpoint in `folder`; None where there is none."""
    try:
        return read_step(folder)
    except CheckpointError:
        return None
