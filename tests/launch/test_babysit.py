import os
import subprocess

import pytest

from tests.launch.cloud import LAUNCH, Cloud

COMMAND = ("--", "grok", "train", "tiny")


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        ("running running", "running"),
        ("exited.0 exited.0", "done"),
        ("exited.75 exited.75", "saved"),
        ("exited.0 exited.75", "saved"),
        ("exited.2 running", "refused"),
        ("exited.69 exited.65", "refused"),
        ("exited.2 exited.2", "refused"),
        ("exited.1 exited.1", "failed"),
        ("exited.69 exited.69", "failed"),
        ("exited.75 exited.134", "failed"),
        ("exited.0 exited.137", "failed"),
        ("exited.127 exited.0", "failed"),
        ("lost lost", "failed"),
        ("idle idle", "failed"),
        ("exited.0 idle", "failed"),
        ("exited.0 running", "leaving"),
        ("exited.75 running", "leaving"),
        ("exited.69 running", "partial"),
        ("lost running", "partial"),
        ("idle running", "partial"),
    ],
)
def test_what_reports_of_workers_mean(states: str, verdict: str) -> None:
    reports = [
        f"w-{i} state={state} code={code or '-'} pid=1"
        for i, (state, _, code) in enumerate(word.partition(".") for word in states.split())
    ]
    script = "source $0/workers.sh; source $0/verdict.sh; plural() { echo $1; }; workers=$#"
    said = subprocess.run(
        [
            "bash",
            "-c",
            script + '; reports=("$@"); judge_reports; echo "$verdict"',
            LAUNCH,
            *reports,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split()[0] == verdict


def babysit(cloud: Cloud, **environment: str) -> subprocess.CompletedProcess[str]:
    return cloud.launch("babysit", *COMMAND, f"folder={cloud.run_folder}", **environment)


def test_from_nothing_to_a_finished_run(cloud: Cloud) -> None:
    cloud.plan("step 7; exit 0")
    done = babysit(cloud)
    assert (done.returncode, cloud.starts()) == (0, 1), done.stderr
    assert "exit code 0 of 1 worker" in done.stderr
    stays = "; the slice stays, and costs money, until launch/down.sh\n"
    assert f"done, at step 7{stays}" in done.stderr


def test_a_run_that_fails_is_started_again(cloud: Cloud) -> None:
    cloud.plan("step 1; exit 134", "step 2; exit 0")
    done = babysit(cloud)
    assert (done.returncode, cloud.starts()) == (0, 2), done.stderr
    assert "t1v-t-w-0 exited with code 134" in done.stderr
    assert len(cloud.calls("queued-resources create")) == 1


@pytest.mark.parametrize("code", [2, 65])
def test_a_run_that_must_be_changed_first_is_not_started_again(cloud: Cloud, code: int) -> None:
    cloud.plan(last=f"step 1; exit {code}")
    done = babysit(cloud)
    assert (done.returncode, cloud.starts()) == (code, 1)
    assert f"t1v-t-w-0 exited with code {code}" in done.stderr
    stays = "; the slice stays, and costs money, until launch/down.sh\n"
    assert f"something must be changed first, see launch/logs.sh{stays}" in done.stderr


def test_saved_without_being_asked_by_us_is_started_again_at_once(cloud: Cloud) -> None:
    cloud.plan("step 1; exit 75", "step 2; exit 0")
    done = babysit(cloud)
    assert (done.returncode, cloud.starts()) == (0, 2)
    assert "1 of 1 worker saved and stopped as asked" in done.stderr
    assert "before the next start" not in done.stderr


def test_three_preemptions_to_a_finished_run(cloud: Cloud) -> None:
    cloud.script(preempt_at=[1, 2, 3])
    cloud.plan(*[f"step {step}; until_asked" for step in (1, 2, 3)], "step 4; exit 0")
    done = babysit(cloud)
    assert (done.returncode, cloud.starts()) == (0, 4), done.stderr
    assert done.stderr.count("the slice is SUSPENDED") == 3
    assert len(cloud.calls("queued-resources create")) == 4
    # Each new slice was set up, and has the code of the first start.
    stamps = {call[5] for call in cloud.calls("queued-resources scp") if "grok-" in call[4]}
    assert len(stamps) == 1
    assert len((cloud.stub / "uv").read_text().split("venv --quiet")) == 5


@pytest.mark.parametrize("state", ["FAILED", "DELETING"])
def test_a_slice_that_goes_in_another_way_is_made_again(cloud: Cloud, state: str) -> None:
    gone = [state] if state == "FAILED" else [state, "SUSPENDED"]
    # Two looks by `up`, and the rest while the run is watched.
    cloud.script(lives=[["ACTIVE", "ACTIVE", *gone], ["ACTIVE"]])
    cloud.plan("step 1; until_asked", "step 2; exit 0")
    done = babysit(cloud)
    assert (done.returncode, cloud.starts()) == (0, 2), done.stderr
    assert f"the slice is {state}" in done.stderr


def test_a_node_that_stays_in_repair_is_replaced(cloud: Cloud) -> None:
    cloud.several_hosts(2)
    cloud.script(lives=[["ACTIVE", "ACTIVE/t=PREEMPTED"], ["ACTIVE"]])
    cloud.plan("step 1; until_asked", "step 2; exit 0")
    done = babysit(cloud)
    assert (done.returncode, cloud.starts()) == (0, 2), done.stderr
    assert "node t is PREEMPTED" in done.stderr


def test_one_of_two_hosts_that_died_is_noticed(cloud: Cloud) -> None:
    cloud.several_hosts(2)
    cloud.plan(**{"start_1_worker_0": "step 1; forever", "start_1_worker_1": "exit 134"})
    cloud.plan(**{"2": "step 2; exit 0"})
    done = babysit(cloud)
    assert (done.returncode, cloud.starts(0), cloud.starts(1)) == (0, 2, 2), done.stderr
    assert "1 of 2 workers run, but t1v-t-w-1 exited with code 134" in done.stderr


def test_a_host_that_hangs_while_the_others_have_left_is_ended(cloud: Cloud) -> None:
    cloud.several_hosts(2)
    cloud.plan(**{"start_1_worker_0": "step 1; exit 75", "start_1_worker_1": "forever"})
    cloud.plan(**{"2": "step 2; exit 0"})
    done = babysit(cloud, LAUNCH_STOP_SECONDS="1")
    assert (done.returncode, cloud.starts(1)) == (0, 2), done.stderr
    assert "1 of 2 workers still run, the others have saved and exited" in done.stderr


def test_one_answer_of_do_not_restart_is_enough(cloud: Cloud) -> None:
    cloud.several_hosts(2)
    cloud.plan(**{"start_1_worker_0": "exit 69", "start_1_worker_1": "exit 65"})
    # On a busy machine the second ends many looks after the first.
    done = babysit(cloud, LAUNCH_BAD_POLLS="1000")
    assert (done.returncode, cloud.starts()) == (65, 1), done.stderr


def test_it_gives_up_without_progress(cloud: Cloud) -> None:
    cloud.plan(last="step 5; exit 69")
    done = babysit(cloud, LAUNCH_MAX_STALLS="2")
    assert (done.returncode, cloud.starts()) == (1, 3)
    assert "gave up at step 5: 2 consecutive starts without progress" in done.stderr


def test_progress_starts_the_count_again(cloud: Cloud) -> None:
    cloud.plan("exit 69", "step 1; exit 69", "exit 69", "step 2; exit 0")
    done = babysit(cloud, LAUNCH_MAX_STALLS="2")
    assert (done.returncode, cloud.starts()) == (0, 4), done.stderr


def test_a_new_shard_is_progress_of_a_batch(cloud: Cloud) -> None:
    batch = ("--", "grok", "batch", "x", f"output={cloud.run_folder}")
    cloud.plan("shard 0; exit 69", "shard 1; exit 69", last="exit 69")
    done = cloud.launch("babysit", *batch, LAUNCH_MAX_STALLS="1")
    assert (done.returncode, cloud.starts()) == (1, 3), done.stderr
    assert "gave up with 2 shards: 1 consecutive start without progress" in done.stderr
    assert "before a shard is finished, lower shard_size" in done.stderr


SERVE = ("--", "grok", "serve", "x", "weights=w", "port=9000")


def test_a_server_that_was_healthy_is_progress(cloud: Cloud) -> None:
    cloud.plan("healthy; exit 75", "healthy; exit 69", last="rm $STUB/healthy-0; exit 69")
    done = cloud.launch("babysit", *SERVE, LAUNCH_MAX_STALLS="1")
    assert (done.returncode, cloud.starts()) == (1, 3), done.stderr
    assert "gave up healthy until" in done.stderr
    assert set((cloud.stub / "asked").read_text().split()) == {"http://127.0.0.1:9000/health"}


def test_a_server_that_hangs_is_restarted(cloud: Cloud) -> None:
    cloud.plan("healthy; rm $STUB/healthy-0; until_asked", "exit 2")
    done = cloud.launch("babysit", *SERVE, "host=::1")
    assert set((cloud.stub / "asked").read_text().split()) == {"http://[::1]:9000/health"}
    assert (done.returncode, cloud.starts()) == (2, 2), done.stderr
    assert "1 worker run, but the server does not answer at /health" in done.stderr


def test_waits_between_starts_double_up_to_a_limit(cloud: Cloud) -> None:
    program = cloud.stub / "bin" / "sleep"
    program.write_text('#!/bin/sh\necho "$1" >>"$STUB/sleeps"\n')
    program.chmod(0o755)
    cloud.plan(last="exit 69")
    limits = {"LAUNCH_BACKOFF_MAX_SECONDS": "35", "LAUNCH_MAX_STALLS": "4"}
    # In polls; while a run is watched they have the setting's very form.
    babysit(cloud, LAUNCH_BACKOFF_SECONDS="10", LAUNCH_POLL_SECONDS="15.0", **limits)
    sleeps = (cloud.stub / "sleeps").read_text().split()
    assert [line for line in sleeps if line != "15.0"] == ["10", "15", "5", "15", "15", "5"]


def test_a_slice_that_cannot_be_set_up_is_given_up(cloud: Cloud) -> None:
    cloud.devices(0)
    done = babysit(cloud, LAUNCH_MAX_STALLS="2")
    assert (done.returncode, cloud.starts()) == (1, 0)
    stays = "; the slice stays, and costs money, until launch/down.sh\n"
    assert f"preparing the slice failed 2 times in a row{stays}" in done.stderr


def test_a_cloud_that_does_not_answer_for_a_while_changes_nothing(cloud: Cloud) -> None:
    cloud.plan("step 1; sleep 0.5; step 2; exit 0")
    silent = ["UNAVAILABLE: try later"] * 5
    cloud.script(failures={"queued-resources describe": [None, None, *silent]})
    done = babysit(cloud)
    assert (done.returncode, cloud.starts()) == (0, 1), done.stderr
    assert done.stderr.count("gcloud does not answer: ") == 5
    assert len(cloud.calls("queued-resources create")) == 1


def test_an_ssh_that_fails_twice_changes_nothing(cloud: Cloud) -> None:
    cloud.several_hosts(2)
    cloud.plan(last="step 1; until_asked")
    cloud.script(ssh={"t1v-t-w-1": [*[None] * 8, "fail", "fail"]})
    with started(cloud) as process:
        cloud.wait_for(cloud.run_folder / "metrics.jsonl")
        cloud.wait_for(cloud.stub / "done-t1v-t-w-1")
        assert cloud.launch("stop").returncode == 0
        assert process.wait(30) == 75
    assert len(cloud.calls("queued-resources create")) == 1


def test_workers_that_stay_silent_cost_the_slice_its_life(cloud: Cloud) -> None:
    cloud.several_hosts(2)
    cloud.plan("step 1; until_asked", "step 2; exit 0")
    cloud.script(ssh={"t1v-t-w-1": [*[None] * 8, "fail", "fail", "fail"]})
    done = babysit(cloud)
    assert (done.returncode, len(cloud.calls("queued-resources create"))) == (0, 2), done.stderr
    assert "1 of 2 workers answer" in done.stderr


def test_stop_ends_the_babysitter_too(cloud: Cloud) -> None:
    cloud.plan(last="step 1; until_asked")
    with started(cloud) as process:
        cloud.wait_for(cloud.run_folder / "metrics.jsonl")
        assert cloud.launch("stop").returncode == 0
        assert process.wait(30) == 75
    assert cloud.starts() == 1


def test_down_ends_the_babysitter_too(cloud: Cloud) -> None:
    cloud.plan(last="step 1; until_asked")
    with started(cloud) as process:
        cloud.wait_for(cloud.run_folder / "metrics.jsonl")
        assert cloud.launch("down").returncode == 0
        assert process.wait(30) == 75
    assert cloud.slice is None


def test_nothing_is_requested_after_down(cloud: Cloud) -> None:
    cloud.existing("SUSPENDED")
    cloud.after("queued-resources delete", "down")
    done = babysit(cloud)
    assert "there is no slice t in us-east5-a" in cloud.after_said
    assert (done.returncode, cloud.slice) == (75, None), done.stderr
    assert not cloud.calls("queued-resources create")
    assert "asked to stop, at step 0\n" in done.stderr


def test_a_slice_that_down_did_not_see_is_deleted(cloud: Cloud) -> None:
    cloud.script(failures={"queued-resources describe": [None, "UNAVAILABLE: try later"]})
    cloud.after("queued-resources create", "down")
    done = babysit(cloud)
    assert "the slice may still cost money: UNAVAILABLE" in cloud.after_said
    assert (done.returncode, cloud.slice) == (75, None), done.stderr
    assert "deleting the slice that 'down' did not delete" in done.stderr
    assert not (cloud.stub / "uv").exists()


def test_a_slice_that_is_not_deleted_after_down_goes_on_costing(cloud: Cloud) -> None:
    describe = [None, None, "UNAVAILABLE: try later"]
    delete = ["INTERNAL: error"]
    cloud.script(
        failures={"queued-resources describe": describe, "queued-resources delete": delete}
    )
    cloud.after("worker.sh setup", "down")
    done = babysit(cloud)
    assert (done.returncode, cloud.slice is None) == (75, False), done.stderr
    assert "the slice was not deleted; the reason is above" in done.stderr
    assert "the slice stays, and costs money, until launch/down.sh" in done.stderr
    assert "8 chips, up now" in cloud.launch("cost").stdout


def test_a_slice_of_an_up_after_down_is_left(cloud: Cloud) -> None:
    cloud.after("worker.sh setup", "down", "up")
    done = babysit(cloud)
    assert "t is ready" in cloud.after_said
    assert (done.returncode, cloud.slice is None) == (75, False), done.stderr
    assert "the slice stays, and costs money, until launch/down.sh" in done.stderr


@pytest.mark.parametrize("call", ["queued-resources create", "worker.sh setup"])
def test_stop_ends_the_wait_for_a_slice_and_its_setup(cloud: Cloud, call: str) -> None:
    states = ["WAITING_FOR_RESOURCES"] * 3 if "create" in call else []
    cloud.script(lives=[[*states, "ACTIVE"]])
    cloud.after(call, "stop")
    done = babysit(cloud)
    assert (done.returncode, cloud.starts()) == (75, 0), done.stderr
    assert (cloud.stub / "uv").exists() == ("setup" in call)
    assert not any("unpack" in " ".join(call) for call in cloud.calls())
    state = "(WAITING_FOR_RESOURCES) may stay, and cost" if states else "stays, and costs"
    assert "asked to stop, at step 0; the slice" in done.stderr
    assert f"{state} money, until launch/down.sh" in done.stderr
    assert ("not waiting for the slice that was requested" in done.stderr) == bool(states)
    assert "no slice is requested" not in done.stderr


@pytest.mark.parametrize("verb", ["stop", "down"])
def test_a_wait_for_the_next_start_ends_with_the_run(cloud: Cloud, verb: str) -> None:
    cloud.plan(last="step 1; exit 134")
    settings = {"LAUNCH_BACKOFF_SECONDS": "600", "LAUNCH_POLL_SECONDS": "0.2"}
    with started(cloud, **settings) as process:
        assert process.stderr
        assert any("waiting 10 min before the next start" in line for line in process.stderr)
        cloud.launch(verb)
        process.communicate(timeout=60)
    assert (process.returncode, cloud.starts()) == (75, 1)
    assert (cloud.slice is None) == (verb == "down")


def test_the_step_at_which_a_run_was_stopped_is_read_once_more(cloud: Cloud) -> None:
    (cloud.stub / "bucket" / "b").mkdir()
    metrics = cloud.stub / "bucket" / "b" / "metrics.jsonl"
    metrics.write_text('{"step": 1, "loss": 1}\n')
    save = f"""save() {{ echo '{{"step": 2, "loss": 1}}' >>{metrics}; exit 75; }}"""
    cloud.plan(last=f"trap save TERM; {save}; while :; do sleep 0.02; done")
    # The run has that second to begin.
    cloud.after("storage cat", "stop")
    words = [*COMMAND, "folder=gs://b"]
    done = cloud.launch("babysit", *words, LAUNCH_POLL_SECONDS="1")
    assert done.returncode == 75, done.stderr
    assert "asked to stop, at step 2;" in done.stderr


def test_stop_before_there_is_a_run_to_stop_ends_the_run(cloud: Cloud) -> None:
    cloud.plan(last="step 1; until_asked")
    # The last call before the run is started.
    cloud.after("command.sh", "stop")
    done = babysit(cloud)
    assert "t1v-t-w-0: idle, exit code -" in cloud.after_said
    assert done.returncode == 75, done.stderr
    assert "launch run: started on 1 worker" in done.stderr
    assert "workers  1 of 1 exited with" in cloud.launch("status").stdout


def test_killed_and_called_again_it_goes_on(cloud: Cloud) -> None:
    cloud.plan("step 1; until_asked; exit 0")
    with started(cloud) as process:
        cloud.wait_for(cloud.run_folder / "metrics.jsonl")
        process.kill()
    [home] = cloud.homes()
    pid = int((home / "grok-launch" / "run" / "pid").read_text())
    os.kill(pid, 15)
    cloud.plan("", "step 2; exit 0")
    done = cloud.launch("babysit")
    assert (done.returncode, cloud.starts()) == (0, 2), done.stderr
    assert len(cloud.calls("queued-resources create")) == 1
    assert len((cloud.stub / "uv").read_text().split("venv --quiet")) == 2


def test_two_babysitters_of_one_slice_are_refused(cloud: Cloud) -> None:
    cloud.plan(last="step 1; until_asked")
    with started(cloud) as process:
        cloud.wait_for(cloud.run_folder / "metrics.jsonl")
        again = babysit(cloud)
        assert again.returncode == 2
        assert f"process {process.pid} on this machine already babysits t" in again.stderr
        cloud.launch("stop")


def test_a_note_of_a_babysitter_before_a_restart_of_the_machine_holds_nobody_up(
    cloud: Cloud,
) -> None:
    (cloud.folder / "state" / "t").mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as other:
        (cloud.folder / "state" / "t" / "babysit.pid").write_text(str(other.pid))
        done = babysit(cloud)
        other.kill()
    assert done.returncode == 0, done.stderr


def test_another_command_while_one_is_unfinished_is_refused(cloud: Cloud) -> None:
    cloud.plan(last="step 1; until_asked")
    with started(cloud) as process:
        cloud.wait_for(cloud.run_folder / "metrics.jsonl")
        process.kill()
    done = cloud.launch("babysit", "--", "grok", "other")
    assert done.returncode == 2
    assert "t runs another command (grok train tiny folder=" in done.stderr

    cloud.launch("stop")
    cloud.plan(last="exit 0")
    assert cloud.launch("babysit", "--", "grok", "other").returncode == 0


def test_a_command_that_is_refused_is_not_gone_on_with(cloud: Cloud) -> None:
    cloud.program("bin/grok", "exit 2")
    assert cloud.launch("babysit", "--", "grok", "train", "x").returncode == 2
    again = cloud.launch("babysit")
    assert (again.returncode, cloud.calls()) == (2, [])
    assert "put the command after --" in again.stderr


def test_without_a_command_there_is_nothing_to_go_on_with(cloud: Cloud) -> None:
    done = cloud.launch("babysit")
    assert (done.returncode, cloud.calls()) == (2, [])
    assert "put the command after --" in done.stderr


def started(cloud: Cloud, **environment: str) -> subprocess.Popen[str]:
    words = [*COMMAND, f"folder={cloud.run_folder}"]
    return subprocess.Popen(
        [cloud.checkout / "launch" / "babysit.sh", *words],
        env=cloud.environment | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if environment else subprocess.DEVNULL,
        text=True,
    )
