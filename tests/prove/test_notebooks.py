"""The notebooks of docs/: their cells run one after the other, as in a kernel of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.prove
NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


def script_of(notebook: Path) -> str:
    """The code cells of a notebook, one below the other."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_run(notebook: Path, tmp_path: Path):
    # Not the devices of tests.
    own = {name: value for name, value in os.environ.items() if name[:4] not in ("JAX_", "XLA_")}
    done = subprocess.run(
        [sys.executable, "-c", script_of(notebook)],
        cwd=tmp_path,
        env={**own, "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
