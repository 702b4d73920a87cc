"""Vocabularies and texts for the tests of tokenizers."""

from __future__ import annotations

import base64
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from mistral_kernels.tokenizer import MistralTokenizer, TokenizerError

mistral_common = pytest.importorskip("mistral_common", reason="extra `chat` is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="extra `hf` is not installed")
transformers = pytest.importorskip("transformers", reason="extra `hf` is not installed")

DATA = Path(mistral_common.__file__).parent / "data"
SENTENCEPIECE = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
TEKKEN = "tekken_240911.json"
VENDOR = [*SENTENCEPIECE.values(), "tekken_240718.json", TEKKEN]
JSON = ["byte_fallback", "byte_level"]
ALL = [*VENDOR, *JSON]

CORPUS = ["the quick brown fox jumps over the lazy dog", "Über den Wolken", "d'accord, ça va"]
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two spaces,\n\n\ttab and trailing ",
    "emoji 👩‍👩‍👧‍👦🏳️‍🌈 and 🫠, flags 🇫🇷",
    "漢字かな交じり文。한국어 ไทย မြန်မာ",
    "combining e\u0301 a\u0308\u0323",
    "right to left: שָׁלוֹם مرحبا\u200f",
    "<s>[INST] not special [/INST]</s>",
    "nul \x00 and \ufffd and \U0010ffff",
]
# "▁" stands for the space in the vocabularies of sentencepiece.
any_text = st.text().filter(lambda t: "\u2581" not in t)
quick = settings(max_examples=60)

USER, FOLLOW_UP = {"role": "user", "content": "Hi"}, {"role": "user", "content": "And then?\n"}
ANSWER = {"role": "assistant", "content": "Hello — ça va?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def train_json(path: Path, byte_level: bool) -> None:
    """Train a small tokenizer.json like that of Mistral-7B (byte fallback) or Nemo (ByteLevel)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer

    special = ["<unk>", "<s>", "</s>"]
    if byte_level:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        special += [f"<0x{i:02X}>" for i in range(256)]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        alphabet = []
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    trainer = BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    saved = json.loads(tokenizer.to_str())
    # Byte tokens are plain vocabulary, but the trainer can only reserve ids for special tokens.
    saved["added_tokens"] = saved["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.add_tokens(
        [AddedToken("naïve 漢", special=False)]
    )  # every decoder must return it as plain text
    tokenizer.save(str(path))


def make_tekken() -> dict[str, Any]:
    """Return the contents of a small tekken.json: 20 special tokens, then bytes, then words."""
    words = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b" f", "漢".encode(), b"  "]
    ranks = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for rank, word in enumerate(words)
    ]
    config = {
        "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
        "num_vocab_tokens": len(words),
        "default_vocab_size": len(words) + 20,
        "default_num_special_tokens": 20,
        "version": "v3",
    }
    return {"config": config, "vocab": ranks, "special_tokens": None, "type": "Tekken"}


def write(folder: Path, vocabulary: str | None = None, **files: Any) -> Path:
    """Write a vendor's tokenizer.model and JSON files to a folder; return the folder.

    The keywords are names of JSON files without suffix. A value is the contents, or a str with the
    text of the file.
    """
    folder.mkdir(exist_ok=True)
    if vocabulary:
        shutil.copy(DATA / SENTENCEPIECE[vocabulary], folder / "tokenizer.model")
    for name, contents in files.items():
        text = contents if isinstance(contents, str) else json.dumps(contents)
        (folder / f"{name}.json").write_text(text)
    return folder


MARKERS = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ who | default('assistant') }}\n{% endif %}"
)
TOKENIZERS = ["byte_fallback", "byte_level", "chatml", "bos_and_eos", "tekken", "sentencepiece"]


def make_folder(folder: Path, case: str) -> Path:
    """Write a tokenizer of `TOKENIZERS` with the files that accompany it on the hub."""
    if case == "sentencepiece":
        write(folder, config={"model_type": "mistral"})
        shutil.copy(DATA / SENTENCEPIECE["v3"], folder / "tokenizer.model.v3")
        return folder
    if case == "tekken":
        return write(folder, config={"model_type": "mistral"}, tekken=make_tekken())
    folder.mkdir(exist_ok=True)
    train_json(folder / "tokenizer.json", byte_level=case == "byte_level")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "padding_side": random.choice(["left", "right"]),
        "model_max_length": random.choice([7, int(1e30)]),
        "chat_template": CHATML,
    }
    if case == "chatml":
        config |= {"eos_token": MARKERS[1], "extra_special_tokens": MARKERS}
        config |= {"truncation_side": "left", "padding_side": "left"}
    return write(folder, tokenizer_config=config)


def refused(path: Path, message: str) -> None:
    """Check that opening fails with one line: the path of the folder or file, and `message`."""
    with pytest.raises(TokenizerError) as caught:
        MistralTokenizer.from_pretrained(path)
    folder = path if path.is_dir() else path.parent
    actual = str(caught.value)
    assert actual.startswith(f"{folder}")
    assert "\n" not in actual
    assert actual.removeprefix(f"{folder}").lstrip("/: ").startswith(message), actual


def chat_ids(tokenizer: MistralTokenizer, messages: Any, **options: Any) -> Any:
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


def streamed(tokenizer: MistralTokenizer, ids: list[int], skip: bool = True) -> str:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return "".join([*map(stream.push, ids), stream.flush()])
