"""Texts for training and evaluation: paragraphs, the held-out part, tokens and batches."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mistral_kernels.cli.command import read_input
from mistral_kernels.tokenizer import MistralTokenizer
from mistral_kernels.training.recipe import Recipe
from mistral_kernels.utils.errors import one_line

_PIPE_LIMIT = 1 << 29  # maximum bytes of a text that is not a regular file
_HELD_OUT_CHARS = 32_000  # default number of held-out characters of a large text
_GROUP = 50  # words per paragraph of a text that has neither lines nor sentences
# End of a sentence: a full stop, an exclamation or question mark, closing quotes, and white space,
# which is optional in Chinese and Japanese.
_SENTENCE_END = re.compile(
    r"""[.!?]["'\u201d\u2019)\]]*\s+(?=\S)|[\u3002\uff01\uff1f][\u201d\u2019\u300d\u300f]*\s*(?=\S)"""
)


def read_texts(paths: Sequence[Path]) -> tuple[str, str]:
    """Return the paragraphs of UTF-8 files, one per line, and one line that names the rules.

    In a file with a blank line, blank lines separate the paragraphs. Without one, each line is a
    paragraph. In a file of a single line, each sentence is a paragraph, and without sentences,
    every 50 words.

    Raises:
        ValueError: a file is empty or not UTF-8, or a pipe has more than 2^29 bytes.
        OSError: a file cannot be read.
    """
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for path in paths:
        paragraphs, rule = _paragraphs(read_input(path, _PIPE_LIMIT))
        if not paragraphs:
            raise ValueError(f"{path} must have words, got none")
        found.setdefault(rule, []).append(str(path))
        lines += paragraphs
    rules = (rule.format(", ".join(names)) for rule, names in found.items())
    return "\n".join(lines) + "\n", one_line(f"paragraphs: {'; '.join(rules)}")


def _paragraphs(text: str) -> tuple[list[str], str]:
    """Return the paragraphs of one file, each on one line, and the rule that separates them."""
    text = text.strip()
    if len(blocks := re.split(r"\n\s*\n", text)) > 1:
        rule = "separated by blank lines in {}"
    elif len(blocks := text.split("\n")) > 1:
        rule = "every line of {} (no blank lines)"
    elif len(blocks := _sentences(text)) > 1:
        rule = "every sentence of {} (a single line)"
    else:
        words = text.split()
        blocks = [" ".join(words[i : i + _GROUP]) for i in range(0, len(words), _GROUP)]
        rule = f"every {_GROUP} words of {{}} (a single line without sentences)"
    joined = (" ".join(block.split()) for block in blocks)
    return [paragraph for paragraph in joined if paragraph], rule


def _sentences(text: str) -> list[str]:
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(starts)]


def split_held_out(text: str, size: int | None = None) -> tuple[str, str]:
    """Split a text of `read_texts` into training text and held-out text.

    The held-out text has at most the last `size` characters. It begins with a paragraph, or, if the
    last paragraph is longer than `size`, with a sentence or else a word of it.

    Args:
        text: text with one paragraph per line.
        size: number of characters; None: 32,000, at most 10 % of the text.

    Raises:
        ValueError: the text is too short for `size`, or its last `size` characters have neither a
            line end nor a space.
    """
    if size is None:
        if len(text) < 10:
            raise ValueError(
                f"the text must have at least 10 characters, got {len(text)}; give more text"
            )
        size = min(_HELD_OUT_CHARS, len(text) // 10)
    if not 0 < size < len(text) // 2:
        raise ValueError(
            f"--held-out-chars must be at least 1 and less than half of the text's {len(text)} "
            f"characters, got {size}; hold out less, or give more text"
        )
    before = len(text) - size - 1  # a line end at this index gives a held-out text of `size`
    cut = text.index("\n", before) + 1
    if cut == len(text):
        within = _SENTENCE_END.search(text, before) or re.compile(" ").search(text, before)
        if within is None:
            raise ValueError(
                f"the last {size} characters of the text must have a line end or a space, to begin "
                "the held-out text, got neither; hold out more (--held-out-chars)"
            )
        cut = within.end()
    return text[:cut].rstrip() + "\n", text[cut:]


def train_tokenizer(text: str, vocab_size: int, path: Path) -> None:
    """Train a byte-fallback BPE model with Mistral's special tokens and write it to `path`.

    Raises:
        ValueError: the text is too short for a vocabulary of `vocab_size` tokens.
    """
    import sentencepiece

    model = io.BytesIO()  # with a path instead, sentencepiece would record the path in the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"the text is too short to train a vocabulary of {vocab_size} tokens; give more text, "
            f"or train a checkpoint further (--from tiny: the bundled model): {error}"
        ) from None
    path.write_bytes(model.getvalue())


