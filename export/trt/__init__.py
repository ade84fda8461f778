"""Shared parts of the formats trt and torch-trt. Only ``builder``, ``execution`` and ``log`` import TensorRT."""
