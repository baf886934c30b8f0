"""Recordings and manifests as other tools write them, which recordings are left out, and how a run identifies them."""

import csv
import hashlib
import io
import json
import os
import shutil
import socket
import threading
from contextlib import suppress

import numpy as np
import pytest
import soundfile
import torch

from d2v_fast import data
from d2v_fast.data import DataError, Source, find_files
from d2v_fast.data.audio import SUFFIXES, count_samples, open_audio, read_audio
from d2v_fast.data.vision import open_images
from tests.runs import arguments, train
from tests.test_data import audio_data, write_wave

RATE = 16_000
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # str.splitlines ends a line at each


def noise(seconds=0.25, seed=0):
    return 0.1 * np.random.default_rng(seed).normal(size=int(seconds * RATE))


@pytest.fixture
def clips(tmp_path):
    """Five recordings in clips/, as relative names."""
    for i in range(5):
        write_wave(tmp_path / "clips" / f"{i}.wav", noise(seed=i))
    return [f"clips/{i}.wav" for i in range(5)]


@pytest.fixture
def busy_pipe():
    """Makes FIFOs with a writer that writes nothing: code that opens one fails its test instead of blocking."""

    def write_nothing(path):
        with suppress(FileNotFoundError):  # until the test's folder is removed
            while True:
                os.close(os.open(path, os.O_WRONLY))  # unlike open(path, "wb"), creates no file

    def make(path):
        os.mkfifo(path)
        threading.Thread(target=write_nothing, args=[os.path.abspath(path)], daemon=True).start()
        return str(path)

    return make


