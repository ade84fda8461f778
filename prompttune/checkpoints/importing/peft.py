"""LoRA folders of Hugging Face PEFT over a timm ViT: https://github.com/huggingface/peft, ``tuners/lora/``.

``adapter_config.json`` beside ``adapter_model.safetensors`` with ``base_model.model.blocks.{i}.attn.qkv.lora_A.weight``
[r, D] and ``.lora_B.weight`` [3 H d, r]. timm keeps q, k and v in one matrix, so one A serves all three: it becomes the
``down`` of each target, and B's rows the ``up`` of each. Where no block changes its keys the task has ``targets qv``,
else ``qkv``; both exact.

The weight is α / r, or α / sqrt(r) with ``use_rslora``. Blocks of their own rank (``rank_pattern``) are padded with
zeros to the largest, their own α (``alpha_pattern``) goes into ``up``, blocks without an adapter get zeros.
``modules_to_save`` may hold the head. Whatever changes the arithmetic otherwise (DoRA, biases, other modules, initial
weights that change the base model) is refused by name, and so is a rank in the config that the tensors do not have.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from prompttune.backbones import Backbone
from prompttune.backbones.vit import VitBackbone
from prompttune.checkpoints.importing.layout import Foreign, Layout, Names
from prompttune.checkpoints.importing.source import FileTensors, read_file
from prompttune.errors import CheckpointError, UsageError, shortened
from prompttune.files import read_json
from prompttune.methods.lora import TARGETS

CONFIG, MODELS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
PLAIN = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "layer_replication": (),
    "target_parameters": (),
    "trainable_token_indices": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "velora_config": (),
    "init_lora_weights": (True, False, "gaussian", "eva"),
}
"""Values of PEFT's config that do not change the arithmetic or the base model; a missing value does not either."""
VARIANT = "use_"
"""Switches of PEFT's variants of LoRA."""
RSLORA = "use_rslora"
RANKS, ALPHAS = "rank_pattern", "alpha_pattern"
"""Tables of separate values for some blocks, by regular expressions."""
FLOAT32 = torch.finfo(torch.float32)


class PeftLayout(Layout):
    """LoRA on timm's fused ``qkv``."""

    name = "lora"
    code = "https://github.com/huggingface/peft"
    normalisation = "backbone"
    interpolation = None
    usual_backbone = "vit_base_patch16_224"
    settings = ("targets", "dropout")
    head = "head"

    def open(self, path: Path) -> FileTensors:
        """See :meth:`Layout.open`; ``path`` is the adapter's folder."""
        if not path.is_dir():
            raise CheckpointError(f"no PEFT folder at {path}: give the folder that holds {CONFIG}")
        config = read_json(path / CONFIG, CheckpointError, "adapter config")
        _check_config(config, path)
        file = next((path / name for name in MODELS if (path / name).is_file()), None)
        if file is None:
            raise CheckpointError(f"no {' or '.join(MODELS)} in {path}")
        tensors = {_plain_name(name): value for name, value in read_file(file).items()}
        return FileTensors(tensors, str(path), config)

    def backbone_names(self, source: FileTensors) -> Names | None:  # noqa: ARG002
        """See :meth:`Layout.backbone_names`; an adapter does not hold any."""
        return None

    def take_task(self, source: FileTensors, backbone: Backbone, given: Mapping[str, Any]) -> Foreign:
        """See :meth:`Layout.take_task`."""
        if not isinstance(backbone, VitBackbone):
            raise CheckpointError(f"LoRA needs a ViT; {backbone.name} is not a ViT")
        out = backbone.num_heads * backbone.head_dim
        adapted = [index for index in range(backbone.depth) if f"{_stem(index)}.lora_A.weight" in source]
        ranks = {index: _rank(source, index) for index in adapted}
        if not adapted:
            other = shortened(source.names()) or "nothing"
            raise CheckpointError(f"{source.where} does not adapt {backbone.name}'s attn.qkv; it holds {other}")
        pairs = {
            index: (
                source.take(f"{_stem(index)}.lora_A.weight", (own, backbone.width)),
                source.take(f"{_stem(index)}.lora_B.weight", (3 * out, own)),
            )
            for index, own in ranks.items()
        }
        source.check(f"lora over {backbone.name}", all_taken=False)
        rank = max(ranks.values())
        config = source.config
        alpha = float(config["lora_alpha"]) * (
            rank**0.5 if config.get(RSLORA) else 1
        )  # α / rank weighs the largest rank
        down = torch.zeros(backbone.depth, rank, backbone.width)
        up = torch.zeros(3, backbone.depth, out, rank)
        for index, (single, joint) in pairs.items():
            own = ranks[index]
            down[index, :own] = single
            weight = _weight(config, float(_of_block(config, ALPHAS, index, config["lora_alpha"])), own)
            factor = weight / (alpha / rank)
            up[:, index, :, :own] = (joint if factor == 1 else joint * factor).unflatten(0, (3, out))
        if not (up * (alpha / rank)).isfinite().all():
            raise CheckpointError(f"{source.where}: its α over its rank is too large for float32")
        targets = _targets(up[1], given, source.where)
        parts = {"query": up[0], "key": up[1], "value": up[2]}
        tensors = {}
        for name in TARGETS[targets]:
            tensors[f"{name}.down"], tensors[f"{name}.up"] = down.clone(), parts[name].clone()
        dropout = given.get("dropout", float(config.get("lora_dropout") or 0))
        settings = {"rank": rank, "alpha": alpha, "targets": targets, "dropout": dropout}
        return Foreign("lora", settings, tensors=tensors)


