"""The model card in a checkpoint folder."""

from __future__ import annotations

from typing import Any


def model_card(config: dict[str, Any], parameters: int, left: int, size: int) -> str:
    """Markdown text for people who find the folder.

    Args:
        config: content of ``prompt_config.json``.
        parameters: number of trainable parameters, without the head.
        left: number of them after pruning.
        size: bytes of the tensors' file.
    """
    backbone, labels = config["backbone"], config["labels"]
    shown = ", ".join(labels[:12]) + (f" and {len(labels) - 12} more" if len(labels) > 12 else "")
    settings = "\n".join(f"| {name} | {value} |" for name, value in config["settings"].items())
    numbers = {name: value for name, value in config["metrics"].items() if isinstance(value, (int, float))}
    metrics = "\n".join(f"| {name} | {value:.4g} |" for name, value in numbers.items())
    pruned = f", of which pruning has left {left:,}" if left != parameters else ""
    parts = [
        "---\nlibrary_name: prompttune\ntags: [visual-prompt-tuning, "
        f"{config['method']}]\nbase_model: timm/{backbone['name']}\n---\n",
        f"# {config['method']} over {backbone['name']}\n",
        f"A prompt checkpoint of {parameters:,} parameters beside its head{pruned} ({size / 1024:.0f} KiB). "
        "The frozen backbone is not part of it.\n",
        f"- Backbone: `{backbone['name']}` at {backbone['image_size']} pixels, {backbone['weights_source']}, "
        f"fingerprint `{backbone['fingerprint'][:16]}`",
        f"- {len(labels)} classes: {shown}\n",
    ]
    if settings:
        parts.append(f"| setting | value |\n|---|---|\n{settings}\n")
    if metrics:
        parts.append(f"| metric | value |\n|---|---|\n{metrics}\n")
    parts.append(
        '```python\nimport prompttune as pt\n\nmodel = pt.PromptModel.load("path/to/this/folder")\n'
        "logits = model(images).logits\n```\n"
    )
    return "\n".join(parts)
