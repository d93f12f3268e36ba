"""Tokenizer: nothing is lost, streams agree with whole decodes, refusals are sentences."""

import codecs
import inspect
import random
from pathlib import Path

import pytest

from grok.data.tokenizers import StreamDecoder, Tokenizer, load_tokenizer
from grok.data.tokenizers import sentencepiece as tokenizer_module
from grok.data.tokenizers.files import read_template
from grok.data.tokenizers.sentencepiece import train_tokenizer
from grok.data.tokenizers.tokenizer import read_text
from grok.errors import DataError

RELEASE = Path(__file__).parents[3] / "shared/tokenizer/grok-1.model"
SOURCE = inspect.getsource(inspect) + inspect.getsource(tokenizer_module)
ODD_TEXTS = [
    "",
    " ",
    "  two before, three after   ",
    "\n",
    "\n\n\n\n\n\n\n",
    "tabs\t\tand\r\nline ends\r, form feed\f, zero\0",
    "NFC caf\u00e9, NFD cafe\u0301, full width \uff21\uff22, no-break\u00a0space, \ufeff",
    "\u2581 is SentencePiece's own space \u2581\u2581 x\u2581",
    "emoji \U0001f469\u200d\U0001f4bb, Chinese 你好, Arabic مرحبا, last code point \U0010ffff",
    "<s> </s> <unk> <pad> <0x41> 1234567890",
]


@pytest.fixture(scope="module")
def source_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "source.txt"
    path.write_bytes(SOURCE.encode())
    return path


@pytest.fixture(scope="module")
def tokenizer(source_file, tmp_path_factory) -> Tokenizer:
    return train_tokenizer([source_file], tmp_path_factory.mktemp("model") / "t.model", 1024)


@pytest.fixture(scope="module")
def release() -> Tokenizer:
    if not RELEASE.exists():
        pytest.skip("the release's tokenizer is not beside the repository (shared/tokenizer)")
    return load_tokenizer(RELEASE)


def streamed(tokenizer: Tokenizer, ids: list[int], after: list[int] = ()) -> list[str]:
    decoder = StreamDecoder(tokenizer, after)
    return [decoder.push(i) for i in ids] + [decoder.flush()]


@pytest.mark.parametrize("text", [SOURCE, *ODD_TEXTS])
def test_round_trip_loses_nothing(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_round_trip_of_random_characters(tokenizer):
    draw = random.Random(0)
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    text = "".join(chr(draw.choice(points)) for _ in range(3000))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "".join(streamed(tokenizer, tokenizer.encode(text))) == text


def test_ids_and_size(tokenizer):
    ids = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id)
    assert ids == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 1024
    assert tokenizer.decode([0, 1, *tokenizer.encode("a b"), 2]) == "a b"


def test_digits_are_split_and_newline_runs_are_one_piece(tokenizer):
    assert len(tokenizer.encode("1024")) == 4
    assert len(tokenizer.encode("\n\n\n\n")) == 1


def test_training_twice_gives_the_same_bytes(source_file, tmp_path):
    for name in ("a", "b"):
        train_tokenizer([source_file], tmp_path / name, 600)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_training_is_quiet_and_the_file_loads(source_file, tmp_path, capfd):
    out = tmp_path / "new" / "t.model"
    trained = train_tokenizer([source_file], out, 600)
    assert capfd.readouterr() == ("", "")
    loaded = load_tokenizer(out)
    assert loaded.encode(SOURCE) == trained.encode(SOURCE)


def test_stream_holds_back_parts_of_a_character(tokenizer):
    ids = tokenizer.encode("a\U0001f40b b")
    texts = streamed(tokenizer, ids)
    assert "".join(texts) == "a\U0001f40b b"
    assert "\U0001f40b" in texts
    assert "\ufffd" not in "".join(texts)


def test_stream_flush_shows_an_unfinished_character(tokenizer):
    ids = tokenizer.encode("a\U0001f40b")[:-1]
    assert streamed(tokenizer, ids)[-1] == "\ufffd"
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "a\ufffd"


def test_stream_of_random_ids_is_decode(tokenizer):
    draw = random.Random(0)
    ids = [draw.randrange(tokenizer.vocab_size) for _ in range(5000)]
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_release_encodes_as_published(release):
    ids = release.encode("The answer to life the universe and everything is of course")
    assert ids == [422, 3033, 356, 1180, 333, 9072, 360, 2175, 391, 359, 1805]
    assert release.vocab_size == 131072
    assert (release.pad_id, release.bos_id, release.eos_id, release.unk_id) == (0, 1, 2, 3)


@pytest.mark.parametrize("text", [SOURCE, *ODD_TEXTS[1:7], *ODD_TEXTS[8:]])
def test_release_round_trip(release, text):
    assert release.decode(release.encode(text)) == text


def test_release_streams_spaces_as_decode_does(release):
    prompt, rest = release.encode("The answer to life"), release.encode(" is é")[1:]
    assert streamed(release, prompt)[:2] == ["The", " answer"]
    assert streamed(release, release.encode("is"), after=prompt)[0] == " is"
    text = release.decode(prompt + rest)
    assert text == "The answer to life" + "".join(streamed(release, rest, after=prompt))


@pytest.mark.parametrize("content", [b"", b"import os\n", b"\0" * 64])
def test_load_refuses_what_is_no_model(tmp_path, content):
    path = tmp_path / "wrong.model"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"wrong\.model is not a SentencePiece model"):
        load_tokenizer(path)


def test_load_refuses_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"none\.model: cannot be read: No such file"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_encode_and_decode_refuse_what_cannot_be(tokenizer):
    with pytest.raises(DataError, match="surrogate pair at character 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(DataError, match="token id 1024 is not among the tokenizer's 1024"):
        tokenizer.decode([1024])


def test_train_refuses_impossible_sizes_naming_ones_that_work(tmp_path):
    text, out = tmp_path / "short.txt", tmp_path / "t.model"
    text.write_text("a few words and no more\n" * 3)
    with pytest.raises(DataError, match=r"short\.txt and 2 more is too short for"):
        train_tokenizer([text] * 5, out, 5000)
    with pytest.raises(DataError, match=r"short\.txt is too short for .* 5000 pieces") as refusal:
        train_tokenizer([text], out, 5000)
    assert train_tokenizer([text], out, last_number(refusal)).decode([5]) == "\n\n"
    with pytest.raises(DataError, match="a vocabulary of 100 pieces cannot hold") as refusal:
        train_tokenizer([text], out, 100)
    train_tokenizer([text], out, last_number(refusal))
    with pytest.raises(DataError, match="no text files"):
        train_tokenizer([], out, 300)


def last_number(refusal) -> int:
    return int(str(refusal.value).split()[-3])


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"The mill.\r\n")
    assert read_text(tmp_path / "a.txt") == "The mill.\r\n"
    (tmp_path / "template.jinja").write_bytes(codecs.BOM_UTF8 + b"{{ messages }}")
    assert read_template(str(tmp_path / "template.jinja")) == "{{ messages }}"
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8)
    with pytest.raises(DataError, match=r"a\.txt is empty"):
        read_text(tmp_path / "a.txt")
