"""Dependencies run downward only: the table below, enforced over the imports of every file.

Nothing is imported here; the files are parsed. Imports inside functions count too.
"""

import ast
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each layer may import of grok, itself always included. The longest name that fits a module
# is its layer.
BASE = (
    *("errors", "terminal", "config", "hub", "byte_ranges", "storage", "locks", "progress"),
    "resumable",
)
MODEL = (*BASE, "hardware", "compiler", "sharding", "ops", "model")
WEIGHTS = (*MODEL, "distributed", "weights", "checkpoint")
RUNS = (*WEIGHTS, "cluster", "compile_cache", "preemption", "data", "optim")
RUNNERS = (*RUNS, "train", "infer", "plan")
ALLOWED = {
    "__init__": (),
    "errors": (),
    "terminal": (),
    "config": ("errors",),
    "hub": (),
    "byte_ranges": (),
    "storage": ("errors", "hub", "byte_ranges"),
    "locks": ("errors", "storage"),
    "resumable": ("errors", "storage"),
    "progress": ("errors", "terminal"),
    "hardware": (),
    "compiler": ("hardware",),
    "rendezvous": ("errors",),
    "cluster": ("errors", "hardware"),
    "distributed": (*BASE, "cluster", "rendezvous"),
    "compile_cache": (*BASE, "hardware", "distributed"),
    "preemption": (*BASE, "distributed", "sharding"),
    "sharding": (*BASE, "hardware"),
    "ops": ("hardware",),
    "model": (*BASE, "hardware", "sharding", "ops"),
    "data": (*BASE, "sharding"),
    "optim": MODEL,
    "checkpoint": (*MODEL, "distributed", "weights"),
    "weights": (*MODEL, "checkpoint"),
    "train": RUNS,
    "infer": RUNS,
    "api": (*RUNS, "train", "infer"),
    "plan": (*RUNS, "train", "infer"),
    "calibrate": (*RUNS, "train", "infer", "plan"),
    "report": (*BASE, "train"),
    "evaluate": (*RUNS, "train", "infer"),
    "batch": (*RUNS, "train", "infer"),
    "serve": (*RUNS, "infer"),
    "quickstart": (*RUNNERS, "report"),
    "cli": (*RUNNERS, "calibrate", "evaluate", "batch", "serve", "quickstart", "report"),
    "__main__": ("cli",),
}

# Packages that modules of one layer alone may import.
ONE_IMPORTER = {"orbax": "checkpoint"}

# What a command may import before it runs, besides the standard library and other commands: its
# help must answer at once.
CLI_AT_ONCE = ("click", "grok.errors", "grok.terminal")


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module: `name` in full, and whether it is imported with the file."""

    name: str
    line: int
    at_once: bool


def check_layering(root: Path) -> list[str]:
    """Every violation under `root` as `path:line: sentence`."""
    files = {module_name(path, root): path for path in sorted((root / "grok").rglob("*.py"))}
    problems = [
        f"{path.relative_to(root)}:1: launch/ holds shell scripts; Python belongs in grok/."
        for path in sorted((root / "launch").rglob("*.py"))
    ]
    for module, path in files.items():
        where = path.relative_to(root)
        layer = layer_of(module)
        if layer is None:
            problems.append(
                f"{where}:1: {module} is in no layer; give it a row in {Path(__file__).name}."
            )
            continue
        for found in imports_of(path, module, files):
            problem = judge(module, layer, found, files)
            if problem:
                problems.append(f"{where}:{found.line}: {problem}")
    return problems


def judge(module: str, layer: str, found: Import, files: dict[str, Path]) -> str | None:
    """What is wrong with this import in this module of this layer, if anything is."""
    package = found.name.split(".")[0]
    if found.name == "grok.__version__":
        return None
    if package in ONE_IMPORTER and layer != ONE_IMPORTER[package]:
        return f"only grok.{ONE_IMPORTER[package]} may import {package}."
    if package == "grok" and found.name not in files:
        return f"{found.name} is no module; import from the file that defines it."
    if package == "grok":
        target = layer_of(found.name)
        if target is not None and target not in (layer, *ALLOWED[layer]):
            allowed = ", ".join(ALLOWED[layer]) or "nothing of grok"
            return f"{layer} must not import {target} ({found.name}); it may import {allowed}."
    if layer == "cli" and found.at_once:
        light = package in sys.stdlib_module_names or layer_of(found.name) == "cli"
        if not light and found.name not in CLI_AT_ONCE and package not in CLI_AT_ONCE:
            return f"{found.name} must be imported inside the function that needs it: help is fast."
    return None


def layer_of(module: str) -> str | None:
    """The row of ALLOWED that `module` (such as grok.hardware) falls under."""
    inside = module.removeprefix("grok").removeprefix(".") or "__init__"
    rows = [row for row in ALLOWED if f"{inside}.".startswith(f"{row}.")]
    return max(rows, key=len, default=None)


def module_name(path: Path, root: Path) -> str:
    """`grok/ops/attention/flash.py` -> `grok.ops.attention.flash`; a package for its
    `__init__.py`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, module: str, files: dict[str, Path]) -> Iterator[Import]:
    """All imports of a file. `from grok.ops.attention import flash` imports
    `grok.ops.attention.flash`."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node, at_once in walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), True):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, source] if source else above)
            inside = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name in files or source == "grok" else source for name in inside]
        else:
            continue
        for name in names:
            yield Import(name, node.lineno, at_once)


def walk(node: ast.AST, at_once: bool) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes below, each with whether it runs when the file is imported."""
    for child in ast.iter_child_nodes(node):
        yield child, at_once
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from walk(child, False)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for part in child.body:
                yield part, False
                yield from walk(part, False)
            for part in child.orelse:
                yield part, at_once
                yield from walk(part, at_once)
        else:
            yield from walk(child, at_once)


