"""Shared parts of the TensorRT formats. ``trt-rtx`` has a library of its own: see :mod:`library`."""
