"""Released SA²VP, VPT, GaPT and PEFT LoRA files become checkpoints that compute what the released code computes."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import prompttune as pt
from prompttune.checkpoints import read_config
from prompttune.checkpoints.importing import LAYOUTS
from prompttune.cli.import_checkpoint import _labels
from prompttune.cli.main import cli
from prompttune.errors import CheckpointError, DataError, PrompttuneError, UsageError
from prompttune.methods import METHODS
from tests import equations, released
from tests.drawing import drawn_backbone, drawn_model
from tests.engines import noise

SIZE = 64
BAR = 2e-5


class Evil:
    """What a pickle can do."""

    def __reduce__(self):
        return (print, ("code ran",))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return tmp_path_factory.mktemp("importing")


@pytest.fixture(scope="module")
def vit(workshop):
    """A class token; LayerScale, which no released code has, is taken out."""
    return drawn_backbone("test_vit", workshop, SIZE)


@pytest.fixture(scope="module")
def swin(workshop):
    return drawn_backbone("test_swin", workshop, SIZE)


@pytest.fixture
def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def save(tensors, path):
    """As fvcore's Checkpointer does."""
    torch.save({"model": tensors, "iteration": 5}, path)
    return path


def bring(layout, file, output, backbone, **given):
    """Import, then read again from the disk."""
    made = pt.import_checkpoint(layout, file, output, backbone=backbone, **given)
    return made, pt.PromptModel.load(output, backbone)


def close(found, wanted):
    """Within the bar, relative where logits are above one."""
    return (found - wanted).abs().max() <= BAR * max(1, wanted.abs().max().item())


def refused(message, kind, layout, file, output, backbone, **given):
    with pytest.raises(kind, match=message) as caught:
        pt.import_checkpoint(layout, file, output, backbone=backbone, **given)
    assert "\n" not in str(caught.value)
    assert not Path(output).exists()
    return str(caught.value)


# ----------------------------------------------------------------- SA²VP


@pytest.mark.parametrize("prefix", ["", "module."])
def test_sa2vp_on_a_vit(vit, images, tmp_path, prefix):
    task = drawn_model(vit, pt.SA2VPConfig(rank=4, gamma=0.7, init="released"))
    tensors = {prefix + name: value for name, value in released.sa2vp_vit(task).items()}
    file = released.save_sa2vp(tensors, tmp_path / "checkpoint-9.pth")
    made, model = bring("sa2vp", file, tmp_path / "task", vit, settings={"gamma": 0.7})
    assert model.config == task.config
    assert made.assumed == {"window": 3}
    assert "equal to test_vit" in made.backbone
    base, prompt = equations.features(task, images)
    with torch.no_grad():
        both = model(images, aux=True)
    assert close(both.features, base)
    assert close(both.aux_features, prompt)
    assert torch.equal(model(images).logits, task(images).logits)
    assert model.preprocess.mean == model.preprocess.std == (0.5, 0.5, 0.5)


def test_sa2vp_settings_that_no_file_holds(vit, tmp_path):
    task = drawn_model(vit, pt.SA2VPConfig(rank=4, prompt_layers=(0, 3)))
    file = released.save_sa2vp(released.sa2vp_vit(task), tmp_path / "file.pth")
    made, model = bring("sa2vp", file, tmp_path / "task", vit, settings={"prompt_layers": [0, 3], "window": 5})
    assert (model.config.gamma, model.config.window, model.config.prompt_layers) == (0.1, 5, (0, 3))
    assert made.assumed == {"gamma": 0.1}
    message = refused("holds 2 prompt maps", UsageError, "sa2vp", file, tmp_path / "x", vit, settings={
        "prompt_layers": [0, 2, 4]})  # fmt: skip
    assert "--prompt-layers" in message
    refused("does not have a setting 'rank'", UsageError, "sa2vp", file, tmp_path / "x", vit, settings={"rank": 4})


