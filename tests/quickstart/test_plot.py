"""The picture of a run: it is drawn for long, short and restarted runs."""

import matplotlib.image
import numpy as np
import pytest

from grok.errors import DataError
from grok.quickstart import plot
from grok.report.plots import raw_and_smooth
from grok.report.recorded_run import drop_redone_steps

BASELINES = {"unigram": 2.63, "bigram": 1.92, "gzip": 2.16}


def training(step: int, num_experts: int = 8) -> dict:
    load = np.random.default_rng(step).dirichlet(np.full(num_experts, 20.0))
    return {"step": step, "loss": 3 + 4 * 0.99**step, "expert_load": load.tolist()}


def validation(step: int) -> dict:
    return {"step": step, "validation_loss": 4.0, "validation_bits_per_byte": 1.7}


def long_run() -> list[dict]:
    lines = [training(step) for step in range(10, 1001, 10)]
    return [*lines[:60], validation(600), {"event": "resumed", "step": 500}, *lines[50:]]


@pytest.mark.parametrize(
    "lines",
    [
        long_run(),
        [training(10), validation(10)],
        [training(10), training(20)],
        [training(10, num_experts=16), training(20, num_experts=16), validation(20)],
    ],
    ids=["long", "one point", "no validation", "many experts"],
)
def test_picture_has_its_size_and_is_not_empty(lines, tmp_path):
    plot.plot_run(lines, tmp_path / "run.png", BASELINES)
    pixels = matplotlib.image.imread(tmp_path / "run.png")
    assert pixels.shape[:2] == (600, 1400)
    left, right = np.split(pixels, 2, axis=1)
    assert left.std() > 0.05
    assert right.std() > 0.05


def test_lines_done_again_after_a_restart_count_once():
    lines, restarts = drop_redone_steps(long_run())
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(10, 1001, 10))
    assert restarts == [500]


def test_smoothing_keeps_few_points_and_means_of_many():
    steps_P = np.arange(100.0)
    (few,) = raw_and_smooth("loss", steps_P[:19], steps_P[:19] ** 2)
    assert (few.y_P == steps_P[:19] ** 2).all()
    raw, smoothed = raw_and_smooth("loss", steps_P, steps_P)
    assert (raw.y_P == steps_P).all()
    np.testing.assert_allclose(smoothed.y_P, steps_P)


def test_run_without_training_lines_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no training line to draw .*run\.png"):
        plot.plot_run([validation(10)], tmp_path / "run.png", BASELINES)
