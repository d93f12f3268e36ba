"""The cloud that tests of the launch scripts see: a stub gcloud, and workers that are folders."""

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"

# Imported, so that Python keeps it compiled: tests call it hundreds of times.
STUB_GCLOUD = (
    f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import stub_gcloud; "
    "sys.exit(stub_gcloud.main(sys.argv[1:]))"
)

# A worker's programs. `grok` does what the test planned for this start of this worker.
WORKER_PROGRAMS = {
    "hostname": 'echo "$STUB_HOSTNAME"',
    "curl": 'echo "${@: -1}" >>"$STUB/asked"; [[ -e $STUB/healthy-$STUB_WORKER ]]',
    "sudo": '[[ $1 == -n ]] && shift; exec "$@"',
    "uv": """
        printf '%s\\n' "$*" >>"$STUB/uv"
        [[ ! -e $STUB/uv-fails-on-$STUB_WORKER ]] || { echo 'uv: no space left'; exit 1; }
        if [[ $1 == venv ]]; then
          mkdir -p "${@: -1}/bin" && cp "$STUB/worker-bin/venv/"* "${@: -1}/bin/"
        fi""",
    "venv/python": """
        [[ $2 == *local_device_count* ]] || exec {python} "$@"
        cat "$STUB/devices-$STUB_WORKER" 2>/dev/null || cat "$STUB/devices\"""",
    "venv/grok": """
        start=$(($(cat "$STUB/starts-$STUB_WORKER" 2>/dev/null || echo 0) + 1))
        echo "$start" >"$STUB/starts-$STUB_WORKER"
        printf '%s\\0' "$@" >"$STUB/arguments-$STUB_WORKER"
        env -0 >"$STUB/environment-$STUB_WORKER"
        for word in "$@"; do case $word in folder=* | output=*) folder=${word#*=} ;; esac; done
        step() {
          mkdir -p "$folder" && printf '{"step": %s, "loss": %s}\\n' "$1" "0.$1" \\
            >>"$folder/metrics.jsonl"
        }
        shard() {
          mkdir -p "$folder/answers" && touch "$folder/answers/00000$1.jsonl"
          printf '{\n "shard_size": 10,\n "input": {\n  "requests": 25\n }\n}' >"$folder/job.json"
        }
        asked() { wc -l <"$STUB/asked" 2>/dev/null || echo 0; }
        until_asked_again() { local n; n=$(asked); until (($(asked) > n)); do sleep 0.02; done; }
        healthy() { touch "$STUB/healthy-$STUB_WORKER" && until_asked_again && until_asked_again; }
        until_asked() { trap 'exit 75' TERM; while :; do sleep 0.02; done; }
        forever() { trap '' TERM; while :; do sleep 0.02; done; }
        plan=$STUB/plans/$start-$STUB_WORKER
        [[ -e $plan ]] || plan=$STUB/plans/$start
        [[ -e $plan ]] || plan=$STUB/plans/last
        source "$plan\"""",
}


