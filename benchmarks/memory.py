"""Memory of this process."""

from pathlib import Path


def resident_bytes() -> int:
    """Bytes of memory that this process has now."""
    return _bytes("VmRSS")


def peak_bytes() -> int:
    """The most that it has had."""
    return _bytes("VmHWM")


def _bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
