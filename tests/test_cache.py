"""The token cache: built once for all processes, gives the same blocks as in memory, is rebuilt when invalid."""

import errno
import json
import logging
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from d2v_fast.data import DataError, cache
from d2v_fast.data.cache import cached, files_state
from d2v_fast.data.text import TextData
from d2v_fast.masking import TokenMask
from tests.test_data import paragraphs

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus"
    path.mkdir()
    for i in range(3):
        (path / f"{i}.txt").write_text("\n".join(paragraphs(20, seed=i)))
    return path


@pytest.fixture
def opened(tmp_path, corpus):
    """Opens the corpus with a separate cache."""

    def open_it(**kwargs):
        settings = {"block_size": 16, "vocab_size": 300, "cache": str(tmp_path / "kept")} | kwargs
        return TextData(path=str(corpus), mask=TokenMask(0.3, 2), **settings)

    return open_it


@pytest.fixture
def counted(monkeypatch):
    """Names what is read and made from now on."""
    from d2v_fast.data import documents

    done = []
    types, texts = documents.FORMATS[".txt"]
    monkeypatch.setitem(documents.FORMATS, ".txt", (types, lambda file, column: done.append("read") or texts(file, column)))
    fill = cache._fill
    monkeypatch.setattr(cache, "_fill", lambda folder, *how: done.append(folder.name.split("-")[0]) or fill(folder, *how))
    return done


def entry(tmp_path, kind="tokens"):
    (found,) = (path for path in (tmp_path / "kept").glob(f"{kind}-*") if path.suffix != ".lock")
    return found


class TestOnce:
    def test_a_second_start_uses_the_cache(self, opened, counted, caplog):
        first = opened()
        assert counted == ["tokenizer"] + ["read"] * 6 + ["tokens"] + ["read"] * 3
        del counted[:]
        again = opened()
        assert counted == [] and np.array_equal(first.ids, again.ids) and isinstance(again.ids, np.memmap)
        assert np.array_equal(first.vocabulary.counts, again.vocabulary.counts)
        assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()
        assert first.contents()[1] == again.contents()[1] and not caplog.messages

    def test_other_blocks_are_cut_from_the_same_tokens(self, opened, counted):
        opened()
        del counted[:]
        assert opened(block_size=9, cross_documents=False).block_size == 9 and counted == []

    def test_another_vocabulary_gets_its_own_cache_entry(self, opened, counted, tmp_path):
        opened()
        opened(vocab_size=290)
        del counted[:]
        assert len(opened().tokenizer) == 300 and len(opened(vocab_size=290).tokenizer) == 290 and counted == []

    def test_the_tokenizer_that_a_run_has_saved_finds_the_same_tokens(self, opened, counted, tmp_path):
        opened().tokenizer.save_pretrained(tmp_path / "tokenizer")
        del counted[:]
        opened(tokenizer=str(tmp_path / "tokenizer"))
        assert counted == []

    def test_files_left_out_are_named_each_time(self, opened, corpus, caplog):
        (corpus / "9.txt").write_bytes(b"caf\xe9")
        for _ in range(2):
            opened(max_broken=0.5)
            assert "9.txt: cannot be read: 'utf-8' codec" in caplog.text
            caplog.clear()
        with pytest.raises(DataError, match=r"1 of 4 files cannot be read"):  # another limit is another question
            opened()


