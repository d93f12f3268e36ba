"""`grok batch`: what is asked is answered, line for line, and what is wrong is said of its line."""

import dataclasses
import datetime
import decimal
import gzip
import json
import random
import signal
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from grok import storage
from grok.batch.runner import Replica, run
from grok.config import EngineConfig, MeshConfig
from grok.config.batch import load_batch_config
from grok.config.infer import BatchConfig
from grok.config.load import load_config
from grok.config.sampling import SamplingConfig
from grok.errors import RESTART, SAVED, ConfigError, DataError, EngineError, GrokError
from grok.infer import loader
from grok.weights.huggingface.export import export_huggingface
from tests.batch.jobs import Killed, Process, answer, lines, write_lines
from tests.emulator import bucket
from tests.fixtures.random_weights import RandomSource
from tests.infer.fake_engine import FakeEngine

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def weights(tiny_run, tmp_path_factory) -> str:
    """A Hugging Face folder of the tiny model, with its tokenizer."""
    folder = tmp_path_factory.mktemp("weights") / "hf"
    export_huggingface(RandomSource(tiny_run.model, dtype="float32"), folder, "float32")
    (folder / "tokenizer.model").write_bytes(Path(tiny_run.data.tokenizer).read_bytes())
    return str(folder)


@pytest.fixture
def config(weights, tmp_path) -> BatchConfig:
    return BatchConfig(
        weights=weights,
        mesh=MeshConfig(data=2, expert=2, tensor=2),
        input=(str(tmp_path / "in.jsonl"),),
        output=str(tmp_path / "out"),
        sampling=SamplingConfig(max_tokens=5),
        chat_template=TEMPLATE,
        shard_size=4,
        seed=3,
    )