def make_checkout(folder: Path) -> Path:
    """A small repository with the launch scripts in it, everything committed."""
    shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("settings.env"))
    for name in ("Makefile", ".python-version"):
        shutil.copy(ROOT / name, folder)
    for name in ("requirements.lock", "requirements-uv.lock"):
        (folder / name).write_text("jax==0\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all")
    return folder


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    command = ["git", "-C", folder, *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Cloud:
    """One test's cloud, in a folder of its own; `checkout` has the scripts and the code to send."""

    def __init__(self, folder: Path, checkout: Path):
        self.folder, self.checkout = folder, checkout
        self.stub = folder / "stub"
        for name in ("bin", "worker-bin/venv", "plans", "workers", "answers", "bucket"):
            (self.stub / name).mkdir(parents=True)
        self.program(
            "bin/gcloud", f'exec {sys.executable} -I -S -c {shlex.quote(STUB_GCLOUD)} "$@"'
        )
        self.program("bin/grok", 'printf "%s\\n" "$*" >>"$STUB/checked"')
        for name, body in WORKER_PROGRAMS.items():
            self.program(f"worker-bin/{name}", body.replace("{python}", sys.executable))
        self.run_folder = folder / "run"
        self.devices(8)
        self.plan(last="step 1; exit 0")
        self.settings()
        self._cloud: dict[str, Any] = {
            "slice": None, "created": 0, "hosts": 1, "lives": [["ACTIVE"]], "failures": {},
            "ssh": {}, "message": "", "preempt_at": [], "worker_environment": {},
            "metrics": str(self.run_folder / "metrics.jsonl"), "checkpoints": "",
        }  # fmt: skip
        self._save()
        self.environment = {
            "PATH": f"{self.stub / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "STUB": str(self.stub),
            "LAUNCH_SETTINGS": str(self.settings_file),
            "LAUNCH_STATE": str(folder / "state"),
        }

    def program(self, name: str, body: str) -> None:
        """Makes a program of the laptop's (bin/) or the workers' (worker-bin/)."""
        path = self.stub / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def _save(self) -> None:
        (self.stub / "cloud.json").write_text(json.dumps(self._cloud))

    def script(self, **changes: Any) -> None:
        """Changes what the cloud will do: see stub_gcloud.py."""
        self._cloud = json.loads((self.stub / "cloud.json").read_text()) | changes
        self._save()

    @property
    def slice(self) -> dict[str, Any] | None:
        return json.loads((self.stub / "cloud.json").read_text())["slice"]

    def existing(self, *states: str, nodes: int = 1, **other: str) -> None:
        """There is a slice already, in the first of these states now."""
        self.script(created=1, slice={
            "name": "t", "accelerator": self.accelerator, "nodes": nodes,
            "states": list(states), "node_states": {}, "created": 1_700_000_000, **other,
        })  # fmt: skip

    def settings(self, **values: str) -> None:
        self.settings_file = self.folder / "settings.env"
        values = {
            "LAUNCH_PROJECT": "p", "LAUNCH_ZONE": "us-east5-a", "LAUNCH_NAME": "t",
            "LAUNCH_ACCELERATOR": "v5litepod-8",
            "LAUNCH_POLL_SECONDS": "0", "LAUNCH_BACKOFF_SECONDS": "0",
            "LAUNCH_CALL_SECONDS": "120", "LAUNCH_STOP_SECONDS": "5", **values,
        }  # fmt: skip
        self.accelerator = values["LAUNCH_ACCELERATOR"]
        lines = [f"{name}='{value}'\n" for name, value in values.items()]
        self.settings_file.write_text("".join(lines))

    def devices(self, count: int) -> None:
        (self.stub / "devices").write_text(f"{count}\n")

    def plan(self, *starts: str, **named: str) -> None:
        """What `grok` does at its first, second, ... start, and at every later one (last=)."""
        for number, body in enumerate(starts, start=1):
            (self.stub / "plans" / str(number)).write_text(body)
        for name, body in named.items():
            (self.stub / "plans" / name.replace("start_", "").replace("_worker_", "-")).write_text(
                body
            )

    def several_hosts(self, hosts: int) -> None:
        self.settings(LAUNCH_ACCELERATOR=f"v5p-{8 * hosts}")
        self.script(hosts=hosts)
        self.devices(4)

    def launch(
        self, verb: str, *words: str, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a verb; its lines are in stdout (the verb's) and stderr (messages)."""
        return subprocess.run(
            [self.checkout / "launch" / f"{verb}.sh", *words],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def ready(self, *states: str, nodes: int = 1) -> None:
        """A slice that is up, set up, and has a code to run."""
        self.existing(*states or ["ACTIVE"], nodes=nodes)
        for home in self.homes():
            launch = home / "grok-launch"
            (launch / "incoming").mkdir(parents=True)
            (launch / "code" / "abc").mkdir(parents=True)
            (launch / "src").symlink_to(launch / "code" / "abc")
            for name in ("worker.sh", "progress.sh"):
                shutil.copy(LAUNCH / name, launch)
            (launch / ".venv" / "bin").mkdir(parents=True)
            for program in (self.stub / "worker-bin" / "venv").iterdir():
                target = launch / ".venv" / "bin" / program.name
                target.write_bytes(program.read_bytes())
                target.chmod(program.stat().st_mode | stat.S_IXUSR)

    def answer(self, question: str, text: str, code: int = 0) -> None:
        """What gcloud says to a question, its words without options; to stderr if code is not 0."""
        name = question.replace(" ", "_").replace("/", "_")
        (self.stub / "answers" / name).write_text(f"{code}\n{text}\n")

    def after(self, words: str, *verbs: str) -> None:
        """Calls verbs once, as from another terminal, right after a call of gcloud with these
        words; what they say is in after_said."""
        scripts = [str(self.checkout / "launch" / f"{verb}.sh") for verb in verbs]
        plan = {"words": words, "scripts": scripts, "environment": self.environment}
        (self.stub / "after").write_text(json.dumps(plan))

    @property
    def after_said(self) -> str:
        return (self.stub / "after-said").read_text()

    def homes(self) -> list[Path]:
        """The homes of the slice's workers, first to last."""
        content = json.loads((self.stub / "cloud.json").read_text())
        slice_ = content["slice"]
        nodes = [slice_["name"]]
        if slice_["nodes"] > 1:
            nodes = [f"{slice_['name']}-{i}" for i in range(slice_["nodes"])]
        names = [f"t1v-{node}-w-{host}" for node in nodes for host in range(content["hosts"])]
        return [self.stub / "workers" / f"{slice_['created']}-{name}" for name in names]

    def calls(self, action: str = "") -> list[list[str]]:
        """The words of every call of gcloud, or of those about an action."""
        path = self.stub / "calls"
        calls = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
        return [call for call in calls if not action or " ".join(call[2:4]) == action]

    def starts(self, worker: int = 0) -> int:
        path = self.stub / f"starts-{worker}"
        return int(path.read_text()) if path.exists() else 0

    def wait_for(self, path: Path) -> None:
        """Until a file that a process of ours is about to write is there."""
        subprocess.run(
            ["bash", "-c", "until [[ -e $1 ]]; do sleep 0.02; done", "wait", path],
            timeout=30,
            check=True,
        )

    def end(self) -> None:
        """Ends what still runs on the workers: processes that have this test's environment."""
        mine = f"STUB={self.stub}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mine in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
