"""What the quickstart needs beside the trainer: a corpus, honest baselines, a picture."""