def test_sa2vp_on_a_swin(swin, images, tmp_path):
    task = drawn_model(swin, pt.SA2VPConfig(rank=4, gamma=0.5, init="released"))
    file = released.save_sa2vp(released.sa2vp_swin(task), tmp_path / "file.pth")
    made, model = bring("sa2vp", file, tmp_path / "task", swin)
    assert model.config == task.config
    assert made.assumed == {"gamma": 0.5, "window": 3}
    assert len(made.ignored) == 2
    with torch.no_grad():
        assert torch.equal(model(images).logits, task(images).logits)


def test_a_frozen_copy_that_was_trained_is_refused(vit, tmp_path):
    tensors = released.sa2vp_vit(drawn_model(vit, pt.SA2VPConfig(rank=4)))
    tensors["vit_base.transformer.encoder.cross_attn.2.attn.to_k.weight"][0, 0] += 1e-3
    file = released.save_sa2vp(tensors, tmp_path / "file.pth")
    refused(r"copy of blocks.2.attn.qkv.weight is not", CheckpointError, "sa2vp", file, tmp_path / "x", vit)


# ----------------------------------------------------------------- VPT and GaPT


@pytest.mark.parametrize("moco", [False, True], ids=["jax", "moco"])
@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_vpt(vit, images, tmp_path, moco, deep):
    tensors = released.vpt(vit, deep=deep, moco=moco)
    made, model = bring("vpt", save(tensors, tmp_path / "last_model.pth"), tmp_path / "task", vit)
    wanted = (
        released.timm_logits(tensors, images, vit.num_heads, "backbone")
        if moco
        else released.vpt_logits(tensors, images, vit.num_heads)
    )
    with torch.no_grad():
        found = model(images).logits
        assert (found - model.head(vit(images), (), model.head.task_state())).abs().max() > 1e-3, (
            "the prompts must matter"
        )
    assert close(found, wanted)
    assert model.config.method == ("vpt-deep" if deep else "vpt-shallow")
    assert made.model.preprocess.mean == (0.485, 0.456, 0.406)
    assert made.model.preprocess.interpolation == "bilinear"


def test_vpt_projection_folds(vit, images, tmp_path):
    tensors = released.vpt(vit, deep=True, project=7)
    _, model = bring("vpt", save(tensors, tmp_path / "file.pth"), tmp_path / "task", vit)
    with torch.no_grad():
        assert close(model(images).logits, released.vpt_logits(tensors, images, vit.num_heads))


def test_vpt_prompts_alone(vit, images, tmp_path):
    whole = released.vpt(vit, deep=True)
    arrays = {
        "shallow_prompt": whole["enc.transformer.prompt_embeddings"].numpy(),
        "deep_prompt": whole["enc.transformer.deep_prompt_embeddings"].numpy(),
    }
    torch.save(arrays, tmp_path / "prompt_ep9.pth")
    refused("holds no head: give --labels", UsageError, "vpt", tmp_path / "prompt_ep9.pth", tmp_path / "x", vit)
    made, model = bring("vpt", tmp_path / "prompt_ep9.pth", tmp_path / "task", vit, labels=["a", "b"])
    assert (made.has_head, made.backbone, model.labels) == (False, "not in the file", ["a", "b"])
    assert not model.head.weight.any()
    _, full = bring("vpt", save(whole, tmp_path / "last_model.pth"), tmp_path / "full", vit)
    with torch.no_grad():
        assert torch.equal(model(images).features, full(images).features)


@pytest.mark.parametrize("pool", ["backbone", "mean"])
def test_gapt(vit, images, tmp_path, pool):
    tensors = released.gapt(vit)
    _, model = bring("gapt", save(tensors, tmp_path / "file.pth"), tmp_path / "task", vit, settings={"pool": pool})
    with torch.no_grad():
        assert close(model(images).logits, released.timm_logits(tensors, images, vit.num_heads, pool))


