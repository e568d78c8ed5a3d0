// One forward of a decoder: one call, one parallel region, a table of layers. Phases of a layer, a barrier after each
// (P: for one token without a barrier, every thread prepares the activation for itself):
//   norm + quantise P | qkv | rope + cache write | attention | [merge] | quantise P | o + residual
//   | norm + quantise P | gate_up + act | quantise P (bf16: none) | down + residual
#include "step.h"
#include <omp.h>

static void head_norm(float* x, const float* gain, int n, float eps) {
  float sum = 0;
  for (int i = 0; i < n; i++) sum += x[i] * x[i];
  const float r = 1.f / sqrtf(sum / n + eps);
  for (int i = 0; i < n; i++) x[i] *= r * gain[i];
}
static void rotate(float* x, const float* cos, const float* sin, int pairs) {
  for (int p = 0; p < pairs; p++) {
    const float a = x[p], b = x[p + pairs];
    x[p] = a * cos[p] - b * sin[p];
    x[p + pairs] = b * cos[p] + a * sin[p];
  }
}

// Element k of token v: rows of a plain table, or lanes of the blocks that linear.h describes.
static float embedding(const Model& m, int64_t v, int k) {
  size_t at = (size_t)v * m.hidden + k;
  if (m.embed_blocks) {
    const size_t block = (size_t)(v / 16) * m.head.cols * 16;
    at = block + (m.embed_kind == BF16 ? (size_t)(k / 2) * 32 + v % 16 * 2 + k % 2 : (size_t)k * 16 + v % 16);
  }
  if (m.embed_kind == F32) return ((const float*)m.embed)[at];
  const uint16_t half = ((const uint16_t*)m.embed)[at];
  return m.embed_kind == BF16 ? bf16_float(half) : f16_float(half);
}
void Run::embed(int t, int of) {
  for (int m = t; m < st.tokens; m += of) {
    float* row = x + (size_t)m * ld_hidden;
    for (int k = 0; k < ld_hidden; k++)
      row[k] = k < md.hidden ? embedding(md, st.token[m], k) * md.embed_scale : 0.f;
  }
  ctx.barrier.wait(of);
}

// Rows of `from` (normed where `gain` is given) as the activation of w. One row: every thread makes its own copy.
Act Run::prepare_all(int t, int of, const Weight& w, const float* from, int ld, const float* gain, const int64_t* rows,
                     int count) {
  const Act a = count == 1 ? scratch[t].own : shared;
  for (int m = count == 1 ? 0 : t; m < count; m += count == 1 ? 1 : of)
    prepare(w, from + (size_t)(rows ? rows[m] : m) * ld, gain, md.eps, scratch[t].row, a, m);
  if (count > 1) ctx.barrier.wait(of);
  return a;
}

// All outputs for `count` tokens; threads claim runs of blocks, whose weights stay in the core's cache for all tokens.
// Short runs: a thread that loses its core for a while (to the HTTP process) holds back little.
template <bool PAIRS, class Put> void Run::matmul(int of, const Weight& w, const Act& a, int count, const Put& put) {
  const int blocks = w.rows / 16, cached = most(1, (int)((256 << 10) / block_bytes(w)));
  int run = (blocks + of * 16 - 1) / (of * 16);
  if (count > MAX_ROWS) run = least(run, cached);
  run = (run + 3) / 4 * 4;
  const int together = most(MAX_ROWS, (int)((24 << 10) / act_bytes(w)) / MAX_ROWS * MAX_ROWS);
  for (int b = ctx.barrier.claim() * run; b < blocks; b = ctx.barrier.claim() * run)
    for (int m = 0; m < count; m += together)
      multiply<PAIRS>(w, a, b, least(b + run, blocks), m, least(m + together, count), put);
  ctx.barrier.wait(of);
}

