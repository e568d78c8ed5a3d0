// Whole steps of small models of every weight and cache format, for the address and undefined behaviour sanitizers:
// every buffer is its own allocation of exactly the documented size. With an argument it prints the logits too, a line
// for each pair of formats, to compare one machine with another.
#include <cstdio>
#include <memory>
#include <random>
#include "step.cpp"

struct Memory {  // owns what the tables point to; 64 bytes aligned, nothing to spare
  std::vector<std::unique_ptr<uint8_t, void (*)(void*)>> held;
  std::mt19937 random{1};
  template <class T> T* make(size_t n) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, n * sizeof(T) + (n == 0))) abort();
    memset(p, 0, n * sizeof(T));
    held.emplace_back((uint8_t*)p, free);
    return (T*)p;
  }
  float* floats(size_t n, float size) {
    float* p = make<float>(n);
    std::normal_distribution<float> normal(0, size);
    for (size_t i = 0; i < n; i++) p[i] = normal(random);
    return p;
  }
  Weight weight(int kind, int rows, int in, bool extras) {
    Weight w{};
    w.kind = kind; w.rows = round16(rows); w.in = in; w.unit = 1.f / 1024;
    w.group = kind == W8 || kind == W4 ? 32 : 0;
    w.cols = w.group ? (in + 31) / 32 * 32 : round16(in);
    const size_t bytes = block_bytes(w) * (w.rows / 16), scales = (size_t)num_groups(w) * w.rows;
    uint8_t* q = make<uint8_t>(bytes);
    for (size_t i = 0; i < bytes; i++) q[i] = (uint8_t)random();
    if (kind == F32) w.q = (uint8_t*)floats(bytes / 4, 0.1f);
    else w.q = q;
    if (kind == F16 || kind == BF16)
      for (size_t i = 0; i < bytes / 2; i++) {
        const float v = (float)((int)(random() % 200) - 100) / 500;
        ((uint16_t*)q)[i] = kind == F16 ? float_f16(v) : float_bf16(v);
      }
    uint16_t* s = make<uint16_t>(scales);
    for (size_t i = 0; i < scales; i++) s[i] = float_f16(1.f);
    w.scales = s;
    if (kind == W4 && extras) w.zeros = make<uint8_t>(scales);
    if (extras) w.bias = floats(w.rows, 0.1f);
    if (kind == W4 && extras) {
      int32_t* perm = make<int32_t>(w.cols);
      for (int k = 0; k < w.cols; k++) perm[k] = k < in ? in - 1 - k : in;
      w.perm = perm;
    }
    return w;
  }
};

