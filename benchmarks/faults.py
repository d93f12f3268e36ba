"""Breaks runs of two hosts at random moments, restarts them, and compares how they end.

    python -m benchmarks.faults --times 10
    python -m benchmarks.faults --kinds kill hang --times 2 --seed 7

Run it from the root of the repository. Two processes with two simulated devices each, connected
over loopback, train a tiny model for 60 steps with a checkpoint every 10 steps: first undisturbed,
then from the checkpoint of step 10 with one fault each:

    kill      SIGKILL of one host
    term      SIGTERM of one host
    disk      the checkpoints' file system (its own tmpfs: needs root) is full during a save
    truncate  a file of the newest checkpoint is truncated between starts
    hang      SIGSTOP of one host
    nan       a learning rate of 1e38 for one start, until every gradient is NaN

A small launcher follows the exit codes: it restarts the run, or stops and lets a "person" repair
the cause (frees disk space, resets the learning rate). For each kind, the table has the exit codes
of both hosts at the fault, the number of steps that the next start repeated, and the number of
runs whose losses, gradient norms and parameters all equal the undisturbed run's bit for bit. Ends
with a line of JSON.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from grok.data.tokenizers.sentencepiece import train_tokenizer
from grok.errors import DIVERGED, DONE, REFUSED
from grok.train.telemetry.event_log import read_events
from grok.train.telemetry.metrics_file import read_metrics
from grok.weights.orbax.source import OrbaxSource
from tests.train.several_hosts import Hosts

STEPS, EVERY, FIRST = 60, 10, 10
HANG_SECONDS = 10
MOST_STARTS = 5
ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}
CONFIG = """
model: {{vocab_size: 320, num_layers: 1, embed_dim: 32, moe: {{dim: 64}},
  attention: {{num_heads: 4, num_kv_heads: 2, head_dim: 8}},
  context_length: 64, compute_dtype: float32, remat: none}}
mesh: {{data: 2, expert: 2, simulated_devices: 4}}
data: {{train: [{folder}/text.txt], tokenizer: {folder}/t.model, sequence_length: 32,
  batch_size: 8}}
optimizer: {{peak_lr: 0.01, warmup_steps: 2}}
train: {{steps: {steps}, log_every: 1, max_bad_steps: 5, heartbeat_timeout_seconds: 30}}
checkpoint: {{every: {every}, keep: 10}}
"""


@dataclasses.dataclass
class Outcome:
    """One broken run: exit codes of the hosts at the fault, steps done twice, how it ended."""

    codes: list[int]
    lost: int
    equal: bool
    starts: int
    note: str


class Workplace:
    """Everything that the runs share: the config, the undisturbed run, random numbers."""

    def __init__(self, folder: Path, seed: int):
        """Prepares text and config in `folder`, and makes the undisturbed run."""
        self.folder, self.random = folder, random.Random(seed)
        text = "".join(f"{i} comes after {i - 1}, and {i * i} is its square.\n" for i in range(400))
        (folder / "text.txt").write_text(text)
        train_tokenizer([folder / "text.txt"], folder / "t.model", 320)
        (folder / "run.yaml").write_text(CONFIG.format(folder=folder, steps=STEPS, every=EVERY))
        self.straight = folder / "straight"
        codes = self.start(self.straight).codes()
        if codes != [DONE, DONE]:
            raise SystemExit(f"the undisturbed run ended with {codes}; see {folder}")
        self.result = result_of(self.straight)

    def start(self, run: Path, *overrides: str) -> Hosts:
        """Starts both hosts of the run in folder `run`."""
        log = run.with_name(f"{run.name}-logs-{time.monotonic_ns()}")
        command = [str(self.folder / "run.yaml"), f"folder={run}", *overrides]
        environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(self.folder / "cache")}
        return Hosts([command, command], log, environment)

    def copy(self, name: str, newest: int) -> Path:
        """The undisturbed run as it was when `newest` was its newest checkpoint."""
        run = self.folder / name
        run.mkdir()
        for step in range(EVERY, newest + 1, EVERY):
            saved = f"checkpoints/{step}"
            shutil.copytree(self.straight / saved, run / saved)
        lines = (self.straight / "metrics.jsonl").read_text().splitlines(keepends=True)
        lines_kept = [line for line in lines if json.loads(line)["step"] <= newest]
        (run / "metrics.jsonl").write_text("".join(lines_kept))
        return run

    def a_step(self) -> int:
        """A step, between the first checkpoint and the end, at which something happens."""
        return self.random.randint(FIRST + 1, STEPS - 2)

    def wait_for(self, hosts: Hosts, run: Path, step: int) -> None:
        """Until `step` is done, and then for a part of a step."""
        hosts.wait_until(lambda: newest_step(run) >= step)
        time.sleep(self.random.uniform(0, 0.1))


# ---- the launcher


def go_on(workplace: Workplace, run: Path) -> int:
    """Starts the run again until it is done, as its exit codes ask; the number of starts."""
    for number in range(1, MOST_STARTS + 1):
        codes = ended(workplace.start(run))
        if set(codes) == {DONE}:
            return number
        if {REFUSED, DIVERGED} & set(codes):
            break
    raise SystemExit(f"{run} ended with {codes} after start {number}; its logs are beside it")


def ended(hosts: Hosts) -> list[int]:
    """Exit codes of both hosts. One that does not follow the other is killed, as a stopped one
    must be."""
    hosts.wait_until(lambda: False)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return hosts.codes(timeout=40)
    hosts.kill()
    return hosts.codes()


def newest_step(run: Path) -> int:
    """The newest step in the run's metrics; 0 while there are none."""
    path = run / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.exists() else 0


