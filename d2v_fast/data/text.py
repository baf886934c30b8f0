"""Text: documents → tokens → packed blocks → masked source, full target, mask."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from d2v_fast.data import DataError, PretrainingData, first_line
from d2v_fast.data.documents import load_documents
from d2v_fast.masking import Draws, ExactBlockMask, RandomMask, TokenMask, Vocabulary

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def train_tokenizer(texts: Iterator[str], vocab_size: int, max_length: int) -> Any:
    """A byte-level BPE tokenizer with RoBERTa's special tokens, as a `PreTrainedTokenizerFast`."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer = bpe._tokenizer
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
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
    """A fast tokenizer from a name or folder.

    Raises:
        DataError: It cannot be loaded, or lacks a vocabulary or a mask, padding or boundary token.
    """
    from transformers import AutoTokenizer

    remedy = "choose another one; for an encoder with random weights data.tokenizer=train makes one"
    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(name), trust_remote_code=False)
    except Exception as error:
        raise DataError(f"data.tokenizer={name}: cannot be loaded: {first_line(error).rstrip('.')}; {remedy}") from error
    if not tokenizer.is_fast:
        raise DataError(f"data.tokenizer={name}: has no fast version; {remedy}")
    for role in ("mask_token_id", "pad_token_id", "cls_token_id", "sep_token_id"):
        if getattr(tokenizer, role) is None:
            raise DataError(f"data.tokenizer={name}: has no {role.removesuffix('_id')}; {remedy}")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one up for a model without tokenizer files
        raise DataError(f"data.tokenizer={name}: holds a model but no vocabulary of a tokenizer; {remedy}")
    return tokenizer


def corpus_backend(tokenizer: Any) -> Any:
    """A copy of the backend of `tokenizer` for the text of a corpus, all of it and as it stands.

    A tokenizer is saved with the truncation, padding and dropout that it was last used with. A special token that a text
    spells out is text.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence, Split

    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    if hasattr(backend.model, "dropout"):  # of BPE's merges
        backend.model.dropout = None
    special = tokenizer.all_special_tokens
    spelled = backend.encode_batch([before + token for token in special for before in ("", " ", "a")], add_special_tokens=False)
    if set(tokenizer.all_special_ids) & {i for encoded in spelled for i in encoded.ids}:
        # Some models (Unigram) have them among their pieces. One that is cut after its first character is none of them.
        cuts = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in special if len(token) > 1)
        parts = [backend.pre_tokenizer, Split(Regex(cuts), "isolated")]
        backend.pre_tokenizer = Sequence([part for part in parts if part is not None])
    return backend


def usable_positions(encoder: Any) -> int | None:
    """Tokens that an encoder can take, where its number of positions is known."""
    positions = getattr(getattr(encoder.model, "config", None), "max_position_embeddings", None)
    # RoBERTa and its kin count positions from the padding's id + 1, and know it there.
    padding = getattr(getattr(encoder.model, "embeddings", None), "padding_idx", None)
    return positions if positions is None or padding is None else positions - padding - 1


def limit_length(tokenizer: Any, encoder: Any) -> Any:
    """The same tokenizer, whose `model_max_length` is at most what the encoder can take."""
    tokenizer.model_max_length = min(tokenizer.model_max_length, usable_positions(encoder) or tokenizer.model_max_length)
    return tokenizer


def _batches(texts: Iterable[str], rows: int = 1000, characters: int = 2**22) -> Iterator[list[str]]:
    """Lists of as many texts as are worth encoding at once."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == rows or size >= characters:
            yield batch
            batch, size = [], 0
    yield batch


def token_fields(tokenizer: Any, vocab_size: int) -> dict[str, int]:
    """The fields of an encoder's config that depend on its tokenizer."""
    t = tokenizer
    ids = dict(pad_token_id=t.pad_token_id, cls_token_id=t.cls_token_id, sep_token_id=t.sep_token_id)
    # Many have other names for what begins and ends a text.
    return dict(vocab_size=vocab_size, bos_token_id=t.cls_token_id, eos_token_id=t.sep_token_id, **ids)


