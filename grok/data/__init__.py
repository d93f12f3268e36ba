"""From text files to batches: tokenizer, token streams, rows, global arrays."""
