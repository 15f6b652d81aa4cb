"""Tiny pictures and videos that tests write."""

import io
import os
import tarfile
import zipfile

import numpy as np
from PIL import Image

SIDE = 8


def png(number, side=SIDE):
    """A picture unlike any other, as the bytes of a PNG file."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pixels_of(content):
    """uint8 `[height, width, 3]`."""
    return np.asarray(Image.open(io.BytesIO(content)))


def write(folder, contents):
    """Writes `{name: bytes}` below a folder."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def write_tar(path, contents):
    """Writes `{name: bytes}` as an archive, compressed as its name says."""
    compression = path.suffix[1:]
    mode = f"w:{compression}" if compression in ("gz", "xz", "bz2") else "w"
    with tarfile.open(path, mode) as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def write_zip(path, contents):
    """Writes `{name: bytes}` as an archive."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return str(path)


def many(count, folders=("a", "b")):
    """So many pictures, by name, in turn in each of the folders."""
    return {
        os.path.join(folders[n % len(folders)], f"{n:03}.png"): png(n)
        for n in range(count)
    }
