"""The forward pass: padding, labels and its output, compared with transformers' forward pass."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from support.transformers_pair import VOCAB, make_pair, relative_error
from torch.utils._pytree import tree_leaves, tree_map

from mistral_kernels.utils.unsupported import TRANSFORMERS

BATCH, SEQLEN = 4, 23
NO_CACHE = "; call generate, or prefill and decode with the model's new_cache"


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape or (BATCH, SEQLEN))


def padded(side: str) -> torch.Tensor:
    """Return a mask of rows of random lengths; the first row is full and the last one is short."""
    lengths = [SEQLEN, *torch.randint(1, SEQLEN, (BATCH - 2,)).tolist(), 1]
    mask = torch.zeros(BATCH, SEQLEN, dtype=torch.int64)
    for row, length in enumerate(lengths):
        left = {"left": SEQLEN - length, "right": 0}.get(side)
        start = int(torch.randint(SEQLEN - length + 1, ())) if left is None else left
        mask[row, start : start + length] = 1
    return mask


def labels_of(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return labels that are -100 where a token or the one before it is padding.

    transformers computes the loss of such targets. A fifth of the other labels is -100 as well.
    """
    before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
    labels = ids.masked_fill((mask & before) == 0, -100)
    return labels.masked_fill(torch.rand(ids.shape) < 0.2, -100)


def gradients(model: torch.nn.Module, out: Any) -> list[torch.Tensor]:
    """Return the gradients of three weights that have the same names and layout in both models."""
    names = (
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.o_proj.weight",
    )
    return list(torch.autograd.grad(out.loss, [model.get_parameter(name) for name in names]))


def test_the_output_is_a_dict_that_is_indexed_like_a_tuple() -> None:
    ours, theirs = make_pair(sliding_window=7)
    ids = random_ids()
    for given in ({}, {"labels": ids}):
        out, expected = ours(ids, **given), theirs(ids, use_cache=False, **given)
        assert list(out) == list(out.keys()) == list(expected)
        assert isinstance(out, dict)
        values = out.to_tuple()
        assert all(x is y for x, y in zip(values, out.values(), strict=True))
        assert out[0] is values[0]
        assert out[-1] is out["logits"] is out.logits
        assert [len(out[1:]), len(out[:])] == [len(expected[1:]), len(expected)]
        assert (out.loss is None) == (expected.loss is None) == ("loss" not in out)
        assert out.hidden_states is out.attentions is out.get("past_key_values") is None
        as_tuple = ours(ids, **given, return_dict=False)
        assert type(as_tuple) is tuple
        for x, y in zip(as_tuple, values, strict=True):
            assert torch.equal(x, y)
        for made in (
            copy.copy(out),
            type(out)({name: x.detach() for name, x in out.items()}),  # as accelerate copies it
            pickle.loads(pickle.dumps(tree_map(torch.Tensor.detach, out))),
        ):
            assert type(made) is type(out)
            assert torch.equal(made.logits, out.logits)
        # FSDP finds the tensors of an output among its leaves.
        assert all(x is y for x, y in zip(tree_leaves(out), values, strict=True))
    with pytest.raises(KeyError, match=r"^'loss'$"):
        ours(ids)["loss"]
    message = "^past_key_values must not be read, because forward keeps no cache; call generate, "
    with pytest.raises(AttributeError, match=message):
        _ = out.past_key_values


@pytest.mark.parametrize("side", ["left", "right", "random"])
@pytest.mark.parametrize("window", [None, 7, 64])
def test_padded_batches_equal_transformers(window: int | None, side: str) -> None:
    """Compare logits, the loss and gradients; a row's logits do not depend on its padding."""
    ours, theirs = make_pair(sliding_window=window)
    ids, mask = random_ids(), padded(side)
    labels, kept = labels_of(ids, mask), mask.bool()
    out, expected = ours(ids, mask, labels=labels), theirs(ids, attention_mask=mask, labels=labels)
    assert out.logits.shape == (BATCH, SEQLEN, VOCAB)
    assert not out.logits[~kept].any()
    assert relative_error(out.logits[kept], expected.logits[kept]) < 1e-4
    assert relative_error(out.loss, expected.loss) < 1e-4
    for x, y in zip(gradients(ours, out), gradients(theirs, expected), strict=True):
        assert relative_error(x, y) < 1e-4
    for row, keep, logits in zip(ids, kept, out.logits, strict=True):
        assert relative_error(logits[keep], ours(row[keep][None]).logits[0]) < 1e-4
    for same in (mask.bool(), mask.float(), mask.to(torch.int32)):
        assert torch.equal(ours(ids, attention_mask=same).logits, out.logits)
    everything = torch.ones_like(mask)
    assert torch.equal(ours(ids, everything).logits, ours(ids).logits)


