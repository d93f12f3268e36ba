"""Checkpoints of a run, saved through Orbax. A checkpoint is a set of named pytrees of arrays,
stored by attribute names, plus plain data."""

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import orbax.checkpoint as ocp

from grok import storage
from grok.checkpoint import damaged
from grok.checkpoint.array_reads import ArrayReads
from grok.checkpoint.copies import read_once
from grok.checkpoint.orbax_format import checkpoint_path, reporting, tree_handler
from grok.checkpoint.retention import RetentionPolicy
from grok.checkpoint.tree_names import from_names, lead_axes, leaves_by_name, to_names
from grok.distributed import broadcast_from_primary, first_of_any, process_count
from grok.errors import CheckpointError, DamageError, SaveError
from grok.model.param_spec import ParamSpec
from grok.storage import StrPath, join
from grok.weights.orbax.zarr import reason

TREES = MODEL, LORA, OPTIMIZER, EMA = "model", "lora", "optimizer", "ema"
META = "meta"
POLL_SECONDS = 0.05
# A file that is written and deleted before a save.
PROBE = ".writable"
# A host's 119 GB of a training state of 3.8 TB take so long at 17 MB/s.
SAVE_TIMEOUT_SECONDS = 2 * 3600


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
            handlers = {name: tree_handler() for name in TREES}
            handlers[META] = ocp.JsonCheckpointHandler()
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers={
                    name: reporting(handler, self._failures) for name, handler in handlers.items()
                },
                options=ocp.CheckpointManagerOptions(
                    create=retention is not None,
                    preservation_policy=retention,
                    temporary_path_class=checkpoint_path(self.folder),
                    async_options=ocp.AsyncOptions(timeout_secs=SAVE_TIMEOUT_SECONDS),
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
        is called in process 0 with a sentence for each. The chunks of arrays are looked at when
        they are read. Raises CheckpointError where checkpoints cannot be read, or all of them are
        damaged."""
        newest, any_damaged = broadcast_from_primary(lambda: damaged.newest_good(self.folder, log))
        self._manager.reload()
        if newest is None and any_damaged:
            raise CheckpointError(
                f"{self.folder} has damaged checkpoints only, now in "
                f"{join(self.folder, damaged.DAMAGED)}; another folder would begin anew."
            )
        return newest

    def set_aside(self, step: int, error: DamageError, log: Callable[[str], object]) -> int:
        """Moves the checkpoint of `step` to the folder `damaged`, as `restore` failed with `error`,
        and returns the newest good one before it. `log` is called as by `newest_good`, which this
        raises as well."""

        def move() -> None:
            with storage.errors(self.folder, CheckpointError, "checkpoints cannot be moved"):
                log(damaged.set_aside(self.folder, step, f"cannot be restored ({error})"))

        broadcast_from_primary(move)
        newest = self.newest_good(log)
        assert newest is not None
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
            name: ocp.args.PyTreeSave(tree, jax.tree_util.tree_map_with_path(in_matrices, tree))
            for name, tree in names.items()
        }
        self._saving, self._metrics[step] = step, metrics or {}
        self._failures.clear()
        # Orbax would wait two hours for a folder that it cannot make.
        self._try_save(self._check_writable)
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

    def _check_writable(self) -> None:
        """Raises OSError in every process where process 0 cannot write in the folder."""

        def problem() -> str | None:
            probe = join(self.folder, PROBE)
            try:
                storage.write_bytes(probe, b"")
                storage.remove(probe)
            except OSError as error:
                return storage.reason(error)
            return None

        if text := broadcast_from_primary(problem):
            raise OSError(text)

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
        CheckpointError naming the tensors that are missing or of another shape, and in every
        process DamageError, naming a tensor, where bytes are not as they were saved."""
        targets = leaves_by_name(trees)

        def open_items() -> ArrayReads:
            reads = ArrayReads.open(self.path(step), list(trees))
            self._check(step, targets, reads)
            return reads

        reads = _together(open_items)
        arrays = read_once(
            targets, reads.chunk_shape, lambda leaves: _together(lambda: reads.read(leaves))
        )
        return from_names(trees, arrays)

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

    def _check(self, step: int, targets: Mapping[str, Any], reads: ArrayReads) -> None:
        """Raises CheckpointError where the arrays that are stored are not those of `targets`."""
        in_checkpoint = reads.shapes
        for name in targets.keys() | in_checkpoint.keys():
            item, _, tensor = name.partition("/")
            expected = targets[name].shape if name in targets else "absent"
            if in_checkpoint.get(name, "absent") != expected:
                raise CheckpointError(
                    f"{join(self.path(step), item)}: tensor {tensor} is "
                    f"{in_checkpoint.get(name, 'absent')} there and {expected} in the model of "
                    "this config; the config's model section must be the one it was trained with."
                )


def _together(do: Callable[[], ArrayReads | Any]) -> Any:
    """The result of `do`; a DamageError of any process is raised in all of them. A collective."""
    result, problem = None, None
    try:
        result = do()
    except DamageError as error:
        problem = str(error)
    problem = first_of_any(problem)
    if problem is not None:
        raise DamageError(problem)
    return result
