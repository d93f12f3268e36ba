"""Checkpoints of a run through Orbax; the only file that imports it.

A checkpoint is a set of named pytrees of arrays, plus plain data. Each tree is stored as nested
dictionaries under the names of its attributes (`layers/moe/router_DE`), so that what is on disk
does not depend on Python classes, and one tree can be read without the others.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from grok import storage
from grok.checkpoint import integrity
from grok.checkpoint.retention import RetentionPolicy
from grok.checkpoint.tree_names import flatten, from_names, lead_axes, to_names
from grok.errors import CheckpointError, DamageError, SaveError
from grok.storage import StrPath, join
from grok.weights.orbax.zarr import reason

TREES = MODEL, LORA, OPTIMIZER, EMA = "model", "lora", "optimizer", "ema"
META = "meta"
# Between looks at a save that is waited for, in seconds.
LOOK_SECONDS = 0.05
# Folder of the checkpoints that were found damaged.
ASIDE = "damaged"
# In place of a step.
NONE_YET, NONE_LEFT = -1, -2


class Checkpoints:
    """The checkpoints in a folder, here or at gs://, by step.

    Saves run in the background and appear whole or not at all; `wait` waits for the last one. With
    several processes, all of them call every method, and the first alone moves and deletes folders.
    """

    def __init__(self, folder: StrPath, keep: RetentionPolicy | None = None):
        """`keep` says which stay after a save; without it the folder is only read."""
        # Orbax reports each file it writes at INFO, missing optional parts at WARNING, and failures
        # that it raises as well with a stack trace at ERROR.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = (
            os.fspath(folder) if storage.is_remote(folder) else str(Path(folder).absolute())
        )
        self._saving: int | None = None
        self._failures: list[Exception] = []
        self._metrics: dict[int, Mapping[str, float]] = {}
        with self._explained("checkpoints cannot be kept there"):
            storage.prepare(folder)
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers={
                    **{
                        name: _telling(ocp.StandardCheckpointHandler(), self._failures)
                        for name in TREES
                    },
                    META: _telling(ocp.JsonCheckpointHandler(), self._failures),
                },
                options=ocp.CheckpointManagerOptions(
                    create=keep is not None,
                    preservation_policy=None if keep is None else _Preserving(keep, self._metrics),
                    async_options=ocp.AsyncOptions(post_finalization_callback=self._list_files),
                ),
            )
        if keep is not None and keep.best:
            for step in self._manager.all_steps():
                self._metrics[step] = self.meta(step).get("metrics", {})

    def latest(self) -> int | None:
        """The newest step that was saved whole, or None."""
        return self._manager.latest_step()

    def newest_good(self, tell: Callable[[str], object]) -> int | None:
        """The newest step whose files are all as they were saved; None where nothing was saved yet.

        Those after it go to the folder `damaged`, and saves that were not finished are deleted;
        `tell` hears, in the first process, a sentence for each. Raises CheckpointError where
        checkpoints cannot be read, or all of them are damaged.
        """
        found = NONE_YET
        if jax.process_index() == 0 and storage.exists(self.folder):
            with self._explained("checkpoints cannot be read"):
                self._delete_unfinished(tell)
                found = self._search(tell)
        found = _from_first(found)
        self._manager.reload()
        if found == NONE_LEFT:
            raise CheckpointError(
                f"{self.folder} has no checkpoint that is whole, only damaged ones in "
                f"{join(self.folder, ASIDE)}; another folder would begin anew."
            )
        return None if found == NONE_YET else found

    def save(
        self,
        step: int,
        trees: dict,
        meta: dict,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving `trees` (MODEL or LORA, OPTIMIZER, EMA) and plain data as `step`.

        `metrics` are those that decide which checkpoints are the best. Waits for the save before,
        and raises SaveError, with nothing started, where that one failed, or where this one cannot
        begin.
        """
        self.wait()
        names = {name: to_names(tree) for name, tree in trees.items()}
        items = {
            name: ocp.args.StandardSave(tree, jax.tree_util.tree_map_with_path(_in_matrices, tree))
            for name, tree in names.items()
        }
        self._saving, self._metrics[step] = step, metrics or {}
        self._failures.clear()
        kept = meta | ({"metrics": dict(metrics)} if metrics else {})
        args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(kept))
        self._saved(lambda: self._manager.save(step, args=args))

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises SaveError where it failed, once."""
        self._saved(self._finished)

    def _finished(self) -> None:
        """Waits; raises what failed in this process without waiting for the others, who would wait
        for this one in turn until Orbax gives up, after 20 minutes."""
        while self._manager.is_saving_in_progress():
            if self._failures and jax.process_count() > 1:
                raise self._failures[0]
            time.sleep(LOOK_SECONDS)
        self._manager.wait_until_finished()

    def _saved(self, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:
            # Orbax and TensorStore raise what they like; what was there before is still there.
            self._manager.reload()
            raise SaveError(
                f"the checkpoint of step {self._saving} could not be saved in {self.folder}: "
                f"{reason(error)}. Those before it are as they were."
            ) from error

    def meta(self, step: int) -> dict:
        """The plain data saved with `step`."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._read(step, args)[META]

    def restore(self, step: int, trees: dict) -> dict:
        """Reads the named trees of `step`. `trees` holds, for each, a pytree of
        `jax.ShapeDtypeStruct` with shardings: arrays arrive in that shape, type and place.

        Raises CheckpointError naming the tensors that are missing or of another shape.
        """
        names = {name: to_names(tree) for name, tree in trees.items()}
        items = {name: ocp.args.StandardRestore(tree) for name, tree in names.items()}
        stored = self._manager.item_metadata(step)
        for name, tree in names.items():
            self._check(step, name, tree, stored.get(name))
        read = self._read(step, ocp.args.Composite(**items))
        return {name: from_names(tree, read[name]) for name, tree in trees.items()}

    def steps(self) -> list[int]:
        """All steps that were saved whole, oldest first."""
        return sorted(self._manager.all_steps())

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of steps after `step`."""
        for each in self.steps():
            if each > step:
                self._manager.delete(each)

    def saving(self) -> bool:
        """Whether a save is going on in the background."""
        return self._manager.is_saving_in_progress()

    def close(self) -> None:
        """Waits until the last save is on disk. Raises SaveError where it failed."""
        self._saved(self._finished)
        self._saved(self._manager.close)

    def path(self, step: int) -> str:
        """The folder of the checkpoint of `step`."""
        return join(self.folder, str(step))

    def _read(self, step: int, args):
        try:
            return self._manager.restore(step, args=args)
        except (FileNotFoundError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise DamageError(
                f"{self.path(step)} cannot be read as a checkpoint: {reason(error)}."
            ) from error

    def _search(self, tell: Callable[[str], object]) -> int:
        """The newest step that is whole, NONE_YET or NONE_LEFT; damaged ones are set aside."""
        present = storage.list_files(self.folder)
        for step in sorted((int(name) for name in present if name.isdecimal()), reverse=True):
            problem = integrity.damage(self.path(step))
            if problem is None:
                return step
            tell(self._move_aside(step, problem))
        return NONE_LEFT if storage.exists(join(self.folder, ASIDE)) else NONE_YET

    def _move_aside(self, step: int, why: str) -> str:
        target, number = join(self.folder, ASIDE, str(step)), 1
        while storage.exists(target):
            number += 1
            target = join(self.folder, ASIDE, f"{step}.{number}")
        storage.move(self.path(step), target)
        return f"the checkpoint of step {step} {why}; it is now in {target}"

    def _delete_unfinished(self, tell: Callable[[str], object]) -> None:
        for name, size in storage.list_files(self.folder).items():
            folder = join(self.folder, name)
            if size is None and integrity.is_unfinished(folder):
                storage.remove(folder)
                tell(f"{folder} was not saved to its end, and is deleted")

    def _list_files(self) -> None:
        """Called by Orbax when all is written, just before the checkpoint appears."""
        if storage.is_remote(self.folder):
            integrity.write_list(self.path(cast(int, self._saving)))
            return
        (unfinished,) = Path(self.folder).glob(f"{self._saving}{integrity.UNFINISHED}*")
        integrity.write_list(unfinished)

    @contextlib.contextmanager
    def _explained(self, problem: str) -> Iterator[None]:
        """Raises CheckpointError, with the problem and its reason, of what goes wrong inside."""
        try:
            with storage.errors(self.folder):
                yield
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {problem}: {storage.reason(error)}.") from error

    def _check(self, step: int, name: str, wanted: dict, stored) -> None:
        where = join(self.path(step), name)
        if stored is None:
            raise CheckpointError(f"{where} is missing: this checkpoint holds no such tree.")
        have = {path: tuple(leaf.shape) for path, leaf in flatten(stored.tree).items()}
        want = {path: tuple(leaf.shape) for path, leaf in flatten(wanted).items()}
        for path in want.keys() | have.keys():
            if have.get(path) != want.get(path):
                raise CheckpointError(
                    f"{where}: tensor {path} is {have.get(path, 'absent')} there and "
                    f"{want.get(path, 'absent')} in the model of this config; "
                    "the config's model section must be the one it was trained with."
                )


class _Preserving:
    """`Keep` as Orbax asks for it; `metrics` are those of each step, and grow."""

    def __init__(self, keep: RetentionPolicy, metrics: Mapping[int, Mapping[str, float]]):
        self._keep, self._metrics = keep, metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Which of the checkpoints stay."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        staying = self._keep.staying(steps, self._metrics)
        return [step in staying for step in steps]


class _Watched:
    """A part of a save in the background, as Orbax's Future, that notes its failure."""

    def __init__(self, part, failures: list[Exception]):
        self._part, self._failures = part, failures

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the part."""
        try:
            return self._part.result(timeout)
        except Exception as error:
            self._failures.append(error)
            raise


def _telling(handler, failures: list[Exception]):
    """`handler`, whose failures to save appear in `failures` at once."""
    save = handler.async_save

    async def async_save(*args, **options):
        return [_Watched(part, failures) for part in await save(*args, **options) or ()]

    # Orbax knows handlers by their exact class, so this one cannot have its own.
    handler.async_save = async_save
    return handler


def _in_matrices(path, leaf) -> ocp.SaveArgs:
    """How a leaf is cut on disk, besides as on the mesh: so that it can be read in matrices."""
    return ocp.SaveArgs(shard_axes=lead_axes(path, leaf))


def _from_first(value: int) -> int:
    """What the first process has for `value`, in all of them."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))
