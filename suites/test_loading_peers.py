"""What `mxharness quantize` writes, as transformers and llama.cpp read it: the same logits.

llama.cpp multiplies MXFP4 by activations that it rounds to Q8_0 first. Its logits are compared with float32 torch doing
the same rounding, so that agreement is near float32's own, a hundred times below what the rounding does.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mxharness.model import metadata, reference, tokenizer, toy
from mxharness.model.checkpoint import Checkpoint, Vocabulary, values
from mxharness.model.load import load
from mxharness.model.quantising import quantise

RECORD: dict[str, Any] = json.loads(Path(__file__).with_name("llama_cpp.json").read_text())
AGAIN = "python examples/record_llama_cpp.py records llama.cpp's logits anew"
ARCHITECTURES = list(toy.CONFIGS)
TEXT = "It's 2026: \"Ärger\" über 1234567 Dinge,  l'été…\n\n\tx²+y_3 <|end|> I'LL don't 日本語 ok?! ../x//\n/y\r\n   "


def logits(model: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    """(T, vocabulary) float32 torch on the weights as they are stored."""
    runner = reference.float32(model)
    return runner.logits(runner.hidden_states(ids[None])[0])


def as_llama_cpp(model: Checkpoint, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Logits as llama.cpp computes them, with inputs of MXFP4 weights in Q8_0, and without that."""
    config = model.config
    if config.yarn:  # llama.cpp rounds the ends of YaRN's ramp; gpt-oss and its GGUF files know nothing of it
        config = replace(config, yarn=replace(config.yarn, truncate=True))
    weights = {name: values(stored) for name, stored in model.tensors.items()}
    packed = {
        weights[name].untyped_storage().data_ptr() for name, stored in model.tensors.items() if stored.format == "MXFP4"
    }
    real = reference.linear

    def rounded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return real(q8_0(x) if weight.untyped_storage().data_ptr() in packed else x, weight, bias)

    plain = reference.logits(config, weights, reference.hidden_states(config, weights, ids[None])[0])
    with monkeypatch.context() as patch:
        patch.setattr(reference, "linear", rounded)
        return reference.logits(
            config, weights, reference.hidden_states(config, weights, ids[None])[0]
        ).numpy(), plain.numpy()


def q8_0(x: torch.Tensor) -> torch.Tensor:
    """Blocks of 32 as 8-bit integers times a scale of their largest / 127, held in fp16."""
    blocks = x.reshape(-1, 32)
    largest = blocks.abs().amax(1, keepdim=True)
    integers = torch.where(largest > 0, (blocks * (127 / largest)).round(), torch.zeros(()))
    return (integers * (largest / 127).half().float()).reshape(x.shape)


