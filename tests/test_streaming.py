"""Streams from memory, files and misbehaving servers, against the same data read locally."""

import functools
import gzip
import http.server
import io
import itertools
import json
import socket
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from d2v_fast.config import ConfigError, parse
from d2v_fast.data import DataError, documents, make_loader, streaming
from d2v_fast.data.audio import open_audio
from d2v_fast.data.spectrograms import SpectrogramData
from d2v_fast.data.streaming import StreamBatches
from d2v_fast.data.text import TextData
from d2v_fast.masking import RandomMask, TokenMask
from tests import runs
from tests.test_data import image_data, paragraphs, text_data
from tests.test_shards import add, picture


def content(i):
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


def parquet(*numbers):
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [content(i) for i in numbers], "id": list(numbers)}), file, row_group_size=4)
    return file.getvalue()


@pytest.fixture
def images():
    """24 images in three files in memory."""
    memory = fsspec.filesystem("memory")
    for i in range(3):
        memory.pipe(f"/set/{i}.parquet", parquet(*range(8 * i, 8 * i + 8)))
    yield "memory://set/{0..2}.parquet"
    memory.rm("/set", recursive=True)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Forty documents of 1 to 39 words in two files, and a tokenizer."""
    rng = np.random.default_rng(0)
    lines = [paragraphs(1, int(n), seed=i)[0] for i, n in enumerate(rng.integers(1, 40, 40))]
    (tmp_path / "text").mkdir()
    (tmp_path / "text/0.txt").write_text("\n".join([*lines[:20], "", "  "]))
    (tmp_path / "text/1.txt").write_text("\n".join(lines[20:]))
    text_data(str(tmp_path / "text"), cache=str(tmp_path)).tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "text"), {"tokenizer": str(tmp_path / "tokenizer"), "cache": str(tmp_path)}


def taken(data, count, state=None, **settings):
    """(epoch, number, content) of the next samples, and the states after each."""
    settings = {"seed": 0, "rank": 0, "world": 1, "buffer": data.stream.buffer} | settings
    found = list(itertools.islice(data.stream.samples(state=state, **settings), count))
    return [sample for sample, _ in found], [json.loads(json.dumps(state)) for _, state in found]


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key] for key, value in one.items()
    )


class TestText:
    @pytest.mark.parametrize("cross_documents", [True, False])
    def test_blocks_are_those_of_the_cached_tokens(self, corpus, cross_documents):
        path, settings = corpus
        settings = settings | {"block_size": 12, "cross_documents": cross_documents}
        local, stream = text_data(path, **settings), text_data(path, streaming=True, shuffle_buffer=1, **settings)
        expected = sorted(tuple(local.load(i, None)) for i in range(len(local)))
        samples = sorted(taken(stream, len(local) + 3)[0], key=lambda sample: sample[1])  # as they were read
        stream.stream.pending = {number: ids for _, number, ids in samples}
        found = [tuple(stream.load(number, None)) for _, number, _ in samples]
        epochs = [epoch for epoch, *_ in samples]
        if cross_documents:  # files are read in another order, which moves the cuts
            order = np.concatenate([block[1:] for block in found[: len(local)]])
            documents = np.split(order, np.flatnonzero(order == stream.tokenizer.sep_token_id) + 1)
            whole = {tuple(part) for part in np.split(local.ids, local.document_ends)}
            assert {tuple(each) for each in documents[:-1]} < whole and len(documents) > 38
            assert all(len(block) == 12 and block[0] == stream.tokenizer.cls_token_id for block in found)
        else:
            assert sorted(found[: len(local)]) == expected and epochs == [0] * len(local) + [1] * 3

    def test_a_block_of_several_epochs(self, corpus, tmp_path):
        """A document shorter than a block is repeated until it fills one."""
        _, settings = corpus
        (tmp_path / "[0].txt").write_text("dog runs")  # the name is no pattern
        data = text_data(str(tmp_path / "[0].txt"), streaming=True, **settings)
        samples, _ = taken(data, 3)
        document = [*data.tokenizer("dog runs", add_special_tokens=False)["input_ids"], data.tokenizer.sep_token_id]
        assert len(document) < 15 and [ids for *_, ids in samples] == np.resize(document, (3, 15)).tolist()

    def test_a_file_without_a_row(self, corpus, tmp_path):
        (tmp_path / "empty.txt").touch()
        with pytest.raises(DataError, match=r"empty\.txt: holds no rows$"):
            text_data(f"file://{tmp_path}/empty.txt", **corpus[1])

    def test_a_batch(self, corpus):
        path, settings = corpus
        data = text_data(path, streaming=True, **settings)
        batch = next(iter(make_loader(data, StreamBatches(data, 4), 0)))
        assert batch["source"].shape == (4, 16) and batch["mask"].any() and not batch["broken"]
        assert data.vocabulary.size == len(data.tokenizer)

    @pytest.mark.parametrize("kind", ["txt", "jsonl"])
    def test_compressed_files_over_a_url(self, corpus, tmp_path, kind):
        """The same samples as from the files before they were compressed."""
        path, settings = corpus
        for name in "01":
            lines = Path(path, f"{name}.txt").read_text().splitlines()
            content = "\n".join(lines if kind == "txt" else [json.dumps({"text": line}) for line in lines])
            (tmp_path / f"{name}.{kind}").write_text(content)
            (tmp_path / f"{name}.{kind}.gz").write_bytes(gzip.compress(content.encode()))
        plain, packed = (text_data(f"file://{tmp_path}/{{0..1}}.{kind}{end}", **settings) for end in ("", ".gz"))
        expected = taken(plain, 400)[0]
        assert taken(packed, 400)[0] == expected and expected[-1][0] > 0

    def test_what_a_stream_of_text_requires(self, corpus):
        path, settings = corpus
        with pytest.raises(DataError, match=r"data.tokenizer=train: a stream has no corpus .*data.tokenizer=roberta-base"):
            text_data(path, streaming=True)
        with pytest.raises(DataError, match=r"mask.frequency_weighted=true"):
            TextData(path=path, mask=TokenMask(0.3, 2, frequency_weighted=True), streaming=True, **settings)
        with pytest.raises(DataError, match=r"found label \(int64\)|has no text column"):
            fsspec.filesystem("memory").pipe("/n/a.parquet", parquet(1))
            text_data("memory://n/a.parquet", **settings)


class TestImages:
    def test_each_image_once_an_epoch_in_another_order(self, images):
        data = image_data(images, shuffle_buffer=6)
        samples, _ = taken(data, 48)
        of_bytes = {content(i): i for i in range(24)}
        numbers = [of_bytes[bytes(each)] for *_, each in samples]
        assert sorted(numbers[:24]) == sorted(numbers[24:]) == list(range(24)) != numbers[:24] != numbers[24:]
        assert [epoch for epoch, *_ in samples] == [0] * 24 + [1] * 24
        assert sorted(number for _, number, _ in samples) == list(range(48))
        assert taken(data, 48, seed=1)[0] != samples == taken(data, 48)[0]

    def test_the_order_is_drawn_by_numpy(self, images, monkeypatch):
        """Written out, because a run resumes at a position in the order of the version that began it."""
        epochs, set_epoch = [], datasets.IterableDataset.set_epoch
        monkeypatch.setattr(
            datasets.IterableDataset, "set_epoch", lambda self, epoch: epochs.append(epoch) or set_epoch(self, epoch)
        )
        data = image_data("memory://set/*.parquet", shuffle_buffer=6)
        found = [number for _, number, _ in taken(data, 30, seed=-3)[0]]
        windows = [np.random.default_rng([2**64 - 3, begin]).permutation(6) + begin for begin in range(0, 30, 6)]
        assert found == np.concatenate(windows).tolist()
        assert epochs == [np.random.SeedSequence([2**64 - 3, epoch]).generate_state(1)[0] for epoch in (0, 1)]

    def test_a_window_is_read_while_the_one_before_is_used(self, images, monkeypatch):
        """One row for each sample, so that no step waits for a whole window."""
        reads, read = [], streaming._Reader.read
        monkeypatch.setattr(streaming._Reader, "read", lambda reader: reads.append(1) or read(reader))
        samples = image_data(images).stream.samples(0, 0, 1, None, 5)
        assert [next(samples) and len(reads) for _ in range(12)] == list(range(6, 18))

    def test_windows_of_large_samples_are_shorter(self, images, monkeypatch):
        data = image_data(images)
        sizes = [len(each) for _, _, each in sorted(taken(data, 24)[0], key=lambda sample: sample[1])]
        monkeypatch.setattr(streaming, "LARGEST", sum(sizes[:3]))  # of the first three
        expected, begin = [], 0
        while begin < 24:
            ends = [end for end in range(begin + 1, 24) if sum(sizes[begin:end]) >= sum(sizes[:3])]
            end = min(ends, default=24)
            expected += (np.random.default_rng([0, begin]).permutation(end - begin) + begin).tolist()
            begin = end
        assert [number for _, number, _ in taken(data, 24)[0]] == expected

    def test_a_row_that_fails_is_read_again(self, images, monkeypatch):
        """After 1, 2 and 4 seconds."""
        data = image_data(images, shuffle_buffer=3)
        expected, pauses, rows, fetch = taken(data, 30)[0], [], itertools.count(), streaming._fetch

        def fetch_or_fail(row):
            if next(rows) in (0, 5, 6, 7, 20):
                raise OSError("reset")
            return fetch(row)

        monkeypatch.setattr(streaming, "_fetch", fetch_or_fail)
        monkeypatch.setattr(streaming, "time", SimpleNamespace(sleep=pauses.append))
        assert taken(data, 30)[0] == expected and pauses == [1, 1, 2, 4, 1]

    def test_files_that_a_table_names(self, tmp_path):
        fsspec.filesystem("memory").pipe("/files/0.png", content(0))
        (tmp_path / "1.png").write_bytes(content(1))
        rows = [
            {"bytes": None, "path": "memory://files/0.png"},
            {"bytes": None, "path": str(tmp_path / "1.png")},
            {"bytes": content(2), "path": "memory://gone/2.png"},
        ]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "a.parquet")
        data = image_data(f"file://{tmp_path}/a.parquet", shuffle_buffer=1)
        data.stream.pending = {number: found for _, number, found in taken(data, 3)[0]}
        assert all(np.array_equal(np.asarray(data.source.read(i)), np.asarray(picture(i))) for i in range(3))

    def test_a_rank_without_a_sample(self):
        fsspec.filesystem("memory").pipe("/one/a.parquet", parquet(0))
        data = image_data("memory://one/a.parquet")
        assert len(taken(data, 2, world=2)[0]) == 2
        with pytest.raises(DataError, match=r"data.path=memory://one/a.parquet: holds no sample for rank 1 of 2"):
            taken(data, 1, rank=1, world=2)

    def test_pixels_are_those_of_the_files(self, images, tmp_path):
        """With the number of a sample in place of its index, all augmentations are the same."""
        for i in range(24):
            (tmp_path / f"{i:02d}.png").write_bytes(content(i))
        local, data = image_data(str(tmp_path)), image_data(images, shuffle_buffer=5)
        of_bytes = {content(i): i for i in range(24)}
        samples, _ = taken(data, 24)
        for epoch, number, found in samples:
            data.stream.pending = {number: found}
            local.source.file = lambda index, i=of_bytes[bytes(found)]: str(tmp_path / f"{i:02d}.png")
            assert same(data.__getitems__([(epoch, number)]), local.__getitems__([(epoch, number)]))

    def test_tar_archives_over_a_url(self, tmp_path):
        """Two webdataset archives with captions: each image once an epoch, and after each the stream can be resumed."""
        for number in range(2):
            with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
                for i in range(12 * number, 12 * number + 12):
                    add(archive, f"{i:03d}.png", content(i))
                    add(archive, f"{i:03d}.txt", b"a caption")
        data = image_data(f"file://{tmp_path}/{{0..1}}.tar", shuffle_buffer=5)
        samples, states = taken(data, 36)
        assert sorted(bytes(each) for *_, each in samples[:24]) == sorted(content(i) for i in range(24))
        assert [epoch for epoch, *_ in samples] == [0] * 24 + [1] * 12
        for i in (0, 13, 23):
            assert taken(data, 12, states[i])[0] == samples[i + 1 : i + 13]

    @pytest.mark.parametrize("world", [2, 3])
    def test_ranks_share_the_samples(self, images, world):
        data = image_data(images, shuffle_buffer=4)
        ranks = [taken(data, 24 // world, rank=rank, world=world)[0] for rank in range(world)]
        assert sorted(bytes(each) for samples in ranks for *_, each in samples) == sorted(content(i) for i in range(24))
        assert sorted(number for samples in ranks for _, number, _ in samples) == list(range(24))

    def test_broken_samples_are_named(self):
        file = io.BytesIO()
        pq.write_table(pa.table({"image": [content(0), b"rubbish", None]}), file)
        fsspec.filesystem("memory").pipe("/broken/a.parquet", file.getvalue())
        data = image_data("memory://broken/a.parquet")
        batch = next(iter(StreamBatches(data, 3)))
        assert len(batch["samples"]) == 1 and sorted(message for _, message in batch["broken"]) == [
            "memory://broken/a.parquet[1]: is not an image in one of the formats " + ", ".join(data_formats()),
            "memory://broken/a.parquet[2]: is empty",
        ]

    def test_a_worker_with_threads_gives_the_same(self, images):
        data = image_data(images)
        alone = list(itertools.islice(make_loader(data, StreamBatches(data, 5), 0), 6))
        batches = iter(make_loader(data, StreamBatches(data, 5, threads=3), 3))
        assert all(same(one, other) for one, other in zip(alone, itertools.islice(batches, 6), strict=True))
        numbers = [number for _, number, _ in taken(data, 30, seed=0)[0]]
        assert [number for batch in alone for number in batch["samples"]] == numbers
        assert alone[0]["source"].dtype == torch.float32  # finished


def data_formats():
    from d2v_fast.data.vision import FORMATS

    return FORMATS


class TestResume:
    @pytest.mark.parametrize("buffer", [1, 7, 100])
    @pytest.mark.parametrize("world", [1, 2])
    def test_is_exact_after_each_sample(self, images, buffer, world):
        data = image_data(images, shuffle_buffer=buffer)
        settings = {"rank": world - 1, "world": world}
        samples, states = taken(data, 60, **settings)
        for i in (0, 5, 6, 7, 11, 23, 24, 40):
            assert taken(data, 12, states[i], **settings)[0] == samples[i + 1 : i + 13]

    @pytest.mark.parametrize("cross_documents", [True, False])
    def test_of_text_with_leftovers(self, corpus, cross_documents):
        path, settings = corpus
        settings = settings | {"cross_documents": cross_documents, "block_size": 9}
        data = text_data(path, streaming=True, shuffle_buffer=10, **settings)
        samples, states = taken(data, 400)
        assert samples[-1][0] > 0
        for i in (0, 9, 10, 33, 100, 200):
            assert taken(data, 40, states[i])[0] == samples[i + 1 : i + 41]

    @pytest.mark.parametrize("kind", ["images", "parquet", "jsonl"])
    def test_a_run(self, kind, corpus, tmp_path, monkeypatch):
        """Of images in three files; of text in two, which is given by name."""
        monkeypatch.chdir(tmp_path)
        if kind == "images":
            for i in range(3):
                (tmp_path / f"{i}.parquet").write_bytes(parquet(*range(8 * i, 8 * i + 8)))
            stream = ["data.path=file://" + str(tmp_path / "{0..2}.parquet"), "train.max_broken=0"]
        else:
            for name in "01":
                lines = Path(f"text/{name}.txt").read_text().splitlines()
                if kind == "parquet":
                    pq.write_table(pa.table({"id": range(len(lines)), "text": lines}), f"{name}.parquet")
                else:
                    Path(f"{name}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
            stream = [f"data.path=./[01].{kind}", "data.streaming=true", "data.tokenizer=tokenizer", "data.block_size=16"]
        arguments = functools.partial(runs.arguments, "vision" if kind == "images" else "text")
        stream += ["data.shuffle_buffer=5", "train.save_every=3", "train.steps=8", "train.workers=1"]
        code, said = runs.train(arguments("whole", *stream), before=functools.partial(runs.traced, "a"))
        assert code == 0, said
        assert "the order of its samples depends on the number of ranks, here 1" in said and "streamed samples" in said
        kill = functools.partial(runs.traced, "b", 5, "cut/checkpoints/step-3")
        assert runs.train(arguments("cut", *stream), before=kill)[0] == -9
        code, said = runs.train(arguments("cut", *stream, "--resume"), before=functools.partial(runs.traced, "c"))
        assert code == 0, said
        whole, cut = (Path(name).read_text().splitlines() for name in "ac")
        assert len(whole) == 8 and cut == whole[3:]


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one file, also in ranges; the server's `send` writes the body."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.respond(body=False)

    def do_GET(self):
        self.respond(body=True)

    def respond(self, body):
        server, begin, end = self.server, 0, len(self.server.content)
        server.requests += 1
        if asked := self.headers.get("Range"):
            first, last = asked.removeprefix("bytes=").split("-")
            begin, end = int(first), min(end, int(last) + 1 if last else end)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(end - begin))
        self.end_headers()
        if body:
            server.send(self, server.content[begin:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Starts a server that writes bodies with the function send(handler, body); returns it and its URL."""
    monkeypatch.setattr("datasets.config.STREAMING_READ_RETRY_INTERVAL", 0.05)
    monkeypatch.setattr("datasets.config.STREAMING_OPEN_RETRY_INTERVAL", 0.05)
    monkeypatch.setattr("datasets.config.STREAMING_READ_MAX_RETRIES", 2)
    monkeypatch.setattr("datasets.config.STREAMING_OPEN_MAX_RETRIES", 2)
    monkeypatch.setattr(streaming, "PAUSE", 0.05)
    started = []

    def start(send):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.content, server.send, server.requests = parquet(*range(40)), send, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return server, f"http://127.0.0.1:{server.server_port}/a.parquet"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def whole(handler, body):
    handler.wfile.write(body)


