"""Supervised runs on conversations, and the same conversations asked of what they trained."""

import dataclasses
import json

import pytest

from grok.config import CheckpointConfig
from grok.config.data import DatasetConfig
from grok.config.infer import InferConfig
from grok.data.chat.template import built_in
from grok.data.dataset import TokenDataset
from grok.data.prepare.records import RecordFields
from grok.errors import DataError
from grok.infer.loader import ServedModel
from grok.train.loop import run_training
from tests.data.prepared import prepare
from tests.data.test_chat import TALK, spans
from tests.fixtures.chat_templates import KINDS, LLAMA_3, MARKED, MISTRAL, make_release
from tests.fixtures.prove import in_suite

TEMPLATES = {"llama-3": LLAMA_3, "marked": MARKED, "mistral": MISTRAL}


def prepared(tiny_run, kind, folder, **options):
    """A run on conversations in the folder, prepared with the tokenizer of that kind."""
    make_release(kind, folder / "release")
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"m": TALK}) + "\n")
    fields = RecordFields(text=None, messages="m")
    prepare(folder / "data", [str(rows)], str(folder / "release"), fields=fields, **options)
    data = dataclasses.replace(
        tiny_run.data,
        train=(),
        validation=(),
        datasets=(DatasetConfig(path=str(folder / "data")),),
        tokenizer=str(folder / "release"),
    )
    return dataclasses.replace(
        tiny_run,
        folder=str(folder / "run"),
        data=data,
        optimizer=dataclasses.replace(tiny_run.optimizer, warmup_steps=0),
        train=dataclasses.replace(tiny_run.train, steps=1),
        checkpoint=CheckpointConfig(every=1, keep=1),
    )


@pytest.mark.parametrize("kind", in_suite(KINDS, *list(KINDS)[:2]))
def test_serving_makes_the_prompts_that_were_trained_on(tiny_run, tmp_path, kind):
    config = prepared(tiny_run, kind, tmp_path)
    run_training(config)
    template = (tmp_path / "run" / "chat_template.jinja").read_text()
    assert template == (TEMPLATES.get(kind) or built_in(kind).text)
    document = TokenDataset(tmp_path / "data")[0]
    model = ServedModel(InferConfig(weights=str(tmp_path / "run")))
    first, second = spans(document.mask_S)
    for messages, (start, _) in ((TALK[:1], first), (TALK[:3], second)):
        request = model.parser().chat({"messages": messages})
        assert request.prompts[0] == tuple(document.tokens_S[:start].tolist())
        assert request.params.stop_token_ids[0] in document.tokens_S[start:].tolist()


def test_two_templates_in_one_run_are_refused(tiny_run, tmp_path):
    config = prepared(tiny_run, "grok-1", tmp_path / "one")
    other = prepared(tiny_run, "grok-1", tmp_path / "two", chat_template="grok-2")
    datasets = (*config.data.datasets, *other.data.datasets)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=datasets))
    with pytest.raises(DataError, match="were written by two chat templates, and a model has one"):
        run_training(config)
