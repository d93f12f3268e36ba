"""The wheel, installed in an empty environment, with an empty home, outside the clone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.prove
ROOT = Path(__file__).parents[2]


def test_the_quickstart_runs_from_a_wheel(tmp_path):
    home, python = tmp_path / "home", tmp_path / "env" / "bin" / "python"
    home.mkdir()
    uv = ["uv", "--quiet"]
    run([*uv, "build", "--wheel", "--out-dir", tmp_path, ROOT], home)
    [wheel] = tmp_path.glob("*.whl")
    run([*uv, "venv", "--python", sys.executable, tmp_path / "env"], home)
    lock = ["--constraint", ROOT / "requirements.lock"]
    run([*uv, "pip", "install", "--python", python, *lock, wheel], home)
    grok = python.with_name("grok")
    run([grok, "quickstart"], home)
    assert (home / "runs" / "quickstart" / "quickstart.png").is_file()
    assert "moe" in run([grok, "config", "grok-1"], home)
    missing = subprocess.run([grok, "serve", "runs/quickstart"], cwd=home, capture_output=True)
    assert b"`pip install 'grok-jax[serve]'` elsewhere, installs it" in missing.stderr


def run(command: list, home: Path) -> str:
    # Not what tests set for their own devices and caches.
    own = {
        name: value
        for name, value in os.environ.items()
        if name[:4] not in ("JAX_", "XLA_", "XDG_")
    }
    environment = own | {"HOME": str(home)}
    done = subprocess.run(
        list(map(str, command)), cwd=home, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