@pytest.mark.parametrize("gates", [0, 3, 6])
def test_gapt_with_fewer_or_more_gates(vit, images, tmp_path, gates):
    tensors = released.gapt(vit, gates=gates)
    if gates == 0:
        del tensors["enc.gate_logit"], tensors["enc.temp"]
    file = save(tensors, tmp_path / "file.pth")
    made, model = bring("gapt", file, tmp_path / "task", vit, settings={"pool": "backbone"})
    with torch.no_grad():
        assert close(model(images).logits, released.timm_logits(tensors, images, vit.num_heads, "backbone"))
    assert made.notes
    if gates == 6:
        refused("gate behind the last", CheckpointError, "gapt", file, tmp_path / "x", vit, settings={"pool": "mean"})


# ----------------------------------------------------------------- PEFT


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
@pytest.mark.parametrize("keys", [True, False], ids=["qkv", "qv"])
def test_lora(workshop, images, tmp_path, name, keys):
    backbone = drawn_backbone(name, workshop, SIZE)
    tensors = released.peft_folder(tmp_path / "adapter", backbone, keys=keys)
    _, model = bring("lora", tmp_path / "adapter", tmp_path / "task", backbone)
    assert (model.config.targets, model.config.rank, model.config.alpha) == ("qkv" if keys else "qv", 4, 8)
    with torch.no_grad():
        assert close(model(images).logits, released.merged_logits(backbone, tensors, [2.0] * backbone.depth, images))


