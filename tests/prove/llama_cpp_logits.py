"""Logits and token ids of a GGUF file by llama.cpp, in the library of the package xllamacpp.
Run in an environment that has it and NumPy:

python llama_cpp_logits.py FILE INPUTS OUT

INPUTS is an .npz of token ids by name, and OUT gets the logits (T, V) of each; where the standard
input has a JSON list of texts, the last line printed is a list of their token ids."""

import ctypes
import json
import struct
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_void_p

import numpy as np
import xllamacpp.xllamacpp


class Params(ctypes.Structure):
    """llama_model_params or llama_context_params, of which bytes behind the end are not read."""

    _fields_ = (("words", ctypes.c_uint64 * 64),)


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


# Bytes of llama_context_params, and the defaults there: another layout is noticed.
N_CTX, N_BATCH, N_UBATCH, N_THREADS, N_THREADS_BATCH, FLASH, TYPE_K, TYPE_V = (
    *(0, 4, 8, 28, 32),
    *(52, 104, 108),
)
DEFAULTS = {N_CTX: 512, N_BATCH: 2048, N_UBATCH: 512, FLASH: -1, TYPE_K: 1, TYPE_V: 1}
FLOAT32, OFF = 0, 0


def declared(lib, name: str, result, *arguments):
    function = getattr(lib, name)
    function.restype, function.argtypes = result, arguments
    return function


def context_params(lib, length: int) -> Params:
    params = declared(lib, "llama_context_default_params", Params)()
    for offset, value in DEFAULTS.items():
        assert struct.unpack_from("<i", params, offset) == (value,), offset
    # Nothing is rounded to float16 that a model's arithmetic does not round.
    changes = {N_CTX: length, N_BATCH: length, N_UBATCH: length, N_THREADS: 1}
    changes |= {N_THREADS_BATCH: 1, FLASH: OFF, TYPE_K: FLOAT32, TYPE_V: FLOAT32}
    for offset, value in changes.items():
        struct.pack_into("<i", params, offset, value)
    return params


def logits(lib, model, vocab_size: int, tokens: np.ndarray) -> np.ndarray:
    length = len(tokens)
    init = declared(lib, "llama_init_from_model", c_void_p, c_void_p, Params)
    context = init(model, context_params(lib, max(32, length)))
    assert context
    batch = declared(lib, "llama_batch_init", Batch, c_int32, c_int32, c_int32)(length, 0, 1)
    batch.n_tokens = length
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
        batch.seq_id[i][0] = 0
    assert declared(lib, "llama_decode", c_int32, c_void_p, Batch)(context, batch) == 0
    values = declared(lib, "llama_get_logits", POINTER(c_float), c_void_p)(context)
    found = np.ctypeslib.as_array(values, (length, vocab_size)).copy()
    declared(lib, "llama_free", None, c_void_p)(context)
    return found


def tokenized(lib, vocab, text: str) -> list[int]:
    tokenize = declared(
        lib, "llama_tokenize", c_int32, c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32,
        c_bool, c_bool,
    )  # fmt: skip
    data, room = text.encode(), (c_int32 * 4096)()
    count = tokenize(vocab, data, len(data), room, 4096, False, False)
    return list(room[:count])


def main(file: str, inputs: str, out: str) -> None:
    lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    lib.llama_backend_init()
    params = declared(lib, "llama_model_default_params", Params)()
    load = declared(lib, "llama_model_load_from_file", c_void_p, c_char_p, Params)
    model = load(file.encode(), params)
    assert model, f"{file} was not loaded"
    vocab = declared(lib, "llama_model_get_vocab", c_void_p, c_void_p)(model)
    vocab_size = declared(lib, "llama_vocab_n_tokens", c_int32, c_void_p)(vocab)
    with np.load(inputs) as prompts:
        results = {name: logits(lib, model, vocab_size, tokens) for name, tokens in prompts.items()}
    np.savez(out, **results)
    texts = json.loads(sys.stdin.read() or "[]")
    print(json.dumps([tokenized(lib, vocab, text) for text in texts]))


if __name__ == "__main__":
    main(*sys.argv[1:])
