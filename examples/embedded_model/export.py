"""The embedded model's files, from what prepare.py and train.py wrote.

    python examples/embedded_model/export.py DATA TRAINED harness/mxharness/data/embedded

Writes OUT/original, bfloat16 under Hugging Face's names, which transformers opens too; OUT/mxfp4, every matrix
quantised by the OCP rule, experts named as in gpt-oss' files and the other matrices as compressed-tensors does; and
OUT/record.json: the sources, the training, the hash of every file.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mxharness import mxfp4
from mxharness.model import config as models
from mxharness.model import huggingface
from mxharness.model.config import ModelConfig
from safetensors.torch import save

MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}


def main(data: Path, trained: Path, out: Path) -> None:
    """Write both models and their record."""
    record = json.loads((trained / "training.json").read_text())
    statement = json.loads((data / "data.json").read_text())
    if record["tokens_sha256"] != statement["tokens_sha256"]:
        sys.exit(f"{trained} was trained on other tokens than {data} holds")
    document = config_json(record["config"], statement)
    config = huggingface.read_config(document, "config.json")
    weights = read(config, trained / "weights.npz")
    write(out / "original", document, data, bfloat16(config, weights))
    write(out / "mxfp4", document | MXFP4, data, quantised(config, weights))
    files = {str(path.relative_to(out)): path for path in sorted(out.glob("*/*"))}
    record["data"] = statement
    record["mxfp4"] = {"scale_rule": "floor", "tie_rule": "even"}
    record["files"] = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["files"], indent=1))


def read(config: ModelConfig, path: Path) -> dict[str, torch.Tensor]:
    """The trained weights, bfloat16, under the names of mxharness.model.config."""
    found = {}
    with np.load(path) as bits:
        for weight in models.weights(config):
            found[weight.name] = torch.from_numpy(bits[weight.name].view(np.int16)).view(torch.bfloat16)
            if tuple(found[weight.name].shape) != weight.shape:
                sys.exit(f"{weight.name} is {tuple(found[weight.name].shape)} and must be {weight.shape}")
    return found


def bfloat16(config: ModelConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under Hugging Face's names; experts as transformers has them, inputs before outputs."""
    experts = {weight.name for weight in models.weights(config) if weight.packed and len(weight.shape) == 3}
    return {
        huggingface.name_of(name, config.architecture): (value.mT if name in experts else value).contiguous()
        for name, value in weights.items()
    }


def quantised(config: ModelConfig, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every packed weight as two tensors of bytes, the others as they are."""
    plain, found = bfloat16(config, weights), {}
    for weight in models.weights(config):
        name = huggingface.name_of(weight.name, config.architecture)
        if not weight.packed:
            found[name] = plain[name]
            continue
        codes, scales = mxfp4.quantize(weights[weight.name])
        if len(weight.shape) == 3:
            found[f"{name}_blocks"] = codes.view(*scales.shape, 16)
            found[f"{name}_scales"] = scales
        else:
            found[f"{name}_packed"] = codes
            found[f"{name}_scale"] = scales
    return found


def write(folder: Path, document: dict[str, Any], data: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A folder as Hugging Face lays it out."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
    shutil.copyfile(data / "tokenizer.json", folder / "tokenizer.json")


def config_json(config: dict[str, Any], statement: dict[str, Any]) -> dict[str, Any]:
    """Sizes and constants of a gpt-oss model in transformers' words."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "dtype": "bfloat16",
        "num_hidden_layers": config["layers"],
        "hidden_size": config["hidden"],
        "intermediate_size": config["ffn"],
        "num_attention_heads": config["heads"],
        "num_key_value_heads": config["kv_heads"],
        "head_dim": config["head_size"],
        "vocab_size": config["vocabulary"],
        "max_position_embeddings": config["context"],
        "rms_norm_eps": config["norm_epsilon"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": config["rope_base"],
            "factor": config["yarn"]["factor"],
            "original_max_position_embeddings": config["yarn"]["original_context"],
            "beta_fast": config["yarn"]["beta_fast"],
            "beta_slow": config["yarn"]["beta_slow"],
            "truncate": config["yarn"]["truncate"],
        },
        "tie_word_embeddings": config["tied"],
        "attention_bias": True,
        "sliding_window": max(window for window in config["windows"] if window),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in config["windows"]],
        "num_local_experts": config["experts"],
        "num_experts_per_tok": config["chosen"],
        "swiglu_alpha": config["swiglu_alpha"],
        "swiglu_limit": config["swiglu_limit"],
        "eos_token_id": statement["vocabulary"] - 1,
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
