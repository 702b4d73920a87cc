"""Test the messages for arguments and values that tokenizers do not support."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tokenizer_cases import USER, make_folder

from mistral_kernels import AutoTokenizer
from mistral_kernels.tokenizer import TokenizerError

WAY_OUT = (
    "tokens cannot be added; choose a token of get_vocab(), such as eos_token, or add the token "
    "with transformers, resize the model's embeddings there and save both"
)
SPECIAL = ", ".join(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
REFUSED: list[tuple[Any, str]] = [
    (
        lambda t: setattr(t, "pad_token", "[PAD]"),
        f"pad_token must be a token of the vocabulary, got '[PAD]'; {WAY_OUT}",
    ),
    (
        lambda t: t.add_special_tokens({"pad_token": "[PAD]"}),
        f"pad_token must be a token of the vocabulary, got '[PAD]'; {WAY_OUT}",
    ),
    (
        lambda t: t.add_special_tokens({"padding": "</s>"}),
        f"special_tokens_dict must have the keys {SPECIAL} or extra_special_tokens, got 'padding'",
    ),
    (
        lambda t: t.add_special_tokens({"additional_special_tokens": ["</s>", "<x>"]}),
        f"new_tokens must be tokens of the vocabulary, got '<x>'; {WAY_OUT}",
    ),
    (
        lambda t: t.add_tokens("<x>"),
        f"new_tokens must be tokens of the vocabulary, got '<x>'; {WAY_OUT}",
    ),
    (
        lambda t: setattr(t, "pad_token_id", 2048),
        f"pad_token_id must be the id of a token, got 2048; {WAY_OUT}",
    ),
    (lambda t: setattr(t, "pad_token_id", "<unk>"), "token ids must be integers, got str"),
    (lambda t: setattr(t, "bos_token_id", -1), "token ids must be at least 0, got -1"),
    (
        lambda t: setattr(t, "eos_token", 2),
        f"eos_token must be a token of the vocabulary, got 2; {WAY_OUT}",
    ),
    (
        lambda t: setattr(t, "padding_side", "up"),
        'padding_side must be "left" or "right", got \'up\'',
    ),
    (
        lambda t: setattr(t, "truncation_side", 1),
        'truncation_side must be "left" or "right", got 1',
    ),
    (
        lambda t: setattr(t, "model_max_length", 0),
        "model_max_length must be an integer of at least 1, got 0",
    ),
    (lambda t: setattr(t, "add_bos_token", 1), "add_bos_token must be True or False, got 1"),
    (
        lambda t: setattr(t, "chat_template", "x"),
        "chat_template cannot be set: mistral-common renders the template of {path}; a template in "
        "the folder requires a tokenizer.json",
    ),
    (
        lambda t: t("a", "b"),
        "text_pair must be None, got 'b'; join the two texts, or call the tokenizer twice",
    ),
    (
        lambda t: t("a", stride=2),
        "stride must be 0 or None, got 2; split the token ids into overlapping parts",
    ),
    (
        lambda t: t(["a"], is_split_into_words=True),
        "is_split_into_words must be False or None, got True; join the words with spaces",
    ),
    (
        lambda t: t("a", return_token_type_ids=True),
        "return_token_type_ids must be False or None, got True; leave it out: Mistral has no "
        "token types",
    ),
    (
        lambda t: t("a", return_offsets_mapping=True),
        "return_offsets_mapping must be False or None, got True; call the tokenizer of "
        "transformers, which returns offsets",
    ),
    (lambda t: t("a", paddding=True), "tokenizer() got an unexpected argument 'paddding'"),
    (
        lambda t: t("a", truncation="only_second"),
        'truncation must be None or False or "do_not_truncate" or True or "longest_first" or '
        "\"only_first\", got 'only_second'",
    ),
    (lambda t: t("a", max_length=0), "max_length must be an integer of at least 1, got 0"),
    (lambda t: t("a", max_length=2.0), "max_length must be an integer of at least 1, got 2.0"),
    (
        lambda t: t("a", pad_to_multiple_of=True),
        "pad_to_multiple_of must be an integer of at least 1, got True",
    ),
    (
        lambda t: t("a", padding="max_length", truncation=True, max_length=6, pad_to_multiple_of=4),
        "max_length must be a multiple of pad_to_multiple_of (4) with truncation and padding, "
        "got 6",
    ),
    (
        lambda t: t.encode("a", bos=True, eos=True, truncation=True, max_length=1),
        "max_length must be at least 2, the number of special tokens of a text, got 1; "
        "add_special_tokens=False omits them",
    ),
    (
        lambda t: t("a", return_tensors="tf"),
        'return_tensors must be None or "pt" or "np", got \'tf\'',
    ),
    (lambda t: t("a", return_length=1), "return_length must be True or False, got 1"),
    (lambda t: t(["a", ["b"]]), "text must be a str, got list"),
    (lambda t: t.pad([[1, 2]]), "encoded_inputs must be a dict or a list of dicts, got list"),
    (lambda t: t.pad({"ids": [1]}), "encoded_inputs must have input_ids, got ['ids']"),
    (
        lambda t: t.pad(
            [{"input_ids": [1], "labels": [1]}, {"input_ids": [1], "labels": []}],
            return_tensors="pt",
        ),
        "return_tensors=\"pt\" requires numbers and rows of equal length in 'labels'; only "
        "input_ids and attention_mask are padded",
    ),
    (
        lambda t: t.decode([1], clean_up_tokenization_spaces=1),
        "clean_up_tokenization_spaces must be True or False or None, got 1",
    ),
    (lambda t: t.decode([1], skip=True), "decode() got an unexpected argument 'skip'"),
    (
        lambda t: t.apply_chat_template(
            [USER], add_generation_prompt=True, continue_final_message=True
        ),
        "continue_final_message must be False with add_generation_prompt=True, got True",
    ),
    (
        lambda t: t.apply_chat_template([USER], return_assistant_tokens_mask=True),
        "return_assistant_tokens_mask must be None or False, got True; encode the conversation "
        "without and with the answer, and compare lengths",
    ),
    (
        lambda t: t.save_pretrained("x", push_to_hub=True),
        "push_to_hub must be None or False, got True; upload the folder with huggingface_hub",
    ),
    (
        lambda t: AutoTokenizer.from_pretrained("tiny", subfolder="x"),
        "subfolder must be None or '', got 'x'; give the folder that holds the files",
    ),
    (
        lambda t: AutoTokenizer.from_pretrained("tiny", legacy="no"),
        "legacy must be None or True or False, got 'no'",
    ),
    (
        lambda t: AutoTokenizer.from_pretrained("tiny", pading_side="left"),
        "from_pretrained() got an unexpected argument 'pading_side'",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_unsupported_arguments_and_values_raise_one_line(call: Any, message: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    with pytest.raises((TokenizerError, NotImplementedError, TypeError)) as caught:
        call(tokenizer)
    assert str(caught.value) == message.format(path=tokenizer.path)


def test_mistral_templates_refuse_what_they_cannot_render(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_folder(tmp_path, "sentencepiece"))
    for name in ("chat_template", "documents", "enable_thinking"):
        with pytest.raises(TokenizerError) as caught:
            tokenizer.apply_chat_template([USER], **{name: "x"})
        assert str(caught.value) == f"{name} must be None for Mistral's own chat template"
        assert tokenizer.apply_chat_template([USER], **{name: None}).input_ids
    with pytest.raises(TokenizerError) as caught:
        tokenizer.apply_chat_template([USER], continue_final_message=True)
    assert str(caught.value) == (
        "continue_final_message must be False unless the last message has the role 'assistant', "
        "got 'user'"
    )
    assert tokenizer.chat_template is None
