"""The safetensors format, read lazily and strictly, and written as a stream.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the data
without gaps (format: huggingface.co/docs/safetensors). Tensors are views of a private mapping: nothing is read until
it is used.
"""

import json
import math
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pagoda.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the format's own limit


class SafetensorsFile:
    """One open file. `names` lists its tensors; `get` gives one without copying."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as f:
                self._size = os.fstat(f.fileno()).st_size
                self._header = self._read_header(f)
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
                if hasattr(mmap, "MADV_WILLNEED"):
                    self._map.madvise(mmap.MADV_WILLNEED)  # read ahead while tensors are taken one by one
        except OSError as e:
            raise CheckpointError(f"{path} cannot be opened ({e.strerror}): check that the file is there.") from None
        self.names = frozenset(self._header)

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged ({why}): download or convert it again.")

    def _read_header(self, f: BinaryIO) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
        """name -> (dtype, shape, offset in the file); checks that the data are complete, in order and without gaps."""
        length = int.from_bytes(f.read(8), "little")
        if self._size < 8 or length > min(MAX_HEADER, self._size - 8):
            raise self._damaged(f"its header claims {length} bytes of {self._size}")
        try:
            header = json.loads(f.read(length))
            entries = [(name, *self._entry(value)) for name, value in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise self._damaged(f"its header is not valid: {type(e).__name__}") from None
        end = 0
        for name, dtype, shape, start, stop in sorted(entries, key=lambda e: (e[3], e[4])):
            if start != end or stop - start != math.prod(shape) * dtype.itemsize:
                raise self._damaged(f"tensor {name} does not lie where its header says")
            end = stop
        if 8 + length + end != self._size:
            raise self._damaged(f"it has {self._size} bytes where its header needs {8 + length + end}")
        return {name: (dtype, shape, 8 + length + start) for name, dtype, shape, start, _ in entries}

    def _entry(self, value: dict[str, Any]) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        if value["dtype"] not in DTYPES:
            raise self._damaged(f"it has tensors of type {value['dtype']!r}, which Pagoda does not know")
        shape, (start, stop) = tuple(value["shape"]), value["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
            raise ValueError
        return DTYPES[value["dtype"]], shape, start, stop

    def get(self, name: str) -> Tensor:
        """The tensor of this name, a view of the file (copied when the file does not align it)."""
        dtype, shape, offset = self._header[name]
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if offset % dtype.itemsize:
            raw = bytearray(self._map[offset : offset + count * dtype.itemsize])
            return torch.frombuffer(raw, dtype=dtype).view(shape)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(shape)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One file of all of them."""
    writer = SafetensorsWriter(path, len(tensors))
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


class SafetensorsWriter:
    """Writes tensors one after the other, so that only one is in memory. Room for the header is kept in front and
    filled in by `close`; `max_tensors` bounds how many there may be."""

    def __init__(self, path: Path, max_tensors: int):
        self._room = -(-(8 + 160 * max_tensors + 256) // 4096) * 4096 - 8  # data begin on a page
        self._file = path.open("wb")
        self._file.write(bytes(8 + self._room))
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._end = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; names are unique."""
        assert name not in self._header
        data = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
        shape, start = list(tensor.shape), self._end
        self._end += data.nbytes
        self._header[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, self._end]}
        self._file.write(data.data)

    def close(self) -> None:
        """Write the header and flush to the disk."""
        header = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._room)
        assert len(header) == self._room
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