def test_requests_are_answered_in_order_with_their_ids(config, tmp_path, monkeypatch):
    records = [
        {"id": "a", "prompt": "The number 4"},
        {"prompt": [40, 41, 42], "max_tokens": 2, "n": 2},
        {"id": {"row": 7}, "prompt": "The", "logprobs": 1, "echo": True, "max_tokens": 1},
        {"id": "a", "prompt": ["The number 4", "The square"], "seed": 9, "stop": "zzz"},
        {"id": None, "messages": [{"role": "user", "content": "4?"}], "temperature": 0},
    ]
    write_lines(tmp_path / "in.jsonl", records)
    answered = answer(config, monkeypatch)
    assert [line["index"] for line in answered] == [0, 1, 2, 3, 4]
    assert [line["id"] for line in answered] == ["a", None, {"row": 7}, "a", None]
    assert [len(line["choices"]) for line in answered] == [1, 2, 1, 2, 1]
    assert [choice["finish_reason"] for choice in answered[1]["choices"]] == ["length"] * 2
    assert answered[1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    scored = answered[2]["choices"][0]
    assert scored["text"].startswith("The")
    tokens = scored["logprobs"]["tokens"]
    assert "".join(tokens).startswith("The")
    assert scored["logprobs"]["token_logprobs"] == [None] + [-0.5] * (len(tokens) - 1)
    assert answered[4]["choices"][0]["message"]["role"] == "assistant"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    counts = (summary["requests"], summary["answered"], summary["failed"], summary["shards"])
    assert counts == (5, 5, 0, 2)
    assert summary["finish_reasons"] == {"length": 7}
    assert summary["completion_tokens"] == sum(len_of(line) for line in answered)


def len_of(line: dict) -> int:
    return line["usage"]["completion_tokens"]


def test_what_is_wrong_with_a_request_is_said_of_it_and_the_job_goes_on(
    config, tmp_path, monkeypatch, capsys
):
    bad = {
        b'{"prompt": "The", "temprature": 1}': ("temprature", "did you mean temperature?"),
        b'{"prompt": "The", "temperature": "hot"}': ("temperature", "must be a number"),
        b'{"prompt": "The", "temperature": 1%b}' % (b"0" * 400): ("temperature", "a number"),
        b'{"prompt": "The", "n": 1%b}' % (b"0" * 400): ("n", "at most 1000000000"),
        b'{"id": NaN, "prompt": "The", "\\ud800": 1}': ("\ud800", "there is no parameter"),
        b'{"prompt": "The", "max_tokens": 3.5}': ("max_tokens", "must be an integer"),
        b'{"prompt": "The", "max_tokens": 500}': ("max_tokens", "longer than the model's context"),
        b'{"prompt": ""}': ("prompt", "the prompt is empty"),
        b'{"id": 4}': ("prompt", "should be a text"),
        b'{"prompt": [1, 320]}': ("prompt", "not from 0 to 319"),
        b'{"prompt": ["The", ""]}': ("prompt", "the prompt is empty"),
        b'{"prompt": "\\ud800"}': ("prompt", "half of a surrogate pair"),
        b'{"prompt": "The \xff"}': ("record", "is not UTF-8 at byte 16 (0xff)"),
        b'{"prompt": "The"': ("record", "is not JSON"),
        b"[1]": ("record", "is no JSON object but a list"),
        b'{"prompt": "The", "stream": true}': ("stream", "the answers go to a file"),
        b'{"prompt": "The", "n": 1000}': ("n", "128 would work"),
        b'{"messages": [{"role": "user"}]}': ("messages", "content of a message should be text"),
        b'{"custom_id": "x", "method": "POST", "url": "/v1/embeddings", "body": {}}': (
            "url",
            "should be /v1/completions or /v1/chat/completions",
        ),
    }
    good = b'{"prompt": "The"}'
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*bad, good]))
    answered = answer(config, monkeypatch)
    assert len(answered) == len(bad) + 1
    for line, (parameter, words) in zip(answered, bad.values(), strict=False):
        error = line.get("error") or line["response"]["body"]["error"]
        assert (error["param"], error["type"]) == (parameter, "invalid_request_error")
        assert words in error["message"]
    assert answered[-1]["choices"][0]["text"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["answered"], summary["failed"]) == (1, len(bad))
    assert summary["failures"]["record"] == 3
    assert summary["failures"]["unknown parameter"] == 2
    said = capsys.readouterr().out
    counts = f"1 of {len(bad) + 1} requests answered, {len(bad)} failed"
    assert f"{counts} (prompt 5, record 3, unknown parameter 2, tem" in said
    assert f"; {summary['prompt_tokens']} tokens in, 5 out: see {config.output}\n" in said


def test_batch_files_of_openai(config, tmp_path, monkeypatch):
    message = {"model": "grok", "messages": [{"role": "user", "content": "4?"}], "n": 2}
    write_lines(
        tmp_path / "in.jsonl",
        [
            envelope("a", "/v1/completions", {"model": "grok", "prompt": "The", "logprobs": 2}),
            envelope("b", "/v1/chat/completions", message),
            envelope("c", "/v1/completions", {"prompt": "The", "suffix": "x"}),
        ],
    )
    first, second, third = answer(config, monkeypatch)
    assert [line["custom_id"] for line in (first, second, third)] == ["a", "b", "c"]
    assert [line["response"]["status_code"] for line in (first, second, third)] == [200, 200, 400]
    completion = first["response"]["body"]
    assert (completion["object"], completion["model"]) == ("text_completion", "grok")
    assert len(completion["choices"][0]["logprobs"]["top_logprobs"][0]) == 2
    assert len(second["response"]["body"]["choices"]) == 2
    assert third["response"]["body"]["error"]["param"] == "suffix"


