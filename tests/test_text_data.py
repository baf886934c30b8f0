"""Documents as they stand in files, and what a tokenizer makes of them."""

import bz2
import csv
import gzip
import json
import lzma
import os
import re

import numpy as np
import pytest
import torch

from d2v_fast import Data2Vec, HeadConfig, LossConfig, TargetsConfig, build_encoder
from d2v_fast.checkpoint import CheckpointError
from d2v_fast.config import parse
from d2v_fast.data import DataError, documents, text
from d2v_fast.data.documents import load_documents
from d2v_fast.data.text import TextData, can_cut, corpus_backend, load_tokenizer, train_tokenizer
from d2v_fast.decoders import ConvDecoder
from d2v_fast.export import Exported
from d2v_fast.masking import RandomMask, TokenMask
from d2v_fast.train.build import build, make_data, make_encoder
from d2v_fast.train.loop import loop
from tests import models
from tests.test_cli import TEXT

ODD = ["one\x85two", "a\u2028b\u2029c", "x\x0cy\x0bz\x1cw\x1dv\x1eu", "plain"]  # str.splitlines() makes more of each
WORDS = "alpha beta gamma delta dog runs over under".split()
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def sentences(count=200, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 12)) for _ in range(count)]


def text_data(path, **settings):
    return TextData(path=str(path), mask=TokenMask(0.3, 1), **{"block_size": 16, "vocab_size": 300} | settings)


def texts(path, **settings):
    return list(load_documents(str(path), **settings))


