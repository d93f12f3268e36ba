"""up, status and down through the real gcloud, against an API that is served on loopback."""

import os
import shutil
from pathlib import Path

import pytest

from tests.launch.cloud import Cloud
from tests.launch.fake_api import PARENT, serve

REAL = shutil.which("gcloud")


@pytest.mark.skipif(not REAL, reason="gcloud is not installed here")
def test_requests_that_the_real_gcloud_makes(cloud: Cloud, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    cloud.settings(LAUNCH_ACCELERATOR="v5p-32", LAUNCH_NODE_COUNT="2", LAUNCH_LABELS="team=x")
    with serve(["PROVISIONING", "ACTIVE"]) as api:
        environment = {
            "PATH": os.environ["PATH"],
            "LAUNCH_CALL_SECONDS": "250",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"http://127.0.0.1:{api.port}/",
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CONFIG": str(tmp_path / "config"),
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
        }
        up = cloud.launch("up", timeout=300, **environment)
        assert up.returncode == 0, up.stderr
        assert "waiting for t to be ready: PROVISIONING" in up.stderr
        assert "t is ready: 2 x v5p-32, 8 workers, 32 chips" in up.stderr
        history = (cloud.folder / "state" / "t" / "history").read_text()
        assert history == "begin 1795334400 v5p-32 2 spot us-east5-a\n"
        down = cloud.launch("down", timeout=300, **environment)
        assert down.returncode == 0, down.stderr
        status = cloud.launch("status", timeout=300, **environment)
        assert "t 2 x v5p-32 spot us-east5-a ABSENT" in status.stdout, status.stderr

    [(_, url, body)] = [request for request in api.requests if request[0] == "POST"]
    assert url == f"/v2/{PARENT}/queuedResources?alt=json&queuedResourceId=t"
    assert body == {
        "spot": {},
        "tpu": {
            "nodeSpec": [
                {
                    "parent": PARENT,
                    "multisliceParams": {"nodeCount": 2, "nodeIdPrefix": "t"},
                    "node": {
                        "acceleratorType": "v5p-32",
                        "runtimeVersion": "v2-alpha-tpuv5",
                        "labels": {"team": "x"},
                        "metadata": {},
                        "networkConfig": {"enableExternalIps": True, "network": "default"},
                        "serviceAccount": {},
                    },
                }
            ]
        },
    }
    nodes = [url for method, url, _ in api.requests if "/nodes/" in url]
    assert nodes == [f"/v2/{PARENT}/nodes/t-{i}?alt=json" for i in range(2)]
    [delete] = [url for method, url, _ in api.requests if method == "DELETE"]
    assert delete == f"/v2/{PARENT}/queuedResources/t?alt=json&force=True"


@pytest.mark.skipif(not REAL, reason="gcloud is not installed here")
def test_ssh_of_the_real_gcloud_takes_our_options(cloud: Cloud, tmp_path: Path) -> None:
    """It gets as far as looking for the nodes: its parser has taken all words."""
    (tmp_path / "config").mkdir()
    with serve(["ACTIVE"]) as api:
        environment = {
            "PATH": os.environ["PATH"],
            "LAUNCH_CALL_SECONDS": "250",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"http://127.0.0.1:{api.port}/",
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_CONFIG": str(tmp_path / "config"),
        }
        done = cloud.launch("logs", timeout=300, LAUNCH_IAP="yes", **environment)
    assert done.returncode == 1
    assert "there is no slice t in us-east5-a" in done.stderr
    assert [url for _, url, _ in api.requests] == [f"/v2/{PARENT}/queuedResources/t?alt=json"]
