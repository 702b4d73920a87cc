"""`CausalLMOutput`: result of the forward pass of a language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import register_pytree_node


class CausalLMOutput(dict[str, Tensor]):
    """Logits and, if labels were given, the loss: by attribute, by key or by index.

    The interface is that of transformers' `CausalLMOutputWithPast`: a dict without the entries that
    are None, whose values can also be indexed and sliced like those of a tuple. It is a pytree.

    Attributes:
        loss: float32 scalar, in nats; None: no labels were given.
        logits: (batch, seqlen, vocab_size), in the model's dtype.
        hidden_states: always None.
        attentions: always None.

    Example:
        >>> import torch
        >>> from mistral_kernels.model.outputs import CausalLMOutput
        >>> out = CausalLMOutput(loss=torch.tensor(0.5), logits=torch.zeros(1, 3, 64))
        >>> out.logits is out["logits"] is out[1], list(out)
        (True, ['loss', 'logits'])
        >>> loss, logits = out.to_tuple()
    """

    hidden_states = None
    attentions = None

    @property
    def loss(self) -> Tensor | None:
        """Cross entropy in nats, as `forward` defines it; None: no labels were given."""
        return self.get("loss")

    @property
    def logits(self) -> Tensor:
        """Logits after each token, (batch, seqlen, vocab_size)."""
        logits: Tensor = self["logits"]
        return logits

    @property
    def past_key_values(self) -> None:
        """Raise an AttributeError.

        A decoding loop that passed None to the next step would lose the earlier tokens.
        """
        raise AttributeError(
            "past_key_values must not be read, because forward keeps no cache; call generate, or "
            "prefill and decode with the model's new_cache"
        )

    def __getitem__(self, key: Any) -> Any:
        """Return the value of a key, or the values at an index or a slice."""
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Tensor, ...]:
        """Return the values: (loss, logits), or (logits,) without labels."""
        return tuple(self.values())


# FSDP finds the tensors of a module's output only if the output is a pytree.
register_pytree_node(
    CausalLMOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: CausalLMOutput(zip(keys, values, strict=True)),
)