class TestManifests:
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "metadata.csv"])
    @pytest.mark.parametrize("ending", ["\n", "\r\n"])
    def test_rows_end_at_line_feeds_alone(self, tmp_path, clips, name, ending):
        rows = [f"{file},a{SEPARATORS[i : i + 2]}b" for i, file in enumerate(clips)]
        lines = ["file_name,text", *rows]
        if name == "rows.tsv":
            lines = [line.replace(",", "\t") for line in lines]
        elif name == "rows.jsonl":
            columns = [row.split(",") for row in rows]
            lines = [json.dumps({"file_name": file, "text": text}, ensure_ascii=False) for file, text in columns]
            lines = [line.replace("\\u2028", "\u2028") for line in lines]
        (tmp_path / name).write_bytes((ending.join(lines) + ending).encode())
        source = open_audio(str(tmp_path if name == "metadata.csv" else tmp_path / name))
        assert [os.path.relpath(file, tmp_path) for file in source.names] == clips

    def test_quotes_mean_nothing_in_tsv(self, tmp_path, clips):
        texts = ['"', 'she said "no', '"', 'a"', '""']
        lines = ["path\ttext", *(f"{file}\t{text}" for file, text in zip(clips, texts, strict=True))]
        (tmp_path / "rows.tsv").write_text("\n".join(lines))
        assert len(open_audio(str(tmp_path / "rows.tsv"))) == 5

    def test_a_column_that_a_row_lacks_is_not_used(self, tmp_path, clips):
        (tmp_path / "rows.tsv").write_text("\n".join(["path\tlabel", *(f"{file}\tx" for file in clips[:4]), clips[4]]))
        source = open_audio(str(tmp_path / "rows.tsv"))
        assert len(source) == 5 and source.labels == ["clips"] * 5

    def test_quotes_hold_commas_and_lines_in_csv(self, tmp_path, clips):
        with open(tmp_path / "rows.csv", "w", newline="") as file:
            csv.writer(file).writerows([["text", "file_name"], *(['"a",\nb', name] for name in clips)])
        assert [os.path.relpath(file, tmp_path) for file in open_audio(str(tmp_path / "rows.csv")).names] == clips

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("m.csv", 'file_name,text\na.wav,"x\nb.wav,y', "m.csv: not a manifest: .*an unclosed quote"),
            ("m.jsonl", '{"file_name": 5}', "m.jsonl: row 1: file_name is 5, expected the path of a file"),
            ("m.jsonl", '{"file_name": ' + "[" * 100_000 + "]" * 100_000 + "}", "m.jsonl: not a manifest: maximum recursion"),
            ("m.json", '{"audio_filepath": "a.wav", "offset": 2.5}', r"row 1 is a part of a.wav, from offset=2.5; .* split"),
            ("m.csv", "ID,wav,start\n1,a.wav,0\n2,a.wav,16000", r"row 2 is a part of a.wav, from start=16000"),
        ],
    )
    def test_what_cannot_be_used(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            open_audio(str(tmp_path / name))

    def test_common_voice(self, tmp_path, clips):
        """Names are relative to clips/, and a speaker is a client."""
        lines = ["client_id\tpath\tsentence\tage", *(f'voice{i % 2}\t{i}.wav\tsays "{i}\t' for i in range(5))]
        (tmp_path / "validated.tsv").write_text("\n".join(lines))
        source = open_audio(str(tmp_path / "validated.tsv"))
        assert [os.path.relpath(file, tmp_path) for file in source.names] == clips
        assert source.groups == ["voice0", "voice1", "voice0", "voice1", "voice0"]

    @pytest.mark.parametrize("ending", ["json", "jsonl"])
    def test_nemo(self, tmp_path, clips, ending):
        rows = [{"audio_filepath": file, "duration": 0.25, "offset": 0, "text": "x"} for file in clips]
        (tmp_path / f"m.{ending}").write_text("\n".join(map(json.dumps, rows)))
        assert [os.path.relpath(file, tmp_path) for file in open_audio(str(tmp_path / f"m.{ending}")).names] == clips

    def test_speechbrain(self, tmp_path, clips):
        rows = {str(i): {"wav": f"{{data_root}}/{file}", "spk_id": f"s{i}", "length": 0.25} for i, file in enumerate(clips)}
        (tmp_path / "m.json").write_text(json.dumps(rows, indent=1))
        lines = ["ID,duration,wav,spk_id", *(f"{i},0.25,$data_root/{file},s{i}" for i, file in enumerate(clips))]
        (tmp_path / "m.csv").write_text("\n".join(lines))
        for name in ("m.json", "m.csv"):
            source = open_audio(str(tmp_path / name))
            assert [os.path.relpath(file, tmp_path) for file in source.names] == clips
            assert source.groups == ["s0", "s1", "s2", "s3", "s4"]


class TestLengths:
    """Lengths in manifests, so that no file is opened before training reads it."""

    @pytest.mark.parametrize("name", ["fairseq.tsv", "nemo.json", "table.csv"])
    def test_no_file_is_opened(self, tmp_path, clips, name, monkeypatch):
        rows = {
            "fairseq.tsv": [str(tmp_path), *(f"{file}\t{4000 + i}" for i, file in enumerate(clips))],
            "nemo.json": [json.dumps({"audio_filepath": f, "duration": 0.25 + i / RATE}) for i, f in enumerate(clips)],
            "table.csv": ["file_name,duration", *(f"{file},{0.25 + i / RATE}" for i, file in enumerate(clips))],
        }
        (tmp_path / name).write_text("\n".join(rows[name]))
        opened = []
        monkeypatch.setattr("d2v_fast.data.audio._open", lambda file: opened.append(file))
        monkeypatch.setattr("d2v_fast.data.check_regular", lambda file: opened.append(file))
        loaded = audio_data(str(tmp_path / name))
        names, digests = loaded.contents()
        assert loaded.lengths.tolist() == [4000, 4001, 4002, 4003, 4004] and len(names) == len(set(digests)) == 5
        assert opened == []

    @pytest.mark.parametrize("value", ["", "-1", "nan", "inf", "long", "0"])
    def test_unusable_lengths(self, tmp_path, clips, value):
        (tmp_path / "m.csv").write_text(f"file_name,duration\n{clips[0]},0.5\n{clips[1]},{value}\n")
        assert audio_data(str(tmp_path / "m.csv")).lengths.tolist() == [4000, 4000]  # from their headers

    def test_recordings_that_are_shorter(self, tmp_path, clips):
        (tmp_path / "m.csv").write_text("file_name,duration\n" + "".join(f"{file},100\n" for file in clips))
        parts = audio_data(str(tmp_path / "m.csv"))
        batch = parts.__getitems__([(0, 0), (0, 1)])
        assert len(parts) == 500 and parts.lengths.tolist() == [16_000] * 500 and batch["samples"] == [0]
        assert batch["broken"] == [(1, f"{tmp_path}/clips/0.wav from 1.0 s to 2.0 s: holds no sample after 1.0 s")]

    def test_headers_are_read_once(self, tmp_path, clips, monkeypatch):
        before = audio_data(str(tmp_path)).lengths
        calls = []
        monkeypatch.setattr("d2v_fast.data.audio.count_samples", lambda file, rate: calls.append(file) or 4000)
        assert audio_data(str(tmp_path)).lengths.tolist() == before.tolist() and calls == []
        write_wave(tmp_path / "clips" / "5.wav", noise())
        assert len(audio_data(str(tmp_path))) == 6 and len(calls) == 6

    def test_lengths_of_a_dataset_are_cached(self, tmp_path, clips, monkeypatch):
        import datasets

        rows = [{"bytes": (tmp_path / file).read_bytes(), "path": None} for file in clips]
        table = datasets.Dataset.from_dict({"audio": rows}).cast_column("audio", datasets.Audio(decode=False))
        table.to_parquet(str(tmp_path / "set" / "0.parquet"))
        assert len(audio_data(str(tmp_path / "set"))) == 5
        monkeypatch.setattr("d2v_fast.data.audio.count_samples", None)
        assert audio_data(str(tmp_path / "set")).lengths.tolist() == [4000] * 5


class TestLong:
    """Recordings that are read in parts."""

    @pytest.fixture(params=["wav", "flac", "ogg", "mp3"])
    def long(self, request, tmp_path):
        """11.3 seconds with rising pitch."""
        t = np.arange(int(11.3 * RATE)) / RATE
        write_wave(tmp_path / f"a.{request.param}", 0.5 * np.sin(2 * np.pi * (200 + 40 * t) * t))
        return tmp_path / f"a.{request.param}"

    def test_every_part_is_a_sample(self, long):
        found = audio_data(str(long), whole_seconds=5, normalize=False)
        assert len(found) == 12 and np.ptp(found.lengths) <= 1 and found.lengths.sum() == found.durations[0]
        whole = read_audio(str(long), RATE)
        parts = np.concatenate([found.load(i, np.random.default_rng(0)) for i in range(12)])
        assert len(parts) == pytest.approx(len(whole), abs=12)
        assert np.abs(parts - whole[: len(parts)]).max() < 1e-4  # of lossy formats too
        assert found.sample_name(3) == f"{long} from 2.8 s to 3.8 s"

    def test_a_part_is_normalised_by_itself(self, long):
        wave = audio_data(str(long), whole_seconds=5).load(7, np.random.default_rng(0))
        assert wave.mean() == pytest.approx(0, abs=1e-3) and wave.var() == pytest.approx(1, abs=1e-2)

    def test_another_rate(self, tmp_path):
        t = np.arange(5 * 44_100) / 44_100
        path = write_wave(tmp_path / "a.wav", np.stack([0.5 * np.sin(2 * np.pi * 440 * t)] * 2, axis=1), 44_100)
        found = audio_data(path, whole_seconds=3, normalize=False)
        expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(5 * RATE) / RATE)
        for i in range(5):
            part = found.load(i, np.random.default_rng(0))
            assert len(part) == pytest.approx(RATE, abs=1)
            assert np.abs(part[200:-200] - expected[i * RATE :][: len(part)][200:-200]).max() < 1e-3

    def test_a_format_that_cannot_be_sought_in(self, tmp_path):
        tone = 0.5 * np.sin(np.arange(5 * 8000) ** 1.3 / 300)
        path = write_wave(tmp_path / "a.au", tone, 8000, subtype="G723_24")
        found = audio_data(path, whole_seconds=3, normalize=False, sample_rate=8000)
        whole = read_audio(path, 8000)
        parts = [found.load(i, np.random.default_rng(0)) for i in range(len(found))]
        assert len(parts) > 4 and np.array_equal(np.concatenate(parts), whole[: sum(map(len, parts))])

    def test_shorter_ones_are_read_whole(self, long):
        assert len(audio_data(str(long), whole_seconds=12)) == len(audio_data(str(long))) == 1

    def test_little_of_it_is_read(self, tmp_path, monkeypatch):
        import soundfile

        write_wave(tmp_path / "a.flac", noise(60))
        found = audio_data(str(tmp_path), whole_seconds=5)
        read, frames = soundfile.SoundFile.read, []
        monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, n, **how: frames.append(n) or read(file, n, **how))
        found.__getitems__([(0, 50)])
        assert frames == [RATE]

    def test_silent_parts_give_way_to_the_next(self, tmp_path):
        wave = noise(6)
        wave[2 * RATE : 4 * RATE] = 0
        path = write_wave(tmp_path / "a.wav", wave, subtype="FLOAT")
        found = audio_data(path, whole_seconds=3)
        batch = found.__getitems__([(0, i) for i in range(6)])
        assert batch["broken"] == [] and all(torch.equal(batch["source"][i], batch["source"][4]) for i in (2, 3))
        write_wave(path, 0 * wave)
        assert len(found.__getitems__([(0, i) for i in range(6)])["broken"]) == 6

    def test_short_clips_are_joined_to_parts(self, tmp_path):
        for i, seconds in enumerate((6, 0.3)):
            write_wave(tmp_path / f"{i}.wav", noise(seconds, i))
        found = audio_data(str(tmp_path), whole_seconds=3, join_seconds=0.5)
        lengths = {found.__getitems__([(epoch, 6)])["source"].shape[1] for epoch in range(20)}
        assert len(found) == 7 and min(lengths) >= 8000 and max(lengths) == RATE

    def test_more_than_can_be_read_whole(self, tmp_path, monkeypatch):
        path = write_wave(tmp_path / "a.flac", noise(6))
        monkeypatch.setattr("d2v_fast.data.audio.MAX_VALUES", 2 * RATE)
        with pytest.raises(ValueError, match="holds more than 32000 samples"):
            read_audio(path, RATE)
        found = audio_data(path, whole_seconds=2, cache=str(tmp_path))
        assert len(found) == 6 and found.__getitems__([(0, i) for i in range(6)])["source"].shape == (6, RATE)


