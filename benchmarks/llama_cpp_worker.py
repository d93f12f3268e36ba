"""llama.cpp, one measurement a line: run by `benchmarks/against_llama_cpp.py` in an environment
that has xllamacpp and NumPy.

python benchmarks/llama_cpp_worker.py FILE THREADS

Of each line of the standard input, `decode ROWS STEPS` or `prefill TOKENS TIMES`, it prints the
seconds of each as a JSON list; for `memory`, the bytes of memory of the process.
"""

import ctypes
import json
import struct
import sys
import time
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_void_p
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.memory import resident_bytes
from tests.prove.llama_cpp_logits import (
    DEFAULTS,
    N_BATCH,
    N_CTX,
    N_THREADS,
    N_THREADS_BATCH,
    N_UBATCH,
    Batch,
    Params,
    declared,
    xllamacpp,
)

N_SEQ_MAX, MAX_ROWS, CONTEXT, BATCH = 12, 8, 8 * 512, 256


class Llama:
    """A model's file in llama.cpp, on so many threads; all else as llama.cpp has it by default."""

    def __init__(self, file: str, threads: int):
        self._lib = lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        lib.llama_backend_init()
        params = declared(lib, "llama_model_default_params", Params)()
        load = declared(lib, "llama_model_load_from_file", c_void_p, c_char_p, Params)
        model = load(file.encode(), params)
        assert model, f"{file} was not loaded"
        vocab = declared(lib, "llama_model_get_vocab", c_void_p, c_void_p)(model)
        self.vocab_size = declared(lib, "llama_vocab_n_tokens", c_int32, c_void_p)(vocab)
        options = declared(lib, "llama_context_default_params", Params)()
        for offset, value in DEFAULTS.items():
            assert struct.unpack_from("<i", options, offset) == (value,), offset
        assert struct.unpack_from("<i", options, N_SEQ_MAX) == (1,)
        changes = {N_CTX: CONTEXT, N_BATCH: BATCH, N_UBATCH: BATCH, N_SEQ_MAX: MAX_ROWS}
        changes |= {N_THREADS: threads, N_THREADS_BATCH: threads}
        for offset, value in changes.items():
            struct.pack_into("<i", options, offset, value)
        init = declared(lib, "llama_init_from_model", c_void_p, c_void_p, Params)
        self._context = init(model, options)
        assert self._context
        self._batch = declared(lib, "llama_batch_init", Batch, c_int32, c_int32, c_int32)(
            BATCH, 0, 1
        )
        self._decode = declared(lib, "llama_decode", c_int32, c_void_p, Batch)
        self._logits = declared(lib, "llama_get_logits_ith", POINTER(c_float), c_void_p, c_int32)
        self._memory = declared(lib, "llama_get_memory", c_void_p, c_void_p)(self._context)
        self._clear = declared(lib, "llama_memory_clear", None, c_void_p, c_bool)

    def run(self, tokens: list[tuple[int, int, int]], rows: int) -> list[int]:
        """Runs (token, position, sequence) each, and returns the likeliest next token of the last
        `rows`."""
        batch, count = self._batch, len(tokens)
        batch.n_tokens = count
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i >= count - rows
        assert self._decode(self._context, batch) == 0
        found = (self._logits(self._context, i) for i in range(count - rows, count))
        return [int(np.ctypeslib.as_array(row, (self.vocab_size,)).argmax()) for row in found]

    def decode(self, rows: int, steps: int) -> list[float]:
        """Seconds of each step of so many sequences, of which each gets its likeliest token."""
        self._clear(self._memory, True)
        tokens, times = [5 + row for row in range(rows)], []
        for position in range(steps):
            began = time.perf_counter()
            tokens = self.run([(t, position, row) for row, t in enumerate(tokens)], rows)
            times.append(time.perf_counter() - began)
        return times

    def prefill(self, length: int, count: int) -> list[float]:
        """Seconds of a prompt and its answer's first token."""
        times = []
        for i in range(count):
            self._clear(self._memory, True)
            prompt = (np.arange(length) * (i + 3) % 4000 + 4).tolist()
            began = time.perf_counter()
            self.run([(token, position, 0) for position, token in enumerate(prompt)], 1)
            times.append(time.perf_counter() - began)
        return times


def main(file: str, threads: str) -> None:
    """Answers the lines of the standard input."""
    llama = Llama(file, int(threads))
    print(json.dumps([]), flush=True)
    for line in sys.stdin:
        command, *numbers = line.split()
        if command == "memory":
            print(json.dumps([resident_bytes()]), flush=True)
        else:
            print(json.dumps(getattr(llama, command)(*map(int, numbers))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
