"""Merged mixtures of experts in, GGUF files that llama.cpp runs out."""

__version__ = "0.1.0"
