"""Model files that are cut, damaged or made to hurt: one clear sentence each, whatever the bytes."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mxharness.errors import UserError
from mxharness.model import gguf_file, safetensors_file, toy
from mxharness.model.load import load
from mxharness.model.quantising import quantise

U32, U64 = "<I", "<Q"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A GGUF file and a safetensors file that are in order."""
    folder = tmp_path_factory.mktemp("whole")
    quantise(toy.checkpoint(toy.GPT_OSS), folder / "toy.gguf")
    quantise(toy.checkpoint(toy.GPT_OSS), folder / "toy")
    return {
        "gguf": (folder / "toy.gguf").read_bytes(),
        "safetensors": (folder / "toy" / "model.safetensors").read_bytes(),
        "config": (folder / "toy" / "config.json").read_bytes(),
    }


def gguf(path: Path, *keys: bytes, tensors: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None) -> Path:
    """A file of raw keys and tensor infos and 4 KiB of zeros."""
    head = b"GGUF" + struct.pack("<IQQ", 3, *(counts or (len(tensors), len(keys))))
    path.write_bytes(head + b"".join(keys) + b"".join(tensors) + bytes(4096))
    return path


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack(U64, len(data)) + data


def info(name: str, sizes: tuple[int, ...], number: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)


def listed(count: int, kind: int = 4) -> bytes:
    return text("a") + struct.pack("<IIQ", 9, kind, count)


