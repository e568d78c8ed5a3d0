"""llama.cpp's side of `benchmarks/cpu.py`: run by a Python that has llama-cpp-python and gguf.

Writes a GGUF file of random weights for a `config.json` (once), loads it, then answers lines of standard input,
`decode BATCH TOKENS` or `prefill TOKENS`, with tokens a second on standard output.
"""

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

FORMATS = {  # weights of the layers, weights of the head
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.GGMLQuantizationType.BF16),
    "int8": (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q8_0),
    "int4": (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0),
}


def write_model(config: dict, form: str, path: Path) -> None:
    arch = config["model_type"]
    layers_type, head_type = FORMATS[form]
    writer = gguf.GGUFWriter(path, arch)
    C, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    D = C // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(C)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(F)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(D)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)

    def matrix(name: str, n: int, k: int, kind: gguf.GGMLQuantizationType) -> None:
        small = rng.standard_normal((min(n, 1024), k), dtype=np.float32) * 0.02
        w = np.concatenate([small] * (-(-n // len(small))))[:n]
        writer.add_tensor(name, gguf.quants.quantize(w, kind), raw_dtype=kind)

    def vector(name: str, n: int) -> None:
        writer.add_tensor(name, np.ones(n, dtype=np.float32))

    matrix("token_embd.weight", V, C, head_type)
    vector("output_norm.weight", C)
    if not config["tie_word_embeddings"]:
        matrix("output.weight", V, C, head_type)
    for i in range(config["num_hidden_layers"]):
        for name, n, k in (("attn_q", C, C), ("attn_k", kv * D, C), ("attn_v", kv * D, C), ("attn_output", C, C),
                           ("ffn_gate", F, C), ("ffn_up", F, C), ("ffn_down", C, F)):  # fmt: skip
            matrix(f"blk.{i}.{name}.weight", n, k, layers_type)
            if arch == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                vector(f"blk.{i}.{name}.bias", n)
        vector(f"blk.{i}.attn_norm.weight", C)
        vector(f"blk.{i}.ffn_norm.weight", C)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Peer:
    """One loaded model with a context for 16 sequences."""

    def __init__(self, path: Path, threads: int):
        llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        assert model, f"llama.cpp cannot load {path}"
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 4096, 512, 512, 16
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self.context = llama_cpp.llama_init_from_model(model, params)
        assert self.context, "llama.cpp cannot make a context"
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def step(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, wants logits)"""
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = token, position, 1, sequence, wanted
        assert llama_cpp.llama_decode(self.context, b) == 0
        llama_cpp.llama_get_logits_ith(self.context, len(rows) - 1)  # waits for the result

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def prefill(self, tokens: int) -> float:
        self.clear()
        started = time.perf_counter()
        self.step([(i % 9973 + 3, i, 0, i == tokens - 1) for i in range(tokens)])
        return tokens / (time.perf_counter() - started)

    def decode(self, batch: int, tokens: int, prompt: int = 16) -> float:
        self.clear()
        for s in range(batch):
            self.step([(i + 3 + s, i, s, i == prompt - 1) for i in range(prompt)])
        started = time.perf_counter()
        for t in range(tokens):
            self.step([(t + 5 + s, prompt + t, s, True) for s in range(batch)])
        return batch * tokens / (time.perf_counter() - started)


@llama_cpp.llama_log_callback
def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("file", type=Path)
    parser.add_argument("threads", type=int)
    args = parser.parse_args()
    if not args.file.exists():
        part = args.file.with_suffix(".part")
        write_model(json.loads(args.config.read_text()), args.format, part)
        part.rename(args.file)
    peer = Peer(args.file, args.threads)
    print(f"llama-cpp-python {llama_cpp.__version__}", flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        print({"decode": peer.decode, "prefill": peer.prefill}[what](*map(int, numbers)), flush=True)


if __name__ == "__main__":
    main()
