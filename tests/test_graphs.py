"""The ONNX graphs of every method in every precision: operators and types that TensorRT takes, nothing baked in."""

import functools
import math
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from prompttune.export.folder import ONNX_FILE
from prompttune.export.formats import FORMATS, ExportSettings
from prompttune.export.formats.onnx import write_onnx
from prompttune.export.formats.onnx_file import export_onnx
from prompttune.export.formats.onnx_int8 import quantise
from prompttune.export.graph import Traced, capture
from prompttune.export.layout import TensorSpec, declare_inputs, declare_outputs
from prompttune.export.precision.casting import TORCH_DTYPES
from prompttune.layers.aligned_attention import AlignedAttention
from tests.engines import SHARING, build_request, exported, model_of, workshop
from tests.tensorrt_rtx import MAGIC, build_engine

FLOATS, WHOLE, TRUTH = {"FLOAT", "FLOAT16", "BFLOAT16"}, {"INT32", "INT64"}, {"BOOL"}
# onnx-tensorrt's docs/operators.md for TensorRT 10.15, https://github.com/onnx/onnx-tensorrt: operators that a graph
# of ours could come to need, with the types that TensorRT takes for their data. What is not here, it does not take.
SUPPORTED = {
    **dict.fromkeys(["Add", "Div", "Equal", "Less", "Max", "Min", "Mul", "Neg", "Pow", "Sub"], FLOATS | WHOLE),
    **dict.fromkeys(["Pad", "ReduceMean", "ReduceSum", "Relu", "Range", "IsNaN", "ScatterND", "TopK"], FLOATS | WHOLE),
    "ArgMax": FLOATS | WHOLE,
    **dict.fromkeys(["Concat", "Expand", "Gather", "GatherND", "Identity", "Reshape", "Shape"], FLOATS | WHOLE | TRUTH),
    **dict.fromkeys(["Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"], FLOATS | WHOLE | TRUTH),
    **dict.fromkeys(["Conv", "CumSum", "Einsum", "Erf", "Exp", "Gemm", "LayerNormalization", "LSTM", "MatMul"], FLOATS),
    **dict.fromkeys(["Abs", "Sigmoid", "Softmax", "Sqrt", "Tanh", "QuantizeLinear"], FLOATS),
    "Gelu": FLOATS | WHOLE | {"INT8"},
    "Attention": FLOATS | {"INT8"},
    "Cast": FLOATS | WHOLE | TRUTH | {"UINT8"},
    "Constant": FLOATS | WHOLE | TRUTH,
    "DequantizeLinear": {"INT8"},
    "DynamicQuantizeLinear": set(),
    "MatMulInteger": set(),
}
# Operators whose inputs behind the first are indices, sizes and axes, or scales and zero points.
SCALES = {"QuantizeLinear", "DequantizeLinear"}
INDICES = {
    "Expand",
    "Gather",
    "GatherND",
    "ReduceMean",
    "ReduceSum",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Unsqueeze",
}
CONSTANT_AXES = {"ReduceMean", "ReduceSum", "Squeeze", "Unsqueeze"}
# TensorRT takes some of these, with restrictions; a graph of ours needs none.
AVOIDED = {"Where", "IsNaN", "Loop", "If", "Scan", "Scatter", "ScatterND", "ScatterElements", "NonZero", "GatherND"}

CASES = [(method, "test_vit") for method in SHARING] + [("sa2vp", "test_vit2"), ("sa2vp", "test_eva")]
# Two pathways, a recurrence, task matrices that read what frozen ones read. Elsewhere the conversions to other types
# meet nothing new, and exporting is what takes the time.
CONVERTED = [(method, "test_vit") for method in ("sa2vp", "lspt", "lora")]
PARTS = ("q", "k", "v", "proj", "fc1", "fc2")
every_method = pytest.mark.parametrize(("method", "backbone"), CONVERTED, ids=lambda value: value)
every_graph = pytest.mark.parametrize(
    ("method", "backbone", "kind"),
    [
        pytest.param(*case, kind, id="-".join((*case, kind)), marks=marks)
        for case in CASES
        for kind, marks in {
            "fp32": (),
            "fp16": pytest.mark.slow,
            "bf16": (),
            "dynamic": (),
            "static": (),
        }.items()
        if kind == "fp32" or (case in CONVERTED and (kind != "bf16" or case == CONVERTED[0]))
    ],
)