static int run(int kind, int cache_kind, bool fixed, int threads, bool extras, bool print) {
  const int hidden = 40, ffn = 52, vocab = 35, heads = 6, kv = 2, dim = 24, width = 32, blocks = 48, layers = 2, len = 32;
  Memory mem;
  std::vector<Layer> layer(layers);
  const size_t tokens_kept = (size_t)blocks * len * kv;
  for (Layer& l : layer) {
    l = {};
    l.qkv = mem.weight(kind, (heads + 2 * kv) * dim, hidden, extras); l.o = mem.weight(kind, hidden, heads * dim, extras);
    l.gate_up = mem.weight(kind, 2 * round16(ffn), hidden, extras); l.down = mem.weight(kind, hidden, ffn, extras);
    l.attention_norm = mem.floats(hidden, 1); l.ffn_norm = mem.floats(hidden, 1);
    if (extras) {
      l.q_norm = mem.floats(dim, 1); l.k_norm = mem.floats(dim, 1);
      l.attention_post = mem.floats(hidden, 1); l.ffn_post = mem.floats(hidden, 1);
      l.window = 17;
    }
    const size_t bytes = tokens_kept * width * kv_element(cache_kind);
    l.cache = {mem.make<uint8_t>(bytes), mem.make<uint8_t>(bytes)};
    const size_t scales = fixed ? kv * UNIT : tokens_kept;
    if (cache_kind == I8) { l.cache.k_scale = mem.make<float>(scales); l.cache.v_scale = mem.make<float>(scales); }
    if (!fixed) continue;
    for (size_t i = 0; i < scales; i++) l.cache.k_scale[i] = l.cache.v_scale[i] = 1.f / 64;
    l.cache.k_zero = mem.floats(kv, 1); l.cache.v_zero = mem.floats(kv, 1);
  }
  Model m{};
  m.layers = layers; m.hidden = hidden; m.ffn = ffn; m.vocab = vocab; m.rotary_pairs = dim / 2; m.num_blocks = blocks;
  m.gelu = extras; m.embed_kind = F32; m.eps = 1e-5f; m.embed_scale = 1; m.final_softcap = extras ? 5.f : 0.f;
  m.shape = {cache_kind, heads, kv, dim, width, len, 0.2f, extras ? 5.f : 0.f};
  m.embed = (uint8_t*)mem.floats((size_t)vocab * hidden, 1); m.norm = mem.floats(hidden, 1);
  m.layer = layer.data(); m.head = mem.weight(kind == F32 ? F32 : W8, vocab, hidden, false);

  Context* context = pagoda_context();
  int bad = 0;
  const int plans[][2][2] = {{{0, 21}, {0, 1}}, {{21, 1}, {1, 9}}, {{22, 500}, {10, 1}}, {{522, 130}, {11, 1}}, {{652, 1}, {12, 1}}};
  for (auto& rows : plans) {
    const int n = rows[0][1] + rows[1][1], table = 22;
    Memory args;
    int64_t *token = args.make<int64_t>(n), *slot = args.make<int64_t>(n), *last = args.make<int64_t>(2);
    int32_t *start = args.make<int32_t>(3), *kv_len = args.make<int32_t>(2), *blocks_of = args.make<int32_t>(2 * table);
    for (int b = 0; b < 2 * table; b++) blocks_of[b] = (b * 7) % 44 + 1;
    for (int r = 0, i = 0; r < 2; r++) {
      for (int p = rows[r][0]; p < rows[r][0] + rows[r][1]; p++, i++) {
        token[i] = (p * 31 + r) % vocab;
        slot[i] = (int64_t)blocks_of[r * table + p / len] * len + p % len;
      }
      start[r + 1] = i; last[r] = i - 1; kv_len[r] = rows[r][0] + rows[r][1];
    }
    Step s{};
    s.tokens = n; s.sequences = 2; s.logit_rows = 2; s.table_width = table; s.threads = threads;
    s.token = token; s.slot = slot; s.logit_row = last; s.query_start = start; s.kv_len = kv_len; s.block_table = blocks_of;
    s.cos = args.floats((size_t)n * dim / 2, 1); s.sin = args.floats((size_t)n * dim / 2, 1);
    s.q_scale = extras ? args.floats(n, 1) : nullptr;
    s.logits = args.make<float>(2 * vocab);
    bad += pagoda_step(context, &m, &s) != 0;
    for (int i = 0; i < 2 * vocab; i++) bad += !std::isfinite(s.logits[i]);
    for (int i = 0; print && i < 2 * vocab; i++) printf("%.9g ", s.logits[i]);
  }
  pagoda_context_free(context);
  return bad;
}

int main(int argc, char**) {
  int bad = 0;
  for (int kind : {F32, F16, BF16, W8, W4})
    for (int cache : std::initializer_list<int>{F32, F16, BF16, I8, -I8}) {  // -I8: with calibrated ranges
      if (argc > 1) printf("%d %d: ", kind, cache);
      bad += run(kind, abs(cache), cache < 0, kind % 2 + 1, cache % 2, argc > 1);
      if (argc > 1) printf("\n");
    }
  printf("%d wrong\n", bad);
  return bad != 0;
}
