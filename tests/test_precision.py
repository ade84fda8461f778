"""Lower precision: what is converted and what is not, the forms of attention, and the pieces of a backbone."""

import copy
import functools

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from prompttune.backbones.blocks import merge_heads
from prompttune.export.banks import BankForm, stack_states
from prompttune.export.folder import ONNX_FILE
from prompttune.export.formats import ExportSettings
from prompttune.export.formats.onnx import write_onnx
from prompttune.export.graph import MultiTaskGraph
from prompttune.export.layout import bank_input
from prompttune.export.parity.gate import NOISE
from prompttune.export.precision.casting import TORCH_DTYPES, typed_model
from prompttune.export.precision.smooth import smoothed
from prompttune.layers.aligned_attention import window_mask
from prompttune.layers.attention import attend, explicit_attention
from tests.engines import SHARING, backbone, build_request, model_of, noise

BACKBONES = ("test_vit", "test_vit2", "test_eva")
lower = pytest.mark.parametrize("precision", ["fp16", "bf16"])


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- typed models


def everything(model):
    return {name: (tensor.dtype, tensor.clone()) for name, tensor in (*model.state_dict().items(), *frozen(model))}


def frozen(model):
    return [(f"backbone.{name}", tensor) for name, tensor in model.backbone.model.state_dict().items()]


@lower
@pytest.mark.parametrize("name", BACKBONES)
def test_the_callers_model_stays_as_it_is(name, precision):
    model = copy.deepcopy(model_of("sa2vp", 0, name))
    before, modules = everything(model), list(model.backbone.model.modules())
    typed = typed_model(model, precision)
    assert typed is not model
    after = everything(model)
    assert before.keys() == after.keys()
    for key, (dtype, tensor) in before.items():
        assert after[key][0] == dtype
        assert torch.equal(after[key][1], tensor)
    assert all(one is other for one, other in zip(modules, model.backbone.model.modules(), strict=True))
    own = {tensor.data_ptr() for tensor in model.backbone.model.parameters()}
    assert own.isdisjoint(tensor.data_ptr() for tensor in typed.backbone.model.parameters())
    assert not typed.training


def test_fp32_changes_nothing():
    assert typed_model(model_of("linear", 0), "fp32") is model_of("linear", 0)


@lower
@pytest.mark.parametrize("name", BACKBONES)
def test_norms_and_the_task_stay_in_float32(name, precision):
    model = model_of("sa2vp", 0, name)
    typed = typed_model(model, precision)
    original = dict(model.backbone.model.named_modules())
    norms = {one: module for one, module in typed.backbone.model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert norms.keys() == {one for one, module in original.items() if isinstance(module, nn.LayerNorm)}
    for one, module in norms.items():
        assert module.eps == original[one].eps
        for parameter, exact in zip(module.parameters(), original[one].parameters(), strict=True):
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, exact)
            assert not parameter.requires_grad
    dtype = TORCH_DTYPES[precision]
    for index in range(typed.backbone.depth):
        block = typed.backbone.blocks[index].timm
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert layer.weight.dtype == dtype
    patches = typed.backbone.model.patch_embed.proj.weight.dtype
    assert patches == (torch.float32 if precision == "bf16" else dtype)
    assert {parameter.dtype for parameter in typed.task_parameters().values()} == {torch.float32}
    assert {buffer.dtype for buffer in typed.method.buffers() if buffer.is_floating_point()} <= {torch.float32}


def test_a_norm_whose_sums_overflow_float16_is_right():
    """Squares of values above 256 do not fit float16."""
    typed = typed_model(model_of("linear", 0), "fp16")
    tokens = (seeded(2, 5, typed.backbone.width) * 3000).half()
    wanted = model_of("linear", 0).backbone.blocks[0].norm1(tokens.float())
    found = typed.backbone.blocks[0].norm1(tokens)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), wanted, atol=0.02, rtol=0.002)


@functools.cache
def states(method, name):
    return build_request(method, ExportSettings(), name).states


def graph_logits(method, name, precision, images, explicit):
    """The multi-task graph in eager PyTorch, rows of both tasks in turn."""
    model = model_of(method, 0, name)
    bank = stack_states(BankForm(model.state_layout()), states(method, name).values())
    dtype = TORCH_DTYPES[precision]
    rows = {key: torch.from_numpy(value).to(dtype) for key, value in bank.rows.items()}
    index = [torch.from_numpy(one) for one in bank.index([[row % 2] for row in range(len(images))]).values()]
    graph = MultiTaskGraph(typed_model(model, precision), dtype).eval()
    with torch.no_grad(), explicit_attention(explicit):
        return graph(torch.from_numpy(images), *index, rows)[:, 0].numpy()