class TestAgain:
    def test_changed_text_invalidates_the_cache(self, opened, corpus, caplog):
        before = opened()
        text = (corpus / "1.txt").read_text()
        (corpus / "1.txt").write_text(text.replace("alpha", "omega", 1))  # of the same size
        after = opened(tokenizer="train")
        assert "the data have changed since it was built; rebuilding it" in caplog.text
        assert before.contents()[1] != after.contents()[1]
        (corpus / "1.txt").write_text(text)
        assert before.contents()[1] == opened().contents()[1]

    def test_a_new_file_invalidates_the_cache(self, opened, corpus):
        before = len(opened().ids)
        (corpus / "3.txt").write_text("\n".join(paragraphs(20)))
        assert len(opened().ids) > before

    @pytest.mark.parametrize("name", ["ids", "ends", "counts", "entry.json"])
    @pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
    def test_a_damaged_cache_is_rebuilt(self, opened, tmp_path, caplog, name, how):
        whole = np.array(opened().ids)
        file = entry(tmp_path) / name
        content = file.read_bytes()
        if how == "gone":
            file.unlink()
        else:
            file.write_bytes(content[:-3] if how == "cut" else bytes([content[0] ^ 1]) + content[1:])
        assert np.array_equal(opened().ids, whole)
        assert f"{entry(tmp_path)}: is damaged: " in caplog.text and "rebuilding it" in caplog.text

    def test_another_cache_version_is_rebuilt(self, opened, tmp_path, caplog):
        opened()
        file = entry(tmp_path) / "entry.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 0}))
        opened()
        assert f"has version 0, expected {cache.VERSION}; rebuilding it" in caplog.text

    def test_after_an_error_nothing_is_left(self, opened, corpus, tmp_path):
        for file in corpus.iterdir():
            file.write_text(" \n ")
        with pytest.raises(DataError, match="holds no text"):
            opened()
        assert [path for path in (tmp_path / "kept").iterdir() if path.name.startswith("tokens") and path.is_dir()] == []


class TestDisk:
    def test_a_full_disk(self, opened, monkeypatch, tmp_path):
        open_path = Path.open

        def full(self, *how, **more):
            return open("/dev/full", "wb") if self.name == "ids" else open_path(self, *how, **more)

        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(DataError, match=r"data.cache=.*/kept: cannot be written: No space left on device; .* free some"):
            opened()
        assert not list((tmp_path / "kept").glob("tokens*.tmp"))

    def test_a_file_in_place_of_the_folder(self, opened, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(DataError, match=r"data.cache=.*/file: cannot be written: .* set another folder"):
            opened(cache=str(tmp_path / "file"))

    def test_an_error_of_the_data_is_not_the_caches(self, tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            cached(str(tmp_path), "x", 1, 1, lambda folder: open(tmp_path / "gone"))
        FileLock(f"{tmp_path}/x-{cache.fingerprint(1)}.lock").acquire(timeout=0)  # released, not merely collected
        assert caught.traceback

    def test_an_error_within_the_folder_is_the_caches(self, tmp_path):
        def denied(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder / "ids"))

        with pytest.raises(DataError, match=r"data.cache=.*: cannot be written: Permission denied; .* set another folder"):
            cached(str(tmp_path), "x", 1, 1, denied)

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def acquire(*args, **kwargs):
            raise NotImplementedError("no flock here")

        monkeypatch.setattr(cache.FileLock, "acquire", acquire)
        with pytest.raises(DataError, match=r"data.cache=.*: cannot be written: no flock here; .* set another folder"):
            cached(str(tmp_path), "x", 1, 1, lambda folder: {})


class TestState:
    def test_of_files(self, tmp_path):
        """It follows the content and the names within the folder, and not the folder; a dangling link has one too."""

        def state(folder="set"):
            return files_state(str(tmp_path / folder), [str(tmp_path / folder / name) for name in "ab"])

        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "a").write_text("x")
        (tmp_path / "set" / "b").symlink_to(tmp_path / "c")
        dangling = state()
        assert state() == dangling
        (tmp_path / "c").write_text("x")
        whole = state()
        (tmp_path / "c").write_text("xy")
        longer = state()
        os.utime(tmp_path / "c", ns=(0, 0))
        assert len({dangling, whole, longer, state()}) == 4
        before = state()
        os.rename(tmp_path / "set", tmp_path / "moved")
        assert state("moved") == before

    def test_folders_of_a_cache_are_made(self, tmp_path):
        folder, made = cached(str(tmp_path / "a" / "b"), "x", 1, 1, lambda folder: {"n": 2})
        assert folder.parent == tmp_path / "a" / "b" and made == {"n": 2}


