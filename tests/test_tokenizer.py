"""The tokenizer against the libraries it stands on, over every vocabulary that they ship."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_kernels.tokenizer import MistralTokenizer, TokenizerError, TokenizerOutput

mistral_common = pytest.importorskip("mistral_common", reason="extra `chat` is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="extra `hf` is not installed")

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
# In sentencepiece's vocabularies "▁" is the space.
any_text = st.text().filter(lambda t: "\u2581" not in t)
quick = settings(max_examples=60)


def train_json(path: Path, byte_level: bool) -> None:
    """A small tokenizer.json of Mistral-7B's kind (byte fallback) or Nemo's (ByteLevel)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
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
    trainer = BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    saved = json.loads(tokenizer.to_str())
    # The byte tokens are plain vocabulary; the trainer can only make room for them as special.
    saved["added_tokens"] = saved["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.add_tokens([AddedToken("naïve 漢", special=False)])  # plain text, in any decoder
    tokenizer.save(str(path))


@pytest.fixture(scope="session")
def open_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def open_(name: str) -> MistralTokenizer:
        if name not in JSON:
            return MistralTokenizer.from_pretrained(DATA / name)
        folder = tmp_path_factory.mktemp(name)
        train_json(folder / "tokenizer.json", byte_level=name == "byte_level")
        return MistralTokenizer.from_pretrained(folder)

    return open_


def streamed(tokenizer: MistralTokenizer, ids: list[int], skip: bool = True) -> str:
    stream = tokenizer.stream(skip_special_tokens=skip)
    return "".join([*map(stream.push, ids), stream.flush()])


# ---------------------------------------------------------------------- text to ids and back


@pytest.mark.parametrize("name", ALL)
def test_every_text_comes_back(open_tokenizer: Any, name: str) -> None:
    tokenizer = open_tokenizer(name)

    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    # tokenizer.json reads the names of special tokens in a text as those tokens.
    names = [] if name in VENDOR else ["<s>", "</s>", "<unk>"]
    plain = any_text.filter(lambda text: not any(n in text for n in names))
    for text in TEXTS:
        if not any(n in text for n in names):
            check(text)
    quick(given(plain)(check))()


@pytest.mark.parametrize("name", VENDOR)
def test_ids_are_the_vendors(open_tokenizer: Any, name: str) -> None:
    vendor = open_vendor(name).instruct_tokenizer.tokenizer
    tokenizer = open_tokenizer(name)
    assert tokenizer.vocab_size == len(tokenizer) == vendor.n_words
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (vendor.bos_id, vendor.eos_id)
    assert tokenizer.all_special_ids == vendor.special_ids
    for text in TEXTS:
        for bos, eos in [(True, False), (False, True)]:
            assert tokenizer.encode(text, bos=bos, eos=eos) == vendor.encode(text, bos, eos)


@pytest.mark.parametrize("name", VENDOR)
def test_special_tokens_show_by_name_unless_skipped(open_tokenizer: Any, name: str) -> None:
    tokenizer = open_tokenizer(name)
    ids = tokenizer.encode("Hi there", eos=True) + tokenizer.encode(" You", bos=False)
    space = "" if "tekken" in name else " "  # sentencepiece puts a space before each text
    assert tokenizer.decode(ids) == f"<s>Hi there</s>{space} You"
    assert tokenizer.decode(ids, skip_special_tokens=True) == f"Hi there{space} You"
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(ids)
    assert tokenizer.decode(ids[1]) == tokenizer.decode([ids[1]]) != ""
    assert tokenizer.batch_decode(torch.tensor([ids, ids])) == [tokenizer.decode(ids)] * 2


# ---------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_stream_joins_to_decode(open_tokenizer: Any, name: str, skip: bool) -> None:
    """For any ids at all: whole texts, random tokens, and bytes that are no text."""
    tokenizer = open_tokenizer(name)
    # Many single bytes: half characters, overlong forms, surrogates, stray continuation bytes.
    few = [*range(3), *tokenizer.encode("a é 漢👍 ▁", bos=False)]
    first_byte = (
        next(i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\x00")
        if name not in JSON[1:]
        else 3
    )
    bytes_ = st.integers(first_byte, min(first_byte + 255, tokenizer.vocab_size - 1))
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    any_ids = st.lists(st.one_of(st.sampled_from(few), bytes_, any_id), max_size=24)

    def check(ids: list[int], split: int) -> None:
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        assert streamed(tokenizer, ids, skip) == text
        # As a continuation of a prompt: what decode() adds to the prompt's own text.
        prompt, rest = ids[:split], ids[split:]
        stream = tokenizer.stream(prompt, skip_special_tokens=skip)
        told = tokenizer.stream(skip_special_tokens=skip)
        start = len("".join(map(told.push, prompt)))
        assert "".join([*map(stream.push, rest), stream.flush()]) == text[start:]

    for text in TEXTS:
        check(tokenizer.encode(text), 3)
    quick(given(any_ids, st.integers(0, 24))(check))()


@pytest.mark.parametrize("name", ALL)
def test_stream_gives_whole_characters_as_they_complete(open_tokenizer: Any, name: str) -> None:
    tokenizer = open_tokenizer(name)
    text = "a 👩‍👧 漢 ש"
    stream, seen = tokenizer.stream(), ""
    for token_id in tokenizer.encode(text):
        seen += stream.push(token_id)
        assert text.startswith(seen)
    if name != "byte_fallback":  # which must await the end of a run of bytes
        assert seen == text
    assert seen + stream.flush() == text
    # An incomplete character comes out at the end alone.
    ids = tokenizer.encode("x \U0001fae8")[:-1]
    stream = tokenizer.stream()
    assert "\ufffd" not in "".join(map(stream.push, ids))
    assert "\ufffd" in stream.flush()


@pytest.mark.parametrize("name", list(SENTENCEPIECE.values()))
def test_stream_keeps_the_space_before_the_first_new_word(open_tokenizer: Any, name: str) -> None:
    tokenizer = open_tokenizer(name)
    prompt, new = tokenizer.encode("The cat"), tokenizer.encode("sat", bos=False)
    assert "".join(map(tokenizer.stream(prompt).push, new)) == " sat"
    assert "".join(map(tokenizer.stream(torch.tensor(prompt)).push, new)) == " sat"
    assert "".join(map(tokenizer.stream().push, new)) == "sat"


def test_stream_work_is_constant_per_token(open_tokenizer: Any, monkeypatch: Any) -> None:
    """A long run of bytes, even an undecodable one, is not decoded over and over."""
    tokenizer = open_tokenizer("byte_fallback")
    byte = tokenizer.encode("\U0001fae8", bos=False)[-1]
    word = tokenizer.encode("fox", bos=False)
    decoded = 0
    original = tokenizer._decode

    def counted(ids: list[int], skip_special_tokens: bool) -> str:
        nonlocal decoded
        decoded += len(ids)
        return original(ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "_decode", counted)
    stream = tokenizer.stream()
    for token_id in ([byte] * 500 + word) * 4:
        stream.push(token_id)
    assert decoded < 3 * 4 * (500 + len(word))


@pytest.mark.parametrize("extra_whitespace", [True, False])
def test_stream_of_a_model_that_removes_extra_spaces(
    tmp_path: Path, extra_whitespace: bool
) -> None:
    """sentencepiece's default normalisation drops *all* leading spaces, not the dummy one alone."""
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        remove_extra_whitespaces=extra_whitespace,
        minloglevel=2,
    )
    tokenizer = MistralTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_version is None and not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template is known for this vocabulary"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    space = tokenizer.encode("a  b", bos=False)[0]
    any_ids = st.lists(
        st.one_of(st.sampled_from([space, 0, 1]), st.integers(0, len(tokenizer) - 1)), max_size=9
    )

    @quick
    @given(any_ids)
    def check(ids: list[int]) -> None:
        assert streamed(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=True)

    check()


# -------------------------------------------------------------------------------- the call


def test_call_gives_what_transformers_users_expect(open_tokenizer: Any) -> None:
    tokenizer = open_tokenizer(SENTENCEPIECE["v3"])
    one, two = tokenizer.encode("one"), tokenizer.encode("and two more")
    assert tokenizer("one") == {"input_ids": one, "attention_mask": [1] * len(one)}
    assert tokenizer(["one", "and two more"]).input_ids == [one, two]
    assert tokenizer("one", add_special_tokens=False).input_ids == one[1:]
    out = tokenizer("one", return_tensors="pt").to("cpu")
    assert isinstance(out, TokenizerOutput) and out.input_ids.dtype == torch.int64
    assert out["input_ids"].tolist() == [one] and {**out}.keys() == {"input_ids", "attention_mask"}
    assert out.to("meta").input_ids.device.type == "meta"
    with pytest.raises(AttributeError, match="token_type_ids"):
        out.token_type_ids  # noqa: B018

    gap = len(two) - len(one)
    padded = tokenizer(["one", "and two more"], padding=True, return_tensors="pt")
    pad = [tokenizer.pad_token_id] * gap
    assert padded.input_ids.tolist() == [pad + one, two]
    assert padded.attention_mask.tolist() == [[0] * gap + [1] * len(one), [1] * len(two)]
    assert tokenizer(["one", "one"], padding=True).input_ids == [one, one]
    with pytest.raises(TokenizerError, match="2 texts of .* tokens do not make one tensor: pass"):
        tokenizer(["one", "and two more"], return_tensors="pt")


def test_pad_token_is_the_files_own_or_eos(open_tokenizer: Any) -> None:
    assert open_tokenizer(SENTENCEPIECE["v1"]).pad_token_id == 2
    tekken = open_tokenizer(TEKKEN)
    assert tekken.decode([tekken.pad_token_id]) == "<pad>"


@pytest.mark.parametrize("name", [SENTENCEPIECE["v1"], TEKKEN, *JSON])
def test_bad_texts_and_ids(open_tokenizer: Any, name: str) -> None:
    tokenizer = open_tokenizer(name)
    with pytest.raises(TokenizerError, match="text must be a str, got int"):
        tokenizer([3])
    with pytest.raises(TokenizerError, match="text must be a str, got int"):
        tokenizer(3)
    with pytest.raises(TokenizerError, match=r"text has a lone surrogate, '\\ud800', at index 1"):
        tokenizer("a\ud800")
    with pytest.raises(TokenizerError, match="return_tensors must be None or \"pt\", got 'np'"):
        tokenizer("a", return_tensors="np")
    for bad in (-1, len(tokenizer)):
        message = rf"token id {bad} is not in the vocabulary of {len(tokenizer)}: is .* the token"
        with pytest.raises(TokenizerError, match=message):
            tokenizer.decode([1, bad])
        with pytest.raises(TokenizerError, match=message):
            tokenizer.stream().push(bad)
    with pytest.raises(TokenizerError, match="token ids must be int, got float"):
        tokenizer.decode(torch.tensor([1.0]))


# ------------------------------------------------------------------------------------- chat

USER, AGAIN = {"role": "user", "content": "Hi"}, {"role": "user", "content": "And then?\n"}
ANSWER = {"role": "assistant", "content": "Hello — ça va?"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, AGAIN],
    [SYSTEM, USER, ANSWER, AGAIN, ANSWER, USER],
    [USER, AGAIN],
]


