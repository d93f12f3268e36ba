"""The quickstart from end to end with few steps, and then the commands of README and docs/.

Blocks marked `bash` and `python` are run as printed; tests/test_docs.py checks all other commands.
"""

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from grok.config.load import load_config
from grok.errors import DONE, GrokError
from grok.quickstart.tour import prepare_folder, run
from grok.train.telemetry.event_log import read_events
from grok.train.telemetry.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[2]


FEWER_STEPS = """
train: {steps: 6, log_every: 1, eval_every: 3}
optimizer: {warmup_steps: 1}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder in which `grok quickstart` has run from the wheel, shortened as a user would: in its
    config."""
    home, wheels = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("wheels")
    build = ["hatchling", "build", "--target", "wheel", "--directory", str(wheels)]
    subprocess.run([sys.executable, "-m", *build], cwd=ROOT, check=True, capture_output=True)
    [wheel] = wheels.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheels / "installed")
    folder = home / "runs" / "quickstart"
    config_path = prepare_folder(folder, Console())
    config_path.write_text(config_path.read_text() + FEWER_STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS")  # compiled as users' are
        patch.setenv("PYTHONPATH", str(wheels / "installed"))
        patch.chdir(home)
        assert run(folder) == DONE
    for name in ("README.md", "CONTRIBUTING.md"):  # the commands of docs/ prepare these two
        shutil.copy(ROOT / name, home)
    for name in ("chats.jsonl", "chat.jinja"):
        shutil.copy(ROOT / "docs" / name, home)
    return home


def test_it_trains_stops_resumes_and_draws(home: Path):
    folder = home / "runs" / "quickstart"
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    (resumed,) = [line for line in lines if line.get("event") == "resumed"]
    assert 3 <= resumed["step"] <= 6
    assert (folder / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    # Not from this clone, whose commit the run would have written down.
    starts = json.loads((folder / "run.json").read_text())["starts"]
    assert [start["commit"] for start in starts] == [None, None]


def test_interrupted_it_goes_on_and_finished_it_starts_anew(home: Path, tmp_path):
    folder = tmp_path / "quickstart"
    shutil.copytree(home / "runs" / "quickstart", folder)
    path = folder / "quickstart.yaml"
    path.write_text(path.read_text().replace("steps: 6", "steps: 8"))
    before = path.read_text()
    assert prepare_folder(folder, Console()) == path
    assert path.read_text() == before
    assert (folder / "checkpoints").exists()
    path.write_text(before.replace("steps: 8", "steps: 6"))
    prepare_folder(folder, Console())
    assert not (folder / "checkpoints").exists()
    assert load_config(path).train.steps == load_config("quickstart").train.steps


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(GrokError, match="holds other files"):
        prepare_folder(tmp_path, Console())


# In the order in which their commands build on each other.
PAGES = (
    "README.md",
    "docs/own-text.md",
    "docs/train.md",
    "docs/fine-tune.md",
    "docs/chat.md",
    "docs/data.md",
    "docs/evaluate.md",
    "docs/weights.md",
    "docs/sharding.md",
    "docs/tokenizers.md",
)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def test_every_page_with_commands_to_run_is_listed():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    runnable = {str(page.relative_to(ROOT)) for page in pages if blocks(page, "bash")}
    assert runnable == set(PAGES)


def test_the_commands_of_the_docs_work_one_after_the_other(home: Path):
    commands = [
        line
        for page in PAGES
        for block in blocks(ROOT / page, "bash")
        for line in block.splitlines()
    ]
    assert len(commands) >= 18
    for command in commands:
        arguments = shlex.split(command)
        assert arguments[0] == "grok"
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=home,
            env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, ""), command
        assert done.stdout, command


def test_every_metric_and_event_is_in_the_reference(home: Path):
    reference, folder = (ROOT / "docs" / "metrics.md").read_text(), home / "runs" / "quickstart"
    names = {name for line in read_metrics(folder / "metrics.jsonl") for name in line}
    names |= {line["event"] for line in read_events(folder / "events.jsonl")}
    manifest = json.loads((folder / "run.json").read_text())
    names |= manifest.keys() | manifest["starts"][0].keys()
    missing = [name for name in sorted(names) if f"`{name.split('/')[0]}`" not in reference]
    assert not missing


def test_a_conversation_says_what_takes_time_and_goes_on_after_a_stray_byte(home: Path):
    terminal, end = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "grok", "sample", "runs/quickstart", "--max-tokens", "3"],
        cwd=home,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict", "XLA_FLAGS": ""},
        input=b"The\nstray \xff\nnext\n",
        stdout=subprocess.PIPE,
        stderr=end,
    )
    control = re.compile(r"\x1b\[[^a-zA-Z]*[a-zA-Z]")
    first, second, bar, *rest = control.sub("", os.read(terminal, 4096).decode()).split("\r\n")
    assert (first, second, rest[0]) == (
        "loading JAX",
        "reading the weights at runs/quickstart, float32",
        "compiling",
    )
    assert all(re.fullmatch(r"\d tokens, [\d.]+ a second", line) for line in rest[1:-1])
    assert (len(rest), rest[-1]) == (5, "")
    assert bar.rpartition("\r")[2].startswith("100% of 9,908,736 bytes")
    assert (done.returncode, done.stdout.decode().count("> ")) == (0, 4)


@pytest.mark.prove
def test_the_python_of_the_docs_works(home: Path):
    """Each block that begins with an import is a script, which the blocks after it go on with."""
    scripts: list[str] = []
    for block in blocks(ROOT / "docs" / "python.md", "python"):
        scripts += [block] if block.startswith("import ") else [scripts.pop() + block]
    assert len(scripts) == 3
    # Not the devices of tests: as at a user's, where JAX would look for a TPU, and complain.
    own = {name: value for name, value in os.environ.items() if name[:4] not in ("JAX_", "XLA_")}
    for script in scripts:
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=home, env=own, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        notices = [
            line for line in done.stderr.splitlines() if "answers end at that text" not in line
        ]
        assert not notices
