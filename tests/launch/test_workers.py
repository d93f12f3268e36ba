"""setup, sync, run, status, logs and stop, on workers that are folders of this machine."""

import subprocess

import pytest

from tests.launch.cloud import Cloud, git, make_checkout

COMMAND = ("--", "grok", "train", "tiny")


def test_setup_sync_run_status_logs_stop(cloud: Cloud) -> None:
    cloud.several_hosts(2)
    cloud.existing("ACTIVE")
    cloud.plan(last="echo ready to step; step 3; until_asked")
    for words in (["setup"], ["sync"], ["run", *COMMAND, f"folder={cloud.run_folder}"]):
        done = cloud.launch(*words)
        assert done.returncode == 0, done.stderr
    cloud.wait_for(cloud.run_folder / "metrics.jsonl")
    stamp = git(cloud.checkout, "rev-parse", "HEAD")[:12]
    status = cloud.launch("status").stdout
    assert "slice    t 1 x v5p-16 spot us-east5-a ACTIVE" in status
    assert "node     t READY HEALTHY, 2 hosts" in status
    assert "workers  2 of 2 running" in status
    assert f"code     {stamp}" in status
    assert f"run      step 3, loss 0.3, in {cloud.run_folder}" in status

    logs = cloud.launch("logs", "--lines", "5").stdout
    for worker in ("t1v-t-w-0", "t1v-t-w-1"):
        assert f"[{worker}] ready to step" in logs
        assert f"code {stamp}: exec grok train tiny folder=" in logs

    stopped = cloud.launch("stop")
    assert "t1v-t-w-1: exited, exit code 75, ended gently" in stopped.stdout
    assert "workers  2 of 2 exited with 75" in cloud.launch("status").stdout
    assert "exit code 75" in cloud.launch("logs").stdout


def test_setup_may_be_repeated_and_makes_the_environment_once(cloud: Cloud) -> None:
    cloud.existing("ACTIVE")
    assert [cloud.launch("setup").returncode for _ in range(2)] == [0, 0]
    calls = (cloud.stub / "uv").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["venv", "pip", "pip"]
    assert "--require-hashes" in calls[-1]


def test_setup_names_the_worker_that_sees_too_few_devices(cloud: Cloud) -> None:
    cloud.several_hosts(2)
    cloud.existing("ACTIVE")
    (cloud.stub / "devices-1").write_text("3\n")
    done = cloud.launch("setup")
    assert done.returncode == 1
    assert "t1v-t-w-1: JAX sees 3 devices here, expected 4" in done.stderr
    assert "retry the same command" in done.stderr


def test_setup_shows_what_failed_on_a_worker(cloud: Cloud) -> None:
    cloud.several_hosts(2)
    cloud.existing("ACTIVE")
    (cloud.stub / "uv-fails-on-1").touch()
    done = cloud.launch("setup")
    assert done.returncode == 1
    assert "[t1v-t-w-1] uv: no space left" in done.stdout
    assert "t1v-t-w-1: setup exited early; the lines above say why" in done.stderr


@pytest.mark.parametrize("verb", ["setup", "sync"])
def test_nothing_is_installed_under_a_live_run(cloud: Cloud, verb: str) -> None:
    cloud.ready()
    cloud.plan(last="until_asked")
    cloud.launch("run", *COMMAND)
    done = cloud.launch(verb)
    assert done.returncode == 1
    assert "a run is live here (pid " in done.stderr


def test_a_worker_that_ssh_does_not_reach_is_missed(cloud: Cloud) -> None:
    cloud.several_hosts(2)
    cloud.ready()
    cloud.script(ssh={"t1v-t-w-1": ["fail"]})
    done = cloud.launch("run", *COMMAND)
    assert done.returncode == 1
    assert "1 of 2 workers answered" in done.stderr
    assert "connect to host t1v-t-w-1 port 22: Connection timed out" in done.stderr
    assert cloud.starts(0) == 0


