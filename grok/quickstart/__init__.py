"""The quickstart: a corpus, baselines to compare with, a picture, and the tour itself."""