def test_lora_ranks_and_alphas_of_single_blocks(vit, images, tmp_path):
    patterns = {"rank_pattern": {"blocks.1.attn.qkv": 2}, "alpha_pattern": {r"blocks\.[23].*": 3}, "use_rslora": True}
    tensors = released.peft_folder(tmp_path / "adapter", vit, **patterns)
    scales = [8 / 4**0.5, 8 / 2**0.5, 3 / 4**0.5, 3 / 4**0.5, 8 / 4**0.5, 8 / 4**0.5]
    for stem in ("lora_A", "lora_B"):  # layers_to_transform leaves blocks out
        name = f"base_model.model.blocks.5.attn.qkv.{stem}.weight"
        tensors[name] = torch.zeros_like(tensors[name])
    kept = {name: value for name, value in tensors.items() if "blocks.5." not in name}
    save_file(kept, tmp_path / "adapter" / "adapter_model.safetensors")
    _, model = bring("lora", tmp_path / "adapter", tmp_path / "task", vit)
    with torch.no_grad():
        assert close(model(images).logits, released.merged_logits(vit, tensors, scales, images))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "not plain LoRA: use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"peft_type": "IA3"}, "of type 'IA3', not LORA"),
        ({"r": 0}, "r must be a whole number above 0, not 0"),
        ({"r": 4.5}, "r must be a whole number above 0, not 4.5"),
        ({"r": 8}, r"blocks.0.attn.qkv.lora_A.weight has rank 4, adapter_config.json says 8 by r and rank_pattern"),
        ({"rank_pattern": {"blocks.3.attn.qkv": 2}}, r"blocks.3.attn.qkv.lora_A.weight has rank 4, .* says 2"),
        ({"rank_pattern": {"qkv": "2"}}, "rank_pattern 'qkv' must be a whole number above 0, not '2'"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number that float32 holds, not 1000"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a number that float32 holds, not nan"),
        ({"lora_alpha": 1e-320}, "lora_alpha must be a number above 0"),
        ({"lora_alpha": 1e-30, "alpha_pattern": {"blocks.1.attn.qkv": 1e30}}, "too large for float32"),
        ({"lora_dropout": "abc"}, "lora_dropout must be a number from 0 to below 1, not 'abc'"),
        ({"lora_dropout": [1]}, r"lora_dropout must be a number from 0 to below 1, not \[1\]"),
        (
            {"alpha_pattern": {"blocks.1.attn.qkv": math.nan}},
            "alpha_pattern 'blocks.1.attn.qkv' must be a number .* nan",
        ),
        ({"alpha_pattern": {"(": 3}}, r"alpha_pattern '\(' is not a regular expression"),
        ({"alpha_pattern": [3]}, "alpha_pattern must be a table"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_other_adapters_are_refused(vit, tmp_path, config, message):
    released.peft_folder(tmp_path / "adapter", vit)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    refused(message, CheckpointError, "lora", tmp_path / "adapter", tmp_path / "x", vit)


def test_an_adapter_config_of_any_depth(vit, tmp_path):
    released.peft_folder(tmp_path / "adapter", vit)
    (tmp_path / "adapter" / "adapter_config.json").write_text("[" * 200_000)
    refused("cannot read the adapter config", CheckpointError, "lora", tmp_path / "adapter", tmp_path / "x", vit)


def test_lora_refusals(vit, swin, tmp_path):
    folder = tmp_path / "adapter"
    tensors = released.peft_folder(folder, vit)
    refused("changes keys too", UsageError, "lora", folder, tmp_path / "x", vit, settings={"targets": "qv"})
    refused("LoRA needs a ViT", CheckpointError, "lora", folder, tmp_path / "x", swin)
    tensors["base_model.model.blocks.0.mlp.fc1.lora_A.weight"] = torch.zeros(4, 64)
    save_file(tensors, folder / "adapter_model.safetensors")
    refused(r"unexpected: blocks.0.mlp.fc1.lora_A", CheckpointError, "lora", folder, tmp_path / "x", vit)
    refused("no PEFT folder", CheckpointError, "lora", tmp_path / "none", tmp_path / "x", vit)
    (folder / "adapter_model.safetensors").unlink()
    refused("no adapter_model.safetensors", CheckpointError, "lora", folder, tmp_path / "x", vit)


# ----------------------------------------------------------------- what does not fit


def test_a_mismatch_names_every_kind(vit, tmp_path):
    tensors = released.vpt(vit, deep=True)
    del tensors["enc.transformer.encoder.layer.1.attn.key.bias"]
    tensors["enc.transformer.surplus"] = torch.zeros(2)
    tensors["enc.transformer.deep_prompt_embeddings"] = torch.zeros(2, 3, 64)
    file = save(tensors, tmp_path / "file.pth")
    message = refused("does not fit vpt-deep over test_vit", CheckpointError, "vpt", file, tmp_path / "x", vit)
    assert "missing: enc.transformer.encoder.layer.1.attn.key.bias;" in message
    assert "unexpected: enc.transformer.surplus;" in message
    assert message.endswith("wrong shape: enc.transformer.deep_prompt_embeddings is (2, 3, 64), expected (5, 3, 64)")


def test_another_backbone_is_refused_or_saved(vit, workshop, images, tmp_path):
    tensors = released.vpt(vit)
    file = save(tensors, tmp_path / "file.pth")
    other = drawn_backbone("test_vit", workshop, SIZE, seed=5)
    message = refused("trained over other weights than test_vit", CheckpointError, "vpt", file, tmp_path / "x", other)
    assert "--save-backbone" in message
    own = tmp_path / "own.safetensors"
    native = drawn_backbone("test_vit", workshop, 160)  # test_vit's own size: nothing is resampled
    whole = save(released.vpt(native), tmp_path / "native.pth")
    made = pt.import_checkpoint("vpt", whole, tmp_path / "task", backbone="test_vit", save_backbone=own)
    assert (made.model.backbone.image_size, made.model.backbone.fingerprint) == (160, native.fingerprint)
    assert load_file(own).keys() == native.model.state_dict().keys()
    assert pt.PromptModel.load(tmp_path / "task").backbone.weights == str(own)
    refused("exists; give --overwrite", UsageError, "vpt", whole, tmp_path / "x", "test_vit", save_backbone=own)
    refused("one that is loaded|needs the backbone's name", UsageError, "vpt", whole, tmp_path / "x", native,
            save_backbone=own)  # fmt: skip


def test_a_backbone_is_saved_with_its_task_or_not_at_all(tmp_path):
    native = pt.load_backbone("test_vit", weights="random:3")
    tensors = released.vpt(native)
    file, task = save(tensors, tmp_path / "file.pth"), tmp_path / "task"
    own = tmp_path / "new" / "own.safetensors"

    def bring_own(target=own, output=task, **given):
        return pt.import_checkpoint("vpt", file, output, backbone="test_vit", save_backbone=target, **given)

    for inside in (task, task / "own.safetensors", task / "deep" / "own.safetensors"):
        with pytest.raises(UsageError, match=r"is inside the output .* which is replaced as a whole"):
            bring_own(inside)
    with pytest.raises(UsageError, match="--weights random another one: give one of the two"):
        bring_own(weights="random")
    for place, output in ((tmp_path, task), (own, own / "task")):
        with pytest.raises(UsageError, match=r"saved as .safetensors|cannot be saved over"):
            bring_own(place, output)
    with pytest.raises(UsageError, match="3 labels for 5 classes"):
        bring_own(labels=list("abc"))
    assert sorted(tmp_path.rglob("*")) == [file, own.parent]
    assert bring_own().model.backbone.weights == str(own)
    assert sorted(own.parent.iterdir()) == [own]
    assert pt.PromptModel.load(task).backbone.fingerprint == native.fingerprint
    before = own.read_bytes()
    tensors["enc.transformer.encoder.encoder_norm.bias"] += 1
    del tensors["head.last_layer.bias"]
    save(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing: head.last_layer.bias"):
        bring_own(overwrite=True)
    assert own.read_bytes() == before
    assert pt.PromptModel.load(task).labels == list("01234")


def test_an_output_does_not_take_the_files_it_is_made_of(vit, tmp_path):
    file, task = save(released.vpt(vit), tmp_path / "file.pth"), tmp_path / "task"
    pt.import_checkpoint("vpt", file, task, backbone=vit)
    inner = file.rename(task / "file.pth")
    with pytest.raises(UsageError, match=r"the checkpoint .* is inside the output"):
        pt.import_checkpoint("vpt", inner, task, backbone=vit, overwrite=True)
    weights = task / "weights.safetensors"
    weights.write_bytes(Path(vit.weights).read_bytes())
    with pytest.raises(UsageError, match=r"the weights .* is inside the output"):
        pt.import_checkpoint("vpt", file, task, backbone="test_vit", weights=weights, overwrite=True)


def test_what_cannot_be_represented_is_refused_by_name(vit, swin, workshop, tmp_path):
    def vpt_with(**extra):
        return save({**released.vpt(vit, moco=True), **extra}, tmp_path / "file.pth")

    one = torch.zeros(1)
    output = tmp_path / "x"
    refused("over a Swin", CheckpointError, "vpt", vpt_with(**{"enc.layers.0.x": one}), output, vit)
    refused("over MAE", CheckpointError, "vpt", vpt_with(**{"enc.fc_norm.weight": one}), output, vit)
    refused("several layers", CheckpointError, "vpt", vpt_with(**{"head.projection.0.weight": one}), output, vit)
    file = vpt_with()
    registers = drawn_backbone("test_vit2", workshop, SIZE)
    refused("reads the class token", CheckpointError, "vpt", file, output, registers)
    refused("not an SA²VP checkpoint", CheckpointError, "sa2vp", file, output, vit)
    deep = save(released.vpt(vit, deep=True, moco=True), tmp_path / "deep.pth")
    refused("import it as vpt", CheckpointError, "gapt", deep, output, vit, settings={"pool": "mean"})
    refused("does not say what its head reads", UsageError, "gapt", file, output, vit)
    sa2vp = released.save_sa2vp(released.sa2vp_swin(drawn_model(swin, pt.SA2VPConfig(rank=4))), tmp_path / "s.pth")
    refused("trained over a Swin", CheckpointError, "sa2vp", sa2vp, output, vit)


def test_a_file_that_needs_code_is_refused(vit, tmp_path, capsys):
    torch.save({"model": released.vpt(vit), "hook": Evil()}, tmp_path / "evil.pth")
    refused("could run code: it is refused", CheckpointError, "vpt", tmp_path / "evil.pth", tmp_path / "x", vit)
    torch.save({"shallow_prompt": np.array([Evil()], dtype=object)}, tmp_path / "array.pth")
    refused("could run code: it is refused", CheckpointError, "vpt", tmp_path / "array.pth", tmp_path / "x", vit)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Evil()}))
    refused("refused|cannot read", CheckpointError, "vpt", tmp_path / "plain.pth", tmp_path / "x", vit)
    assert "code ran" not in capsys.readouterr().out
    (tmp_path / "torn.pth").write_bytes((tmp_path / "evil.pth").read_bytes()[:1000])
    refused("cannot read|refused", CheckpointError, "vpt", tmp_path / "torn.pth", tmp_path / "x", vit)
    torch.save([1, 2], tmp_path / "list.pth")
    refused("holds no state dict but a list", CheckpointError, "vpt", tmp_path / "list.pth", tmp_path / "x", vit)
    torch.save({"model": {"epoch": 3}}, tmp_path / "none.pth")
    refused("holds no tensors", CheckpointError, "vpt", tmp_path / "none.pth", tmp_path / "x", vit)
    refused("no checkpoint file", CheckpointError, "vpt", tmp_path / "nowhere.pth", tmp_path / "x", vit)


