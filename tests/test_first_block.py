"""``first_block``: the blocks in front are the backbone's own and belong to the image, the others to the task."""

import copy
import dataclasses
import json

import pytest
import torch

import prompttune as pt
from prompttune.errors import EngineError, UsageError
from prompttune.explanation.attention import block_attention
from prompttune.explanation.subjects import ExplainedModel
from prompttune.export.folder import EngineFolder, write_manifest
from prompttune.export.precision.smooth import smoothed
from prompttune.files import write_json
from prompttune.methods import METHODS
from tests import engines
from tests.drawing import drawn_model
from tests.engines import checkpoint, config_of, copied, noise
from tests.segmenting import GIVES_MAPS, drawn_segmentation

FIRST, LEVELS = 3, (1, 3, 5)
TUNING = [name for name, config in METHODS.items() if "first_block" in (one.name for one in dataclasses.fields(config))]
"""Methods with the setting."""

every_method = pytest.mark.parametrize("method", TUNING)


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(noise(3))


@pytest.fixture(scope="module")
def vit():
    return engines.backbone("test_vit")


def cut(backbone, first, images):
    """The blocks from ``first`` on as a backbone, whose embedding gives the tokens that enter them."""
    short, tokens = copy.deepcopy(backbone), backbone.embed(images)
    for block in backbone.blocks[:first]:
        tokens = block.run(tokens)
    short.blocks = tuple(
        short.open_block(block.timm, place, block.pooled_alone) for place, block in enumerate(short.blocks[first:])
    )
    short.depth = len(short.blocks)
    short.embed = short.place = lambda _: tokens
    return short


def whole_over(short, model):
    """The same task with ``first_block`` 0 over a cut backbone."""
    config = dataclasses.replace(model.config, first_block=0)
    whole, own = drawn_model(short, config), model.task_parameters()
    for name, parameter in whole.task_parameters().items():
        if name not in own:  # of a patch embedding that is shared
            assert name in ("method.scale.patches", "method.shift.patches")
            continue
        parameter.data.copy_(own[name])
    return whole


def test_every_method_that_tunes_blocks_of_a_vit_has_it():
    assert {"sa2vp", "vpt-deep", "vpt-shallow", "lspt", "gapt", "e2vpt", "expres", "lora", "adaptformer", "adapter",
            "ssf"} == set(TUNING)  # fmt: skip


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_eva"])
@every_method
def test_it_is_the_method_over_the_blocks_behind(name, method, images):
    backbone = engines.backbone(name)
    model = drawn_model(backbone, config_of(method, first_block=FIRST))
    with torch.no_grad():
        whole = whole_over(cut(backbone, FIRST, images), model)
        found, wanted = model(images, aux=True), whole(images, aux=True)
        pairs = [(found.features, wanted.features), (found.logits, wanted.logits)]
        if wanted.aux_features is not None:
            pairs.append((found.aux_features, wanted.aux_features))
        for one, other in pairs:
            assert (one - other).abs().max() <= 1e-5 * max(1, other.abs().max().item())
        assert (found.features - backbone(images)).abs().max() > 1e-3, "the task must matter"


@every_method
def test_the_last_blocks_alone_are_tuned(vit, method, images):
    last = vit.depth - METHODS[method].fewest_blocks
    model = drawn_model(vit, config_of(method, first_block=last)).train()
    out = model(images)
    loss = out.logits.square().mean()
    (loss if out.aux_logits is None else loss + out.aux_logits.square().mean()).backward()
    for name, parameter in model.trained_parameters().items():
        assert parameter.grad.abs().max() > 0, name


@every_method
def test_the_state_has_no_rows_for_the_blocks_in_front(vit, method):
    whole, model = (drawn_model(vit, config_of(method, first_block=first)) for first in (0, FIRST))
    of_whole, state = whole.task_state(), model.task_state()
    for name, tensor in state.items():
        if tensor.shape != of_whole[name].shape and name != "deep":  # sa2vp's deep maps are fewer
            assert tensor.shape[1] == of_whole[name].shape[1] - FIRST, name
        assert vit.depth not in tensor.shape[1:2], name
    assert [tuple(tensor.shape[1:]) for tensor in state.values()] == [
        tuple(4 if size == "rank" else 5 if size == "classes" else size for size in shape)
        for shape in model.state_layout().values()
    ]
    count = [sum(one.numel() for one in each.task_parameters().values()) for each in (whole, model)]
    assert count[0] > count[1] or method == "vpt-shallow"


