"""Real models whose weights can be held in MXFP4 and multiplied by the project's own kernels.

load.py reads one as a checkpoint, tokenizer.py turns text into ids; reference.py runs it in float32 torch, decoder.py
on the kernels, and what measures a model takes either as a runner.
"""
