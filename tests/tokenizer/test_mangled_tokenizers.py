"""Test mangled files of every kind: consistent results or an error of one line, never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.tokenizer_cases import CORPUS, make_tekken, tokenizers, train_json, write
from test_added_tokens import CHATML, NAMES, described
from test_tokenizer_json import make_model

from mistral_kernels.tokenizer import MistralTokenizer

COUNT = 400
SCRIPT = Path(__file__).parents[1] / "support" / "mangled_tokenizers.py"


def run_mangled(kind: str, folder: Path, seed: int) -> None:
    """Run the script on `COUNT` mangled versions of the file `kind`; check that it succeeds."""
    original = (folder / kind).read_bytes()
    command = [sys.executable, SCRIPT, kind, str(seed), str(COUNT), folder]
    options: dict[str, Any] = {"env": {**os.environ, "RUST_BACKTRACE": "0"}, "timeout": 900}
    done = subprocess.run(command, capture_output=True, text=True, **options)
    case = f"seed {(folder / 'seed').read_text()}: {(folder / kind).read_bytes()[:5000]!r}"
    assert done.returncode == 0, f"{case}\nended with {done.returncode}: {done.stderr[-3000:]}"
    used, refused = map(int, done.stdout.split())
    assert used > COUNT / 50, (used, refused)
    assert refused > COUNT / 50, (used, refused)
    (folder / kind).write_bytes(original)


@pytest.fixture
def first_seed(request: pytest.FixtureRequest) -> int:
    return request.config.option.seed


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["byte_fallback", "byte_level", "unigram", "wordpiece", "wordlevel"]
)
def test_mangled_tokenizer_json(tmp_path: Path, kind: str, first_seed: int) -> None:
    if kind.startswith("byte"):
        train_json(tmp_path / "tokenizer.json", byte_level=kind == "byte_level")
    else:
        saved = make_model(kind)
        saved.post_processor = tokenizers.processors.BertProcessing(("</s>", 2), ("<s>", 1))
        saved.save(str(tmp_path / "tokenizer.json"))
    run_mangled("tokenizer.json", tmp_path, first_seed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "word"])
def test_mangled_tokenizer_model(tmp_path: Path, kind: str, first_seed: int) -> None:
    train_model(tmp_path, kind)
    run_mangled("tokenizer.model", tmp_path, first_seed)


@pytest.mark.slow
def test_mangled_tekken_json(tmp_path: Path, first_seed: int) -> None:
    run_mangled("tekken.json", write(tmp_path, tekken=make_tekken()), first_seed)


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["tokenizer.model", "tokenizer.json", "tekken.json"])
def test_mangled_accompanying_files(tmp_path: Path, beside: str, first_seed: int) -> None:
    decoder = {"1": described("<s>"), "2": described("</s>", rstrip=True)}
    added = {"<|im_start|>": 700, "<|im_end|>": 701}
    if beside == "tokenizer.model":
        train_model(tmp_path, "bpe")
        decoder |= {"320": described("<a>", lstrip=True), "9": described("<b>", special=False)}
    elif beside == "tokenizer.json":
        train_json(tmp_path / beside, byte_level=False)
        size = len(MistralTokenizer.from_pretrained(tmp_path))
        added = {"<|im_start|>": size, "<|im_end|>": size + 1}
    else:
        write(tmp_path, tekken=make_tekken())
        added = {"<s>": 1}
    config = NAMES | {"chat_template": CHATML, "legacy": False, "pad_token": described("<pad>")}
    config |= {"add_bos_token": True, "additional_special_tokens": ["<call>", described("<x>")]}
    for name, contents in {
        "tokenizer_config": config | {"added_tokens_decoder": decoder},
        "special_tokens_map": NAMES | {"pad_token": described("<pad>")},
        "added_tokens": added,
    }.items():
        write(tmp_path, **{name: contents})
        run_mangled(f"{name}.json", tmp_path, first_seed)
        (tmp_path / f"{name}.json").unlink()


def train_model(folder: Path, kind: str) -> None:
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(CORPUS * 20))
    fallback = kind in ("bpe", "unigram")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=320 if fallback else 25,
        byte_fallback=fallback,
        hard_vocab_limit=False,
        minloglevel=2,
    )