def envelope(name: str, url: str, body: dict) -> dict:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def test_files_of_all_kinds_and_a_bucket_give_the_same_answers(config, tmp_path, monkeypatch):
    records = [{"id": n, "prompt": f"The number {n}", "max_tokens": 1 + n % 3} for n in range(10)]
    write_lines(tmp_path / "in.jsonl", records)
    expected = answer(config, monkeypatch)
    folder = tmp_path / "parts"
    folder.mkdir()
    write_lines(folder / "a.jsonl", records[:3])
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("".join(f"{json.dumps(record)}\n" for record in records[3:5]))
    parquet.write_table(pyarrow.Table.from_pylist(records[5:]), folder / "c.parquet")
    (folder / "notes.txt").write_text("not read")
    several = dataclasses.replace(
        config, input=(str(folder / "*.jsonl*"), str(folder)), output=str(tmp_path / "several")
    )
    doubled = answer(several, monkeypatch)
    assert [line["id"] for line in doubled] == [0, 1, 2, 3, 4, *range(10)]
    with bucket():
        for file in folder.iterdir():
            storage.copy(file, f"gs://bucket/in/{file.name}")
        remote = dataclasses.replace(
            config, input=("gs://bucket/in/*.[jp]*",), output="gs://bucket/out"
        )
        answer(remote, monkeypatch)
        text = b"".join(
            storage.read_bytes(f"gs://bucket/out/answers/{number:06d}.jsonl") for number in range(3)
        )
        nowhere = dataclasses.replace(config, input=("gs://other/*.jsonl",))
        with pytest.raises(DataError, match=r"gs://other/\*.jsonl matches no files"):
            answer(nowhere, monkeypatch)
    assert [json.loads(line) for line in text.splitlines()] == expected