@functools.cache
def written(method, backbone, kind):
    """The folder of a graph: a precision, ``fused`` fp16, or int8 with ``dynamic`` or ``static`` scales."""
    if kind == "fp32":
        return exported(method, backbone)
    folder = Path(tempfile.mkdtemp(dir=workshop()))
    if kind in ("dynamic", "static"):
        for file in exported(method, backbone).glob(f"{ONNX_FILE}*"):
            shutil.copy(file, folder)
        quantise(
            build_request(method, ExportSettings("onnx", "int8", quantization=kind), backbone), folder, symmetric=True
        )
    else:
        fused = kind == "fused"
        settings = ExportSettings("onnx", "fp16" if fused else kind, attention="fused" if fused else None)
        write_onnx(build_request(method, settings, backbone), folder)
    return folder


@functools.cache
def inferred(method, backbone, kind):
    """The model with its weights and the inferred types and shapes of all values."""
    return onnx.shape_inference.infer_shapes(onnx.load(str(written(method, backbone, kind) / ONNX_FILE)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "backbone", "kind"), [*((*case, "fp16") for case in CONVERTED), (*CONVERTED[0], "bf16")]
)
def test_nvidias_builder_takes_half_precision(method, backbone, kind, tmp_path):
    build_engine(exported(method, backbone), tmp_path / "plan", written(method, backbone, kind) / ONNX_FILE)
    assert (tmp_path / "plan").read_bytes().startswith(MAGIC)


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method, _ in CONVERTED])
def test_nvidias_builder_takes_baked_tasks_in_half_precision(method, tmp_path):
    settings = ExportSettings(
        "trt-rtx", "fp16", baked=True, options={"compute_capability": "8.9", "optimization_level": 0}
    )
    built = FORMATS["trt-rtx"]().build(build_request(method, settings), tmp_path)
    assert [spec.name for spec in built.inputs] == ["image", "task_index"]
    assert (tmp_path / "model.plan").read_bytes().startswith(MAGIC)


def value_types(graph):
    """Value → name of its type."""
    types = {
        value.name: TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    return types | {one.name: TensorProto.DataType.Name(one.data_type) for one in graph.initializer}


def value_shapes(graph):
    """Value → its axes, numbers and names."""
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    return shapes | {one.name: list(one.dims) for one in graph.initializer}


def constants(graph):
    return {one.name: one for one in graph.initializer}


def unsupported(model):
    """One line for each thing that TensorRT would not take: operator, type, or restriction."""
    graph, found = model.graph, set()
    types, shapes, known = value_types(graph), value_shapes(graph), constants(graph)
    for node in graph.node:
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        given = [value for value in node.input if value]
        data = given[:1] if name in INDICES | SCALES else given
        found |= {f"{name} of {types[value]}" for value in data if types[value] not in SUPPORTED.get(name, ())}
        if name in INDICES:
            found |= {f"{name} by {types[value]}" for value in given[1:] if types[value] not in WHOLE}
        one_axis = name == "Squeeze" and len(given) == 1 and shapes[given[0]] == [1]  # then there is nothing to choose
        if name in CONSTANT_AXES and not one_axis and (len(given) == 1 or given[1] not in known):
            found.add(f"{name} over axes that are no constant")
        if name in SCALES and numpy_helper.to_array(known[given[2]]).any():
            found.add(f"{name} with another zero point than 0")
        if name == "Attention":
            found |= {f"Attention of {len(shapes[value])} axes" for value in given if len(shapes[value]) != 4}
            found |= {
                f"Attention with {one.name}"
                for one in node.attribute
                if one.name not in ("scale", "is_causal") and (one.i or one.f)
            }
        if len([value for value in node.output if value]) > 1 and name in ("LayerNormalization", "Attention"):
            found.add(f"{name} with more than one output")
    assert not model.functions
    return found


def of_kind(graph, *operators):
    return [node for node in graph.node if node.op_type in operators]


@every_graph
def test_tensorrt_takes_operators_and_types(method, backbone, kind):
    model = inferred(method, backbone, kind)
    assert {node.op_type for node in model.graph.node}.isdisjoint(AVOIDED)
    if kind == "dynamic":  # ONNX Runtime's alone, and the check sees it
        assert unsupported(model) == {
            "QuantizeLinear with another zero point than 0",
            "ReduceMax of FLOAT",
            "ReduceMax of INT64",
            "com.microsoft::MatMulIntegerToFloat of FLOAT",
            "com.microsoft::MatMulIntegerToFloat of INT8",
            "com.microsoft::MatMulIntegerToFloat of UINT8",
        }
    else:
        assert unsupported(model) == set()


def made_up(operator, types, opset=20, **attributes):
    names = [f"input{number}" for number in range(len(types))]
    inputs = [helper.make_tensor_value_info(one, kind, [2, 2]) for one, kind in zip(names, types, strict=True)]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)]
    graph = helper.make_graph([helper.make_node(operator, names, ["output"], **attributes)], "made up", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


@pytest.mark.parametrize(
    ("operator", "types", "finding"),
    [
        ("NonZero", [TensorProto.FLOAT], "NonZero of FLOAT"),
        ("IsNaN", [TensorProto.DOUBLE], "IsNaN of DOUBLE"),
        ("Softmax", [TensorProto.DOUBLE], "Softmax of DOUBLE"),
        ("Add", [TensorProto.INT8] * 2, "Add of INT8"),
        ("Gather", [TensorProto.UINT8, TensorProto.INT64], "Gather of UINT8"),
        ("Unsqueeze", [TensorProto.FLOAT, TensorProto.INT64], "Unsqueeze over axes that are no constant"),
        ("Attention", [TensorProto.FLOAT] * 3, "Attention of 2 axes"),
    ],
)
def test_the_check_notices(operator, types, finding):
    assert unsupported(made_up(operator, types, 23)) == {finding}


def test_a_masked_softmax_in_truth_values_would_be_noticed(tmp_path):
    class Masked(torch.nn.Module):
        def forward(self, q, k, v):
            visible = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)

    graph = exported_module(Masked(), (2, 5, 8), tmp_path)
    assert {node.op_type for node in graph.node} & AVOIDED == {"Where", "IsNaN"}