@every_method
def test_training_runs_the_blocks_in_front_without_gradient(vit, method, images):
    model = drawn_model(vit, config_of(method, first_block=FIRST)).train()
    assert not any(tensor.requires_grad for tensor in model.image_state(images).values())
    optimiser = torch.optim.SGD(model.trained_parameters().values(), lr=1e-3)
    seen = []
    hooks = [
        vit.blocks[index].timm.norm1.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
        for index in range(FIRST)
    ]
    try:
        losses = []
        for _ in range(2):
            out = model(images)
            losses.append(pt.loss(out, torch.tensor([0, 1, 2])))
            optimiser.zero_grad()
            losses[-1].backward()
            optimiser.step()
    finally:
        for hook in hooks:
            hook.remove()
    assert seen == [False] * 2 * FIRST
    assert torch.stack(losses).isfinite().all()


@every_method
def test_save_and_load(vit, method, images, tmp_path):
    model = drawn_model(vit, config_of(method, first_block=2))
    model.save(tmp_path / "task")
    loaded = pt.PromptModel.load(tmp_path / "task", vit)
    assert loaded.config.first_block == 2
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_a_checkpoint_of_an_earlier_release_begins_in_block_0(vit, images, tmp_path):
    model = drawn_model(vit, config_of("lora"))
    model.save(tmp_path / "task")
    document = json.loads((tmp_path / "task" / "prompt_config.json").read_text())
    assert document["settings"].pop("first_block") == 0
    write_json(tmp_path / "task" / "prompt_config.json", document)
    loaded = pt.PromptModel.load(tmp_path / "task", vit)
    assert loaded.config == model.config
    assert torch.equal(loaded(images).logits, model(images).logits)


