"""Single tokens pass decoder layers natively, and everything else takes the layer's own way."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch

import prunus as pr
from prunus.runtime import SparseLinear, decoder

pytestmark = pytest.mark.filterwarnings("default")  # of transformers, which warns on import
pytest.importorskip("transformers", reason="pip install transformers")
pytest.importorskip("prunus._native", reason="decoder layers have no NumPy form")


def build(**options) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 48, "intermediate_size": 100}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True, **options)
    model = LlamaForCausalLM(config).eval()
    pr.prune(model, pr.methods.one_shot_magnitude(0.5), include="model.layers.*")
    return model


def packed(model, way="bitmap", **options) -> Any:
    step = {"input_ids": torch.tensor([[5]])}
    choose = options.pop("choose", lambda row: way if ".layers." in row.name else "dense")
    return pr.compile(model, step, choose=choose, **options)


@pytest.fixture
def calls(monkeypatch):
    """How many tokens passed a layer natively."""
    seen = []
    call = decoder._Held.call

    def counted(self, *args):
        seen.append(self.number)
        return call(self, *args)

    monkeypatch.setattr(decoder._Held, "call", counted)
    return seen


def generated(model, ids, count=12):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
        do_sample=False, use_cache=True, pad_token_id=0,
    )  # fmt: skip


IDS = torch.arange(7)[None]


@pytest.mark.parametrize("way", ["csr", "tiled", "bitmap"])
def test_tokens_equal_those_of_the_dense_model(calls, way):
    model = build()
    fast = packed(model, way)
    assert fast.plan.decoders == ("model.layers.0", "model.layers.1")
    assert "2 decoder layers" in str(fast.plan)
    calls.clear()
    assert torch.equal(generated(fast, IDS), generated(model, IDS))
    assert calls == [0, 1] * 11  # the first of the twelve comes from the prompt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_after_a_prompt_match_the_layers_one_by_one(calls, dtype, biased):
    model = build(attention_bias=biased, mlp_bias=biased)
    if biased:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    fast = packed(model).to(dtype)
    apart = copy.deepcopy(fast)
    apart.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *_: None)
    apart.model.layers[1].mlp.register_forward_pre_hook(lambda *_: None)
    calls.clear()
    with torch.no_grad():
        outputs = [m(IDS, use_cache=True) for m in (fast, apart)]
        token = torch.tensor([[3]])
        one, other = (
            m(token, past_key_values=seen.past_key_values).logits
            for m, seen in zip((fast, apart), outputs, strict=True)
        )
    native = not (biased and dtype == torch.bfloat16)  # biases in bfloat16 are the layers' business
    assert calls == [0, 1] * native
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_batches_masks_prompts_and_gradients_take_the_other_way(calls):
    fast = packed(build())
    calls.clear()
    with torch.no_grad():
        fast(IDS)
        fast(torch.tensor([[1], [2]]))
    assert calls == []
    x = torch.randn(1, 1, 48, requires_grad=True)
    fast(inputs_embeds=x).logits.sum().backward()
    assert x.grad is not None
    assert calls == []
    left = torch.tensor([[0, 0, 1, 2, 3]])
    padded = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1]]), "pad_token_id": 0}
    found = fast.generate(left, max_new_tokens=4, do_sample=False, **padded)
    assert calls == []
    assert torch.equal(found, build().generate(left, max_new_tokens=4, do_sample=False, **padded))


def test_an_exchanged_layer_is_noticed(calls):
    fast = packed(build())
    token = torch.tensor([[3]])
    calls.clear()
    with torch.no_grad():
        before = fast(token).logits
        mlp = fast.model.layers[0].mlp
        mlp.down_proj = SparseLinear.from_dense(torch.nn.Linear(100, 48, bias=False))
        fast(token)
        assert calls == [0, 1, 1]
        other = packed(build())
        fast.load_state_dict(other.state_dict())
        assert torch.allclose(fast(token).logits, before, atol=1e-5)


def test_copies_pickles_and_replayed_plans_keep_it(calls):
    model = build()
    fast = packed(model)
    wanted = generated(fast, IDS)
    again = packed(model, choose=fast.plan.choose)
    assert again.plan.decoders == fast.plan.decoders
    calls.clear()
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), again):
        assert torch.equal(generated(other, IDS), wanted)
    assert calls == [0, 1] * 33
    without = dataclasses.replace(fast.plan, decoders=())
    assert packed(model, choose=without.choose).plan.decoders == ()


def test_a_merged_layer_is_one_product(calls):
    model = build()
    plan = packed(model).plan
    leaves = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
    merged = tuple(
        tuple(f"model.layers.{i}.{owner}.{leaf}" for leaf in names)
        for i in range(2)
        for owner, names in leaves
    )
    fast = packed(model, choose=dataclasses.replace(plan, merged=merged).choose)
    assert fast.plan.merged == merged
    calls.clear()
    assert torch.equal(generated(fast, IDS), generated(model, IDS))
    assert calls == [0, 1] * 11


def test_a_tied_output_layer_may_have_int8_weights_of_its_own():
    model = build()
    fast = packed(model, dtype=torch.int8, choose=lambda row: "bitmap int8")
    assert isinstance(fast.lm_head, SparseLinear)
    embedding = fast.get_input_embeddings().weight
    assert torch.equal(embedding, model.get_input_embeddings().weight)
    step = (embedding.abs().amax(1) / 127)[:, None]
    assert ((fast.lm_head.weight - embedding).abs() <= 0.51 * step).all()
    with pytest.raises(pr.PrunusError, match="expected"):
        packed(model, dtype=torch.bfloat16, choose=lambda row: "bitmap int8")
    dense = packed(model, dtype=torch.bfloat16, choose=lambda row: "bitmap bf16")
    assert isinstance(dense.lm_head, torch.nn.Linear)
