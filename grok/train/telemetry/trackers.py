"""Experiment trackers that metrics are sent to: TensorBoard, Weights & Biases."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from grok.config import RunConfig
from grok.config.load import to_dict
from grok.errors import ConfigError, require_package


class Tracker(NamedTuple):
    """A service or format that metrics are sent to, by step; `close` sends what is left."""

    write: Callable[[int, Mapping[str, Any]], None]
    close: Callable[[], None]


def open_trackers(config: RunConfig, folder: Path, run_id: str, first: int) -> list[Tracker]:
    """Opens the trackers that the config asks for, with files in `folder`, to continue `run_id`
    after step `first`. Raises ConfigError for a missing package or a login that is refused."""
    trackers = []
    if config.train.tensorboard:
        require_package("tensorboardX", "train.tensorboard=true", "tensorboard")
        trackers.append(_tensorboard(folder / "tensorboard", first))
    if config.train.wandb:
        require_package("wandb", f"train.wandb={config.train.wandb}", "wandb")
        trackers.append(_weights_and_biases(config, folder, run_id))
    return trackers


def _tensorboard(folder: Path, first: int) -> Tracker:
    """Event files in a folder. Scalars alone: `name` or, of a list, `name/0`, `name/1`, ..."""
    from tensorboardX import SummaryWriter

    # Hides later steps, written by a process that died.
    writer = SummaryWriter(str(folder), purge_step=first + 1)

    def write(step: int, values: Mapping[str, Any]) -> None:
        for name, value in scalars(values):
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(write, writer.close)


def _weights_and_biases(config: RunConfig, folder: Path, run_id: str) -> Tracker:
    import wandb

    try:
        run = wandb.init(
            project=config.train.wandb,
            dir=folder,
            id=run_id,
            name=Path(config.folder).name,
            config=to_dict(config),
            resume="allow",
            # The progress display is for a terminal, not for a log file.
            settings=wandb.Settings(console="off"),
        )
    except wandb.errors.Error as error:
        raise ConfigError(
            f"train.wandb={config.train.wandb} cannot be used: {error}; `wandb login`, or "
            "WANDB_MODE=offline in the environment, would work."
        ) from None
    return Tracker(lambda step, values: run.log(dict(scalars(values)), step=step), run.finish)


def scalars(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers in `values`, `name/key` for lists and mappings, without text and nested lists."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", number) for key, number in scalars(value))
        elif isinstance(value, list):
            numbers = {f"{name}/{i}": x for i, x in enumerate(value) if isinstance(x, int | float)}
            yield from scalars(numbers)
        elif isinstance(value, int | float):
            yield name, value
