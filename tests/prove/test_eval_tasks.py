"""Tasks of lm-eval, in an environment of its own with the extra `eval`, from the package index.

pytest -n 0 -m prove -s tests/prove/test_eval_tasks.py
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from grok.config.text import to_yaml
from grok.train.telemetry.metrics_file import read_metrics
from tests.fixtures.environments import make_environment

pytestmark = pytest.mark.prove
ROOT = Path(__file__).parents[2]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{number}}}} comes after"
doc_to_target: {target}
"""


@pytest.fixture(scope="module")
def grok(tmp_path_factory) -> Path:
    """The command of an environment with the extra."""
    lock = ["--constraint", ROOT / "requirements.lock"]
    project = ["--editable", f"{ROOT}[eval]"]
    python = make_environment(tmp_path_factory.mktemp("eval"), *lock, *project)
    return python.with_name("grok")


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Two tasks over the same questions: one of choices, one of generated text."""
    questions = [
        {"number": n, "choices": [f" {n - 1}", f" {n + 1}", f" {n + 7}"], "answer": 0}
        for n in range(100, 112)
    ]
    lines = "".join(f"{json.dumps(question)}\n" for question in questions)
    (tmp_path / "questions.jsonl").write_text(lines)
    folder = tmp_path / "tasks"
    folder.mkdir()
    choices = TASK.format(name="after", folder=tmp_path, kind="multiple_choice", target="answer")
    (folder / "after.yaml").write_text(f"{choices}doc_to_choice: choices\n")
    writes = TASK.format(
        name="writes", folder=tmp_path, kind="generate_until", target='"{{choices[0]}}"'
    )
    (folder / "writes.yaml").write_text(writes)
    return folder


def test_a_run_is_scored_as_eval_scores_its_checkpoint(grok, tasks, tiny_run, tmp_path):
    train = dataclasses.replace(
        tiny_run.train,
        eval_every=10,
        eval_tasks=("after",),
        eval_tasks_folder=str(tasks),
        eval_tasks_limit=8,
    )
    run = dataclasses.replace(tiny_run, folder=str(tmp_path / "run"), train=train)
    (tmp_path / "run.yaml").write_text(to_yaml(run))

    def ask(*words: object) -> subprocess.CompletedProcess:
        command = [str(word) for word in (grok, *words)]
        # lm-eval must need nothing but the folder.
        offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
        return subprocess.run(command, env=offline, capture_output=True, text=True, check=False)

    done = ask("train", tmp_path / "run.yaml")
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    scores = [line for line in lines if "tasks/after/acc" in line]
    assert [line["step"] for line in scores] == [10, 20]
    mesh = ("mesh.data=2", "mesh.expert=2", "mesh.tensor=2", "mesh.simulated_devices=8")
    words = (*mesh, "--tasks", "after", "--tasks-folder", tasks, "--limit", 8, "--json")
    done = ask("eval", run.folder, *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)["tasks"]["after"]
    print(result)
    for metric in ("acc", "acc_norm"):
        assert scores[-1][f"tasks/after/{metric}"] == result[f"{metric},none"]

    done = ask("train", tmp_path / "run.yaml", "train.eval_tasks=[writes]", "train.steps=21")
    assert done.returncode == 2
    assert "train.eval_tasks has writes, which needs generated text; `grok eval" in done.stderr
    done = ask("train", tmp_path / "run.yaml", "train.eval_tasks=[nothing]", "train.steps=21")
    assert "lm-eval has no task nothing, nor has " in done.stderr
    done = ask("eval", run.folder, *mesh, "--tasks", "writes", "--tasks-folder", tasks, "--json")
    assert done.returncode == 0, done.stderr
    print(json.loads(done.stdout)["tasks"])