def test_outputs_are_not_overwritten(vit, tmp_path):
    file = save(released.vpt(vit), tmp_path / "file.pth")
    pt.import_checkpoint("vpt", file, tmp_path / "task", backbone=vit)
    with pytest.raises(UsageError, match="not empty; give --overwrite"):
        pt.import_checkpoint("vpt", file, tmp_path / "task", backbone=vit)
    pt.import_checkpoint("vpt", file, tmp_path / "task", backbone=vit, overwrite=True, labels=list("abcde"))
    assert read_config(tmp_path / "task")["labels"] == list("abcde")
    with pytest.raises(UsageError, match="no checkpoint that could be overwritten"):
        pt.import_checkpoint("vpt", file, tmp_path, backbone=vit, overwrite=True)
    with pytest.raises(UsageError, match="did you mean vpt"):
        pt.import_checkpoint("vtp", file, tmp_path / "x", backbone=vit)
    with pytest.raises(UsageError, match="3 labels for 5 classes"):
        pt.import_checkpoint("vpt", file, tmp_path / "x", backbone=vit, labels=list("abc"))


def test_layouts_name_settings_that_exist():
    known = {name for config in METHODS.values() for name in config.__dataclass_fields__}
    for layout in LAYOUTS.values():
        assert set(layout.settings) <= known