def result_of(run: Path) -> tuple:
    """Returns the figures of all steps and a hash of the parameters, which must be equal."""
    clock = ("tokens_per_second", "mfu", "host_seconds", "wait_seconds", "chip_seconds")
    clock += ("slow_host", "slow_host_reason")
    lines = [
        {key: value for key, value in line.items() if key not in clock}
        for line in read_metrics(run / "metrics.jsonl")
        if "loss" in line
    ]
    source = OrbaxSource(run)
    digest = hashlib.sha256(source.step.encode().rsplit(b"/", 1)[-1])
    for name, spec in source.tensors.items():
        digest.update(source.read(name, spec.full_part).tobytes())
    return [line["step"] for line in lines], lines, digest.hexdigest()


def outcome(
    workplace: Workplace, run: Path, codes: list[int], done: int, note: str = ""
) -> Outcome:
    """Starts a broken run again and says what came of it; `done`: steps before the fault."""
    starts = go_on(workplace, run)
    first = min(resumed_after(run, starts))
    return Outcome(codes, max(0, done - first), result_of(run) == workplace.result, starts, note)


def resumed_after(run: Path, starts: int) -> list[int]:
    """The steps that the last `starts` starts went on from."""
    events = read_events(run / "events.jsonl")
    return [line["step"] for line in events if line["event"] == "resumed"][-starts:]


# ---- the faults


def kill(workplace: Workplace, run: Path) -> Outcome:
    """SIGKILL of one host."""
    return struck(workplace, run, signal.SIGKILL)


def term(workplace: Workplace, run: Path) -> Outcome:
    """SIGTERM of one host."""
    return struck(workplace, run, signal.SIGTERM)


def hang(workplace: Workplace, run: Path) -> Outcome:
    """SIGSTOP of one host: it still lives, and answers nobody."""
    return struck(workplace, run, signal.SIGSTOP, f"train.hang_timeout_seconds={HANG_SECONDS}")


def struck(workplace: Workplace, run: Path, number: int, *overrides: str) -> Outcome:
    """A signal to one host, at a random step."""
    hosts, host = workplace.start(run, *overrides), workplace.random.randrange(2)
    workplace.wait_for(hosts, run, workplace.a_step())
    struck_at = newest_step(run)
    hosts.processes[host].send_signal(number)
    began = time.monotonic()
    codes = ended(hosts)
    note = f"host {host} at step {struck_at}, all ended in {time.monotonic() - began:.0f} s"
    return outcome(workplace, run, codes, newest_step(run), note)


