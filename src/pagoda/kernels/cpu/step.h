// The tables that describe a model and a step (plain C, filled by step_table.py), the context that owns the scratch
// memory, and what all threads of one step share.
#pragma once
#include <cstdlib>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include "attention.h"
#include "barrier.h"
#include "linear.h"

struct Layer {
  Weight qkv, o, gate_up, down;
  const float *attention_norm, *q_norm, *k_norm, *attention_post, *ffn_norm, *ffn_post;  // null where there is none
  Cache cache;
  int64_t window;  // keys a query sees, itself included; 0: all
};
struct Model {
  int32_t layers, hidden, ffn, vocab, rotary_pairs, num_blocks, gelu, embed_kind, embed_blocks;
  float eps, embed_scale, final_softcap;
  Shape shape;
  const uint8_t* embed;  // [vocab][hidden], or with embed_blocks the head's own blocks of 16 rows
  const float* norm;
  const Layer* layer;
  Weight head;
};
struct Step {  // the engine's StepInput
  int32_t tokens, sequences, logit_rows, table_width, threads;
  const int64_t *token, *slot, *logit_row;
  const float *cos, *sin, *q_scale;  // [tokens][rotary_pairs] twice, [tokens] or null
  const int32_t *query_start, *kv_len, *block_table;
  float* logits;  // [logit_rows][vocab]
};

constexpr int SPLIT = 512;  // keys after which a softmax starts anew; long sequences are shared among threads so
static inline int round16(int n) { return (n + 15) / 16 * 16; }
static inline int least(int a, int b) { return a < b ? a : b; }
static inline int most(int a, int b) { return a > b ? a : b; }

struct Job { int seq, token, count, from, to, part; };   // queries token .. + count; part < 0: writes the result itself
struct Merge { int token, count, part, parts; };
struct Context {
  Barrier barrier;
  uint8_t* memory = nullptr;
  size_t size = 0;
  std::vector<Job> jobs;
  std::vector<Merge> merges;
  ~Context() { free(memory); }
  uint8_t* reserve(size_t bytes) {
    if (bytes > size) {
      free(memory);
      size = (bytes + (2u << 20) - 1) >> 21 << 21;
      memory = (uint8_t*)aligned_alloc(2 << 20, size);
      if (!memory) { size = 0; throw std::bad_alloc(); }
#if defined(__linux__)
      madvise(memory, size, MADV_HUGEPAGE);
#endif
    }
    return memory;
  }
};
// Gives out pieces of the scratch memory; with base 0 it only counts.
struct Carver {
  uintptr_t base; size_t used = 0;
  template <class T> T* take(size_t n) {
    T* p = (T*)(base + used);
    used += (n * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

class Run {  // what all threads of one step share
 public:
  Run(Context& c, const Model& m, const Step& s) : ctx(c), md(m), st(s), sh(m.shape) {
    group = sh.heads / sh.kv_heads;
    out_width = sh.heads * sh.dim;
    ld_hidden = round16(md.hidden); ld_qkv = round16(out_width + 2 * sh.kv_heads * sh.dim);
    ld_out = round16(out_width); ld_ffn = round16(md.ffn);
    tile_queries = most(1, least(16, 128 / group));
    rows = tile_queries * group;
    measure();
    plan();
    Carver count{0};
    carve(count);
    Carver real{(uintptr_t)ctx.reserve(count.used)};
    carve(real);
  }
  void thread(int t, int of);

 private:
  struct Scratch { float* row; Act own; Queries q, part; uint8_t* tiles; };
  Context& ctx; const Model& md; const Step& st; const Shape& sh;
  int group, out_width, ld_hidden, ld_qkv, ld_out, ld_ffn, tile_queries, rows, num_parts = 0, longest = 0, groups = 0;
  size_t act_row = 0;
  float *x, *y, *qkv, *attended, *gated, *part_acc, *part_top, *part_sum;
  Act shared;
  std::vector<Scratch> scratch;

  void measure() {
    auto look = [&](const Weight& w) {
      longest = most(longest, w.cols); groups = most(groups, num_groups(w));
      act_row = act_row > act_bytes(w) ? act_row : act_bytes(w);
    };
    for (int l = 0; l < md.layers; l++) {
      const Layer& y = md.layer[l];
      look(y.qkv); look(y.o); look(y.gate_up); look(y.down);
    }
    look(md.head);
  }
  // Cuts the attention of all sequences into jobs: up to `tile_queries` queries, and for few queries parts of SPLIT keys.
  void plan() {
    ctx.jobs.clear(); ctx.merges.clear();
    for (int r = st.sequences - 1; r >= 0; r--) {
      const int start = st.query_start[r], count = st.query_start[r + 1] - start, len = st.kv_len[r];
      for (int q = (count - 1) / tile_queries * tile_queries; q >= 0 && count; q -= tile_queries) {
        const int n = least(tile_queries, count - q), to = len - count + q + n, parts = (to + SPLIT - 1) / SPLIT;
        if (count > 8 || parts <= 1 || st.threads == 1) { ctx.jobs.push_back({r, start + q, n, 0, to, -1}); continue; }
        ctx.merges.push_back({start + q, n, num_parts, parts});
        for (int p = 0; p < parts; p++)
          ctx.jobs.push_back({r, start + q, n, p * SPLIT, least(to, (p + 1) * SPLIT), num_parts++});
      }
    }
  }
  void carve(Carver& c) {
    const size_t m = st.tokens, k = sh.kv_heads;
    x = c.take<float>(m * ld_hidden); y = c.take<float>(m * ld_hidden); qkv = c.take<float>(m * ld_qkv);
    attended = c.take<float>(m * ld_out); gated = c.take<float>(m * ld_ffn);
    const size_t prepared = most(st.tokens, st.logit_rows);
    shared = {c.take<uint8_t>(prepared * act_row), c.take<float>(prepared * groups), c.take<int32_t>(prepared * groups)};
    part_acc = c.take<float>(num_parts * k * rows * sh.width);
    part_top = c.take<float>(num_parts * k * rows); part_sum = c.take<float>(num_parts * k * rows);
    scratch.resize(st.threads);
    for (Scratch& s : scratch) {
      s.row = c.take<float>(2 * longest);
      s.own = {c.take<uint8_t>(act_row), c.take<float>(groups), c.take<int32_t>(groups)};
      for (Queries* q : {&s.q, &s.part})
        *q = {0, c.take<uint8_t>(rows * sh.width * 4), c.take<float>(rows * sh.width), c.take<float>(rows),
              c.take<float>(rows), c.take<float>(rows), c.take<int>(rows), c.take<int>(rows)};
      s.tiles = c.take<uint8_t>((size_t)2 * CHUNK * UNIT * sh.width * 4);
    }
  }

  void embed(int t, int of);
  Act prepare_all(int t, int of, const Weight& w, const float* from, int ld, const float* gain, const int64_t* rows,
                  int count);
  template <bool PAIRS, class Put> void matmul(int of, const Weight& w, const Act& a, int count, const Put& put);
  void add_to_residual(int t, int of, const Weight& w, const Act& a, const float* post);
  void write_cache(int of, const Layer& l);
  void attention(int t, int of, const Layer& l);
  void attend_job(const Layer& l, const Job& job, int h, Scratch& s);
  void finish(const Layer& l, const Queries& q, int token, int count, int h);
  void merge(int t, int of, const Layer& l);
};

