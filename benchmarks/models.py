"""One model with the same random weights in each provider, behind one interface, `Engine`."""

from __future__ import annotations

import functools
import gc
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gguf_file import write_gguf
from benchmarks.make_checkpoint import CONFIGS, random_tensors
from mistral_kernels import MistralConfig, MistralForCausalLM
from mistral_kernels.checkpoint import save_hf
from mistral_kernels.checkpoint.names import expected_shapes
from mistral_kernels.model.cache import Packing
from mistral_kernels.model.engine import engine_for
from mistral_kernels.ops.cross_entropy import linear_cross_entropy

CHUNK = 512  # tokens per chunk of a prompt, for transformers and llama.cpp
Step = Callable[[Tensor], Tensor]


class Engine:
    """Model of one provider. Token ids are (batch, seqlen)."""

    def __init__(self, config: MistralConfig, dtype: torch.dtype, device: torch.device) -> None:
        raise NotImplementedError

    def prefill(self, ids: Tensor) -> Tensor:
        """Return logits (batch, vocab_size) after a prompt, written to a new cache."""
        raise NotImplementedError

    def decoder(self, ids: Tensor, steps: int) -> Step:
        """Return a function from tokens (batch,) to logits, for `steps` calls after `ids`."""
        raise NotImplementedError

    def loss(self, ids: Tensor) -> Tensor:
        """Return the loss of predicting every token except the first."""
        raise NotImplementedError


class Ours(Engine):
    quantize: str | None = None

    def __init__(self, config: MistralConfig, dtype: torch.dtype, device: torch.device) -> None:
        if device.type == "meta":
            with device:
                self.model = MistralForCausalLM(config).to(dtype)
            return
        with tempfile.TemporaryDirectory() as folder:
            stored = weights(config, dtype, device)
            save_hf(stored.items(), config, Path(folder, "model"), dtype=dtype)
            self.model = MistralForCausalLM.from_pretrained(
                Path(folder, "model"), device=device, quantize=self.quantize
            )

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        self.model.eval()
        return self.model.prefill(_lists(ids), self.model.new_cache(*ids.shape))

    @torch.inference_mode()
    def decoder(self, ids: Tensor, steps: int) -> Step:
        self.model.eval()
        cache = self.model.new_cache(ids.shape[0], ids.shape[1] + steps)
        self.model.prefill(_lists(ids), cache)
        engine = engine_for(self.model, cache)

        @torch.inference_mode()
        def step(tokens: Tensor) -> Tensor:
            logits = engine.step(tokens)
            return logits.clone() if tokens.is_cuda else logits  # a graph overwrites its logits

        return step

    def loss(self, ids: Tensor) -> Tensor:
        self.model.train()
        inputs, targets = ids[:, :-1], ids[:, 1:]
        seqlens = [inputs.shape[1]] * len(inputs)
        packing = Packing.of(seqlens, [0] * len(inputs), ids.device)
        hidden = self.model.model(inputs.flatten(), packing)
        return linear_cross_entropy(hidden, self.model.lm_head.weight, targets.flatten())


class OursInt8(Ours):
    """Our model with int8 weights, on a CPU."""

    quantize = "int8"

    def __init__(self, config: MistralConfig, dtype: torch.dtype, device: torch.device) -> None:
        if device.type != "cpu":
            raise NotImplementedError("int8 weights need a CPU")
        super().__init__(config, dtype, device)

    def loss(self, ids: Tensor) -> Tensor:
        raise NotImplementedError("has no backward pass")


def _lists(ids: Tensor) -> list[list[int]]:
    return torch.zeros_like(ids, device="cpu").tolist() if ids.is_meta else ids.tolist()