def test_a_node_that_gcloud_leaves_out_is_missed(cloud: Cloud) -> None:
    cloud.settings(LAUNCH_ACCELERATOR="v5litepod-16", LAUNCH_NODE_COUNT="2")
    cloud.script(hosts=4)
    cloud.ready("ACTIVE/t-1=PREEMPTED", nodes=2)
    status = cloud.launch("status")
    assert "node     t-1 PREEMPTED" in status.stdout
    assert "4 of 8 workers answered" in status.stderr


def test_an_ssh_that_hangs_is_cut_off(cloud: Cloud) -> None:
    cloud.ready()
    cloud.script(ssh={"t1v-t-w-0": ["hang"]})
    done = cloud.launch("status", LAUNCH_CALL_SECONDS="1")
    assert "0 of 1 worker answered" in done.stderr


def test_a_run_survives_the_connection_that_started_it(cloud: Cloud) -> None:
    cloud.ready()
    cloud.plan(last="until_asked")
    cloud.script(ssh={"t1v-t-w-0": [None, None, "drop"]})
    assert cloud.launch("run", *COMMAND).returncode == 1
    assert "workers  1 of 1 running" in cloud.launch("status").stdout
    again = cloud.launch("run", *COMMAND)
    assert (again.returncode, cloud.starts()) == (1, 1)
    assert "a run is live on t1v-t-w-0" in again.stderr


def test_a_start_that_is_refused_leaves_the_progress_of_the_live_run(cloud: Cloud) -> None:
    cloud.ready()
    cloud.plan(last="step 4; until_asked")
    assert cloud.launch("run", *COMMAND, f"folder={cloud.run_folder}").returncode == 0
    cloud.wait_for(cloud.run_folder / "metrics.jsonl")
    assert cloud.launch("run", *COMMAND, "folder=another").returncode == 1
    assert f"run      step 4, loss 0.4, in {cloud.run_folder}" in cloud.launch("status").stdout


def test_two_starts_at_once_make_one_run(cloud: Cloud) -> None:
    cloud.ready()
    cloud.plan(last="until_asked")
    [home] = cloud.homes()
    worker = home / "grok-launch"
    (worker / "run").mkdir()
    with subprocess.Popen(["flock", worker / "run" / "lock", "sleep", "60"]) as other:
        cloud.wait_for(worker / "run" / "lock")
        (worker / "run" / "pid").write_text(str(other.pid))
        done = cloud.launch("run", *COMMAND)
        other.kill()
    assert done.returncode == 1
    assert "a run is live " in done.stderr
    assert f"(pid {other.pid})" in done.stderr


@pytest.mark.parametrize("code", [0, 65, 134])
def test_the_exit_code_is_kept(cloud: Cloud, code: int) -> None:
    cloud.ready()
    cloud.plan(last=f"exit {code}")
    cloud.launch("run", *COMMAND)
    [home] = cloud.homes()
    cloud.wait_for(home / "grok-launch" / "run" / "exit")
    assert f"workers  1 of 1 exited with {code}" in cloud.launch("status").stdout


def test_a_command_that_ends_before_it_is_waited_for_keeps_its_code(cloud: Cloud) -> None:
    slow = '[[ $1 != */pid.new ]] || while kill -0 "$(cat "$1")"; do :; done 2>/dev/null'
    cloud.program("worker-bin/mv", slow + '\nexec /bin/mv "$@"')
    cloud.ready()
    cloud.launch("run", "--", "no-such-command")
    [home] = cloud.homes()
    cloud.wait_for(home / "grok-launch" / "run" / "exit")
    assert "workers  1 of 1 exited with 127" in cloud.launch("status").stdout


def test_a_machine_that_was_restarted_has_lost_its_run(cloud: Cloud) -> None:
    cloud.ready()
    [home] = cloud.homes()
    (home / "grok-launch" / "run").mkdir()
    for name, text in (("pid", "999999999"), ("lock", ""), ("progress", "")):
        (home / "grok-launch" / "run" / name).write_text(text)
    assert "workers  1 of 1 lost" in cloud.launch("status").stdout