class Corpus:
    """Tokens of a text with one paragraph per line.

    Each training sequence is BOS followed by tokens from the beginning of a paragraph, like a
    prompt.

    Args:
        text: text with one paragraph per line.
        tokenizer_path: file or folder of the tokenizer.

    Attributes:
        tokens: (n,) int64, tokens of the text without BOS.
        starts: (paragraphs,) int64, index of each paragraph's first token in `tokens`.

    Raises:
        TokenizerError: `tokenizer_path` is invalid.
        ValueError: the tokenizer has no BOS token.
    """

    def __init__(self, text: str, tokenizer_path: Path) -> None:
        self.tokenizer = MistralTokenizer.from_pretrained(tokenizer_path)
        bos = self.tokenizer.bos_token_id
        if bos is None:
            raise ValueError(
                "the tokenizer must have a BOS token, which begins every sequence, got none in "
                f"{self.tokenizer.path}"
            )
        self.bos = bos
        self.tokens, self.starts = self._encode(text)

    def _encode(self, text: str) -> tuple[Tensor, Tensor]:
        """Return the tokens of a text, and the index of each paragraph's first token."""
        encode = self.tokenizer.encode
        paragraphs = [encode(line + "\n", bos=False, eos=False) for line in text.splitlines()]
        lengths = torch.tensor([len(paragraph) for paragraph in paragraphs], dtype=torch.int64)
        tokens = [token for paragraph in paragraphs for token in paragraph]
        return torch.tensor(tokens, dtype=torch.int64), lengths.cumsum(0) - lengths

    def encode(self, text: str) -> Tensor:
        """Return the tokens of another text, without BOS."""
        return self._encode(text)[0]

    def with_bos(self, targets: Tensor) -> Tensor:
        """Return the inputs for `targets`, (..., seqlen): BOS, then all targets except the last."""
        bos = targets.new_full((*targets.shape[:-1], 1), self.bos)
        return torch.cat((bos, targets[..., :-1]), dim=-1)

    def sample(self, batch_size: int, seqlen: int, generator: torch.Generator) -> Tensor:
        """Return random targets, (batch_size, seqlen), each from the beginning of a paragraph.

        Raises:
            ValueError: the text has fewer than `seqlen` tokens.
        """
        starts = self.starts[self.starts <= len(self.tokens) - seqlen]
        if not len(starts):
            raise ValueError(
                f"the text has {len(self.tokens)} tokens, too few for seqlen {seqlen}; use a "
                "smaller seqlen (--seqlen), or more text"
            )
        chosen = starts[torch.randint(len(starts), (batch_size,), generator=generator)]
        return self.tokens[chosen[:, None] + torch.arange(seqlen)]

    def batches(self, recipe: Recipe, generator: torch.Generator) -> Iterator[Sequence[Tensor]]:
        """Yield batches endlessly: the targets of each sequence, batch_size * seqlen tokens in all.

        `generator` is used only when a batch is requested.
        """
        while not recipe.pack:
            yield list(self.sample(recipe.batch_size, recipe.seqlen, generator))
        paragraphs = self.tokens.tensor_split(self.starts[1:])
        whole = [part for paragraph in paragraphs for part in paragraph.split(recipe.seqlen)]
        whole = [part for part in whole if len(part)]  # a tokenizer may drop a whole line
        while True:
            batch, room = [], recipe.batch_size * recipe.seqlen
            while room:
                chosen = int(torch.randint(len(whole), (), generator=generator))
                batch.append(whole[chosen][:room])
                room -= len(batch[-1])
            yield batch
