"""The C++ step's tables as ctypes structures, and the handle of one engine's scratch memory.

Every structure mirrors the one of the same name in step.h and attention.h, field by field.
"""

import ctypes
import weakref

from pagoda.kernels.cpu.pack import WeightStruct

_I32, _F32, _PTR = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class CacheStruct(ctypes.Structure):
    _fields_ = [(name, _PTR) for name in ("k", "v", "k_scale", "v_scale", "k_zero", "v_zero")]


class ShapeStruct(ctypes.Structure):
    _fields_ = [(name, _I32) for name in ("kind", "heads", "kv_heads", "dim", "width", "block_len")]
    _fields_ += [("scale", _F32), ("softcap", _F32)]


class LayerStruct(ctypes.Structure):
    _fields_ = [(name, WeightStruct) for name in ("qkv", "o", "gate_up", "down")]
    _fields_ += [
        (name, _PTR) for name in ("attention_norm", "q_norm", "k_norm", "attention_post", "ffn_norm", "ffn_post")
    ]
    _fields_ += [("cache", CacheStruct), ("window", ctypes.c_int64)]


class ModelStruct(ctypes.Structure):
    _fields_ = [
        (name, _I32)
        for name in (
            "layers", "hidden", "ffn", "vocab", "rotary_pairs", "num_blocks", "gelu", "embed_kind", "embed_blocks"
        )
    ]  # fmt: skip
    _fields_ += [(name, _F32) for name in ("eps", "embed_scale", "final_softcap")]
    _fields_ += [("shape", ShapeStruct), ("embed", _PTR), ("norm", _PTR), ("layer", _PTR), ("head", WeightStruct)]


class StepStruct(ctypes.Structure):
    _fields_ = [(name, _I32) for name in ("tokens", "sequences", "logit_rows", "table_width", "threads")]
    _fields_ += [
        (name, _PTR)
        for name in (
            "token", "slot", "logit_row", "cos", "sin", "q_scale", "query_start", "kv_len", "block_table", "logits"
        )
    ]  # fmt: skip


RULES = {
    1: "a token id is outside the vocabulary",
    2: "a slot is outside the cache",
    3: "the rows' token counts do not fit together",
    4: "a block table is too short or names a block outside the cache",
    5: "a logit row is not a token of the step",
}


class StepContext:
    """One engine's scratch memory and barrier; steps of one context must not overlap. Freed with the object."""

    def __init__(self, library: ctypes.CDLL):
        self._step = library.pagoda_step
        self._step.argtypes = [_PTR, _PTR, _PTR]
        self._step.restype = ctypes.c_int
        library.pagoda_context.restype = _PTR
        library.pagoda_context_free.argtypes = [_PTR]
        self._handle = library.pagoda_context()
        if not self._handle:
            raise MemoryError("no memory for the step's context")
        weakref.finalize(self, library.pagoda_context_free, self._handle)

    def run(self, model: ModelStruct, step: StepStruct) -> None:
        """One step; logits and cache are written when it returns. MemoryError when its scratch does not fit."""
        code = self._step(self._handle, ctypes.addressof(model), ctypes.addressof(step))
        if code < 0:
            raise MemoryError("no memory for the step's intermediate results: lower max_prefill_token_num")
        assert code == 0, RULES[code]
