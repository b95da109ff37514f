"""Quantised checkpoints: the plain numbers that they stand for, as torch and transformers reckon them."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from benchmarks.compare import tiny_checkpoint
from fgsnap.convert import weights as weights_loop
from fgsnap.convert.dequantised import LARGEST, _e4m3
from fgsnap.convert.export import export
from fgsnap.convert.opening import open_source
from fgsnap.convert.pipeline import convert
from fgsnap.convert.plan import plan_source
from fgsnap.errors import SourceError, UnsupportedModel
from tests.convert.models import CONFIG, DTYPES, folder, loaded, same_bits, weights

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
MXFP4 = {**CONFIG, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]}}
GROUP = {
    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
    "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    "targets": ["Linear"],
}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": GROUP},
    "ignore": ["lm_head"], "kv_cache_scheme": None, "quantization_status": "compressed", "sparsity_config": {},
}  # fmt: skip
# Widths of whole MXFP4 groups.
GPT_OSS = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "num_local_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": 11,
}  # fmt: skip
DEEPSEEK = {
    "n_group": 2, "topk_group": 1, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "moe_intermediate_size": 24, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 20, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4, "v_head_dim": 12, "num_key_value_heads": 6,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj.weight"


def rank_bytes(path: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(path.glob("rank-*.safetensors"))]


def spread(scales: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """Each element's scale."""
    return scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def quantised(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and a scale for every block, the last ones of a row or column perhaps smaller."""
    padding = [-size % step for size, step in zip(weight.shape, block, strict=True)]
    padded = torch.nn.functional.pad(weight.float().abs(), (0, padding[1], 0, padding[0]))
    largest = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax((1, 3))
    scales = largest / 448
    return (weight.float() / spread(scales, weight.shape, block)).to(torch.float8_e4m3fn), scales


def in_fp8(
    tensors: Mapping[str, torch.Tensor], block: tuple[int, int], dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensors, Tensors]:
    """The tensors with every projection as DeepSeek publishes them, and the plain ones that those stand for."""
    packed, plain = {}, {}
    for name, tensor in tensors.items():
        packed[name] = plain[name] = tensor
        if "_proj" in name and tensor.dim() == 2 and name.endswith(".weight"):
            codes, scales = quantised(tensor, block)
            packed |= {name: codes, f"{name}_scale_inv": scales}
            plain[name] = (codes.float() * spread(scales, codes.shape, block)).to(dtype)
    return packed, plain


def source_of(path: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    return open_source(str(folder(path, config, tensors)))


# FP8.


def test_every_code_is_what_torch_takes_it_for() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(_e4m3(), codes)
    assert np.isnan(codes).sum() == 2
    assert np.array_equal(np.signbit(_e4m3()[:127]), np.signbit(codes[:127])) and np.signbit(_e4m3()[128])


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_dequantised_as_transformers_does(tmp_path: Path, dtype: str) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 2, 64)
    codes, scales = quantised(weight, (32, 32))
    codes.view(torch.uint8)[5, 7] = 0x7F
    config = {**CONFIG, "torch_dtype": dtype, "quantization_config": FP8}
    source = source_of(tmp_path, config, {"a.weight": codes, "a.weight_scale_inv": scales})
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, DTYPES[dtype])
    assert source.tensors == {"a.weight": ("a.weight", dtype, (96, 64))} and source.others == {}
    for start, stop in ((0, 96), (31, 33), (40, 41), (95, 96), (7, 7)):
        found = torch.from_numpy(source.rows("a.weight", start, stop).copy())
        found = found.view(torch.bfloat16) if dtype == "bfloat16" else found
        assert torch.equal(found.isnan(), expected[start:stop].isnan())
        assert torch.equal(found.nan_to_num(), expected[start:stop].nan_to_num())


def test_blocks_are_what_float64_makes_of_them(tmp_path: Path) -> None:
    """Code times scale is exact in float64: float32 rounds it once, and bfloat16 that."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(0, 255, (70, 90), generator=generator, dtype=torch.uint8)
    codes[codes & 127 == 127] = 0
    weight, scales = codes.view(torch.float8_e4m3fn), torch.rand(3, 3, generator=generator) * 0.01
    source = source_of(tmp_path, {**CONFIG, "quantization_config": FP8}, {"a": weight, "a_scale_inv": scales})
    expected = (weight.double() * spread(scales.double(), weight.shape, (32, 32))).float().bfloat16()
    for start, stop in ((0, 70), (31, 65), (69, 70)):
        found = torch.from_numpy(source.rows("a", start, stop).copy()).view(torch.bfloat16)
        assert torch.equal(found.view(torch.int16), expected[start:stop].view(torch.int16))


@pytest.mark.parametrize("kind", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_may_be_powers_of_two(tmp_path: Path, kind: torch.dtype) -> None:
    """transformers writes them with scale_fmt ue8m0; MXFP8 checkpoints hold them as bytes."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(64, 96, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.randint(100, 150, (2, 3), generator=generator, dtype=torch.uint8).view(kind)
    config = {**CONFIG, "quantization_config": {**FP8, "scale_fmt": "ue8m0"}}
    source = source_of(tmp_path, config, {"a.weight": weight, "a.weight_scale_inv": scales})
    assert [*source.tensors] == ["a.weight"] and source.others == {}
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
    found = torch.from_numpy(source.rows("a.weight", 0, 64).copy()).view(torch.bfloat16)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_a_checkpoint_in_blocks_converts_as_its_plain_one(tmp_path: Path, tp: int, monkeypatch: Any) -> None:
    """48 columns are a block and a half."""
    packed, plain = in_fp8(weights(CONFIG), (32, 32))
    assert sum(name.endswith("_scale_inv") for name in packed) == 14 and packed[f"{Q}_scale_inv"].shape == (3, 2)
    config = {**CONFIG, "quantization_config": FP8}
    result = convert(str(folder(tmp_path / "fp8", config, packed)), tmp_path / "fp8-snap", tp=tp, canary=False)
    convert(str(folder(tmp_path / "plain", CONFIG, plain)), tmp_path / "plain-snap", tp=tp, canary=False)
    assert rank_bytes(tmp_path / "fp8-snap") == rank_bytes(tmp_path / "plain-snap")
    assert "(fp8) were dequantised" in result.notes[0]
    monkeypatch.setattr(weights_loop, "SLAB", 500)
    convert(str(tmp_path / "fp8"), tmp_path / "slabs", tp=tp, canary=False)
    assert rank_bytes(tmp_path / "slabs") == rank_bytes(tmp_path / "plain-snap")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_of_config_json_and_the_one_asked_for(tmp_path: Path, dtype: str) -> None:
    packed, plain = in_fp8(weights(CONFIG, dtype), (32, 32), DTYPES[dtype])
    config = {**CONFIG, "torch_dtype": dtype, "quantization_config": FP8}
    convert(str(folder(tmp_path / "fp8", config, packed)), tmp_path / "fp8-snap", canary=False)
    convert(str(folder(tmp_path / "plain", CONFIG, plain)), tmp_path / "plain-snap", canary=False)
    assert rank_bytes(tmp_path / "fp8-snap") == rank_bytes(tmp_path / "plain-snap")
    for name in ("fp8", "plain"):
        convert(str(tmp_path / name), tmp_path / f"{name}-wide", dtype="float32", canary=False)
    assert rank_bytes(tmp_path / "fp8-wide") == rank_bytes(tmp_path / "plain-wide")


def test_a_deepseek_v3(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", "deepseek_v3", "bfloat16", **DEEPSEEK)
    tensors, config = loaded(checkpoint), json.loads((checkpoint / "config.json").read_text())
    packed, plain = in_fp8(tensors, (16, 16))
    assert any("kv_a_proj" in name and name.endswith("_scale_inv") for name in packed)
    packed["model.layers.3.mlp.up_proj.weight"] = torch.zeros(4, 4).to(torch.float8_e4m3fn)  # of the layer beyond
    packed["model.layers.3.mlp.up_proj.weight_scale_inv"] = torch.ones(1, 1)
    packed |= {f"model.layers.3.{norm}.weight": torch.ones(4) for norm in ("enorm", "hnorm")}
    settings = {**FP8, "weight_block_size": [16, 16]}
    folder(tmp_path / "fp8", {**config, "quantization_config": settings}, packed)
    folder(tmp_path / "plain", config, plain)
    for name in ("fp8", "plain"):
        convert(str(tmp_path / name), tmp_path / f"{name}-snap", tp=2, canary=False)
    assert rank_bytes(tmp_path / "fp8-snap") == rank_bytes(tmp_path / "plain-snap")


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_an_exported_model_is_the_plain_one(tmp_path: Path, family: str) -> None:
    changes = {"deepseek_v3": DEEPSEEK, "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2}}
    checkpoint = tiny_checkpoint(tmp_path / "model", family, "bfloat16", **changes.get(family, {}))
    config = json.loads((checkpoint / "config.json").read_text())
    packed, plain = in_fp8(loaded(checkpoint), (4, 4))
    assert family == "qwen3" or any(".experts.0." in name and name.endswith("_scale_inv") for name in packed)
    folder(tmp_path / "fp8", {**config, "quantization_config": {**FP8, "weight_block_size": [4, 4]}}, packed)
    convert(str(tmp_path / "fp8"), tmp_path / "snap", canary=False)
    back = export(tmp_path / "snap", tmp_path / "back").path
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16)
    expected = load(folder(tmp_path / "plain", config, plain)).state_dict()
    assert same_bits(load(back).state_dict(), expected)


def test_memory_is_what_the_rows_take(tmp_path: Path) -> None:
    """Beside the chunk that is decoded."""
    codes = torch.zeros(8192, 1024, dtype=torch.uint8)
    tensors = {"a": codes.view(torch.float8_e4m3fn), "a_scale_inv": torch.ones(64, 8)}
    settings = {**FP8, "weight_block_size": [128, 128]}
    of_fp8 = source_of(tmp_path / "fp8", {**CONFIG, "quantization_config": settings}, tensors)
    tensors = {"a_blocks": codes.reshape(8, 1024, 64, 16), "a_scales": torch.zeros(8, 1024, 64, dtype=torch.uint8)}
    of_mxfp4 = source_of(tmp_path / "mxfp4", MXFP4, tensors)
    for source, name in ((of_fp8, "a"), (of_mxfp4, "a_blocks")):
        source.rows(name, 0, 8)
        tracemalloc.start()
        rows = source.rows(name, 0, 8192)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert rows.nbytes >= 16 << 20
        assert peak < rows.nbytes + (8 << 20)


SCALES = {
    "channels": (COMPRESSED, "_scale", lambda scale: scale[:, :1]),
    "channels without columns": (COMPRESSED, "_scale", lambda scale: scale[:, 0]),
    "the whole tensor": (COMPRESSED, "_scale", lambda scale: scale[:1, 0]),
    "a number": ({**FP8, "weight_block_size": None}, "_scale_inv", lambda scale: scale[0, 0]),
    "a number in bfloat16": ({"quant_method": "fp8"}, "_scale", lambda scale: scale[0, 0].bfloat16()),
}


@pytest.mark.parametrize("case", SCALES)
def test_scales_of_rows_and_tensors(tmp_path: Path, case: str) -> None:
    settings, ending, of = SCALES[case]
    generator = torch.Generator().manual_seed(2)
    codes = torch.randn(9, 40, generator=generator).to(torch.float8_e4m3fn)
    scale = of(torch.rand(9, 1, generator=generator))
    tensors = {"a.weight": codes, f"a.weight{ending}": scale, "a.input_scale": torch.ones(1), "b.bias": torch.ones(2)}
    source = source_of(tmp_path, {**CONFIG, "quantization_config": settings}, tensors)
    assert sorted(source.tensors) == ["a.weight", "b.bias"]
    expected = (codes.float() * scale.float().reshape(-1, 1)).bfloat16().view(torch.int16).numpy()
    np.testing.assert_array_equal(source.rows("a.weight", 2, 9).view(np.int16), expected[2:])
    np.testing.assert_array_equal(source.rows("b.bias", 0, 2), [1, 1])


def test_export_writes_plain_weights_and_says_so(tmp_path: Path) -> None:
    packed, plain = in_fp8(weights(CONFIG), (32, 32))
    config = {**CONFIG, "quantization_config": FP8}
    convert(str(folder(tmp_path / "m", config, packed)), tmp_path / "snap", canary=False)
    result = export(tmp_path / "snap", tmp_path / "back")
    assert same_bits(loaded(tmp_path / "back"), plain)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == CONFIG
    assert len(result.notes) == 1 and "(fp8)" in result.notes[0]
    convert(str(tmp_path / "back"), tmp_path / "again", canary=False)
    assert rank_bytes(tmp_path / "again") == rank_bytes(tmp_path / "snap")


def test_a_plan_counts_what_is_written(tmp_path: Path) -> None:
    packed, _ = in_fp8(weights(CONFIG), (32, 32))
    config = {key: value for key, value in CONFIG.items() if key != "torch_dtype"}
    planned = plan_source(str(folder(tmp_path / "m", {**config, "quantization_config": FP8}, packed)))
    assert planned.dtype == "bfloat16"
    assert planned.bytes == convert(str(tmp_path / "m"), tmp_path / "snap", canary=False).bytes


# MXFP4.


def test_every_scale_and_code_as_transformers_reckons_them(tmp_path: Path) -> None:
    """Rows of 256 bytes, a scale a row."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, LARGEST + 1, 1, 1)
    scales = torch.arange(LARGEST + 1, dtype=torch.uint8).reshape(1, -1, 1).repeat(1, 1, 16)
    expected = convert_moe_packed_tensors(blocks, scales)[0].t().contiguous()
    source = source_of(tmp_path, MXFP4, {"w_blocks": blocks, "w_scales": scales})
    assert source.tensors == {"w_blocks": ("w_blocks", "bfloat16", (LARGEST + 1, 512))} and source.others == {}
    found = torch.from_numpy(source.rows("w_blocks", 0, LARGEST + 1).copy()).view(torch.bfloat16)
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


def test_every_scale_and_code_as_their_definition_has_them(tmp_path: Path) -> None:
    """Sign, two bits of exponent biased by 1, one of fraction, in float64, which holds each product exactly."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (3, 40, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(0, LARGEST + 1, (3, 40, 2), generator=generator, dtype=torch.uint8)
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(2).reshape(3, 40, 2, 32).double()
    sign, code = 1 - 2 * (codes // 8), codes % 8
    exponent, fraction = code // 2, code % 2
    size = torch.where(exponent == 0, fraction / 2, (1 + fraction / 2) * 2 ** (exponent - 1))
    expected = (sign * size * 2.0 ** (scales.double() - 127).unsqueeze(-1)).reshape(120, 64)
    source = source_of(tmp_path, MXFP4, {"w_blocks": blocks, "w_scales": scales})
    for start, stop in ((0, 120), (39, 41), (45, 46), (7, 119)):
        found = torch.from_numpy(source.rows("w_blocks", start, stop).copy()).view(torch.bfloat16).double()
        assert torch.equal(found, expected[start:stop])


def test_scales_beyond_bfloat16_are_refused(tmp_path: Path) -> None:
    scales = torch.tensor([[[120]], [[LARGEST]], [[LARGEST + 1]]], dtype=torch.uint8)
    source = source_of(tmp_path, MXFP4, {"w_blocks": torch.zeros(3, 1, 1, 16, dtype=torch.uint8), "w_scales": scales})
    assert source.rows("w_blocks", 0, 2).shape == (2, 32)
    with pytest.raises(SourceError, match=r"'w_scales' holds the scale 2\*\*126"):
        source.rows("w_blocks", 2, 3)


def mxfp4(count: int, rows: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (count, rows, width // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(120, 130, (count, rows, width // 32), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plain`` and ``mxfp4``: a checkpoint as transformers writes it, and the same as it is published."""
    path = tmp_path_factory.mktemp("gpt-oss")
    checkpoint = tiny_checkpoint(path / "model", "gpt_oss", "bfloat16", **GPT_OSS)
    tensors, config = loaded(checkpoint), json.loads((checkpoint / "config.json").read_text())
    packed = dict(tensors)
    for seed, name in enumerate(name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))):
        count, into, out = tensors[name].shape
        blocks, scales = mxfp4(count, out, into, seed)
        tensors[name] = convert_moe_packed_tensors(blocks, scales)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del packed[name]
    folder(path / "plain", config, tensors)
    folder(path / "mxfp4", {**config, "quantization_config": {"quant_method": "mxfp4"}}, packed)
    return path


