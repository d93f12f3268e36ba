"""A tokenizer as the keys of a GGUF file, for llama.cpp: SentencePiece's byte pairs with scores, or
byte pairs over bytes with merges. Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from grok.data.tokenizers.byte_pairs import WORD_SPLITS
from grok.data.tokenizers.files import SENTENCEPIECE, TOKENIZER_JSON, parse_object
from grok.data.tokenizers.sentencepiece_proto import (
    BPE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    parse_model,
)
from grok.data.tokenizers.tokenizer import Tokenizer
from grok.errors import DataError

PREFIX = "tokenizer.ggml."
# llama.cpp's words for the patterns by which text is split, with and without `ignore_merges`.
LLAMA_3_SPLIT = WORD_SPLITS["V1"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITS = {(LLAMA_3_SPLIT, True): "llama-bpe", (LLAMA_3_SPLIT, False): "dbrx"} | {
    (WORD_SPLITS["V1"], False): "qwen2"
}
REMEDY = "`--without-tokenizer` leaves it out, and programs then need token ids"


def gguf_keys(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The keys of `tokenizer` for a model whose table has `vocab_size` rows. DataError where
    llama.cpp would split text in another way."""
    readers = {SENTENCEPIECE: _sentencepiece, TOKENIZER_JSON: _byte_level}
    name, path = tokenizer.files.name, tokenizer.files.path
    if name not in readers:
        raise DataError(f"{path}: llama.cpp has no tokenizers of the kind of {name}; {REMEDY}.")
    keys = readers[name](tokenizer, vocab_size)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "padding": tokenizer.pad_id}
    # The second id that ends an answer is that of a turn, as in chats.
    ids["eot"] = next(iter(tokenizer.eos_ids[1:]), -1)
    keys |= {f"{word}_token_id": token_id for word, token_id in ids.items() if token_id >= 0}
    keys |= {"add_bos_token": tokenizer.adds_bos, "add_eos_token": False}
    stored = {f"{PREFIX}{key}": value for key, value in keys.items()}
    if template := tokenizer.files.chat_template():
        stored["tokenizer.chat_template"] = template
    return stored


def _sentencepiece(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    path = tokenizer.files.path
    model = parse_model(tokenizer.files.data)
    if model.model_type != BPE:
        problem = f"{path}: is no model of byte pairs"
        raise DataError(f"{problem}, which llama.cpp would read it as; {REMEDY}.")
    if model.normalization != "identity" or model.drops_spaces:
        problem = f"{path}: changes texts before it splits them ({model.normalization})"
        raise DataError(f"{problem}, which llama.cpp does not; {REMEDY}.")
    texts, scores, kinds = (list(column) for column in zip(*model.pieces, strict=True))
    known = set(texts)
    # llama.cpp writes the space before a text behind a user-defined piece too, so that only those
    # stay one that no merge would find. It looks for them before it writes spaces as the model
    # does; one with a space as it is matches no text of the model's.
    kinds = [
        NORMAL
        if kind == USER_DEFINED and (" " in text or (model.adds_space and _merges(text, known)))
        else kind
        for text, kind in zip(texts, kinds, strict=True)
    ]
    for content, token_id in tokenizer.special_tokens.items():
        texts[token_id], kinds[token_id] = content, CONTROL
    missing = vocab_size - len(texts)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": _padded(texts, vocab_size),
        "token_type": [*kinds, *[UNUSED] * missing],
        "scores": [*scores, *[-10000.0] * missing],
        "add_space_prefix": model.adds_space,
    }


def _merges(text: str, pieces: Collection[str]) -> bool:
    """Returns True for one character, and for two pieces side by side."""
    splits = ((text[:i], text[i:]) for i in range(1, len(text)))
    return len(text) == 1 or any(a in pieces and b in pieces for a, b in splits)


def _byte_level(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    path = tokenizer.files.path
    fields = parse_object(tokenizer.files.data, path)
    model = fields["model"]
    split = _split_pattern(fields.get("pre_tokenizer"))
    pre = SPLITS.get((split or "", bool(model.get("ignore_merges"))))
    if pre is None:
        problem = f"{path}: splits text by a pattern that llama.cpp has no word for, {split!r:.60}"
        raise DataError(f"{problem}; {REMEDY}.")
    if fields.get("normalizer") is not None:
        problem = f"{path}: changes texts before it splits them, which llama.cpp does not"
        raise DataError(f"{problem}; {REMEDY}.")
    special = set(tokenizer.special_tokens.values())
    added = {token["id"] for token in fields.get("added_tokens") or ()}
    texts = [tokenizer.piece(token_id) for token_id in range(tokenizer.vocab_size)]
    kinds = [
        CONTROL if i in special else USER_DEFINED if i in added else NORMAL if text else UNUSED
        for i, text in enumerate(texts)
    ]
    texts = [text or f"[PAD{i}]" for i, text in enumerate(texts)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": _padded(texts, vocab_size),
        "token_type": [*kinds, *[UNUSED] * (vocab_size - len(texts))],
        "merges": merges,
    }


def _split_pattern(stage: Any) -> str | None:
    """The pattern of a pre-tokenizer that splits by one and then takes bytes; None of another."""
    stages: Sequence[Mapping[str, Any]] = (stage or {}).get("pretokenizers") or ()
    match [inner.get("type") for inner in stages]:
        case ["Split", "ByteLevel"] if not stages[1].get("use_regex", True):
            return (stages[0].get("pattern") or {}).get("Regex")
        case _:
            return None


def _padded(texts: Sequence[str], size: int) -> list[bytes]:
    """Tokens with unused ones at the end, as many as a model's table has rows."""
    return [text.encode() for text in (*texts, *(f"[PAD{i}]" for i in range(len(texts), size)))]