def test_stop_ends_what_does_not_leave(cloud: Cloud) -> None:
    cloud.ready()
    cloud.plan(last="forever")
    cloud.launch("run", *COMMAND)
    done = cloud.launch("stop", LAUNCH_STOP_SECONDS="1")
    assert "t1v-t-w-0: exited, exit code 137, ended killed" in done.stdout


@pytest.mark.parametrize("state", ["", "WAITING_FOR_RESOURCES", "SUSPENDED"])
def test_stop_without_a_slice_that_is_ready_names_what_stays(cloud: Cloud, state: str) -> None:
    if state:
        cloud.existing(state)
    done = cloud.launch("stop")
    assert (done.returncode, cloud.calls("queued-resources ssh")) == (0, [])
    stays = f"t is {state}; it stays, and may cost money, until launch/down.sh"
    assert (stays if state else "there is no slice t in us-east5-a\n") in done.stderr


def test_a_second_stop_does_not_ask_again(cloud: Cloud) -> None:
    """A second SIGTERM would end a grok that still saves."""
    cloud.ready()
    cloud.plan(
        last="trap 'echo asked >>$STUB/asked' TERM; touch $STUB/up; while :; do sleep 0.02; done"
    )
    cloud.launch("run", *COMMAND)
    cloud.wait_for(cloud.stub / "up")
    stop = [cloud.checkout / "launch" / "stop.sh"]
    with subprocess.Popen(
        stop, env=cloud.environment | {"LAUNCH_STOP_SECONDS": "60"}, stdout=subprocess.DEVNULL
    ):
        cloud.wait_for(cloud.stub / "asked")
        assert cloud.launch("stop", LAUNCH_STOP_SECONDS="1").returncode == 0
    assert (cloud.stub / "asked").read_text() == "asked\n"


def test_stop_now_does_not_ask(cloud: Cloud) -> None:
    cloud.ready()
    cloud.plan(last="trap 'touch $STUB/asked; exit 75' TERM; while :; do sleep 0.02; done")
    cloud.launch("run", *COMMAND)
    done = cloud.launch("stop", "--now")
    assert "exit code 137, ended killed" in done.stdout
    assert "ending the run at once" in done.stderr
    assert not (cloud.stub / "asked").exists()


def test_stop_ends_who_holds_the_tpu_and_removes_the_lock(cloud: Cloud) -> None:
    cloud.ready()
    [home] = cloud.homes()
    (home / "dev").mkdir()
    (home / "dev" / "vfio0").touch()
    (home / "libtpu_lockfile").touch()
    with subprocess.Popen(
        ["bash", "-c", "exec 9<$1; sleep 60", "x", home / "dev" / "vfio0"]
    ) as held:
        done = cloud.launch("stop")
        assert held.wait(10) == -9
    assert "ended killed" in done.stdout
    assert not (home / "libtpu_lockfile").exists()


def test_logs_where_nothing_ran_say_so(cloud: Cloud) -> None:
    cloud.ready()
    for words in ([], ["--follow"]):
        assert "[t1v-t-w-0] no run has been started here" in cloud.launch("logs", *words).stdout


def test_following_logs_streams_lines_as_they_come(cloud: Cloud) -> None:
    cloud.ready()
    cloud.plan(last="echo the first; until_asked")
    cloud.launch("run", *COMMAND)
    command = [cloud.checkout / "launch" / "logs.sh", "--follow"]
    with subprocess.Popen(
        command, env=cloud.environment, stdout=subprocess.PIPE, text=True
    ) as logs:
        assert logs.stdout
        lines = iter(logs.stdout.readline, "")
        assert any("[t1v-t-w-0] the first" in line for line in lines)
        cloud.launch("stop")
        assert any("exit code 75" in line for line in lines)
        logs.kill()


def test_metrics_are_read_from_the_bucket(cloud: Cloud) -> None:
    cloud.ready()
    cloud.launch("run", *COMMAND, "folder=gs://b/runs/x")
    metrics = cloud.stub / "bucket" / "b" / "runs" / "x" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text('{"step": 120, "loss": 2.5}\n{"step": 130, "validation": 1}\n')
    assert "run      step 120, loss 2.5, in gs://b/runs/x" in cloud.launch("status").stdout
    metrics.write_text(
        '{"step": 140, "loss": 2.5, "slow_host": "w-7", "slow_host_reason": "a b"}\n'
    )
    held_up = "run      step 140, loss 2.5, held up by host w-7, in gs://b/runs/x"
    assert held_up in cloud.launch("status").stdout