@pytest.mark.parametrize("explicit", [False, True], ids=["fused", "explicit"])
@lower
@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((method, "test_vit") for method in SHARING),
        *(("sa2vp", name) for name in ("test_vit2", "test_eva", "test_eva2")),
        *((method, "test_swin2") for method in ("side", "lora")),
    ],
    ids=str,
)
def test_eager_logits_are_within_rounding(method, name, precision, explicit):
    images = noise(4)
    exact = graph_logits(method, name, "fp32", images, explicit)
    found = graph_logits(method, name, precision, images, explicit)
    assert found.dtype == np.float32
    finite = np.isfinite(exact)
    assert np.array_equal(finite, np.isfinite(found))
    apart = np.abs(found[finite] - exact[finite]).max()
    assert 0 < apart <= NOISE[precision] * np.abs(exact[finite]).max()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sa2vp", "lspt"])
def test_the_bf16_graph_computes_the_right_thing(method, tmp_path):
    """ONNX Runtime has no bf16 on a CPU; ONNX's own reference evaluator does."""
    model, images = model_of(method, 0), noise(2)
    request = build_request(method, ExportSettings("onnx", "bf16"))
    write_onnx(request, tmp_path)
    evaluator = ReferenceEvaluator(onnx.load(str(tmp_path / ONNX_FILE)))
    bank = stack_states(BankForm(model.state_layout()), request.states.values(), np.dtype(ml_dtypes.bfloat16))
    rows = {bank_input(key): one for key, one in bank.rows.items()}
    (found,) = evaluator.run(["logits"], {"image": images, **bank.index([[0], [1]]), **rows})
    found = found[:, 0]
    eager = graph_logits(method, "test_vit", "bf16", images, explicit=True)
    exact = graph_logits(method, "test_vit", "fp32", images, explicit=True)
    finite = np.isfinite(exact)
    assert found.dtype == np.float32
    assert np.array_equal(np.isfinite(found), finite)
    scale = np.abs(exact[finite]).max()
    assert np.abs(found[finite] - eager[finite]).max() <= NOISE["bf16"] * scale
    assert np.abs(found[finite] - exact[finite]).max() <= NOISE["bf16"] * scale


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
def test_balanced_channels_compute_the_same(name):
    """Folding a task through the balanced model or through the caller's gives the same state, and the same answer."""
    model, images = model_of("sa2vp", 0, name), torch.from_numpy(noise(4))
    before, state = everything(model), model.task_state()
    balanced = smoothed(model, [(noise(4), state)])
    after = everything(model)
    assert all(torch.equal(after[key][1], tensor) for key, (_, tensor) in before.items())
    assert not torch.equal(
        balanced.backbone.blocks[0].timm.mlp.fc1.weight, model.backbone.blocks[0].timm.mlp.fc1.weight
    )
    wanted = model(images).logits
    torch.testing.assert_close(balanced.forward_state(images, state).logits, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(balanced(images).logits, wanted, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- attention


def definition(q, k, v, mask=None):
    scores = torch.einsum("...qd,...kd->...qk", q.expand(*k.shape[:-2], *q.shape[-2:]), k) / q.shape[-1] ** 0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ v


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ((2, 3, 5, 4), (2, 3, 7, 4)),
        ((2, 2, 3, 5, 4), (2, 2, 3, 7, 4)),
        ((1, 3, 5, 4), (2, 3, 7, 4)),
        ((2, 1, 3, 1, 4), (2, 6, 3, 7, 4)),
        ((1, 2, 3, 5, 4), (2, 2, 3, 7, 4)),
    ],
)
def test_both_forms_are_the_definition(queries, keys, masked):
    q, k, v = seeded(*queries), seeded(*keys, seed=1), seeded(*keys, seed=2)
    mask = None
    if masked:
        mask = torch.zeros(queries[-2], keys[-2])
        mask[:, 1:3] = -1e4
    wanted = definition(q, k, v, mask)
    fused = attend(q, k, v, mask)
    with explicit_attention():
        explicit = attend(q, k, v, mask)
    assert fused.shape == explicit.shape == wanted.shape
    torch.testing.assert_close(fused, wanted, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(explicit, wanted, atol=2e-6, rtol=1e-5)
    if masked:
        other = v.clone()
        other[..., 1:3, :] = 99.0
        with explicit_attention():
            assert torch.equal(attend(q, k, other, mask), explicit)


@pytest.mark.parametrize("shift", [False, True], ids=["window", "position bias"])
@pytest.mark.parametrize("above", [0, 50, 500])
def test_the_form_for_a_cpu_hides_keys_without_scores_far_below_their_row(above, shift, monkeypatch):
    tokens, size = 26, 26
    mask = window_mask((5, 5), 1, 3)
    hidden = mask < 0
    scores = 3 * seeded(2, 3, tokens, tokens) + above * hidden
    q, k, v = scores * size**0.5, torch.eye(size).expand(2, 3, -1, -1), seeded(2, 3, tokens, 4, seed=2)
    if shift:
        mask = mask + seeded(tokens, tokens, seed=3)
    wanted = (scores + mask).double().masked_fill(hidden, -torch.inf).softmax(-1) @ v.double()
    seen, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda one, dim: (seen.append(one), softmax(one, dim))[1])
    with explicit_attention(for_cpu=True):
        found = attend(q, k, v, mask, hides=True)
        half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, hides=True)
        plain = attend(q, k, v, mask)
    torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(half.float(), wanted.float(), atol=0.1, rtol=0)
    depths = [float((one.amax(-1, keepdim=True) - one).max()) for one in seen]
    assert depths[0] < 80, "a softmax over such rows is slow in ONNX Runtime"
    assert depths[2] > 1e3
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)


