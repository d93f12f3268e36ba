"""Kernels of the experts compile ahead of time at the widths that were once refused, and at the
widest; benchmarks/kernel_sweep.py tries them all.

pytest -n 0 -m prove -s tests/prove/test_kernel_sweep.py
"""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.prove


@pytest.mark.parametrize(
    ("chip", "embed", "width", "count"),
    [
        ("v4", 4096, 14336, 11),  # a core has 16 MiB
        ("v5p", 4096, 14336, 22),  # whole experts of Mixtral 8x7B
        ("v6e", 6144, 16384, 22),  # and of Mixtral 8x22B
        ("7x", 8192, 32768, 18),
    ],
)
def test_kernels_compile(chip, embed, width, count):
    shape = ["--chip", chip, "--embed", str(embed), "--width", str(width), "--rows", "16384"]
    command = [sys.executable, "-m", "benchmarks.kernel_sweep", *shape]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0
    assert f"{count} of {count}" in done.stdout
