"""Experiment trackers that metrics are sent to: TensorBoard, Weights & Biases."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grok.config import RunConfig
from grok.config.load import to_dict
from grok.errors import ConfigError


def open_trackers(config: RunConfig, folder: Path, run_id: str, first: int) -> "list[Tracker]":
    """Opens the trackers of `train.tensorboard` and `train.wandb`, with files in `folder`; they
    continue the run `run_id` after step `first`.

    Raises ConfigError when a package is missing, or the service refuses the login.
    """
    extras = []
    if config.train.tensorboard:
        extras.append(("train.tensorboard=true", "tensorboardX", "tensorboard"))
    if config.train.wandb:
        extras.append((f"train.wandb={config.train.wandb}", "wandb", "wandb"))
    for key, package, extra in extras:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{key} needs {package}, which is not installed; `pip install 'grok[{extra}]'` "
                "would install it."
            )
    return [
        *([TensorBoard(folder / "tensorboard", first)] if config.train.tensorboard else []),
        *([WeightsAndBiases(config, folder, run_id)] if config.train.wandb else []),
    ]


class TensorBoard:
    """Event files in a folder. Scalars alone: `name` or, of a list, `name/0`, `name/1`, ..."""

    def __init__(self, folder: Path, first: int):
        from tensorboardX import SummaryWriter

        # Hides later steps, written by a process that died.
        self._writer = SummaryWriter(str(folder), purge_step=first + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a point to each curve."""
        for name, value in scalars(values):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the files."""
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B, which a resumed run goes on with."""

    def __init__(self, config: RunConfig, folder: Path, run_id: str):
        import wandb

        try:
            self._run = wandb.init(
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

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs the values of a step."""
        self._run.log(dict(scalars(values)), step=step)

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


Tracker = TensorBoard | WeightsAndBiases


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
