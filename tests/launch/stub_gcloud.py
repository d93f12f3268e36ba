"""A `gcloud` for tests: queued resources that go through scripted states, and workers that are
folders of this machine, where what ssh is told runs for real. The test's Cloud scripts it."""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

STUB = Path(os.environ["STUB"])

# What these commands take, as the real gcloud (528) says; anything else is refused as there.
COMMON = {"zone", "project", "quiet"}
EVERYWHERE = COMMON | {"node", "worker", "batch-size", "internal-ip", "tunnel-through-iap"}
FLAGS = {
    "queued-resources create": COMMON
    | {"accelerator-type", "runtime-version", "node-id", "node-count", "node-prefix", "async"}
    | {"spot", "reserved", "guaranteed", "internal-ips", "network", "subnetwork"}
    | {"service-account", "scopes", "labels", "valid-until-duration"},
    "queued-resources describe": COMMON | {"format"},
    "queued-resources delete": COMMON | {"force", "async"},
    "queued-resources ssh": EVERYWHERE | {"command"},
    "queued-resources scp": EVERYWHERE,
    "tpu-vm describe": COMMON | {"format"},
}


def main(argv: list[str]) -> int:
    code = handle(argv)
    run_after(argv)
    return code


def run_after(argv: list[str]) -> None:
    """Calls the verbs that the test planned for the moment after this call, and before the next."""
    path = STUB / "after"
    if not path.exists():
        return
    plan = json.loads(path.read_text())
    if plan["words"] in " ".join(argv):
        import subprocess

        path.unlink()
        with (STUB / "after-said").open("w") as said:
            for script in plan["scripts"]:
                subprocess.run(
                    script, env=plan["environment"], stdout=said, stderr=said, check=False
                )


def handle(argv: list[str]) -> int:
    with (STUB / "calls").open("a") as calls:
        calls.write(json.dumps(argv) + "\n")
    if argv[:2] == ["storage", "cat"]:
        bucket = STUB / "bucket" / argv[3].removeprefix("gs://")
        sys.stdout.write(bucket.read_text() if bucket.exists() else "")
        return 0 if bucket.exists() else 1
    if argv[:2] == ["storage", "ls"]:
        found = sorted((STUB / "bucket").glob(argv[2].removeprefix("gs://")))
        print("".join(f"gs://{path.relative_to(STUB / 'bucket')}\n" for path in found), end="")
        return 0 if found else 1
    if argv[2:3] == ["tpu-vm"] and argv[-1:] and "list" in argv:
        print("it is there")
        return 0
    if argv[:2] != ["compute", "tpus"]:
        return answer(" ".join(word for word in argv if not word.startswith("-")))
    action = " ".join(argv[2:4])
    flags = dict(word[2:].partition("=")[::2] for word in argv[4:] if word.startswith("--"))
    words = [word for word in argv[4:] if not word.startswith("--")]
    if unknown := set(flags) - FLAGS.get(action, set()):
        return say(f"ERROR: (gcloud.compute.tpus) unrecognized arguments: --{unknown.pop()}", 2)
    with Cloud() as cloud:
        if failure := planned_failure(cloud, action):
            return say(f"ERROR: (gcloud.compute.tpus) {failure}", 1)
        if action == "queued-resources create":
            return create(cloud, words[0], flags)
        slice_ = cloud["slice"]
        if slice_ is None or not words[-1].startswith(slice_["name"]):
            return say(
                f"ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource '{words[-1]}' was not found"
            )
        if action == "queued-resources describe":
            return describe(cloud, slice_)
        if action == "queued-resources delete":
            end_workers(slice_)
            cloud["slice"] = None
            return say(f"Deleted queued_resource [{words[0]}].", 0)
        if action == "tpu-vm describe":
            state = node_state(slice_, words[0])
            print(f"{state}|HEALTHY|{cloud['hosts']}|{slice_['created']}.5")
            return 0
        targets = workers_of(cloud, slice_)
        behaviours = {name: next_of(cloud["ssh"], name) for name, _, _ in targets}
    if action == "queued-resources scp":
        return copy(targets, behaviours, words)
    return ssh(targets, behaviours, flags["command"])


class Cloud:
    """The cloud's memory in a file, one call of gcloud at a time."""

    def __enter__(self) -> dict:
        self.file = (STUB / "cloud.json").open("r+")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.content = json.load(self.file)
        return self.content

    def __exit__(self, *_: object) -> None:
        self.file.seek(0)
        self.file.truncate()
        json.dump(self.content, self.file)
        self.file.close()


def say(text: str, code: int = 1) -> int:
    print(text, file=sys.stderr)
    return code


def answer(question: str) -> int:
    """What doctor asks: a file of the test's with the answer, its first line the exit code."""
    path = STUB / "answers" / question.replace(" ", "_").replace("/", "_")
    if not path.exists():
        return say(f"ERROR: no answer for: {question}")
    code, _, text = path.read_text().partition("\n")
    print(text, end="", file=sys.stderr if int(code) else sys.stdout)
    return int(code)


def next_of(queues: dict, key: str) -> str | None:
    queue = queues.get(key)
    if not queue:
        return None
    if len(queue) == 1:
        (STUB / f"done-{key}").touch()
    return queue.pop(0)