def test_layering() -> None:
    problems = check_layering(ROOT)
    assert not problems, "\n" + "\n".join(problems)


TREE = (
    "__init__ __main__ errors config/__init__ config/load hardware sharding quickstart "
    "ops/__init__ ops/attention/flash model/decoder data/device_feed train/loop train/step "
    "infer/engine checkpoint/manager weights/xai/source plan/format cli/main cli/train"
).split()


def tree_with(root: Path, file: str, code: str) -> Path:
    """A tree of empty modules under `root`, and `code` in one file."""
    for module in TREE:
        path = root / "grok" / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    return root


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("grok/config/__init__.py", "from grok.errors import ConfigError"),
        ("grok/model/decoder.py", "import jax\nfrom grok.ops.attention import flash"),
        ("grok/train/loop.py", "from grok.train import step\nfrom grok.checkpoint import manager"),
        ("grok/train/loop.py", "from grok import hardware"),
        ("grok/plan/format.py", "from grok.train.step import train_step"),
        ("grok/checkpoint/manager.py", "import orbax.checkpoint as ocp"),
        ("grok/quickstart.py", "from grok.infer import engine"),
        ("grok/cli/main.py", "import sys\nimport click\nfrom grok import __version__, errors"),
        ("grok/cli/main.py", "from grok.errors import GrokError\nfrom grok.cli import train"),
        ("grok/cli/train.py", "def run():\n    import jax\n    from grok.train import loop"),
        ("grok/cli/train.py", "import typing\nif typing.TYPE_CHECKING:\n    import jax"),
        ("launch/create.sh", "echo hello"),
    ],
)
def test_allowed_imports_pass(tmp_path: Path, file: str, code: str) -> None:
    assert check_layering(tree_with(tmp_path, file, code)) == []


@pytest.mark.parametrize(
    ("file", "code", "problem"),
    [
        ("grok/config/__init__.py", "import grok.sharding", "config must not import sharding"),
        (
            "grok/ops/attention/flash.py",
            "from grok.model.decoder import G",
            "ops must not import model",
        ),
        (
            "grok/ops/attention/flash.py",
            "from ...model.decoder import Decoder",
            "ops must not import model",
        ),
        ("grok/ops/__init__.py", "from ..train import loop", "ops must not import train"),
        ("grok/model/decoder.py", "def f():\n    import grok.plan.format", "must not import plan"),
        ("grok/model/decoder.py", "from grok import Grok", "grok.Grok is no module"),
        ("grok/model/decoder.py", "import grok.train.missing", "grok.train.missing is no module"),
        (
            "grok/data/device_feed.py",
            "from grok.ops.attention import flash",
            "data must not import ops",
        ),
        (
            "grok/data/device_feed.py",
            "import grok.checkpoint.manager",
            "data must not import checkpoint",
        ),
        ("grok/weights/xai/source.py", "from grok.train import step", "must not import train"),
        ("grok/weights/xai/source.py", "import grok.infer.engine", "must not import infer"),
        ("grok/weights/xai/source.py", "import orbax.checkpoint", "only grok.checkpoint"),
        ("grok/train/loop.py", "from orbax import checkpoint", "only grok.checkpoint"),
        ("grok/train/loop.py", "from grok.infer import engine", "train must not import infer"),
        ("grok/infer/engine.py", "from grok.train import step", "infer must not import train"),
        ("grok/hardware.py", "from grok.train import step", "hardware must not import train"),
        ("grok/plan/format.py", "from grok.cli import main", "plan must not import cli"),
        ("grok/quickstart.py", "from grok.cli import main", "quickstart must not import cli"),
        ("grok/cli/train.py", "import jax", "jax must be imported inside"),
        ("grok/cli/train.py", "if True:\n    import numpy.linalg", "must be imported inside"),
        ("grok/cli/train.py", "from grok.train import loop", "train.loop must be imported inside"),
        ("grok/cli/train.py", "from grok.config import X", "grok.config must be imported inside"),
        ("grok/helpers.py", "", "grok.helpers is in no layer"),
        ("launch/create.py", "", "launch/ holds shell scripts"),
    ],
)
def test_violation_is_named(tmp_path: Path, file: str, code: str, problem: str) -> None:
    (found,) = check_layering(tree_with(tmp_path, file, code))
    assert found.startswith(f"{file}:")
    assert problem in found
