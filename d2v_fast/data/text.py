"""Text: documents → tokens → packed blocks → masked source, full target, mask."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
import xxhash

from d2v_fast.choices import PositiveFloat, PositiveInt, Range, one_of
from d2v_fast.data import DataError, PretrainingData, first_line, is_local, is_saved
from d2v_fast.data.cache import cached, fingerprint
from d2v_fast.data.documents import Documents, arrow_types, choose_column, find_documents
from d2v_fast.data.streaming import Stream, is_remote
from d2v_fast.masking import Draws, ExactBlockMask, RandomMask, TokenMask, Vocabulary

log = logging.getLogger(__name__)

TOKENIZER, IDS, ENDS, COUNTS = "tokenizer.json", "ids", "ends", "counts"  # files in the cache
TeacherInput = Literal["full", "masked_only"]
CUT = re.compile("(?<=[A-Za-z]) (?=[A-Za-z])")  # where a text may be cut, see `can_cut`
PIECE = 2**12  # minimum length, in characters, of a piece that is cut off
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def train_tokenizer(texts: Iterator[str], vocab_size: int, max_length: int) -> Any:
    """A byte-level BPE tokenizer with RoBERTa's special tokens, as a `PreTrainedTokenizerFast`."""
    return _wrap(_train(texts, vocab_size), max_length)


def _train(texts: Iterator[str], vocab_size: int) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing

    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer = bpe._tokenizer
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return tokenizer


def _wrap(tokenizer: Any, max_length: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=max_length,
    )


def load_tokenizer(name: str) -> Any:
    """Load a fast tokenizer by name or from a folder.

    Raises:
        DataError: It cannot be loaded, or lacks a vocabulary or a mask, padding or boundary token.
    """
    from transformers import AutoTokenizer

    remedy = "choose another one, or train one for an encoder with random weights: data.tokenizer=train"
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(name), trust_remote_code=False)
    except Exception as error:
        raise DataError(f"data.tokenizer={name}: cannot be loaded: {first_line(error).rstrip('.')}; {remedy}") from error
    if not tokenizer.is_fast:
        raise DataError(f"data.tokenizer={name}: has no fast version; {remedy}")
    for role in ("mask_token_id", "pad_token_id", "cls_token_id", "sep_token_id"):
        if getattr(tokenizer, role) is None:
            raise DataError(f"data.tokenizer={name}: has no {role.removesuffix('_id')}; {remedy}")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers invents one if the tokenizer files are missing
        raise DataError(f"data.tokenizer={name}: holds a model but no tokenizer vocabulary; {remedy}")
    return tokenizer


def corpus_backend(tokenizer: Any) -> Any:
    """A copy of the backend of `tokenizer` that encodes a corpus completely and literally.

    A tokenizer is saved with the truncation, padding and dropout of its last use; these are switched off. A special token
    spelled out in the corpus is encoded as text.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence, Split

    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    if hasattr(backend.model, "dropout"):  # BPE dropout
        backend.model.dropout = None
    special = tokenizer.all_special_tokens
    spelled = backend.encode_batch([before + token for token in special for before in ("", " ", "a")], add_special_tokens=False)
    if set(tokenizer.all_special_ids) & {i for encoded in spelled for i in encoded.ids}:
        # Some models (Unigram) have the special tokens among their pieces. Split them after the first character.
        cuts = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in special if len(token) > 1)
        parts = [backend.pre_tokenizer, Split(Regex(cuts), "isolated")]
        backend.pre_tokenizer = Sequence([part for part in parts if part is not None])
    return backend


def usable_positions(encoder: Any) -> int | None:
    """Maximum number of tokens of an encoder; None if its number of positions is not known."""
    positions = getattr(getattr(encoder.model, "config", None), "max_position_embeddings", None)
    # RoBERTa and similar models count positions from the padding id + 1 and store that id in their embeddings.
    padding = getattr(getattr(encoder.model, "embeddings", None), "padding_idx", None)
    return positions if positions is None or padding is None else positions - padding - 1


def limit_length(tokenizer: Any, encoder: Any) -> Any:
    """Cap the tokenizer's `model_max_length` at what the encoder can take, and return the tokenizer."""
    tokenizer.model_max_length = min(tokenizer.model_max_length, usable_positions(encoder) or tokenizer.model_max_length)
    return tokenizer