class TestProcesses:
    def start(self, task, count=1):
        processes = [FORK.Process(target=task) for _ in range(count)]
        for process in processes:
            process.start()
        return processes

    def test_one_process_builds_while_others_wait(self, tmp_path):
        ready, waiting = FORK.Barrier(4), FORK.Event()

        class Waiting(logging.Handler):
            def emit(self, record):
                if "waiting for another process" in record.getMessage():
                    waiting.set()

        def make(folder):
            assert waiting.wait(20)
            with open(tmp_path / "made", "a") as file:
                file.write(f"{os.getpid()}\n")
            (folder / "part").write_text("x" * 1000)
            return {"answer": 42}

        def task():
            cache.log.addHandler(Waiting())
            cache.log.setLevel("INFO")
            ready.wait(20)
            folder, made = cached(str(tmp_path / "kept"), "x", 1, 1, make)
            (tmp_path / f"done-{os.getpid()}").write_text(f"{made['answer']} {len((folder / 'part').read_text())}")

        for process in self.start(task, 4):
            process.join(20)
        assert [file.read_text() for file in tmp_path.glob("done-*")] == ["42 1000"] * 4
        assert len((tmp_path / "made").read_text().split()) == 1

    def test_a_killed_builder_does_not_block_others(self, tmp_path):
        begun = FORK.Event()

        def stuck(folder):
            (folder / "part").write_text("half")
            begun.set()
            signal.pause()

        (process,) = self.start(lambda: cached(str(tmp_path), "x", 1, 1, stuck))
        assert begun.wait(20)
        process.kill()
        process.join(20)
        folder, made = cached(str(tmp_path), "x", 1, 1, lambda folder: {"files": len(list(folder.iterdir()))})
        assert made == {"files": 0} and not (folder / "part").exists()


@pytest.mark.parametrize("cross_documents", [True, False])
@pytest.mark.parametrize("block_size", [5, 16])
def test_blocks_by_arithmetic(opened, corpus, cross_documents, block_size):
    """Against the tokens of each document, joined and cut in memory."""
    rng = np.random.default_rng(0)
    lines = [" ".join(["dog"] * n) for n in (*rng.integers(1, 40, 60), 1, 2, 3, 13, 14, 15, 28)]
    (corpus / "2.txt").write_text("\n".join(lines))
    data = opened(cross_documents=cross_documents, block_size=block_size)
    cls, sep = data.tokenizer.cls_token_id, data.tokenizer.sep_token_id
    texts = [line for i in range(3) for line in (corpus / f"{i}.txt").read_text().split("\n")]
    documents = data.tokenizer(texts, add_special_tokens=False)["input_ids"]
    if cross_documents:
        stream = [token for ids in documents for token in [*ids, sep]]
        room = block_size - 1
        expected = [[cls, *stream[i : i + room]] for i in range(0, len(stream) - room + 1, room)]
    else:
        room = block_size - 2
        expected = [[cls, *ids[i : i + room], sep] for ids in documents for i in range(0, len(ids), room)]
        assert data.lengths.tolist() == [len(block) for block in expected]
    assert [data.load(i, None).tolist() for i in range(len(data))] == expected


def test_a_document_of_no_token(tmp_path):
    """A normalizer may leave nothing of a text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"cls_token": "[C]", "sep_token": "[S]", "pad_token": "[P]", "mask_token": "[M]", "unk_token": "[U]"}
    words = {word: i for i, word in enumerate([*special.values(), "a", "b", *(f"w{i}" for i in range(70_000))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[U]"))
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizers.Whitespace(), normalizers.Replace(Regex("x"), "")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("x\na b\nx x\nx\nb w69999\nx")
    settings = dict(path=str(tmp_path / "a.txt"), mask=TokenMask(0.3, 1), tokenizer=str(tmp_path / "tokenizer"))
    data = TextData(**settings, block_size=4, cross_documents=False, cache=str(tmp_path))
    assert [data.load(i, None).tolist() for i in range(len(data))] == [[0, 5, 6, 1], [0, 6, 70_006, 1]]
    assert data.ids.dtype == np.uint32 and data.vocabulary.counts[[1, 5, 6, 70_006]].tolist() == [0, 1, 2, 1]
    whole = TextData(**settings, block_size=10, cache=str(tmp_path))
    assert whole.load(0, None).tolist() == [0, 1, 5, 6, 1, 1, 1, 6, 70_006, 1] and whole.vocabulary.counts[1] == 6
