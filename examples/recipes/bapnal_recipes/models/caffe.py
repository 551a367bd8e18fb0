"""Weights out of a ``.caffemodel``, without Caffe and without its protobuf definitions.

A ``.caffemodel`` is one protobuf message, ``NetParameter``. Read are the names and blobs of its
layers, in the current layout (field 100, ``LayerParameter``) and in that of files from 2014
(field 2, ``V1LayerParameter``). All other fields are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

LAYERS = {100: (1, 7), 2: (4, 6)}  # field of NetParameter: fields of a layer's name and blobs
DATA, DOUBLE_DATA, SHAPE, LEGACY_SHAPE = 5, 8, 7, (1, 2, 3, 4)  # fields of BlobProto
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types

Field = tuple[int, int, "int | memoryview"]  # number, wire type, value


def read_caffemodel(path: Path) -> dict[str, Tensor]:
    """Read all weights as ``LAYER.weight`` and ``LAYER.bias``.

    Args:
        path: The file.

    Returns:
        Float tensors; weights of convolutions ``(outputs, inputs, height, width)``, of fully
        connected layers ``(outputs, inputs)``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a ``.caffemodel``, or holds no weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    found: dict[str, Tensor] = {}
    try:
        for number, wire, value in _fields(memoryview(path.read_bytes())):
            if number in LAYERS and wire == DELIMITED:
                found |= _layer(_bytes(value), *LAYERS[number])
    except (IndexError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} must be a .caffemodel: {error}") from error
    if not found:
        raise ValueError(f"{path} must be a .caffemodel with weights, has none")
    return found


def _layer(message: memoryview, name_field: int, blob_field: int) -> dict[str, Tensor]:
    """Return the first two blobs of a layer by their names."""
    name, blobs = "", []
    for number, wire, value in _fields(message):
        if number == name_field and wire == DELIMITED:
            name = bytes(_bytes(value)).decode()
        elif number == blob_field and wire == DELIMITED:
            blobs.append(_blob(_bytes(value)))
    return {f"{name}.{kind}": blob for kind, blob in zip(("weight", "bias"), blobs, strict=False)}


def _blob(message: memoryview) -> Tensor:
    """Return a blob; ``num, channels, height, width`` of old files lose leading ones."""
    legacy = dict.fromkeys(LEGACY_SHAPE, 1)
    shape: list[int] | None = None
    parts = []
    for number, wire, value in _fields(message):
        if number in legacy and wire == VARINT:
            legacy[number] = int(value)
        elif number == SHAPE and wire == DELIMITED:
            shape = _shape(_bytes(value))
        elif number in (DATA, DOUBLE_DATA):
            kind = "<f4" if number == DATA else "<f8"
            parts.append(np.frombuffer(_bytes(value), kind).astype(np.float32))
    data = torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0)
    if shape is None:
        shape = list(legacy.values())
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
    return data.reshape(shape)


def _shape(message: memoryview) -> list[int]:
    """Return the dimensions in a ``BlobShape``, packed or one by one."""
    found: list[int] = []
    for number, wire, value in _fields(message):
        if number == 1 and wire == VARINT:
            found.append(int(value))
        elif number == 1:
            packed, place = _bytes(value), 0
            while place < len(packed):
                size, place = _varint(packed, place)
                found.append(size)
    return found


def _fields(message: memoryview) -> Iterator[Field]:
    """Go through the fields of a message."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, place = _varint(message, place)
            yield number, wire, value
            continue
        if wire == DELIMITED:
            length, place = _varint(message, place)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"byte {place} has the unknown wire type {wire}")
        if place + length > len(message):
            raise ValueError(f"a field of {length} bytes ends after the file")
        yield number, wire, message[place : place + length]
        place += length


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Return a number of variable length, and where the next field begins."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a field must hold bytes, has a number")
    return value