def truncate(workplace: Workplace, run: Path) -> Outcome:
    """A file of the newest checkpoint, a random one, loses its end."""
    newest = max(int(path.name) for path in (run / "checkpoints").iterdir())
    files = [path for path in (run / "checkpoints" / str(newest)).rglob("*") if path.is_file()]
    file = workplace.random.choice([path for path in sorted(files) if path.stat().st_size])
    size = file.stat().st_size
    left = workplace.random.randrange(size)
    with file.open("rb+") as opened:
        opened.truncate(left)
    note = f"{file.relative_to(run)} from {size} to {left} bytes"
    return outcome(workplace, run, [], newest, note)


def disk(workplace: Workplace, run: Path) -> Outcome:
    """The disk of the checkpoints has room for a random part of what is to be saved."""
    folder = run / "checkpoints"
    original = run.with_name(f"{run.name}-original")
    folder.rename(original)
    folder.mkdir()
    size = sum(path.stat().st_size for path in original.rglob("*") if path.is_file())
    # tmpfs counts whole pages, and folders.
    room = int(size * workplace.random.uniform(2.5, 5.5))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder], check=True)
    try:
        shutil.copytree(original, folder, dirs_exist_ok=True)
        hosts = workplace.start(run)
        codes = ended(hosts)
        done = newest_step(run)
        subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
        return outcome(workplace, run, codes, done, f"room for {room / size:.1f} checkpoints")
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False)


def nan(workplace: Workplace, run: Path) -> Outcome:
    """A learning rate that takes every parameter out of float32's range."""
    hosts = workplace.start(run, "optimizer.peak_lr=1e38", "--resume")
    codes = ended(hosts)
    named = "layers/" in hosts.output(0)
    return outcome(workplace, run, codes, 0, "tensors named" if named else "tensors NOT named")


KINDS: dict[str, Callable[[Workplace, Path], Outcome]] = {
    kind.__name__: kind for kind in (kill, term, disk, truncate, hang, nan)
}


# ---- the table


def main() -> None:
    """Runs the faults that were asked for, and prints what it saw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--times", type=int, default=10, help="faults of each kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--folder", type=Path, help="where to work, and leave everything")
    options = parser.parse_args()
    with workfolder(options.folder) as folder:
        began = time.monotonic()
        workplace = Workplace(folder, options.seed)
        print(f"undisturbed: {STEPS} steps in {time.monotonic() - began:.0f} s", flush=True)
        results = {kind: several(workplace, kind, options.times) for kind in options.kinds}
    print(
        f"\n{'fault':10}{'runs':>5}{'equal':>6}{'steps lost':>12}{'starts':>8}  exit codes (hosts)"
    )
    for kind, outcomes in results.items():
        print(row(kind, outcomes))
    print(json.dumps({kind: list(map(dataclasses.asdict, results[kind])) for kind in results}))


def several(workplace: Workplace, kind: str, times: int) -> list[Outcome]:
    """A fault, so many times."""
    outcomes = []
    for number in range(times):
        newest = FIRST
        if kind in ("truncate", "nan"):
            newest = EVERY * workplace.random.randint(2, STEPS // EVERY - 1)
        began = time.monotonic()
        run = workplace.copy(f"{kind}-{number}", newest)
        outcomes.append(KINDS[kind](workplace, run))
        seconds = time.monotonic() - began
        print(f"{kind} {number}: {outcomes[-1]} in {seconds:.0f} s", flush=True)
        if outcomes[-1].equal:
            for path in workplace.folder.glob(f"{kind}-{number}*"):
                shutil.rmtree(path)
    return outcomes


def row(kind: str, outcomes: list[Outcome]) -> str:
    """A line of the table."""
    lost = [o.lost for o in outcomes]
    codes = collections.Counter(str(tuple(sorted(o.codes))) for o in outcomes)
    starts = max(o.starts for o in outcomes)
    counts = ", ".join(f"{number} x {code}" for code, number in codes.most_common())
    equal = sum(o.equal for o in outcomes)
    steps = f"{min(lost)} to {max(lost)}"
    return f"{kind:10}{len(outcomes):5}{equal:6}{steps:>12}{starts:8}  {counts}"


@contextlib.contextmanager
def workfolder(folder: Path | None) -> Iterator[Path]:
    """The folder that was asked for, or one that goes when all is done."""
    if folder is not None:
        folder.mkdir(parents=True)
        yield folder.absolute()
    else:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            yield Path(name)


if __name__ == "__main__":
    main()
