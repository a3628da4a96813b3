"""Memory that a rank shares with the other ranks of its host."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
from collections.abc import Sequence
from typing import NamedTuple

TOKEN_BYTES = 16
"""The first bytes of a region, which tell it from those of other jobs."""
HUGE_PAGE_BYTES = 1 << 21

_NAME = "embedtrain"


class Address(NamedTuple):
    """Tells another process of the host where to find a region."""

    pid: int
    file: int
    token: bytes


class Files:
    """Holds file descriptors, and closes them when nothing refers to it any more."""

    def __init__(self, files: Sequence[int]) -> None:
        self.files = files

    def __del__(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):
                os.close(file)


def create(num_bytes: int) -> tuple[memoryview, Address]:
    """Creates a region of this rank. Its file has no name in any file system, so it ends with the ranks.

    Args:
        num_bytes: size; a multiple of `HUGE_PAGE_BYTES`. Physical memory is allocated only where it is written.

    Returns:
        The region, zeros; and its address, whose file the caller must close after the other ranks have opened it.

    Raises:
        AttributeError, OSError: the system has no such memory.
    """
    file = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, num_bytes + HUGE_PAGE_BYTES)
        region = _map(file, num_bytes)
    except OSError:
        os.close(file)
        raise
    token = secrets.token_bytes(TOKEN_BYTES)
    region[:TOKEN_BYTES] = token
    return region, Address(os.getpid(), file, token)


def open_all(
    rank: int, own: memoryview, addresses: Sequence[Address], num_bytes: int
) -> tuple[list[memoryview], Files]:
    """Maps the region of every rank, and opens a pidfd of every other rank, which shows if its process dies.

    Args:
        rank: number of this rank.
        own: region of this rank.
        addresses: address of every rank's region.
        num_bytes: size of each region.

    Raises:
        AttributeError, OSError: a region cannot be opened, because the rank is on another host or in another container.
    """
    regions, peers = [], []
    try:
        for sender, address in enumerate(addresses):
            if sender == rank:
                regions.append(own)
            else:
                peers.append(os.pidfd_open(address.pid))
                regions.append(_open(address, num_bytes))
    except OSError:
        for file in peers:
            os.close(file)
        raise
    return regions, Files(peers)


def _open(address: Address, num_bytes: int) -> memoryview:
    path = f"/proc/{address.pid}/fd/{address.file}"
    # If the rank is on another host, this host may have the same pid and descriptor, but not this name and token.
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise FileNotFoundError(f"{path} is not shared memory of this package")
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        region = _map(file, num_bytes)
    except ValueError as error:
        raise FileNotFoundError(f"{path} has another size") from error
    finally:
        os.close(file)
    if region[:TOKEN_BYTES] != address.token:
        raise FileNotFoundError(f"{path} belongs to another job")
    return region


def _map(file: int, num_bytes: int) -> memoryview:
    """Maps a file of `num_bytes + HUGE_PAGE_BYTES` bytes at an address where its huge pages can be mapped as such."""
    from embedtrain.ops._backend import library

    mapped = mmap.mmap(file, num_bytes + HUGE_PAGE_BYTES)
    whole = memoryview(mapped)
    address = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    lead = -address % HUGE_PAGE_BYTES
    if lead:
        # The start of the file moves to the first whole huge page. The rest stays mapped until `mapped` is closed.
        error = ctypes.c_int64()
        library.get().embedtrain_map_file(address + lead, num_bytes, file, ctypes.addressof(error))
        if error.value:
            raise OSError(error.value, os.strerror(error.value))
    return whole[lead : lead + num_bytes]
