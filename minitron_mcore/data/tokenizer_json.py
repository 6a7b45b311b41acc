"""A tokenizer as the files that transformers' AutoTokenizer loads.

SentencePiece BPE merges, of all adjacent pairs whose union is a piece, the one whose piece has the best score. The
`tokenizers` library merges by a list of ranked pairs: every way to cut a piece in two pieces, by the piece's score.

A unigram model takes the cut whose pieces' scores add up to most, in both libraries; SentencePiece adds in single
precision from the text's start. Where two cuts are equally good, as the pieces of a long run of spaces in another order
are, or nearly so after tens of thousands of characters, the two may differ; the text that comes back does not.

A normalization rule (nmt_nfkc, SentencePiece's default) is a compiled table of characters, which `tokenizers` reads as
it lies in the model, without its sequences of several: those that Unicode composes are composed before and after.
Combining marks in an order that is not Unicode's, and one after a character that the rule rewrites, may still come out
otherwise. Whatever is converted is held against sentencepiece on texts before it is exported (agreement.py).
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from minitron_mcore.data.tokenizer import SENTENCEPIECE, Tokenizer
from minitron_mcore.data.tokenizer_files import FILES, TEMPLATE_FILES, copy_files, files_of, parse_model
from minitron_mcore.errors import InputError

SPACE = "\u2581"  # SentencePiece's sign for a space
# ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NAMED = (UNKNOWN, CONTROL, BYTE)  # of pieces that no text is cut into by their names: marks and bytes
NONCHARACTER = "\ufffe"  # in no text that is one
# What a rule that composes makes of a letter and its accent, of Korean letters, and of half-width Japanese.
COMPOSED = {"e\u0301": "\u00e9", "\u1112\u1161\u11ab": "\ud55c", "\uff76\uff9e": "\u30ac"}
NEVER = 1e6  # more than the scores of any text's pieces add up to


def save_for_transformers(tokenizer: Tokenizer, folder: str) -> None:
    """Write `tokenizer` into `folder` such that AutoTokenizer gives the same ids for every text. One process calls.

    A Hugging Face tokenizer is copied. Of a SentencePiece model, tokenizer.json and tokenizer_config.json are made, and
    tokenizer.model lies beside them. As in `Tokenizer`, no mark is added to a text, and the marks' names in a text
    (`</s>`) are ordinary characters, unless a chat template lies beside the model: what it writes is then the mark.
    Raises InputError for a SentencePiece model of a kind that has no equal there.
    """
    for name in files_of(folder, FILES):  # what lay beside the source's weights may be of another one
        os.remove(os.path.join(folder, name))
    if tokenizer.type != SENTENCEPIECE:
        copy_files(tokenizer.path, folder, FILES)
        return
    with open(tokenizer.path, "rb") as stream:
        fast, settings = convert_sentencepiece(stream.read(), tokenizer.path)
    tokenizer.save(folder)
    if files_of(folder, TEMPLATE_FILES):
        settings["split_special_tokens"] = False
    for name, content in (("tokenizer.json", json.loads(fast.to_str())), ("tokenizer_config.json", settings)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as stream_out:
            json.dump(content, stream_out, ensure_ascii=False, indent=1)


def convert_sentencepiece(proto: bytes, path: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A serialized SentencePiece model -> (tokenizer.json, tokenizer_config.json). `path` is for messages."""
    model = parse_model(proto)
    _check(model, path)
    ids = {f"{mark}_token": getattr(model.trainer_spec, f"{mark}_id") for mark in ("bos", "eos", "unk", "pad")}
    marks = {name: model.pieces[index].piece for name, index in ids.items() if 0 <= index < len(model.pieces)}
    prefix, trimmed = model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces
    symbols = _of_type(model, USER_DEFINED)
    # An added token ends the text before it, which would be trimmed and the text behind it prefixed anew.
    is_split = bool(symbols) and (prefix or trimmed or _is_unigram(model))
    fast = tokenizers.Tokenizer(_unigram(model) if _is_unigram(model) else _bpe(model, marks, whole=is_split))
    fast.normalizer = normalizers.Sequence(_normalizers(model))
    if steps := _splits(model, symbols if is_split else []):
        splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
        fast.pre_tokenizer = pre_tokenizers.Sequence(splits)
    strip = [decoders.Strip(" ", 1, 0)] if prefix or trimmed else []
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    fast.add_special_tokens([AddedToken(mark, normalized=False) for mark in _of_type(model, UNKNOWN, CONTROL)])
    fast.add_tokens([AddedToken(symbol, normalized=False) for symbol in symbols if not is_split])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **marks,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        # transformers has both from tokenizer.json; llama.cpp, for which they are true unless said, reads them here.
        "add_prefix_space": bool(prefix),
        "add_bos_token": False,
        "add_eos_token": False,
    }
    return fast, settings


