"""Headers of tar files against the standard library's reader, whole and damaged."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_cases import sample, write_tar

from dml_fast.data.readers.samples import TarMembers, read_index
from dml_fast.data.readers.tar import DamagedTarError, Member, Reader, walk
from dml_fast.data.storage import CorruptImageError
from dml_fast.errors import UserError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def ours(path: Path) -> list[Member]:
    with path.open("rb") as file:
        return list(walk(Reader(file.fileno())))


def theirs(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [Member(m.name, m.offset_data, m.size) for m in tar if m.isfile()]


@given(
    st.lists(
        st.tuples(
            st.text("abcé图./ ", min_size=1, max_size=130).filter(lambda name: name.strip("./ ")),
            st.integers(0, 1500),
        ),
        max_size=6,
    ),
    st.sampled_from(FORMATS[1:]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_members_are_the_standard_librarys(
    tmp_path: Path, files: list[tuple[str, int]], format: int
) -> None:
    path = write_tar(tmp_path / "x.tar", [(n, b"\xff" * size) for n, size in files], format)
    expected = theirs(path)
    for mine, other in zip(ours(path), expected, strict=True):
        assert mine[1:] == other[1:]
        assert mine.name == "/".join(p for p in other.name.split("/") if p not in ("", "."))


@pytest.mark.parametrize("format", FORMATS)
def test_folders_links_and_long_names(format: int, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    long = "/".join(["folder" * 5] * 4) + "/name.jpg"
    with tarfile.open(path, "w", format=format) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("s", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            info.size = 700  # as some write for links, without content
            tar.addfile(info)
        for name in ("./a.jpg", long):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(b"x" * 700))
    assert [m.name for m in ours(path)] == ["a.jpg", long]
    assert [m[1:] for m in ours(path)] == [m[1:] for m in theirs(path)]


@pytest.mark.parametrize("format", ["ustar", "gnu", "pax", "v7"])
def test_gnu_tars_own_archives(format: str, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.cls"):
        (tmp_path / name).write_bytes(name.encode() * 300)
    path = tmp_path / "x.tar"
    command = ["tar", f"--format={format}", "-cf", str(path), "-C", str(tmp_path), "a.jpg", "b.cls"]
    subprocess.run(command, check=True)
    assert ours(path) == theirs(path) and len(ours(path)) == 2


def test_sizes_beyond_eight_gib_are_understood(tmp_path: Path) -> None:
    """Only the headers are written; the content is a hole in the file."""
    for format in FORMATS[1:]:
        info = tarfile.TarInfo("big.jpg")
        info.size = 9 << 30
        header = info.tobuf(format)
        path = tmp_path / "x.tar"
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + info.size + 1024)
        assert ours(path) == [Member("big.jpg", len(header), 9 << 30)]


def five(path: Path) -> bytes:
    files = [f for i in range(5) for f in sample(f"{i}", bytes([i]) * (300 + 200 * i), i)]
    return write_tar(path, files).read_bytes()


def test_wherever_it_is_cut_the_whole_samples_before_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    whole, complete = five(path), read_index(path)
    assert not complete.damage and complete.labels == [0, 1, 2, 3, 4]
    ends = [m.offset + -(-m.size // 512) * 512 + 513 for m in complete.images]  # of the labels
    for length in range(0, len(whole), 61):
        path.write_bytes(whole[:length])
        index = read_index(path)
        kept = sum(end <= length for end in ends)
        assert index.images == complete.images[:kept] and index.labels == list(range(kept))
        assert bool(index.damage) == (length < ends[-1] + 511 + 512)  # the mark is a block


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"short", "not a tar file"),
        (b"this is no tar file " * 60, "not a tar file"),
        (b"\x1f\x8b" + b"gzip" * 300, "compressed"),
        (bytes(10240), "holds no sample"),
    ],
)
def test_what_is_no_tar_says_so(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    index = read_index(tmp_path / "x.tar")
    assert message in index.damage and not index.images


def test_a_hole_a_flipped_bit_and_a_second_archive_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    whole = five(path)
    begin = read_index(path).images[2].offset - 512
    path.write_bytes(whole[:begin] + bytes(2048) + whole[begin + 2048 :])
    index = read_index(path)
    assert "is followed by other bytes" in index.damage and len(index.images) == 2
    path.write_bytes(whole[:begin] + bytes(2 << 20))
    assert "is followed by other bytes" in read_index(path).damage
    chance = random.Random(0)
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[begin + chance.choice([*range(124), *range(136, 345)])] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        assert len(read_index(path).images) == 2 and "no valid header" in read_index(path).damage
    path.write_bytes(whole + whole)
    assert "is followed by other bytes" in read_index(path).damage


def test_a_folder_and_a_missing_file(tmp_path: Path) -> None:
    assert "directory" in read_index(tmp_path).damage
    assert "No such file" in read_index(tmp_path / "x.tar").damage


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.jpg", b"")], r"has no label \(a\.cls\) for the sample 'a'"),
        ([("a.cls", b"1")], r"has no image \(a\.jpg or the like\) for the sample 'a'"),
        (sample("a", b"", 0) * 2, r"a\.jpg is a second image of 'a'"),
        ([*sample("a", b"", 0), ("a.png", b"")], r"a\.png is a second image of 'a'"),
        ([*sample("a", b"", 0), ("a.cls", b"0")], r"a\.cls is a second label of 'a'"),
        ([("a.jpg", b""), ("a.cls", b"cat")], r"a\.cls is 'cat': a label is a whole number"),
        ([("a.jpg", b""), ("a.cls", b"")], r"a\.cls is '': a label"),
        ([("a.jpg", b""), ("a.cls", b"-1")], r"a\.cls is '-1': a label"),
        ([("a.jpg", b""), ("a.cls", b"\xff")], r"a\.cls is .*: a label"),
    ],
)
def test_half_samples_are_refused(files: list, message: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [*sample("whole", b"", 0), *files])
    with pytest.raises(UserError, match=message) as caught:
        read_index(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_other_members_are_passed_over(tmp_path: Path) -> None:
    """A label may come before its image and may end with a newline; a key ends at the first dot."""
    files = [
        ("x/b.json", b"{}"), ("x/b.cls", b" 7\n"), ("x/b.seg.png", b"mask"), ("x/b.JPEG", b"image"),
        ("._a.jpg", b"a Mac's"), ("readme.txt", b""), ("none", b""), ("a.png", b"2"),
        ("a.cls", b"3"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", files)
    index = read_index(path)
    assert [m.name for m in index.images] == ["x/b.JPEG", "a.png"] and index.labels == [7, 3]
    members = TarMembers.of([path], [index])
    assert [members.read(i) for i in range(2)] == [b"image", b"2"]
    assert members.ends(0, 2) == (b"im", b"ge") and members.ends(1, 9) == (b"2", b"2")
    assert members.path(0) == path / "x" / "b.JPEG" and members.size(0) == 5


def test_a_shard_that_changes_under_way_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    whole = five(path)
    members = TarMembers.of([path], [read_index(path)])
    path.write_bytes(whole[:600])
    with pytest.raises(CorruptImageError, match="became shorter"):
        members.read(3)
    path.unlink()
    with pytest.raises(CorruptImageError, match="No such file"):
        TarMembers.of(
            [path], [read_index(path)._replace(images=[Member("a", 0, 1)], labels=[0])]
        ).read(0)


def test_damage_is_an_exception_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"no")
    with pytest.raises(DamagedTarError):
        ours(tmp_path / "x.tar")
