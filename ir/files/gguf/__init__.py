"""GGUF, the file of llama.cpp: reading it, its blocks, its models, and writing it."""
