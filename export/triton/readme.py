"""``README.md`` of a Triton model: how to start the server, and a client that runs without changes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from string import Template

from prompttune.export.folder import Manifest, Task
from prompttune.export.layout import bank_dtype
from prompttune.export.triton.settings import VERSION, TritonSettings

_PAGE = Template("""\
# $name

$method over $backbone at $size pixels, $precision, for Triton's $backend backend; tasks: $tasks.

The folder `$version` is a prompttune engine as well: `prompttune validate $name/$version` proves it again.

## Server

```sh
docker run --rm $gpus-p 8000:8000 -p 8001:8001 -v "$$PWD:/models" \\
    nvcr.io/nvidia/tritonserver:RELEASE-py3 tritonserver --model-repository=/models
```

Run it in the folder that holds `$name`.
$needs

## Client

$asking

The parameters of the model's configuration tell each task's labels, its version, and how its images are prepared.
$padding
The client needs `pip install 'tritonclient[http]'`, and prompttune (`pip install .` in a clone): `read_image` turns an
image upright and brings its transparency, bit depth and colours to what the model was trained on.

```python
$client```
""")

_ASKING_BAKED = """\
`image` is normalised pixels, FP32 [N, 3, $size, $size], and `task_index`, INT64 [N, 1], the task of each image.
Rows of different tasks share a batch, within a request and across requests. An index without a task fails its whole
batch on a CPU, including other requests in it; on a GPU its answer is undefined. So take indices only from the
configuration.
"""

_ASKING_BANK = """\
A request carries the tasks that it asks for: `image` takes normalised pixels, FP32 [N, 3, $size, $size], each
`bank.…` the states of T tasks stacked, and `task_index`, INT64 [N], the row of the bank for each image. A bank belongs
to its request, so Triton cannot put requests together.
"""

_CLIENT_BAKED = """\
rows = np.full((len(pixels), 1), task["index"], dtype=np.int64)
arrays = {"image": pixels, "task_index": rows}
"""

_CLIENT_BANK = """\
state = safetensors.numpy.load_file("$name/$version/tasks/$task/state.safetensors")
arrays = {"image": pixels, "task_index": np.zeros(len(pixels), dtype=np.int64)}
arrays |= {f"bank.{key}": value.astype(np.$dtype) for key, value in state.items()}
"""

_CLIENT = """\
import json

import numpy as np
${more}import tritonclient.http as triton
from tritonclient.utils import np_to_triton_dtype

import prompttune as pt

client = triton.InferenceServerClient("localhost:8000")
parameters = client.get_model_config("$name")["parameters"]
task = json.loads(parameters["tasks"]["string_value"])["$task"]

image = pt.read_image("image.png")
pixels = pt.Preprocess.from_dict(task["preprocess"]).transform()(image).numpy()[None]
${arrays}inputs = []
for name, array in arrays.items():
    inputs.append(triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
    inputs[-1].set_data_from_numpy(array)

logits = client.infer("$name", inputs).as_numpy("logits")[0, : len(task["labels"])]
print(task["labels"][logits.argmax()])
"""

_BACKENDS = {"onnx": "ONNX Runtime", "trt": "TensorRT"}


def make_readme(manifest: Manifest, tasks: Mapping[str, Task], triton: TritonSettings, gpu: bool) -> str:
    """The page for a model, its tasks and its configured device."""
    baked = manifest.baked is not None
    values = {
        "name": triton.name,
        "version": VERSION,
        "task": next(iter(tasks)),
        "tasks": len(tasks),
        "method": manifest.method["name"],
        "backbone": manifest.backbone["name"],
        "size": manifest.image_size,
        "precision": manifest.precision,
        "backend": _BACKENDS[manifest.format],
        "gpus": "--gpus all " if gpu else "",
        "needs": _needs(manifest),
        "dtype": bank_dtype(manifest.bank_precision).name,
        "more": "" if baked else "import safetensors.numpy\n",
        "padding": _padding(tasks) if baked else "",
    }
    values["asking"] = Template(_ASKING_BAKED if baked else _ASKING_BANK).substitute(values).strip()
    values["arrays"] = Template(_CLIENT_BAKED if baked else _CLIENT_BANK).substitute(values)
    values["client"] = Template(_CLIENT).substitute(values)
    return _PAGE.substitute(values)


def _needs(manifest: Manifest) -> str:
    """Releases of Triton that run the model, as a sentence."""
    if "tensorrt" in manifest.details:
        version = manifest.details["tensorrt"]
        return f"The plan runs on the kind of GPU that built it: take a release with TensorRT {version}."
    return f"The model uses ONNX operator set {manifest.opset}: take a release whose ONNX Runtime supports it."


def _padding(tasks: Mapping[str, Task]) -> str:
    """A sentence about the padded logits of smaller tasks; empty if all tasks have the same number of classes."""
    classes = {task.num_classes for task in tasks.values()}
    if len(classes) == 1:
        return ""
    words = (
        f"There are as many logits as the largest task has classes, {max(classes)}; those past a task's own are minus "
        "infinity, which JSON cannot express: ask for binary outputs, as tritonclient does by itself."
    )
    return textwrap.fill(words, 120) + "\n"
