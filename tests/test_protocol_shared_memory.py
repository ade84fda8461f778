"""Tensors in system shared memory, with Triton's own client; and what must not happen through them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from prompttune.serve.limits import Limits
from prompttune.serve.messages import BadRequestError, NotFoundError
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.protocol.shared_memory import MOST_REGIONS, Regions
from tests.fake_service import LABELS, Running, serving
from tests.protocol_clients import IMAGE, LOGITS, MODULES, Client, connected

KEY = f"/prompttune-test-{os.getpid()}"
SIZE = 4096

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="POSIX shared memory as Linux has it")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(TransportSettings(Limits(body_bytes=2**20), shared_memory=True)) as servers:
        yield servers


@pytest.fixture(params=sorted(MODULES))
def client(request: pytest.FixtureRequest, running: Running) -> Iterator[Client]:
    with connected(request.param, running) as one:
        yield one
        one.unregister_system_shared_memory()


@pytest.fixture
def region() -> Iterator[Any]:
    """Of 4096 bytes, of which the image takes the first 384."""
    handle = shm.create_shared_memory_region("data", KEY, SIZE)
    shm.set_shared_memory_region(handle, [IMAGE])
    yield handle
    shm.destroy_shared_memory_region(handle)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def image_in(client: Client, size: int = IMAGE.nbytes, offset: int = 0, name: str = "data") -> Any:
    tensor = client.module.InferInput("image", IMAGE.shape, "FP32")
    tensor.set_shared_memory(name, size, offset=offset)
    return tensor


def output_in(client: Client, name: str, size: int, offset: int) -> Any:
    tensor = client.output(name)
    tensor.set_shared_memory("data", size, offset=offset)
    return tensor


def test_inputs_and_outputs(client: Client, region: Any) -> None:
    client.register_system_shared_memory("data", KEY, SIZE)
    status = client.values("get_system_shared_memory_status")
    [found] = status if client.is_http else status["regions"].values()
    assert (found["name"], found["key"], int(found["byte_size"])) == ("data", KEY, SIZE)
    outputs = [output_in(client, "logits", 256, 1024), client.output("label")]
    for _ in range(2):
        answer = client.infer("pets", [image_in(client)], outputs=outputs)
        assert [one.decode() for one in answer.as_numpy("label").ravel()] == ["bird", "cät"]
        found = answer.get_output("logits")
        shape = found["shape"] if client.is_http else found.shape
        assert not client.is_http or "parameters" not in found
        np.testing.assert_array_equal(shm.get_contents_as_numpy(region, np.float32, list(shape), 1024), LOGITS)
    client.unregister_system_shared_memory("data")
    assert client.values("get_system_shared_memory_status") in ([], {})
    with pytest.raises(InferenceServerException, match="no shared memory region 'data'"):
        client.infer("pets", [image_in(client)])


def test_both_transports_know_a_region(running: Running, region: Any) -> None:
    with connected("http", running) as one, connected("grpc", running) as other:
        one.register_system_shared_memory("data", KEY, SIZE - 256, offset=256)
        shm.set_shared_memory_region(region, [IMAGE], offset=256 + 64)
        answer = other.infer("pets", [image_in(other, offset=64)])
        np.testing.assert_array_equal(answer.as_numpy("logits"), LOGITS)
        assert "system_shared_memory" in other.get_server_metadata().extensions
        other.unregister_system_shared_memory()
        assert one.get_system_shared_memory_status() == []


def test_strings(client: Client, region: Any) -> None:
    packed = serialize_byte_tensor(np.array([b"abc", b"de"], dtype=object))
    shm.set_shared_memory_region(region, [packed])
    client.register_system_shared_memory("data", KEY, SIZE)
    tensor = client.module.InferInput("image", [2], "BYTES")
    tensor.set_shared_memory("data", len(packed.item()))
    answer = client.infer("pets", [tensor], outputs=[client.output("logits"), output_in(client, "label", 64, 2048)])
    np.testing.assert_array_equal(answer.as_numpy("logits")[:, 0], [3, 2])
    labels = shm.get_contents_as_numpy(region, np.object_, [2, 1], 2048)
    assert [one.decode() for one in labels.ravel()] == ["bird", "cät"]
    assert set(LABELS) >= {labels[0, 0].decode()}


@pytest.mark.parametrize(
    ("size", "offset", "said"),
    [
        (IMAGE.nbytes - 4, 0, "needs 384"),
        (IMAGE.nbytes, SIZE - IMAGE.nbytes + 1, "leave the region"),
        (2**62, 2**62, "leave the region"),
        (2 * SIZE, 0, "leave the region"),
    ],
)
def test_a_tensor_lies_inside_its_region(client: Client, region: Any, size: int, offset: int, said: str) -> None:
    client.register_system_shared_memory("data", KEY, SIZE)
    with pytest.raises(InferenceServerException, match=said):
        client.infer("pets", [image_in(client, size, offset)])
    with pytest.raises(InferenceServerException, match="room for 8"):
        client.infer("pets", [image_in(client)], outputs=[output_in(client, "logits", 8, 0)])
    assert client.is_server_live()


def test_a_region_that_shrinks_is_an_error_and_not_the_servers_end(client: Client, region: Any) -> None:
    client.register_system_shared_memory("data", KEY, SIZE)
    outputs = [output_in(client, "logits", 256, 1024)]
    os.truncate(f"/dev/shm{KEY}", 512)
    with pytest.raises(InferenceServerException, match="smaller than it was"):
        client.infer("pets", [image_in(client)], outputs=outputs)
    os.truncate(f"/dev/shm{KEY}", 16)
    with pytest.raises(InferenceServerException, match="smaller than it was"):
        client.infer("pets", [image_in(client)])
    assert Path(f"/dev/shm{KEY}").stat().st_size == 16
    os.truncate(f"/dev/shm{KEY}", SIZE)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        ".",
        "..",
        "/..",
        "../etc/passwd",
        "/../dev/shm/x",
        "a/b",
        "//x",
        "/sem.x",
        "a\0b",
        "a\nb",
        "x" * 256,
        "missing",
    ],
)
def test_no_key_leaves_shared_memory(client: Client, key: str) -> None:
    with pytest.raises(InferenceServerException, match=r"not a key of shared memory|cannot be opened"):
        client.register_system_shared_memory("data", key, 16)
    assert client.values("get_system_shared_memory_status") in ([], {})


def test_only_objects_of_shared_memory_are_opened(tmp_path: Path) -> None:
    regions, base = Regions(allowed=True), Path(f"/dev/shm{KEY}-odd")
    (tmp_path / "secret").write_bytes(bytes(64))
    for make in (lambda: base.symlink_to(tmp_path / "secret"), base.mkdir, lambda: os.mkfifo(base)):
        make()
        try:
            with pytest.raises(BadRequestError, match=r"cannot be opened|not shared memory"):
                regions.register("odd", base.name, 0, 16)
        finally:
            with contextlib.suppress(OSError):
                base.unlink()
            with contextlib.suppress(OSError):
                base.rmdir()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("", KEY, 0, 16), "needs a name"),
        (("x" * 256, KEY, 0, 16), "needs a name"),
        (("one", None, 0, 16), "not a key"),
        (("one", 7, 0, 16), "not a key"),
        (("one", KEY, -1, 16), "number of bytes"),
        (("one", KEY, 0, None), "number of bytes"),
        (("one", KEY, 0, True), "number of bytes"),
        (("one", KEY, 0, 1.5), "number of bytes"),
        (("one", KEY, 0, 2**64), "number of bytes"),
        (("one", KEY, 0, 0), "has 4096 bytes"),
        (("one", KEY, 0, SIZE + 1), "has 4096 bytes"),
        (("one", KEY, SIZE, 1), "has 4096 bytes"),
    ],
)
def test_registrations_that_are_refused(region: Any, values: tuple[Any, ...], said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        Regions(allowed=True).register(*values)


def test_regions_are_bounded_and_closed(region: Any) -> None:
    regions, before = Regions(allowed=True), descriptors()
    for number in range(MOST_REGIONS):
        regions.register(str(number), KEY, 0, 16)
    with pytest.raises(BadRequestError, match="unregister one first"):
        regions.register("more", KEY, 0, 16)
    with pytest.raises(BadRequestError, match="registered already"):
        regions.register("0", KEY, 0, 16)
    span = regions.span({"shared_memory_region": "0", "shared_memory_byte_size": 4}, "output 'logits'")
    assert span is not None
    regions.unregister("0")
    with pytest.raises(NotFoundError):
        regions.status("0")
    assert span.write(b"abcd")["shared_memory_byte_size"] == 4, "a request that runs keeps its region"
    del span
    regions.unregister()
    assert descriptors() == before


@pytest.mark.parametrize(
    "parameters", [{"shared_memory_offset": 0}, {"shared_memory_region": 3}, {"shared_memory_region": "data"}]
)
def test_parameters_that_name_no_place(region: Any, parameters: dict[str, Any]) -> None:
    regions = Regions(allowed=True)
    regions.register("data", KEY, 0, 16)
    with pytest.raises(BadRequestError, match="input 'image'"):
        regions.span(parameters, "input 'image'")
