"""The babysitter with real `grok serve` processes on two workers, one of which is stopped."""

import os
import signal
import subprocess
import time
from collections.abc import Callable

import httpx
import pytest

from tests.fixtures.network import free_address
from tests.launch.cloud import ROOT, Cloud
from tests.launch.test_real_training import GROK
from tests.serve.hosts import write_model

REQUEST = {"model": "tiny", "prompt": "5 comes after", "max_tokens": 20, "seed": 3}
PATIENCE_SECONDS = 600


@pytest.mark.prove
def test_a_server_that_loses_a_host_answers_again(cloud: Cloud) -> None:
    weights = write_model(cloud.folder)
    url = f"http://{free_address()}"
    cloud.several_hosts(2)
    cloud.program("worker-bin/venv/grok", GROK)
    cloud.program("worker-bin/curl", 'exec /usr/bin/curl "$@"')
    cloud.script(
        worker_environment={
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            **{name: os.environ[name] for name in ("XDG_CACHE_HOME", "XLA_FLAGS")},
            "GROK_COORDINATOR": free_address(),
            "GROK_NUM_PROCESSES": "2",
        }
    )
    words = ["mesh={data: 1, expert: 2, simulated_devices: 2}", "heartbeat_timeout_seconds=10"]
    port = f"port={url.rpartition(':')[2]}"
    command = ["--", "grok", "serve", str(weights), port, *words]
    with subprocess.Popen(
        [cloud.checkout / "launch" / "babysit.sh", *command],
        env=cloud.environment | {"LAUNCH_POLL_SECONDS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as babysitter:
        wait_until(lambda: is_healthy(url))
        answer = complete(url)
        [_, home] = cloud.homes()
        os.kill(int((home / "grok-launch" / "run" / "pid").read_text()), signal.SIGSTOP)
        wait_until(lambda: not is_healthy(url))
        wait_until(lambda: is_healthy(url))
        assert complete(url) == answer
        status = cloud.launch("status")
        assert f"the server at {url[7:]} of the first worker is healthy" in status.stdout
        assert cloud.launch("stop", LAUNCH_STOP_SECONDS="60").returncode == 0
        _, said = babysitter.communicate(timeout=PATIENCE_SECONDS)
    assert babysitter.returncode == 75, said
    assert "but t1v-t-w-0 exited with code 69" in said
    assert said.count("start 1: ") == said.count("start 2: ") == 1
    codes = [(home / "grok-launch" / "run" / "exit").read_text() for home in cloud.homes()]
    assert codes == ["75\n", "75\n"]


def wait_until(reached: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.2)


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def complete(url: str) -> str:
    response = httpx.post(f"{url}/v1/completions", json=REQUEST, timeout=60)
    return response.raise_for_status().json()["choices"][0]["text"]