DAMAGED = {
    "2^60 keys": ({"counts": (0, 1 << 60)}, "ends before|no type|UTF-8|there twice"),
    "2^60 tensors": ({"counts": (1 << 60, 0)}, "ends before|dimensions|there twice"),
    "a list of 2^60 numbers": ({"keys": (listed(1 << 60),)}, "announces .* and ends before"),
    "a list of 2^64 - 1 texts": ({"keys": (listed((1 << 64) - 1, 8),)}, "ends before"),
    "a list of lists": ({"keys": (listed(3, 9),)}, "no lists of type 9"),
    "a text of 2^63 bytes": ({"keys": (struct.pack(U64, 1 << 63),)}, "announces 9,223,372,036,854,775,808 bytes"),
    "a key twice": ({"keys": (text("a") + struct.pack("<II", 4, 1),) * 2}, "the key 'a' is there twice"),
    "a key that is no UTF-8": ({"keys": (text(b"\xff"),)}, "is no UTF-8"),
    "an unknown type": ({"keys": (text("a") + struct.pack(U32, 77),)}, "no type 77"),
    "an alignment of 3": ({"keys": (text("general.alignment") + struct.pack("<II", 4, 3),)}, "is 3, no power of two"),
    "a tensor twice": ({"tensors": (info("t", (8,)), info("t", (8,), offset=32))}, "the tensor 't' is there twice"),
    "tensors that overlap": ({"tensors": (info("t", (64,)), info("u", (64,), offset=32))}, "'u' overlaps 't'"),
    "a tensor past the end": ({"tensors": (info("t", (8,), offset=1 << 40),)}, "'t' ends at byte"),
    "sizes that overflow": ({"tensors": (info("t", (1 << 32, 1 << 32)),)}, "has the sizes"),
    "an empty tensor": ({"tensors": (info("t", (0, 8)),)}, "has the sizes"),
    "9 dimensions": ({"tensors": (info("t", (1,) * 9),)}, "has 9 dimensions"),
    "rows of half a block": ({"tensors": (info("t", (48, 2), 39),)}, "rows of 48, no multiple of MXFP4's blocks of 32"),
    "an unaligned tensor": ({"tensors": (info("t", (8,), offset=4),)}, "lies at 4, no multiple of 32"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_gguf_header_is_one_sentence(tmp_path: Path, what: str) -> None:
    parts, match = DAMAGED[what]
    path = gguf(tmp_path / "bad.gguf", *parts.get("keys", ()), **{k: v for k, v in parts.items() if k != "keys"})
    with pytest.raises(UserError, match=rf"damaged or incomplete GGUF file of [\d,]+ bytes: .*({match})"):
        gguf_file.read(path)


def test_gguf_files_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(UserError, match="of GGUF version 50331648, or big-endian; versions 2 and 3"):
        gguf_file.read(path)
    gguf(path, text("split.count") + struct.pack("<IH", 2, 7))
    with pytest.raises(UserError, match="one of 7 parts of a model; `llama-gguf-split --merge` joins them"):
        gguf_file.read(path)
    gguf(path, tensors=(info("t", (8,), 999),))
    with pytest.raises(UserError, match=r"is of ggml's type 999, which (this gguf-py does not know|the package gguf)"):
        gguf_file.read(path)
    gguf(path, text("general.architecture") + struct.pack("<II", 4, 5))
    with pytest.raises(UserError, match=r"'general.architecture' is 5, not of type str"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no GGUF file"):
        load(path)


def test_nan_scales_and_values_are_refused(tmp_path: Path, whole: dict[str, bytes]) -> None:
    path = tmp_path / "nan.gguf"
    path.write_bytes(whole["gguf"])
    entries = gguf_file.read(path).tensors
    data = bytearray(whole["gguf"])
    data[entries["blk.0.ffn_down_exps.weight"].offset + 17] = 255
    data[entries["output_norm.weight"].offset : entries["output_norm.weight"].offset + 4] = struct.pack("<f", np.nan)
    path.write_bytes(data)
    model = load(path)
    with pytest.raises(UserError, match=r"'blk.0.ffn_down_exps.weight' of .* has 1 scales that are NaN \(byte 255\)"):
        model.tensors["layers.0.down"].read()
    with pytest.raises(UserError, match=r"'output_norm.weight' of .* has 1 values that are NaN or Inf"):
        model.tensors["final_norm"].read()
    with pytest.raises(UserError, match="scales that are NaN"):
        quantise(path, tmp_path / "out.gguf")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["nan.gguf"]


def test_a_file_that_shrinks_while_it_is_used(tmp_path: Path, whole: dict[str, bytes]) -> None:
    path = tmp_path / "toy.gguf"
    path.write_bytes(whole["gguf"])
    model = load(path)
    path.write_bytes(whole["gguf"][:9000])
    with pytest.raises(UserError, match=r"ended while 'output_norm.weight' was read"):
        model.tensors["final_norm"].read()


# safetensors


def folder(path: Path, whole: dict[str, bytes], **changes: object) -> Path:
    """The toy in safetensors, its config.json changed."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(json.loads(whole["config"]) | changes))
    (path / "model.safetensors").write_bytes(whole["safetensors"])
    return path


def raw(path: Path, header: object, size: int = 64, length: int | None = None) -> Path:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack(U64, len(data) if length is None else length) + data + bytes(size))
    return path


F32 = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
BAD_HEADERS = {
    "a length of 2^62": {"header": b"{}", "length": 1 << 62},
    "no JSON": {"header": b"[[[["},
    "nested lists": {"header": b"[" * 100_000},
    "no object": {"header": [1]},
    "an offset past the end": {"header": {"t": F32 | {"data_offsets": [0, 640]}}},
    "a negative offset": {"header": {"t": F32 | {"data_offsets": [-64, 0]}}},
    "a negative size": {"header": {"t": F32 | {"shape": [-4, -4]}}},
    "sizes that overflow": {"header": {"t": F32 | {"shape": [1 << 62, 1 << 62]}}},
    "sizes that do not fit": {"header": {"t": F32 | {"shape": [4, 5]}}},
    "tensors that overlap": {"header": {"t": F32, "u": F32}},
    "a gap": {"header": {"t": F32 | {"data_offsets": [64, 128]}}, "size": 128},
    "bytes after the last tensor": {"header": {"t": F32}, "size": 65},
    "a name twice": {"header": b'{"t":' + json.dumps(F32).encode() + b',"t":' + json.dumps(F32).encode() + b"}"},
    "an unknown dtype": {"header": {"t": F32 | {"dtype": "F99"}}},
    "a file of 3 bytes": {"header": b"", "size": 0, "length": 5},
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_damaged_safetensors_header_is_one_sentence(tmp_path: Path, what: str) -> None:
    path = raw(tmp_path / "bad.safetensors", **BAD_HEADERS[what])  # type: ignore[arg-type]  # mixed on purpose
    with pytest.raises(UserError, match=r"no safetensors file, or a damaged or incomplete one, of [\d,]+ bytes: \w"):
        safetensors_file.read(path)


def test_configurations_that_describe_no_model(tmp_path: Path, whole: dict[str, bytes]) -> None:
    def refused(match: str, **changes: object) -> None:
        with pytest.raises(UserError, match=match):
            load(folder(tmp_path / "toy", whole, **changes))

    load(folder(tmp_path / "toy", whole))
    refused("of type 'bert'; only llama and gpt_oss can be run", model_type="bert")
    refused("has '64' for 'hidden_size', which is no whole number", hidden_size="64")
    refused("has True for 'num_hidden_layers'", num_hidden_layers=True)
    refused("describes no model that can be run: layers -1", num_hidden_layers=-1)
    refused(r"has no tensor 'model.layers.2.input_layernorm.weight'", num_hidden_layers=3, layer_types=None)
    refused("'embedding' is .259, 64. and must be .259, 96., by its sizes", hidden_size=96)
    refused("4 heads of 32, 3 of keys", num_key_value_heads=3)
    refused("9 of 4 experts", num_experts_per_tok=9)
    refused("windows", layer_types=["full_attention"])
    refused("layers of a kind that cannot be run", layer_types=["linear_attention"] * 2)
    refused("constants", rms_norm_eps=-1)
    refused("scales RoPE by 'llama3'", rope_scaling={"rope_type": "llama3"})
    refused("scales RoPE by 'mscale'", rope_scaling={"rope_type": "yarn", "mscale": 2.0})
    refused("quantised by fbgemm_fp8; gpt-oss' mxfp4", quantization_config={"quant_method": "fbgemm_fp8"})
    refused(
        "quantised by compressed-tensors, format pack-quantized",
        quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"},
    )
    packed = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "version": "0.13.0"}
    refused("by compressed-tensors 0.13.0, which stores MXFP4's scales two too low", quantization_config=packed)
    load(folder(tmp_path / "toy", whole, quantization_config=packed | {"version": "0.20.0"}))
    for content in ("[1]", "{", "[" * 100_000):
        (tmp_path / "toy" / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config.json (is damaged|holds no JSON object)"):
            load(tmp_path / "toy")
    (tmp_path / "toy" / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config.json: No such file"):
        load(tmp_path / "toy")


def test_a_tensor_that_no_architecture_has(tmp_path: Path, whole: dict[str, bytes]) -> None:
    header = {"model.layers.0.self_attn.q_norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}
    path = folder(tmp_path / "toy", whole)
    raw(path / "extra.safetensors", header)
    names = safetensors_file.read(path / "model.safetensors")
    places = dict.fromkeys(names, "model.safetensors") | dict.fromkeys(header, "extra.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=r"1 tensors that gpt-oss does not, 'model.layers.0.self_attn.q_norm.weight'"):
        load(path)


@pytest.mark.parametrize(
    ("places", "match"),
    [
        ({"t": "../../etc/passwd"}, "names '../../etc/passwd', which is no .safetensors file of this folder"),
        ({"t": "/x/model.safetensors"}, "names '/x/model.safetensors', which is no .safetensors file"),
        ({"t": "sub/model.safetensors"}, "names 'sub/model.safetensors'"),
        ({"t": "model.bin"}, "names 'model.bin'"),
        ({"t": "gone.safetensors"}, "no model file .*gone.safetensors"),
        ({"t": "model.safetensors"}, "looks for 't' in model.safetensors, which does not hold it"),
        ({"t": 3}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_an_index_that_points_elsewhere(tmp_path: Path, whole: dict[str, bytes], places: object, match: str) -> None:
    path = folder(tmp_path / "toy", whole)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match=match):
        load(path)


# What is not opened at all


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_nothing_is_unpickled(tmp_path: Path, whole: dict[str, bytes], suffix: str) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"may hold pickled code, which runs when it is opened, and is not opened"):
        load(path)
    with pytest.raises(UserError, match="is not opened"):
        quantise(path, tmp_path / "out.gguf")
    (tmp_path / "config.json").write_bytes(whole["config"])
    with pytest.raises(UserError, match=rf"has no .safetensors file; pytorch_model{suffix} may hold pickled code"):
        load(tmp_path)
    for name in ("renamed.gguf", "renamed.safetensors"):
        (tmp_path / name).write_bytes(path.read_bytes())
        with pytest.raises(UserError, match=r"is no GGUF file|is no safetensors file"):
            load(tmp_path / name)


def test_no_module_can_unpickle() -> None:
    sources = {path.name: path.read_text() for path in Path(gguf_file.__file__).parent.glob("*.py")}
    assert "gguf.py" in sources
    assert [name for name, words in sources.items() if "torch.load" in words or "import pickle" in words] == []


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model 'gpt-5'; there are .*smollm2.*, .gguf files"):
        load("gpt-5")
    with pytest.raises(UserError, match=r"no model file .*none.gguf"):
        load(tmp_path / "none.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="has no 'hidden_size'"):
        load(tmp_path)


# Whatever the bytes

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def outcome(path: Path) -> str:
    """The sentence that a file is refused with, or that it is read; any other exception is a failure."""
    try:
        for stored in load(path).tensors.values():
            stored.read()
    except UserError as error:
        return str(error)
    return "read, every tensor of it"


@FUZZ
@given(data=st.data())
def test_a_damaged_gguf_file_never_ends_in_another_error(
    tmp_path: Path, whole: dict[str, bytes], data: st.DataObject
) -> None:
    content = changed(whole["gguf"], gguf_header(whole["gguf"]), data)
    (tmp_path / "fuzz.gguf").write_bytes(content)
    assert 10 < len(outcome(tmp_path / "fuzz.gguf")) < 1000


@FUZZ
@given(data=st.data())
def test_a_damaged_safetensors_file_never_ends_in_another_error(
    tmp_path: Path, whole: dict[str, bytes], data: st.DataObject
) -> None:
    path = folder(tmp_path / "toy", whole)
    content = whole["safetensors"]
    if data.draw(st.booleans(), label="the configuration, not the weights"):
        (path / "config.json").write_bytes(changed(whole["config"], len(whole["config"]), data))
    else:
        header = 8 + int.from_bytes(content[:8], "little")
        (path / "model.safetensors").write_bytes(changed(content, header, data))
    assert 10 < len(outcome(path)) < 1000


def gguf_header(content: bytes) -> int:
    """Bytes before the first tensor, about: metadata is what can be hostile."""
    return content.index(b"token_embd.weight") + 2000


def changed(content: bytes, header: int, data: st.DataObject) -> bytes:
    """Some bytes set, most of them in the header; or the file cut."""
    spoiled = bytearray(content)
    places = st.one_of(st.integers(0, min(header, len(content)) - 1), st.integers(0, len(content) - 1))
    for place, byte in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=6), label="set"):
        spoiled[place] = byte
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content))), label="cut")
    return bytes(spoiled[:cut])