// x += W a, or x += norm(W a) where there is a post norm.
void Run::add_to_residual(int t, int of, const Weight& w, const Act& a, const float* post) {
  float* to = post ? y : x;
  matmul<false>(of, w, a, st.tokens, [&](int m, int nb, F v, F) {
    float* p = to + (size_t)m * ld_hidden + nb * 16;
    store(p, post ? v : load(p) + v);
  });
  if (!post) return;
  for (int m = t; m < st.tokens; m += of) {
    float *row = y + (size_t)m * ld_hidden, *sum = x + (size_t)m * ld_hidden;
    rms_norm(row, post, md.hidden, md.eps, scratch[t].row);
    for (int k = 0; k < md.hidden; k++) sum[k] += scratch[t].row[k];
  }
  ctx.barrier.wait(of);
}

// QK norm, rotation and log-n scale in place; k and v of every token to the cache.
void Run::write_cache(int of, const Layer& l) {
  const int jobs = st.tokens * sh.kv_heads;
  for (int j = ctx.barrier.claim(); j < jobs; j = ctx.barrier.claim()) {
    const int m = j / sh.kv_heads, h = j % sh.kv_heads, pairs = md.rotary_pairs;
    float *row = qkv + (size_t)m * ld_qkv, *k = row + out_width + h * sh.dim, *v = k + sh.kv_heads * sh.dim;
    const float *c = st.cos + (size_t)m * pairs, *s = st.sin + (size_t)m * pairs;
    for (int g = 0; g < group; g++) {
      float* q = row + (h * group + g) * sh.dim;
      if (l.q_norm) head_norm(q, l.q_norm, sh.dim, md.eps);
      rotate(q, c, s, pairs);
      const float scale = sh.scale * (st.q_scale ? st.q_scale[m] : 1.f);
      for (int d = 0; d < sh.dim; d++) q[d] *= scale;
    }
    if (l.k_norm) head_norm(k, l.k_norm, sh.dim, md.eps);
    rotate(k, c, s, pairs);
    if (st.slot[m] >= 0) write_kv(sh, l.cache, st.slot[m], h, k, v);
  }
  ctx.barrier.wait(of);
}

// Merges a part of a softmax into what came before it: the same steps whether one thread does all parts or several.
static void absorb(const Queries& into, const Queries& part, int width) {
  for (int r = 0; r < into.count; r++) {
    if (part.top[r] == -INFINITY) continue;
    const float top = part.top[r] > into.top[r] ? part.top[r] : into.top[r];
    const float keep = into.top[r] == -INFINITY ? 0.f : expf(into.top[r] - top), gain = expf(part.top[r] - top);
    into.top[r] = top;
    into.sum[r] = into.sum[r] * keep + part.sum[r] * gain;
    float *a = into.acc + (size_t)r * width, *b = part.acc + (size_t)r * width;
    for (int d = 0; d < width; d += 16) store(a + d, fma(load(b + d), set1(gain), load(a + d) * set1(keep)));
  }
}
static void clear(const Queries& q, int width) {
  memset(q.acc, 0, (size_t)q.count * width * sizeof(float));
  for (int r = 0; r < q.count; r++) { q.top[r] = -INFINITY; q.sum[r] = 0; }
}

