"""Parquet files read in place, against the values that were written."""

import io
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d2v_fast.data import DataError
from d2v_fast.data import parquet as module
from d2v_fast.data.parquet import Parquet
from d2v_fast.data.vision import open_images
from tests.test_data import audio_data, write_wave
from tests.test_shards import picture


def blobs(count, seed=0, least=0):
    rng = np.random.default_rng(seed)
    return [rng.bytes(int(n)) for n in rng.integers(least, 3000, count)]


def content(i):
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


def structs(values):
    return pa.array([{"bytes": value, "path": "x"} for value in values], pa.struct({"bytes": pa.binary(), "path": pa.string()}))


PLAIN = {"compression": "none", "use_dictionary": False, "row_group_size": 40}


@pytest.mark.parametrize(
    "settings, placed",
    [
        (PLAIN, True),
        (PLAIN | {"data_page_size": 5000, "write_batch_size": 3}, True),  # several pages a group
        (PLAIN | {"data_page_version": "2.0", "data_page_size": 5000, "write_batch_size": 3}, True),
        (PLAIN | {"use_content_defined_chunking": True, "write_page_index": True, "write_page_checksum": True}, True),
        (PLAIN | {"compression": "snappy"}, False),
        (PLAIN | {"compression": "zstd", "data_page_version": "2.0"}, False),
        (PLAIN | {"use_dictionary": True}, False),
        (PLAIN | {"column_encoding": {"image": "DELTA_LENGTH_BYTE_ARRAY", "image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}}, False),
    ],
)
@pytest.mark.parametrize(
    "make", [pa.array, structs, lambda values: pa.array(values, pa.large_binary())], ids=["binary", "struct", "large"]
)
def test_every_value(tmp_path, settings, placed, make):
    values = blobs(100)
    values[7] = b""
    settings = dict(settings)
    if "column_encoding" in settings:
        settings["column_encoding"] = {"image.bytes" if make is structs else "image": "DELTA_LENGTH_BYTE_ARRAY"}
    table = pa.table({"id": range(100), "image": make(values)})
    pq.write_table(table.slice(0, 90), tmp_path / "a.parquet", **settings)
    pq.write_table(table.slice(90), tmp_path / "b.parquet", **settings)
    data = Parquet(str(tmp_path), [str(tmp_path / name) for name in ("a.parquet", "b.parquet")], cache=str(tmp_path))
    places = data.index("image")
    assert len(data) == 100 and ((places >= 0).all() if placed else (places == -1).all())
    for place in (None, places):
        for i in np.random.default_rng(1).permutation(100):
            found = data.value(int(i), "image", *([] if place is None else [place[i].tolist()]))
            assert (found["bytes"] if isinstance(found, dict) else found) == values[i]
    assert data["id"] == list(range(100)) and data.names[92] == f"{tmp_path}/b.parquet[2]"


def test_missing_values_are_read_by_pyarrow(tmp_path):
    values = [None if i in (3, 50) else value for i, value in enumerate(blobs(90))]
    for version in ("1.0", "2.0"):
        pq.write_table(pa.table({"image": pa.array(values)}), tmp_path / "a.parquet", **PLAIN, data_page_version=version)
        data = Parquet(str(tmp_path), [str(tmp_path / "a.parquet")], cache=str(tmp_path))
        places = data.index("image")
        assert (places[:80] == -1).all() and (places[80:] >= 0).all()
        assert [data.value(i, "image", places[i].tolist()) for i in range(90)] == values


def test_values_that_look_like_lengths(tmp_path):
    """Eight bytes each without a length: the first four could be the length of the rest."""
    values = [b"\4\0\0\0ab%02d" % i for i in range(10)]
    pq.write_table(pa.table({"image": pa.array(values, pa.binary(8))}), tmp_path / "a.parquet", **PLAIN)
    data = Parquet(str(tmp_path), [str(tmp_path / "a.parquet")], {"image": None}, str(tmp_path))
    places = data.index("image").tolist()
    assert [data.value(i, "image", places[i]) for i in range(10)] == values


def test_no_rows(tmp_path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    data = Parquet(str(tmp_path), [str(tmp_path / "a.parquet")], cache=str(tmp_path))
    assert len(data) == 0 and data.names == [] and data["image"] == [] and data.index("image").shape == (0, 2)


def test_row_groups_are_kept_within_a_limit(tmp_path, monkeypatch):
    values = blobs(100, least=2000)
    pq.write_table(pa.table({"image": values}), tmp_path / "a.parquet", row_group_size=10)
    data = Parquet(str(tmp_path), [str(tmp_path / "a.parquet")])
    reads, read = [], Parquet._read
    monkeypatch.setattr(Parquet, "_read", lambda self, group, column: reads.append(group) or read(self, group, column))
    monkeypatch.setattr(module, "RECENT", 60_000)  # two of about 25 kB
    assert all(data.value(i, "image") == values[i] for i in (5, 15, 6, 16, 25, 7, 26, 17))
    assert reads == [0, 1, 2, 0, 1]
    monkeypatch.setattr(module, "RECENT", 10)
    assert data.value(7, "image") == values[7] and len(data.recent) == 1


def test_nested_folders_splits_and_no_copy(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    for i, name in enumerate(
        ("data/en/train-0.parquet", "data/en/train-1.parquet", "data/fr/train-0.parquet", "data/test.parquet")
    ):
        rows = {"image": [{"bytes": content(4 * i + k), "path": None} for k in range(4)], "label": [i] * 4}
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(4))
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "set" / name))
    source = open_images(str(tmp_path / "set"), cache=str(tmp_path / "kept"))
    assert [np.asarray(source.read(i)).tolist() for i in range(12)] == [np.asarray(picture(i)).tolist() for i in range(12)]
    assert source.labels == [str(i // 4) for i in range(12)] and source.names[9] == f"{tmp_path}/set/data/fr/train-0.parquet[1]"
    assert len(open_images(str(tmp_path / "set"), split="test", cache=str(tmp_path / "kept"))) == 4
    assert len(open_images(str(tmp_path / "set/data/*/*.parquet"), cache=str(tmp_path / "kept"))) == 12
    written = [os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(tmp_path / "hf") for name in names]
    assert sum(written) == 0  # only a lock file
    with pytest.raises(DataError, match="split=valid"):
        open_images(str(tmp_path / "set"), split="valid")


def test_files_that_are_broken_or_of_another_kind(tmp_path, caplog):
    pq.write_table(pa.table({"image": [content(0)]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    pq.write_table(pa.table({"caption": ["a"]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"image": [content(1)]}), tmp_path / "d.parquet")
    source = open_images(str(tmp_path))
    assert [source.read(i).size for i in range(len(source))] == [picture(i).size for i in range(2)]
    assert f"left out: {tmp_path}/b.parquet: Parquet magic bytes not found" in caplog.text
    assert f"left out: {tmp_path}/c.parquet: has no column image, which {tmp_path}/a.parquet has" in caplog.text
    for name in ("a", "c", "d"):
        os.remove(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="none of its 1 parquet files can be read"):
        open_images(str(tmp_path))


@pytest.mark.parametrize("settings", [PLAIN, {}])
def test_a_file_that_vanishes_or_is_cut_while_it_is_read(tmp_path, settings):
    for name in "abc":
        pq.write_table(pa.table({"image": [content(i) for i in range(3)]}), tmp_path / f"{name}.parquet", **settings)
    source = open_images(str(tmp_path))
    os.remove(tmp_path / "b.parquet")
    os.truncate(tmp_path / "c.parquet", 40)
    assert source.read(1).size == picture(1).size
    with pytest.raises(FileNotFoundError, match=r"b\.parquet"):
        source.read(4)
    with pytest.raises(Exception, match=r"cut off|corrupt file"):
        source.read(8)


@pytest.mark.parametrize("settings, rows", [(PLAIN, 1), ({}, 3), ({"row_group_size": 1}, 1)])
def test_digests_change_with_the_content(tmp_path, settings, rows):
    """Of a row, or of its row group if the file is compressed."""

    def digests(*numbers):
        pq.write_table(pa.table({"image": [content(i) for i in numbers]}), tmp_path / "a.parquet", **settings)
        return open_images(str(tmp_path)).digests().tolist()

    first = digests(0, 1, 2)
    assert digests(0, 1, 2) == first
    changed = [a != b for a, b in zip(first, digests(0, 8, 2), strict=True)]
    assert changed == ([False, True, False] if rows == 1 else [True] * 3)


def test_recordings(tmp_path):
    waves = [0.1 * np.random.default_rng(i).normal(size=4000 + 1000 * i) for i in range(4)]
    files = [write_wave(tmp_path / "waves" / f"{i}.wav", wave) for i, wave in enumerate(waves)]
    rows = {"audio": [{"bytes": open(file, "rb").read(), "path": None} for file in files], "speaker": [7, 8, 7, 8]}
    table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
    table.to_parquet(str(tmp_path / "set" / "0.parquet"))
    one, other = (audio_data(str(tmp_path / name), whole_seconds=2) for name in ("waves", "set"))
    assert one.lengths.tolist() == other.lengths.tolist() and other.source.groups == ["7", "8", "7", "8"]
    batches = [data.__getitems__([(0, i) for i in range(4)]) for data in (one, other)]
    assert all((batches[0][name] == batches[1][name]).all() for name in ("source", "mask"))


def test_thrift_by_hand():
    """Compact protocol: −2, true and false; 300 as field 20, the bytes "ab", a struct of its own with 5, and 64 in 16 bits."""
    data = bytes([0x15, 0x03, 0x11, 0x12, 0x05, 0x28, 0xD8, 0x04, 0x18, 0x02, 0x61, 0x62, 0x1C, 0x16, 0x0A, 0x00])
    data += bytes([0x14, 0x80, 0x01, 0x00, 0xFF])
    assert module._thrift(b"?" + data, 1) == ({1: -2, 2: True, 3: False, 20: 300, 22: {1: 5}, 23: 64}, len(data))
    with pytest.raises(ValueError, match="has the thrift type 9"):
        module._thrift(bytes([0x19, 0x00]), 0)
