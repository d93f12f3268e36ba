"""The configs that come with the package, found by name."""

from pathlib import Path

from grok.config.run import RunConfig
from grok.errors import ConfigError

FOLDERS = {"RunConfig": ("models", "train", "serve"), "BatchConfig": ("batch",)}


def configs_folder() -> Path:
    """The folder of the presets: inside the installed package, or beside it in the repository."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def presets(config_type: type = RunConfig) -> dict[str, Path]:
    """Files of the presets of this type of config, by name: models first."""
    folders = FOLDERS.get(config_type.__name__, ())
    files = [file for name in folders for file in sorted((configs_folder() / name).glob("*.yaml"))]
    return {file.stem: file for file in files}


def find_config(name: str, beside: Path, config_type: type) -> Path:
    """The file `name`, relative to `beside`, or else the preset called `name`."""
    file = beside / name
    if file.is_file():
        return file
    known = presets(config_type)
    if name in known:
        return known[name]
    if file.is_dir():
        raise ConfigError(f"{file} is a folder, and a config is a YAML file.")
    names = f"the presets are {', '.join(known)}" if known else "one would work"
    raise ConfigError(f"there is no config file {file}; {names}.")
