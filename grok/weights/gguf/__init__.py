"""GGUF, the file format of llama.cpp and the programs around it."""
