"""`GenerationConfig`: settings of `generate`, with the names and the rules of transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mistral_kernels import checkpoint
from mistral_kernels.checkpoint.hf import GENERATION_FILE, read_generation_config
from mistral_kernels.model.config import MistralConfig
from mistral_kernels.model.pretrained_arguments import HUB_ARGUMENTS
from mistral_kernels.utils.files import CheckpointError, is_taken
from mistral_kernels.utils.unsupported import TRANSFORMERS, Unsupported, check_unsupported


class GenerationConfig:
    """Settings of `MistralForCausalLM.generate`; None: not set.

    `model.generation_config` holds the settings in the checkpoint's generation_config.json. The
    names of transformers' other settings are accepted as well, but `generate` raises an error if
    such a setting has an effect.

    Attributes:
        max_new_tokens: maximum number of new tokens per text, >= 0.
        max_length: maximum number of tokens, counted with the padded prompt, if `max_new_tokens`
            is not set. If neither is set, a text has up to 20 new tokens, within the model's
            `max_position_embeddings`.
        min_new_tokens: number of new tokens before which EOS tokens are forbidden.
        min_length: the same, counted with the padded prompt, if `min_new_tokens` is not set.
        max_time: time in seconds after which all texts end.
        stop_strings: a string, or a list of strings. A text ends with the token that completes one
            of the strings. The string is part of the text.
        do_sample: sample each token with the settings below. If it is not True, the most likely
            token is chosen, and `temperature`, `top_k`, `top_p` and `min_p` have no effect.
        temperature: divisor of the logits, above 0.
        top_k: number of most likely tokens to sample from; 0: all; not set: 50.
        top_p: sample from the smallest set of most likely tokens whose total probability is at
            least top_p, in (0, 1].
        min_p: sample from the tokens whose probability is at least min_p times the largest, in
            [0, 1].
        repetition_penalty: divide positive logits of tokens that are already in the prompt or the
            text by this factor, and multiply negative ones, in [1e-6, 1e6]. It is applied with and
            without `do_sample`. Padding is not counted.
        num_return_sequences: number of texts per prompt. The texts of a prompt are consecutive rows
            of the result. More than 1 requires `do_sample`.
        eos_token_id: token or tokens that end a text.
        pad_token_id: token after the end of a text in a tensor; not set: the first EOS token, or 0.
        bos_token_id: token that is the prompt of a call without a prompt.
        return_dict_in_generate: return a `GenerateOutput`.
        output_scores: add the scores of each step to the `GenerateOutput`.
        output_logits: add the logits of each step to the `GenerateOutput`.
        prefill_chunk_size: maximum number of tokens per prompt in one forward pass; not set: the
            largest sliding window, clamped to [512, 4096]. It affects memory, not the result.

    Raises:
        TypeError: a name is not a setting.

    Example:
        >>> from mistral_kernels import MistralForCausalLM
        >>> model = MistralForCausalLM.from_pretrained("tiny")
        >>> model.generation_config
        GenerationConfig(bos_token_id=1, eos_token_id=2)
        >>> model.generation_config.pad_token_id = model.generation_config.eos_token_id
        >>> model.generation_config.max_new_tokens = 3
        >>> model.generate([[1, 592]])
        [[1, 592, 307, 261, 573]]
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    max_time: float | None = None
    stop_strings: str | list[str] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_return_sequences: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    prefill_chunk_size: int | None = None

    def __init__(self, **settings: Any) -> None:
        for name, value in settings.items():
            if name not in _KNOWN:
                raise TypeError(f"GenerationConfig() got an unexpected argument {name!r}")
            setattr(self, name, value)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | Path, **settings: Any
    ) -> GenerationConfig:
        """Return the settings in the generation_config.json of a checkpoint.

        Args:
            pretrained_model_name: a folder, a Hugging Face hub id, or "tiny" for the bundled model.
                The checkpoint of a hub id is downloaded if it is not in the cache.
            **settings: settings that replace those of the file; also `revision`, `cache_dir`,
                `token`, `local_files_only` and `force_download`; see
                `MistralForCausalLM.from_pretrained`.

        Raises:
            CheckpointError: there is no such checkpoint, or its generation_config.json is missing
                or damaged.
            TypeError: a name is not a setting.

        Example:
            >>> from mistral_kernels import GenerationConfig
            >>> GenerationConfig.from_pretrained("tiny", max_new_tokens=9)
            GenerationConfig(bos_token_id=1, eos_token_id=2, max_new_tokens=9)
        """
        hub = {name: settings.pop(name) for name in HUB_ARGUMENTS if name in settings}
        folder = checkpoint.resolve(pretrained_model_name, **hub)
        if not is_taken(folder / GENERATION_FILE):
            raise CheckpointError(
                f"no such file: {folder / GENERATION_FILE}; make a GenerationConfig(...) instead"
            )
        contents = read_generation_config(folder)
        known = {n: v for n, v in contents.items() if n in _KNOWN - IGNORED and v is not None}
        return cls(**{**known, **settings})

    @classmethod
    def from_model_config(
        cls, config: MistralConfig, contents: Mapping[str, Any] | None = None
    ) -> GenerationConfig:
        """Return the settings of a model.

        Args:
            config: the model's configuration, which determines the BOS and EOS tokens.
            contents: contents of generation_config.json. Unknown names are ignored.
        """
        settings = {n: v for n, v in (contents or {}).items() if n in _KNOWN - IGNORED}
        eos = config.eos_token_id
        settings["bos_token_id"] = config.bos_token_id
        settings["eos_token_id"] = list(eos) if isinstance(eos, tuple) else eos
        return cls(**settings)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"GenerationConfig({settings})"

    def to_dict(self) -> dict[str, Any]:
        """Return the names and values of the settings that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


def _processor(name: str) -> str:
    return f"pass logits_processor=[transformers.{name}(...)]"


_FLAG = Unsupported((None, False))
_CACHE = Unsupported(remedy="call stream with cache=model.new_cache(...)")
_NAMES = ("dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window")

# Arguments that `generate` does not offer. Their other values would change the result.
UNSUPPORTED = {
    "num_beams": Unsupported((None, 1)),
    "penalty_alpha": Unsupported((None, 0.0, 0)),
    "dola_layers": Unsupported(),
    "constraints": Unsupported(),
    "force_words_ids": Unsupported(),
    "assistant_model": Unsupported(),
    "assistant_tokenizer": Unsupported(),
    "assistant_early_exit": Unsupported(),
    "prompt_lookup_num_tokens": Unsupported(),
    "speculation_type": Unsupported(),
    "use_mtp": _FLAG,
    "custom_generate": Unsupported(),
    "synced_gpus": _FLAG,
    "no_repeat_ngram_size": Unsupported((None, 0), _processor("NoRepeatNGramLogitsProcessor")),
    "bad_words_ids": Unsupported(remedy=_processor("NoBadWordsLogitsProcessor")),
    "suppress_tokens": Unsupported(remedy=_processor("SuppressTokensLogitsProcessor")),
    "begin_suppress_tokens": Unsupported(remedy=_processor("SuppressTokensAtBeginLogitsProcessor")),
    "sequence_bias": Unsupported(remedy=_processor("SequenceBiasLogitsProcessor")),
    "forced_bos_token_id": Unsupported(remedy=_processor("ForcedBOSTokenLogitsProcessor")),
    "forced_eos_token_id": Unsupported(remedy=_processor("ForcedEOSTokenLogitsProcessor")),
    "exponential_decay_length_penalty": Unsupported(
        remedy=_processor("ExponentialDecayLengthPenalty")
    ),
    "prefix_allowed_tokens_fn": Unsupported(remedy=_processor("PrefixConstrainedLogitsProcessor")),
    "encoder_repetition_penalty": Unsupported(
        (None, 1.0, 1), _processor("EncoderRepetitionPenaltyLogitsProcessor")
    ),
    "encoder_no_repeat_ngram_size": Unsupported(
        (None, 0), _processor("EncoderNoRepeatNGramLogitsProcessor")
    ),
    "typical_p": Unsupported((None, 1.0, 1)),
    "epsilon_cutoff": Unsupported((None, 0.0, 0)),
    "eta_cutoff": Unsupported((None, 0.0, 0)),
    "top_h": Unsupported(),
    "guidance_scale": Unsupported((None, 1.0, 1)),
    "negative_prompt_ids": Unsupported(),
    "negative_prompt_attention_mask": Unsupported(),
    "watermarking_config": Unsupported(),
    "renormalize_logits": _FLAG,
    "remove_invalid_values": _FLAG,
    "token_healing": _FLAG,
    "output_attentions": _FLAG,
    "output_hidden_states": _FLAG,
    "cache_implementation": Unsupported((None, *_NAMES)),
    "past_key_values": _CACHE,
    "cache": _CACHE,
    "inputs_embeds": Unsupported(remedy=f"give input_ids, or {TRANSFORMERS}"),
    "position_ids": Unsupported(remedy="give attention_mask, from which the positions follow"),
    "token_type_ids": Unsupported(remedy="leave it out: Mistral has no token types"),
}

# Arguments without effect on the result here: settings of strategies that are refused above, of the
# cache, of compilation and of encoders, and the metadata of a generation_config.json.
IGNORED = frozenset(
    (
        *("use_cache", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
        *("trust_remote_code", "early_stopping", "length_penalty", "diversity_penalty"),
        *("num_beam_groups", "low_memory", "is_assistant", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
        *("max_matching_ngram_size", "decoder_start_token_id", "continuous_batching_config"),
        *("transformers_version", "_from_model_config"),
    )
)
_SAMPLING_ONLY = frozenset(("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"))
_GREEDY_ONLY = frozenset(("penalty_alpha",))

_SETTINGS = frozenset(GenerationConfig.__annotations__)
_KNOWN = _SETTINGS | UNSUPPORTED.keys() | IGNORED

_DEFAULTS = {"top_k": 50}  # values of settings that are not set anywhere
_OFF = {  # values of settings that are None after that
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "num_return_sequences": 1,
}


def resolve(
    defaults: Any, generation_config: Any, arguments: Mapping[str, Any]
) -> GenerationConfig:
    """Return the settings of one call from its arguments, its configuration and the model's.

    As in transformers, a value that is not set in `generation_config` is that of `defaults`, and an
    argument replaces both, even if it is None.

    Args:
        defaults: the model's `generation_config`: a `GenerationConfig` of this package or of
            transformers, or a dict.
        generation_config: the argument `generation_config` of the call, of the same types; None:
            not given.
        arguments: the other keyword arguments of `generate`.

    Raises:
        TypeError: an argument is unknown, `do_sample` is not a bool, or a configuration has another
            type.
        NotImplementedError: a setting that is not offered has an effect.
    """
    settings: dict[str, Any] = dict(_DEFAULTS)
    settings |= settings_of("model.generation_config", defaults)
    settings |= settings_of("generation_config", generation_config)
    # Configurations may have further entries of their own. Unknown arguments are errors.
    settings = {name: value for name, value in settings.items() if name in _KNOWN}
    settings |= arguments
    do_sample = settings.get("do_sample")
    if not isinstance(do_sample, (bool, type(None))):
        raise TypeError(f"do_sample must be True or False, got {type(do_sample).__name__}")
    unused = IGNORED | (_GREEDY_ONLY if do_sample else _SAMPLING_ONLY)
    others = {name: settings[name] for name in settings if name not in _SETTINGS | unused}
    check_unsupported("generate", others, UNSUPPORTED)
    resolved = GenerationConfig(**{n: v for n, v in settings.items() if n in _SETTINGS})
    for name, value in _OFF.items():
        if getattr(resolved, name) is None:
            setattr(resolved, name, value)
    return resolved


def settings_of(name: str, config: Any) -> dict[str, Any]:
    """Return the settings of a configuration that are set.

    Args:
        name: name of the configuration, for messages.
        config: a `GenerationConfig` of this package or of transformers, or a dict; None: no
            settings.

    Raises:
        TypeError: `config` has another type.
    """
    if config is None:
        return {}
    # In transformers 4, `to_dict` also returns the defaults of settings that are not set.
    to_dict = getattr(config, "to_diff_dict", None) or getattr(config, "to_dict", None)
    if not isinstance(config, Mapping) and to_dict is None:
        raise TypeError(f"{name} must be a GenerationConfig or a dict, got {type(config).__name__}")
    settings: Iterable[tuple[str, Any]] = (config if to_dict is None else to_dict()).items()
    return {key: value for key, value in settings if value is not None}
