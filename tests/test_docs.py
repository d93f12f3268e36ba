"""README and docs/ say what is there: links, commands, options, config keys, presets."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from grok.cli.main import main
from grok.config import RunConfig
from grok.config.infer import BatchConfig, ServeConfig
from grok.config.load import from_dict, load_config
from grok.config.schema import schema

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks/results").glob("*.md")),
]
KINDS = {"batch": BatchConfig, "serve": ServeConfig}
# Stands for a config of the reader's own, such as run.yaml.
OWN_RUN = "extends: grok-1\noptimizer: {warmup_steps: 1}\n"
OWN_JOB = {"weights": "runs/x", "input": ["prompts.jsonl"], "output": "answers"}


def name(page: Path) -> str:
    """The page's path in the repository, for the names of tests."""
    return str(page.relative_to(ROOT))


def blocks(text: str, languages: str) -> list[str]:
    """The fenced blocks of a page in these languages, a regular expression."""
    return re.findall(rf"^```(?:{languages})\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in a page's shell blocks, without variables set before it."""
    for block in blocks(text, "sh|bash"):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word not in ("&&", "|", ";"):
                    words.append(word)
                    continue
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []


def grok_commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `grok` in a page, started directly or by `launch/run.sh --`."""
    for words in commands(text):
        if "--" in words and words[0].startswith("launch/"):
            words = words[words.index("--") + 1 :]
        if words[:1] == ["grok"]:
            yield words[1:]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_readme_links_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [
        name(page) for page in PAGES if name(page) not in readme and page.name != "README.md"
    ]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands, options and config keys exist, and each config could be run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()  # of an option that wants a folder that exists
    (tmp_path / "own.yaml").write_text(OWN_RUN)
    for arguments in grok_commands(page.read_text()):
        if arguments == ["--help"]:
            continue
        context = main.make_context("grok", list(arguments))
        command, words = main, arguments
        while hasattr(command, "get_command"):
            command_name, *words = words
            command = command.get_command(context, command_name)
            assert command is not None, arguments
        parsed = command.make_context(command_name, list(words)).params
        if "overrides" in parsed:
            check_config(command_name, parsed)


def check_config(command_name: str, parsed: dict) -> None:
    """Refuses, as ConfigError, what the command would refuse of its config."""
    kind = KINDS.get(parsed.get("command") or command_name, RunConfig)
    overrides = parsed["overrides"]
    source = parsed.get("config") or parsed.get("run_or_config") or "own.yaml"
    preset = not re.search(r"/|\.ya?ml$", source)  # versions in names have dots
    if kind is RunConfig:
        load_config(source if preset else "own.yaml", overrides)
    elif preset and kind is BatchConfig:
        load_config(source, overrides, kind)
    else:
        keys = schema(kind)
        from_dict({key: OWN_JOB[key] for key in OWN_JOB if key in keys}, source, overrides, kind)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_config_files_load(page: Path, tmp_path: Path) -> None:
    kinds = {"run.yaml": RunConfig, "job.yaml": BatchConfig, "serve.yaml": ServeConfig}
    for block in blocks(page.read_text(), "yaml"):
        file = re.match(r"# (\S+)\n", block)
        assert file, block
        (tmp_path / file[1]).write_text(block)
        load_config(tmp_path / file[1], (), kinds[file[1]])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_keys_in_prose_exist(page: Path) -> None:
    """Inline code such as `train.steps=50` names a config key."""
    keys = schema(RunConfig)
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        key = re.match(r"([a-z_]+(?:\.[a-z_]+)+)(=|$)", code)
        if key and key[1].partition(".")[0] in sections and not key[1].endswith((".md", ".py")):
            assert key[1] in keys, code


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_scripts_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:grok|tests|configs|benchmarks|launch)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m benchmarks\.(\w+)", text):
        assert (ROOT / f"benchmarks/{module}.py").exists(), module
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for words in commands(text):
        if words[0] == "make":
            assert words[1] in targets, words
        if words[0].startswith("launch/"):
            assert (ROOT / words[0]).exists(), words
            if words[0].startswith("launch/runs/") and words[1:] and words[1][0] != "-":
                assert (ROOT / f"launch/{words[1]}.sh").exists(), words


def test_the_tree_is_complete() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    tree = re.findall(r"^  (\w+(?:/|\.py)) ", page, flags=re.MULTILINE)
    entries = {path.name for path in (ROOT / "grok").iterdir() if not path.name.startswith("__")}
    assert {entry.rstrip("/") for entry in tree} == entries - {
        "configs"
    }  # the presets, where the package is installed


PRESETS = sorted((ROOT / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=name)
def test_presets_begin_with_their_command(preset: Path, tmp_path: Path) -> None:
    first, second, *_ = preset.read_text().splitlines()
    words = shlex.split(first.removeprefix("# "))
    assert first.startswith("# ") and second.startswith("# ")
    if words[0] == "python":
        assert (ROOT / words[1]).exists()
        return
    assert words[0] == "grok"
    command = main.get_command(main.make_context("grok", words[1:]), words[1])
    assert command is not None
    parsed = command.make_context(words[1], words[2:]).params
    if "overrides" in parsed:
        assert parsed["config"] == preset.stem
        check_config(words[1], parsed)


def test_table_of_presets_is_right() -> None:
    rows = re.findall(
        r"^\| `(grok-\w+)` \| ([\d,]+) \| ([\d,]+) \| (\d+) \| (\d+) \|",
        (ROOT / "docs/own-text.md").read_text(),
        flags=re.MULTILINE,
    )
    assert len(rows) >= 6
    for preset, total, active, layers, embed in rows:
        model = load_config(preset).model
        assert (layers, embed) == (str(model.num_layers), str(model.embed_dim))
        head = (ROOT / f"configs/models/{preset}.yaml").read_text()  # held by tests/test_config.py
        assert f"{total} parameters, {active} active per token" in head


NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_notebooks_hold_no_outputs(notebook: Path) -> None:
    """Outputs are of one machine, and hide what changed; tests/prove/ runs the cells."""
    cells = json.loads(notebook.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 8
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert f"notebooks/{notebook.name}" in (ROOT / "docs" / "python.md").read_text()


def test_docstrings_begin_with_a_verb_or_noun() -> None:
    question = ("What", "Which", "Whether", "Where", "How", "When", "If")
    bad = []
    for file in sorted((ROOT / "grok").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                if re.match(rf"({'|'.join(question)})\b", docstring):
                    bad.append(f"{name(file)}: {docstring.splitlines()[0]}")
    assert not bad, "\n".join(bad)