@pytest.mark.parametrize("window", [None, SEQLEN, 300])
def test_padding_between_tokens_equals_transformers(window: int | None) -> None:
    """The tokens keep their positions, and the logits of a row without tokens are zeros."""
    ours, theirs = make_pair(sliding_window=window)
    ids, mask = random_ids(), torch.randint(2, (BATCH, SEQLEN))
    mask[0, [3, 4, 5, 11, 20]] = torch.tensor([1, 0, 0, 1, 1])
    mask[1] = 0
    kept = mask.bool()
    logits = ours(ids, mask).logits
    assert relative_error(logits[kept], theirs(ids, attention_mask=mask).logits[kept]) < 1e-4
    assert not logits[~kept].any()


def test_padding_between_tokens_of_a_row_wider_than_the_window_is_refused() -> None:
    ours, _ = make_pair(sliding_window=(None, 7))
    ids, mask = random_ids(2, 10), torch.ones(2, 10)
    mask[0, 8:], mask[1, 2:4] = 0, 0
    mask[1, 7:] = 0
    assert torch.isfinite(ours(ids, mask).logits).all()  # row 1 has 7 columns with tokens
    mask[1, 7] = 1
    message = (
        "attention_mask must have no zeros between the tokens of a row that spans more columns "
        "than the sliding window, 7, got 8 columns; pad before or after the tokens, or "
        f"{TRANSFORMERS}"
    )
    with pytest.raises(NotImplementedError) as error:
        ours(ids, mask)
    assert str(error.value) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (2, 65)])
