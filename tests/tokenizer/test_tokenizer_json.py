"""Compare tokenizer.json with transformers, for vocabularies and stages of every kind."""

from __future__ import annotations

import base64
import json
import math
import random
from pathlib import Path
from random import choice
from typing import Any

import pytest
from support.tokenizer_cases import (
    ANSWER,
    CORPUS,
    TEXTS,
    USER,
    chat_ids,
    refused,
    tokenizers,
    transformers,
    write,
)

from mistral_kernels.tokenizer import MistralTokenizer, TokenizerError

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def open_both(folder: Path) -> tuple[Any, MistralTokenizer]:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return theirs, MistralTokenizer.from_pretrained(folder)


def check_equal(theirs: Any, ours: MistralTokenizer, texts: list[str], num_ids: int = 30) -> None:
    """Check that both return the same ids for texts, and the same text for random ids."""
    assert len(ours) == len(theirs)
    assert ours.all_special_ids >= {i for i in theirs.all_special_ids if i is not None}
    for text in texts:
        ids = theirs(text).input_ids
        assert ours(text).input_ids == ours.encode(text) == ids, text
        bare = theirs(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == bare, text
    for _ in range(num_ids):
        ids = random.choices(range(len(ours)), k=random.randrange(12))
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), ids


def test_fine_tuned_tokenizer_equals_transformers(json_folder: Path) -> None:
    theirs, ours = open_both(json_folder)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    check_equal(theirs, ours, TEXTS)
    assert ours.has_chat_template
    assert ours.chat_version == "jinja"
    for prompt in (True, False):
        arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt}
        text = theirs.apply_chat_template([USER, ANSWER], **arguments)
        assert ours.apply_chat_template([USER, ANSWER], **arguments) == text
        arguments["tokenize"] = True
        ids = theirs.apply_chat_template([USER, ANSWER], return_dict=False, **arguments)
        assert chat_ids(ours, [USER, ANSWER], **arguments) == ids