# ----------------------------------------------------------------- the command, and what comes after it


def run(*arguments):
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def test_the_command(workshop, vit, tmp_path):
    file = save(released.vpt(vit, classes=10), tmp_path / "file.pth")
    (tmp_path / "names.txt").write_text("\n".join(["ant", *"bcdefghij"]) + "\n")
    common = ("import-checkpoint", "--from", "vpt", file, "--backbone", "test_vit", "--image-size", SIZE)
    common += ("--weights", vit.weights, "--output", tmp_path / "task")
    shown = run(*common, "--labels", tmp_path / "names.txt", "--normalisation", "backbone")
    assert shown.exit_code == 0, shown.output
    for text in ("vpt-shallow over test_vit at 64 pixels, 192 parameters", "num_prompts 3", "equal to test_vit",
                 "head: 10 classes", "mean (0.5, 0.5, 0.5)"):  # fmt: skip
        assert text in shown.stdout
    assert read_config(tmp_path / "task")["labels"][0] == "ant"
    again = run(*common)
    assert again.exit_code == 2
    assert again.stderr.strip().splitlines() == [
        f"Error: the output {tmp_path / 'task'} is not empty; give --overwrite, or another folder"
    ]
    made = run(*common, "--overwrite", "--json", "--crop-mode", "center", "--crop-pct", "0.875", "--dropout", "0.25")
    assert made.exit_code == 0, made.output
    document = json.loads(made.stdout)
    assert (document["method"], document["parameters"], document["settings"]["dropout"]) == ("vpt-shallow", 192, 0.25)
    assert document["preprocess"]["crop_pct"] == 0.875
    scored = run("evaluate", tmp_path / "task", "--data", "demo/digits", "--limit", "8", "--split", "all", "--json")
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["n"] == 16  # 8 of each split
    wrong = run(*common[:3], tmp_path / "nowhere.pth", *common[4:-1], tmp_path / "other")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)
    assert run("import-checkpoint", "--help").stdout.count("--save-backbone") >= 2