@every_method
def test_axes_are_as_declared(method, backbone):
    model = model_of(method, 0, backbone)
    layout, size = model.state_layout(), model.backbone.image_size
    for kind in ("fp32", "dynamic", "static"):
        graph = inferred(method, backbone, kind).graph
        shapes = value_shapes(graph)
        assert [one.name for one in graph.input] == [spec.name for spec in declare_inputs(layout, size)]
        for spec in (*declare_inputs(layout, size), *declare_outputs()):
            assert tuple(shapes[spec.name]) == spec.shape
        # Whatever a block computes has the images in front, or their pairs with tasks, for one or both pathways.
        attended = [shapes[node.output[0]] for node in of_kind(graph, "Softmax")]
        assert len(attended) >= model.backbone.depth
        assert {shape[-4] for shape in attended} <= {"batch", "batch*asked", "2*batch*asked"}
        assert any(shape[-4] == "batch*asked" for shape in attended) != model.method.only_reads
        assert {shape[-3] for shape in attended} == {model.backbone.num_heads}


@every_graph
def test_norms_and_softmax_run_in_float32(method, backbone, kind):
    graph = inferred(method, backbone, kind).graph
    types = value_types(graph)
    for operator in ("LayerNormalization", "Softmax"):
        nodes = of_kind(graph, operator)
        assert nodes
        # OpenVINO, which alone runs bf16 on a CPU, joins attention to one operator if nothing in it is cast.
        inside = "BFLOAT16" if (kind, operator) == ("bf16", "Softmax") else "FLOAT"
        assert {types[value] for node in nodes for value in (*node.input, *node.output)} == {inside}
    if kind in ("fp16", "bf16"):
        lower = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[kind]
        products = Counter(types[node.input[1]] for node in of_kind(graph, "MatMul"))
        assert products["FLOAT"] == 1  # the head's
        assert products.keys() == {"FLOAT", lower}