def _normalizers(model: Any) -> list[normalizers.Normalizer]:
    """What SentencePiece does before it cuts: a table of characters, then spaces, then the space put before a text."""
    spec = model.normalizer_spec
    replace = normalizers.Replace
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        # `Precompiled` looks at characters one by one, but for two of few bytes, of which a line end's are one.
        normalize = _processor(model).normalize
        if normalize("a\rb") == normalize("a\nb"):
            steps.append(replace("\r\n", "\n\n"))
        table = normalizers.Precompiled(spec.precompiled_charsmap)
        composes = all(normalize(f"a{text}").endswith(composed) for text, composed in COMPOSED.items())
        steps += [normalizers.NFC(), table, normalizers.NFC()] if composes else [table]
    if spec.remove_extra_whitespaces:
        steps += [replace(Regex(" {2,}"), " "), replace(Regex("\\A +"), "")]
    steps.append(replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(replace(Regex(f"{SPACE}+\\z"), ""))  # a U+2581 of the text counts
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if _is_unigram(model) and not _has_bytes(model) and (unknown := _unknown_in_names(model)):
        # Whatever stands for an unknown character is as unknown, and no mark's name is in the text any more.
        steps.append(replace(Regex("|".join(unknown)), NONCHARACTER))
    return steps


def _splits(model: Any, symbols: list[str]) -> list[str]:
    """The model's own symbols are cut out, the longest first; so is what is unknown in a mark's or byte's name."""
    alone = _unknown_in_names(model) if _is_unigram(model) and _has_bytes(model) else []
    patterns = [*map(_quoted, sorted(symbols, key=lambda text: -len(text))), *alone]
    steps = ["|".join(patterns)] if patterns else []
    return [*steps, "|".join(_cuts_of_names(model))] if symbols and not _is_unigram(model) else steps


def _cuts_of_names(model: Any) -> list[str]:
    """Patterns that cut a text which is just the name of a mark or byte, where SentencePiece cuts it first."""
    bare = type(model).FromString(model.SerializeToString())
    bare.normalizer_spec.add_dummy_prefix = bare.normalizer_spec.remove_extra_whitespaces = False
    encode = _processor(bare).encode
    cuts = {name: encode(name, out_type=str)[0] for name in _of_type(model, *NAMED)}
    sizes = {name: len(first) if name.startswith(first) else 1 for name, first in cuts.items()}
    return [f"\\A{_quoted(name[:size])}(?={_quoted(name[size:])}\\z)" for name, size in sizes.items()]


def _of_type(model: Any, *types: int) -> list[str]:
    return [piece.piece for piece in model.pieces if piece.type in types]


def _unknown_in_names(model: Any) -> list[str]:
    """Patterns of a character that no piece has alone, where it stands in a name that pieces could not spell."""
    alone = {piece.piece for piece in model.pieces if piece.type == NORMAL and len(piece.piece) == 1}
    patterns = []
    for name in _of_type(model, *NAMED):
        if place := next((i for i, character in enumerate(name) if character not in alone), None):
            patterns.append(f"(?<={_quoted(name[:place])}){_quoted(name[place])}(?={_quoted(name[place + 1 :])})")
        elif place == 0:
            patterns.append(f"{_quoted(name[0])}(?={_quoted(name[1:])})")
    return patterns


def _quoted(text: str) -> str:
    """`text` as a pattern of the regular expressions in `tokenizers`."""
    return re.sub(r"([^\w\s])", r"\\\1", text)


def _processor(model: Any) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def _is_unigram(model: Any) -> bool:
    return model.trainer_spec.model_type == model.trainer_spec.UNIGRAM


def _has_bytes(model: Any) -> bool:
    return any(piece.type == BYTE for piece in model.pieces)


def _bpe(model: Any, marks: dict[str, str], *, whole: bool) -> models.BPE:
    """whole: a cut-out text that is a piece is that piece, as the model's own symbols are, to which no merge leads."""
    return models.BPE(
        vocab={piece.piece: index for index, piece in enumerate(model.pieces)},
        merges=_merges(model),
        unk_token=marks.get("unk_token"),
        fuse_unk=True,  # a run of unknown characters is one unk to SentencePiece
        byte_fallback=_has_bytes(model),
        ignore_merges=whole,
    )


def _unigram(model: Any) -> models.Unigram:
    """Marks and bytes get a score so low that their names in a text (`</s>`, `<0x0A>`) are cut as any other text; the
    model's own symbols, which are cut out, one that is better than any."""
    lowest = min(piece.score for piece in model.pieces) - NEVER
    scores = {NORMAL: lambda piece: piece.score, USER_DEFINED: lambda piece: 0.0}
    vocab = [(piece.piece, scores.get(piece.type, lambda _: lowest)(piece)) for piece in model.pieces]
    return models.Unigram(vocab, model.trainer_spec.unk_id, _has_bytes(model))


def _check(model: Any, path: str) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    spaced = [symbol for symbol in _of_type(model, USER_DEFINED) if SPACE in symbol or " " in symbol]
    # What an unknown character costs differs between the libraries: it must not decide between two cuts.
    normal = set(_of_type(model, NORMAL))
    missing = sorted(set("".join(normal)) - normal) if _is_unigram(model) else []
    reason = ""
    if trainer.model_type not in (trainer.BPE, trainer.UNIGRAM):
        reason = "it is neither a BPE nor a unigram model"
    elif trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        reason = f"it does not write a space as {SPACE} before the word"
    elif spaced:
        reason = f"its own symbol {spaced[0]!r} is looked for beside added spaces"
    elif missing:
        reason = f"it is a unigram model without a piece for {missing[0]!r} alone, which others hold"
    if reason:
        raise InputError("tokenizer.model", path, f"cannot be written for transformers, because {reason}")


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every cut of every piece into two pieces: best piece first, and of one piece's cuts the lowest ids first."""
    joinable = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == NORMAL}
    ranked = sorted(joinable, key=lambda piece: (-model.pieces[joinable[piece]].score, joinable[piece]))
    merges = []
    for piece in ranked:
        cuts = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        cuts = [cut for cut in cuts if cut[0] in joinable and cut[1] in joinable]
        merges += sorted(cuts, key=lambda cut: (joinable[cut[0]], joinable[cut[1]]))
    return merges