class TestServers:
    def test_one_that_answers(self, serve):
        _, url = serve(whole)
        samples, _ = taken(image_data(url, shuffle_buffer=3, stream_timeout=20), 40)
        assert sorted(bytes(each) for *_, each in samples) == sorted(content(i) for i in range(40))

    def test_a_slow_one(self, serve):
        def slow(handler, body):
            time.sleep(2)
            whole(handler, body)

        server, url = serve(whole)
        data = image_data(url, stream_timeout=0.5)
        assert data.stream.with_timeout(lambda: threading.current_thread().daemon)  # one that is left does not keep the process
        server.send = slow
        message = rf"data.path={url}: the remote has not answered within data.stream_timeout=0.5 seconds; check"
        (batch,) = StreamBatches(data, 4)
        assert batch["failed"].startswith(message.replace("\\", ""))
        with pytest.raises(DataError, match=message):
            image_data(url, stream_timeout=0.5)

    def test_one_that_drops_connections(self, serve, caplog):
        def drop(handler, body):
            if server.requests % 3 == 0:
                handler.wfile.write(body[: len(body) // 2])
                handler.connection.shutdown(socket.SHUT_RDWR)
            else:
                whole(handler, body)

        server, url = serve(whole)
        data = image_data(url, shuffle_buffer=3, stream_timeout=20)
        server.send = drop
        samples, _ = taken(data, 40)
        assert sorted(bytes(each) for *_, each in samples) == sorted(content(i) for i in range(40))

    def test_one_that_fails_permanently(self, serve, caplog):
        server, url = serve(whole)
        data = image_data(url, stream_timeout=20)
        server.send = lambda handler, body: handler.connection.shutdown(socket.SHUT_RDWR)
        (batch,) = StreamBatches(data, 4)
        assert batch["failed"].startswith(f"data.path={url}: cannot be read, after 3 retries: ")
        assert "trying again" in caplog.text

    def test_an_unreachable_one(self, serve):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}/a.parquet"
        with pytest.raises(DataError, match=rf"data.path={url}: cannot be streamed .*; check these, and the connection"):
            image_data(url, stream_timeout=20)

    def test_a_missing_file(self):
        with pytest.raises(DataError, match=r"data.path=memory://nothing/\*.parquet: cannot be streamed"):
            image_data("memory://nothing/*.parquet")


class TestSettings:
    def test_epochs_are_refused(self):
        for more in (["data.path=s3://bucket/a.parquet"], ["data.path=user/name", "data.streaming=true"]):
            with pytest.raises(ConfigError, match=r"train.epochs=2: the length of a stream is unknown; give train.steps"):
                parse(["--config", "vision/tiny", "train.epochs=2", *more])

    def test_recordings_are_refused(self):
        """For a reason that also holds for spectrograms, whose batches are of one size."""
        reason = r"recordings are not streamed, because their lengths decide which samples there are .*; download them"
        with pytest.raises(DataError, match=reason):
            open_audio("hf://datasets/user/name")
        with pytest.raises(DataError, match=reason):
            SpectrogramData(path="hf://datasets/user/name", mask=RandomMask(0.5))

    def test_missing_packages_are_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(documents, "COMPRESSED", (".gz", ".zst"))  # as where zstandard is installed
        with pytest.raises(DataError, match=r"b\.txt\.zst: no such file or folder$"):
            documents.find_documents(str(tmp_path / "b.txt.zst"))
        monkeypatch.setattr(documents, "COMPRESSED", (".gz", ".bz2", ".xz"))  # as where zstandard is not installed
        monkeypatch.setattr(documents, "SUFFIXES", tuple(each for each in documents.SUFFIXES if not each.endswith(".zst")))
        (tmp_path / "a.txt.zst").write_bytes(b"")
        with pytest.raises(DataError, match=r"no file with one of .*; to read \.zst files: pip install zstandard"):
            documents.find_documents(str(tmp_path))
        with pytest.raises(DataError, match=r"a stream needs files of one type .*; to read \.zst files: pip install zstandard"):
            image_data("s3://bucket/a.jsonl.zst")
        monkeypatch.setitem(sys.modules, "s3fs", None)
        with pytest.raises(DataError, match=r"data.path=s3://bucket/a.parquet: cannot be streamed .*s3fs"):
            image_data("s3://bucket/a.parquet")

    def test_names(self, monkeypatch):
        asked = []

        def load(*args, **settings):
            asked.append((args, settings.get("revision"), settings.get("data_files")))
            assert settings["streaming"] is True
            raise OSError("offline")

        monkeypatch.setattr(datasets, "load_dataset", load)
        for path in ("hf://datasets/user/name@v1", "user/name", "hf://datasets/u/n/x-{0..1}.jsonl.gz", "s3://b/a.tar"):
            with pytest.raises(DataError, match=r"cannot be streamed .*: offline; check these"):
                image_data(path, streaming=True)
        assert asked == [
            (("user/name", None), "v1", None),
            (("user/name", None), None, None),
            (("json",), None, ["hf://datasets/u/n/x-0.jsonl.gz", "hf://datasets/u/n/x-1.jsonl.gz"]),
            (("webdataset",), None, ["s3://b/a.tar"]),
        ]
        for path in ("s3://b/folder", "s3://b/{a.parquet,b.tar}"):
            with pytest.raises(DataError, match=rf"{path}: a stream needs files of one type among \.parquet, "):
                image_data(path)

    def test_a_folder_of_save_to_disk(self, tmp_path):
        datasets.Dataset.from_dict({"image": [b""]}).save_to_disk(tmp_path / "saved")
        with pytest.raises(DataError, match=r"streaming=true: .*/saved is local and was written by save_to_disk; use data.str"):
            image_data(str(tmp_path / "saved"), streaming=True)