def _batches(texts: Iterable[str], cut: bool, rows: int = 1000, characters: int = 2**18) -> Iterator[list[tuple[str, bool]]]:
    """Group pieces of texts into lists to encode together, each with a flag for the last piece of its text."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        begin = 0
        while begin < len(text):
            found = CUT.search(text, begin + PIECE) if cut else None
            end = found.start() if found else len(text)
            batch.append((text[begin:end], end == len(text)))
            size += end - begin
            begin = end
            if len(batch) == rows or size >= characters:
                yield batch
                batch, size = [], 0
    yield batch


def can_cut(backend: Any) -> bool:
    """Whether cutting a text at `CUT`, before a space between two ASCII letters, provably leaves its tokens unchanged.

    True for two families, which always end a word there and encode each word on its own: byte-level tokenizers with GPT-2's
    pattern, such as RoBERTa's, and BERT's, whose normalizer changes characters one by one and drops combining marks. Added
    tokens that are not special are ruled out, because they may contain a space.
    """
    found = json.loads(backend.to_str())
    splitter, normalizer = found["pre_tokenizer"] or {}, found["normalizer"]
    words = splitter.get("type") == "ByteLevel" and splitter["use_regex"] and normalizer is None
    words |= splitter.get("type") == "BertPreTokenizer" and normalizer is not None and normalizer["type"] == "BertNormalizer"
    return words and backend.encode_special_tokens and all(token["special"] for token in found["added_tokens"])


def token_fields(tokenizer: Any, vocab_size: int) -> dict[str, int]:
    """Fields of an encoder's config that depend on the tokenizer."""
    t = tokenizer
    ids = dict(pad_token_id=t.pad_token_id, cls_token_id=t.cls_token_id, sep_token_id=t.sep_token_id)
    # Not every tokenizer has bos and eos tokens; cls and sep mark the start and the end of a text.
    return dict(vocab_size=vocab_size, bos_token_id=t.cls_token_id, eos_token_id=t.sep_token_id, **ids)


