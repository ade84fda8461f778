"""The protocol's tensors become rows or one clear refusal; logits become the outputs that were asked for."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import prompttune as pt
from prompttune.serve.limits import Limits
from prompttune.serve.messages import (
    MIXED,
    BadRequestError,
    InferRequest,
    InputTensor,
    RequestedOutput,
    ServeError,
    TooLargeError,
    bytes_array,
)
from prompttune.serve.service.outputs import OUTPUTS, PADDING
from prompttune.serve.service.tensors import RowImage, Rows, read_rows, write_outputs
from prompttune.task_types import ClassificationConfig
from tests.engines import exported, noise

SIZE = 8
LIMITS = Limits(rows=4, image_bytes=100, pixels=1000)


def tensor(rows: int = 2, name: str = "image") -> InputTensor:
    values = np.random.default_rng(rows).standard_normal((rows, 3, SIZE, SIZE), dtype=np.float32)
    return InputTensor(name, "FP32", values)


def files(values: Sequence[bytes | str], *, text: bool = False) -> InputTensor:
    return InputTensor("image", "BYTES", bytes_array(values), text)


def names(values: Sequence[str | bytes]) -> InputTensor:
    return InputTensor("task", "BYTES", bytes_array(values))


def request(*inputs: InputTensor, model: str = "digits", **fields: object) -> InferRequest:
    return InferRequest(model, inputs, **fields)  # type: ignore[arg-type]


def read(asked: InferRequest) -> Rows:
    return read_rows(asked, LIMITS, SIZE)


def refusal(asked: InferRequest, kind: type[ServeError] = BadRequestError) -> str:
    with pytest.raises(kind) as caught:
        read(asked)
    message = str(caught.value)
    assert type(caught.value) is kind
    assert message.isprintable()
    assert len(message) < 300
    return message


# -------------------------------------------------------------------- images


def test_normalised_images_are_views() -> None:
    sent = tensor(3)
    rows = read(request(sent))
    assert [payload.row for payload in rows.payloads] == [0, 1, 2]
    for payload, image in zip(rows.payloads, sent.data, strict=True):
        assert payload.normalised
        assert np.shares_memory(payload.data, sent.data)
        assert np.array_equal(payload.data, image)
    assert rows.tasks == ["digits"] * 3


def test_raw_images_are_views_of_any_size() -> None:
    sent = InputTensor("image", "UINT8", np.arange(2 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 5, 7, 3))
    rows = read(request(sent))
    assert [payload.data.shape for payload in rows.payloads] == [(5, 7, 3)] * 2
    assert all(np.shares_memory(payload.data, sent.data) for payload in rows.payloads)
    assert not rows.payloads[0].normalised


def test_files_are_passed_on_as_sent() -> None:
    sent = [b"\x89PNG\xff", b"", b"x" * 100]
    assert [payload.data for payload in read(request(files(sent))).payloads] == sent


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "DATA:image/png;BASE64,", "data:;base64,"])
def test_base64_in_json(prefix: str) -> None:
    sent = [b"\x00\xff\x89PNG", b"ab", b""]
    coded = [prefix + base64.b64encode(one).decode() for one in sent]
    assert [payload.data for payload in read(request(files(coded, text=True))).payloads] == sent


@pytest.mark.parametrize(
    "text", ["é", "abc", "ab=c", "a b=", "YWI=\n", "-_-_", "YWI=YWI=", "data:image/png,abcd", "data:;base64", "\udcff"]
)
def test_what_is_not_base64_is_refused(text: str) -> None:
    sent = InputTensor("image", "BYTES", bytes_array([b"YWI=", text.encode(errors="surrogatepass")]), text=True)
    assert refusal(request(sent)).startswith("image of row 1 is ")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    sent = tensor(2)
    sent.data[1, 2, 3, 4] = value
    assert "not finite" in refusal(request(sent))
    both = tensor(1)
    both.data[0, 0, 0, :2] = (np.inf, -np.inf)
    assert "not finite" in refusal(request(both))


def test_large_values_whose_sum_overflows_are_finite() -> None:
    sent = tensor(1)
    sent.data[:] = np.finfo(np.float32).max
    assert len(read(request(sent)).payloads) == 1


SHAPES = [
    ("FP32", np.float32, (3, SIZE, SIZE)),
    ("FP32", np.float32, (1, 3, SIZE, SIZE + 1)),
    ("FP32", np.float32, (1, SIZE, SIZE, 3)),
    ("FP32", np.float32, ()),
    ("FP32", np.float32, (0, 3, SIZE, SIZE)),
    ("UINT8", np.uint8, (5, 7, 3)),
    ("UINT8", np.uint8, (1, 5, 7, 4)),
    ("UINT8", np.uint8, (1, 0, 7, 3)),
    ("UINT8", np.uint8, (0, 5, 7, 3)),
    ("UINT8", np.uint8, (1, 3, 5, 7)),
    ("BYTES", object, ()),
    ("BYTES", object, (0,)),
    ("BYTES", object, (1, 1)),
    ("FP16", np.float16, (1, 3, SIZE, SIZE)),
    ("FP64", np.float64, (1, 3, SIZE, SIZE)),
    ("INT8", np.int8, (1, 5, 7, 3)),
    ("nonsense\n" * 99, np.uint8, (1, 5, 7, 3)),
]


@pytest.mark.parametrize(("datatype", "dtype", "shape"), SHAPES)
def test_wrong_shapes_and_datatypes_are_refused(datatype: str, dtype: type, shape: tuple[int, ...]) -> None:
    data = np.full(shape, b"" if dtype is object else 0, dtype=dtype)
    refusal(request(InputTensor("image", datatype, data)))


def test_limits_of_a_request() -> None:
    assert "5 images in one request, the limit is 4" in refusal(request(tensor(5)), TooLargeError)
    assert "row 1 has 101 bytes" in refusal(request(files([b"", b"x" * 101])), TooLargeError)
    coded = base64.b64encode(b"x" * 101)
    assert "row 0 has 101 bytes" in refusal(request(files([coded], text=True)), TooLargeError)
    wide = InputTensor("image", "UINT8", np.zeros((1, 7, 143, 3), dtype=np.uint8))
    assert "143 x 7 pixels" in refusal(request(wide), TooLargeError)
    endless = InputTensor("image", "UINT8", np.broadcast_to(np.uint8(0), (1, 2**30, 2**30, 3)))
    refusal(request(endless), TooLargeError)


# -------------------------------------------------------------------- inputs


def test_names_of_inputs() -> None:
    assert "unknown input 'pixels'" in refusal(request(tensor(name="pixels")))
    assert "given twice" in refusal(request(tensor(), tensor()))
    assert "the input image is missing" in refusal(request())
    assert "the input task is missing" in refusal(request(tensor(), model=MIXED))
    assert "unknown input 'task'" in refusal(request(tensor(), names(["a", "b"])))


def test_tasks_of_rows() -> None:
    rows = read(request(names(["digits", "größe"]), tensor(2), model=MIXED))
    assert rows.tasks == ["digits", "größe"]
    assert "2 images but 1 tasks" in refusal(request(tensor(2), names(["a"]), model=MIXED))
    assert "task of row 1 is not UTF-8" in refusal(request(tensor(2), names(["a", b"\xff"]), model=MIXED))
    assert "has 256 bytes" in refusal(request(tensor(1), names(["a" * 256]), model=MIXED))
    column = InputTensor("task", "BYTES", bytes_array(["a", "b"], (2, 1)))
    assert read(request(tensor(2), column, model=MIXED)).tasks == ["a", "b"]
    square = InputTensor("task", "BYTES", bytes_array(["a", "b"], (1, 2)))
    assert "must be [N], not [1, 2]" in refusal(request(tensor(2), square, model=MIXED))
    number = InputTensor("task", "INT32", np.zeros(2, dtype=np.int32))
    assert "task must be BYTES" in refusal(request(tensor(2), number, model=MIXED))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "", "a\0b", "a/../b", "C:\\x", "\u202e"])
def test_tricks_with_paths_are_names_like_others(name: str) -> None:
    assert read(request(tensor(1), names([name]), model=MIXED)).tasks == [name]


# ---------------------------------------------------------------- parameters


def test_parameters() -> None:
    rows = read(request(tensor(), parameters={"top_k": 3, "priority": 2, "timeout": 1_500_000, "sequence_id": 4}))
    assert (rows.top_k, rows.priority, rows.timeout_s) == (3, 2, 1.5)
    plain = read(request(tensor()))
    assert (plain.top_k, plain.priority, plain.timeout_s) == (5, 0, None)
    assert read(request(tensor(), parameters={"timeout": 0})).timeout_s is None


@pytest.mark.parametrize("name", ["top_k", "priority", "timeout"])
@pytest.mark.parametrize("value", [True, 1.0, "1", None, float("nan"), -1, 2**63, 10**400, [1], {"a": 1}, "x" * 999])
def test_bad_parameters_are_refused(name: str, value: object) -> None:
    assert f"the parameter {name} must be " in refusal(request(tensor(), parameters={name: value}))


def test_top_k_is_at_least_one() -> None:
    assert "top_k must be at least 1" in refusal(request(tensor(), parameters={"top_k": 0}))


# ------------------------------------------------------------------- outputs


def test_requested_outputs() -> None:
    wanted = [RequestedOutput("score"), RequestedOutput("logits", 2)]
    assert read(request(tensor(), outputs=wanted)).outputs == wanted
    assert [output.name for output in read(request(tensor())).outputs] == list(OUTPUTS)
    assert "unknown output 'scores'" in refusal(request(tensor(), outputs=[RequestedOutput("scores")]))
    assert "requested twice" in refusal(request(tensor(), outputs=[RequestedOutput("score")] * 2))
    assert "at least 1, not -1" in refusal(request(tensor(), outputs=[RequestedOutput("logits", -1)]))
    assert "not for label" in refusal(request(tensor(), outputs=[RequestedOutput("label", 1)]))


@dataclass(frozen=True)
class Task:
    labels: Sequence[str]
    version: str


LETTERS = Task(("a", "b", "ç"), "0123456789ab")
SIGNS = Task(("+", "-"), "ba9876543210")


def rows_of(tasks: Sequence[str], *outputs: RequestedOutput, top_k: int = 5) -> Rows:
    payloads = [RowImage(row, b"") for row in range(len(tasks))]
    return Rows(payloads, tasks, top_k, 0, None, outputs or [RequestedOutput(name) for name in OUTPUTS])


def written(rows: Rows, logits: Sequence[Sequence[float]], records: Sequence[Task]) -> dict[str, np.ndarray]:
    tensors = write_outputs(rows, [np.array(row, dtype=np.float32) for row in logits], records, ClassificationConfig())
    assert all(one.data.dtype == np.float32 for one in tensors if one.datatype != "BYTES")
    assert all(isinstance(text, bytes) for one in tensors if one.datatype == "BYTES" for text in one.data.flat)
    return {one.name: one.data for one in tensors}


def test_outputs_of_one_task() -> None:
    answer = written(rows_of(["letters"] * 2), [[0.0, 1.0, 3.0], [5.0, 0.0, 1.0]], [LETTERS] * 2)
    assert list(answer) == ["logits", "probabilities", "label", "score", "task", "task_version"]
    assert answer["logits"].tolist() == [[0.0, 1.0, 3.0], [5.0, 0.0, 1.0]]
    exponents = np.exp(np.array([[0.0, 1.0, 3.0], [5.0, 0.0, 1.0]]))
    np.testing.assert_allclose(answer["probabilities"], exponents / exponents.sum(1, keepdims=True), rtol=1e-7)
    assert answer["label"].tolist() == [["ç".encode(), b"b", b"a"], [b"a", "ç".encode(), b"b"]]
    assert np.array_equal(answer["score"], -np.sort(-answer["probabilities"], axis=1))
    assert answer["task"].tolist() == [b"letters"] * 2
    assert answer["task_version"].tolist() == [b"0123456789ab"] * 2


def test_outputs_of_mixed_tasks_are_padded_with_what_json_can_say() -> None:
    answer = written(rows_of(["signs", "letters"]), [[2.0, 1.0], [0.0, 1.0, 3.0]], [SIGNS, LETTERS])
    assert answer["logits"].tolist() == [[2.0, 1.0, PADDING], [0.0, 1.0, 3.0]]
    assert answer["probabilities"][0, 2] == 0.0
    np.testing.assert_allclose(answer["probabilities"].sum(1), 1.0, rtol=1e-6)
    assert answer["label"].tolist() == [[b"+", b"-"], ["ç".encode(), b"b"]]
    assert answer["score"].shape == (2, 2)
    assert answer["task_version"].tolist() == [b"ba9876543210", b"0123456789ab"]
    assert PADDING == json.loads(json.dumps(PADDING)) == np.finfo(np.float32).min


def test_top_k_counts_labels_and_scores() -> None:
    answer = written(
        rows_of(["letters"], RequestedOutput("score"), RequestedOutput("label"), top_k=1), [[0, 9, 1]], [LETTERS]
    )
    assert list(answer) == ["score", "label"]
    assert answer["label"].tolist() == [[b"b"]]
    assert answer["score"].shape == (1, 1)


def test_classification_as_triton_writes_it() -> None:
    wanted = [RequestedOutput("probabilities", 2), RequestedOutput("logits", 9)]
    answer = written(rows_of(["letters"], *wanted), [[0.0, 1.5, -1.0]], [LETTERS])
    assert answer["logits"].tolist() == [[b"1.500000:1:b", b"0.000000:0:a", "-1.000000:2:ç".encode()]]
    assert [text.split(b":")[1:] for text in answer["probabilities"][0]] == [[b"1", b"b"], [b"0", b"a"]]
    mixed = written(rows_of(["signs", "letters"], RequestedOutput("logits", 3)), [[2, 1], [0, 1, 3]], [SIGNS, LETTERS])
    assert mixed["logits"].tolist() == [[b"2.000000:0:+", b"1.000000:1:-"], ["3.000000:2:ç".encode(), b"1.000000:1:b"]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_no_answer(value: float) -> None:
    rows = rows_of(["letters"] * 2)
    logits = [[0.0, 1.0, 2.0], [0.0, value, 2.0]]
    with pytest.raises(ServeError, match="the task 'letters' gave logits that are not finite") as caught:
        written(rows, logits, [LETTERS] * 2)
    assert caught.value.http_status == 500
    sent = [RowImage(row, np.zeros((3, SIZE, SIZE), dtype=np.float32)) for row in range(2)]
    with pytest.raises(BadRequestError, match="image of row 1 is out of range"):
        written(dataclasses.replace(rows, payloads=sent), logits, [LETTERS] * 2)


def test_outputs_equal_the_engines_own_predictions() -> None:
    engine = pt.Engine(exported("linear"))
    tasks = ["task1", "task0", "task1", "task1", "task0"]
    images = noise(5, seed=3)
    records = [Task(engine.labels(task), engine.version(task)) for task in tasks]
    logits = [row[: len(record.labels)] for row, record in zip(engine.logits(images, tasks), records, strict=True)]
    found = write_outputs(rows_of(tasks, top_k=2), logits, records, engine.folder.manifest.task_type)
    answer = {one.name: one.data for one in found}
    for row, expected in enumerate(engine.predict(images, tasks, top_k=2)):
        assert [text.decode() for text in answer["label"][row]] == [score.label for score in expected.top_k]
        assert answer["score"][row].tolist() == [np.float32(score.probability) for score in expected.top_k]
        assert answer["task"][row].decode() == expected.task
        assert answer["task_version"][row].decode() == expected.task_version


@given(
    logits=st.lists(
        st.integers(1, 6).flatmap(
            lambda count: arrays.arrays(np.float32, count, elements=st.floats(-1e4, 1e4, width=32))
        ),
        min_size=1,
        max_size=6,
    ),
    top_k=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_scores_are_probabilities_best_first(logits: list[np.ndarray], top_k: int) -> None:
    records = [Task([str(index) for index in range(len(row))], "v") for row in logits]
    answer = written(rows_of(["t"] * len(logits), top_k=top_k), logits, records)
    assert answer["score"].shape == (len(logits), min(top_k, *map(len, logits)))
    for row, (own, probabilities) in enumerate(zip(logits, answer["probabilities"], strict=True)):
        assert abs(probabilities.sum(dtype=np.float64) - 1.0) < 1e-6
        assert not probabilities[len(own) :].any()
        assert np.all(np.diff(answer["score"][row]) <= 0)
        chosen = [probabilities[int(label)] for label in answer["label"][row]]
        assert chosen == answer["score"][row].tolist()
        # Logits that differ by less than a float64 softmax resolves share the first place.
        assert own[int(answer["label"][row][0])] == pytest.approx(own.max(), abs=1e-12)


# ------------------------------------------------------------- anything at all

ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=2)
)
DATATYPES = st.sampled_from(["FP32", "UINT8", "BYTES", "FP16", "INT64", "", "fp32"])


@st.composite
def any_tensor(draw: st.DrawFn) -> InputTensor:
    """What a transport may hand on: dtype and datatype agree, the rest is free."""
    datatype = draw(DATATYPES)
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=5)))
    shape = draw(st.sampled_from([shape, (1, 3, SIZE, SIZE), (2,), (1, 4, 4, 3)]))
    name = draw(st.sampled_from(["image", "image", "task", "", "ïmage"]))
    if datatype == "BYTES":
        count = int(np.prod(shape))
        values = (
            draw(st.lists(st.binary(max_size=120), min_size=count, max_size=count)) if count < 30 else [b""] * count
        )
        return InputTensor(name, datatype, bytes_array(values, shape), draw(st.booleans()))
    dtype = {"FP32": np.float32, "UINT8": np.uint8, "FP16": np.float16}.get(datatype, np.int64)
    value = draw(st.sampled_from([0, 1, 255])) if dtype is not np.float32 else draw(st.floats(width=32))
    return InputTensor(name, datatype, np.full(shape, value, dtype=dtype))


@given(
    inputs=st.lists(any_tensor(), max_size=3),
    model=st.sampled_from(["digits", MIXED, ""]),
    outputs=st.lists(
        st.builds(RequestedOutput, st.sampled_from([*OUTPUTS, "", "x" * 500]), st.integers(-2, 9)), max_size=3
    ),
    parameters=st.dictionaries(st.sampled_from(["top_k", "priority", "timeout", "other"]), ANYTHING, max_size=3),
)
@settings(max_examples=400, deadline=None)
def test_any_request_is_read_or_refused(
    inputs: list[InputTensor], model: str, outputs: list[RequestedOutput], parameters: dict[str, object]
) -> None:
    try:
        rows = read(request(*inputs, model=model, outputs=outputs, parameters=parameters))
    except (BadRequestError, TooLargeError) as problem:
        assert str(problem).isprintable()  # noqa: PT017  # anything else that is raised fails the test
    else:
        assert 1 <= len(rows.payloads) == len(rows.tasks) <= LIMITS.rows
