"""`grok profile`."""

import click

from grok.cli.options import COUNT, PATH


@click.command()
@click.argument("run", type=PATH)
@click.option("--steps", type=COUNT, default=3, show_default=True, help="Steps to profile.")
def profile(run: str, steps: int) -> None:
    """Profile the next steps of the job that trains in RUN, for XProf.

    RUN is the folder of a run, local or gs://. The devices of the job's first process are profiled,
    and the run goes on as it would have: its numbers stay the same. Ctrl-C gives up waiting."""
    from grok.train.telemetry.profile_request import request_profile

    click.echo(f"asking the job in {run} for a profile of its next {steps} steps", err=True)
    answer = request_profile(run, steps)
    folder = f"{run.rstrip('/')}/profile"
    click.echo(f"steps {answer.first} to {answer.last} are in {folder}")
    click.echo(f"`xprof {folder}`, of the package xprof, shows them", err=True)