def test_more_labels_than_a_path_is_long(tmp_path, vit):
    labels = [f"class-{index}" for index in range(60)]
    file = save(released.vpt(vit, classes=60), tmp_path / "file.pth")
    made = run("import-checkpoint", "--from", "vpt", file, "--backbone", "test_vit", "--image-size", SIZE,
               "--weights", vit.weights, "--output", tmp_path / "task", "--labels", ",".join(labels))  # fmt: skip
    assert made.exit_code == 0, made.output
    assert read_config(tmp_path / "task")["labels"] == labels
    missing = run("import-checkpoint", "--from", "vpt", file, "--output", tmp_path / "x", "--labels", "absent.txt")
    assert (missing.exit_code, missing.output.count("\n")) == (2, 1)
    assert "cannot read the labels absent.txt" in missing.output


def test_a_file_of_labels_may_have_a_comma_and_a_byte_order_mark(tmp_path):
    named = tmp_path / "birds, 2026.txt"
    named.write_text("ant\n bee \n\n", encoding="utf-8-sig")
    assert _labels(str(named)) == ["ant", "bee"]
    named.write_text("ant", encoding="utf-16")
    with pytest.raises(DataError, match="is in UTF-16"):
        _labels(str(named))


def test_the_output_is_checked_again_under_its_lock(vit, tmp_path, monkeypatch):
    """Another process may have written while the file was read."""
    file, task = save(released.vpt(vit), tmp_path / "file.pth"), tmp_path / "task"
    read = LAYOUTS["vpt"].open

    def slow(path):
        pt.PromptModel(vit, "linear", 2).save(task)
        return read(path)

    monkeypatch.setattr(LAYOUTS["vpt"], "open", slow)
    with pytest.raises(UsageError, match="is not empty; give --overwrite"):
        pt.import_checkpoint("vpt", file, task, backbone=vit)
    assert read_config(task)["method"] == "linear"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sa2vp", "vpt", "gapt", "lora"])
def test_an_imported_task_mixes_with_a_trained_one(layout, vit, tmp_path):
    settings = {"pool": "backbone"} if layout == "gapt" else {}
    if layout == "lora":
        released.peft_folder(tmp_path / "file", vit)
    elif layout == "sa2vp":
        task = drawn_model(vit, pt.SA2VPConfig(rank=3))
        released.save_sa2vp(released.sa2vp_vit(task), tmp_path / "file")
    else:
        save(released.gapt(vit) if layout == "gapt" else released.vpt(vit, deep=True), tmp_path / "file")
    _, imported = bring(layout, tmp_path / "file", tmp_path / "imported", vit, settings=settings)
    own = drawn_model(vit, imported.config, 3, seed=7)
    own.save(tmp_path / "own")
    pt.export_engine([tmp_path / "own", tmp_path / "imported"], tmp_path / "engine", batch_sizes=(1, 3))
    batch = noise(4)
    mixed = pt.Engine(tmp_path / "engine").logits(batch, ["own", "imported", "imported", "own"])
    for row, model in enumerate([own, imported, imported, own]):
        with torch.no_grad():
            wanted = model(torch.from_numpy(batch[row : row + 1])).logits.numpy()[0]
        assert np.abs(mixed[row, : len(wanted)] - wanted).max() <= 1e-4


def test_a_missing_backbone_is_asked_for():
    with pytest.raises(PrompttuneError, match="takes vit_base_patch16_224"):
        pt.import_checkpoint("vpt", "file.pth", "nowhere-at-all")
