"""Architectures are switches of the config: names of models stand in presets and adapters alone."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "grok"
FAMILIES = re.compile(r"grok[-_ ]?[12]|mixtral|mistral|llama|gemma|qwen|deepseek|\bxai\b", re.I)


@pytest.mark.parametrize("package", ["model", "ops", "sharding", "optim"])
def test_no_models_name_in(package):
    named = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FAMILIES.search(line)
    ]
    assert named == []
