"""From any name of a backbone to timm's name of its model, with the model's arguments and its weights.

A name is timm's (also after ``timm/`` or ``hf-hub:``), a repository of the Hugging Face hub, or a folder (also after
``local-dir:``) that holds a configuration and weights as timm, transformers (https://github.com/huggingface/transformers)
or open_clip (https://github.com/mlfoundations/open_clip) save them. Arguments of the timm model follow it,
``NAME?init_values=1e-5&reg_tokens=8``, so that a checkpoint or an engine names the same model.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download, try_to_load_from_cache

from prompttune.errors import BackboneError, UsageError, describe_failure, first_line
from prompttune.hub import hub_answers

INDEX = ".index.json"
"""End of the name of a file that says which tensors are in which file."""
WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    f"model.safetensors{INDEX}",
    f"pytorch_model.bin{INDEX}",
)
"""Names of weights files in a folder or repository, the preferred ones first."""
_CONFIGS = ("config.json", "open_clip_config.json", "preprocessor_config.json")
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"}
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers of resizing filters."""
Three = tuple[float, float, float]


@dataclass
class Model:
    """A timm model as a name or a configuration describes it."""

    name: str
    """timm's name."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``timm.create_model``, and ``norm_eps``, the epsilon of the norms."""
    image_size: int | None = None
    mean: Three | None = None
    std: Three | None = None
    interpolation: str | None = None
    weights: Path | None = None
    """Its weights file; None for timm's own weights, or none at all."""
    described: bool = False
    """Whether a configuration describes the model, and not timm's name alone."""
    repository: str = ""


# fmt: off
_VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "patch_size": 16,
        "hidden_act": "gelu", "layer_norm_eps": 1e-6, "mlp_ratio": 4}
