"""Pack Python wheels into parts for a GPU machine that has no network, with a script that puts them together there (docs/gpu.md).

    python benchmarks/pack_gpu_wheels.py parts tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116
    python benchmarks/pack_gpu_wheels.py parts my_wheels/pycuda-2026.1-cp312-cp312-linux_x86_64.whl

On the GPU machine:

    python3 parts/unpack.py parts site && export PYTHONPATH=$PWD/site

It needs Python's own library and pip alone. Wheels come from wherever pip is set up to look; their dependencies do not come along.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PART_MIB = 56
GLIBC = range(17, 40)
"""Every manylinux_2_N in use: pip matches platforms word for word, and projects tag their wheels with many of them."""

UNPACK = '''"""Put the parts together: python3 unpack.py PARTS SITE. Plain Python, no network."""

import hashlib
import io
import pathlib
import sys
import tarfile

if len(sys.argv) != 3:
    sys.exit("use: python3 unpack.py PARTS SITE")
parts, site = map(pathlib.Path, sys.argv[1:])
pieces = []
for line in (parts / "parts.sha256").read_text().splitlines():
    wanted, name = line.split()
    path = parts / name
    if not path.is_file():
        sys.exit(f"{path} is missing: bring every part, and put them into one folder")
    piece = path.read_bytes()
    if hashlib.sha256(piece).hexdigest() != wanted:
        sys.exit(f"{path} is damaged or cut short: copy it again")
    pieces.append(piece)
site.mkdir(parents=True, exist_ok=True)
with tarfile.open(fileobj=io.BytesIO(b"".join(pieces)), mode="r:xz") as packed:
    packed.extractall(site, filter="data")
print(f"{len(pieces)} parts unpacked; now: export PYTHONPATH={site.resolve()}")
'''


def fetch(requirement: str, python: str, folder: Path) -> None:
    """Have pip download one wheel for Linux on x86-64. Exits with pip's own words when there is none."""
    platforms = [f"manylinux_2_{n}_x86_64" for n in reversed(GLIBC)] + [
        "manylinux2014_x86_64",
        "manylinux1_x86_64",
        "linux_x86_64",
    ]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
    ]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [word for platform in platforms for word in ("--platform", platform)]
    ended = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        sys.exit(f"{requirement}: {last[0]}")


def site_of(wheels: list[Path]) -> bytes:
    """The wheels' contents as a site folder, packed by tar and xz; the same wheels give the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        buffer = io.BytesIO()
        paths = sorted(Path(folder).rglob("*"))
        total, done, told = sum(path.stat().st_size for path in paths if path.is_file()), 0, 0
        say(f"packing {total / 2**20:.0f} MiB, about a minute for each 100")
        with lzma.open(buffer, "w", preset=6) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
            for path in paths:
                tar.add(path, path.relative_to(folder).as_posix(), recursive=False, filter=_anonymous)
                done += path.stat().st_size if path.is_file() else 0
                if 10 * done // max(total, 1) > told:
                    told = 10 * done // total
                    say(f"  {10 * told} %")
        return buffer.getvalue()


def say(line: str) -> None:
    """Print a line of progress at once, on stderr, apart from the result."""
    print(line, file=sys.stderr, flush=True)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() or member.name.endswith((".so", ".sh")) or ".so." in member.name else 0o644
    return member


def write_parts(data: bytes, out: Path, size: int) -> list[Path]:
    """OUT/part.000 and so on, parts.sha256 and unpack.py; parts of an earlier packing are removed."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("part.[0-9][0-9][0-9]"):
        old.unlink()
    paths = []
    for number, start in enumerate(range(0, len(data), size)):
        path = out / f"part.{number:03d}"
        path.write_bytes(data[start : start + size])
        paths.append(path)
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.name}\n" for path in paths]
    (out / "parts.sha256").write_text("".join(sums))
    (out / "unpack.py").write_text(UNPACK)
    return paths


def main(argv: list[str] | None = None) -> None:
    """The command line: a folder, then names with versions, or files of wheels that were built by hand."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="folder for the parts")
    parser.add_argument("wheels", nargs="+", metavar="NAME==VERSION", help="or the path of a .whl file")
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python (3.12)")
    parser.add_argument("--part-mib", type=int, default=PART_MIB, help=f"largest part ({PART_MIB})")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for wheel in options.wheels:
            if wheel.endswith(".whl"):
                if not Path(wheel).is_file():
                    sys.exit(f"{wheel} does not exist")
                shutil.copy(wheel, folder)
            elif re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[^=]+", wheel):
                say(f"downloading {wheel}")
                fetch(wheel, options.python, Path(folder))
            else:
                sys.exit(f"{wheel}: name a version, as in numpy==2.2.0, or the path of a .whl file")
        found = sorted(Path(folder).glob("*.whl"))
        data = site_of(found)
    parts = write_parts(data, options.out, options.part_mib * 2**20)
    print(
        f"{len(found)} wheels, {len(data) / 2**20:.1f} MiB, {len(parts)} part{'s' * (len(parts) != 1)} in {options.out}: {', '.join(w.name for w in found)}"
    )


if __name__ == "__main__":
    main()
