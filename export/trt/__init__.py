"""What the formats ``trt`` and ``torch-trt`` share. Only ``builder``, ``execution`` and ``log`` import TensorRT."""
