"""Packs the part of NVIDIA DALI that decodes images into one file, for a machine without a network.

    python -m benchmarks.gpu.make_dali_kit [--python 3.12] [--arch 90] [--out runs/dali_kit.tar.xz]

The wheels come from PyPI through pip. Kept are DALI itself with the libraries that it is linked to,
nvImageCodec with its JPEG, PNM, BMP and OpenCV parts, nvJPEG, and what they import; video, audio,
other Pythons, headers and compressors are left out. DALI (Apache-2.0) is stripped, and the device
code for other GPUs than --arch in it is overwritten with zeros, which compress well; NVIDIA's other
libraries stay as they are. The file is for one's own use and is never committed. To use it:

    tar xf dali_kit.tar.xz -C DIR && PYTHONPATH=DIR python -c 'import nvidia.dali'

There it needs numpy and typing_extensions, which torch brings. Here it needs pip, strip (binutils)
and xz, and takes two minutes of two cores: 52.7 MiB for Python 3.12 and sm_90, tried on a CPU under
Python 3.11 and 3.12, never on a GPU. With the same Python as --python it is tried out on the CPU.
"""

from __future__ import annotations

import argparse
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

WHEELS = ("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-nvjpeg")
PURE = ("astunparse", "gast", "makefun", "six", "packaging")
COMPILED = ("optree",)
UNUSED = (
    "nvidia/dali/include",
    "nvidia/dali/test",
    "nvidia/nvimgcodec/include",
    "nvidia/nvimgcodec/tools",
    "nvidia/*/*cpython*",  # those of one Python are put back
    "nvidia/nvimgcodec/extensions/*nvjpeg2k*",
    "nvidia/nvimgcodec/extensions/*tiff*",
    "nvidia/dali/python_function_plugin*",
)
FATBIN = 0xBA55ED50  # magic number of a container of device code
TRIAL = """
import io, numpy as np
from PIL import Image
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline
out = io.BytesIO()
Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)).save(out, "JPEG")
pipe = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
with pipe:
    data = fn.external_source(name="x", ndim=1, dtype=types.UINT8)
    pixels = fn.decoders.image(data, output_type=types.RGB)
    part = fn.slice(pixels, start=[2, 3], shape=[40, 30], axes=(0, 1))
    pipe.set_outputs(pixels, fn.resize(part, size=[20, 24]))
pipe.build()
pipe.feed_input("x", [np.frombuffer(out.getvalue(), np.uint8)])
pixels, part = (np.asarray(o.as_tensor())[0] for o in pipe.run())
assert (pixels == np.asarray(Image.open(out))).all() and part.shape == (20, 24, 3)
print("the kit decodes, cuts and resizes on the CPU")
"""


def download(folder: Path, python: str, version: str) -> list[Path]:
    """Fetches the wheels."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    platforms = [
        option
        for name in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
        for option in ("--platform", f"{name}_x86_64")
    ]
    own = ["--only-binary=:all:", "--python-version", python, *platforms]
    first, *others = WHEELS
    subprocess.run([*pip, *own, f"{first}{version}", *others, *COMPILED, *PURE], check=True)
    return sorted(folder.glob("*.whl"))


def thin_out(root: Path, python: str) -> None:
    """Removes what images do not need."""
    tag = "cpython-" + python.replace(".", "") + "-"
    kept = {path for path in root.glob("nvidia/*/*cpython*") if tag in path.name}
    for pattern in UNUSED:
        for path in set(root.glob(pattern)) - kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def device_code(data: bytes | bytearray) -> Iterator[tuple[int, int, int]]:
    """Finds the programs in a library's containers of device code.

    Yields:
        Architecture (90 for sm_90), first byte and length of each.
    """
    at = data.find(struct.pack("<I", FATBIN))
    while at >= 0:
        _, _, header, size = struct.unpack_from("<IHHQ", data, at)
        entry, end = at + header, at + header + size
        if header == 16 and end <= len(data):
            while entry + 64 <= end:
                _, _, length = struct.unpack_from("<HHI", data, entry)
                payload = struct.unpack_from("<Q", data, entry + 8)[0]
                if length < 64 or entry + length + payload > end:
                    break
                yield struct.unpack_from("<I", data, entry + 28)[0], entry + length, payload
                entry += length + payload
        at = data.find(struct.pack("<I", FATBIN), at + 4)


def blank(library: Path, arch: int) -> int:
    """Overwrites the device code for other architectures; returns how many bytes that were."""
    data = bytearray(library.read_bytes())
    gone = 0
    for found, start, length in list(device_code(data)):
        if found != arch:
            data[start : start + length] = bytes(length)
            gone += length
    if gone:
        library.write_bytes(data)
    return gone


def build(root: Path, wheels: Sequence[Path], python: str, arch: int) -> None:
    """Makes the kit's folder."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root)
    thin_out(root, python)
    extend = "from pkgutil import extend_path\n\n__path__ = extend_path(__path__, __name__)\n"
    (root / "nvidia" / "__init__.py").write_text(extend)  # torch has its own nvidia.*
    for library in sorted((root / "nvidia" / "dali").rglob("*.so*")):
        subprocess.run(["strip", "--strip-unneeded", str(library)], check=True)
        if gone := blank(library, arch):
            print(f"{library.name}: {gone / 1e6:.0f} MB for other GPUs than sm_{arch} blanked")


def main(argv: Sequence[str] | None = None) -> int:
    """Download, thin out, pack, try."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", default="3.12", help="of the machine it is for")
    parser.add_argument("--arch", type=int, default=90, help="its GPU: 90 for H100 and H200")
    parser.add_argument("--version", default="==2.4.0", help="of nvidia-dali-cuda130")
    parser.add_argument("--out", type=Path, default=Path("runs/dali_kit.tar.xz"))
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheels, root = Path(folder, "wheels"), Path(folder, "kit")
        wheels.mkdir()
        root.mkdir()
        build(root, download(wheels, args.python, args.version), args.python, args.arch)
        if args.python == f"{sys.version_info.major}.{sys.version_info.minor}":
            trial = [
                sys.executable,
                "-c",
                f"import sys; sys.path.insert(0, {str(root)!r})\n{TRIAL}",
            ]
            subprocess.run(trial, check=True)
        with args.out.open("wb") as out:
            packed = subprocess.Popen(
                ["xz", "--x86", "--lzma2=preset=6,dict=64MiB", "-T2", "--stdout"],
                stdin=subprocess.PIPE,
                stdout=out,
            )
            subprocess.run(["tar", "c", "-C", str(root), "."], stdout=packed.stdin, check=True)
            assert packed.stdin is not None
            packed.stdin.close()
            if packed.wait():
                return 1
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
