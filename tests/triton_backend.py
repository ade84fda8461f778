"""Stands in for Triton's ONNX Runtime backend, inside Triton: Triton imports this file as the backend's ``model.py``.

It is given tensors as Triton's core prepares them, warm-up, reshaping and batching included, and runs a batch as the
backend in C++ does: requests put together along their first axis in one call where the model has a batch axis.
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = os.environ["TRITON_TEST_PATH"].split(os.pathsep)  # the interpreter is Triton's, not the tests'

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
import torch  # noqa: E402
import triton_python_backend_utils as triton  # noqa: E402
from torch.utils import dlpack  # noqa: E402


class TritonPythonModel:
    def initialize(self, args):
        self.config = json.loads(args["model_config"])
        path = Path(args["model_repository"]) / args["model_version"] / self.config["default_model_filename"]
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def execute(self, requests):
        feeds = [self._arrays(request) for request in requests]
        if not self.config["max_batch_size"]:
            return [self._answer(self._run(arrays)) for arrays in feeds]
        joined = {name: np.concatenate([arrays[name] for arrays in feeds]) for name in feeds[0]}
        ends = np.cumsum([len(arrays["image"]) for arrays in feeds])[:-1]
        return [self._answer(rows) for rows in np.split(self._run(joined), ends)]

    def _run(self, arrays):
        return self.session.run(["logits"], arrays)[0]

    def _arrays(self, request):
        # DLPack, because Triton's own arrays follow the binary layout of an older NumPy.
        tensors = {
            spec["name"]: triton.get_input_tensor_by_name(request, spec["name"]) for spec in self.config["input"]
        }
        return {name: dlpack.from_dlpack(tensor.to_dlpack()).numpy() for name, tensor in tensors.items()}

    def _answer(self, logits):
        tensor = torch.from_numpy(np.ascontiguousarray(logits))
        return triton.InferenceResponse([triton.Tensor.from_dlpack("logits", dlpack.to_dlpack(tensor))])
