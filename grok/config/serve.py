"""The config of `grok serve` from what its command names: weights, a YAML file, or a preset."""

from collections.abc import Sequence

from grok.config.infer import ServeConfig
from grok.config.load import from_dict, load_config, presets, to_dict

PRESETS_FOLDER = "serve"


def load_serve_config(name: str, overrides: Sequence[str] = ()) -> ServeConfig:
    """The config of a YAML file; that of a preset in configs/serve, which gives model, type of
    products, mesh and engine to weights that an override names; or else that of the weights called
    `name`. Raises ConfigError."""
    if name.endswith((".yaml", ".yml")):
        return load_config(name, overrides, ServeConfig)
    file = presets().get(name)
    if file is None or file.parent.name != PRESETS_FOLDER:
        return from_dict({"weights": name}, name, overrides, ServeConfig)
    run = load_config(file)
    data = {"model": name, "mesh": to_dict(run.mesh), "engine": to_dict(run.engine)}
    data["matmul_dtype"] = run.model.matmul_dtype
    return from_dict(data, str(file), overrides, ServeConfig)