@pytest.mark.parametrize("method", [name for name in GIVES_MAPS if name in TUNING])
def test_maps_of_blocks_in_front_are_the_backbones(vit, method, images):
    model = drawn_segmentation(vit, method, "pyramid", first_block=FIRST)
    with torch.no_grad():
        image, state = model.method.image_state(images, LEVELS), model.task_state()
        found = model.method(image, state, True, LEVELS)
        assert len(found.maps) == len(LEVELS)
        if found.aux_features is not None:
            assert torch.equal(found.aux_maps[0], found.maps[0])
            assert not torch.equal(found.aux_maps[1], found.maps[1])
        short = cut(vit, FIRST, images)
        wanted = whole_over(short, drawn_model(vit, model.config)).method
        for name, parameter in model.method.named_parameters():
            wanted.get_parameter(name).data.copy_(parameter)
        behind = tuple(level - FIRST for level in LEVELS[1:])
        maps = wanted(wanted.image_state(images, behind), wanted.task_state(), False, behind).maps
        front = vit.embed(images)
        for block in vit.blocks[: LEVELS[0] + 1]:
            front = block.run(front)
        for one, other in zip(found.maps, (vit.patch_map(front), *maps), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
        assert model(images).logits.shape[1] == len(model.labels)


@pytest.mark.parametrize(
    ("method", "backbone", "first", "message"),
    [
        ("lora", "test_vit", 6, "lora: first_block 6 does not leave 1 of the 6 blocks of test_vit"),
        ("sa2vp", "test_vit", 5, "sa2vp: first_block 5 does not leave 2 of the 6 blocks of test_vit"),
        ("lspt", "test_vit", 5, "lspt: first_block 5 does not leave 2 of the 6 blocks of test_vit"),
        ("vpt-deep", "test_swin", 1, "vpt-deep: first_block needs a ViT; test_swin is a SwinBackbone"),
        ("sa2vp", "test_swin", 1, "sa2vp: first_block needs a ViT; test_swin is a SwinBackbone"),
        ("sa2vp", "test_resnet3", 1, "sa2vp: first_block needs a ViT; test_resnet3 is a ConvBackbone"),
    ],
)
def test_it_is_refused_in_one_line_where_it_does_not_fit(method, backbone, first, message):
    with pytest.raises(UsageError) as caught:
        config_of(method, first_block=first).build(engines.backbone(backbone))
    assert str(caught.value) == message


def test_prompt_layers_are_counted_from_it(vit):
    assert pt.SA2VPConfig(first_block=1).resolved(vit).prompt_layers == (0,)  # a map in the last block gives nothing
    model = drawn_model(vit, pt.SA2VPConfig(rank=4, first_block=2, prompt_layers=(0, 2)))
    assert set(model.method.prompts) == {"0", "2"}
    with pytest.raises(UsageError, match=r"prompt_layers \(0, 4\) do not fit 4 blocks"):
        pt.SA2VPConfig(first_block=2, prompt_layers=(0, 4)).resolved(vit)


def test_values_have_the_numbers_of_their_blocks(vit):
    values = config_of("gapt", first_block=2).build(vit).values_by_block()
    assert list(values["gate"]) == [2, 3, 4]
    assert list(values["temperature"]) == [2, 3, 4, 5]


def test_attention_in_front_has_no_prompts(vit, images):
    model = drawn_model(vit, config_of("e2vpt", first_block=2))
    subject = ExplainedModel("task", vit, model.preprocess, model, model.task_state())
    found = block_attention(subject, images, list(range(vit.depth)))
    plain = block_attention(ExplainedModel("plain", vit, model.preprocess), images, [0, 1])
    for index, one in found.items():
        assert (one.shares()["prompts"] > 0) == (index >= 2)
        if index < 2:
            torch.testing.assert_close(one.weights, plain[index].weights)


@pytest.mark.parametrize("method", ["lora", "ssf"])
def test_balancing_channels_for_int8_changes_no_answer(vit, images, method):
    model = drawn_model(vit, config_of(method, first_block=2))
    with torch.no_grad():
        balanced = smoothed(model, [(images.numpy(), model.task_state())])
        torch.testing.assert_close(balanced(images).logits, model(images).logits, atol=1e-4, rtol=1e-4)


def test_an_engine_holds_tasks_of_one_first_block(vit, images, tmp_path):
    models = {f"task{number}": drawn_model(vit, config_of("lora", first_block=2), seed=number) for number in range(3)}
    models["other"] = drawn_model(vit, config_of("lora"))
    for name, model in models.items():
        model.save(tmp_path / name)
    pt.export_engine([tmp_path / "task0", tmp_path / "task1"], tmp_path / "engine", batch_sizes=(1, 3))
    engine = pt.Engine(tmp_path / "engine")
    engine.add_task("task2", tmp_path / "task2")
    with pytest.raises(EngineError, match=r"its first_block is 0, .* has 2"):
        engine.add_task("other", tmp_path / "other")
    names = ["task0", "task1", "task2"]
    with torch.no_grad():
        wanted = torch.stack([models[name](images).logits for name in names], dim=1)  # [B, K, C]
    rows = torch.from_numpy(engine.logits(images.numpy(), names))
    torch.testing.assert_close(rows, wanted[range(3), range(3)], atol=1e-4, rtol=1e-4)
    found = torch.from_numpy(engine.logits(images.numpy(), [names] * 3))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_an_engine_of_an_earlier_release_takes_tasks_that_begin_in_block_0(vit, tmp_path):
    folder = copied("lora", tmp_path)
    manifest = EngineFolder(folder).manifest
    for part in ("settings", "graph_settings"):
        assert manifest.method[part].pop("first_block") == 0
    write_manifest(folder, manifest)
    pt.Engine(folder).add_task("task2", checkpoint("lora", 2), parity=False)
    drawn_model(vit, config_of("lora", first_block=2)).save(tmp_path / "other")
    with pytest.raises(EngineError, match=r"its first_block is 2, .* has 0"):
        pt.Engine(folder).add_task("other", tmp_path / "other")
