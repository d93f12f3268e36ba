"""Checkpoints of a run through Orbax; the only file that imports it. A checkpoint is a set of named
pytrees of arrays, stored by attribute names, plus plain data."""

import dataclasses
import itertools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import jax
import orbax.checkpoint as ocp

from grok import storage
from grok.checkpoint import integrity
from grok.checkpoint.copies import restore_once
from grok.checkpoint.tree_names import from_names, lead_axes, leaf_shapes, to_names
from grok.distributed import broadcast_from_primary, process_count
from grok.errors import CheckpointError, DamageError, SaveError
from grok.model.param_spec import ParamSpec
from grok.storage import StrPath, join
from grok.weights.orbax.zarr import reason

TREES = MODEL, LORA, OPTIMIZER, EMA = "model", "lora", "optimizer", "ema"
META = "meta"
POLL_SECONDS = 0.05
# A host's 119 GB of a training state of 3.8 TB take so long at 17 MB/s.
SAVE_TIMEOUT_SECONDS = 2 * 3600
# Folder that damaged checkpoints are moved to.
DAMAGED = "damaged"


@dataclasses.dataclass(frozen=True)
class RetentionPolicy:
    """Retains the `last` checkpoints, every `every`-th step, and the `best` by the lowest `metric`.
    0 means none of a kind. A checkpoint stays if any of the three rules retains it."""

    last: int
    every: int = 0
    best: int = 0
    metric: str = "validation_loss"

    # Of each step that has some; grows while a run saves.
    metrics: dict[int, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        """Tells Orbax for each of the checkpoints whether it stays."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = sorted(steps)[-self.last :]
        permanent = [step for step in steps if self.every and step % self.every == 0]
        values = {step: self.metrics.get(step, {}).get(self.metric, math.nan) for step in steps}
        ranked = sorted((value, step) for step, value in values.items() if not math.isnan(value))
        best = [step for _, step in ranked[: self.best]]
        return [step in {*newest, *permanent, *best} for step in steps]


class Checkpoints:
    """The checkpoints in a folder, local or at gs://, by step. Saves run in the background and are
    atomic; `wait` waits for the last one. With several processes, all of them call every method,
    and process 0 alone moves and deletes folders."""

    def __init__(self, folder: StrPath, retention: RetentionPolicy | None = None):
        """Opens a folder for saving, with its `retention`; without one, for reading only."""
        # Orbax logs each file, missing optional parts, and, with stack traces, what it raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = os.fspath(folder if storage.is_remote(folder) else Path(folder).absolute())
        self._saving: int | None = None
        self._failures: list[Exception] = []
        self._metrics = retention.metrics if retention else {}
        with storage.errors(self.folder, CheckpointError, "checkpoints cannot be kept there"):
            storage.configure_clients(folder)
            handlers = {name: ocp.StandardCheckpointHandler() for name in TREES}
            handlers[META] = ocp.JsonCheckpointHandler()
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers={
                    name: _reporting(handler, self._failures) for name, handler in handlers.items()
                },
                options=ocp.CheckpointManagerOptions(
                    create=retention is not None,
                    preservation_policy=retention,
                    async_options=ocp.AsyncOptions(
                        timeout_secs=SAVE_TIMEOUT_SECONDS,
                        post_finalization_callback=self._list_files,
                    ),
                ),
            )
        if retention is not None and retention.best:
            for step in self._manager.all_steps():
                self._metrics[step] = self.meta(step).get("metrics", {})

    def latest(self) -> int | None:
        """The newest step whose save finished, or None."""
        return self._manager.latest_step()

    def newest_good(self, log: Callable[[str], object]) -> int | None:
        """The newest step whose files are as they were saved; None where nothing was saved yet.
        Damaged steps after it move to the folder `damaged`, and unfinished saves are deleted; `log`
        is called in process 0 with a sentence for each. Raises CheckpointError where checkpoints
        cannot be read, or all of them are damaged."""
        newest, damaged = broadcast_from_primary(lambda: self._search(log))
        self._manager.reload()
        if newest is None and damaged:
            raise CheckpointError(
                f"{self.folder} has damaged checkpoints only, now in {join(self.folder, DAMAGED)}; "
                "another folder would begin anew."
            )
        return newest

    def save(
        self,
        step: int,
        trees: dict,
        meta: dict,
        metrics: Mapping[str, float] | None = None,
        specs: Mapping[str, ParamSpec] = MappingProxyType({}),
    ) -> None:
        """Starts saving `trees` (MODEL or LORA, OPTIMIZER, EMA) and plain data as `step`. Tensors
        of `specs`, and their moments, are cut on disk so that each matrix can be read alone. The
        best checkpoints are chosen by `metrics`. Waits for the previous save; raises SaveError,
        with nothing started, where that one failed or this one cannot begin."""
        self.wait()
        names = {name: to_names(tree) for name, tree in trees.items()}

        def in_matrices(path, leaf) -> ocp.SaveArgs:
            return ocp.SaveArgs(shard_axes=lead_axes(path, leaf, specs))

        items = {
            name: ocp.args.StandardSave(tree, jax.tree_util.tree_map_with_path(in_matrices, tree))
            for name, tree in names.items()
        }
        self._saving, self._metrics[step] = step, metrics or {}
        self._failures.clear()
        data = meta | ({"metrics": dict(metrics)} if metrics else {})
        args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(data))
        self._try_save(lambda: self._manager.save(step, args=args))

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises SaveError where it failed, once."""
        self._try_save(self._wait_for_save)

    def _wait_for_save(self) -> None:
        # A failure here is raised before others finish: they would wait for this one 20 minutes.
        while self._manager.is_saving_in_progress():
            if self._failures and process_count() > 1:
                raise self._failures[0]
            time.sleep(POLL_SECONDS)
        self._manager.wait_until_finished()

    def _try_save(self, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:
            # Exceptions of Orbax and TensorStore have no class in common.
            self._manager.reload()
            raise SaveError(
                f"the checkpoint of step {self._saving} could not be saved in {self.folder}: "
                f"{reason(error)}. Those before it are as they were."
            ) from error

    def meta(self, step: int) -> dict:
        """The plain data saved with `step`."""
        return self._read(step, ocp.args.Composite(meta=ocp.args.JsonRestore()))[META]

    def restore(self, step: int, trees: dict) -> dict:
        """Reads the named trees of `step`. `trees` holds, for each, a pytree of
        `jax.ShapeDtypeStruct` with shardings: arrays arrive in that shape, type and place. Raises
        CheckpointError naming the tensors that are missing or of another shape."""
        names = {name: to_names(tree) for name, tree in trees.items()}
        stored = self._manager.item_metadata(step)
        for name, tree in names.items():
            self._check(step, name, tree, stored.get(name))
        in_files = {name: stored[name].tree for name in names}

        def read(targets: dict) -> dict:
            items = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
            arrays = self._read(step, ocp.args.Composite(**items))
            return {name: arrays[name] for name in names}

        arrays = restore_once(names, in_files, read)
        return {name: from_names(tree, arrays[name]) for name, tree in trees.items()}

    def steps(self) -> list[int]:
        """All steps whose save finished, oldest first."""
        return sorted(self._manager.all_steps())

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of steps after `step`."""
        for later in (saved for saved in self.steps() if saved > step):
            self._manager.delete(later)

    def saving(self) -> bool:
        """Returns True while a save runs in the background."""
        return self._manager.is_saving_in_progress()

    def close(self) -> None:
        """Waits until the last save is on disk. Raises SaveError where it failed."""
        self.wait()
        self._try_save(self._manager.close)

    def path(self, step: int) -> str:
        """The folder of the checkpoint of `step`."""
        return join(self.folder, str(step))

    def _read(self, step: int, args):
        try:
            return self._manager.restore(step, args=args)
        except (FileNotFoundError, ValueError, KeyError, json.JSONDecodeError) as error:
            message = f"{self.path(step)} cannot be read as a checkpoint: {reason(error)}."
            raise DamageError(message) from error

    def _search(self, log: Callable[[str], object]) -> tuple[int | None, bool]:
        """The newest undamaged step, and True where the folder `damaged` has any."""
        with storage.errors(self.folder, CheckpointError, "checkpoints cannot be read"):
            if not storage.exists(self.folder):
                return None, False
            self._delete_unfinished(log)
            present = storage.list_files(self.folder)
            for step in sorted((int(name) for name in present if name.isdecimal()), reverse=True):
                problem = integrity.find_damage(self.path(step))
                if problem is None:
                    return step, False
                log(self._move_to_damaged(step, problem))
            return None, storage.exists(join(self.folder, DAMAGED))

    def _move_to_damaged(self, step: int, problem: str) -> str:
        names = itertools.chain([f"{step}"], (f"{step}.{number}" for number in itertools.count(2)))
        targets = (join(self.folder, DAMAGED, name) for name in names)
        target = next(target for target in targets if not storage.exists(target))
        storage.move(self.path(step), target)
        return f"the checkpoint of step {step} {problem}; it is now in {target}"

    def _delete_unfinished(self, log: Callable[[str], object]) -> None:
        for name, size in storage.list_files(self.folder).items():
            folder = join(self.folder, name)
            if size is None and integrity.is_unfinished(folder):
                storage.remove(folder)
                log(f"{folder} was not saved to its end, and is deleted")

    def _list_files(self) -> None:
        """Called by Orbax when all files are written, just before the checkpoint appears."""
        if storage.is_remote(self.folder):
            integrity.write_list(self.path(cast(int, self._saving)))
            return
        (unfinished,) = Path(self.folder).glob(f"{self._saving}{integrity.UNFINISHED}*")
        integrity.write_list(unfinished)

    def _check(self, step: int, name: str, expected: dict, stored) -> None:
        path = join(self.path(step), name)
        if stored is None:
            raise CheckpointError(f"{path} is missing: this checkpoint holds no such tree.")
        in_checkpoint, in_model = leaf_shapes(stored.tree), leaf_shapes(expected)
        for tensor in in_model.keys() | in_checkpoint.keys():
            if in_checkpoint.get(tensor) != in_model.get(tensor):
                raise CheckpointError(
                    f"{path}: tensor {tensor} is {in_checkpoint.get(tensor, 'absent')} there and "
                    f"{in_model.get(tensor, 'absent')} in the model of this config; "
                    "the config's model section must be the one it was trained with."
                )


class _ReportingFuture:
    """A part of a background save, an Orbax Future, that adds its failure to `failures`."""

    def __init__(self, future, failures: list[Exception]):
        self._future, self._failures = future, failures

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Exception as error:
            self._failures.append(error)
            raise


def _reporting(handler, failures: list[Exception]):
    """`handler`, whose failures to save are added to `failures` at once."""
    save = handler.async_save

    async def async_save(*args, **options):
        return [_ReportingFuture(part, failures) for part in await save(*args, **options) or ()]

    # Orbax knows handlers by their exact class, so a subclass is not possible.
    handler.async_save = async_save
    return handler
