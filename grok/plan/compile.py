"""Compiles a step for a slice in a process of its own, and prices what was found."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grok.config import RunConfig
from grok.config.load import to_dict
from grok.errors import ConfigError, GrokError
from grok.plan.estimate import Plan, Price, make_plan
from grok.plan.topology import Slice

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # No TPU is here to be asked or locked.
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # its entries want a device to be loaded on
}
STDERR_LINES = 20


def compile_plan(
    config: RunConfig,
    slice_: Slice,
    price: Price | None,
    tell: Callable[[str], None],
    dump: Path | None = None,
    save: Path | None = None,
) -> Plan:
    """The plan of `config.plan.program` on a slice, or several; `tell` is given what goes on.

    `dump` gets the compiled program's text, `save` its serialised executable. Raises GrokError in
    one sentence for what cannot be planned.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "libtpu, which compiles for TPUs, is not installed; `pip install 'grok[tpu]'` brings "
            "it to Linux on x86-64, with or without a TPU."
        )
    for file in (dump, save):
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{file} cannot be written: there is no folder {file.parent}.")
    request = {"config": to_dict(config), "topology": slice_.name, "slices": slice_.count}
    request |= {name: str(file) for name, file in (("dump", dump), ("save", save)) if file}
    found = _run_worker(request, tell)
    if "account" in found:
        found["needed"] = needed_bytes(found["account"] or "", found["state"])
    return make_plan(config, slice_, found, price)


def _run_worker(request: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """What `grok.plan.compile_process` found; its phases are told as they come."""
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "grok.plan.compile_process"],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert process.stdin and process.stdout
        message: dict[str, Any] = {}
        try:
            with process.stdin, process.stdout:
                json.dump(request, process.stdin)
                process.stdin.close()
                for line in process.stdout:
                    message = json.loads(line)
                    if "phase" in message:
                        tell(message["phase"])
            code = process.wait()
        finally:
            # A compiler does not hear an interrupt.
            process.kill()
            process.wait()
        stderr.seek(0)
        last = "".join(stderr.readlines()[-STDERR_LINES:])
    if "error" in message:
        error = GrokError(message["error"])
        error.exit_code = message["code"]
        raise error
    if code == -signal.SIGKILL:
        raise GrokError(
            "the process that compiles was killed, as when this machine's memory runs out; one "
            "with more would work."
        )
    if "found" not in message:
        raise RuntimeError(f"the process that compiles ended with code {code}:\n{last}")
    return message["found"]


def needed_bytes(account: str, state: int) -> float | None:
    """Bytes that a device would need in all, from the compiler's account of why it has too few;
    None where the account does not say."""
    size = r"([\d.]+)([KMGT]?)"
    of_temporaries = re.search(rf"HLO temporaries \({size}\) exceeds", account)
    of_all = re.search(rf"(?:Used |\(){size}(?: of|\) exceeds)", account)
    found = of_temporaries or of_all
    if found is None:
        return None
    number = float(found[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[found[2]]
    return number + (state if of_temporaries else 0)
