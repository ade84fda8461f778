"""Models that run as a whole, and the methods that join in at their modules."""

OVER_MODULES = ("lora", "ssf", "bitfit", "adapter", "adaptformer", "side")
"""Methods of any timm model, through its modules or its maps."""
ON_PLAIN = ("linear", "full", "dam-vp", "vpt-shallow", *OVER_MODULES)
TINY = "img_size=64&depth=2&embed_dim=32&num_heads=2"
PLAINS = (
    "lcnet_035",
    "test_maxvit?img_size=64",
    "test_vit_relpos",
    f"cait_xxs24_224?{TINY}",
    f"beit_base_patch16_224?{TINY}",
)
"""Depthwise convolutions and norms with their activation; convolutions beside attention in windows and grids; relative
positions; class attention; queries, keys and values whose biases stand beside their layer."""