@pytest.mark.parametrize("tp", [1, 2])
def test_a_gpt_oss_converts_as_its_plain_one(tmp_path: Path, gpt_oss: Path, tp: int, monkeypatch: Any) -> None:
    for name in ("plain", "mxfp4"):
        convert(str(gpt_oss / name), tmp_path / name, tp=tp, canary=False)
    assert rank_bytes(tmp_path / "mxfp4") == rank_bytes(tmp_path / "plain")
    monkeypatch.setattr(weights_loop, "SLAB", 1000)
    convert(str(gpt_oss / "mxfp4"), tmp_path / "slabs", tp=tp, canary=False)
    assert rank_bytes(tmp_path / "slabs") == rank_bytes(tmp_path / "plain")


def test_an_exported_gpt_oss_is_plain(tmp_path: Path, gpt_oss: Path) -> None:
    convert(str(gpt_oss / "mxfp4"), tmp_path / "snap", canary=False)
    result = export(tmp_path / "snap", tmp_path / "back")
    assert same_bits(loaded(tmp_path / "back"), loaded(gpt_oss / "plain"))
    assert len(result.notes) == 1 and "(mxfp4)" in result.notes[0]
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16)
    model, plainly = load(tmp_path / "back"), transformers.Mxfp4Config(dequantize=True)
    assert same_bits(load(gpt_oss / "mxfp4", quantization_config=plainly).state_dict(), model.state_dict())
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


