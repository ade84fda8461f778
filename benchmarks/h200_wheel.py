"""The wheel of onnxruntime-gpu in pieces, for a GPU machine without network that takes small files alone.

``pack`` keeps the machine code of one compute capability in the CUDA provider and leaves out the two libraries that
Python does not load (the C library and TensorRT's provider). ``--whole`` keeps the wheel as it is.

python -m pip download onnxruntime-gpu==1.31.1 --no-deps --python-version 3.12 --only-binary=:all: -d wheels
python -m benchmarks.h200_wheel pack wheels/onnxruntime_gpu-*.whl pieces
python -m benchmarks.h200_wheel unpack pieces /tmp/ort       # there; then PYTHONPATH=/tmp/ort
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import click

PROVIDER = "libonnxruntime_providers_cuda.so"
UNUSED = ("onnxruntime/capi/libonnxruntime.so", "onnxruntime/capi/libonnxruntime_providers_tensorrt.so")
"""Beginnings of names of files that ``import onnxruntime`` does not load."""
INDEX = "pieces.json"
ARCHIVE = "onnxruntime.tar.xz"
_FATBIN, _CUBIN = 0xBA55ED50, 2
_MIB = 2**20


def fatbin_section(library: bytes | bytearray) -> tuple[int, int]:
    """Offset and size of a 64-bit ELF library's section ``.nv_fatbin``."""
    table, (size, count, names) = struct.unpack_from("<Q", library, 40)[0], struct.unpack_from("<HHH", library, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", library, table + size * number) for number in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        if library[start : library.index(0, start)] == b".nv_fatbin":
            return header[4], header[5]
    raise click.ClickException(f"{PROVIDER} has no section .nv_fatbin: pack with --whole")


def keep_one(library: bytearray, capability: int) -> tuple[int, int]:
    """Zero all machine code that is not for ``capability`` (90 for 9.0), in place; headers stay, so offsets do too.

    The section is a row of containers (magic, version u16, header u16, size u64), each a row of entries (kind u16,
    version u16, header u32, size u64, capability u32 at 28), see cuobjdump's ``--list-elf``.

    Returns:
        Entries kept, entries zeroed.
    """
    position, size = fatbin_section(library)
    end, kept, zeroed = position + size, 0, 0
    while position < end:
        magic, _, header, length = struct.unpack_from("<IHHQ", library, position)
        if magic != _FATBIN:
            position += 8  # padding
            continue
        entry, position = position + header, position + header + length
        while entry < position:
            kind, _, header, length = struct.unpack_from("<HHIQ", library, entry)
            capable = struct.unpack_from("<I", library, entry + 28)[0]
            start, entry = entry + header, entry + header + length
            if (kind, capable) == (_CUBIN, capability):
                kept += 1
            else:
                library[start:entry] = bytes(length)
                zeroed += 1
    if not kept:
        raise click.ClickException(f"{PROVIDER} holds no code for compute capability {capability / 10}: use --whole")
    return kept, zeroed


def pack_wheel(wheel: Path, folder: Path, capability: int | None, piece: int) -> list[Path]:
    """Write a wheel as an archive in pieces of at most ``piece`` bytes; None keeps every capability and every file."""
    folder.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    with zipfile.ZipFile(wheel) as files, tarfile.open(fileobj=packed, mode="w:xz", preset=1) as archive:
        for name in (one for one in files.namelist() if not one.endswith("/")):
            if capability and name.startswith(UNUSED):
                continue
            data = bytearray(files.read(name))
            if capability and name.endswith(PROVIDER):
                kept, zeroed = keep_one(data, capability)
                click.echo(f"{PROVIDER}: {kept} entries kept, {zeroed} zeroed")
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o644
            archive.addfile(entry, io.BytesIO(data))
    data = packed.getvalue()
    pieces = {}
    for number, start in enumerate(range(0, len(data), piece)):
        name, part = f"{ARCHIVE}.{number}", data[start : start + piece]
        (folder / name).write_bytes(part)
        pieces[name] = hashlib.sha256(part).hexdigest()
        click.echo(f"{name}  {len(part) / _MIB:.1f} MiB")
    (folder / INDEX).write_text(json.dumps(pieces, indent=1))
    return [folder / name for name in pieces]


def unpack_pieces(folder: Path, target: Path) -> None:
    """Check the pieces of :func:`pack_wheel` and extract them; ``target`` then belongs on ``PYTHONPATH``."""
    data = b""
    for name, digest in json.loads((folder / INDEX).read_text()).items():
        part = (folder / name).read_bytes() if (folder / name).is_file() else b""
        if hashlib.sha256(part).hexdigest() != digest:
            raise click.ClickException(f"{folder / name} is {'damaged' if part else 'missing'}: copy it again")
        data += part
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:xz") as archive:
        archive.extractall(target, filter="data")


@click.group(help=__doc__)
def main() -> None:
    pass


@main.command()
@click.argument("wheel", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--capability", default=90, show_default=True, help="Compute capability to keep, times ten.")
@click.option("--whole", is_flag=True, help="Keep the whole wheel.")
@click.option("--piece-mib", default=32.0, show_default=True, help="Largest size of a piece.")
def pack(wheel: Path, folder: Path, capability: int, whole: bool, piece_mib: float) -> None:
    """Write WHEEL into FOLDER in pieces."""
    pack_wheel(wheel, folder, None if whole else capability, int(piece_mib * _MIB))


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
def unpack(folder: Path, target: Path) -> None:
    """Extract the pieces in FOLDER to TARGET."""
    unpack_pieces(folder, target)


if __name__ == "__main__":
    main()