class TextData(PretrainingData):
    """Blocks of tokens.

    Args:
        path: "builtin", a file, folder or pattern of text, parquet, JSON lines, CSV or TSV, the name of a Hugging Face data
            set, a URL (hf://datasets/…, s3://…), or a folder written by `save_to_disk`.
        name: Configuration of the Hugging Face data set, such as wikitext-103-raw-v1.
        split: Split of the Hugging Face data set.
        column: Column of the text; detected if there is only one.
        tokenizer: Name or folder of a tokenizer, or "train" to train a byte-level BPE on the corpus. With
            encoder.pretrained the encoder's own tokenizer is used.
        vocab_size: Vocabulary size of a trained tokenizer.
        block_size: Tokens per sample, including <s>.
        cross_documents: Pack blocks across documents, separated by </s>; otherwise each document (row) starts a new block.
        length_multiple: Pad batches of shorter blocks to a multiple of this, at most to block_size. null = 8 on a GPU unless
            cross_documents packs the blocks, else 1.
        teacher_input: "full", or "masked_only" as in the reference code, whose teacher sees only the masked tokens.
        mask: How blocks are masked.
        views: Masked views of each sample, for data2vec 2.0; null for a single mask, as in 1.0.
        seed: Seed of masks and order.
        cache: Folder for the tokens; defaults to a folder in the Hugging Face cache.
        streaming: Read the Hugging Face data set as a stream, without downloading it first; URLs are always streamed.
        shuffle_buffer: Blocks of a stream to shuffle at a time.
        stream_timeout: Seconds to wait for the remote of a stream.
        max_broken: Maximum share of unreadable files; set by `train.max_broken` in a run.
    """

    def __init__(
        self,
        *,
        mask: TokenMask | RandomMask | ExactBlockMask,
        views: Annotated[int | None, Range("[1, inf)")] = None,
        seed: int = 0,
        path: str = "builtin",
        name: str | None = None,
        split: str = "train",
        column: str | None = None,
        tokenizer: str = "train",
        # At least 256 bytes and 5 special tokens; tokenizers aborts when out of memory.
        vocab_size: Annotated[int, Range("[261, 16777216]")] = 4000,
        block_size: Annotated[int, Range("[2, inf)")] = 512,
        cross_documents: bool = True,
        length_multiple: Annotated[int | None, Range("[1, 1024]")] = None,
        teacher_input: TeacherInput = "full",
        cache: str | None = None,
        streaming: bool = False,
        shuffle_buffer: PositiveInt = 1000,
        stream_timeout: PositiveFloat = 300.0,
        max_broken: float = 0.01,
    ):
        super().__init__(mask=mask, views=views, seed=seed)
        one_of("teacher_input", teacher_input, TeacherInput)
        self.name, self.block_size, self.teacher_input = path, block_size, teacher_input
        if views is not None and teacher_input != "full":
            raise DataError(f"data.teacher_input={teacher_input}: needs a single mask per sample; remove it or data.views")
        self.tokenizer_name, self.cross_documents = tokenizer, cross_documents
        self.length_multiple = length_multiple or 1
        if streaming or is_remote(path):
            self._stream(path, name, split, column, shuffle_buffer, stream_timeout)
        else:
            self._prepare(path, name, split, column, tokenizer, vocab_size, max_broken, cache)
            self._make_blocks()
        size = max(len(self.tokenizer), int(np.flatnonzero(self.counts).max()) + 1)
        self.vocabulary = Vocabulary(
            size=size,
            mask_id=self.tokenizer.mask_token_id,
            special=np.isin(np.arange(size), self.tokenizer.all_special_ids),
            continues=_continuations(self.tokenizer, size),
            counts=np.pad(self.counts, (0, size))[:size],
        )

    @property
    def tokens(self) -> dict[str, int]:
        """Fields of an encoder's config that depend on the tokenizer."""
        return token_fields(self.tokenizer, self.vocabulary.size)

    def __len__(self) -> int:
        return self.blocks

    def sample_name(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def contents(self) -> tuple[list[str], np.ndarray]:
        if self.stream:
            return [self.name], self.stream.digest([self.content, self.block_size, self.cross_documents])
        digest = fingerprint([self.content, self.block_size, self.cross_documents])
        return [self.name], np.frombuffer(bytes.fromhex(digest)[:8], dtype=np.int64)

    def fit_to(self, encoder: Any) -> None:
        if hasattr(encoder, "mask_embedding"):  # unused, because ids are masked; DDP would wait for its gradient
            encoder.mask_embedding.requires_grad_(False)
        config = getattr(encoder.model, "config", None)
        rows = [m.num_embeddings for m in encoder.model.modules() if isinstance(m, torch.nn.Embedding)]
        vocab_size = getattr(config, "vocab_size", max(rows, default=None))
        if vocab_size is not None and self.vocabulary.size > vocab_size:
            raise DataError(
                f"data.tokenizer={self.tokenizer_name}: its {self.vocabulary.size} tokens exceed the encoder's "
                f"vocab_size of {vocab_size}: use the encoder's own tokenizer or raise encoder.config.vocab_size"
            )
        usable = usable_positions(encoder)
        if usable is not None and self.block_size > usable:
            raise DataError(
                f"data.block_size={self.block_size}: the encoder has {usable} positions; "
                f"use data.block_size={usable} or raise encoder.config.max_position_embeddings"
            )

    files = ("tokenizer",)  # settings that `read_files` may find

    @staticmethod
    def largest_batch(settings: dict[str, Any], encoder: Any, size: int) -> tuple[tuple[int, ...], int]:
        """Shape of the largest batch of `size` samples, and its positions."""
        return (size, settings["block_size"]), settings["block_size"]

    @staticmethod
    def read_files(name: str) -> dict[str, Any]:
        """The settings in `files` of the pretrained encoder `name`, as far as its files say."""
        try:
            load_tokenizer(name)
        except DataError as error:
            reason = str(error).partition(": ")[2].partition(";")[0]
            print(f"encoder.pretrained={name}: has no usable tokenizer: {reason}", file=sys.stderr)
            return {}
        return {"tokenizer": name}

    def processor(self, encoder: Any) -> Any:
        return limit_length(self.tokenizer, encoder)

    def load(self, index: int, rng: np.random.Generator) -> np.ndarray:
        t = self.tokenizer
        ids = self.stream.pending[index] if self.stream else self.ids[slice(*self._bounds(index))]
        tail = [] if self.cross_documents else [t.sep_token_id]
        return np.concatenate([[t.cls_token_id], ids, tail]).astype(np.int64)

    def collate(self, samples: list[np.ndarray], draws: Draws) -> dict[str, np.ndarray]:
        pad = self.tokenizer.pad_token_id
        lengths = np.array([len(ids) for ids in samples])
        length = min(-(-lengths.max() // self.length_multiple) * self.length_multiple, self.block_size)
        target = np.full((len(samples), length), pad, dtype=np.int64)
        for row, ids in zip(target, samples, strict=True):
            row[: len(ids)] = ids
        if isinstance(self.mask, TokenMask):
            source, mask = self.mask(draws, target, self.vocabulary, lengths)
        else:
            mask = self.make_mask(draws, target.shape[1], lengths)
            # With views, masked tokens are never encoded.
            source = target if self.views else np.where(mask, self.vocabulary.mask_id, target)
        batch = {"source": source, "mask": mask} | ({} if self.views else {"target": target})
        padding_mask = np.arange(target.shape[1]) >= lengths[:, None]
        if padding_mask.any():
            batch["padding_mask"] = padding_mask
        if self.teacher_input == "masked_only":
            batch["target"] = np.where(mask, target, pad)
            batch["target_padding_mask"] = ~mask
        return batch

    def _prepare(
        self,
        path: str,
        name: str | None,
        split: str,
        column: str | None,
        tokenizer: str,
        vocab_size: int,
        max_broken: float,
        cache: str | None,
    ) -> None:
        """Load tokenizer and tokens of the corpus, from the cache if possible."""
        import tokenizers

        found, find = find_documents(path, name, split, column)
        read = functools.cache(partial(find, max_broken))
        state = [found, max_broken, tokenizers.__version__]
        where = [os.path.abspath(os.path.expanduser(path)) if is_local(path) or is_saved(path) else path, name, split, column]
        if tokenizer == "train":

            def train(folder: Path) -> dict[str, Any]:
                (folder / TOKENIZER).write_text(_train(iter(read()), vocab_size).to_str(), encoding="utf-8")
                return {}

            folder, _ = cached(cache, "tokenizer", [*where, vocab_size], state, train)
            self.tokenizer = _wrap(tokenizers.Tokenizer.from_file(str(folder / TOKENIZER)), self.block_size)
        else:
            self.tokenizer = load_tokenizer(tokenizer)
        digest = fingerprint([self.tokenizer.backend_tokenizer.to_str(), self.tokenizer.all_special_tokens])
        folder, made = cached(cache, "tokens", [*where, digest], state, lambda folder: self._tokenize(read(), folder))
        for message in made["left_out"]:
            log.warning("left out: %s", message)
        self.content = made["content"]
        self.ids = np.memmap(folder / IDS, made["kind"], "r")
        self.document_ends = np.memmap(folder / ENDS, np.int64, "r")
        self.counts = np.fromfile(folder / COUNTS, np.int64)
        if not self.cross_documents:
            self.counts[self.tokenizer.sep_token_id] -= len(self.document_ends)

    def _stream(self, path: str, name: str | None, split: str, column: str | None, buffer: int, timeout: float) -> None:
        """Load the tokenizer and open a stream whose rows are tokenised and packed when they are read.

        The blocks are those of the cached tokens, in the order of the stream.
        """
        if self.tokenizer_name == "train":
            raise DataError(
                "data.tokenizer=train: a stream has no corpus to train a tokenizer on; name a tokenizer, such as "
                "data.tokenizer=roberta-base, or the folder of one that was trained on a sample"
            )
        if getattr(self.mask, "frequency_weighted", False):
            raise DataError("mask.frequency_weighted=true: the frequencies in a stream are unknown; use false")
        self.tokenizer = load_tokenizer(self.tokenizer_name)
        self.blocks, self.content = 0, fingerprint(self.tokenizer.backend_tokenizer.to_str())
        self.counts = np.ones(1 + max(self.tokenizer.get_vocab().values()), dtype=np.int64)
        backend, separator = corpus_backend(self.tokenizer), self.tokenizer.sep_token_id
        stream = self.stream = Stream(path, name, split, buffer, timeout)
        wanted = choose_column(path, arrow_types(stream.features.arrow_schema), column)
        stream.data = stream.data.select_columns([wanted])

        def convert(row: dict[str, Any], rest: list[int]) -> tuple[list[list[int]], list[int]]:
            text = row[wanted]
            ids = backend.encode(text, add_special_tokens=False).ids if text and text.strip() else []
            if not self.cross_documents:
                room = self.block_size - 2
                return [ids[i : i + room] for i in range(0, len(ids), room)], rest
            room, ids = self.block_size - 1, [*rest, *ids, *[separator] * bool(text and text.strip())]
            whole = len(ids) // room * room
            return [ids[i : i + room] for i in range(0, whole, room)], ids[whole:]

        stream.convert = convert

    def _tokenize(self, documents: Documents, folder: Path) -> dict[str, Any]:
        """Write the token ids, with a separator after each document, and the ends of the documents."""
        from tqdm import tqdm

        backend, separator = corpus_backend(self.tokenizer), self.tokenizer.sep_token_id
        size = 1 + max(self.tokenizer.get_vocab().values())
        kind = np.dtype(np.uint16 if size <= 2**16 else np.uint32)
        counts, end, contents = np.zeros(size, dtype=np.int64), 0, [xxhash.xxh3_128(), xxhash.xxh3_128()]
        texts = (text for text in documents if text.strip())
        with (folder / IDS).open("wb") as ids, (folder / ENDS).open("wb") as ends:
            with tqdm(desc=f"tokens of {self.name}", unit="", unit_scale=True, leave=False, delay=2, disable=None) as progress:
                for batch in filter(None, _batches(texts, can_cut(backend))):
                    pieces, last = zip(*batch, strict=True)
                    found = [
                        [*each.ids, *[separator] * is_last]
                        for each, is_last in zip(backend.encode_batch_fast(pieces, add_special_tokens=False), last, strict=True)
                    ]
                    stops = end + np.cumsum([len(each) for each in found])
                    tokens = np.fromiter(itertools.chain.from_iterable(found), kind, count=int(stops[-1]) - end)
                    for file, content, array in zip((ids, ends), contents, (tokens, stops[np.array(last)]), strict=True):
                        file.write(array.data)
                        content.update(array.data)
                    counts += np.bincount(tokens, minlength=size)
                    progress.update(len(tokens))
                    end = int(stops[-1])
        if end == 0:
            raise DataError(f"data.path={self.name}: holds no text")
        (folder / COUNTS).write_bytes(counts.data)
        return {"kind": kind.name, "content": [x.hexdigest() for x in contents], "left_out": list(documents.left_out)}

    def _make_blocks(self) -> None:
        """Count the blocks, and prepare what `_bounds` needs to locate them."""
        if self.cross_documents:
            self.blocks = len(self.ids) // (self.block_size - 1)
            if self.blocks == 0:
                raise DataError(
                    f"data.path={self.name}: its {len(self.ids)} tokens are fewer than one block of "
                    f"data.block_size={self.block_size}: add text or use a smaller block"
                )
            return
        room = self.block_size - 2
        tokens = np.diff(self.document_ends, prepend=0) - 1
        last = np.cumsum(-(-tokens // room))  # last block of each document, plus one
        self.first_blocks = np.concatenate([[0], last])
        self.blocks = int(last[-1])
        lengths = self.lengths = np.full(self.blocks, self.block_size, dtype=np.int32)
        filled = tokens > 0
        lengths[last[filled] - 1] = (tokens[filled] - 1) % room + 3
        mean = lengths.mean()
        if mean < 0.5 * self.block_size:
            log.warning(
                "blocks have %.0f tokens on average, but block_size is %d: if the rows of %s are paragraphs rather than "
                "documents, pack them with data.cross_documents=true",
                mean,
                self.block_size,
                self.name,
            )

    def _bounds(self, index: int) -> tuple[int, int]:
        """Start and end of a block in `ids`."""
        if self.cross_documents:
            room = self.block_size - 1
            return index * room, (index + 1) * room
        document = int(np.searchsorted(self.first_blocks, index, side="right")) - 1
        begin = int(self.document_ends[document - 1]) if document else 0
        begin += (index - int(self.first_blocks[document])) * (self.block_size - 2)
        return begin, begin + int(cast(np.ndarray, self.lengths)[index]) - 2


def _continuations(tokenizer: Any, size: int) -> np.ndarray:
    """Which ids continue a word, judged by the prefix that each tokenizer family puts on tokens."""
    names = {i: token for token, i in tokenizer.get_vocab().items()}  # some ids may have no token
    tokens = [names.get(i, "") for i in range(size)]
    if any(token.startswith("##") for token in tokens):
        return np.array([token.startswith("##") for token in tokens])
    special = set(tokenizer.all_special_tokens)
    return np.array([not token.startswith(("Ġ", "▁")) and token not in special for token in tokens])