class Transformers(Engine):
    def __init__(
        self,
        config: MistralConfig,
        dtype: torch.dtype,
        device: torch.device,
        attention: str,
        patched: bool = False,
    ) -> None:
        import transformers

        if attention == "mistral_kernels":
            from mistral_kernels.integrations.transformers import register

            register()
        fields = config.to_hf(str(dtype).removeprefix("torch."))
        with device:
            self.model = transformers.MistralForCausalLM(
                transformers.MistralConfig(**fields, attn_implementation=attention)
            ).to(dtype)
        load(self.model, config, dtype, device)
        self.rolling = patched
        if patched:
            from mistral_kernels.integrations.transformers import apply_mistral_kernels

            apply_mistral_kernels(self.model)

    def _cache(self, ids: Tensor, steps: int) -> Any:
        if self.rolling:
            from mistral_kernels.integrations.transformers import RollingCache

            return RollingCache(self.model.config, max_length=ids.shape[1] + steps)
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        self.model.eval()
        cache = self._cache(ids, 0)
        return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[
            :, -1
        ]

    @torch.inference_mode()
    def decoder(self, ids: Tensor, steps: int) -> Step:
        self.model.eval()
        cache = self._cache(ids, steps)
        for chunk in ids.split(ids.shape[1] if ids.is_meta else CHUNK, dim=1):
            self.model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)

        @torch.inference_mode()
        def step(tokens: Tensor) -> Tensor:
            return self.model(tokens[:, None], past_key_values=cache, use_cache=True).logits[:, -1]

        return step

    def loss(self, ids: Tensor) -> Tensor:
        self.model.train()
        return self.model(ids, labels=ids, use_cache=False).loss


class LlamaCpp(Engine):
    """llama.cpp with our weights, through a GGUF file, as a Llama without a window."""

    def __init__(self, config: MistralConfig, dtype: torch.dtype, device: torch.device) -> None:
        import llama_cpp

        if device.type != "cpu":
            raise NotImplementedError("is measured on CPUs only")
        self.window, self.dtype = config.sliding_window, dtype
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            write_gguf(path, config, weights(config, dtype, device))
            self.model = llama_cpp.Llama(
                str(path),
                n_ctx=CHUNK,
                n_threads=torch.get_num_threads(),
                n_threads_batch=torch.get_num_threads(),
                use_mmap=False,
                verbose=False,
            )
        self.texts: LlamaCppTexts | None = None

    def prefill(self, ids: Tensor) -> Tensor:
        if self.texts is None or self.texts.batch != len(ids):
            self.texts = LlamaCppTexts(self.model, len(ids), self.window or 4096, self.dtype)
        self.texts.clear()
        return self.texts.append(ids)

    def decoder(self, ids: Tensor, steps: int) -> Step:
        self.prefill(ids)
        texts = self.texts
        assert texts is not None
        return lambda tokens: texts.append(tokens[:, None])

    def loss(self, ids: Tensor) -> Tensor:
        raise NotImplementedError("has no backward pass")