def planned_failure(cloud: dict, action: str) -> str | None:
    return next_of(cloud["failures"], action)


def create(cloud: dict, name: str, flags: dict) -> int:
    if cloud["slice"]:
        return say("ERROR: (gcloud.compute.tpus) ALREADY_EXISTS")
    lives = cloud["lives"]
    cloud["created"] += 1
    cloud["slice"] = {
        "name": name,
        "accelerator": flags["accelerator-type"],
        "nodes": int(flags.get("node-count", 1)),
        "states": lives.pop(0) if len(lives) > 1 else list(lives[0]),
        "node_states": {},
        "created": 1_700_000_000 + 1000 * cloud["created"],
    }
    return say(f"Create request issued for: [{name}]", 0)


def describe(cloud: dict, slice_: dict) -> int:
    states = slice_["states"]
    state = states.pop(0) if len(states) > 1 else states[0]
    if cloud["preempt_at"] and newest_step(cloud) >= cloud["preempt_at"][0]:
        cloud["preempt_at"].pop(0)
        states[:] = [state := "SUSPENDED"]
    if state == "SUSPENDED":
        end_workers(slice_)
    state, _, node = state.partition("/")
    if node:
        name, _, what = node.partition("=")
        slice_["node_states"][name] = what
    print(f"{state}|{slice_['accelerator']}|{cloud['message'] if state == 'FAILED' else ''}")
    return 0


def newest_step(cloud: dict) -> int:
    """The newest that is saved, where the test names a folder of checkpoints; else that is done."""
    if cloud["checkpoints"]:
        saved = (path.name for path in Path(cloud["checkpoints"]).glob("*"))
        return max((int(name) for name in saved if name.isdecimal()), default=-1)
    path = Path(cloud["metrics"])
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}") and "loss" in line]
    return steps[-1] if steps else -1


def node_state(slice_: dict, node: str) -> str:
    return slice_["node_states"].get(node, "READY")


def workers_of(cloud: dict, slice_: dict) -> list[tuple[str, Path, dict]]:
    """Name, home and environment of every worker that ssh reaches: gcloud leaves out, with a
    warning, nodes that are gone."""
    nodes = [slice_["name"]]
    if slice_["nodes"] > 1:
        nodes = [f"{slice_['name']}-{i}" for i in range(slice_["nodes"])]
    targets = []
    for i, node in enumerate(nodes):
        if node_state(slice_, node) in ("PREEMPTED", "TERMINATED", "STOPPED"):
            say(f"TPUInUnusableTerminalState: {node}; attempting to ssh into the rest.")
            continue
        for host in range(cloud["hosts"]):
            name = f"t1v-{node}-w-{host}"
            home = STUB / "workers" / f"{slice_['created']}-{name}"
            home.mkdir(parents=True, exist_ok=True)
            environment = {
                "HOME": str(home),
                "PATH": f"{STUB / 'worker-bin'}:/usr/bin:/bin:/usr/sbin",
                "STUB": str(STUB),
                "STUB_WORKER": str(i * cloud["hosts"] + host),
                "STUB_HOSTNAME": name,
                "GROK_PROCESS_ID": str(i * cloud["hosts"] + host),
                "LAUNCH_WORKER_POLL": "0.02",
                "LAUNCH_DEVICES": str(home / "dev" / "*"),
                "LAUNCH_LIBTPU_LOCK": str(home / "libtpu_lockfile"),
                **cloud["worker_environment"],
            }
            targets.append((name, home, environment))
    return targets


def copy(targets: list, behaviours: dict, words: list[str]) -> int:
    import shutil  # here and below: most calls are over before such imports are

    *sources, destination = words
    code = 0
    for name, home, _ in targets:
        folder = home / destination.partition(":")[2]
        if behaviours[name] or not folder.is_dir():
            code = say(f"scp: {name}: {behaviours[name] or 'no such directory'}", 255)
            continue
        for source in sources:
            shutil.copy(source, folder)
    return code


def ssh(targets: list, behaviours: dict, command: str) -> int:
    """Runs the command on all workers at once; the first code that is not 0 is gcloud's."""
    import subprocess

    running, codes = [], []
    for name, home, environment in targets:
        say(f"SSH: Attempting to connect to worker {name}...", 0)
        behaviour = behaviours[name]
        if behaviour == "fail":
            codes.append(say(f"ssh: connect to host {name} port 22: Connection timed out", 255))
        elif behaviour == "hang":
            time.sleep(600)
        else:
            words = " ".join(command.split(" "))
            running.append(
                (
                    behaviour,
                    subprocess.Popen(
                        ["bash", "-c", words],
                        cwd=home,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE if behaviour == "drop" else None,
                    ),
                )
            )
    for behaviour, process in running:
        process.communicate()
        codes.append(255 if behaviour == "drop" else process.returncode)
    return next((code for code in codes if code), 0)


def end_workers(slice_: dict) -> None:
    """The machines are gone: their processes and their disks."""
    import shutil

    for home in (STUB / "workers").glob(f"{slice_['created']}-*"):
        mine = f"HOME={home}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mine in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        shutil.rmtree(home, ignore_errors=True)
