import re

import pytest

from tests.launch.cloud import Cloud


@pytest.mark.parametrize(
    ("existing", "lives", "creations", "deletions"),
    [
        (None, [["ACTIVE"]], 1, 0),
        (None, [["ACCEPTED", "CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]], 1, 0),
        (["ACTIVE"], [], 0, 0),
        (["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "ACTIVE"], [], 0, 0),
        (["FAILED"], [["ACTIVE"]], 1, 1),
        (["SUSPENDED"], [["ACTIVE"]], 1, 1),
        (["SUSPENDING", "SUSPENDED"], [["PROVISIONING", "ACTIVE"]], 1, 1),
        (["ACTIVE/t=PREEMPTED"], [["ACTIVE"]], 1, 1),
        (["ACTIVE/t=TERMINATED"], [["ACTIVE"]], 1, 1),
        (["ACTIVE/t=STOPPED"], [["ACTIVE"]], 1, 1),
        (["ACTIVE/t=REPAIRING", "ACTIVE", "ACTIVE/t=READY"], [], 0, 0),
        (None, [["PROVISIONING", "SUSPENDED"], ["ACTIVE"]], 2, 1),
    ],
)
def test_up_ends_with_a_slice_that_is_ready(
    cloud: Cloud,
    existing: list[str] | None,
    lives: list[list[str]],
    creations: int,
    deletions: int,
) -> None:
    if existing:
        cloud.existing(*existing)
    cloud.script(lives=lives)
    done = cloud.launch("up")
    assert done.returncode == 0, done.stderr
    assert "t is ready: 1 x v5litepod-8, 1 worker, 8 chips" in done.stderr
    assert len(cloud.calls("queued-resources create")) == creations
    deleted = cloud.calls("queued-resources delete")
    assert len(deleted) == deletions
    assert all("--force" in call and "--quiet" in call for call in deleted)


def test_up_says_what_it_waits_for_and_for_how_long(cloud: Cloud) -> None:
    cloud.existing("WAITING_FOR_RESOURCES", "ACTIVE/t=REPAIRING", "ACTIVE/t=READY")
    said = cloud.launch("up").stderr
    assert re.search(r"waiting for t to be ready: WAITING_FOR_RESOURCES, \d+ s so far", said)
    assert "waiting for t to be ready: node t is REPAIRING, " in said


def test_a_request_that_fails_says_why_and_is_not_repeated(cloud: Cloud) -> None:
    cloud.script(lives=[["ACCEPTED", "FAILED"]], message="Quota 'TPUS' exceeded.")
    done = cloud.launch("up")
    assert done.returncode == 1
    assert "the request failed: Quota 'TPUS' exceeded." in done.stderr
    assert len(cloud.calls("queued-resources create")) == 1


def test_up_gives_up_after_the_wait_that_is_allowed(cloud: Cloud) -> None:
    cloud.existing("WAITING_FOR_RESOURCES")
    done = cloud.launch("up", LAUNCH_WAIT_SECONDS="1")
    assert done.returncode == 1
    assert "gave up waiting for t to be ready" in done.stderr
    assert "now: WAITING_FOR_RESOURCES" in done.stderr


def test_a_slice_deleted_while_it_is_waited_for_is_not_made_again(cloud: Cloud) -> None:
    cloud.script(lives=[["PROVISIONING"]], failures={"queued-resources describe": [
        None, None, "NOT_FOUND: Resource was not found",
    ]})  # fmt: skip
    done = cloud.launch("up")
    assert (done.returncode, len(cloud.calls("queued-resources create"))) == (1, 1)
    assert "t was deleted by someone else" in done.stderr


@pytest.mark.parametrize(("failures", "code"), [(2, 0), (3, 1)])
def test_a_cloud_that_does_not_answer_is_asked_three_times(
    cloud: Cloud, failures: int, code: int
) -> None:
    cloud.existing("ACTIVE")
    cloud.script(failures={"queued-resources describe": ["UNAVAILABLE: try later"] * failures})
    done = cloud.launch("up")
    assert done.returncode == code, done.stderr
    assert "UNAVAILABLE: try later" in done.stderr
    assert not cloud.calls("queued-resources create")


def test_without_a_login_that_is_what_is_said(cloud: Cloud) -> None:
    error = (
        "You do not currently have an active account selected.\nPlease run:\n\n"
        "  $ gcloud auth login\n\nto obtain new credentials."
    )
    cloud.script(failures={"queued-resources describe": [error] * 4})
    status = cloud.launch("status")
    assert (status.returncode, "UNKNOWN: You do not " in status.stdout) == (1, True)
    done = cloud.launch("up")
    assert done.returncode == 1
    said = "You do not currently have an active account selected. (gcloud auth login)"
    assert done.stderr.count(said) == 3, done.stderr


def test_a_refused_creation_ends_with_what_gcloud_said(cloud: Cloud) -> None:
    cloud.script(failures={"queued-resources create": ["PERMISSION_DENIED: tpu.nodes.create"]})
    done = cloud.launch("up")
    assert done.returncode == 1
    assert "PERMISSION_DENIED: tpu.nodes.create" in done.stderr


def test_another_slice_of_the_name_is_left_alone(cloud: Cloud) -> None:
    cloud.existing("ACTIVE", accelerator="v5p-8")
    done = cloud.launch("up")
    assert done.returncode == 1
    assert "t is a v5p-8, not a v5litepod-8: launch/down.sh first" in done.stderr
    assert not cloud.calls("queued-resources delete")


def test_several_slices_are_asked_for_at_once(cloud: Cloud) -> None:
    cloud.settings(LAUNCH_ACCELERATOR="v5litepod-16", LAUNCH_NODE_COUNT="2")
    cloud.script(hosts=4, lives=[["ACTIVE/t-1=PREEMPTED"], ["ACTIVE"]])
    done = cloud.launch("up")
    assert "t is ready: 2 x v5litepod-16, 8 workers, 32 chips" in done.stderr
    creations = cloud.calls("queued-resources create")
    assert len(creations) == 2
    assert {"--node-count=2", "--node-prefix=t"} < set(creations[0])


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"LAUNCH_PROVISIONING": "spot"}, {"--spot", "--node-id=t"}),
        ({"LAUNCH_PROVISIONING": "reserved"}, {"--reserved"}),
        ({"LAUNCH_RUNTIME": "tpu-special"}, {"--runtime-version=tpu-special"}),
        ({}, {"--runtime-version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-8"}),
        ({"LAUNCH_NETWORK": "n", "LAUNCH_SUBNETWORK": "s"}, {"--network=n", "--subnetwork=s"}),
        ({"LAUNCH_INTERNAL_IPS": "yes"}, {"--internal-ips"}),
        ({"LAUNCH_SERVICE_ACCOUNT": "a@p.iam"}, {"--service-account=a@p.iam"}),
        ({"LAUNCH_LABELS": "team=x", "LAUNCH_VALID_UNTIL": "6h"},
         {"--labels=team=x", "--valid-until-duration=6h"}),
    ],
)  # fmt: skip
def test_settings_become_flags(cloud: Cloud, settings: dict[str, str], flags: set[str]) -> None:
    assert cloud.launch("up", **settings).returncode == 0
    [creation] = cloud.calls("queued-resources create")
    assert flags < set(creation)


@pytest.mark.parametrize("state", ["ACTIVE", "PROVISIONING", "FAILED", "SUSPENDED"])
def test_down_deletes_a_slice_in_any_state(cloud: Cloud, state: str) -> None:
    cloud.existing(state)
    done = cloud.launch("down")
    assert (done.returncode, cloud.slice) == (0, None), done.stderr


def test_down_without_a_slice_says_so(cloud: Cloud) -> None:
    done = cloud.launch("down")
    assert done.returncode == 0
    assert "there is no slice t in us-east5-a" in done.stderr


def test_down_in_another_zone_than_up_names_the_slice_that_costs(cloud: Cloud) -> None:
    assert cloud.launch("up").returncode == 0
    absent = {"queued-resources describe": ["NOT_FOUND: Resource was not found"]}
    cloud.script(failures=absent)
    done = cloud.launch("down", LAUNCH_ZONE="us-central1-b")
    assert done.returncode == 1
    assert (
        "the one created in us-east5-a may still cost money: LAUNCH_ZONE=us-east5-a launch"
        in done.stderr
    )

    cloud.script(failures=absent)  # deleted in the console
    assert cloud.launch("down").returncode == 0
    assert "down now" in cloud.launch("cost").stdout


def test_down_does_not_call_a_slice_gone_without_an_answer(cloud: Cloud) -> None:
    cloud.existing("ACTIVE")
    cloud.script(failures={"queued-resources describe": ["UNAVAILABLE"]})
    done = cloud.launch("down")
    assert done.returncode == 1
    assert "may still cost" in done.stderr


def test_a_failed_deletion_is_a_failure(cloud: Cloud) -> None:
    cloud.existing("ACTIVE")
    cloud.script(failures={"queued-resources delete": ["INTERNAL: error"]})
    done = cloud.launch("down")
    assert done.returncode == 1
    assert "may still cost" in done.stderr


@pytest.mark.parametrize("verb", ["up", "doctor"])
def test_nothing_is_created_at_a_price_that_is_not_known(verb: str, cloud: Cloud) -> None:
    done = cloud.launch(verb, LAUNCH_PRICES=str(cloud.folder / "none"))
    assert "there is no price file" in done.stderr
    assert done.returncode == (2 if verb == "up" else 1)
    assert not cloud.calls("queued-resources create")