def weights(method, backbone, precision="fp32"):
    """(block, part) → the matrix [in, out] that a product of the backbone multiplies with.

    bitfit runs timm's own forward, with one product for queries, keys and values.
    """
    frozen = model_of(method, 0, backbone).backbone
    matrices = {}
    for index in range(frozen.depth):
        block = frozen.blocks[index].timm
        qkv = block.attn.qkv.weight
        joint = {"qkv": qkv} if method == "bitfit" else dict(zip(PARTS, qkv.chunk(3), strict=False))
        layers = {"proj": block.attn.proj.weight, "fc1": block.mlp.fc1.weight, "fc2": block.mlp.fc2.weight}
        for part, weight in (joint | layers).items():
            matrices[index, part] = weight.detach().to(TORCH_DTYPES[precision]).float().numpy().T
    return matrices


def which(array, matrices, tolerance=0.0):
    found = [
        name for name, one in matrices.items() if one.shape == array.shape and (abs(one - array) <= tolerance).all()
    ]
    assert len(found) == 1
    return found[0]


@every_graph
def test_every_product_of_the_backbone_sees_its_matrix(method, backbone, kind):
    graph = inferred(method, backbone, kind).graph
    known, made_by = constants(graph), {value: node for node in graph.node for value in node.output}
    for node in of_kind(graph, "Slice", "Transpose", "Reshape", "Split"):
        assert node.input[0] not in known, "a weight whose recipe was left in the graph"
    used: Counter[tuple[int, str]] = Counter()
    in_float = set()
    matrices = weights(method, backbone, kind if kind in TORCH_DTYPES else "fp32")
    for node in of_kind(graph, "MatMul", "MatMulIntegerToFloat"):
        matrix = node.input[1]
        if node.op_type == "MatMulIntegerToFloat":
            used[matched(known[matrix], known[matrix.replace("_quantized", "_scale")], matrices)] += 1
        elif matrix in known:
            name = which(numpy_helper.to_array(known[matrix]).astype(np.float32), matrices)
            in_float.add(name)
            used[name] += 1
        elif kind == "static" and made_by[matrix].op_type == "DequantizeLinear":
            used[matched(*(known[value] for value in made_by[matrix].input[:2]), matrices)] += 1
            source = made_by[node.input[0]]
            assert source.op_type == "DequantizeLinear"
            assert made_by[source.input[0]].op_type == "QuantizeLinear"
    depth = model_of(method, 0, backbone).backbone.depth
    assert used.keys() == matrices.keys()
    if kind in ("dynamic", "static"):
        early = math.ceil(depth / 3) if kind == "static" else 0
        assert in_float == {(index, "fc2") for index in range(early)}
    # What both pathways see of each other goes through the projection once more, and the last block reads each alone.
    # What vqt's queries read goes through projection and MLP, a reader's tokens through query and projection. dam-vp
    # runs the backbone twice.
    twice = {"sa2vp": {"k", "v", "proj"}, "vqt": {"proj", "fc1", "fc2"}, "reader": {"q", "proj"}, "dam-vp": set(PARTS)}
    again = twice.get(method, set())
    assert set(used.values()) <= {1, 2}
    assert {part for (_, part), count in used.items() if count > 1} == again


def matched(quantised, scales, matrices):
    """The matrix that an int8 one with a scale a column stands for."""
    scale = numpy_helper.to_array(scales)
    assert quantised.data_type == TensorProto.INT8
    assert scale.shape == (quantised.dims[1],)
    return which(numpy_helper.to_array(quantised) * scale, matrices, scale)


@every_method
def test_static_int8_quantises_nothing_but_the_backbones_products(method, backbone):
    """Softmax, products of two activations, what a task brings and every product's result stay in float."""
    graph = inferred(method, backbone, "static").graph
    known, made_by = constants(graph), {value: node for node in graph.node for value in node.output}
    readers = {value: [node for node in graph.node if value in node.input] for value in made_by}
    activations = [node for node in of_kind(graph, "DequantizeLinear") if node.input[0] not in known]
    assert len(activations) == len(of_kind(graph, "QuantizeLinear"))
    for node in activations:
        assert made_by[node.input[0]].op_type == "QuantizeLinear"
        for reader in readers[node.output[0]]:
            if reader.op_type == "Slice":  # of the last block's tokens, those that are pooled
                continue
            assert reader.op_type == "MatMul"
            matrix = made_by[reader.input[1]]
            if matrix.op_type == "DequantizeLinear":
                assert matrix.input[0] in known
            else:  # a task's low-rank matrices stay in float, but read the tokens that their frozen neighbours read
                assert method == "lora"
    for node in of_kind(graph, "MatMul"):
        assert "QuantizeLinear" not in {reader.op_type for reader in readers[node.output[0]]}