def make_model(kind: str) -> Any:
    """Return a trained tokenizer of one kind of model, without a post-processor."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    given: dict[str, Any] = {"special_tokens": SPECIAL, "show_progress": False, "vocab_size": 200}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=choice([True, False]))
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(**given)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **given)
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**given)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(**given)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def post_processors() -> dict[str, tuple[Any, list[int], list[int]]]:
    """Return post-processors by name, with the ids that they put before and after a text."""
    from tokenizers import processors

    def template(single: str) -> Any:
        tokens = [(token, i) for i, token in enumerate(SPECIAL)]
        return processors.TemplateProcessing(single=single, special_tokens=tokens)

    bytes_ = processors.ByteLevel(trim_offsets=False)
    return {
        "none": (None, [], []),
        "bytes": (bytes_, [], []),
        "bos": (template("<s> $A"), [1], []),
        "eos": (template("$A </s>"), [], [2]),
        "both": (template("<s> $A </s>"), [1], [2]),
        "many": (template("<s> <s> <unk> $A </s> <pad>"), [1, 1, 0], [2, 3]),
        "sequence": (processors.Sequence([bytes_, template("<s> $A")]), [1], []),
        "bert": (processors.BertProcessing(("</s>", 2), ("<s>", 1)), [1], [2]),
        "roberta": (processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), [1], [2]),
    }


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "wordlevel"])
@pytest.mark.parametrize("name", post_processors())
def test_post_processor_determines_bos_and_eos(
    tmp_path: Path, name: str, kind: str, flags: dict[str, bool]
) -> None:
    """Check that the flags of tokenizer_config.json and the named tokens have no effect."""
    saved = make_model(kind)
    processor, prefix, suffix = post_processors()[name]
    if processor is not None:
        saved.post_processor = processor
    saved.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write(tmp_path, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"} | names | flags)
    ours = MistralTokenizer.from_pretrained(tmp_path)
    bare = ours.encode("the fox", bos=False, eos=False)
    assert bare
    assert ours.encode("the fox") == prefix + bare + suffix
    assert ours.encode("the fox", bos=True) == [1, *bare, *suffix]
    assert ours.encode("the fox", eos=True) == [*prefix, *bare, 2]
    assert ours.encode("the fox", bos=False) == bare + suffix
    assert ours.encode("") == prefix + suffix
    if transformers.__version__ >= "5":  # earlier versions have rules for each class
        words = [*"ab é漢👍\n\t\u2581", "the", "fox", "<s>", "</s>", " ", "  ", "\u0301", "\x00"]
        texts = ["".join(random.choices(words, k=random.randrange(9))) for _ in range(20)]
        check_equal(transformers.AutoTokenizer.from_pretrained(tmp_path), ours, [*TEXTS, *texts])


def template(*pieces: Any) -> dict[str, Any]:
    """Return the JSON of a TemplateProcessing of texts ("A", "B") and special tokens."""
    kinds = [
        {"Sequence": {"id": x, "type_id": 0}} if x in "AB" else {"SpecialToken": {"id": x}}
        for x in pieces
    ]
    for each in kinds:
        next(iter(each.values())).setdefault("type_id", 0)
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    return {"type": "TemplateProcessing", "single": kinds, "pair": kinds, "special_tokens": special}


@pytest.mark.parametrize("pieces", [("A", "<s>", "A"), ("B",), ("</s>", "A")])
def test_other_post_processors_are_refused(tmp_path: Path, pieces: Any) -> None:
    """Check a token between two texts, a second text and a missing token.

    The library panics for some of these.
    """
    saved = json.loads(make_model("bpe").to_str())
    write(tmp_path, tokenizer=saved | {"post_processor": template(*pieces)})
    refused(tmp_path, "tokenizer.json: not a tokenizer.json: ")


def test_tokens_of_accompanying_files_are_added(tmp_path: Path) -> None:
    """Check that named tokens that are not in the vocabulary come last, as in transformers."""
    make_model("bpe").save(str(tmp_path / "tokenizer.json"))
    size = len(MistralTokenizer.from_pretrained(tmp_path))
    named = {"eos_token": "<|im_end|>", "pad_token": {"content": "[PAD]", "__type": "AddedToken"}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", **named}
    added = {"<|im_start|>": size, "<|im_end|>": size + 1}
    write(tmp_path, tokenizer_config=config, added_tokens=added)
    theirs, ours = open_both(tmp_path)
    ids = (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, len(ours))
    assert ids == (1, size + 1, size + 2, size + 3)
    names = [*added, "[PAD]", "<s>", " ", "fox"]
    texts = ["".join(random.choices(names, k=random.randrange(9))) for _ in range(50)]
    check_equal(theirs, ours, texts)
    assert ours.decode([size, size + 1, size + 2], skip_special_tokens=True) == "<|im_start|>"

    write(tmp_path, added_tokens={"<|im_start|>": size + 1})
    message = f"the id {size + 1}, as in the file that adds it, got {size}"
    refused(tmp_path, f"tokenizer.json: the added token '<|im_start|>' must have {message}")


def test_vocabulary_with_missing_and_duplicate_ids(tmp_path: Path) -> None:
    saved = json.loads(make_model("wordlevel").to_str())
    saved["added_tokens"] = []
    saved["model"]["vocab"] = {"<unk>": 0, "fox": 7, "dog": 7, "the": 2**31}
    write(tmp_path, tokenizer=saved)
    ours = MistralTokenizer.from_pretrained(tmp_path)
    assert len(ours) == 2**31 + 1
    assert ours.encode("the fox dog cat") == [2**31, 7, 7, 0]
    assert ours.decode([2**31, 3]) == "the"
    assert ours.decode([3, 6]) == ""
    stream = ours.stream()
    assert [*map(stream.push, [3, 2**31, 5]), stream.flush()] == ["", "the", "", ""]


def test_truncation_and_padding_in_the_file_are_ignored(json_folder: Path) -> None:
    expected = MistralTokenizer.from_pretrained(json_folder).encode("x" * 40)
    saved = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=64)
    saved.save(str(json_folder / "tokenizer.json"))
    assert MistralTokenizer.from_pretrained(json_folder).encode("x" * 40) == expected


def test_byte_order_mark_and_crlf_are_ignored(json_folder: Path) -> None:
    expected = MistralTokenizer.from_pretrained(json_folder)
    for path in json_folder.iterdir():
        text = json.dumps(json.loads(path.read_text()), indent=1)
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    tokenizer = MistralTokenizer.from_pretrained(json_folder)
    assert tokenizer.encode("the fox") == expected.encode("the fox")
    assert tokenizer.apply_chat_template([USER]) == expected.apply_chat_template([USER])


@pytest.mark.parametrize(
    "merges",
    [
        [["a", "\u2581"]],
        ["a \u2581"],
        [["##a", "##a"], ["a", ""]],
        [["a", "\u2581a"], ["a", "##a"]],
    ],
)
def test_merges_with_bad_prefix_are_refused(tmp_path: Path, merges: Any) -> None:
    """The tokenizers library would abort the process for such a file."""
    saved = json.loads(make_model("bpe").to_str())
    message = (
        "tokenizer.json: not a tokenizer.json: the second part of each merge must begin with "
        "continuing_subword_prefix"
    )
    saved["model"] |= {"continuing_subword_prefix": "##", "merges": merges}
    write(tmp_path, tokenizer=saved)
    refused(tmp_path, message)
    saved["model"] |= {"continuing_subword_prefix": "\u2581", "merges": [["a", "\u2581a"]]}
    write(tmp_path, tokenizer=saved)
    refused(tmp_path, f"{message} '\u2581', which must be ASCII, got ")


def replace(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


PRECOMPILED = {
    "type": "Precompiled",
    "precompiled_charsmap": base64.b64encode(b"\4\0\0\0trieab\0" + b"x" * 150).decode(),
}


@pytest.mark.parametrize(
    ("growth", "stages"),
    [
        (1e10, [replace("a", "a" * 100)] * 5),
        (1e6, [{"type": "Sequence", "inner": [replace("a", "b" * 1000)]}] * 2),
        (10001, [replace("a", "a" * 10001)]),
        (20000, [replace("ab", "a" * 40000)]),
        (1e6, [replace("[ab]", "a" * 1000, "Regex")] * 2),
        (2**14, [replace("b*", "b", "Regex")] * 14),
        (1e24, [replace("", "a" * 999)] * 8),
        (math.inf, [replace("a", "a" * 1000)] * 200),
        (10001, [{"type": "Prepend", "prepend": "a" * 10000}]),
        (22500, [PRECOMPILED] * 2),
    ],
)
@pytest.mark.parametrize(("part", "name"), [("normalizer", "normalizers"), ("decoder", "decoders")])
def test_stages_that_lengthen_a_text_too_much_are_refused(
    tmp_path: Path, part: str, name: str, growth: float, stages: list[Any]
) -> None:
    """Check that opening fails: such stages could make gigabytes of one character."""
    stages = [{name if k == "inner" else k: v for k, v in stage.items()} for stage in stages]
    saved = json.loads(make_model("bpe").to_str()) | {part: {"type": "Sequence", name: stages}}
    write(tmp_path, tokenizer=saved)
    refused(
        tmp_path,
        f"tokenizer.json: {part} must lengthen a text at most 10000 times, got up to "
        f"{growth:.3g} times",
    )


def test_many_usual_stages_are_accepted(tmp_path: Path) -> None:
    """Check more than 100 stages, of which few lengthen a text."""
    stages = [{"type": "Prepend", "prepend": "\u2581"}, replace(" ", "\u2581")]
    stages += [replace("``", '"'), replace(" {2,}", "\u2581", "Regex")] * 100
    stages += [replace("[^a-z ]+", "", "Regex")] * 20 + [replace("a", "b" * 1000)]
    saved = json.loads(make_model("bpe").to_str())
    write(tmp_path, tokenizer=saved | {"normalizer": {"type": "Sequence", "normalizers": stages}})
    assert len(MistralTokenizer.from_pretrained(tmp_path).encode("a fox")) > 900


def test_text_of_one_repeated_character_is_read_back(json_folder: Path) -> None:
    tokenizer = MistralTokenizer.from_pretrained(json_folder)
    for character in "a \n漢\x00":
        text = character * 5000
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_library_errors_are_one_line(tmp_path: Path) -> None:
    saved = json.loads(make_model("bpe").to_str())
    stages = [{"type": "Fuse"}, {"type": "Strip", "content": "f", "start": 0, "stop": 1}]
    write(tmp_path, tokenizer=saved | {"decoder": {"type": "Sequence", "decoders": stages}})
    tokenizer = MistralTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([3]) == "<pad>"
    with pytest.raises(
        TokenizerError, match="json: the ids cannot be decoded: index out of bounds"
    ):
        tokenizer.decode([3], skip_special_tokens=True)