def check(found: Any, wanted: Any, plain: Any) -> None:  # noqa: ANN401  arrays (positions, vocabulary)
    noise, error = np.abs(wanted - plain), np.abs(found - wanted)
    assert noise.mean() > 0.01  # else rounding activations would show nothing
    assert np.median(error) <= 2e-5  # the record has five decimals; float32 sums in another order
    # An activation within float32's rounding of a tie may be rounded the other way, which moves the tokens after it.
    assert error.mean() <= noise.mean() / 20
    assert error.max() <= noise.max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_read_this_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    recorded = RECORD["models"][architecture]
    path = tmp_path / f"{architecture}.gguf"
    quantise(toy.stable(toy.CONFIGS[architecture]), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == recorded["sha256"], f"quantize writes other bytes than those llama.cpp has read: {AGAIN}"
    wanted, plain = as_llama_cpp(load(path), torch.tensor(RECORD["tokens"]), monkeypatch)
    at = RECORD["positions"]
    check(np.array(recorded["logits"]), wanted[at], plain[at])


@pytest.fixture
def llama_cpp() -> Any:  # noqa: ANN401  it ships no types
    return pytest.importorskip(
        "llama_cpp",
        reason="llama-cpp-python is not installed; not run: llama.cpp itself, its record is compared instead",
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_cpp: Any, architecture: str) -> None:  # noqa: ANN401
    path = tmp_path / f"{architecture}.gguf"
    quantise(toy.stable(toy.CONFIGS[architecture]), path)
    model = llama_cpp.Llama(
        str(path), n_ctx=32, n_batch=32, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False,
        type_k=0, type_v=0, flash_attn=False,
    )  # fmt: skip
    model.eval(RECORD["tokens"])
    found = np.array(model.scores[: len(RECORD["tokens"])])
    model.close()
    check(found, *as_llama_cpp(load(path), torch.tensor(RECORD["tokens"]), monkeypatch))


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "qwen2", "gpt-4o"])
def test_llama_cpp_cuts_text_alike(tmp_path: Path, llama_cpp: Any, rule: str) -> None:  # noqa: ANN401
    model = toy.stable(toy.LLAMA)
    words = toy.byte_vocabulary()
    # The last one is a word that no merges lead to: Llama 3's rule takes it, the others do not.
    # Before it, a line's end and a slash: GPT-4o's rule leaves them together.
    tokens = (*words.tokens[:256], "12", "Ċ/", "ĠDinge")
    words = Vocabulary(tokens, ("1 2", "Ċ /"), rule)
    quantise(replace(model, vocabulary=words), tmp_path / "words.gguf")
    peer = llama_cpp.Llama(str(tmp_path / "words.gguf"), vocab_only=True, verbose=False)
    found = peer.tokenize(TEXT.encode(), add_bos=False, special=False)
    assert tokenizer.encode(words, TEXT).tolist() == found
    assert (258 in found) == (rule == "llama-bpe")
    assert (257 in found) == (rule == "gpt-4o")
    assert tokenizer.decode(words, found) == TEXT == peer.detokenize(found).decode()
    peer.close()


def test_the_scheme_is_compressed_tensors_own() -> None:
    schemes = pytest.importorskip(
        "compressed_tensors.quantization",
        reason="compressed-tensors is not installed; not compared: its scheme of MXFP4",
    )
    config = schemes.QuantizationConfig.model_validate(metadata.quantization_config(experts=False, left=["a"]))
    assert config.config_groups["group_0"].weights == schemes.preset_name_to_scheme("MXFP4A16", ["Linear"]).weights
    assert config.format == "mxfp4-pack-quantized"
    assert config.ignore == ["a", "lm_head"]


@pytest.mark.long("transformers")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_transformers_reads_this_folder(tmp_path: Path, architecture: str) -> None:
    transformers = pytest.importorskip("transformers", reason="not compared: what transformers reads")
    pytest.importorskip(
        "compressed_tensors", reason="not compared: transformers needs compressed-tensors to read MXFP4"
    )
    pytest.importorskip("accelerate", reason="not compared: transformers needs accelerate to read MXFP4")
    folder = tmp_path / architecture
    quantise(toy.stable(toy.CONFIGS[architecture]), folder)
    decode = {"llama": "CompressedTensorsConfig", "gpt-oss": "Mxfp4Config"}[architecture]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`", category=UserWarning)
        peer = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=getattr(transformers, decode)(dequantize=True)
        ).eval()
    usual = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = torch.tensor(RECORD["tokens"])
    model = load(folder)
    with torch.inference_mode():
        found, wanted = peer(ids[None]).logits[0], logits(model, ids)
        rough = usual(ids[None]).logits[0].float()
    assert wanted.std() > 1
    assert (found - wanted).abs().max() <= 1e-4  # float32 in another order; the logits are up to ten
    assert (rough - wanted).abs().mean() <= 0.05 * wanted.std()  # bfloat16 activations, as it is opened without options
    assert {stored.format for name, stored in model.tensors.items() if name.endswith("down")} == {"MXFP4"}
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("In 2012 the th")["input_ids"]
    assert tokens == tokenizer.encode(model.vocabulary, "In 2012 the th").tolist()