def test_columns_of_parquet_with_nulls_have_floats(config, tmp_path, monkeypatch):
    columns = {"prompt": ["The", "A"], "max_tokens": [2.0, None], "temperature": [0.5, 1.0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    job = dataclasses.replace(config, input=(str(tmp_path / "in.parquet"),))
    assert [len_of(line) for line in answer(job, monkeypatch)] == [2, 5]


@pytest.fixture
def job(config, tmp_path) -> BatchConfig:
    """A job of forty requests, not yet begun."""
    records = [{"id": n, "prompt": f"The number {n}", "max_tokens": 1 + n % 7} for n in range(40)]
    write_lines(tmp_path / "in.jsonl", records)
    return config


def answers_and_counts(output: str) -> tuple[list[dict], dict]:
    summary = json.loads((Path(output) / "summary.json").read_text())
    times = ("seconds", "prompt_tokens_per_second", "completion_tokens_per_second")
    return lines(Path(output)), {key: summary[key] for key in summary if key not in times}


def test_a_job_killed_ten_times_answers_each_request_once(job, tmp_path, monkeypatch):
    answer(job, monkeypatch)
    broken = dataclasses.replace(job, output=str(tmp_path / "broken"))
    draw = random.Random(0)
    done = []
    for _ in range(10):
        with pytest.raises(Killed):
            answer(broken, monkeypatch, draw.randrange(1, 12))
        done.append(len(lines(Path(broken.output))))
    assert sorted(done) == done
    assert 0 < done[-1] < 40
    answer(broken, monkeypatch)
    assert answers_and_counts(broken.output) == answers_and_counts(job.output)


def test_processes_that_are_stopped_or_killed_leave_whole_shards(job, tmp_path, monkeypatch):
    answer(job, monkeypatch)
    both = dataclasses.replace(job, output=str(tmp_path / "both"))
    words = [
        *(str(job_file(tmp_path, both)), "mesh.data=2", "mesh.expert=2", "mesh.tensor=2"),
        *("sampling.max_tokens=5", "shard_size=4", "seed=3"),
    ]
    stopped = Process(words, 0, 2, at=9, signal=signal.SIGTERM)
    killed = Process(words, 1, 2, at=12)
    code, said = stopped.end()
    assert code == SAVED, said
    assert "asked to stop; the same command continues" in said
    assert killed.end()[0] == -signal.SIGKILL
    assert 0 < len(lines(tmp_path / "both")) < 40
    # One process goes on with what two have left.
    answer(both, monkeypatch)
    assert answers_and_counts(both.output) == answers_and_counts(job.output)


def job_file(folder: Path, config: BatchConfig) -> Path:
    file = folder / "job.yaml"
    template = json.dumps(config.chat_template)
    text = (
        f"weights: {config.weights}\ninput: {json.dumps(config.input)}\noutput: {config.output}\n"
    )
    file.write_text(f"{text}chat_template: {template}\n")
    return file


def test_a_shard_that_a_model_does_again_is_the_same(config, tmp_path, capsys):
    records = [{"prompt": f"The number {n}", "max_tokens": 2 + n % 4} for n in range(7)]
    write_lines(tmp_path / "in.jsonl", [{**record, "logprobs": 1} for record in records])
    one_device = dataclasses.replace(
        config, mesh=MeshConfig(data=1), engine=EngineConfig(max_num_seqs=4, prefill_chunk_size=32)
    )
    run(one_device, Replica(0, 1, True, False))
    shard = tmp_path / "out" / "answers" / "000001.jsonl"
    before = shard.read_bytes()
    shard.write_bytes(before[:-5])
    (tmp_path / "out" / "statistics" / "000000.json").write_text("[")
    run(one_device, Replica(0, 1, True, False))
    assert shard.read_bytes() == before
    log = "".join(capsys.readouterr())
    for damaged in ("000000", "000001"):
        assert f"answers/{damaged}.jsonl is not as it was written; it is answered again" in log
    assert len({line["choices"][0]["text"] for line in lines(tmp_path / "out")}) == 7


def test_another_job_in_the_same_folder_is_refused(config, tmp_path, monkeypatch):
    write_lines(tmp_path / "in.jsonl", [{"prompt": "The"}] * 3)
    answer(config, monkeypatch)
    hotter = dataclasses.replace(config, sampling=SamplingConfig(max_tokens=5, temperature=0.5))
    with pytest.raises(ConfigError, match=r"sampling.temperature was 1.0 and is 0.5; what it was"):
        answer(hotter, monkeypatch)
    answer(dataclasses.replace(config, mesh=MeshConfig(data=1, expert=2, tensor=4)), monkeypatch)
    write_lines(tmp_path / "in.jsonl", [{"prompt": "The"}] * 2 + [{"prompt": "A"}])
    with pytest.raises(ConfigError, match=r"another job: input.sha256 was"):
        answer(config, monkeypatch)
    (tmp_path / "out" / "job.json").unlink()
    with pytest.raises(ConfigError, match=r"has answers and no job.json"):
        answer(config, monkeypatch)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("in.txt", "The", "is neither JSON lines nor Parquet by its name"),
        ("in.jsonl", "\n", "has no requests"),
        ("other.jsonl", "{}", "in.jsonl: cannot be read: No such file"),
    ],
)
def test_input_that_cannot_be_used(config, tmp_path, monkeypatch, name, text, words):
    (tmp_path / name).write_text(text)
    name_in_config = name if name == "in.txt" else "in.jsonl"
    with pytest.raises(DataError, match=words):
        answer(dataclasses.replace(config, input=(str(tmp_path / name_in_config),)), monkeypatch)