@functools.cache
def open_vendor(name: str) -> Any:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer as Vendor

    return Vendor.from_file(DATA / name)


def vendor_chat(name: str, messages: list[Any]) -> list[int]:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    request = ChatCompletionRequest(messages=messages)
    return open_vendor(name).encode_chat_completion(request).tokens


@pytest.mark.parametrize("messages", CHATS, ids=len)
@pytest.mark.parametrize("name", VENDOR)
def test_chat_is_the_vendors(open_tokenizer: Any, name: str, messages: list[Any]) -> None:
    tokenizer, expected = open_tokenizer(name), vendor_chat(name, messages)
    version = open_vendor(name).version.value
    assert tokenizer.has_chat_template and tokenizer.chat_version == version
    assert tokenizer.apply_chat_template(messages) == expected
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == tokenizer.decode(expected)
    tensor = tokenizer.apply_chat_template(messages, return_tensors="pt")
    assert tensor.tolist() == [expected]
    both = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    assert torch.equal(both.input_ids, tensor) and both.attention_mask.all()


@pytest.mark.parametrize("name", [SENTENCEPIECE["v3"], SENTENCEPIECE["v7"], TEKKEN])
def test_chat_with_the_answer_begun(open_tokenizer: Any, name: str) -> None:
    messages = [USER, {**ANSWER, "prefix": True}]
    assert open_tokenizer(name).apply_chat_template(messages) == vendor_chat(name, messages)


