"""Fine-tuning of the bundled model with transformers' Trainer: patching keeps the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mistral_kernels
from mistral_kernels import MistralTokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from mistral_kernels.integrations.patch_handle import PARTS  # noqa: E402
from mistral_kernels.integrations.patching import apply_mistral_kernels  # noqa: E402

TINY = Path(mistral_kernels.__file__).parent / "tiny"
SEQLEN = 160  # longer than the window, 128


def pages() -> list[dict[str, list[int]]]:
    text = (TINY / "held_out.txt").read_text(encoding="utf-8")
    ids = MistralTokenizer.from_pretrained("tiny").encode(text)
    starts = range(0, len(ids) - SEQLEN, SEQLEN)
    rows = [ids[start : start + SEQLEN] for start in starts]
    return [
        {"input_ids": row, "labels": [-100] * (i % 9) + row[i % 9 :]} for i, row in enumerate(rows)
    ]


def fine_tune(folder: Path, steps: int, patched: bool, **options: Any) -> list[float]:
    """Return the loss of every step."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="eager"
    )
    if patched:
        assert set(apply_mistral_kernels(model).changed) == set(PARTS)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=3e-4,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=7,
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=pages())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == steps
    return losses


@pytest.mark.slow
def test_fifty_steps(tmp_path: Path) -> None:
    expected = fine_tune(tmp_path, 50, patched=False)
    actual = fine_tune(tmp_path, 50, patched=True)
    assert actual == pytest.approx(expected, rel=1e-3)
    assert sum(actual[-10:]) < sum(actual[:10]) - 2, "the loss does not fall"


@pytest.mark.slow
def test_bfloat16_and_checkpointing(tmp_path: Path) -> None:
    options = {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    expected = fine_tune(tmp_path, 3, patched=False, gradient_accumulation_steps=2)
    assert fine_tune(tmp_path, 3, patched=True, **options) == pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
def test_compiled_in_one_graph(tmp_path: Path) -> None:
    expected = fine_tune(tmp_path, 4, patched=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    actual = fine_tune(tmp_path, 4, patched=True, **options)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    assert actual == pytest.approx(expected, rel=1e-3)
