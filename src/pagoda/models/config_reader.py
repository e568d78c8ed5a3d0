"""Typed reading of a checkpoint's config.json: every value is checked where it is taken, every key is accounted for."""

import math
from typing import Any

from pagoda.errors import ModelError
from pagoda.log import get_logger

log = get_logger(__name__)

_REQUIRED = object()
MAX_INTEGER = 2**31 - 1

HARMLESS_KEYS = frozenset(
    """
    _attn_implementation_autoset _commit_hash _from_model_config _name_or_path add_cross_attention architectures
    attention_dropout attn_config attn_dropout_prob attn_implementation auto_map bad_words_ids begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping emb_dropout_prob embd_pdrop encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    gradient_checkpointing id2label initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length
    max_window_layers min_length model_max_length model_type no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences onnx_safe output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type pruned_heads remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attn use_flash_attention_2 z_loss_weight
    max_z_loss hidden_act hidden_activation head_dim mlp_bias attention_bias bias softmax_in_fp32 fp16 bf16 fp32
    original_max_position_embeddings rope_theta partial_rotary_factor sliding_window use_sliding_window
    use_cache_quantization use_cache_kernel chat_format resid_dropout quantization_config layer_types
    """.split()  # noqa: SIM905
)
"""Keys that do not change the mathematics, or are read conditionally; any other unread key is reported once."""


class ConfigReader:
    """Takes values out of `config.json`, checks their type and range, remembers which keys were read."""

    def __init__(self, values: dict[str, Any]):
        self.values = values
        self.read: set[str] = set()

    def _take(self, key: str, default: Any) -> Any:
        self.read.add(key)
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ModelError(f"config.json lacks {key}: copy the checkpoint's complete config.json.")
            return default
        return value

    def refuse(self, key: str, rule: str) -> ModelError:
        """The error for a value that is out of range or not supported."""
        return ModelError(f"config.json says {key} = {self.values.get(key)!r}, but it must be {rule}.")

    def integer(self, key: str, default: Any = _REQUIRED, low: int = 1) -> int:
        value = self._take(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_INTEGER:
            raise self.refuse(key, f"a whole number from {low} to {MAX_INTEGER}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        """A finite number above 0."""
        value = self._take(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise self.refuse(key, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: Any = _REQUIRED) -> str:
        value = self._take(key, default)
        if value not in allowed:
            raise self.refuse(key, f"one of {', '.join(allowed)} (nothing else is implemented)")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or nothing."""
        value = self._take(key, [])
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.refuse(key, "a token id or a list of token ids")
        return tuple(i for i in ids if i >= 0)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._take(key, {})
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return value

    def finish(self) -> None:
        """Report keys that nobody read and the table of harmless ones does not know."""
        unknown = sorted(
            k for k, v in self.values.items() if k not in self.read | HARMLESS_KEYS and v not in (None, False, 0)
        )
        if unknown:
            log.warning("config.json has keys that Pagoda does not know and ignores: %s", ", ".join(unknown))
