"""Record llama.cpp's logits for files that `mxharness quantize` writes, for suites/test_loading_peers.py.

    pip install llama-cpp-python && python examples/record_llama_cpp.py [OUT]

Building llama-cpp-python takes minutes, so CI compares with what this wrote; where it is installed, the test runs it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import llama_cpp
import numpy as np
from mxharness.model import toy
from mxharness.model.quantising import quantise
from mxharness.model.tensorfile import file_sha256

OUT = Path(__file__).resolve().parent.parent / "suites" / "llama_cpp.json"
TOKENS = [(7 * i * i + 3 * i) % 259 for i in range(24)]
POSITIONS = (0, 11, 23)
F32 = 0
"""ggml's number of the format that keys and values are cached in."""


def logits(path: Path) -> list[list[float]]:
    """(positions, vocabulary) of llama.cpp on one thread, float32 cache."""
    model = llama_cpp.Llama(
        str(path), n_ctx=32, n_batch=32, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        type_k=F32, type_v=F32, flash_attn=False,
    )  # fmt: skip
    model.eval(TOKENS)
    found = np.array(model.scores[: len(TOKENS)])[list(POSITIONS)]
    model.close()
    return [[round(float(value), 5) for value in row] for row in found]


def main(out: Path) -> None:
    """Write the record."""
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        for architecture, config in toy.CONFIGS.items():
            path = Path(folder) / f"{architecture}.gguf"
            quantise(toy.stable(config), path)
            models[architecture] = {"sha256": file_sha256(path), "logits": logits(path)}
    made_by = f"llama-cpp-python {metadata.version('llama_cpp_python')}"
    record = {"made_by": made_by, "tokens": TOKENS, "positions": POSITIONS, "models": models}
    out.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
