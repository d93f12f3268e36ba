"""Compiles a step for a slice in a process of its own, and estimates its time and price."""

import dataclasses
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
from grok.errors import ConfigError, GrokError, how_to_install
from grok.plan.calibration import Calibration, with_ratio
from grok.plan.compile_errors import crash_error
from grok.plan.estimate import Plan, Price, make_plan
from grok.plan.rates import published_rates
from grok.plan.topology import Slice

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no TPU to query or lock
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # its entries need a device to load
}


def compile_plan(
    config: RunConfig,
    slice_: Slice,
    price: Price | None,
    on_phase: Callable[[str], None],
    dump: Path | None = None,
    save: Path | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The plan of `config.plan.program` on one or several slices; GrokError if there is none.
    on_phase: called with each phase of the compilation; dump: file for the compiled program's text;
    save: file for the serialised executable; calibration: rates in place of the
    published."""
    if calibration is not None:
        calibration.check_slice(slice_)
    if importlib.util.find_spec("libtpu") is None:
        problem = "libtpu, which compiles for TPUs, with or without one, is not installed"
        where = "on Linux on x86-64"
        raise ConfigError(f"{problem}; {where} {how_to_install('tpu')}.")
    for file in (dump, save):
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{file} cannot be written: there is no folder {file.parent}.")
    rates = published_rates(slice_.generation)
    if calibration is not None:
        rates = calibration.rates(config)
    request = {"config": to_dict(config), "topology": slice_.name, "slices": slice_.count}
    request["rates"] = dataclasses.asdict(rates)
    request |= {name: str(file) for name, file in (("dump", dump), ("save", save)) if file}
    measured = _run_process(request, on_phase)
    if "compiler_message" in measured:
        measured["required"] = required_bytes(measured["compiler_message"] or "", measured["state"])
    plan = make_plan(config, slice_, rates, measured, price)
    return plan if calibration is None else with_ratio(plan, calibration)


def _run_process(request: dict[str, Any], on_phase: Callable[[str], None]) -> dict[str, Any]:
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
                # It stays open: where it ends, as this process does, the other ends, too.
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                for line in process.stdout:
                    message = json.loads(line)
                    if "phase" in message:
                        on_phase(message["phase"])
            code = process.wait()
        finally:
            process.kill()  # the compiler ignores interrupts
            process.wait()
        stderr.seek(0)
        stderr_end = "".join(stderr.readlines()[-20:])
    if "error" in message:
        error = GrokError(message["error"])
        error.exit_code = message["code"]
        raise error
    if code == -signal.SIGKILL:
        problem = "the process that compiles was killed, as when memory runs out"
        raise GrokError(f"{problem}; a machine with more would work.")
    if code < 0:
        raise crash_error(signal.Signals(-code).name, stderr_end)
    if "measured" not in message:
        raise RuntimeError(f"the process that compiles ended with code {code}:\n{stderr_end}")
    return message["measured"]


def required_bytes(compiler_message: str, state: int) -> float | None:
    """Bytes that a device would need, if the compiler's message that it has too few says so."""
    size = r"([\d.]+)([KMGT]?)"
    temporaries = re.search(rf"HLO temporaries \({size}\) exceeds", compiler_message)
    match = temporaries or re.search(rf"(?:Used |\(){size}(?: of|\) exceeds)", compiler_message)
    if match is None:
        return None
    number = float(match[1]) * {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[match[2]]
    return number + (state if temporaries else 0)
