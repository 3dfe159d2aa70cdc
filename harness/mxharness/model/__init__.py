"""Real models whose weights can be held in MXFP4 and multiplied by the project's own kernels.

gguf.py reads a file, tokenizer.py turns text into ids, llama.py is the decoder, backend.py says with which
weights and which arithmetic its contractions run.
"""