class TestHeaders:
    """Headers with a missing or wrong length: all samples are read anyway."""

    def check(self, content, suffix, tmp_path, expected):
        (tmp_path / f"a.{suffix}").write_bytes(content)
        for file in (lambda: str(tmp_path / f"a.{suffix}"), lambda: io.BytesIO(content)):
            wave = read_audio(file(), RATE)
            assert len(wave) == count_samples(file(), RATE) == len(expected)
            assert np.abs(wave - expected).max() < 1e-4
        assert len(audio_data(str(tmp_path))) == 1

    def test_flac_that_was_streamed(self, tmp_path):
        encoded = io.BytesIO()
        soundfile.write(encoded, noise(), RATE, format="FLAC")
        content = bytearray(encoded.getvalue())
        content[21] &= 0xF0  # STREAMINFO: 36 bits of its length; 0 stands for unknown
        content[22:26] = bytes(4)
        self.check(bytes(content), "flac", tmp_path, noise())

    @pytest.mark.parametrize("whole", [0, 36, 0xFFFFFFFF])
    @pytest.mark.parametrize("part", [0, 0xFFFFFFFF])
    def test_wav_whose_recorder_was_killed(self, tmp_path, whole, part):
        encoded = io.BytesIO()
        soundfile.write(encoded, noise(), RATE, format="WAV")
        content = bytearray(encoded.getvalue())
        at = content.find(b"data") + 4
        content[4:8], content[at : at + 4] = whole.to_bytes(4, "little"), part.to_bytes(4, "little")
        self.check(bytes(content), "wav", tmp_path, noise())

    def test_wav_of_nothing(self, tmp_path):
        with pytest.raises(ValueError, match=r"holds no sample$"):
            read_audio(write_wave(tmp_path / "a.wav", np.zeros(0)), RATE)

    @pytest.mark.parametrize(
        "suffix, subtype", [("wav", "GSM610"), ("wav", "G721_32"), ("au", "G723_24"), ("aiff", "DWVW_16"), ("wav", "IMA_ADPCM")]
    )
    def test_formats_that_cannot_be_sought_in(self, tmp_path, suffix, subtype):
        tone = 0.5 * np.sin(np.arange(8000) / 8000 * 2 * np.pi * 300)
        path = write_wave(tmp_path / f"a.{suffix}", tone, 8000, subtype=subtype)
        wave = read_audio(path, 8000)
        assert 8000 <= len(wave) < 8800 and np.corrcoef(wave[:8000], tone)[0, 1] > 0.9


