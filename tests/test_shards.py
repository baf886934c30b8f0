"""Files in tar archives against the same files in a folder."""

import functools
import io
import itertools
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from d2v_fast.data import DataError, EpochBatches
from d2v_fast.data.audio import open_audio
from d2v_fast.data.vision import open_images
from d2v_fast.train.build import check_ranks
from d2v_fast.train.save import Samples
from tests import runs
from tests.test_audio_data import noise
from tests.test_data import audio_data, image_data, write_wave


def picture(i):
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 255, (20 + i % 7, 24, 3), dtype=np.uint8))


def add(archive, name, content, **how):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in how.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def samples(request):
    """Forty images by name, or as many as the test asks for."""
    content = {}
    for i in range(getattr(request, "param", 40)):
        file = io.BytesIO()
        picture(i).save(file, "PNG" if i % 2 else "JPEG")
        content[f"{i:05d}.{'png' if i % 2 else 'jpg'}"] = file.getvalue()
    return content


@pytest.fixture
def shards(tmp_path, samples):
    """The images in three archives, with captions and classes."""
    (tmp_path / "shards").mkdir()
    size = -(-len(samples) // 3)
    for number in range(3):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as archive:
            for i, (name, content) in enumerate(samples.items()):
                if i // size == number:
                    add(archive, name, content)
                    add(archive, f"{name[:5]}.txt", b"a caption")
                    add(archive, f"{name[:5]}.cls", f"{i % 3}\n".encode())
    return tmp_path / "shards"


@pytest.mark.parametrize("samples", [400], indirect=True)
def test_batches_are_those_of_the_folder_and_of_parquet(tmp_path, samples, shards):
    """All batches of an epoch and the first ones of the next."""
    import datasets

    (tmp_path / "folder").mkdir()
    for name, content in samples.items():
        (tmp_path / "folder" / name).write_bytes(content)
    rows = [{"bytes": content, "path": name} for name, content in samples.items()]
    table = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(str(tmp_path / "set" / "0.parquet"))
    folder, *others = (image_data(str(tmp_path / name)) for name in ("folder", "shards", "set"))
    seen = []
    for keys in itertools.islice(EpochBatches(400, 16), 30):
        expected = folder.__getitems__(keys)
        seen += expected["samples"]
        for other in others:
            batch = other.__getitems__(keys)
            assert expected["broken"] == batch["broken"] == [] and expected["samples"] == batch["samples"]
            assert all(torch.equal(expected[name], batch[name]) for name in ("source", "mask", "index"))
    assert sorted(seen[:400]) == list(range(400)) and len(seen) == 480
    assert others[0].source.labels == [str(i % 3) for i in range(400)]
    assert others[0].sample_name(135) == f"{shards}/1.tar/00135.png"


def test_the_archive_index_is_read_once(shards, tmp_path, monkeypatch, caplog):
    open_images(str(shards), cache=str(tmp_path))
    monkeypatch.setattr(tarfile, "open", None)
    assert len(open_images(str(shards), cache=str(tmp_path))) == 40
    monkeypatch.undo()
    os.remove(shards / "1.tar")
    assert len(open_images(str(shards), cache=str(tmp_path))) == 26 and "rebuilding it" in caplog.text


def test_a_shard_that_vanishes_or_is_cut_while_it_is_read(shards):
    data = image_data(str(shards))
    os.remove(shards / "1.tar")
    os.truncate(shards / "2.tar", 600)
    batch = data.__getitems__([(0, i) for i in (0, 15, 39)])
    assert batch["samples"] == [0]
    (_, gone), (_, cut) = batch["broken"]
    assert gone.startswith(f"{shards}/1.tar/00015.png: [Errno 2] No such file") and "39.png: is cut off: found 0 of" in cut


def test_a_range_of_archives(shards):
    assert len(open_images(f"{shards}/{{0..2}}.tar")) == 40 and len(open_images(f"{shards}/[12].tar")) == 26
    with pytest.raises(DataError, match=r"2 of the 4 files it names do not exist: .*/3\.tar, .*/4\.tar"):
        open_images(f"{shards}/{{1..4}}.tar")


def vanish(path):
    """Remove a file at the second step."""
    from d2v_fast.train import loop

    step = loop.step

    def vanishing_step(state, batches):
        if state.done == 1:
            os.remove(path)
        return step(state, batches)

    loop.step = vanishing_step


def test_a_shard_that_vanishes_during_a_run(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = runs.arguments("vision", "run", f"data.path={shards}", "train.steps=40", "train.batch_size=4")
    code, said = runs.train(args, before=functools.partial(vanish, str(shards / "1.tar")))
    assert code == 1 and "Traceback" not in said and "of 40 samples cannot be read, more than train.max_broken=0.01" in said
    assert f"{shards}/1.tar/" in said and "No such file" in said
    assert list((tmp_path / "run/checkpoints").glob("step-*")), said  # the steps before are kept


def test_ranks_that_see_other_data(monkeypatch):
    samples = [Samples(number, ["a"], np.array([value])) for number, value in ((3, 1), (3, 1), (2, 1), (3, 2))]
    for others, ranks in (([1], None), ([1, 2, 3], "2, 3")):
        gathered = [samples[i].identity for i in (0, *others)]
        monkeypatch.setattr("accelerate.utils.gather_object", lambda own, gathered=gathered: gathered)
        if ranks is None:
            check_ranks(samples[0], "x")
        else:
            with pytest.raises(
                DataError, match=rf"data.path=x: ranks {ranks} see different data .*3 samples on rank 0, 2 on rank 2"
            ):
                check_ranks(samples[0], "x")


def test_names_that_lead_out_and_links(tmp_path, samples, caplog):
    content = samples["00000.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("../../out.jpg", "/etc/out.jpg", "a/../../out.jpg", "in/.hidden.jpg", "in/caf\udce9 \n.jpg"):
            add(archive, name, content)
        add(archive, "link.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "hard.jpg", b"", type=tarfile.LNKTYPE, linkname="../../out.jpg")
        add(archive, "pipe.jpg", b"", type=tarfile.FIFOTYPE)
    source = open_images(str(tmp_path / "a.tar"))
    assert list(source.names) == [f"{tmp_path}/a.tar/in/caf\udce9 \n.jpg"] and source.read(0).size == (24, 20)
    for name in ("../../out.jpg", "/etc/out.jpg", "a/../../out.jpg"):
        assert f"a.tar: its member '{name}' leads out of the archive" in caplog.text


def test_damaged_archives(shards, caplog):
    with open(shards / "0.tar", "r+b") as file:  # the header of the second image
        content = file.read()
        file.seek(content.index(b"00001.png"))
        file.write(b"\xff" * 200)
    os.truncate(shards / "1.tar", os.path.getsize(shards / "1.tar") // 2)
    (shards / "3.tar").write_bytes(b"no archive")
    with caplog.at_level("WARNING"):
        source = open_images(str(shards))
    counts = [sum(f"/{number}.tar/" in name for name in source.names) for number in range(4)]
    assert counts[0] == 1 and 1 <= counts[1] < 14 and counts[2:] == [12, 0]
    assert "0.tar: cannot be read after 1 files" in caplog.text
    assert (
        f"1.tar: cannot be read after {counts[1]} files" in caplog.text and "3.tar: cannot be read after 0 files" in caplog.text
    )
    assert all(source.read(i).size[0] == 24 for i in range(len(source)))
    caplog.clear()
    open_images(str(shards))
    assert "0.tar: cannot be read after 1 files" in caplog.text  # each time


def test_a_damaged_header_before_zeros(tmp_path, samples, caplog):
    """The zeros are the content of a file, not the end of the archive."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a.jpg", samples["00000.jpg"])
        add(archive, "b.jpg", bytes(1024))
    content = (tmp_path / "a.tar").read_bytes()
    header = content.rindex(b"b.jpg")
    (tmp_path / "a.tar").write_bytes(content[:header] + b"\xff" * 512 + content[header + 512 :])
    assert open_images(str(tmp_path)).names == [f"{tmp_path}/a.tar/a.jpg"]
    assert "a.tar: cannot be read after 1 files: found neither a header nor an end marker" in caplog.text


@pytest.mark.parametrize(
    "count, classes, labels", [(2, [0, 1], ["voice 0", "voice 1"]), (2, [0], None), (2, [], None), (1, [], None)]
)
def test_labels_are_those_of_all_files_or_none(tmp_path, count, classes, labels):
    """A sample is what has the same name up to the first dot, in the same folder."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(count):
            file = io.BytesIO()
            picture(i).save(file, "PNG")
            add(archive, f"v1.0/{i}.left.png", file.getvalue())
            add(archive, f"v1.1/{i}.cls", b"of another folder")
        for i in classes:
            add(archive, f"v1.0/{i}.cls", b" voice %d\n" % i)
    assert open_images(str(tmp_path)).labels == labels


@pytest.mark.parametrize("missing", [0, 1])
def test_an_archive_that_ends_with_its_last_file(tmp_path, missing, caplog):
    """Without an end marker; the file is read if all of it is there."""
    file = io.BytesIO()
    picture(0).save(file, "PNG")
    content = file.getvalue().ljust(2048, b"\0")  # whole blocks: nothing follows it
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a.png", content)
        add(archive, "b.png", content)
    os.truncate(tmp_path / "a.tar", 2 * (512 + 2048) - missing)
    source = open_images(str(tmp_path / "a.tar"))
    assert [os.path.basename(name) for name in source.names] == ["a.png", "b.png"][: 2 - missing]
    assert all(source.read(i).size == picture(0).size for i in range(len(source)))
    assert ("b.png' is cut off, 1 bytes are missing" in caplog.text) == bool(missing)
    assert f"cannot be read after {2 - missing} files" in caplog.text


def test_an_archive_of_nothing(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "a.txt", b"text")
    with pytest.raises(DataError, match=r"1 archives hold no file with one of the extensions .*\.jpg"):
        open_images(str(tmp_path / "a.tar"))


def test_recordings(tmp_path):
    (tmp_path / "waves").mkdir()
    for i in range(4):
        write_wave(tmp_path / "waves" / f"{i}.flac", noise(0.3 + i, seed=i))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(4):
            archive.add(tmp_path / "waves" / f"{i}.flac", f"voice{i % 2}/{i}.flac")
    one, other = (audio_data(str(tmp_path / name), whole_seconds=2) for name in ("waves", "a.tar"))
    assert len(one) == len(other) == 9 and open_audio(str(tmp_path / "a.tar")).groups == ["voice0", "voice1"] * 2
    keys = [(0, i) for i in range(9)]
    assert torch.equal(one.__getitems__(keys)["source"], other.__getitems__(keys)["source"])
