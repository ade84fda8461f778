"""prompttune: train visual prompts over one frozen backbone, export it once, swap tasks as inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompttune.lazy import lazy_names

__version__ = "0.1.0"

_LAZY = {
    "load_backbone": "prompttune.backbones",
    "Backbone": "prompttune.backbones",
    "PromptModel": "prompttune.model",
    "Output": "prompttune.model",
    "Preprocess": "prompttune.preprocess",
    "read_image": "prompttune.images:open_image",
    "SA2VPConfig": "prompttune.methods",
    "LSPTConfig": "prompttune.methods",
    "GaPTConfig": "prompttune.methods",
    "VPTShallowConfig": "prompttune.methods",
    "VPTDeepConfig": "prompttune.methods",
    "E2VPTConfig": "prompttune.methods",
    "EXPRESConfig": "prompttune.methods",
    "AdaptFormerConfig": "prompttune.methods",
    "AdapterConfig": "prompttune.methods",
    "LoRAConfig": "prompttune.methods",
    "SSFConfig": "prompttune.methods",
    "LinearConfig": "prompttune.methods",
    "FullConfig": "prompttune.methods",
    "DAMVPConfig": "prompttune.methods",
    "import_checkpoint": "prompttune.checkpoints.importing",
    "SegmentationConfig": "prompttune.segmentation",
    "TrainConfig": "prompttune.training",
    "train": "prompttune.training",
    "evaluate": "prompttune.training",
    "explain": "prompttune.explanation",
    "ExportSettings": "prompttune.export",
    "export_engine": "prompttune.export",
    "validate_engine": "prompttune.export",
    "Engine": "prompttune.serve",
    "PrompttuneError": "prompttune.errors",
}

__all__ = [
    "AdaptFormerConfig",
    "AdapterConfig",
    "Backbone",
    "DAMVPConfig",
    "E2VPTConfig",
    "EXPRESConfig",
    "Engine",
    "ExportSettings",
    "FullConfig",
    "GaPTConfig",
    "LSPTConfig",
    "LinearConfig",
    "LoRAConfig",
    "Output",
    "Preprocess",
    "PromptModel",
    "PrompttuneError",
    "SA2VPConfig",
    "SSFConfig",
    "SegmentationConfig",
    "TrainConfig",
    "VPTDeepConfig",
    "VPTShallowConfig",
    "__version__",
    "evaluate",
    "explain",
    "export_engine",
    "import_checkpoint",
    "load_backbone",
    "read_image",
    "train",
    "validate_engine",
]

if TYPE_CHECKING:
    from prompttune.backbones import Backbone, load_backbone
    from prompttune.checkpoints.importing import import_checkpoint
    from prompttune.errors import PrompttuneError
    from prompttune.explanation import explain
    from prompttune.export import ExportSettings, export_engine, validate_engine
    from prompttune.images import open_image as read_image
    from prompttune.methods import (
        AdapterConfig,
        AdaptFormerConfig,
        DAMVPConfig,
        E2VPTConfig,
        EXPRESConfig,
        FullConfig,
        GaPTConfig,
        LinearConfig,
        LoRAConfig,
        LSPTConfig,
        SA2VPConfig,
        SSFConfig,
        VPTDeepConfig,
        VPTShallowConfig,
    )
    from prompttune.model import Output, PromptModel
    from prompttune.preprocess import Preprocess
    from prompttune.segmentation import SegmentationConfig
    from prompttune.serve import Engine
    from prompttune.training import TrainConfig, evaluate, train


__getattr__ = lazy_names(__name__, _LAZY)
