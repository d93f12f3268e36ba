"""Twenty chips that lie, each from a random step on and at a random place, are found and named."""

import dataclasses

import pytest

from grok.config import RunConfig
from grok.config.text import to_yaml
from tests.train.sdc_processes import EVERY, find_faults

pytestmark = pytest.mark.prove


@pytest.mark.parametrize("processes", [1, 2])
def test_all_faults_are_found_and_named(tiny_run: RunConfig, tmp_path, processes):
    config = dataclasses.replace(
        tiny_run,
        model=dataclasses.replace(tiny_run.model, num_layers=1, remat="none"),
        mesh=dataclasses.replace(tiny_run.mesh, data=8, expert=1, tensor=1),
        train=dataclasses.replace(tiny_run.train, sdc_check="stop", sdc_check_every=EVERY),
    )
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    faults = find_faults(file, processes, 20)
    assert len(faults) == 20
    for fault in faults:
        next_check = -(-fault["from_step"] // EVERY) * EVERY
        assert fault["found"]["step"] == next_check, fault
        message = fault["found"]["message"]
        assert f"at step {next_check}:" in message
        assert "this one is wrong: device" in message
        assert f" device {fault['device']} of host " in message
        assert f"(process {fault['process']}," in message