def test_the_loss_is_that_of_transformers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The cases include a given divisor, no target, and int32 labels."""
    ours, theirs = make_pair(sliding_window=7, dtype=dtype)
    ids = random_ids(*shape)
    labels = ids.masked_fill(torch.rand(shape) < 0.3, -100)
    for divisor in (None, 7, torch.tensor(11)):
        out = ours(ids, labels=labels, num_items_in_batch=divisor)
        assert out.logits.dtype == dtype
        assert out.loss.dtype == torch.float32
        expected = theirs.loss_function(out.logits, labels, VOCAB, num_items_in_batch=divisor)
        torch.testing.assert_close(out.loss, expected, equal_nan=True)
        same = ours(ids.int(), labels=labels.int(), num_items_in_batch=divisor).loss
        assert torch.equal(same.nan_to_num(-1), out.loss.nan_to_num(-1))


def test_targets_of_padding_tokens_are_ignored() -> None:
    """Labels need -100 only in the first padding column after the tokens of a row."""
    ours, _ = make_pair()
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    loss = ours(ids, mask, labels=ids).loss
    columns = torch.cat([torch.arange(4, 8), torch.arange(8)])
    rows = torch.tensor([0] * 4 + [1] * 8)
    logits = ours(ids, mask).logits[rows, columns]
    expected = torch.nn.functional.cross_entropy(logits, ids[rows, columns + 1])
    assert relative_error(loss, expected) < 1e-4


def test_positions_that_count_up_by_one_change_nothing() -> None:
    ours, theirs = make_pair(sliding_window=7)
    ids, mask = random_ids(), padded("left")
    columns = torch.arange(SEQLEN)
    expected = ours(ids).logits
    for positions in (columns[None], columns.expand(BATCH, -1), (columns + 5)[None].int()):
        assert torch.equal(ours(ids, position_ids=positions).logits, expected)
        theirs_logits = theirs(ids, position_ids=positions).logits
        assert relative_error(expected, theirs_logits) < 1e-4
    # As generation and many data collators compute them.
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    logits = ours(ids, mask, positions).logits
    theirs_logits = theirs(ids, attention_mask=mask, position_ids=positions).logits
    assert relative_error(logits[mask.bool()], theirs_logits[mask.bool()]) < 1e-4
    for wrong in (torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[0, 2, 4, 6, 8]])):
        message = (
            f"position_ids must count up by one from column to column, got {wrong[0].tolist()}; "
            f"leave out position_ids, or {TRANSFORMERS}"
        )
        with pytest.raises(NotImplementedError) as error:
            ours(ids[:, :5], position_ids=wrong)
        assert str(error.value) == message
    for wrong, message in (
        (columns, "position_ids must be (4, 23) or (1, 23), got (23,)"),
        (columns[None, :-1], "position_ids must be (4, 23) or (1, 23), got (1, 22)"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            ours(ids, position_ids=wrong)
    with pytest.raises(TypeError, match=r"^position_ids must be a tensor, got list$"):
        ours(ids, position_ids=columns.tolist())


def test_logits_to_keep_selects_the_last_columns() -> None:
    ours, theirs = make_pair(sliding_window=7)
    ids, mask = random_ids(), padded("random")
    whole = ours(ids, mask).logits
    for count in (0, 1, 5, SEQLEN, SEQLEN + 4):
        logits = ours(ids, mask, logits_to_keep=count).logits
        assert logits.shape == theirs(ids, attention_mask=mask, logits_to_keep=count).logits.shape
        assert relative_error(logits, whole[:, -count:]) < 1e-4
        assert torch.equal(ours(ids, mask, num_logits_to_keep=count).logits, logits)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"input_ids": None}, TypeError, "input_ids must be a tensor, got NoneType"),
        ({"input_ids": [[1]]}, TypeError, "input_ids must be a tensor, got list"),
        (
            {"input_ids": torch.ones(1, 3)},
            TypeError,
            "input_ids must be int64 or int32, got torch.float32",
        ),
        (
            {"input_ids": torch.ones(3, dtype=torch.int64)},
            ValueError,
            "input_ids must be (batch, seqlen) and not empty, got (3,)",
        ),
        (
            {"input_ids": torch.tensor([[VOCAB]])},
            ValueError,
            f"input_ids must be in [0, {VOCAB}), the model's vocabulary, got {VOCAB}; check that "
            "the tokenizer belongs to the model",
        ),
        ({"attention_mask": [[1] * 5]}, TypeError, "attention_mask must be a tensor, got list"),
        (
            {"attention_mask": torch.ones(1, 5)},
            ValueError,
            "attention_mask must be (2, 5) like input_ids, got (1, 5)",
        ),
        (
            {"attention_mask": torch.ones(2, 1, 5, 5)},
            ValueError,
            f"attention_mask must be (2, 5) like input_ids, got (2, 1, 5, 5); {TRANSFORMERS}",
        ),
        (
            {"attention_mask": torch.full((2, 5), -1e9)},
            ValueError,
            "attention_mask must be 0 for padding and 1 for tokens, got -1000000000.0",
        ),
        (
            {"attention_mask": torch.zeros(2, 5)},
            ValueError,
            "attention_mask must be 1 for at least one token, got only zeros",
        ),
        ({"labels": [1]}, TypeError, "labels must be an int64 or int32 tensor, got list"),
        (
            {"labels": torch.ones(2, 5)},
            TypeError,
            "labels must be an int64 or int32 tensor, got torch.float32",
        ),
        (
            {"labels": torch.ones(2, 4, dtype=torch.int64)},
            ValueError,
            "labels must be (2, 5) like input_ids, got (2, 4)",
        ),
        (
            {"labels": torch.full((2, 5), VOCAB)},
            ValueError,
            f"labels must be in [0, {VOCAB}) or -100, got {VOCAB}",
        ),
        (
            {"labels": torch.ones(2, 5, dtype=torch.int64), "logits_to_keep": 2},
            ValueError,
            "logits_to_keep must be 0 with labels, got 2",
        ),
        ({"logits_to_keep": -1}, ValueError, "logits_to_keep must be >= 0, got -1"),
        (
            {"logits_to_keep": torch.arange(2)},
            TypeError,
            "logits_to_keep must be an integer >= 0, got Tensor",
        ),
        ({"mask": 1}, TypeError, "forward() got an unexpected argument 'mask'"),
        (
            {"past_key_values": ()},
            NotImplementedError,
            f"past_key_values must be None, got (){NO_CACHE}",
        ),
        ({"cache": ()}, NotImplementedError, f"cache must be None, got (){NO_CACHE}"),
        (
            {"output_attentions": True},
            NotImplementedError,
            f"output_attentions must be None or False, got True; {TRANSFORMERS}",
        ),
        (
            {"output_hidden_states": True},
            NotImplementedError,
            f"output_hidden_states must be None or False, got True; {TRANSFORMERS}",
        ),
        (
            {"inputs_embeds": 1},
            NotImplementedError,
            f"inputs_embeds must be None, got 1; give input_ids, or {TRANSFORMERS}",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_raise_one_line(given: Any, kind: type[Exception], message: str) -> None:
    ours, _ = make_pair()
    with pytest.raises(kind) as error:
        ours(**{"input_ids": random_ids(2, 5), **given})
    assert str(error.value) == message


def test_tokens_on_the_cpu_are_refused_by_a_model_on_another_device() -> None:
    model = make_pair()[0].to("meta")
    message = "input_ids must be on meta like the model, got cpu; move them with .to(model.device)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(random_ids())
    assert model(random_ids().to("meta")).logits.is_meta


def test_arguments_without_effect_are_accepted() -> None:
    ours, _ = make_pair()
    ids = random_ids(1, 5)
    for use_cache in (None, False, True):
        out = ours(
            ids,
            use_cache=use_cache,
            past_key_values=None,
            inputs_embeds=None,
            output_attentions=False,
            output_hidden_states=None,
            return_dict=True,
        )
        assert torch.equal(out.logits, ours(ids).logits)


def test_forward_compiles_into_one_graph_and_with_padding_into_several() -> None:
    ours, _ = make_pair(sliding_window=7)
    ids, mask = random_ids(), padded("left")
    labels = labels_of(ids, mask)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    out, expected = compiled(ids, labels=labels), ours(ids, labels=labels)
    for x, y in zip(gradients(ours, out), gradients(ours, expected), strict=True):
        assert relative_error(x, y) < 1e-4
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager")
    out, expected = compiled(ids, mask, labels=labels), ours(ids, mask, labels=labels)
    assert type(out) is type(expected)
    assert relative_error(out.logits, expected.logits) < 1e-4
    assert relative_error(out.loss, expected.loss) < 1e-4


def test_autocast_computes_in_its_dtype() -> None:
    """The losses and gradients are those of float32 within the rounding of bf16."""
    ours, theirs = make_pair(sliding_window=7)
    ids, mask = random_ids(), padded("right")
    expected = gradients(ours, ours(ids, mask, labels=ids))
    for checkpointing in (False, True):
        ours.model.checkpoint_activations = checkpointing
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(ids, mask, labels=ids)
            assert out.logits.dtype == theirs(ids, mask).logits.dtype == torch.bfloat16
        for x, y in zip(gradients(ours, out), expected, strict=True):
            assert x.dtype == torch.float32
            assert relative_error(x, y) < 0.1


def test_gradient_checkpointing_recomputes_layers_and_keeps_the_gradients() -> None:
    ours, _ = make_pair(sliding_window=7)
    ids, mask = random_ids(), padded("right")
    expected = gradients(ours, ours(ids, mask, labels=ids))
    calls = []
    ours.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert ours.is_gradient_checkpointing
    for x, y in zip(gradients(ours, ours(ids, mask, labels=ids)), expected, strict=True):
        assert torch.equal(x, y)
    assert len(calls) == 2
    ours.gradient_checkpointing_disable()
    gradients(ours, ours(ids, mask, labels=ids))
    assert len(calls) == 3
    message = r"^gradient_checkpointing_enable\(\) got an unexpected argument 'every'$"
    with pytest.raises(TypeError, match=message):
        ours.gradient_checkpointing_enable({"every": 2})
    ours.gradient_checkpointing_enable(every_n_layers=1, offload=False)
    message = r"^every_n_layers must be None or 1, got 2; leave it out: the input of every layer "
    with pytest.raises(NotImplementedError, match=message):
        ours.gradient_checkpointing_enable(every_n_layers=2)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_numbers_of_parameters_equal_transformers(tied: bool) -> None:
    ours, theirs = make_pair(tie_word_embeddings=tied)
    for model in (ours, theirs):
        model.model.norm.weight.requires_grad_(False)
    for only_trainable in (False, True):
        for exclude_embeddings in (False, True):
            options = {"only_trainable": only_trainable, "exclude_embeddings": exclude_embeddings}
            assert ours.num_parameters(**options) == theirs.num_parameters(**options)
    assert ours.get_input_embeddings() is ours.model.embed_tokens
    assert ours.get_output_embeddings() is ours.lm_head
