"""A tokenizer as the files that transformers' AutoTokenizer loads.

SentencePiece BPE merges, of all adjacent pairs whose union is a piece, the one whose piece has the best score. The
`tokenizers` library merges by a list of ranked pairs: every way to cut a piece in two pieces, by the piece's score.

A unigram model takes the cut whose pieces' scores add up to most, in both libraries; SentencePiece adds in single
precision from the text's start. Where two cuts are equally good, as the pieces of a long run of spaces in another order
are, or nearly so after tens of thousands of characters, the two may differ; the text that comes back does not.
"""

from __future__ import annotations

import json
import os
from typing import Any

from minitron_mcore.data.tokenizer import SENTENCEPIECE, Tokenizer
from minitron_mcore.data.tokenizer_files import CONFIG_FILES, SETTINGS_FILES, VOCABULARY_FILES, copy_files, files_of
from minitron_mcore.errors import InputError

# All that a tokenizer consists of in a folder for transformers.
FILES = VOCABULARY_FILES + SETTINGS_FILES + CONFIG_FILES
SPACE = "\u2581"  # SentencePiece's sign for a space
# ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NEVER = 1e6  # more than the scores of any text's pieces add up to


def save_for_transformers(tokenizer: Tokenizer, folder: str) -> None:
    """Write `tokenizer` into `folder` such that AutoTokenizer gives the same ids for every text. One process calls.

    A Hugging Face tokenizer is copied. Of a SentencePiece model, tokenizer.json and tokenizer_config.json are made, and
    tokenizer.model lies beside them. As in `Tokenizer`, no mark is added to a text, and the marks' names in a text
    (`</s>`) are ordinary characters. Raises InputError for a SentencePiece model of a kind that has no equal there.
    """
    for name in list(files_of(folder, FILES)):  # what lay beside the source's weights may be of another one
        os.remove(os.path.join(folder, name))
    if tokenizer.type != SENTENCEPIECE:
        copy_files(tokenizer.path, folder, FILES)
        return
    with open(tokenizer.path, "rb") as stream:
        model, settings = convert_sentencepiece(stream.read(), tokenizer.path)
    tokenizer.save(folder)
    for name, content in (("tokenizer.json", model), ("tokenizer_config.json", settings)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as stream_out:
            json.dump(content, stream_out, ensure_ascii=False, indent=1)


def convert_sentencepiece(proto: bytes, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A serialized SentencePiece model -> (tokenizer.json, tokenizer_config.json). `path` is for messages."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(proto)  # type: ignore[attr-defined]  # made at import
    _check(model, path)
    pieces = [piece.piece for piece in model.pieces]
    special = [i for i, piece in enumerate(model.pieces) if piece.type in (UNKNOWN, CONTROL)]
    marks = {
        name: pieces[index]
        for name, index in (
            ("bos_token", model.trainer_spec.bos_id),
            ("eos_token", model.trainer_spec.eos_id),
            ("unk_token", model.trainer_spec.unk_id),
            ("pad_token", model.trainer_spec.pad_id),
        )
        if 0 <= index < len(pieces)
    }
    user_defined = [i for i, piece in enumerate(model.pieces) if piece.type == USER_DEFINED]
    prefix = model.normalizer_spec.add_dummy_prefix
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
    ]
    tokenizer_json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, pieces[i], special=i in special) for i in sorted(special + user_defined)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": SPACE}] if prefix else []), replace],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _unigram(model) if _is_unigram(model) else _bpe(model, marks.get("unk_token")),
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **marks,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    return tokenizer_json, settings


def _is_unigram(model: Any) -> bool:
    return model.trainer_spec.model_type == model.trainer_spec.UNIGRAM


def _has_bytes(model: Any) -> bool:
    return any(piece.type == BYTE for piece in model.pieces)


def _bpe(model: Any, unk_token: str | None) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,  # a run of unknown characters is one unk to SentencePiece
        "byte_fallback": _has_bytes(model),
        "ignore_merges": False,
        "vocab": {piece.piece: index for index, piece in enumerate(model.pieces)},
        "merges": _merges(model),
    }


def _unigram(model: Any) -> dict[str, Any]:
    """Marks and bytes get a score so low that their names in a text (`</s>`, `<0x0A>`) are cut as any other text."""
    lowest = min(piece.score for piece in model.pieces) - NEVER
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "vocab": [[piece.piece, piece.score if piece.type == NORMAL else lowest] for piece in model.pieces],
        "byte_fallback": _has_bytes(model),
    }


def _check(model: Any, path: str) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    where = f"tokenizer.model={path} cannot be written for transformers:"
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
        raise InputError(f"{where} it is neither a BPE nor a unigram model")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise InputError(f"{where} it normalizes text (rule {normalizer.name or 'unknown'!r}, or runs of spaces)")
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise InputError(f"{where} it does not write a space as {SPACE} before the word")
    user_defined = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    if any(SPACE in piece for piece in user_defined) or (user_defined and normalizer.add_dummy_prefix):
        raise InputError(f"{where} its own symbols ({user_defined[0]!r} …) are looked for beside added spaces")
    if not _is_unigram(model):
        return
    if user_defined:
        raise InputError(f"{where} it is a unigram model with symbols of its own ({user_defined[0]!r} …)")
    # What an unknown character costs differs between the libraries: it must not decide between two cuts.
    normal = {piece.piece for piece in model.pieces if piece.type == NORMAL}
    names = {piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL, BYTE)}
    if missing := sorted(set("".join(normal | names)) - normal):
        raise InputError(f"{where} it is a unigram model without a piece for {missing[0]!r} alone, which others hold")


def _merges(model: Any) -> list[list[str]]:
    """Every cut of every piece into two pieces: best piece first, and of one piece's cuts the lowest ids first."""
    joinable = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == NORMAL}
    ranked = sorted(joinable, key=lambda piece: (-model.pieces[joinable[piece]].score, joinable[piece]))
    merges = []
    for piece in ranked:
        cuts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        cuts = [cut for cut in cuts if cut[0] in joinable and cut[1] in joinable]
        merges += [list(cut) for cut in sorted(cuts, key=lambda cut: (joinable[cut[0]], joinable[cut[1]]))]
    return merges


def _added(index: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, **flags, "special": special}
