"""SDC check: devices that should hold or compute the same bits are compared, and one that does not
is named. SDC is silent data corruption: a chip that computes wrongly and reports nothing.

Two comparisons, on the devices: what is stored several times (parameters and moments over `slice`,
small tensors over all axes) by a digest of each copy; and the forward and backward pass of a
microbatch, which each group of devices does for its own rows and then for those of the group before
it. Compared are the losses of all tokens and the gradient of the token embeddings: they depend on
the rows alone, and every group runs the same program, so their bits are equal wherever they are
computed. Gradients of weights are sums over groups, whose rounding depends on the order; they are
not compared. The training step itself is not touched.

Letters: S slice, D data, E expert, T tensor (the mesh), G = S*D groups, N tensors.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grok import compiler, distributed
from grok.config import MESH_AXES, TrainConfig
from grok.errors import ConfigError, SilentCorruption
from grok.model.decoder import Decoder
from grok.train.loss import token_losses
from grok.train.state import TrainState
from grok.train.step import microbatches

GROUP_AXES = ("slice", "data")  # along which devices do the same work on other rows
MAX_SUSPECTS = 8  # devices that a message lists


class Suspects(NamedTuple):
    """Devices that differ from the others, as positions in the mesh, and in what."""

    positions: tuple[tuple[int, ...], ...]
    difference: str


class SdcCheck:
    """The check of a run. Its methods are collectives."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        """Raises ConfigError where no two groups of devices do the same work."""
        self._config, self._mesh = config, mesh
        self._num_groups = mesh.shape["slice"] * mesh.shape["data"]
        if self._num_groups == 1:
            problem = f"train.sdc_check={config.sdc_check} compares devices that do the same work"
            raise ConfigError(
                f"{problem}, and mesh.data x mesh.slice is 1; mesh.data=2, or "
                "train.sdc_check=off, would work."
            )
        self._compute = compiler.jit(self._digests_of_rows)
        self._copies = compiler.jit(_digests_of_copies)
        self._next = compiler.jit(self._rows_of_group_before)
        self._hosts = distributed.all_gather(distributed.host_name())
        self._has_compiled: set[tuple[int, ...]] = set()

    def check(self, step: int, state: TrainState, batch: Mapping[str, jax.Array]) -> None:
        """Raises SilentCorruption, in all processes, where devices differ after `step`, whose state
        and batch these are."""
        # A wrong copy makes wrong results, also on other devices: it is the one to name.
        suspects = self._compare_copies(state) or self._compare_rows(state.model, batch)
        if suspects:
            count = "one of these" if len(suspects.positions) > 1 else "this one"
            raise SilentCorruption(
                f"silent data corruption at step {step}: {suspects.difference} differ between "
                f"devices, and {count} is wrong: {self._describe(suspects.positions)}; the same "
                "command on other chips goes on from the newest checkpoint.",
                step=step,
            )

    def _compare_copies(self, state: TrainState) -> Suspects | None:
        tensors = {
            jax.tree_util.keystr(path): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if leaf.sharding.memory_kind != "pinned_host"
        }
        digests_SDETN = np.asarray(self._copies(tuple(tensors.values())))
        wrong: dict[tuple[int, ...], None] = {}
        differing = []
        for index, (name, leaf) in enumerate(tensors.items()):
            if positions := outliers(digests_SDETN[..., index], _split_axes(leaf)):
                wrong |= dict.fromkeys(positions)
                differing.append(name)
        more = f" and {len(differing) - 1} more tensors" if differing[1:] else ""
        return Suspects(tuple(wrong), f"the copies of {differing[0]}{more}") if wrong else None

    def _compare_rows(self, model: Decoder, batch: Mapping[str, jax.Array]) -> Suspects | None:
        rows = dict(batch)
        if rows["tokens_BT"].shape not in self._has_compiled:
            self._has_compiled.add(rows["tokens_BT"].shape)
            distributed.compile_in_lockstep(self._compute, model, rows)
        runs = []
        for _ in range(2):
            runs.append(self._run(model, rows))
            rows = self._next(rows)
        if _equal_rows(*runs).all():
            return None
        # A third opinion tells which of two groups is wrong; of two groups there is none.
        if self._num_groups > 2:
            runs.append(self._run(model, rows))
        num_data = self._mesh.shape["data"]
        positions = ((*divmod(group, num_data), *at) for group, *at in wrong_positions(runs))
        return Suspects(tuple(positions), "losses and gradients of the same rows")

    def _run(self, model: Decoder, rows: Mapping[str, jax.Array]) -> np.ndarray:
        """Digests (G, E, T, 2) of what each device computes of its rows."""
        digests_SDET2 = np.asarray(self._compute(model, rows))
        return digests_SDET2.reshape(self._num_groups, *digests_SDET2.shape[2:])

    def _digests_of_rows(self, model: Decoder, batch: dict) -> jax.Array:
        n = self._config.grad_accum_steps
        if n > 1:
            batch = {name: microbatches(x_BT, n)[0] for name, x_BT in batch.items()}
        tokens_BT = batch["tokens_BT"]

        def entropy(offset_BTD):
            segments = batch.get("segment_ids_BT"), batch.get("positions_BT")
            x_BTD, _ = model.hidden(tokens_BT, *segments, offset_BTD)
            return token_losses(model, x_BTD, batch["targets_BT"])[0]

        shape = (*tokens_BT.shape, model.config.embed_dim)
        offset_BTD = jnp.zeros(
            shape, model.config.compute_dtype, out_sharding=P(*jax.typeof(tokens_BT).sharding.spec)
        )
        entropy_BT, gradient = jax.vjp(entropy, offset_BTD)
        (grad_BTD,) = gradient(batch["mask_BT"].astype(entropy_BT.dtype))
        return _digests_of_copies((entropy_BT, grad_BTD))

    def _rows_of_group_before(self, batch: dict) -> dict:
        """The batch with the rows of each group on the devices of the next."""
        size = self._num_groups
        pairs = [(group, (group + 1) % size) for group in range(size)]

        def move(x_BT):
            spec = jax.typeof(x_BT).sharding.spec
            shift = jax.shard_map(
                lambda shard: jax.lax.ppermute(shard, GROUP_AXES, pairs),
                in_specs=spec,
                out_specs=spec,
                check_vma=False,
            )
            return shift(x_BT)

        return jax.tree.map(move, batch)

    def _describe(self, positions: Sequence[tuple[int, ...]]) -> str:
        devices = [self._mesh.devices[position] for position in positions]
        shown = [
            f"device {device.id} of host {self._hosts[device.process_index]} (process "
            f"{device.process_index}, {device.device_kind})"
            for device in devices[:MAX_SUSPECTS]
        ]
        more = f" and {len(devices) - MAX_SUSPECTS} more" if devices[MAX_SUSPECTS:] else ""
        return f"{', '.join(shown)}{more}"


def wrong_positions(runs: Sequence[np.ndarray]) -> list[tuple[int, int, int]]:
    """Positions (group, expert, tensor) of devices that computed wrongly. `runs` are digests (G, E,
    T, 2) of two or three runs; in run k, group g had the rows of group g - k. Of three results for
    the same rows the one that differs is wrong; of two, or three different ones, any may be."""
    num_groups = len(runs[0])
    by_rows = np.stack([np.roll(run, -k, axis=0) for k, run in enumerate(runs)])
    wrong: dict[tuple[int, int, int], None] = {}
    for rows, expert, tensor in np.argwhere((by_rows != by_rows[0]).any(axis=(0, -1))):
        results = [tuple(result) for result in by_rows[:, rows, expert, tensor]]
        for k, result in enumerate(results):
            if 2 * results.count(result) <= len(results):
                wrong[(int(rows + k) % num_groups, int(expert), int(tensor))] = None
    return list(wrong)


def outliers(digests_SDET: np.ndarray, split: Sequence[bool]) -> tuple[tuple[int, ...], ...]:
    """Positions in the mesh whose digest is not that of most devices with the same shard; `split`
    tells of each axis whether the tensor is sharded over it. Without a majority, all of them."""
    copied = [axis for axis, is_split in enumerate(split) if not is_split]
    sharded = [axis for axis, is_split in enumerate(split) if is_split]
    copies = digests_SDET.transpose(*sharded, *copied)
    copies = copies.reshape(-1, int(np.prod([digests_SDET.shape[axis] for axis in copied])))
    positions = np.arange(digests_SDET.size).reshape(digests_SDET.shape)
    positions = positions.transpose(*sharded, *copied).reshape(copies.shape)
    wrong = []
    for digests, places in zip(copies, positions, strict=True):
        values, counts = np.unique(digests, return_counts=True)
        if len(values) > 1:
            has_majority = 2 * counts.max() > len(digests)
            is_wrong = digests != values[counts.argmax()] if has_majority else digests == digests
            wrong.extend(places[is_wrong])
    indices = (np.unravel_index(place, digests_SDET.shape) for place in wrong)
    return tuple(tuple(map(int, index)) for index in indices)


def digest(shard: jax.Array) -> jax.Array:
    """A hash of an array's bits, uint32. It changes whenever one element does, and with other
    changes but for one in 2^32; the order in which elements are summed does not matter."""
    bits = _bits(shard).reshape(-1)
    x = bits ^ (jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(0x9E3779B9))
    # The finalizer of MurmurHash3, one to one.
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(x ^ (x >> jnp.uint32(16)), dtype=jnp.uint32)


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = jnp.dtype(f"uint{jax.dtypes.itemsize_bits(x.dtype)}")
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _digests_of_copies(tensors: tuple[jax.Array, ...]) -> jax.Array:
    """The digest of every device's shard of each tensor, digests_SDETN, known to all devices."""

    def local(*shards):
        return jnp.stack([digest(shard) for shard in shards]).reshape(1, 1, 1, 1, -1)

    specs = tuple(jax.typeof(x).sharding.spec for x in tensors)
    everywhere = jax.shard_map(
        local, in_specs=specs, out_specs=P(*MESH_AXES, None), check_vma=False
    )
    return jax.sharding.reshard(everywhere(*tensors), P(*(None,) * 5))


def _split_axes(leaf: jax.Array) -> list[bool]:
    assert isinstance(leaf.sharding, NamedSharding)
    used: set[str] = set()
    for axes in leaf.sharding.spec:
        used |= {axes} if isinstance(axes, str) else set(axes or ())
    return [axis in used for axis in MESH_AXES]


def _equal_rows(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first == np.roll(second, -1, axis=0)
