"""`grok eval`."""

import json
from pathlib import Path
from typing import Any

import click

from grok.cli.completion import overrides_argument
from grok.cli.options import COUNT, COUNT_OR_ZERO, PATH, HomePath
from grok.cli.tables import make_console, make_table
from grok.errors import require_package


@click.command("eval")
@click.argument("checkpoint", type=PATH)
@overrides_argument("train")
@click.option(
    "--data",
    multiple=True,
    type=PATH,
    metavar="PATH",
    help="Text file, or dataset of `grok data prepare`; may be given several times.",
)
@click.option("--tasks", multiple=True, metavar="TASK", help="Task of lm-eval; may be repeated.")
@click.option(
    "--tasks-folder",
    type=HomePath(exists=True, file_okay=False, path_type=Path),
    help="Folder with YAML files of more tasks; the Python functions they name are run.",
)
@click.option("--fewshot", type=COUNT_OR_ZERO, help="Examples a question; default: the task's.")
@click.option("--limit", type=COUNT, help="Questions of each task.")
@click.option("--config", metavar="CONFIG", help="Preset or YAML file of CHECKPOINT's model.")
@click.option(
    "--tokenizer", type=PATH, metavar="FILE", help="The weights' tokenizer, or its folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def eval_(
    checkpoint, overrides, data, tasks, tasks_folder, fewshot, limit, config, tokenizer, as_json
) -> None:
    """Measure the weights at CHECKPOINT: loss and bits per byte on texts, and tasks of lm-eval.

    CHECKPOINT, local or gs://, is a ckpt-0 folder, a Hugging Face folder (or hf://ORG/NAME), or a
    checkpoint of grok.
    One device is used unless KEY=VALUE says otherwise, as in mesh.tensor=4; data.batch_size and
    data.sequence_length are the shape of a batch."""
    if not data and not tasks:
        raise click.UsageError("--data PATH or --tasks TASK says what to measure.")
    if tasks:
        require_package("lm_eval", "--tasks", "eval")
    from grok.infer.loader import config_of, find_tokenizer, make_mesh

    run = config_of(checkpoint, config, overrides)

    from grok.hardware import configure_devices

    configure_devices(run.mesh.simulated_devices)

    from grok.evaluate.losses import evaluate_texts
    from grok.model.mesh_fit import check_fits
    from grok.progress import byte_progress
    from grok.weights.load import load

    mesh = make_mesh(run.mesh, run.model)
    check_fits(run, mesh.size)
    tokenizer = find_tokenizer(checkpoint, tokenizer, run, data)
    with byte_progress() as on_progress:
        model = load(checkpoint, run.model, mesh, run.model.param_dtype, on_progress)
    losses = list(evaluate_texts(model, mesh, data, tokenizer, run)) if data else []
    if losses and not as_json:
        table = make_table("data", "tokens", "bytes", "nats/token", "bits/byte", right=4)
        for path, *counts, nats, bits in losses:
            table.add_row(path, *(f"{count:,}" for count in counts), f"{nats:.4f}", f"{bits:.4f}")
        make_console().print(table)
    results = _tasks(model, mesh, tasks, tokenizer, run, tasks_folder, fewshot, limit, as_json)
    if as_json:
        texts = [loss._asdict() for loss in losses]
        click.echo(json.dumps({"checkpoint": checkpoint, "data": texts, "tasks": results}))


def _tasks(model, mesh, tasks, tokenizer, run, folder, fewshot, limit, as_json) -> dict[str, Any]:
    if not tasks:
        return {}
    from grok.data.tokenizers import load_tokenizer
    from grok.evaluate.harness import LmEvalModel, Tasks

    harness = LmEvalModel(model, load_tokenizer(tokenizer), mesh, run.data.batch_size)
    results = Tasks(tasks, folder, fewshot, limit).run(harness)
    if not as_json:
        table = make_table("task", "metric", "value", right=1)
        for task, metrics in results.items():
            for metric, value in metrics.items():
                if isinstance(value, float):
                    table.add_row(task, metric, f"{value:.4f}")
        make_console().print(table)
    return results