def _targets(keys: Tensor, given: Mapping[str, Any], where: str) -> str:
    """The user's targets, or those that the file needs; ``keys`` [L, H d, r] is the update of the keys."""
    needed = "qkv" if keys.abs().max() > 0 else "qv"
    if needed == "qkv" and given.get("targets") == "qv":
        raise UsageError(f"{where} changes keys too: it needs targets qkv")
    return str(given.get("targets", needed))


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path} is a PEFT adapter of type {reprlib.repr(config.get('peft_type'))}, not LORA")
    wrong = [
        f"{name} {reprlib.repr(value)}"
        for name, value in config.items()
        if value and ((name in PLAIN and value not in PLAIN[name]) or (name.startswith(VARIANT) and name != RSLORA))
    ]
    if wrong:
        raise CheckpointError(f"{path} is not plain LoRA: {', '.join(wrong)}")
    _check_numbers(config, path / CONFIG)


def _check_numbers(config: Mapping[str, Any], path: Path) -> None:
    def need(name: str, value: object, fits: bool, wanted: str) -> None:
        if not fits:
            raise CheckpointError(f"{path}: {name} must be {wanted}, not {reprlib.repr(value)}")

    for name in (RANKS, ALPHAS):
        need(name, config.get(name), isinstance(config.get(name) or {}, Mapping), "a table")
    for name, value in [("r", config.get("r")), *_entries(config, RANKS)]:
        need(name, value, type(value) is int and value > 0, "a whole number above 0")
    for name, value in [("lora_alpha", config.get("lora_alpha")), *_entries(config, ALPHAS)]:
        need(name, value, _is_number(value), "a number that float32 holds")
    alpha = config["lora_alpha"]
    need("lora_alpha", alpha, alpha >= FLOAT32.tiny, "a number above 0 that float32 holds")
    dropout = config.get("lora_dropout") or 0.0
    need("lora_dropout", dropout, _is_number(dropout) and 0 <= dropout < 1, "a number from 0 to below 1")


def _entries(config: Mapping[str, Any], table: str) -> list[tuple[str, Any]]:
    """The values of a table, by their names in messages."""
    return [(f"{table} {reprlib.repr(pattern)}", value) for pattern, value in (config.get(table) or {}).items()]


def _is_number(value: object) -> TypeGuard[float]:
    """Whether float32 can hold ``value``; JSON has NaN, infinity and integers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32.max


def _plain_name(name: str) -> str:
    """PEFT's name without its prefix and the adapter's, which older versions keep."""
    return name.removeprefix(PREFIX).replace("modules_to_save.", "").replace(".default.", ".")


def _stem(index: int) -> str:
    return f"blocks.{index}.attn.qkv"


def _weight(config: Mapping[str, Any], alpha: float, rank: int) -> float:
    return alpha / (rank**0.5 if config.get(RSLORA) else rank)


def _rank(source: FileTensors, index: int) -> int:
    """The rank of one block's product, on which its tensors and the config must agree."""
    name = f"{_stem(index)}.lora_A.weight"
    own, wanted = source.size(name, 0, 2), _of_block(source.config, RANKS, index, source.config["r"])
    if own != wanted:
        raise CheckpointError(
            f"{source.where}: {name} has rank {own}, {CONFIG} says {reprlib.repr(wanted)} by r and rank_pattern; give "
            "the two files of one training"
        )
    return own


def _of_block(config: Mapping[str, Any], table: str, index: int, usual: Any) -> Any:
    """The value of the first pattern that names a block, matched as PEFT does, else the usual one."""
    for pattern, value in (config.get(table) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", _stem(index)):
                return value
        except (re.error, OverflowError, RecursionError):
            raise CheckpointError(f"{CONFIG}: {table} {reprlib.repr(pattern)} is not a regular expression") from None
    return usual
