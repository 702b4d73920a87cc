"""Folders like those of the most used Mistral models, with small random weights.

The vocabularies of Mistral-7B are those of mistral-common. The vocabulary of Nemo is trained on
three lines of text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mistral_kernels import MistralConfig
from support.small_checkpoints import SMALL, varied_model
from support.tokenizer_cases import DATA, SENTENCEPIECE, train_json

INSTRUCT = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{%- endfor %}"""
TOOLS = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {%- if tools and loop.last %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" + ("]" if loop.last else ", ") }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
ZEPHYR = """{% for message in messages %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
CHATML = """{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
BEAGLE = """{% for message in messages %}
{{- bos_token + message['role'] + '\n' + message['content'] + eos_token + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"""


class Family(NamedTuple):
    """Files of a model: its vocabulary, chat template and added tokens.

    Attributes:
        vocabulary: a key of SENTENCEPIECE; None: a small byte-level tokenizer.json.
        template: the chat template; None: a base model.
        added: special tokens after the vocabulary.
        window: the sliding window.
    """

    vocabulary: str | None
    template: str | None = None
    added: tuple[str, ...] = ()
    window: int | None = None

    @property
    def ends(self) -> str:
        """Token that ends an answer."""
        return self.added[0] if "<|im_end|>" in self.added else "</s>"


FAMILIES = {
    "mistralai/Mistral-7B-v0.1": Family("v1", window=11),
    "mistralai/Mistral-7B-Instruct-v0.1": Family("v1", INSTRUCT, window=11),
    "mistralai/Mistral-7B-Instruct-v0.2": Family("v1", INSTRUCT),
    "mistralai/Mistral-7B-v0.3": Family("v3"),
    "mistralai/Mistral-7B-Instruct-v0.3": Family("v3", TOOLS),
    "mistralai/Mistral-Nemo-Base-2407": Family(None),
    "mistralai/Mistral-Nemo-Instruct-2407": Family(None, TOOLS, ("[INST]", "[/INST]")),
    "HuggingFaceH4/zephyr-7b-beta": Family("v1", ZEPHYR, window=11),
    "teknium/OpenHermes-2.5-Mistral-7B": Family("v1", CHATML, ("<|im_end|>", "<|im_start|>")),
    "mlabonne/NeuralBeagle14-7B": Family("v1", BEAGLE),
}


def make_folder(folder: Path, family: Family) -> Path:
    """Write weights in float32, their configuration and the tokenizer; return the folder."""
    files = folder.with_name("tokenizer")
    files.mkdir()
    vocab_size = write_tokenizer(files, family)
    config = MistralConfig(
        vocab_size=vocab_size,
        hidden_size=SMALL.hidden_size,
        intermediate_size=SMALL.intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=family.window,
        eos_token_id=vocab_size - len(family.added) if family.ends == "<|im_end|>" else 2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)  # fixed: for other weights, rounding might change the texts
        model = varied_model(config)
    with torch.no_grad():  # generate no single-byte tokens: the text might not be UTF-8
        model.lm_head.weight[: {"v1": 259, "v3": 1027}.get(family.vocabulary or "", 3)] = 0.0
    model.save_pretrained(folder, extra_files=sorted(files.iterdir()))
    return folder


def write_tokenizer(folder: Path, family: Family) -> int:
    """Write the files of the tokenizer; return the size of the vocabulary."""
    contents = tokenizer_json(folder, family)
    (folder / "tokenizer.json").write_text(json.dumps(contents))
    if family.vocabulary:
        shutil.copy(DATA / SENTENCEPIECE[family.vocabulary], folder / "tokenizer.model")
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": family.ends,
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer" if family.vocabulary else "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "chat_template": family.template,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    return len(contents["model"]["vocab"]) + len(family.added)


def tokenizer_json(folder: Path, family: Family) -> dict[str, Any]:
    """Return the contents of the tokenizer.json of a model; `folder` may be written to."""
    if family.vocabulary is None:
        train_json(folder / "tokenizer.json", byte_level=True)
        contents: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    else:
        contents = converted(DATA / SENTENCEPIECE[family.vocabulary])
        if family.template in (INSTRUCT, TOOLS):  # no space after a special token
            contents["normalizer"] = None
            contents["pre_tokenizer"] = {
                "type": "Metaspace",
                "replacement": "\u2581",
                "prepend_scheme": "first",
                "split": False,
            }
    after = len(contents["model"]["vocab"])
    contents["added_tokens"] = [
        *(token for token in contents["added_tokens"] if token["id"] < after),
        *(_special(after + i, content) for i, content in enumerate(family.added)),
    ]
    return contents


def _special(token_id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": True, **flags}


def converted(model: Path) -> dict[str, Any]:
    """Convert a sentencepiece model to the contents of a tokenizer.json, as on the hub."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(str(model))
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges: list[tuple[int, str, str]] = []
    for piece, rank in vocab.items():
        if processor.is_byte(rank) or processor.is_control(rank) or processor.is_unknown(rank):
            continue
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges += [(rank, a, b) for a, b in sorted(known, key=lambda x: (vocab[x[0]], vocab[x[1]]))]
    control = [i for i in range(3, len(pieces)) if processor.is_control(i)]
    return {
        "version": "1.0",
        "added_tokens": [_special(i, pieces[i]) for i in (0, 1, 2, *control)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[a, b] for _, a, b in merges],
        },
    }