class TextData(PretrainingData):
    """Blocks of tokens.

    Args:
        path: "builtin", a file, folder or pattern of text, parquet, JSON lines, CSV or TSV, the name of a Hugging Face set,
            or a folder written by its `save_to_disk`.
        name: Configuration of the Hugging Face set, such as wikitext-103-raw-v1.
        split: Its split.
        column: Column of the text; found by itself where there is one.
        tokenizer: Name or folder of a tokenizer, or "train" for a byte-level BPE made from the corpus. An encoder that is
            given by encoder.pretrained brings its own.
        vocab_size: Size of a trained tokenizer.
        block_size: Tokens a sample, <s> included.
        cross_documents: Pack across documents, </s> between them; without, each document (row) fills blocks of its own.
        teacher_input: "full", or "masked_only" as in the reference code, whose teacher sees the masked tokens alone.
        mask: How blocks are masked.
        views: Masked views of each sample, for data2vec 2.0; null for one mask, as 1.0 takes it.
        seed: Seed of masks and order.
        max_broken: Largest share of files that cannot be read; `train.max_broken` of a run.
    """

    def __init__(
        self,
        *,
        mask: TokenMask | RandomMask | ExactBlockMask,
        views: int | None = None,
        seed: int = 0,
        path: str = "builtin",
        name: str | None = None,
        split: str = "train",
        column: str | None = None,
        tokenizer: str = "train",
        vocab_size: int = 4000,
        block_size: int = 512,
        cross_documents: bool = True,
        teacher_input: Literal["full", "masked_only"] = "full",
        max_broken: float = 0.01,
    ):
        super().__init__(mask=mask, views=views, seed=seed)
        self.name, self.block_size, self.teacher_input = path, block_size, teacher_input
        if views is not None and teacher_input != "full":
            raise DataError(f"data.teacher_input={teacher_input}: is for one mask a sample; leave it out, or data.views")
        documents = load_documents(path, name, split, column, max_broken)
        if tokenizer == "train":
            self.tokenizer = train_tokenizer(iter(documents), vocab_size, block_size)
        else:
            self.tokenizer = load_tokenizer(tokenizer)
        self.tokenizer_name = tokenizer
        self._pack(self._tokenize(documents), cross_documents)
        size = max(len(self.tokenizer), int(self.ids.max()) + 1)
        self.vocabulary = Vocabulary(
            size=size,
            mask_id=self.tokenizer.mask_token_id,
            special=np.isin(np.arange(size), self.tokenizer.all_special_ids),
            continues=_continues(self.tokenizer, size),
            counts=np.bincount(self.ids, minlength=size),
        )

    @property
    def tokens(self) -> dict[str, int]:
        """What an encoder's config has to know of the tokenizer, by the names it has there."""
        return token_fields(self.tokenizer, self.vocabulary.size)

    def __len__(self) -> int:
        return len(self.begins)

    def sample_name(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def contents(self) -> tuple[list[str], np.ndarray]:
        digest = hashlib.sha256(self.ids.tobytes() + self.begins.tobytes() + self.ends.tobytes()).digest()
        return [self.name], np.frombuffer(digest[:8], dtype=np.int64)

    def fit_to(self, encoder: Any) -> None:
        if hasattr(encoder, "mask_embedding"):  # ids are masked, never features; DDP would wait for its gradient
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

    def processor(self, encoder: Any) -> Any:
        return limit_length(self.tokenizer, encoder)

    def load(self, index: int, rng: np.random.Generator) -> np.ndarray:
        t = self.tokenizer
        ids = self.ids[self.begins[index] : self.ends[index]]
        tail = [] if self.cross_documents else [t.sep_token_id]
        return np.concatenate([[t.cls_token_id], ids, tail]).astype(np.int64)

    def collate(self, samples: list[np.ndarray], draws: Draws) -> dict[str, np.ndarray]:
        pad = self.tokenizer.pad_token_id
        lengths = np.array([len(ids) for ids in samples])
        target = np.full((len(samples), lengths.max()), pad, dtype=np.int64)
        for row, ids in zip(target, samples, strict=True):
            row[: len(ids)] = ids
        if isinstance(self.mask, TokenMask):
            source, mask = self.mask(draws, target, self.vocabulary, lengths)
        else:
            mask = self.make_mask(draws, target.shape[1], lengths)
            # With views the masked tokens are not encoded at all.
            source = target if self.views else np.where(mask, self.vocabulary.mask_id, target)
        batch = {"source": source, "mask": mask} | ({} if self.views else {"target": target})
        padding_mask = np.arange(target.shape[1]) >= lengths[:, None]
        if padding_mask.any():
            batch["padding_mask"] = padding_mask
        if self.teacher_input == "masked_only":
            batch["target"] = np.where(mask, target, pad)
            batch["target_padding_mask"] = ~mask
        return batch

    def _tokenize(self, documents: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
        """All token ids in one array, and the end of each document in it."""
        backend = corpus_backend(self.tokenizer)
        parts, counts = [], []
        for texts in _batches(text for text in documents if text.strip()):
            for encoded in backend.encode_batch_fast(texts, add_special_tokens=False):
                counts.append(len(encoded.ids))
                parts.append(np.array(encoded.ids, dtype=np.int32))
        if not parts:
            raise DataError(f"data.path={self.name}: holds no text")
        return np.concatenate(parts), np.cumsum(counts)

    def _pack(self, tokens: tuple[np.ndarray, np.ndarray], cross_documents: bool) -> None:
        ids, document_ends = tokens
        self.cross_documents = cross_documents
        if cross_documents:
            self.ids = np.insert(ids, document_ends, self.tokenizer.sep_token_id)
            room = self.block_size - 1
            self.begins = np.arange(0, len(self.ids) - room + 1, room)
            self.ends = self.begins + room
            if len(self.begins) == 0:
                raise DataError(
                    f"data.path={self.name}: its {len(self.ids)} tokens are fewer than one block of "
                    f"data.block_size={self.block_size}: add text or use a smaller block"
                )
            return
        self.ids = ids
        room = self.block_size - 2
        starts = np.concatenate([[0], document_ends[:-1]])
        begins = [np.arange(a, b, room) for a, b in zip(starts, document_ends, strict=True)]
        ends = [np.minimum(x + room, b) for x, b in zip(begins, document_ends, strict=True)]
        self.begins, self.ends = np.concatenate(begins), np.concatenate(ends)
        self.lengths = self.ends - self.begins + 2
        mean = self.lengths.mean()
        if mean < 0.5 * self.block_size:
            log.warning(
                "blocks are %.0f tokens long on average, block_size is %d: if the rows of %s are paragraphs and not "
                "documents, data.cross_documents=true packs them",
                mean,
                self.block_size,
                self.name,
            )


def _continues(tokenizer: Any, size: int) -> np.ndarray:
    """Which ids continue a word, by the mark that each family of tokenizers puts on tokens."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    tokens += [""] * (size - len(tokens))
    if any(token.startswith("##") for token in tokens):
        return np.array([token.startswith("##") for token in tokens])
    special = set(tokenizer.all_special_tokens)
    return np.array([not token.startswith(("Ġ", "▁")) and token not in special for token in tokens])
