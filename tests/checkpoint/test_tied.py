"""Test tied embeddings: the stored tensors decide, as in transformers, and no tensor is lost."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_checkpoints import SMALL, State, random_state

from mistral_kernels import MistralForCausalLM, convert
from mistral_kernels.checkpoint import CheckpointError, open_checkpoint, save_hf, save_raw
from mistral_kernels.model.config import MistralConfig

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TIED = dataclasses.replace(SMALL, tie_word_embeddings=True)
FILES = {"hf": "model.safetensors", "raw": "consolidated.safetensors"}
RAW_NAMES = {HEAD: "output.weight", EMBEDDING: "tok_embeddings.weight"}

Tied = Callable[..., tuple[Path, State]]


def name_in(format: str, name: str) -> str:
    return RAW_NAMES[name] if format == "raw" else name


@pytest.fixture
def tied(tmp_path: Path) -> Tied:
    """Return a function that writes a checkpoint and returns its folder and its state.

    Its configuration ties the embeddings, but `head` is stored as well if it is given.
    """

    def make(format: str, head: torch.Tensor | None, config: MistralConfig = TIED) -> tuple:
        state = random_state(TIED)
        save = save_raw if format == "raw" else save_hf
        save(state.items(), config, tmp_path / format, dtype=torch.float32)
        file = tmp_path / format / FILES[format]
        if head is not None:
            save_file(load_file(file) | {name_in(format, HEAD): head}, file)
        return tmp_path / format, state

    return make


@pytest.mark.parametrize("format", FILES)
def test_different_head_is_kept(
    tied: Tied, format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check `open_checkpoint`, `from_pretrained` and both conversions bit by bit."""
    head = torch.randn(SMALL.vocab_size, SMALL.hidden_size)
    folder, state = tied(format, head)
    checkpoint = open_checkpoint(folder)
    names = f"{name_in(format, HEAD)} and {name_in(format, EMBEDDING)}"
    note = (
        "tie_word_embeddings = False: the configuration has True, but "
        f"{names} differ; both are kept"
    )
    assert checkpoint.config == SMALL
    assert checkpoint.config.notes == (note,)
    model = MistralForCausalLM.from_pretrained(folder)
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(model.model.embed_tokens.weight, state[EMBEDDING])

    assert convert.main([str(folder), str(tmp_path / "out")]) == 0
    assert note in capsys.readouterr().err
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    for other in ("out", "back"):
        again = open_checkpoint(tmp_path / other)
        assert again.config == SMALL
        assert again.config.notes == ()
        found = {name: tensor.clone() for name, tensor in again.tensors()}
        assert found.keys() == {HEAD, *state}
        assert all(torch.equal(found[name], x) for name, x in (state | {HEAD: head}).items())


def test_from_pretrained_warns_of_different_head(
    tied: Tied, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = tied("hf", torch.randn(SMALL.vocab_size, SMALL.hidden_size))
    with caplog.at_level(logging.WARNING, "mistral_kernels"):
        MistralForCausalLM.from_pretrained(folder)
    assert [record.message for record in caplog.records if "tie_word" in record.message] == [
        f"tie_word_embeddings = False: the configuration has True, but {HEAD} and {EMBEDDING} "
        "differ; both are kept"
    ]


@pytest.mark.parametrize("stored", ["both", "embedding", "head", "different"])
def test_logits_equal_transformers(tied: Tied, stored: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder, state = tied("hf", None)
    file = folder / FILES["hf"]
    head = torch.randn(SMALL.vocab_size, SMALL.hidden_size)
    tensors = state | {HEAD: head if stored == "different" else state[EMBEDDING].clone()}
    if stored in ("embedding", "head"):
        del tensors[HEAD if stored == "embedding" else EMBEDDING]
    save_file(tensors, file, {"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = MistralForCausalLM.from_pretrained(folder)
    assert ours.config.tie_word_embeddings == (stored != "different")
    ids = torch.randint(SMALL.vocab_size, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", FILES)
def test_equal_head_is_tied(tied: Tied, format: str) -> None:
    folder, state = tied(format, None)
    file = folder / FILES[format]
    tensors = load_file(file)
    save_file(tensors | {name_in(format, HEAD): state[EMBEDDING].clone()}, file)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == TIED
    assert checkpoint.config.notes == ()
    assert HEAD not in checkpoint.stored


def test_pickle_with_one_tensor_under_both_names(tied: Tied) -> None:
    folder, state = tied("hf", None)
    (folder / FILES["hf"]).unlink()
    torch.save(state | {HEAD: state[EMBEDDING]}, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).config == TIED
    torch.save(state | {HEAD: state[EMBEDDING].flip(0)}, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).config == SMALL


def test_head_of_other_dtype_is_kept_and_of_other_shape_refused(tied: Tied) -> None:
    folder, state = tied("hf", random_state(TIED)[EMBEDDING].double())
    assert open_checkpoint(folder).config == SMALL
    file = folder / FILES["hf"]
    save_file(state | {HEAD: torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' must have shape .*, got \(1,\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("save", [save_hf, save_raw])
@pytest.mark.parametrize("head_first", [False, True])
def test_saving_a_different_head_as_tied_raises(
    tmp_path: Path, save: Callable[..., None], head_first: bool
) -> None:
    state = random_state(TIED)
    head = {HEAD: state[EMBEDDING] + 1}
    items = [*head.items(), *state.items()] if head_first else [*state.items(), *head.items()]
    message = f"{HEAD} must equal {EMBEDDING}, which the configuration ties to it; save with tie_w"
    with pytest.raises(CheckpointError, match=message):
        save(items, TIED, tmp_path / "out", dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []
    save(
        [*state.items(), (HEAD, state[EMBEDDING].clone())],
        TIED,
        tmp_path / "out",
        dtype=torch.float32,
    )
    assert open_checkpoint(tmp_path / "out").config == TIED


def test_from_pretrained_refuses_to_tie_a_different_head(tied: Tied) -> None:
    """One of the two tensors would be lost."""
    folder, _ = tied("hf", torch.randn(SMALL.vocab_size, SMALL.hidden_size))
    with pytest.raises(
        ValueError, match=r"^tie_word_embeddings must be False, which the checkpoint"
    ):
        MistralForCausalLM.from_pretrained(folder, tie_word_embeddings=True)