@pytest.mark.parametrize("where", ["the workers", "the bucket"])
def test_progress_of_a_batch_is_its_shards(cloud: Cloud, where: str) -> None:
    cloud.ready()
    output = "gs://b/out" if where == "the bucket" else str(cloud.run_folder)
    there = cloud.stub / "bucket" / "b" / "out" if where == "the bucket" else cloud.run_folder
    cloud.plan(last=f"folder={there}; shard 0; shard 1; exit 0")
    assert cloud.launch("run", "--", "grok", "batch", "x", f"output={output}").returncode == 0
    [home] = cloud.homes()
    cloud.wait_for(home / "grok-launch" / "run" / "exit")
    assert f"run      2 of 3 shards, in {output}" in cloud.launch("status").stdout


def test_a_server_is_asked_at_the_address_of_its_config(cloud: Cloud) -> None:
    cloud.ready()
    cloud.program("bin/grok", """printf 'host: "0.0.0.0"  # address\\nport: 9000  # port\\n'""")
    assert cloud.launch("run", "--", "grok", "serve", "x").returncode == 0
    [progress] = cloud.folder.glob("state/*/progress")
    assert progress.read_text() == "serve 127.0.0.1:9000\n"


def test_a_command_whose_progress_cannot_be_seen_is_named(cloud: Cloud) -> None:
    cloud.ready()
    done = cloud.launch("run", *COMMAND)
    assert (done.returncode, "the command has no folder= or output=" in done.stderr) == (0, True)
    assert "run      step -, loss -\n" in cloud.launch("status").stdout


def test_status_without_a_slice(cloud: Cloud) -> None:
    assert "ABSENT" in cloud.launch("status").stdout


def test_changes_that_are_not_committed_travel_and_are_named(cloud: Cloud) -> None:
    cloud.checkout = make_checkout(cloud.folder / "checkout")
    cloud.ready()
    (cloud.checkout / "Makefile").write_text("# changed\n")
    (cloud.checkout / "unknown").touch()
    done = cloud.launch("sync")
    [home] = cloud.homes()
    source = home / "grok-launch" / "src"
    stamp = source.resolve().name
    assert stamp.startswith(git(cloud.checkout, "rev-parse", "HEAD")[:12] + "-dirty-")
    assert f"uncommitted changes are included, as {stamp}" in done.stderr
    assert "not sent: 1 untracked file (unknown): git add those that the run imports" in done.stderr
    assert (source / "Makefile").read_text() == "# changed\n"
    assert not (source / "unknown").exists()
    assert git(cloud.checkout, "status", "--short") == "M Makefile\n?? unknown"

    git(cloud.checkout, "checkout", "--quiet", "Makefile")
    cloud.launch("sync", "--again")
    assert (source / "Makefile").read_text() == "# changed\n"


def test_relative_folders_of_runs_outlive_new_code(cloud: Cloud) -> None:
    cloud.ready()
    cloud.launch("sync")
    cloud.launch("run", *COMMAND, "folder=runs/first")
    [home] = cloud.homes()
    cloud.wait_for(home / "grok-launch" / "run" / "exit")
    cloud.launch("sync")
    assert (home / "grok-launch" / "src" / "runs" / "first" / "metrics.jsonl").exists()


def test_of_many_files_that_are_not_sent_three_are_named(cloud: Cloud) -> None:
    cloud.checkout = make_checkout(cloud.folder / "checkout")
    cloud.ready()
    for name in ("a.py", "b.yaml", "c d", "e"):
        (cloud.checkout / name).touch()
    said = cloud.launch("sync").stderr
    assert "not sent: 4 untracked files (a.py, b.yaml, c d, ...): git add" in said