void Run::attend_job(const Layer& l, const Job& job, int h, Scratch& s) {
  const int start = st.query_start[job.seq], count = st.query_start[job.seq + 1] - start;
  Queries &all = s.q, part = s.part;
  all.count = part.count = job.count * group;
  part.q = all.q; part.shift = all.shift; part.lo = all.lo; part.hi = all.hi;
  for (int i = 0; i < job.count; i++) {
    const int m = job.token + i, seen = st.kv_len[job.seq] - count + (m - start) + 1;
    for (int g = 0; g < group; g++) {
      const int r = i * group + g;
      all.hi[r] = seen;
      all.lo[r] = l.window && seen > l.window ? seen - (int)l.window : 0;
      const float* q = qkv + (size_t)m * ld_qkv + (h * group + g) * sh.dim;
      float total = 0;
      for (int d = 0; d < sh.width; d++) {
        const float v = d < sh.dim ? q[d] : 0.f;
        total += v;
        if (in_pairs(sh.kind)) ((uint16_t*)all.q)[(size_t)r * sh.width + d] = float_bf16(v);
        else ((float*)all.q)[(size_t)r * sh.width + d] = v;
      }
      all.shift[r] = l.cache.k_zero ? total * l.cache.k_zero[h] : 0.f;
    }
  }
  clear(all, sh.width);
  const int32_t* blocks = st.block_table + (size_t)job.seq * st.table_width;
  for (int from = job.from; from < job.to; from += SPLIT) {
    const int to = least(job.to, from + SPLIT);
    if (to <= all.lo[0]) continue;
    clear(part, sh.width);
    attend_range(sh, l.cache, blocks, h, most(from, all.lo[0] / (CHUNK * UNIT) * (CHUNK * UNIT)), to, part, s.tiles);
    absorb(all, part, sh.width);
  }
  if (job.part < 0) return finish(l, all, job.token, job.count, h);
  const size_t at = ((size_t)job.part * sh.kv_heads + h) * rows;
  memcpy(part_acc + at * sh.width, all.acc, (size_t)all.count * sh.width * sizeof(float));
  memcpy(part_top + at, all.top, all.count * sizeof(float));
  memcpy(part_sum + at, all.sum, all.count * sizeof(float));
}

void Run::finish(const Layer& l, const Queries& q, int token, int count, int h) {
  const float zero = l.cache.v_zero ? l.cache.v_zero[h] : 0.f;
  for (int r = 0; r < count * group; r++) {
    float* to = attended + (size_t)(token + r / group) * ld_out + (h * group + r % group) * sh.dim;
    const float inverse = q.sum[r] > 0 ? 1.f / q.sum[r] : 0.f;
    for (int d = 0; d < sh.dim; d++) to[d] = q.acc[(size_t)r * sh.width + d] * inverse + (inverse > 0 ? zero : 0.f);
  }
}

void Run::merge(int t, int of, const Layer& l) {
  const int jobs = (int)ctx.merges.size() * sh.kv_heads;
  for (int j = t; j < jobs; j += of) {
    const Merge& merge = ctx.merges[j / sh.kv_heads];
    Queries& all = scratch[t].q;
    all.count = merge.count * group;
    clear(all, sh.width);
    for (int p = 0; p < merge.parts; p++) {
      const size_t at = ((size_t)(merge.part + p) * sh.kv_heads + j % sh.kv_heads) * rows;
      Queries part = all;
      part.acc = part_acc + at * sh.width; part.top = part_top + at; part.sum = part_sum + at;
      absorb(all, part, sh.width);
    }
    finish(l, all, merge.token, merge.count, j % sh.kv_heads);
  }
  ctx.barrier.wait(of);
}

void Run::attention(int t, int of, const Layer& l) {
  const int jobs = (int)ctx.jobs.size() * sh.kv_heads;
  for (int j = ctx.barrier.claim(); j < jobs; j = ctx.barrier.claim())
    attend_job(l, ctx.jobs[j / sh.kv_heads], j % sh.kv_heads, scratch[t]);
  ctx.barrier.wait(of);
  if (!ctx.merges.empty()) merge(t, of, l);
}

