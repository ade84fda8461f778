"""Files as other people's code writes them, and what that code computes, in its own names.

Written from the released code's mathematics and names (links in ``prompttune/checkpoints/importing/``), on purpose
without anything of that package.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import prompttune as pt
from tests.reference.draw import draw

Tensors = dict[str, Tensor]


def drawn(name: str, *shape: int, seed: int = 3) -> Tensor:
    """A tensor of its name, of a size that matters."""
    return torch.from_numpy(draw(name, shape, seed)) * 5


def jax_vit(backbone: pt.Backbone) -> Tensors:
    """timm's weights under the names of ViT-pytorch, less the ``transformer.`` in front."""
    own = backbone.model.state_dict()
    made = {
        "embeddings.cls_token": own["cls_token"],
        "embeddings.position_embeddings": own["pos_embed"],
        "embeddings.patch_embeddings.weight": own["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.bias": own["patch_embed.proj.bias"],
        "encoder.encoder_norm.weight": own["norm.weight"],
        "encoder.encoder_norm.bias": own["norm.bias"],
    }
    for index in range(len(backbone.model.blocks)):
        here, there = f"blocks.{index}", f"encoder.layer.{index}"
        for leaf in ("weight", "bias"):
            query, key, value = own[f"{here}.attn.qkv.{leaf}"].chunk(3)
            made[f"{there}.attn.query.{leaf}"] = query
            made[f"{there}.attn.key.{leaf}"] = key
            made[f"{there}.attn.value.{leaf}"] = value
            made[f"{there}.attn.out.{leaf}"] = own[f"{here}.attn.proj.{leaf}"]
            made[f"{there}.attention_norm.{leaf}"] = own[f"{here}.norm1.{leaf}"]
            made[f"{there}.ffn_norm.{leaf}"] = own[f"{here}.norm2.{leaf}"]
            made[f"{there}.ffn.fc1.{leaf}"] = own[f"{here}.mlp.fc1.{leaf}"]
            made[f"{there}.ffn.fc2.{leaf}"] = own[f"{here}.mlp.fc2.{leaf}"]
    return {name: value.clone() for name, value in made.items()}


def _linear(made: Tensors, there: str, task: Tensors, here: str) -> None:
    for leaf in ("weight", "bias"):
        made[f"{there}.{leaf}"] = task[f"{here}.{leaf}"].clone()


def sa2vp_vit(model: pt.PromptModel) -> Tensors:
    """What ``Dual_model`` of ``vit_train_sa2vp.py`` holds."""
    task, vit = model.method.state_dict(), jax_vit(model.backbone)
    later = [index for index in model.config.prompt_layers if index > 0]
    made = dict(vit)
    made["embeddings.ppt"] = task["prompts.0.tokens"].clone()
    _linear(made, "embeddings.ppt_proj", task, "prompts.0.proj")
    made["encoder.deep_ppt"] = torch.stack([task[f"prompts.{index}.tokens"] for index in later])
    made["encoder.cross_conv"] = torch.stack([task[f"prompts.{index}.scale"] for index in later])
    for place, index in enumerate(later):
        _linear(made, f"encoder.deep_proj.{place}", task, f"prompts.{index}.proj")
    for index in range(len(model.backbone.model.blocks)):
        stem, own = f"encoder.cross_attn.{index}", f"encoder.layer.{index}"
        _linear(made, f"{stem}.ffn_norm", task, f"adapters.{index}.norm")
        _linear(made, f"{stem}.ffn.fc1", task, f"adapters.{index}.down")
        _linear(made, f"{stem}.ffn.fc2", task, f"adapters.{index}.up")
        _linear(made, f"{stem}.attention_norm", vit, f"{own}.attention_norm")
        for there, here in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out", "out")):
            _linear(made, f"{stem}.attn.{there}", vit, f"{own}.attn.{here}")
    made = {f"vit_base.transformer.{name}": value for name, value in made.items()}
    _linear(made, "class_head", model.head.state_dict(prefix="head."), "head")
    return made


def sa2vp_swin(model: pt.PromptModel) -> Tensors:
    """What ``Dual_model`` of ``vit_train_swin.py`` holds, the windows' constants included."""
    task, own = model.method.state_dict(), model.backbone.model.state_dict()
    made = {}
    for name, value in own.items():
        if ".downsample." in name:  # there it belongs to the end of a stage
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.", 1)
        made[name] = value.clone()
    made["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 4, 4)
    made["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    made["patch_embed.deep_ppt"] = task["prompts.0.tokens"].clone()
    _linear(made, "patch_embed.proj_ppt", task, "prompts.0.proj")
    for index in range(len(model.backbone.model.layers[2].blocks)):
        stem, block = f"layers.2.cross_attn.{index}", f"layers.2.blocks.{index}"
        _linear(made, f"{stem}.ffn_norm", task, f"adapters.{index}.norm")
        _linear(made, f"{stem}.ffn.fc1", task, f"adapters.{index}.down")
        _linear(made, f"{stem}.ffn.fc2", task, f"adapters.{index}.up")
        _linear(made, f"{stem}.attention_norm", own, f"{block}.norm1")
        _linear(made, f"{stem}.attn.qkv", own, f"{block}.attn.qkv")
        _linear(made, f"{stem}.attn.to_out", own, f"{block}.attn.proj")
    made = {f"vit_base.{name}": value for name, value in made.items()}
    _linear(made, "class_head", model.head.state_dict(prefix="head."), "head")
    return made


def save_sa2vp(tensors: Tensors, path: Path) -> Path:
    """As ``utils.save_model`` does, arguments and optimiser beside the model."""
    arguments = argparse.Namespace(lr=5e-4, output_dir="out", nb_classes=5, dist_eval=False)
    torch.save({"model": tensors, "optimizer": {"state": {}}, "epoch": 9, "scaler": {}, "args": arguments}, path)
    return path


def _vpt_task(width: int, depth: int, prompts: int, deep: bool, project: int, classes: int) -> tuple[Tensors, Tensors]:
    narrow = project or width
    task = {"prompt_embeddings": drawn("prompt_embeddings", 1, prompts, narrow)}
    if deep:
        task["deep_prompt_embeddings"] = drawn("deep_prompt_embeddings", depth - 1, prompts, narrow)
    if project:
        task["prompt_proj.weight"] = drawn("prompt_proj.weight", width, project)
        task["prompt_proj.bias"] = drawn("prompt_proj.bias", width)
    head = {"head.last_layer.weight": drawn("w", classes, width), "head.last_layer.bias": drawn("b", classes)}
    return task, head


def vpt(
    backbone: pt.Backbone,
    *,
    prompts: int = 3,
    deep: bool = False,
    project: int = 0,
    moco: bool = False,
    classes: int = 5,
) -> Tensors:
    """What VPT's ``ViT`` (JAX names) or ``SSLViT`` (``moco``, timm's) holds."""
    task, head = _vpt_task(backbone.width, backbone.depth, prompts, deep, project, classes)
    if moco:
        whole = {**backbone.model.state_dict(), **task}
        return {f"enc.{name}": value.clone() for name, value in whole.items()} | head
    return {f"enc.transformer.{name}": value for name, value in {**jax_vit(backbone), **task}.items()} | head


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, temperature: float | Tensor = 1.0) -> Tensor:
    """softmax(q k^T / (t sqrt(d))) v, [B, N, D] each."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) / temperature
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def _norm(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)


def _dense(x: Tensor, tensors: Tensors, name: str) -> Tensor:
    return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def vpt_logits(tensors: Tensors, images: Tensor, heads: int) -> Tensor:
    """``PromptedTransformer`` and the head over its class token, from the file's own tensors."""
    t = {name.removeprefix("enc.transformer."): value for name, value in tensors.items()}

    def project(prompts: Tensor) -> Tensor:
        return _dense(prompts, t, "prompt_proj") if "prompt_proj.weight" in t else prompts

    weight = t["embeddings.patch_embeddings.weight"]
    x = F.conv2d(images, weight, t["embeddings.patch_embeddings.bias"], stride=weight.shape[-1])
    x = torch.cat((t["embeddings.cls_token"].expand(len(images), -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
    x = x + t["embeddings.position_embeddings"]
    shallow = t["prompt_embeddings"]
    count = shallow.shape[1]
    x = torch.cat((x[:, :1], project(shallow).expand(len(images), -1, -1), x[:, 1:]), dim=1)
    depth = len({name.split(".")[2] for name in t if name.startswith("encoder.layer.")})
    for index in range(depth):
        if index > 0 and "deep_prompt_embeddings" in t:
            fresh = project(t["deep_prompt_embeddings"][index - 1]).expand(len(images), -1, -1)
            x = torch.cat((x[:, :1], fresh, x[:, 1 + count :]), dim=1)
        stem = f"encoder.layer.{index}"
        normed = _norm(x, t, f"{stem}.attention_norm")
        q, k, v = (_dense(normed, t, f"{stem}.attn.{part}") for part in ("query", "key", "value"))
        x = x + _dense(_attend(q, k, v, heads), t, f"{stem}.attn.out")
        hidden = F.gelu(_dense(_norm(x, t, f"{stem}.ffn_norm"), t, f"{stem}.ffn.fc1"))
        x = x + _dense(hidden, t, f"{stem}.ffn.fc2")
    return _dense(_norm(x, t, "encoder.encoder_norm")[:, 0], tensors, "head.last_layer")


def gapt(backbone: pt.Backbone, *, prompts: int = 3, gates: int | None = None, classes: int = 5) -> Tensors:
    """What GaPT's ``SSLViT`` holds; ``gates`` of them, by default all but the last block's."""
    depth, width = backbone.depth, backbone.width
    count = depth - 1 if gates is None else gates
    own = {
        **backbone.model.state_dict(),
        "prompt_embeddings": drawn("prompt_embeddings", 1, prompts, width),
        "gate_logit": drawn("gate_logit", count) * 5,
        "temp": 1 + drawn("temp", depth) / 2,
    }
    own["temp"][1] = 60.0  # the released forward holds it within 0.01 and 10
    head = {"head.last_layer.weight": drawn("w", classes, width), "head.last_layer.bias": drawn("b", classes)}
    return {f"enc.{name}": value.clone() for name, value in own.items()} | head


def timm_logits(tensors: Tensors, images: Tensor, heads: int, pool: str) -> Tensor:
    """``PromptedVisionTransformer(MoCo)`` of GaPT and of VPT, which is GaPT's without gates and temperatures."""
    t = {name.removeprefix("enc."): value for name, value in tensors.items()}
    weight = t["patch_embed.proj.weight"]
    x = F.conv2d(images, weight, t["patch_embed.proj.bias"], stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    x = torch.cat((t["cls_token"].expand(len(images), -1, -1), x), dim=1) + t["pos_embed"]
    prompts = t["prompt_embeddings"].expand(len(images), -1, -1)
    count = prompts.shape[1]
    x = torch.cat((x[:, :1], prompts, x[:, 1:]), dim=1)
    depth = len({name.split(".")[1] for name in t if name.startswith("blocks.")})
    gates = t.get("gate_logit", torch.zeros(0))
    temperatures = t.get("temp", torch.ones(depth)).clamp(min=0.01, max=10.0)
    for index in range(depth):
        if index > 0 and "deep_prompt_embeddings" in t:
            fresh = t["deep_prompt_embeddings"][index - 1].expand(len(images), -1, -1)
            x = torch.cat((x[:, :1], fresh, x[:, 1 + count :]), dim=1)
        entering = x[:, 1 : 1 + count]
        stem = f"blocks.{index}"
        q, k, v = _dense(_norm(x, t, f"{stem}.norm1"), t, f"{stem}.attn.qkv").chunk(3, dim=-1)
        x = x + _dense(_attend(q, k, v, heads, temperatures[index]), t, f"{stem}.attn.proj")
        hidden = F.gelu(_dense(_norm(x, t, f"{stem}.norm2"), t, f"{stem}.mlp.fc1"))
        x = x + _dense(hidden, t, f"{stem}.mlp.fc2")
        if index < len(gates):
            gate = gates[index].sigmoid()
            mixed = gate * x[:, 1 : 1 + count] + (1 - gate) * entering
            x = torch.cat((x[:, :1], mixed, x[:, 1 + count :]), dim=1)
    features = _norm(x[:, 1:].mean(dim=1), t, "norm") if pool == "mean" else _norm(x, t, "norm")[:, 0]
    return _dense(features, tensors, "head.last_layer")


def peft_folder(
    folder: Path,
    backbone: pt.Backbone,
    *,
    rank: int = 4,
    alpha: float = 8,
    keys: bool = True,
    classes: int = 5,
    **config: object,
) -> Tensors:
    """What PEFT 0.21 writes for ``LoraConfig(target_modules=["qkv"], modules_to_save=["head"])`` over a timm ViT."""
    ranks = config.get("rank_pattern", {})
    out = backbone.num_heads * backbone.head_dim
    tensors = {}
    for index in range(backbone.depth):
        stem = f"base_model.model.blocks.{index}.attn.qkv"
        own = ranks.get(f"blocks.{index}.attn.qkv", rank)
        tensors[f"{stem}.lora_A.weight"] = drawn(f"{index}.A", own, backbone.width)
        joint = drawn(f"{index}.B", 3 * out, own)
        if not keys:
            joint[out : 2 * out] = 0
        tensors[f"{stem}.lora_B.weight"] = joint
    tensors["base_model.model.head.weight"] = drawn("w", classes, backbone.width)
    tensors["base_model.model.head.bias"] = drawn("b", classes)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    whole = {
        "alpha_pattern": {}, "auto_mapping": {"base_model_class": "VisionTransformer"}, "base_model_name_or_path": None,
        "bias": "none", "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layer_replication": None, "loftq_config": {}, "lora_alpha": alpha,
        "lora_bias": False, "lora_dropout": 0.0, "megatron_core": "megatron.core", "modules_to_save": ["head"],
        "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": rank, "rank_pattern": {},
        "target_modules": ["qkv"], "task_type": None, "use_dora": False, "use_qalora": False, "use_rslora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(whole | config))
    return tensors


def merged_logits(backbone: pt.Backbone, tensors: Tensors, scales: list[float], images: Tensor) -> Tensor:
    """timm's own forward with W + s B A merged into each block's joint projection, and the saved head."""
    timm = copy.deepcopy(backbone.model)
    for index, scale in enumerate(scales):
        stem = f"base_model.model.blocks.{index}.attn.qkv"
        added = scale * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
        timm.blocks[index].attn.qkv.weight.data += added
    features = timm.forward_head(timm.forward_features(images), pre_logits=True)
    return _dense(features, tensors, "base_model.model.head")