def test_chat_that_the_assistant_ends(open_tokenizer: Any) -> None:
    tokenizer = open_tokenizer(SENTENCEPIECE["v3"])
    ids = tokenizer.apply_chat_template([USER, ANSWER], add_generation_prompt=False)
    head = tokenizer.apply_chat_template([USER])
    assert ids == head + tokenizer.encode(ANSWER["content"], bos=False, eos=True)
    assert tokenizer.apply_chat_template([USER], add_generation_prompt=False) == head


@pytest.mark.parametrize("version", SENTENCEPIECE)
def test_chat_version_of_a_plain_tokenizer_model(
    open_tokenizer: Any, tmp_path: Path, version: str
) -> None:
    """`tokenizer.model` does not name its version: the vocabulary does."""
    shutil.copy(DATA / SENTENCEPIECE[version], tmp_path / "tokenizer.model")
    plain = MistralTokenizer.from_pretrained(tmp_path)
    assert plain.chat_version == version
    assert plain.has_chat_template == (version != "v1")
    named = open_tokenizer(SENTENCEPIECE[version])
    assert plain.apply_chat_template(CHATS[3]) == named.apply_chat_template(CHATS[3])


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "Conversation must have at least one message"),
        ("Hi", "messages must be a list of"),
        (["Hi"], "messages must be a list of"),
        ([{"role": "bot", "content": "Hi"}], "messages.0 Input tag 'bot' found using 'role'"),
        ([{"content": "Hi"}], "messages.0 Unable to extract tag using discriminator 'role'"),
        ([{"role": "user"}], "messages.0.user.content Field required"),
        ([{"role": "user", "content": "\udcff"}], "messages: content has a lone surrogate"),
        ([ANSWER], "Conversation must start with a user message or system message"),
        ([USER, ANSWER], "Expected last role User or Tool"),
    ],
)
@pytest.mark.parametrize("version", ["v1", "v7"])
def test_bad_conversations(open_tokenizer: Any, version: str, messages: Any, error: str) -> None:
    with pytest.raises(TokenizerError, match=error) as caught:
        open_tokenizer(SENTENCEPIECE[version]).apply_chat_template(messages)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------- tokenizer.json and its template

TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {%- if m.role == "system" %}{{ raise_exception("no role " + m.role) }}{% endif %}
    <|{{ m["role"] }}|>{{ m["content"] | tojson }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.fixture(params=JSON)
def json_folder(request: Any, tmp_path: Path) -> Path:
    train_json(tmp_path / "tokenizer.json", byte_level=request.param == "byte_level")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "chat_template": TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_tokenizer_json_equals_transformers(json_folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="extra `hf` is not installed")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(json_folder)
    ours = MistralTokenizer.from_pretrained(json_folder)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert len(ours) == len(theirs)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip)
    assert ours.has_chat_template and ours.chat_version == "jinja"
    for prompt in (True, False):
        arguments: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt}
        text = theirs.apply_chat_template([USER, ANSWER], **arguments)
        assert ours.apply_chat_template([USER, ANSWER], **arguments) == text
        arguments["tokenize"] = True
        ids = theirs.apply_chat_template([USER, ANSWER], return_dict=False, **arguments)
        assert ours.apply_chat_template([USER, ANSWER], **arguments) == ids


def test_tokenizer_json_template_files_and_errors(json_folder: Path) -> None:
    with pytest.raises(TokenizerError, match="messages: no role system"):
        MistralTokenizer.from_pretrained(json_folder).apply_chat_template([SYSTEM])
    (json_folder / "chat_template.jinja").write_text("{{ messages[0].__class__.__mro__ }}")
    with pytest.raises(TokenizerError, match="messages: access to attribute '__class__'.*unsafe"):
        MistralTokenizer.from_pretrained(json_folder).apply_chat_template([USER])
    (json_folder / "chat_template.jinja").unlink()
    (json_folder / "tokenizer_config.json").write_text("{}")
    base = MistralTokenizer.from_pretrained(json_folder)
    assert base.chat_version is None and not base.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template, neither .* is it a base model"):
        base.apply_chat_template([USER])
    (json_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="tokenizer_config.json: not JSON"):
        MistralTokenizer.from_pretrained(json_folder)


def test_tokenizer_json_truncation_and_padding_of_its_training_are_off(json_folder: Path) -> None:
    expected = MistralTokenizer.from_pretrained(json_folder).encode("x" * 40)
    saved = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=64)
    saved.save(str(json_folder / "tokenizer.json"))
    assert MistralTokenizer.from_pretrained(json_folder).encode("x" * 40) == expected


# ---------------------------------------------------------------------------------- opening


