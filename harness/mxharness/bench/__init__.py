"""Speed of every kernel: time, floor, peers, error, repeatability and batch invariance in one row.

work.py       what a row measures: a call, its bytes and operations, its reference, its rivals
products.py   the format and matrix products        layers.py   everything that is made of them
entries.py    which shapes there are, and selecting from them
host.py       the CPU against ggml, gguf-py and torchao
peers.py      libraries that multiply by MXFP4 on a GPU, where they are installed
measure.py    a row from an entry
result.py     rows and records, as JSON             compare.py  a record against an older one
"""