class TestFormats:
    @pytest.fixture
    def written(self, tmp_path):
        def write(name, rows):
            file = tmp_path / name
            if name.endswith("jsonl"):
                file.write_text("".join(json.dumps({"id": 1, "text": row}, ensure_ascii=False) + "\r\n" for row in rows))
            elif name.endswith("csv"):
                with file.open("w", newline="") as stream:
                    csv.writer(stream).writerows([["id", "text"], *([1, row] for row in rows)])
            else:
                file.write_text("\n".join(rows))
            return file

        return write

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
    def test_only_a_line_feed_ends_a_line(self, written, name):
        assert texts(written(name, ODD)) == ODD

    def test_ends_of_lines_in_text(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"unix\nwindows\r\nmac\rlast")
        assert texts(tmp_path) == ["unix", "windows", "mac", "last"]

    def test_quoted_fields_span_lines(self, written):
        rows = ['two\nlines, "quoted"', "three\r\nlines"]
        assert texts(written("a.csv", rows)) == rows

    def test_words_for_nothing_are_text(self, written):
        rows = ["NA", "None", "null", "nan", "N/A", "", "1"]
        assert texts(written("a.csv", rows)) == [row for row in rows if row]
        assert texts(written("a.csv", ["1", "2.5"])) == ["1", "2.5"]

    def test_a_short_row_and_tabs(self, tmp_path):
        (tmp_path / "a.csv").write_text("text,id\none,1\ntwo\n\n")
        assert texts(tmp_path / "a.csv") == ["one", "two"]
        (tmp_path / "a.csv").write_text("text,id\none\ntwo\n")
        assert texts(tmp_path / "a.csv") == ["one", "two"]
        (tmp_path / "a.tsv").write_text('id\ttext\n1\tan "odd quote\n2\t"b", c\n')
        assert texts(tmp_path / "a.tsv") == ['an "odd quote', '"b", c']

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("a.csv", 'text\n"open\nb\n', "line 3: unexpected end of data"),
            ("a.csv", "id,text\n1,two, three\n", "line 2: found 3 fields, the header names 2"),
            ("a.jsonl", '{"text": "a"}\n}{', "line 2 is not JSON: Expecting value"),
            ("a.jsonl", '{"text": ' + "[" * 100_000, "line 1 is not JSON: maximum recursion depth"),
            ("a.jsonl", '{"text": "a"}\n5', "line 2: found a number, expected an object or a string"),
            ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}\n' * 600, r"has no text column, found text \(list or text\)"),
            ("a.jsonl", '{"text": "a"}\n' * 1000 + '{"text": 7}', "line 1001: 'text' is a number, expected a string"),
            ("a.csv", "id,n\n1,2\n", r"has no text column, found id \(number\), n \(number\)"),
        ],
    )
    def test_what_is_wrong_and_where(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            texts(tmp_path)

    @pytest.mark.parametrize("name, number", [("a.txt", 2), ("a.jsonl", 2), ("a.csv", 3)])
    def test_a_line_without_end(self, written, monkeypatch, name, number):
        file, longest = written(name, ["short", "x" * 1000]), written("longest.txt", ["short", "x" * 500])
        monkeypatch.setattr(documents, "LONGEST", 500)
        with pytest.raises(DataError, match=f"cannot be read: line {number} has more than 500 characters"):
            texts(file)
        assert texts(longest) == ["short", "x" * 500]

    def test_a_field_is_as_long_as_a_line(self, written):
        assert texts(written("a.csv", ["x" * 200_000])) == ["x" * 200_000]  # Python's limit is 131 072

    def test_json_in_its_other_forms(self, tmp_path):
        for name, content in {
            "list.json": json.dumps([{"text": "a"}, {"text": None}, {"id": 3}, {"text": "b"}], indent=1),
            "strings.json": '["a", "b"]',
            "string_lines.jsonl": '"a"\n"b"\n',
            "mark.jsonl": '\ufeff{"text": "a"}\n\n{"text": "b"}',
        }.items():
            (tmp_path / name).write_text(content)
            assert texts(tmp_path / name) == ["a", "b"], name

    def test_half_a_surrogate_pair_is_no_character(self, tmp_path):
        (tmp_path / "a.jsonl").write_text(r'{"text": "a \ud83d b"}' + "\n")
        assert texts(tmp_path) == ["a ? b"]
        text_data(tmp_path, block_size=2)

    @pytest.mark.parametrize("ending, compress", [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
    def test_compressed(self, tmp_path, ending, compress):
        for name, content in {"a.txt": "a\nb\n", "a.jsonl": '{"text": "a"}\n{"text": "b"}', "a.csv": "text\na\nb\n"}.items():
            (tmp_path / (name + ending)).write_bytes(compress(content.encode()))
            assert texts(tmp_path / (name + ending)) == ["a", "b"]
        (tmp_path / "b.txt").write_text("c\n")
        assert texts(tmp_path / "[ab].txt*") == ["a", "b", "c"]

    def test_cut_off_while_it_was_compressed(self, tmp_path):
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"line\n" * 1000)[:-20])
        with pytest.raises(DataError, match=rf"^data\.path={tmp_path}/a\.txt\.gz: cannot be read: Compressed file ended"):
            texts(tmp_path)


class TestShards:
    """Files of one corpus need nothing in common but the column of the text."""

    @pytest.mark.parametrize(
        "others", [[{"meta": {"url": "u"}}, {"meta": {"url": None, "n": 1}}], [{"id": 1}, {"id": "x", "lang": "en"}], [{}, {}]]
    )
    def test_json_lines(self, tmp_path, others):
        for name, other in zip("ab", others, strict=True):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": name} | other) + "\n" for _ in range(3)))
        assert texts(tmp_path) == [*"aaabbb"]

    def test_parquet_and_csv(self, tmp_path):
        import datasets

        for name, other in (("a", {"id": [1, 2]}), ("b", {"id": ["x", "y"], "image": [b"1", b"2"]})):
            datasets.Dataset.from_dict({"text": [name] * 2, **other}).to_parquet(str(tmp_path / f"{name}.parquet"))
        (tmp_path / "a.csv").write_text("id,text\n1,a\n2,a\n")
        (tmp_path / "b.csv").write_text("text,lang\nb,en\nb,en\n")
        assert texts(tmp_path / "*.parquet") == texts(tmp_path / "*.csv") == [*"aabb"]

    @pytest.mark.parametrize(
        "ending, content, found",
        [
            ("jsonl", '{"body": "b", "n": 1}\n', "no line has a 'text', the last has body, n"),
            ("csv", "a,b\n1,2", "no column 'text', found a, b"),
        ],
    )
    def test_the_one_without_the_column_is_named(self, tmp_path, ending, content, found):
        (tmp_path / f"a.{ending}").write_text('{"text": "a"}\n' if ending == "jsonl" else "text\na\n")
        (tmp_path / f"b.{ending}").write_text(content)
        with pytest.raises(DataError, match=rf"b\.{ending}: cannot be read: {found}"):
            texts(tmp_path)

    def test_columns_of_parquet_are_named_with_their_types(self, tmp_path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {"text": pa.array(["a", None, "b"]).dictionary_encode(), "n": [1, 2, 3]}
        pq.write_table(pa.table(kinds), tmp_path / "words.parquet")
        assert texts(tmp_path / "words.parquet") == ["a", "b"]
        pq.write_table(pa.table({"id": [1], "image": [{"bytes": b"x"}]}), tmp_path / "none.parquet")
        with pytest.raises(DataError, match=r"no text column, found id \(int64\), image \(struct<bytes: binary>\)"):
            texts(tmp_path / "none.parquet")
        pq.write_table(pa.table({"body": ["b"], "n": [1]}), tmp_path / "words2.parquet")
        with pytest.raises(DataError, match=r"words2\.parquet: .*: no text column 'text', found body \(text\), n \(int64\)"):
            texts(tmp_path / "words*.parquet")


class TestBrokenFiles:
    @pytest.fixture
    def shards(self, tmp_path):
        for i in range(300):
            (tmp_path / f"{i:03}.txt").write_text("fine\n" * 5)
        (tmp_path / "123.txt").write_bytes("first\ncafé\n".encode("latin-1"))
        return tmp_path

    def test_one_of_many_is_left_out_and_named(self, shards, caplog):
        assert texts(shards) == ["fine"] * 5 * 299
        assert f"left out: data.path={shards}/123.txt: cannot be read: 'utf-8' codec can't decode" in caplog.text

    def test_at_the_limit(self, tmp_path):
        for name, content in (("a", "fine"), ("b", "caf\xe9")):
            (tmp_path / f"{name}.txt").write_text(content, encoding="latin-1")
        assert texts(tmp_path, max_broken=0.5) == ["fine"]
        (tmp_path / "a.txt").write_bytes(b"\xe9")
        with pytest.raises(DataError, match="2 of 2 files cannot be read"):
            texts(tmp_path, max_broken=1.0)

    def test_five_of_more_are_named(self, tmp_path):
        for i in range(7):
            (tmp_path / f"{i}.txt").write_bytes(b"\xe9")
        with pytest.raises(DataError, match="7 of 7 files cannot be read") as caught:
            texts(tmp_path)
        assert re.findall(r"(\d)\.txt: cannot be read", str(caught.value)) == [*"01234"]

    def test_empty_files_are_counted(self, tmp_path, caplog):
        for name, content in zip("abc", ("text", "", ""), strict=True):
            (tmp_path / f"{name}.txt").write_text(content)
        assert texts(tmp_path / "a.txt") == ["text"] and not caplog.messages
        assert texts(tmp_path) == ["text"] and caplog.messages == [f"2 of 3 files of {tmp_path} are empty"]

    def test_the_limit_is_that_of_the_run(self, shards):
        settings = ["--config", "text/tiny", f"data.path={shards}", "data.block_size=16", "data.vocab_size=270"]
        assert len(make_data(parse(settings)[0])) > 0
        with pytest.raises(DataError, match=r"1 of 300 files cannot be read, more than train.max_broken=0.001:\n.*123\.txt: "):
            make_data(parse([*settings, "train.max_broken=0.001"])[0])


def unigram(folder):
    """As SentencePiece models are converted: the special tokens are pieces too, and better ones than any other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = (
        [(token, 0.0) for token in SPECIAL]
        + [(f"▁{word}", -5.0) for word in WORDS]
        + [(c, -8.0) for c in "▁<>/abdegkmnoprstuv"]
    )
    backend = Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)


def words(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *WORDS, "<", ">", "s>", "mask>", "pad>", "/s>", "unk>"]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ROLES)


def pieces(folder):
    from transformers import BertTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"[]<>/", "mask", "pad", "cls", "sep", "s", "unk"]
    (folder / "vocab.txt").write_text("\n".join(names))
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True)


def bytewise(folder):
    return train_tokenizer(iter(sentences()), 300, 512)


ROLES = dict(zip(["bos_token", "pad_token", "eos_token", "unk_token", "mask_token"], SPECIAL, strict=True))
ROLES |= dict(cls_token="<s>", sep_token="</s>")
FAMILIES = [bytewise, pieces, unigram, words]


@pytest.mark.parametrize("family", FAMILIES)
class TestLoadedTokenizer:
    @pytest.fixture
    def saved(self, family, tmp_path):
        def save(change=lambda tokenizer: None):
            (tmp_path / "tokenizer").mkdir(exist_ok=True)
            tokenizer = family(tmp_path / "tokenizer")
            change(tokenizer)
            tokenizer.save_pretrained(tmp_path / "tokenizer")
            return str(tmp_path / "tokenizer")

        return save

    def test_special_tokens_in_a_text_are_text(self, family, saved, tmp_path):
        folder = saved()
        special = load_tokenizer(folder).all_special_tokens
        lines = [f"{token} alpha {token} beta{token}{token} dog" for token in special]
        (tmp_path / "a.txt").write_text("\n".join(lines))
        data = text_data(tmp_path / "a.txt", tokenizer=folder, cross_documents=False, block_size=512)
        t = data.tokenizer
        for line, i in zip(lines, range(len(data)), strict=True):
            ids = data.load(i, None)[1:-1]
            assert not set(ids) & set(t.all_special_ids)
            expected = line.lower() if family is pieces else line
            assert t.decode(ids).replace(" ", "") == expected.replace(" ", "")

    def test_what_it_was_last_used_for_is_forgotten(self, family, saved, tmp_path):
        (tmp_path / "a.txt").write_text("\n".join(sentences()))
        plain = text_data(tmp_path / "a.txt", tokenizer=saved())

        def use(tokenizer):
            tokenizer.backend_tokenizer.enable_truncation(5)
            tokenizer.backend_tokenizer.enable_padding(length=64)

        used = text_data(tmp_path / "a.txt", tokenizer=saved(use))
        assert used.tokenizer.backend_tokenizer.truncation["max_length"] == 5
        assert np.array_equal(used.ids, plain.ids)


def bert(folder):
    from transformers import BertTokenizerFast

    names = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *"[]<>/'abcdxyz",
        *("##" + c for c in "abcdefghijklmnopqrstuvwxyz"),
    ]
    (folder / "vocab.txt").write_text("\n".join([*names, "mask", "cls", "sep", "pad", "unk"]))
    return BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True)


PARTS = [*WORDS, *"don't you'LL é e\u0301 \u0301x 中文 ß İ ﬁ 12a … ! <mask> a<s> [MASK]".split()]
PARTS += ["x 's", "a\u200bb", "\u00a0x", "  a", "   ", "\n", "\t b", " ", "a\n c", "\u2028", "\x00", "\U0001f600"]


def spaced(folder):
    return train_tokenizer(iter(["a    b  c   d \n  e dog runs"] * 50 + sentences()), 400, 512)  # has tokens of several spaces


class TestPieces:
    """Long documents are encoded in pieces, where that is known to give the tokens of the whole."""

    def document(self, words, seed=0):
        return "".join(np.random.default_rng(seed).choice([part + " " * (i % 4 != 3) for i, part in enumerate(PARTS)], words))

    @pytest.mark.parametrize("family", [spaced, bert])
    def test_tokens_are_those_of_whole_documents(self, family, tmp_path, monkeypatch):
        documents = [self.document(4000), "dog", self.document(300, seed=1)]
        (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": each}) for each in documents))
        tokenizer = family(tmp_path)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        backend, sep = corpus_backend(tokenizer), tokenizer.sep_token_id
        assert can_cut(backend)
        whole = [[*backend.encode(each, add_special_tokens=False).ids, sep] for each in documents]
        found = []
        for size in (1, 40, 10**9):
            monkeypatch.setattr(text, "PIECE", size)
            data = text_data(tmp_path / "a.jsonl", tokenizer=str(tmp_path / "tokenizer"), cache=str(tmp_path / str(size)))
            assert data.ids.tolist() == [i for ids in whole for i in ids]
            assert data.document_ends.tolist() == np.cumsum([len(ids) for ids in whole]).tolist()
            found.append(data.contents()[1].tolist())
        assert found[0] == found[1] == found[2]
        monkeypatch.setattr(text, "PIECE", 1)
        assert sum(map(len, text._batches(documents, cut=True))) > 500

    def test_more_documents_than_are_encoded_at_a_time(self, tmp_path):
        """A thousand; each block is still of its own document."""
        lines = [f"{WORDS[i % 8]} {i}" for i in range(2500)]
        (tmp_path / "a.txt").write_text("\n".join(lines))
        data = text_data(tmp_path / "a.txt", cross_documents=False, block_size=32)
        assert len(data) == 2500 and len(data.document_ends) == 2500 and data.document_ends[-1] == len(data.ids)
        found = [data.tokenizer.decode(data.load(i, None)[1:-1]).strip() for i in (0, 999, 1000, 1001, 2000, 2499)]
        assert found == [lines[i] for i in (0, 999, 1000, 1001, 2000, 2499)]

    def test_batches_are_small(self):
        documents = [self.document(100_000), self.document(10), "x" * 500_000]
        for cut, most in ((True, 2**18 + 500_000), (False, 2**18 + max(map(len, documents)))):
            batches = list(text._batches(documents, cut))
            assert "".join(piece for batch in batches for piece, _ in batch) == "".join(documents)
            assert sum(last for batch in batches for _, last in batch) == 3
            assert max(sum(len(piece) for piece, _ in batch) for batch in batches) <= most
        assert max(len(piece) for batch in text._batches(documents[:1], True) for piece, _ in batch) < text.PIECE + 1000

    def test_other_tokenizers_get_whole_documents(self, tmp_path):
        from tokenizers import AddedToken, normalizers

        def added(folder):
            tokenizer = bytewise(folder)
            tokenizer.add_tokens([AddedToken("dog runs", normalized=False)])
            return tokenizer

        def normalized(folder):
            tokenizer = bytewise(folder)
            tokenizer.backend_tokenizer.normalizer = normalizers.Replace("dog runs", "dogruns")
            return tokenizer

        for family in (unigram, words, added, normalized):
            backend = corpus_backend(family(tmp_path))
            assert not can_cut(backend), family
            if family in (added, normalized):  # and has other tokens in pieces
                whole, *parts = (
                    backend.encode(each, add_special_tokens=False).ids for each in ("a dog runs", "a dog", " runs")
                )
                assert whole != parts[0] + parts[1]
        assert can_cut(corpus_backend(bytewise(tmp_path))) and can_cut(corpus_backend(bert(tmp_path)))


def test_a_read_is_of_about_4_mib():
    sizes = [(2**22, 1), (2**23, 100), (2**30, 10), (100, 50), (0, 9)]  # bytes and rows
    assert [documents.rows_per_read(*size) for size in sizes] == [1, 50, 1, 1000, 1000]


def test_a_trained_tokenizer_is_like_robertas():
    """Ids of the special tokens, those around a text and around a pair, and a first word like any other."""
    tokenizer = bytewise(None)
    dog, runs = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("dog", "runs"))
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [0, 1, 2, 3, 4]
    assert tokenizer("runs dog")["input_ids"] == [0, *runs, *dog, 2]
    assert tokenizer("runs", "dog")["input_ids"] == [0, *runs, 2, 2, *dog, 2]


@pytest.mark.parametrize(
    "family, begin, inside",
    [
        (bytewise, ["<s>", "<mask>", "Ġ"], ["a", "d"]),
        (bert, ["[CLS]", "dog", "a"], ["##a", "##z"]),
        (unigram, ["<s>", "▁dog"], ["d", "/"]),
    ],
)
def test_which_tokens_continue_a_word(family, begin, inside, tmp_path):
    tokenizer = family(tmp_path)
    continues = text._continuations(tokenizer, len(tokenizer) + 3)  # the corpus may have ids beyond
    assert len(continues) == len(tokenizer) + 3
    assert not continues[tokenizer.convert_tokens_to_ids(begin)].any()
    assert continues[tokenizer.convert_tokens_to_ids(inside)].all()


def test_a_vocabulary_with_unused_ids(tmp_path):
    """Ids end at the largest one, however many tokens there are."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"cls_token": "[C]", "sep_token": "[S]", "pad_token": "[P]", "mask_token": "[M]", "unk_token": "[U]"}
    ids = {token: i for i, token in enumerate(special.values())} | {"a": 7, "##b": 90}
    backend = Tokenizer(models.WordLevel(ids, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("a ##b a ##b")
    vocabulary = text_data(tmp_path / "a.txt", tokenizer=str(tmp_path / "tokenizer"), block_size=4).vocabulary
    assert vocabulary.size == 91 and vocabulary.counts[[1, 7, 90]].tolist() == [1, 2, 2] and vocabulary.counts.sum() == 5
    assert np.flatnonzero(vocabulary.continues).tolist() == [90]
    assert np.flatnonzero(vocabulary.special).tolist() == [0, 1, 2, 3, 4]


def test_special_tokens_in_a_text_that_a_tokenizer_is_trained_on(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"{line} <mask><s></s> <unk> <pad>" for line in sentences()))
    data = text_data(tmp_path)
    assert not np.isin(data.ids[data.ids != data.tokenizer.sep_token_id], data.tokenizer.all_special_ids).any()
    assert (data.ids == data.tokenizer.sep_token_id).sum() == 200  # those between documents
    assert "<mask><s></s> <unk> <pad>" in data.tokenizer.decode(data.ids[:60])


def test_dropout_of_merges_would_cut_each_run_in_another_way(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(sentences()))
    tokenizer = bytewise(tmp_path)
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer.backend_tokenizer.model.dropout = 0.5
    tokenizer.save_pretrained(tmp_path / "dropout")
    found = [text_data(tmp_path / "a.txt", tokenizer=str(tmp_path / name)).ids for name in ("plain", "dropout")]
    assert np.array_equal(*found)
    assert load_tokenizer(str(tmp_path / "dropout")).backend_tokenizer.model.dropout == 0.5


def test_a_model_without_a_tokenizer(tmp_path):
    from transformers import RobertaConfig

    RobertaConfig(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="holds a model but no tokenizer vocabulary"):
        load_tokenizer(str(tmp_path))


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    bytewise(tmp_path).save_pretrained(tmp_path / "tokenizer")
    assert load_tokenizer("~/tokenizer").mask_token_id == 4


@pytest.mark.parametrize("own, expected", [(10**30, 38), (512, 38), (20, 20)])
def test_the_exported_tokenizer_knows_the_positions_of_the_encoder(tmp_path, own, expected):
    config, _ = parse(["--config", "text/tiny", "encoder.config.max_position_embeddings=40"])
    encoder = make_encoder(config, {"vocab_size": 300, "pad_token_id": 1})
    tokenizer = train_tokenizer(iter(sentences()), 300, own)
    Exported(encoder, tokenizer).processor.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.model_max_length == expected
    assert len(again("alpha " * 100, truncation=True)["input_ids"]) == expected
    encoder(again("alpha " * 100, truncation=True, return_tensors="pt")["input_ids"])
    assert text_data("builtin", tokenizer=str(tmp_path)).processor(encoder).model_max_length == expected


@pytest.mark.parametrize("ending", ["txt", "parquet"])
def test_file_names_that_are_not_utf_8(tmp_path, ending):
    import datasets

    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9." + ending.encode())
    if ending == "txt":
        with open(name, "w") as file:
            file.write("a\nb\n")
    else:
        datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(str(tmp_path / "ascii"))
        os.rename(tmp_path / "ascii", name)
    assert texts(name) == texts(tmp_path) == ["a", "b"]


@pytest.mark.usefixtures("here")
def test_a_run_resumes_on_the_same_text_only(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(sentences()))
    settings = [*TEXT, "data.path=a.txt", "train.output=run"]
    loop(build(parse(settings)[0]))
    more = ["--resume", "run", "train.steps=3", "--resume-allow", "train.steps"]
    before = file.read_text()
    file.write_text(before.replace("alpha", "delta", 1))
    with pytest.raises(CheckpointError, match=r"samples\.content: was"):
        build(parse(more)[0])
    file.write_text(before)
    assert loop(build(parse(more)[0])) == 0


@pytest.mark.usefixtures("here")
def test_a_run_resumes_with_the_same_multiple_only(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(sentences()))
    loop(build(parse([*TEXT, "data.path=a.txt", "data.cross_documents=false", "train.output=run"])[0]))
    more = ["--resume", "run", "train.steps=3", "--resume-allow", "train.steps"]
    with pytest.raises(CheckpointError, match=r"data\.length_multiple: was 1, is 8"):
        build(parse([*more, "data.length_multiple=8"])[0])
    assert loop(build(parse(more)[0])) == 0


@pytest.mark.parametrize("views", [None, 2])
def test_padding_to_a_multiple_changes_no_loss(tmp_path, views):
    (tmp_path / "a.txt").write_text("\n".join(words[: 20 + 7 * i] for i, words in enumerate(sentences(6))))
    losses, lengths = [], []
    for multiple in (1, 16):
        mask = RandomMask(0.5) if views else TokenMask(0.3, 1)
        settings = dict(block_size=40, vocab_size=300, cross_documents=False, length_multiple=multiple)
        data = TextData(path=str(tmp_path / "a.txt"), mask=mask, views=views, **settings)
        torch.manual_seed(0)
        own = {name: data.tokens[name] for name in ("vocab_size", "pad_token_id")} | {"max_position_embeddings": 64}
        encoder = build_encoder("roberta", config=models.CONFIGS["roberta"] | own)
        predictor = ConvDecoder(32, width=32, groups=4, noise=0.0) if views else HeadConfig()
        targets = TargetsConfig(top_k=2, norm="instance")
        model = Data2Vec(encoder, predictor, targets=targets, loss=LossConfig(impl="eager")).double()
        batch = data.__getitems__([(0, i) for i in range(3)])
        lengths.append(batch["mask"].shape[-1])
        losses.append(model(**{name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}).loss.item())
    assert lengths[0] % 16 and lengths[1] == -(-lengths[0] // 16) * 16
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_folders_written_by_save_to_disk(tmp_path):
    import datasets

    splits = {name: datasets.Dataset.from_dict({"id": [1, 2], "text": [name, None]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    splits["train"].save_to_disk(str(tmp_path / "one"))
    assert texts(tmp_path / "both") == texts(tmp_path / "one") == ["train"]
    assert texts(tmp_path / "both", split="test") == ["test"]
    with pytest.raises(DataError, match=r"data\.split=dev: .* has train, test"):
        texts(tmp_path / "both", split="dev")