def test_input_that_breaks_off_is_refused(config, tmp_path, monkeypatch):
    whole = gzip.compress(b"".join(b'{"prompt": "The %d"}\n' % n for n in range(1000)))
    (tmp_path / "in.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    job = dataclasses.replace(config, input=(str(tmp_path / "in.jsonl.gz"),))
    with pytest.raises(DataError, match=r"in.jsonl.gz: the gzip data breaks off before its end"):
        answer(job, monkeypatch)
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    job = dataclasses.replace(config, input=(str(tmp_path / "in.parquet"),))
    with pytest.raises(DataError, match=r"in.parquet: the file is no Parquet or damaged"):
        answer(job, monkeypatch)


def test_ids_of_any_type_come_back(config, tmp_path, monkeypatch):
    ids = {
        "time": (datetime.datetime(2024, 5, 1, 12), "2024-05-01 12:00:00"),
        "bytes": (b"\x01\xff", "01ff"),
        "decimal": (decimal.Decimal("1.50"), "1.50"),
        "struct": ({"day": datetime.date(2024, 5, 1)}, {"day": "2024-05-01"}),
        "nan": (float("nan"), "nan"),
        "list": ([1, 2], [1, 2]),
    }
    for name, (value, expected) in ids.items():
        table = pyarrow.table({"id": [value], "prompt": ["The"]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        job = dataclasses.replace(
            config, input=(str(tmp_path / f"{name}.parquet"),), output=str(tmp_path / name)
        )
        (line,) = answer(job, monkeypatch)
        assert (line["id"], len(line["choices"])) == (expected, 1)


class Faulty(FakeEngine):
    """Fails inside the second request that is submitted, in answers to the third, and in no other;
    or breaks down."""

    def __init__(self, tokenizer, breaks: bool = False):
        super().__init__(tokenizer)
        self._breaks = breaks

    def submit(self, request):
        if request.id.startswith("1/"):
            raise ArithmeticError("no such sum")
        super().submit(request)

    def step(self):
        if self._breaks:
            raise RuntimeError("out of memory")
        return [
            dataclasses.replace(output, finish_reason="error", error="it cannot be decoded")
            if output.request_id == "2/1"
            else output
            for output in super().step()
        ]


def test_a_fault_inside_one_request_fails_it_alone(config, tmp_path, monkeypatch):
    write_lines(tmp_path / "in.jsonl", [{"prompt": ["The", "A"]}] * 4)
    monkeypatch.setattr(loader.ServedModel, "engine", lambda self, log: Faulty(self.tokenizer))
    with pytest.raises(GrokError, match=r"2 requests failed by no fault of theirs; their lines in"):
        run(config, Replica(0, 1, True, False))
    answered = lines(tmp_path / "out")
    assert [len(line.get("choices", ())) for line in answered] == [2, 0, 0, 2]
    errors = [answered[n]["error"] for n in (1, 2)]
    assert [error["message"] for error in errors] == ["no such sum", "it cannot be decoded"]
    assert {error["type"] for error in errors} == {"server_error"}


def test_an_engine_that_breaks_down_ends_the_job_to_be_started_again(
    config, tmp_path, monkeypatch, capsys
):
    write_lines(tmp_path / "in.jsonl", [{"prompt": "The"}])
    monkeypatch.setattr(
        loader.ServedModel, "engine", lambda self, log: Faulty(self.tokenizer, breaks=True)
    )
    with pytest.raises(EngineError, match="the engine broke down: out of memory") as caught:
        run(config, Replica(0, 1, True, False))
    assert caught.value.exit_code == RESTART
    assert "RuntimeError" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused(config, tmp_path, monkeypatch):
    write_lines(tmp_path / "in.jsonl", [{"prompt": "The"}])
    with pytest.raises(ConfigError, match=r"in.jsonl cannot be written: File exists; a folder"):
        answer(dataclasses.replace(config, output=config.input[0]), monkeypatch)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.temperature=-1", "sampling.temperature must be at least 0, not -1"),
        ("sampling.min_tokens=500", "sampling.min_tokens=500 is more than max_tokens=128"),
        ("sampling.temprature=1", "did you mean sampling.temperature"),
        ("replica=hosts", "replica must be 'host' or 'all'"),
        ("input=[]", "input names no files"),
        ("output=3", 'output must be text, not 3; did you mean "3"'),
    ],
)
def test_refused_configs(tmp_path, override, words):
    file = tmp_path / "job.yaml"
    file.write_text("weights: w\ninput: [in.jsonl]\noutput: out\n")
    with pytest.raises(ConfigError, match=words):
        load_config(file, [override], BatchConfig)
    file.write_text("weights: w\n")
    with pytest.raises(
        ConfigError, match=r"input, output must be set, for example with `input=\.\.\.`"
    ):
        load_config(file, [], BatchConfig)


def test_weights_in_place_of_a_config(tmp_path):
    file, keys = tmp_path / "job.yaml", ["input=[in.jsonl]", "output=out"]
    file.write_text("weights: w\n")
    for name in (str(tmp_path), "gs://bucket/runs/mine", "hf://org/name"):
        assert load_batch_config(name, keys) == BatchConfig(
            weights=name, input=("in.jsonl",), output="out"
        )
    assert load_batch_config(str(file), keys).weights == "w"


def test_ids_that_python_cannot_hold_come_back(config, tmp_path, monkeypatch):
    nanoseconds = pyarrow.array([1_234_567_890_123_456_789], pyarrow.timestamp("ns"))
    far = pyarrow.array([2**55], pyarrow.timestamp("ms"))
    numbers = (
        pyarrow.array([2**63 - 1]),
        pyarrow.array([2**64 - 1], "uint64"),
        pyarrow.array([1e300]),
    )
    files = []
    for number, ids in enumerate((nanoseconds, far, *numbers)):
        files.append(str(tmp_path / f"{number}.parquet"))
        parquet.write_table(pyarrow.table({"id": ids, "prompt": ["The"]}), files[-1])
    answers = answer(dataclasses.replace(config, input=tuple(files)), monkeypatch)
    assert [line["id"] for line in answers[::2]] == [
        *("2009-02-13 23:31:30.123456789", 2**63 - 1, 1e300)
    ]
    assert all("choices" in line for line in answers)


@pytest.mark.parametrize(
    ("name", "cut", "words"),
    [
        ("in.jsonl.gz", 20, "the gzip data breaks off before its end"),
        ("in.jsonl.zst", 5, "the zstd data breaks off before its end"),
        ("in.parquet", 40, "the file is no Parquet or damaged"),
    ],
)
def test_input_that_is_not_whole_is_refused(config, tmp_path, monkeypatch, name, cut, words):
    records = [{"id": n, "prompt": f"The number {n}"} for n in range(50)]
    text = "".join(f"{json.dumps(record)}\n" for record in records).encode()
    path = tmp_path / name
    match path.suffix:
        case ".gz":
            path.write_bytes(gzip.compress(text))
        case ".zst":
            path.write_bytes(zstandard.compress(text))
        case _:
            parquet.write_table(pyarrow.Table.from_pylist(records), path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(
        DataError, match=f"{name}: {words}.*; an undamaged copy of the file would work"
    ):
        answer(dataclasses.replace(config, input=(str(path),)), monkeypatch)


def test_repeated_ids_are_counted_and_limited(config, tmp_path, monkeypatch, capsys):
    ids = [1, "1", None, None, [1], 1, [1]]
    write_lines(tmp_path / "in.jsonl", [{"id": value, "prompt": "The"} for value in ids])
    answer(config, monkeypatch)
    assert json.loads((Path(config.output) / "summary.json").read_text())["repeated_ids"] == 2
    assert "2 requests have the id of an earlier one" in capsys.readouterr().out
    strict = dataclasses.replace(config, max_repeated_ids=0.1)
    with pytest.raises(DataError, match=r"2 of 7 .*; max_repeated_ids=0.29 would work"):
        answer(strict, monkeypatch)


def test_a_request_that_is_too_long_fails_alone(config, tmp_path, monkeypatch):
    records = [{"prompt": "The"}, {"prompt": "The" * 100}, {"prompt": "A"}]
    write_lines(tmp_path / "in.jsonl", records)
    short = dataclasses.replace(config, max_record_bytes=100)
    first, second, third = answer(short, monkeypatch)
    assert second["error"]["message"] == "the record has more than 100 bytes."
    assert "choices" in first and "choices" in third


def test_names_with_brackets_blanks_and_stars_are_names(config, tmp_path, monkeypatch):
    write_lines(tmp_path / "in[1] *.jsonl", [{"id": 7, "prompt": "The"}])
    write_lines(tmp_path / "in1.jsonl", [{"id": 8, "prompt": "The"}])
    named = dataclasses.replace(config, input=(str(tmp_path / "in[1] *.jsonl"),))
    assert [line["id"] for line in answer(named, monkeypatch)] == [7]