def test_explicit_attention_does_not_overflow_float16():
    q = torch.full((1, 1, 2, 64), 40.0)
    k = torch.stack((torch.full((64,), 40.0), torch.full((64,), 39.0)))[None, None]
    v = torch.stack((torch.ones(64), torch.zeros(64)))[None, None]
    assert not torch.isfinite(q.half() @ k.half().transpose(-2, -1)).all()
    with explicit_attention():
        found = attend(q.half(), k.half(), v.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), definition(q, k, v), atol=1e-3, rtol=1e-3)


def form_of(q, k, v):
    """Which form :func:`attend` takes."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        kernel = nn.functional.scaled_dot_product_attention
        patch.setattr(
            nn.functional,
            "scaled_dot_product_attention",
            lambda *arguments, **named: (calls.append(1), kernel(*arguments, **named))[1],
        )
        attend(q, k, v)
    return "fused" if calls else "explicit"


def test_training_in_half_precision_on_a_cpu_leaves_the_fused_form():
    q, k = (seeded(2, 3, 5, 4) for _ in range(2))
    v = seeded(2, 3, 5, 4).requires_grad_()
    assert form_of(q, k, v) == "fused"
    assert form_of(q.bfloat16(), k.bfloat16(), v.detach().bfloat16()) == "fused"
    assert form_of(q.bfloat16(), k.bfloat16(), v.bfloat16()) == "explicit"
    with torch.no_grad():
        assert form_of(q.bfloat16(), k.bfloat16(), v.bfloat16()) == "fused"
    with explicit_attention(False):
        assert form_of(q.bfloat16(), k.bfloat16(), v.bfloat16()) == "fused"


def test_the_form_is_chosen_for_a_block_alone():
    q = seeded(2, 3, 5, 4)

    def forms():
        return form_of(q, q, q)

    assert forms() == "fused"
    with explicit_attention():
        assert forms() == "explicit"
        with explicit_attention(False):
            assert forms() == "fused"
        assert forms() == "explicit"
    with pytest.raises(ZeroDivisionError), explicit_attention():
        raise ZeroDivisionError
    assert forms() == "fused"


def test_heads_are_merged_in_order():
    attended = seeded(2, 3, 5, 4)
    assert torch.equal(merge_heads(attended), torch.cat(list(attended.unbind(1)), dim=-1))
    assert merge_heads(seeded(2, 2, 3, 5, 4)).shape == (2, 2, 5, 12)


# ------------------------------------------------------------------------------------------- a backbone's pieces


@pytest.mark.parametrize("explicit", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_eva2"])
def test_forward_is_timms(name, explicit):
    frozen, images = backbone(name), torch.from_numpy(noise(3))
    with torch.no_grad(), explicit_attention(explicit):
        wanted = frozen.model.forward_head(frozen.model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(frozen(images), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_blocks_are_timms(name):
    frozen, images = backbone(name), torch.from_numpy(noise(2))
    with torch.no_grad():
        tokens = frozen.embed(images)
        for block in frozen.blocks:
            wanted = block.run_timm(tokens)
            torch.testing.assert_close(block.run(tokens), wanted, atol=1e-5, rtol=1e-5)
            tokens = wanted


@torch.no_grad()
def test_the_last_block_computes_what_is_pooled():
    by_token, by_patches = backbone("test_vit"), backbone("test_vit2")
    assert by_token.pools_class_token
    assert not by_patches.pools_class_token
    tokens = seeded(2, by_token.num_tokens, by_token.width)
    found = by_token.blocks[-1].run_read(tokens)
    assert found.shape == (2, 1, by_token.width)
    torch.testing.assert_close(found, by_token.blocks[-1].run(tokens)[:, :1], atol=2e-6, rtol=1e-5)
    whole = by_token.blocks[-1].run(tokens)
    torch.testing.assert_close(by_token.pool(found), by_token.pool(whole), atol=2e-6, rtol=1e-5)
    tokens = seeded(2, by_patches.num_tokens, by_patches.width)
    last = by_patches.blocks[-1]
    assert torch.equal(last.run_read(tokens), last.run(tokens))
