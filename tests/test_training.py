"""Training loop: each option of a recipe against its definition."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.backends import SetBackend
from support.small_checkpoints import SMALL, varied_model
from torch import Tensor

from mistral_kernels import MistralForCausalLM, MistralTokenizer
from mistral_kernels.training import loop as training
from mistral_kernels.training.corpus import Corpus, read_texts, train_tokenizer
from mistral_kernels.training.loop import Run, SingleProcess, held_out_loss, packed_loss
from mistral_kernels.training.on_texts import TINY
from mistral_kernels.training.recipe import Recipe

VOCAB = 300
CONFIG = dataclasses.replace(SMALL, vocab_size=VOCAB, tie_word_embeddings=True)
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "over",
    "to",
    "and",
    "mat",
    "hill",
    "small",
    "old",
    "one",
    "again",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a file of 60 paragraphs of 3 to 60 words each."""
    chosen = random.Random(0)
    paragraphs = [" ".join(chosen.choices(WORDS, k=chosen.randint(3, 60))) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def small_corpus(tmp_path: Path, text: str) -> Corpus:
    """Create a corpus with a vocabulary that is small enough for the text."""
    train_tokenizer(text, VOCAB, tmp_path / "tokenizer.model")
    return Corpus(text, tmp_path / "tokenizer.model")


@pytest.fixture(scope="module")
def corpus(text: Path) -> Corpus:
    return small_corpus(text.parent, read_texts([text])[0])


def gradients(model: MistralForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def test_gradients_equal_those_of_transformers(corpus: Corpus) -> None:
    """Compare gradients of the mean loss of unequal sequences, which transformers runs singly."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours = varied_model(dataclasses.replace(CONFIG, tie_word_embeddings=False))
    config = transformers.MistralConfig(**ours.config.to_hf("float32"), attn_implementation="eager")
    theirs = transformers.MistralForCausalLM(config)
    theirs.load_state_dict(ours.state_dict())
    sequences = [corpus.tokens[start : start + n] for start, n in ((0, 1), (9, 40), (60, 7))]
    total = sum(map(len, sequences))
    loss: Any = 0.0
    for targets in sequences:
        logits = theirs(corpus.with_bos(targets)[None]).logits[0]
        loss = loss + torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / total
    loss.backward()
    mine = packed_loss(ours, corpus, sequences)
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5)
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    expected = {name: weight.grad for name, weight in theirs.named_parameters()}
    compared = 0
    for name, grad in gradients(ours, mine).items():
        kind = name.split(".")[-2]
        names = [name.replace(kind, part) for part in fused.get(kind, (kind,))]
        parts = grad.split([len(expected[each]) for each in names])
        for each, part in zip(names, parts, strict=True):
            assert relative_error(part, expected[each]) < 1e-4, each
            compared += 1
    assert compared == len(expected) == 3 + 9 * CONFIG.num_hidden_layers


def test_the_loss_falls_and_the_best_weights_are_kept(tmp_path: Path) -> None:
    text = "the cat sat on the mat and the dog ran to the cat again.\n" * 40
    corpus = small_corpus(tmp_path, text)
    model = MistralForCausalLM(CONFIG).to(torch.bfloat16)
    held_out = corpus.encode("the dog sat on the cat.\n")
    before = held_out_loss(model, corpus, held_out)
    assert before == pytest.approx(math.log(VOCAB), abs=0.5), "a new model must predict uniformly"
    recipe = Recipe(
        steps=60, batch_size=4, seqlen=16, learning_rate=1e-2, warmup_steps=5, eval_every=10
    )
    log = io.StringIO()
    curve = training.train(Run(SingleProcess(model), recipe), corpus, held_out, log)
    assert [step for step, _, _ in curve] == [10, 20, 30, 40, 50, 60]
    losses = [loss for _, loss, _ in curve]
    assert losses[-1] < 0.5 * losses[0]
    best = min(loss for _, _, loss in curve)
    assert best < before - 1
    assert held_out_loss(model, corpus, held_out) == best
    assert log.getvalue().count("\n") == 6
    assert f"held-out {curve[-1][2]:.4f}" in log.getvalue()


def test_sequences_begin_with_paragraphs(tmp_path: Path) -> None:
    lines = [f"paragraph {word} is this" for word in ("one", "two", "three", "four", "five")]
    corpus = small_corpus(tmp_path, "\n".join(lines * 3) + "\n")
    starts = {tuple(corpus.encode(line + "\n")[:4].tolist()) for line in lines}
    sampled = corpus.sample(64, 4, torch.Generator().manual_seed(0))
    assert sampled.shape == (64, 4)
    assert {tuple(row) for row in sampled.tolist()} == starts
    inputs = corpus.with_bos(sampled)
    assert (inputs[:, 0] == 1).all()
    assert torch.equal(inputs[:, 1:], sampled[:, :-1])
    tokenizer = MistralTokenizer.from_pretrained(tmp_path / "tokenizer.model")
    joined = tokenizer.decode(corpus.tokens.tolist()).replace("\n ", "\n")
    assert joined == "\n".join(lines * 3) + "\n"


def test_learning_rate() -> None:
    recipe = Recipe(steps=1100, warmup_steps=100, learning_rate=0.5)
    for step, expected in ((0, 0.005), (49, 0.25), (99, 0.5), (100, 0.5), (600, 0.275)):
        assert recipe.learning_rate_at(step) == pytest.approx(expected)
    assert recipe.learning_rate_at(1100) == pytest.approx(0.05)
    rates = [recipe.learning_rate_at(step) for step in range(1100)]
    assert rates[:100] == sorted(rates[:100])
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert Recipe(steps=1, warmup_steps=0).learning_rate_at(0) == pytest.approx(2e-3)


def test_seqlen_longer_than_the_text(tmp_path: Path) -> None:
    corpus: Any = small_corpus(tmp_path, "a few words only, but a few of them.\n" * 8)
    with pytest.raises(ValueError, match=r"the text has \d+ tokens, too few for seqlen 1000"):
        corpus.sample(2, 1000, torch.Generator())


def test_packed_batches_are_whole_paragraphs(text: Path, corpus: Corpus) -> None:
    recipe = Recipe(batch_size=5, seqlen=40, pack=True)
    paragraphs = [tuple(corpus.encode(line).tolist()) for line in read_texts([text])[0].split("\n")]
    stretches = {p[i : i + 40] for p in paragraphs for i in range(0, len(p), 40)}
    assert any(len(p) > 40 for p in paragraphs)
    assert any(len(p) < 20 for p in paragraphs)
    seen = set()
    for batch in itertools.islice(corpus.batches(recipe, torch.Generator().manual_seed(0)), 100):
        assert sum(map(len, batch)) == 5 * 40
        *whole, last = [tuple(sequence.tolist()) for sequence in batch]
        assert stretches.issuperset(whole)
        assert any(stretch[: len(last)] == last for stretch in stretches)
        seen |= set(whole)
    assert seen == stretches, "all of the text must be used"


@pytest.mark.long
def test_packed_sequences_do_not_attend_to_each_other(
    corpus: Corpus, backend: str, device: torch.device
) -> None:
    model = varied_model(CONFIG).to(device)
    recipe = Recipe(batch_size=3, seqlen=40, pack=True)
    batch = next(corpus.batches(recipe, torch.Generator().manual_seed(1)))
    assert len({len(sequence) for sequence in batch}) > 1
    alone = [(packed_loss(model, corpus, [one]).item(), len(one)) for one in batch]
    expected = sum(loss * n for loss, n in alone) / 120
    assert packed_loss(model, corpus, batch).item() == pytest.approx(expected, rel=1e-5)


def test_accumulated_batches_equal_one_large_batch(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 batches of 2 sequences give the same loss and gradients as 1 batch of 6."""
    seen: list[list[Tensor]] = []
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda masters, _: (
            seen.append([master.grad.clone() for master in masters]) or torch.ones(())
        ),
    )
    model = varied_model(CONFIG)
    losses = []
    for batch_size, accumulate in ((6, 1), (2, 3)):
        recipe = Recipe(
            steps=1, batch_size=batch_size, seqlen=20, accumulate=accumulate, dtype="fp32"
        )
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        losses.append(
            training.train(
                Run(SingleProcess(model), recipe), corpus, corpus.tokens[:9], io.StringIO()
            )[0][1]
        )
        model.load_state_dict(weights)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, three in zip(*seen, strict=True):
        assert relative_error(three, one) < 1e-5


def test_accumulation_is_in_float32(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16, the sum of 64 gradients would have a relative error of about 0.5 %."""
    model = varied_model(CONFIG).to(torch.bfloat16)
    batch = list(corpus.tokens[:60].split(20))
    packed_loss(model, corpus, batch).backward()
    expected = [weight.grad.float() for weight in model.parameters()]
    model.zero_grad()
    seen: list[list[Tensor]] = []
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda masters, _: (
            seen.append([master.grad.clone() for master in masters]) or torch.ones(())
        ),
    )
    run = Run(SingleProcess(model), Recipe(accumulate=64))
    run.advance(corpus, itertools.repeat(batch))
    for mean, once in zip(seen[0], expected, strict=True):
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, once, rtol=1e-5, atol=0)


def loss_and_saved_bytes(
    model: MistralForCausalLM, corpus: Corpus, batch: list[Tensor]
) -> tuple[Tensor, int]:
    """Return the loss and the bytes that autograd saves for backward, each storage counted once."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = packed_loss(model, corpus, batch)
    return loss, sum(saved.values())


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointed_activations(
    corpus: Corpus, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    """Gradients are bitwise equal, and an additional layer saves at most its input."""
    batch = list(corpus.tokens[:200].split(45))
    saved: dict[tuple[bool, int], int] = {}
    for layers in (1, 3):
        model = varied_model(dataclasses.replace(CONFIG, num_hidden_layers=layers)).to(
            device, dtype
        )
        results = []
        for checkpoints in (False, True):
            model.model.checkpoint_activations = checkpoints
            loss, saved[checkpoints, layers] = loss_and_saved_bytes(model, corpus, batch)
            results.append(gradients(model, loss))
        for name, grad in results[0].items():
            assert torch.equal(results[1][name], grad), name
    per_layer = {key: (saved[key, 3] - saved[key, 1]) / 2 for key in (False, True)}
    weights = sum(w.nbytes for w in model.model.layers[0].parameters())
    inputs = 2 * 200 * CONFIG.hidden_size * dtype.itemsize  # delta and residual
    assert per_layer[True] <= inputs
    assert per_layer[False] - weights > 4 * per_layer[True]


def test_a_cache_is_written_once() -> None:
    """With gradients and checkpointing, too, a layer that writes to the cache is not recomputed."""
    model = varied_model(CONFIG)
    model.model.checkpoint_activations = True
    cache = model.new_cache(1, 20)
    logits = model.prefill([[1, 5, 7]], cache)
    before = [ring.clone() for ring in (*cache.keys, *cache.values)]
    logits.sum().backward()
    assert cache.host_lengths == [3]
    for ring, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(ring, old)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(corpus: Corpus) -> None:
    """Show a progress bar on a terminal only, with the lines of the evaluations above it."""
    recipe = Recipe(steps=3, batch_size=1, seqlen=8, eval_every=2)
    logs = io.StringIO(), Terminal()
    for log in logs:
        torch.manual_seed(0)
        training.train(
            Run(SingleProcess(MistralForCausalLM(CONFIG)), recipe), corpus, corpus.tokens[:9], log
        )
    plain, shown = (log.getvalue() for log in logs)
    lines = plain.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "2"], ["step", "3"]]
    assert "\r" not in plain
    assert "3/3" in shown
    assert "100%" in shown
    assert shown.count("tokens/s") > 2
    first, second = (line.rpartition("  ")[0] for line in lines)  # without the rate
    assert first in shown
    assert second in shown
    *_, bar = [piece for piece in shown.split("\r") if "3/3" in piece]
    assert "loss " in bar
    assert "tokens/s" in bar


def test_training_equals_a_plain_adamw_loop(corpus: Corpus) -> None:
    """A loop of PyTorch's own functions, in float32, gives the same curve and weights."""
    torch.manual_seed(0)
    ours = MistralForCausalLM(CONFIG)
    theirs = MistralForCausalLM(CONFIG)
    theirs.load_state_dict(ours.state_dict())
    recipe = Recipe(steps=12, batch_size=3, seqlen=20, warmup_steps=4, eval_every=1, dtype="fp32")
    held_out = corpus.tokens[:30]
    curve = training.train(Run(SingleProcess(ours), recipe), corpus, held_out, io.StringIO())

    generator = torch.Generator().manual_seed(0)
    matrices, vectors = ([w for w in theirs.parameters() if w.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.learning_rate_at(step) / 2e-3
    )

    def loss_of(targets: Tensor) -> Tensor:
        logits = theirs(corpus.with_bos(targets)).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, targets.flatten())

    for step, mean, held_out_mean in curve:
        optimizer.zero_grad()
        loss = loss_of(corpus.sample(3, 20, generator))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        assert mean == pytest.approx(loss.item(), rel=1e-4), step
        assert held_out_mean == pytest.approx(loss_of(held_out[None]).item(), rel=1e-4), step
    assert curve[-1][2] == min(point[2] for point in curve), "the last weights must be the best"
    for name, weight in ours.named_parameters():
        assert relative_error(weight.detach(), theirs.get_parameter(name).detach()) < 1e-3, name


@pytest.mark.slow
def test_kernels_train_like_the_torch_backend(
    corpus: Corpus,
    triton_runs: None,
    device: torch.device,
    set_backend: SetBackend,
) -> None:
    """Make 20 steps of the bundled model's recipe with small batches."""
    recipe = Recipe(steps=20, batch_size=2, seqlen=16, warmup_steps=5, eval_every=1)
    curves = {}
    for backend in ("torch", "triton"):
        set_backend(backend)
        torch.manual_seed(0)
        model = MistralForCausalLM(TINY).to(device, torch.bfloat16)
        curves[backend] = training.train(
            Run(SingleProcess(model), recipe), corpus, corpus.tokens[:5], io.StringIO()
        )
    for (step, *losses), (_, *others) in zip(curves["torch"], curves["triton"], strict=True):
        assert others == pytest.approx(losses, rel=5e-3), step  # 10 times the observed difference
    assert curves["triton"][-1][1] < curves["triton"][0][1] - 1