def test_folder_with_several_files(tmp_path: Path, json_folder: Path) -> None:
    """tekken.json, then the highest tokenizer.model, then tokenizer.json."""
    assert json_folder == tmp_path
    config = tmp_path / "tokenizer_config.json"
    config.unlink()

    def opened() -> str:
        return MistralTokenizer.from_pretrained(str(tmp_path)).path.name

    # A tokenizer.json of other special tokens than the vendor's file has is a fine-tune's.
    shutil.copy(DATA / SENTENCEPIECE["v1"], tmp_path / "tokenizer.model")
    assert opened() == "tokenizer.model"
    assert not MistralTokenizer.from_pretrained(tmp_path).has_chat_template
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    extended = json.loads(json.dumps(saved))
    extended["added_tokens"].append({**saved["added_tokens"][1], "id": 32000, "content": "<|im|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(extended))
    assert opened() == "tokenizer.json"
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    # So is one beside a chat template that is not Mistral's.
    config.write_text(json.dumps({"chat_template": "<|user|>{{ messages }}"}))
    assert opened() == "tokenizer.json"
    (tmp_path / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    assert opened() == "tokenizer.model"
    assert MistralTokenizer.from_pretrained(tmp_path).chat_version is None
    (tmp_path / "elsewhere.json").rename(tmp_path / "tokenizer.json")
    config.write_text(json.dumps({"chat_template": "[INST]{{ messages }}[/INST]"}))
    assert opened() == "tokenizer.model"
    assert MistralTokenizer.from_pretrained(tmp_path).has_chat_template

    for version in ("v3", "v2"):
        shutil.copy(DATA / SENTENCEPIECE[version], tmp_path / f"tokenizer.model.{version}")
    assert opened() == "tokenizer.model.v3"
    (tmp_path / "tekken.json").symlink_to(DATA / TEKKEN)
    assert opened() == "tekken.json"


@pytest.mark.parametrize("content", [b"", b"not a model", b"{}", b"[1]", b'{"config": {}}'])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("tokenizer.model", "sentencepiece model"),
        ("tokenizer.model.v3", "sentencepiece model"),
        ("tekken.json", "tekken file"),
        ("tokenizer.json", "tokenizer.json"),
    ],
)
def test_corrupt_files(tmp_path: Path, name: str, what: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(TokenizerError, match=f"{name}: not a {what} ") as caught:
            MistralTokenizer.from_pretrained(path)
        assert "\n" not in str(caught.value)


def test_paths_that_hold_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer found; looked for tekken.json, tokeni"):
        MistralTokenizer.from_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="no such folder: .*/absent"):
        MistralTokenizer.from_pretrained(tmp_path / "absent")
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(TokenizerError, match="vocab.txt: not a tokenizer's file name; expected te"):
        MistralTokenizer.from_pretrained(tmp_path / "vocab.txt")
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(TokenizerError, match="tokenizer.model: a Git LFS pointer, .*git lfs pull"):
        MistralTokenizer.from_pretrained(tmp_path)


def test_names_that_are_no_path_are_resolved(monkeypatch: Any) -> None:
    from mistral_kernels import checkpoint

    resolved = {"owner/model": DATA / SENTENCEPIECE["v3"]}
    monkeypatch.setattr(checkpoint, "resolve", resolved.__getitem__)
    assert MistralTokenizer.from_pretrained("owner/model").chat_version == "v3"


@pytest.mark.parametrize(
    ("name", "module", "command"),
    [
        (TEKKEN, "mistral_common", r'pip install "mistral_kernels\[chat\]"'),
        (SENTENCEPIECE["v3"], "mistral_common", r'pip install "mistral_kernels\[chat\]"'),
        ("tokenizer.json", "tokenizers", r'pip install "mistral_kernels\[hf\]"'),
    ],
)
def test_missing_extras_name_the_install_command(
    tmp_path: Path, monkeypatch: Any, name: str, module: str, command: str
) -> None:
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    train = DATA / name
    if name == "tokenizer.json":
        (train := tmp_path / name).write_text("{}")
    with pytest.raises(TokenizerError, match=command):
        tokenizer = MistralTokenizer.from_pretrained(train)
        assert tokenizer.decode(tokenizer.encode("works without")) == "<s>works without"
        tokenizer.apply_chat_template([USER])


def test_import_brings_no_tokenizer_library() -> None:
    code = (
        "import sys, mistral_kernels.tokenizer; "
        "print({m.split('.')[0] for m in sys.modules} & "
        "{'mistral_common', 'tokenizers', 'transformers', 'sentencepiece', 'huggingface_hub'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