def test_every_ending_is_read(tmp_path):
    formats = {"oga": "OGG", "opus": "OGG", "aif": "AIFF", "aifc": "AIFF", "snd": "AU", "sph": "NIST"}
    for suffix in SUFFIXES:
        kind = formats.get(suffix[1:], suffix[1:].upper())
        write_wave(tmp_path / f"a{suffix}", noise(), format=kind, **({"subtype": "OPUS"} if suffix == ".opus" else {}))
    source = open_audio(str(tmp_path))
    assert len(source) == len(SUFFIXES) and {".aiff", ".au", ".caf", ".flac", ".mp3", ".opus", ".rf64", ".w64"} <= set(SUFFIXES)
    for i, name in enumerate(source.names):
        assert len(source.read(i)) == pytest.approx(len(noise()), rel=0.4), name


class TestLeftOut:
    def test_other_endings_are_counted(self, tmp_path, clips, caplog):
        for name in ("a.m4a", "b.M4A", "clips/c.txt", "README", ".hidden.m4a"):
            (tmp_path / name).touch()
        with caplog.at_level("INFO"):
            assert len(find_files(str(tmp_path), (".wav",))) == 5
            assert len(find_files(str(tmp_path / "clips/*.wav"), (".wav",))) == 5
        (line,) = caplog.messages
        assert line == f"data.path={tmp_path}: 4 files of other types are left out: 2 .m4a, 1 without an extension, 1 .txt"
        with pytest.raises(DataError, match=r"no file with one of the extensions .png; found 5 .wav, 2 .m4a, 1 without"):
            find_files(str(tmp_path), (".png",))

    @pytest.mark.parametrize("count", [9, 10])
    def test_up_to_nine_types_are_named(self, tmp_path, count):
        for i in range(count):
            (tmp_path / f"a.x{i}").touch()
        with pytest.raises(DataError) as error:
            find_files(str(tmp_path), (".wav",))
        named = ", ".join(f"1 .x{i}" for i in range(9))
        assert str(error.value).endswith(f"found {named}" + ", …" * (count == 10))

    def test_pipes_sockets_and_devices(self, tmp_path, clips, caplog, busy_pipe, monkeypatch):
        monkeypatch.chdir(tmp_path)
        busy_pipe("pipe.wav")
        os.symlink("/dev/zero", "zero.wav")
        os.symlink("nowhere", "nothing.wav")
        with socket.socket(socket.AF_UNIX) as listener, caplog.at_level("INFO"):
            listener.bind("socket.wav")
            # A dangling link is listed, and fails when it is read.
            assert [os.path.basename(file) for file in find_files(".", (".wav",))] == [f"{i}.wav" for i in range(5)] + [
                "nothing.wav"
            ]
            assert "3 FIFO, socket or device" in caplog.text
            assert len(find_files("*", (".wav",))) == 1
            for name in ("pipe.wav", "socket.wav", "zero.wav"):
                with pytest.raises(DataError, match="found 1 FIFO, socket or device"):
                    find_files(name, (".wav",))

    def test_a_manifest_that_names_a_pipe(self, tmp_path, clips, busy_pipe):
        pipe = busy_pipe(tmp_path / "pipe.wav")
        (tmp_path / "m.csv").write_text("\n".join(["file_name", *clips, "pipe.wav"]))
        batch = audio_data(str(tmp_path / "m.csv")).__getitems__([(0, i) for i in range(6)])
        assert batch["samples"] == [0, 1, 2, 3, 4] and batch["broken"] == [(5, f"{pipe}: is not a regular file")]

    @pytest.mark.parametrize("normalize", [True, False])
    @pytest.mark.parametrize("level", [0.0, 0.1])
    def test_silent_and_constant_recordings(self, tmp_path, clips, level, normalize):
        silent = write_wave(tmp_path / "clips" / "9.wav", np.full(RATE // 4, level), subtype="FLOAT")
        speech = audio_data(str(tmp_path), normalize=normalize)
        batch = speech.__getitems__([(0, i) for i in range(6)])
        assert batch["samples"] == [0, 1, 2, 3, 4]
        assert batch["broken"] == [(5, f"{silent}: is silent or constant: all samples are {level:.3g}")]
        joined = audio_data(str(tmp_path), normalize=normalize, join_seconds=1.0)
        for epoch in range(5):
            assert joined.__getitems__([(epoch, i) for i in range(6)])["samples"] == [0, 1, 2, 3, 4]
        write_wave(silent, np.full(RATE // 4, level), RATE // 2, subtype="FLOAT")  # resampled, its ends would ring
        with pytest.raises(ValueError, match="is silent or constant"):
            read_audio(silent, RATE)


def test_names_that_are_not_utf8(tmp_path, monkeypatch):
    """They work from the list of files to the last message, and after a resume."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        write_wave(f"waves/{i}.wav", noise(seed=i))
        os.rename(f"waves/{i}.wav", b"waves/caf\xe9-%d.wav" % i)
    with open(b"waves/na\xefve.wav", "wb") as file:
        file.write(b"no recording")
    with open("m.tsv", "wb") as file:
        file.write(b".\n" + b"".join(b"waves/caf\xe9-%d.wav\t4000\n" % i for i in range(3)))
    source = open_audio("m.tsv")
    assert [os.fsencode(file) for file in source.names] == [b"waves/caf\xe9-%d.wav" % i for i in range(3)]
    assert source.size(1) == len(source.read(1)) == 4000
    code, said = train(arguments("audio", "run", "train.steps=3", "data.min_seconds=0.1", "train.max_broken=0.5"))
    assert code == 0 and "skipped an unreadable sample: waves/na\\udcefve.wav: " in said, said
    code, said = train(["--resume", "run", "train.steps=4", "--resume-allow", "train.steps"])
    assert code == 0 and "resumes after step 3" in said, said


@pytest.mark.parametrize("column", ["struct", "binary"])
def test_parquet_that_datasets_did_not_write(tmp_path, clips, column):
    import pyarrow
    import pyarrow.parquet

    content = [(tmp_path / file).read_bytes() for file in clips]
    rows = [{"bytes": each, "path": None} for each in content] if column == "struct" else content
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}) if column == "struct" else pyarrow.binary()
    table = pyarrow.table({"n": range(5), "recording": pyarrow.array(rows, kind), "client_id": list("ababa")})
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "set" / "0.parquet")
    source = open_audio(str(tmp_path / "set"))
    assert len(source) == 5 and source.groups == list("ababa") and source.size(3) == 4000
    assert np.array_equal(source.read(3), read_audio(str(tmp_path / clips[3]), RATE))


class TestDigests:
    """Digests, with which a resumed run checks that its samples are the same."""

    def changed(self, before, after):
        return np.flatnonzero(before != after).tolist()

    def test_content_in_place(self, tmp_path, clips):
        before = audio_data(str(tmp_path)).contents()[1]
        os.utime(tmp_path / clips[1])
        assert self.changed(before, audio_data(str(tmp_path)).contents()[1]) == []
        write_wave(tmp_path / clips[3], noise(seed=9))  # of equal length
        names, after = audio_data(str(tmp_path)).contents()
        assert names[3].endswith("clips/3.wav") and self.changed(before, after) == [3]

    def test_images_in_place(self, tmp_path):
        from PIL import Image

        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.bmp")
        before = open_images(str(tmp_path)).digests()
        Image.new("RGB", (8, 8), (9, 0, 0)).save(tmp_path / "2.bmp")
        assert self.changed(before, open_images(str(tmp_path)).digests()) == [2]

    def test_rows_of_a_set(self, tmp_path):
        import datasets

        def digests(seeds, folder):
            files = [write_wave(tmp_path / f"{seed}.wav", noise(seed=seed)) for seed in seeds]
            rows = [{"bytes": open(file, "rb").read(), "path": None} for file in files]
            table = datasets.Dataset.from_dict({"audio": rows}).cast_column("audio", datasets.Audio(decode=False))
            table.to_parquet(str(tmp_path / folder / "0.parquet"))
            return open_audio(str(tmp_path / folder)).digests()

        before = digests([0, 1, 2], "old")
        assert self.changed(before, digests([0, 1, 2], "new")) == []
        assert self.changed(before, digests([0, 5, 2], "other")) == [1]

    def test_a_copy_elsewhere_is_the_same(self, tmp_path, clips):
        before = audio_data(str(tmp_path / "clips")).contents()[1]
        shutil.copytree(tmp_path / "clips", tmp_path / "another disk" / "recordings")
        assert self.changed(before, audio_data(str(tmp_path / "another disk")).contents()[1]) == []

    def test_speakers_of_joined_clips(self, tmp_path, clips):
        def digests(speakers, **kwargs):
            rows = [f"{file},{speaker}\n" for file, speaker in zip(clips, speakers, strict=True)]
            (tmp_path / "metadata.csv").write_text("file_name,speaker\n" + "".join(rows))
            return audio_data(str(tmp_path), **kwargs).contents()[1]

        before = digests("aabba", join_seconds=1.0)
        assert self.changed(before, digests("zzyyz", join_seconds=1.0)) == []
        assert self.changed(before, digests("aabbb", join_seconds=1.0)) == [4]
        assert self.changed(digests("aabba"), digests("aabbb")) == []

    def test_clips_that_are_joined(self, tmp_path, clips):
        before = audio_data(str(tmp_path), join_seconds=1.0).contents()[1]
        write_wave(tmp_path / clips[0], noise(0.3))
        assert self.changed(before, audio_data(str(tmp_path), join_seconds=1.0).contents()[1]) == [0]

    def test_hashes_of_names(self):
        """Names are hashed without their common prefix; there are more than the 1000 that a thread hashes at a time."""
        expected = [hashlib.blake2b(b"%d" % i, digest_size=8).digest() for i in range(2500)]
        assert Source([f"set/{i}" for i in range(2500)], None).digests().tobytes() == b"".join(expected)

    @pytest.mark.parametrize("count, every", [(10_000, 1), (10_001, 2)])
    def test_hashes_of_content(self, tmp_path, count, every):
        """Written out, because a run resumes with the digests of the version that began it. Of a file: size and edges."""
        large = np.random.default_rng(0).bytes(200_000)
        (tmp_path / "large").write_bytes(large)

        def file(i):
            if i == 4:
                raise FileNotFoundError
            return str(tmp_path / "large") if i == 2 else io.BytesIO(b"x" * (i % 7))

        def digest(i):
            parts = [b"%d" % i, b"%d " % (i % 7) + b"x" * (i % 7)]
            parts[1] = {2: b"200000 " + large[: 2**16] + large[-(2**16) :], 4: b"FileNotFoundError"}.get(i, parts[1])
            return hashlib.blake2b(b"\0".join(parts if i % every == 0 else parts[:1]), digest_size=8).digest()

        expected = np.frombuffer(b"".join(map(digest, range(count))), dtype=np.int64)
        found = Source([f"set/{i}" for i in range(count)], None, file=file).digests()
        assert self.changed(expected, found) == []

    @pytest.mark.parametrize(
        "begin, end, expected", [(2, 5, b"3 CDE"), (2, 8, b"6 CDEFGH"), (2, 12, b"10 CDEFIJKL"), (0, 26, b"26 ABCDWXYZ")]
    )
    def test_edges_of_a_range(self, begin, end, expected, monkeypatch):
        monkeypatch.setattr(data, "EDGE", 4)
        assert data.edges(io.BytesIO(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"), begin, end) == expected

    def test_only_some_of_many_are_read(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "COMPARED", 100)
        read = []
        source = Source([f"a/{i}" for i in range(250)], None, file=lambda i: read.append(i) or io.BytesIO(b"%d" % i))
        before = source.digests()
        assert sorted(read) == list(range(0, 250, 3)) and len(np.unique(before)) == 250
        source.names[7] = "a/x"
        assert self.changed(before, source.digests()) == [7]

    def test_start_and_end_of_large_files(self, tmp_path):
        content = np.random.default_rng(0).bytes(400_000)
        (tmp_path / "a").write_bytes(content)
        source = Source([str(tmp_path / "a")], None, file=lambda i: str(tmp_path / "a"))
        before = source.digests()
        for other in (b"x" + content[1:], content[:-1] + b"x", content + b"x", content[:-1]):
            (tmp_path / "a").write_bytes(other)
            assert self.changed(before, source.digests()) == [0]