void Run::thread(int t, int of) {
  const int n = st.tokens;
  embed(t, of);
  for (int i = 0; i < md.layers; i++) {
    const Layer& l = md.layer[i];
    matmul<false>(of, l.qkv, prepare_all(t, of, l.qkv, x, ld_hidden, l.attention_norm, nullptr, n), n,
                  [&](int m, int nb, F v, F) { store(qkv + (size_t)m * ld_qkv + nb * 16, v); });
    write_cache(of, l);
    attention(t, of, l);
    add_to_residual(t, of, l.o, prepare_all(t, of, l.o, attended, ld_out, nullptr, nullptr, n), l.attention_post);
    const bool prepared = BF16_DOT && l.down.kind == BF16;  // what `prepare` would do, done at once
    matmul<true>(of, l.gate_up, prepare_all(t, of, l.gate_up, x, ld_hidden, l.ffn_norm, nullptr, n), n,
                 [&](int m, int nb, F gate, F up) {
                   const F v = (md.gelu ? gelu_tanh(gate) : silu(gate)) * up;
                   const size_t at = (size_t)m * ld_ffn + nb * 8;
                   if (prepared) store_bf16((uint16_t*)gated + at, v); else store(gated + at, v);
                 });
    const Act in = prepared ? Act{(uint8_t*)gated, nullptr, nullptr}
                            : prepare_all(t, of, l.down, gated, ld_ffn, nullptr, nullptr, n);
    add_to_residual(t, of, l.down, in, l.ffn_post);
  }
  if (st.logit_rows == 0) return;
  const Act last = prepare_all(t, of, md.head, x, ld_hidden, md.norm, st.logit_row, st.logit_rows);
  matmul<false>(of, md.head, last, st.logit_rows, [&](int m, int nb, F v, F) {
    if (md.final_softcap > 0) v = set1(md.final_softcap) * tanh(v * set1(1.f / md.final_softcap));
    memcpy(st.logits + (size_t)m * md.vocab + nb * 16, &v, least(16, md.vocab - nb * 16) * sizeof(float));
  });
}

// What a wrong table would read or write out of bounds: 0, or the number of the rule that is broken.
static int check(const Model& m, const Step& s) {
  const int64_t slots = (int64_t)m.num_blocks * m.shape.block_len;
  for (int i = 0; i < s.tokens; i++) {
    if (s.token[i] < 0 || s.token[i] >= m.vocab) return 1;
    if (s.slot[i] >= slots) return 2;
  }
  if (s.query_start[0] != 0 || s.query_start[s.sequences] > s.tokens) return 3;
  for (int r = 0; r < s.sequences; r++) {
    const int count = s.query_start[r + 1] - s.query_start[r], used = s.kv_len[r];
    if (count < 0 || (count && used && used < count)) return 3;
    if (used > s.table_width * m.shape.block_len) return 4;
    for (int b = 0; b * m.shape.block_len < used; b++) {
      const int32_t block = s.block_table[(size_t)r * s.table_width + b];
      if (block < 0 || block >= m.num_blocks) return 4;
    }
  }
  for (int i = 0; i < s.logit_rows; i++) if (s.logit_row[i] < 0 || s.logit_row[i] >= s.tokens) return 5;
  return 0;
}

#define EXPORT __attribute__((visibility("default")))
extern "C" {
EXPORT Context* pagoda_context() { return new (std::nothrow) Context; }
EXPORT void pagoda_context_free(Context* c) { delete c; }

// 0, or the rule of `check` that the step breaks; -1: no memory for the scratch space.
EXPORT int pagoda_step(Context* c, const Model* m, const Step* s) {
  if (const int broken = check(*m, *s)) return broken;
  try {
    Run run(*c, *m, *s);
    c->barrier.wait(1);
#pragma omp parallel num_threads(s->threads)
    run.thread(omp_get_thread_num(), omp_get_num_threads());
  } catch (const std::bad_alloc&) {
    return -1;
  }
  return 0;
}

// y [tokens][rows] = W x for x [tokens][in], one thread: the tests' way to a single matrix.
EXPORT void pagoda_linear(const Weight* w, int tokens, const float* x, float* y) {
  std::vector<uint8_t> q(tokens * act_bytes(*w) + 64);
  std::vector<float> scale((size_t)tokens * num_groups(*w) + 1), row(2 * (size_t)w->cols);
  std::vector<int32_t> sum(scale.size());
  const Act a{q.data(), scale.data(), sum.data()};
  for (int m = 0; m < tokens; m++) prepare(*w, x + (size_t)m * w->in, nullptr, 0, row.data(), a, m);
  multiply<false>(*w, a, 0, w->rows / 16, 0, tokens,
                  [&](int m, int nb, F v, F) { store(y + (size_t)m * w->rows + nb * 16, v); });
}
}