_BIASED = _VIT | {"qkv_bias": True}
_STAGES = {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768], "hidden_act": "gelu", "layer_norm_eps": 1e-12}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_base_patch16_224", _BIASED | {"layer_norm_eps": 1e-12}),
    # timm's distilled models have two heads; transformers reads the first token, and the second is a register
    "deit": ("vit_base_patch16_224", _BIASED | {"layer_norm_eps": 1e-12, "num_register_tokens": 1}),
    "dinov2": ("vit_base_patch14_dinov2", _BIASED | {"patch_size": 14}),
    "dinov2_with_registers": ("vit_base_patch14_reg4_dinov2", _BIASED | {"num_register_tokens": 4}),
    "dinov3_vit": ("vit_small_patch16_dinov3_qkvb", _VIT | {
        "hidden_size": 384, "num_attention_heads": 6, "layer_norm_eps": 1e-5, "num_register_tokens": 0,
        "rope_theta": 100.0}),
    "clip_vision_model": ("vit_base_patch32_clip_224", _VIT | {
        "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}),
    "siglip_vision_model": ("vit_base_patch16_siglip_224", _VIT | {"hidden_act": "gelu_pytorch_tanh"}),
    "swin": ("swin_tiny_patch4_window7_224", {
        "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7, "patch_size": 4,
        "mlp_ratio": 4.0, "qkv_bias": True, "image_size": 224, "layer_norm_eps": 1e-5}),
    "resnet": ("resnet50", {"depths": [3, 4, 6, 3]}),
    "convnext": ("convnext_tiny", _STAGES),
    "convnextv2": ("convnextv2_tiny", _STAGES),
    "dinov3_convnext": ("convnext_tiny", _STAGES | {"layer_norm_eps": 1e-6}),
}
"""Model types of transformers: a timm model, and the values of the keys that a configuration may leave out."""
_ARGUMENTS = {
    "hidden_size": "embed_dim", "num_hidden_layers": "depth", "num_attention_heads": "num_heads",
    "image_size": "img_size", "hidden_act": "act_layer", "layer_norm_eps": "norm_eps", "hidden_sizes": "dims",
    "num_register_tokens": "reg_tokens", "rope_theta": "rope_temperature"}
"""Keys of transformers: timm's arguments, where the names differ."""
_UNKNOWN = ("downsample_in_bottleneck", "downsample_in_first_stage", "use_absolute_embeddings")
# fmt: on


def split_args(name: str) -> tuple[str, dict[str, Any]]:
    """``NAME?key=value&key=value`` as the name and the arguments.

    Raises:
        UsageError: an argument has no value.
    """
    bare, _, query = name.partition("?")
    args = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"backbone argument {pair!r}: give NAME=VALUE, such as init_values=1e-5")
        try:
            args[key] = json.loads(value)
        except ValueError:
            args[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return bare, args


def join_args(name: str, args: Mapping[str, Any] | Iterable[str]) -> str:
    """A name with arguments, or with texts ``key=value``, as :func:`split_args` reads it."""
    if isinstance(args, Mapping):
        args = [
            f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
            for key, value in args.items()
        ]
    pairs = "&".join(args)
    return f"{name}{'&' if '?' in name else '?'}{pairs}" if pairs else name


def resolve(name: str) -> Model | None:
    """The model that a name without arguments stands for; None for one that neither timm, a folder nor the hub has.

    Raises:
        BackboneError: the folder or repository cannot be read, or holds no model that timm has.
    """
    short = re.sub(r"^(?:hf[-_]hub:|timm/)+", "", name)
    if timm.is_model(short.split(".")[0]):
        return Model(short)
    folder = Path(short.removeprefix("local-dir:")).expanduser()
    if short.startswith("local-dir:") or folder.is_dir():
        if not folder.is_dir():
            raise BackboneError(f"no folder at {folder}")
        return _in_folder(folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?", short):
        repository, _, revision = short.partition("@")
        found = _described(short, lambda file: _of_hub(repository, revision or None, file))
        found.repository = short
        return found
    return None


def beside(path: Path) -> Model | None:
    """The model that the configuration in the folder of a weights file describes; None without a known one."""
    try:
        return _in_folder(path if path.is_dir() else path.parent)
    except BackboneError:
        return None


def _in_folder(folder: Path) -> Model:
    return _described(str(folder), lambda file: found if (found := folder / file).is_file() else None)


def _of_hub(repository: str, revision: str | None, file: str) -> Path | None:
    """A file of a repository, from the cache or the hub; None if the repository does not have it."""
    cached = try_to_load_from_cache(repository, file, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    if not hub_answers():
        return None
    try:
        return Path(hf_hub_download(repository, file, revision=revision))
    except Exception as problem:  # the client's errors differ between versions
        if type(problem).__name__ == "EntryNotFoundError" or "404" in str(problem):
            return None
        raise BackboneError(f"{repository} cannot be read from the Hugging Face hub: {first_line(problem)}") from None


def _json(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise BackboneError(f"cannot read {path}: {first_line(problem)}") from None
    return content if isinstance(content, dict) else {}


def _described(where: str, file: Callable[[str], Path | None]) -> Model:
    """The model in a folder or repository, whose files ``file`` finds."""
    config, clip, images = (_json(file(one)) for one in _CONFIGS)
    if not {"architecture", "model_type"} & config.keys() and "model_cfg" not in clip:
        raise BackboneError(
            f"{where} holds no configuration of a model ({', '.join(_CONFIGS[:2])}), or the hub is out of reach and "
            "its cache has none: give timm's name, or a folder with the configuration"
        )
    try:
        if "architecture" in config:
            found = _of_timm(config)
        else:
            found = _of_transformers(config, where) if "model_type" in config else _of_open_clip(clip)
        if "image_mean" in images and found.mean is None:
            found.mean, found.std = _three(images["image_mean"]), _three(images["image_std"])
            found.interpolation = _FILTERS.get(images.get("resample", 3), "bicubic")
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as problem:
        raise BackboneError(f"the configuration in {where} is damaged: {describe_failure(problem)}") from None
    if not timm.is_model(found.name.split(".")[0]):
        raise BackboneError(f"{where} is a model {found.name!r}, which timm does not have")
    found.described = True
    found.weights = next((path for one in WEIGHTS if (path := file(one)) is not None), None)
    for part in parts_of(found.weights):
        file(part.name)  # into the cache, beside the index
    return found


def parts_of(path: Path | None) -> list[Path]:
    """The files that an index of tensors names, beside it; none for any other file.

    Raises:
        BackboneError: the index is damaged, or names a file elsewhere.
    """
    if path is None or not path.name.endswith(INDEX):
        return []
    listed = _json(path).get("weight_map")
    names = set(listed.values()) if isinstance(listed, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise BackboneError(f"{path} is not an index of tensors: its weight_map names no files beside it")
    return [path.with_name(name) for name in sorted(names)]


def _three(values: Any) -> Three | None:
    if not values:
        return None
    red, green, blue = values
    return float(red), float(green), float(blue)


def _of_timm(config: Mapping[str, Any]) -> Model:
    given = config.get("pretrained_cfg") or config
    given_args = {"global_pool": config.get("global_pool"), **(config.get("model_args") or {})}
    unused = ("num_classes", "in_chans", "dynamic_img_size")
    # an empty pooling leaves it to the caller's code: the name's own holds
    args = {key: value for key, value in given_args.items() if key not in unused and value != "" and value is not None}
    size = given.get("input_size")
    mean, std = (_three(given.get(key)) for key in ("mean", "std"))
    return Model(config["architecture"], args, size and int(size[-1]), mean, std, given.get("interpolation"))


def _of_transformers(config: Mapping[str, Any], where: str) -> Model:
    kind = str(config["model_type"])
    if isinstance(config.get("vision_config"), dict):  # a model of pictures and texts
        kind, config = f"{kind.removesuffix('_model')}_vision_model", config["vision_config"]
    if kind not in FAMILIES:
        raise BackboneError(f"{where} is a {kind} of transformers; known: {', '.join(FAMILIES)}, and models of timm")
    name, defaults = FAMILIES[kind]
    values = {**defaults, **config}
    if unknown := [key for key in _UNKNOWN if values.get(key)]:
        raise BackboneError(f"{where} is a {kind} with {unknown[0]}, which timm's {name} does not have")
    args = {_ARGUMENTS.get(key, key): values[key] for key in defaults}
    if "act_layer" in args:
        args["act_layer"] = _ACTIVATIONS.get(args["act_layer"], args["act_layer"])
    if "intermediate_size" in values:
        args["mlp_ratio"] = _ratio(values["intermediate_size"], args["embed_dim"])
    if values.get("use_swiglu_ffn"):
        hidden = (int(args["embed_dim"] * args["mlp_ratio"] * 2 / 3) + 7) // 8 * 8
        args |= {"mlp_layer": "SwiGLUPacked", "act_layer": "silu", "mlp_ratio": _ratio(2 * hidden, args["embed_dim"])}
    if values.get("vision_use_head") is False:
        args |= {"global_pool": "avg", "fc_norm": False}
    if kind == "dinov3_vit":  # timm's Eva has no choice of activation
        del args["act_layer"]
        args |= {"num_reg_tokens": args.pop("reg_tokens"), "global_pool": "token"}
        args |= {"swiglu_mlp": True, "swiglu_align_to": 1} if values.get("use_gated_mlp") else {}
    if kind == "resnet":
        name = "resnet18" if values.get("layer_type") == "basic" else name
        args = {"layers": args["depths"]}
    return Model(name, args, values.get("image_size"))


def _ratio(hidden: int, width: int) -> float:
    """The ratio from which timm computes ``int(width * ratio) == hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _of_open_clip(config: Mapping[str, Any]) -> Model:
    model, images = config["model_cfg"], config.get("preprocess_cfg") or {}
    tower = model.get("vision_cfg") or {}
    size = tower.get("image_size", 224)
    mean, std = (_three(images.get(key)) for key in ("mean", "std"))
    found = Model(str(tower.get("timm_model_name") or "vit_base_patch32_clip_224"), {}, size, mean, std)
    if "timm_model_name" not in tower:
        width = tower["width"]
        found.args = {
            "embed_dim": width,
            "depth": tower["layers"],
            "num_heads": width // tower.get("head_width", 64),
            "mlp_ratio": tower.get("mlp_ratio", 4.0),
            "patch_size": tower["patch_size"],
            "img_size": size,
            "act_layer": "quick_gelu" if model.get("quick_gelu") else "gelu",
        }
    elif tower.get("timm_pool"):
        found.args = {"global_pool": tower["timm_pool"]} if tower["timm_pool"] in ("avg", "token", "map") else {}
    return dataclasses.replace(found, interpolation=images.get("interpolation"))