# Refused.


METHODS = [
    "gptq",
    "awq",
    "bitsandbytes",
    "aqlm",
    "eetq",
    "hqq",
    "torchao",
    "fbgemm_fp8",
    "modelopt",
    "quark",
    None,
    ["fp8"],
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_other_methods_are_refused_by_name(tmp_path: Path, method: Any) -> None:
    folder(tmp_path, {**CONFIG, "quantization_config": {"quant_method": method, "bits": 4}}, weights(CONFIG))
    for config_only in (False, True):
        with pytest.raises(UnsupportedModel) as caught:
            open_source(str(tmp_path), config_only=config_only)
        assert repr(method) in caught.value.what and "fp8, mxfp4" in caught.value.why


def group(**changes: Any) -> dict[str, Any]:
    return {**COMPRESSED, "config_groups": {"group_0": {**GROUP, "weights": {**GROUP["weights"], **changes}}}}


SETTINGS: dict[str, tuple[Any, str]] = {
    "another format of FP8": ({**FP8, "fmt": "e5m2"}, "'fmt' is 'e5m2'"),
    "FP4 experts": ({**FP8, "expert_dtype": "fp4"}, "'expert_dtype'"),
    "an unknown key": ({**FP8, "rotation": "hadamard"}, "'rotation'"),
    "blocks that are none": ({**FP8, "weight_block_size": [32]}, "'weight_block_size'"),
    "blocks of nothing": ({**FP8, "weight_block_size": [0, 32]}, "'weight_block_size'"),
    "blocks as text": ({**FP8, "weight_block_size": ["32", "32"]}, "'weight_block_size'"),
    "packed": ({**COMPRESSED, "format": "pack-quantized"}, "'format' is 'pack-quantized'"),
    "keys and values": ({**COMPRESSED, "kv_cache_scheme": {"num_bits": 8}}, "'kv_cache_scheme'"),
    "sparse": ({**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparsity_config'"),
    "rotated": ({**COMPRESSED, "transform_config": {"config_groups": {}}}, "'transform_config'"),
    "no groups": ({**COMPRESSED, "config_groups": {}}, "'config_groups'"),
    "a group of nothing": ({**COMPRESSED, "config_groups": {"a": {}}}, "'config_groups'"),
    "four bits": (group(num_bits=4), "'num_bits' is 4"),
    "integers": (group(type="int"), "'type' is 'int'"),
    "groups of a row": (group(strategy="group"), "'strategy' is 'group'"),
    "zero points": (group(symmetric=False), "'symmetric' is False"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_would_change_the_numbers(tmp_path: Path, case: str) -> None:
    settings, words = SETTINGS[case]
    with pytest.raises(SourceError) as caught:
        source_of(tmp_path, {**CONFIG, "quantization_config": settings}, weights(CONFIG))
    assert words in caught.value.what and caught.value.exit_code == 1


def test_a_dense_sparsity_is_none(tmp_path: Path) -> None:
    settings = {**COMPRESSED, "sparsity_config": {"format": "dense", "targets": []}}
    assert source_of(tmp_path, {**CONFIG, "quantization_config": settings}, weights(CONFIG)).dequantised


CODES = torch.zeros(64, 64).to(torch.float8_e4m3fn)
UNFIT: dict[str, Tensors] = {
    "too few blocks": {"a.weight": CODES, "a.weight_scale_inv": torch.ones(1, 2)},
    "too many blocks": {"a.weight": CODES, "a.weight_scale_inv": torch.ones(3, 3)},
    "blocks the other way round": {"a.weight": CODES[:32], "a.weight_scale_inv": torch.ones(2, 1)},
    "a stack": {"a": CODES.reshape(2, 32, 64), "a_scale_inv": torch.ones(2, 1, 2)},
    "no scales at all": {"a.weight": CODES, "a.weight_scale_inv": torch.ones(0)},
}


@pytest.mark.parametrize("case", UNFIT)
def test_scales_that_do_not_fit(tmp_path: Path, case: str) -> None:
    with pytest.raises(SourceError, match="do not fit"):
        source_of(tmp_path, {**CONFIG, "quantization_config": FP8}, UNFIT[case])


@pytest.mark.parametrize("scales", [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.int8)])
def test_blocks_that_are_none(tmp_path: Path, scales: torch.Tensor) -> None:
    tensors = {"w_blocks": torch.zeros(2, 4, 16, dtype=torch.uint8), "w_scales": scales}
    with pytest.raises(SourceError, match="no MXFP4 tensor"):
        source_of(tmp_path, {**CONFIG, "quantization_config": {"quant_method": "mxfp4"}}, tensors)


def test_codes_without_scales_are_named(tmp_path: Path) -> None:
    packed, _ = in_fp8(weights(CONFIG), (32, 32))
    del packed[f"{Q}_scale_inv"]
    folder(tmp_path / "m", {**CONFIG, "quantization_config": FP8}, packed)
    with pytest.raises(UnsupportedModel, match="F8_E4M3") as caught:
        convert(str(tmp_path / "m"), tmp_path / "out" / "snap", canary=False)
    assert Q in caught.value.what and not (tmp_path / "out").exists()


def test_a_weight_that_float16_cannot_hold(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.full((4, 4), 448.0).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.tensor(1e3)}
    source = source_of(tmp_path, {**CONFIG, "torch_dtype": "float16", "quantization_config": FP8}, tensors)
    with pytest.raises(SourceError, match=r"a\.weight does not fit float16"):
        source.rows("a.weight", 0, 4)


def test_pytorch_files_may_be_quantised_too(tmp_path: Path, gpt_oss: Path) -> None:
    """Bytes are bytes wherever they lie."""
    other = shutil.copytree(gpt_oss / "mxfp4", tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(safetensors.torch.load_file(gpt_oss / "mxfp4" / "model.safetensors"), other / "pytorch_model.bin")
    convert(str(other), tmp_path / "bin-snap", canary=False)
    convert(str(gpt_oss / "plain"), tmp_path / "plain-snap", canary=False)
    assert rank_bytes(tmp_path / "bin-snap") == rank_bytes(tmp_path / "plain-snap")
