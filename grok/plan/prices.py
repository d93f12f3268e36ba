"""Prices of a chip-hour, from launch/prices.env, a dated file that people edit."""

import re
from pathlib import Path

from grok.config.load import configs_folder
from grok.errors import ConfigError
from grok.plan.estimate import Price


def prices_file() -> Path:
    """The file of the installed package, or of the repository: launch/prices.env."""
    folder = configs_folder()
    inside = folder / "prices.env"
    return inside if inside.is_file() else folder.parent / "launch" / "prices.env"


def price_of(generation: str, file: Path) -> Price | None:
    """The lowest on-demand price; None if the file has none, ConfigError if it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read as prices: {error}.") from None
    date = re.search(r'^PRICES_DATE="?([^"\n]*)', text, re.MULTILINE)
    price = re.search(rf"\bPRICE_{generation}_on_demand_LOW=([\d.]+)", text)
    if price is None:
        return None
    dated = date[1] if date else "without a date"
    return Price(float(price[1]), f"on demand, {file.name} {dated}")