class LlamaCppTexts:
    """`batch` texts of equal length through the C API; the Python class has only one text."""

    def __init__(self, model: Any, batch: int, max_length: int, dtype: torch.dtype) -> None:
        import llama_cpp

        self.api, self.batch, self.max_length = llama_cpp, batch, max_length
        self.model = model  # must outlive the context
        self.vocab_size = model.n_vocab()
        parameters = model.context_params
        parameters.n_ctx, parameters.n_seq_max = batch * max_length, batch
        if dtype == torch.float32:  # the default is a float16 cache
            parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
        self.context = llama_cpp.llama_init_from_model(model._model.model, parameters)
        self.tokens = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        weakref.finalize(self, llama_cpp.llama_batch_free, self.tokens)
        weakref.finalize(self, llama_cpp.llama_free, self.context)
        self.length = 0

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        self.length = 0

    def append(self, ids: Tensor) -> Tensor:
        """Return logits (batch, vocab_size) after ids (batch, seqlen)."""
        if self.length + ids.shape[1] > self.max_length:
            raise NotImplementedError(
                f"has no sliding window; the text is longer than {self.max_length} tokens"
            )
        for chunk in ids.split(CHUNK // self.batch, dim=1):
            count, tokens = chunk.shape[1], self.tokens
            tokens.n_tokens = chunk.numel()
            for i, token in enumerate(chunk.flatten().tolist()):
                tokens.token[i], tokens.pos[i] = token, self.length + i % count
                tokens.n_seq_id[i], tokens.seq_id[i][0] = 1, i // count
                tokens.logits[i] = i % count == count - 1
            if failure := self.api.llama_decode(self.context, tokens):
                raise RuntimeError(f"llama_decode returned {failure}")
            self.length += count
        return torch.stack([self._logits(row * count + count - 1) for row in range(self.batch)])

    def _logits(self, token: int) -> Tensor:
        start = self.api.llama_get_logits_ith(self.context, token)
        return torch.tensor(start[: self.vocab_size])


@functools.lru_cache(maxsize=1)
def weights(config: MistralConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return dict(random_tensors(config, dtype, device=device))


def load(
    model: torch.nn.Module, config: MistralConfig, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type != "meta":
        model.load_state_dict(weights(config, dtype, device))


ENGINES: dict[str, Callable[..., Engine]] = {
    "ours": Ours,
    "ours int8": OursInt8,
    "transformers eager": functools.partial(Transformers, attention="eager"),
    "transformers sdpa": functools.partial(Transformers, attention="sdpa"),
    "transformers flash-attn 2": functools.partial(Transformers, attention="flash_attention_2"),
    "transformers with our attention": functools.partial(Transformers, attention="mistral_kernels"),
    "transformers with all of ours": functools.partial(
        Transformers, attention="mistral_kernels", patched=True
    ),
    "llama.cpp": LlamaCpp,
}


@functools.lru_cache(maxsize=len(ENGINES))
def engine(provider: str, model: str, dtype: torch.dtype, device: torch.device) -> Engine:
    config = CONFIGS[model]
    if device.type == "meta":  # two layers run the same code as all
        config = replace(config, num_hidden_layers=2)
    return ENGINES[provider](config, dtype, device)


def num_product_weights(model: str) -> int:
    """Count the weights that multiply a token: all except the embedding."""
    shapes = expected_shapes(CONFIGS[model])
    return sum(torch.Size(s).numel() for name, s in shapes.items() if "embed" not in name)


def release() -> None:
    engine.cache_clear()
    weights.cache_clear()
    gc.collect()


# Model for checks: small, otherwise like the large models. Texts are longer than its window.
SMALL = replace(
    CONFIGS["10M"],
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=16,
    sliding_window=16,
)


def check(
    provider: str, dtype: torch.dtype, device: torch.device, what: str, windowed: bool, batch: int
) -> None:
    """Raise unless logits or gradients match plain PyTorch in float32.

    `windowed`: whether the texts of the check are longer than the window.
    """
    config = SMALL if windowed else replace(SMALL, sliding_window=64)
    theirs = ENGINES[provider](config, dtype, device)
    exact = ENGINES["transformers eager"](config, torch.float32, device)
    exact.model.load_state_dict(  # type: ignore[attr-defined]
        {name: x.float() for name, x in weights(config, dtype, device).items()}
    )
    ids = torch.randint(config.vocab_size, (min(batch, 2), 41), device=device)
    results = []
    for model in (theirs, exact):
        if what == "loss":
            loss = model.loss(ids)
            loss.backward()
            embedding = model.model.model.embed_tokens  # type: ignore[attr-defined]
            results.append(torch.cat((loss.detach()[None], embedding.weight.grad.flatten())))
        else:
            prompt = model.prefill(ids[:, :30])
            step = model.decoder(ids[:, :30], 11)
            results.append(torch.stack((prompt, *(step(tokens) for tokens in ids[:, 30:].T))))
    error = (results[0].float() - results[1]).norm() / results[1].norm()
    if not error < (1e-4 if dtype == torch.float32 else 5e-2):
        raise AssertionError(f"relative error of {what} against float32 is {error:.2g}")