@every_method
def test_symmetric_int8_has_no_zero_points(method, backbone):
    graph = inferred(method, backbone, "static").graph
    known, nodes = constants(graph), of_kind(graph, "QuantizeLinear", "DequantizeLinear")
    points = [known[node.input[2]] for node in nodes]
    assert {point.data_type for point in points} == {TensorProto.INT8}
    assert not any(numpy_helper.to_array(point).any() for point in points)


def test_static_int8_for_onnx_runtime_is_unsigned(tmp_path):
    # DAM-VP runs the backbone twice: two products share each matrix.
    write_onnx(build_request("dam-vp", ExportSettings("onnx", "int8", quantization="static")), tmp_path)
    graph = onnx.load(str(tmp_path / ONNX_FILE)).graph
    points = [constants(graph)[node.input[2]] for node in of_kind(graph, "QuantizeLinear", "DequantizeLinear")]
    assert {point.data_type for point in points} == {TensorProto.UINT8}
    assert {128} == {int(value) for point in points if point.dims for value in numpy_helper.to_array(point)}
    settings = ort.SessionOptions()
    settings.add_session_config_entry("session.x64quantprecision", "1")
    ort.InferenceSession(tmp_path / ONNX_FILE, settings, providers=["CPUExecutionProvider"])
    assert [file.name for file in sorted(tmp_path.iterdir())] == [ONNX_FILE, f"{ONNX_FILE}.data"]


@pytest.mark.parametrize("method", ["sa2vp", "lspt"])
def test_operator_sets(method):
    assert {one.domain: one.version for one in inferred(method, "test_vit", "fp32").opset_import}[""] == 20
    model = inferred(method, "test_vit", "fused")
    assert {one.domain: one.version for one in model.opset_import}[""] == 23
    depth = model_of(method, 0).backbone.depth
    assert len(of_kind(model.graph, "Attention")) == depth * (2 if method == "sa2vp" else 1)
    assert not of_kind(model.graph, "Softmax")
    assert unsupported(model) == set()
    assert {node.op_type for node in model.graph.node}.isdisjoint(AVOIDED)


# --------------------------------------------------------------------------------------------------- large grids


def exported_module(module, shape, folder):
    """The graph of a module of q, k and v, each [batch, *shape], as an exporter of explicit attention writes it."""
    specs = [TensorSpec(name, "float32", ("batch", *shape)) for name in "qkv"]
    dynamic = {name: {0: "batch"} for name in "qkv"}
    program = capture(module, [torch.zeros(3, *shape)] * 3, dynamic, "explicit", "cpu", "attention")
    outputs = [TensorSpec("attended", "float32", ("batch", *shape))]
    export_onnx(Traced(program, specs, outputs, dynamic, []), folder)
    model = onnx.load(str(folder / ONNX_FILE), load_external_data=False)
    return onnx.shape_inference.infer_shapes(model).graph


def squares(graph, tokens):
    """Values with two axes of at least so many entries."""
    return {
        name
        for name, shape in value_shapes(graph).items()
        if sum(isinstance(axis, int) and axis >= tokens for axis in shape) > 1
    }


def test_a_grid_of_64_x_64_builds_no_square_of_tokens(tmp_path):
    gathered = AlignedAttention((64, 64), 1, 3)
    assert not gathered.masked
    graph = exported_module(gathered, (2, 1 + 64 * 64, 4), tmp_path)
    shapes = value_shapes(graph)
    assert all(shapes[value] for node in graph.node for value in node.output), "a value of unknown shape"
    assert squares(graph, 64 * 64) == set()
    assert {node.op_type for node in graph.node}.isdisjoint(AVOIDED)
    largest = max(np.prod([axis for axis in shape if isinstance(axis, int)]) for shape in shapes.values())
    assert largest <= 2 * 64 * 64 * 9 * 4  # the keys of all windows, [batch, H, R C, c², d]


def test_the_masked_form_does_build_one(tmp_path):
    graph = exported_module(AlignedAttention((6, 6), 1, 3, "masked"), (2, 1 + 36, 4), tmp_path)
    assert squares(graph, 36)
