"""prompttune: train visual prompts over one frozen backbone, export it once, swap tasks as inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompttune.lazy import lazy_names
from prompttune.version import __version__ as __version__

_LAZY = {
    "load_backbone": "prompttune.backbones",
    "Backbone": "prompttune.backbones",
    "PromptModel": "prompttune.model",
    "Output": "prompttune.model",
    "Preprocess": "prompttune.images.preprocess",
    "read_image": "prompttune.images.reading:open_image",
    "ReaderConfig": "prompttune.methods",
    "SideConfig": "prompttune.methods",
    "SA2VPConfig": "prompttune.methods",
    "LSPTConfig": "prompttune.methods",
    "GaPTConfig": "prompttune.methods",
    "VPTShallowConfig": "prompttune.methods",
    "VQTConfig": "prompttune.methods",
    "VPTDeepConfig": "prompttune.methods",
    "E2VPTConfig": "prompttune.methods",
    "EXPRESConfig": "prompttune.methods",
    "AdaptFormerConfig": "prompttune.methods",
    "AdapterConfig": "prompttune.methods",
    "BitFitConfig": "prompttune.methods",
    "LoRAConfig": "prompttune.methods",
    "SSFConfig": "prompttune.methods",
    "LinearConfig": "prompttune.methods",
    "FullConfig": "prompttune.methods",
    "DAMVPConfig": "prompttune.methods",
    "methods": "prompttune.methods:",
    "describe": "prompttune.methods.describing",
    "register_method": "prompttune.methods:register",
    "register_backbone": "prompttune.backbones",
    "import_checkpoint": "prompttune.checkpoints.importing",
    "SegmentationConfig": "prompttune.task_types",
    "TrainConfig": "prompttune.training",
    "train": "prompttune.training",
    "evaluate": "prompttune.training",
    "loss": "prompttune.training.optim",
    "features": "prompttune.training.embedding",
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
    "BitFitConfig",
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
    "ReaderConfig",
    "SA2VPConfig",
    "SSFConfig",
    "SegmentationConfig",
    "SideConfig",
    "TrainConfig",
    "VPTDeepConfig",
    "VPTShallowConfig",
    "VQTConfig",
    "__version__",
    "describe",
    "evaluate",
    "explain",
    "export_engine",
    "features",
    "import_checkpoint",
    "load_backbone",
    "loss",
    "methods",
    "read_image",
    "register_backbone",
    "register_method",
    "train",
    "validate_engine",
]

if TYPE_CHECKING:
    from prompttune.backbones import Backbone, load_backbone, register_backbone
    from prompttune.checkpoints.importing import import_checkpoint
    from prompttune.errors import PrompttuneError
    from prompttune.explanation import explain
    from prompttune.export import ExportSettings, export_engine, validate_engine
    from prompttune.images import open_image as read_image
    from prompttune.images.preprocess import Preprocess
    from prompttune.methods import (
        AdapterConfig,
        AdaptFormerConfig,
        BitFitConfig,
        DAMVPConfig,
        E2VPTConfig,
        EXPRESConfig,
        FullConfig,
        GaPTConfig,
        LinearConfig,
        LoRAConfig,
        LSPTConfig,
        ReaderConfig,
        SA2VPConfig,
        SideConfig,
        SSFConfig,
        VPTDeepConfig,
        VPTShallowConfig,
        VQTConfig,
    )
    from prompttune.methods import register as register_method
    from prompttune.methods.describing import describe, methods
    from prompttune.model import Output, PromptModel
    from prompttune.serve import Engine
    from prompttune.task_types import SegmentationConfig
    from prompttune.training import TrainConfig, evaluate, train
    from prompttune.training.embedding import features
    from prompttune.training.optim import loss


__getattr__ = lazy_names(__name__, _LAZY)
