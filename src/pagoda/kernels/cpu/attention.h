// Attention over the paged cache. The cache is made of units: 16 tokens of one kv head, so that one vector holds one
// element of 16 keys and both products need no transposes (width: head_dim rounded up to 16, the rest is zero):
//   F32, F16  K [unit][kv head][width][16]       V [unit][kv head][16][width]
//   BF16, I8  K [unit][kv head][width/2][16][2]  V [unit][kv head][8][width][2]      (pairs: what dot_bf16 takes)
//   I8 has one float32 scale per token and head, [unit][kv head][16], for K and for V; or, where calibration fixed them,
//   one per head, 16 times over, [kv head][16], and a zero: x = code * scale + zero. Zeros never meet the codes: a
//   softmax does not see what all its scores have in common (a soft cap does), and that of V is added to the result.
// A block of the engine is a whole number of units. Formats that the dot products do not take are unpacked unit by
// unit into a tile that all queries of a job share.
#pragma once
#include "vector.h"
#include "linear.h"

constexpr int UNIT = 16, CHUNK = 8;  // tokens of a unit; units per round of the online softmax
struct Cache { uint8_t *k, *v; float *k_scale, *v_scale; const float *k_zero, *v_zero; };  // zeros [kv head], or null
struct Shape { int32_t kind, heads, kv_heads, dim, width, block_len; float scale, softcap; };

static inline bool in_pairs(int kind) { return BF16_DOT && (kind == BF16 || kind == I8); }
static inline size_t kv_element(int kind) { return kind == F32 ? 4 : kind == I8 ? 1 : 2; }
static inline int unit_of(const int32_t* blocks, int block_len, int token) {
  return (blocks[token / block_len] * block_len + token % block_len) / UNIT;
}

// ---------------------------------------------------------------- writing one token of one head
static float int8_scale(const float* x, int n) {
  float top = 0;
  for (int i = 0; i < n; i++) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
  return top / 127.f;
}
static void put_element(int kind, uint8_t* base, size_t i, float x) {
  if (kind == F32) memcpy(base + 4 * i, &x, 4);
  else if (kind == I8) ((int8_t*)base)[i] = (int8_t)lrintf(x < -128.f ? -128.f : x > 127.f ? 127.f : x);
  else { const uint16_t h = kind == BF16 ? float_bf16(x) : float_f16(x); memcpy(base + 2 * i, &h, 2); }
}
// k, v [dim] to slot (block * block_len + offset) of kv head h; padding up to `width` was zero from the start
static void write_kv(const Shape& s, const Cache& c, int64_t slot, int h, const float* k, const float* v) {
  const size_t row = (size_t)(slot / UNIT) * s.kv_heads + h, t = slot % UNIT, bytes = kv_element(s.kind);
  uint8_t *kp = c.k + row * UNIT * s.width * bytes, *vp = c.v + row * UNIT * s.width * bytes;
  const bool fixed = c.k_zero;
  const float kz = fixed ? c.k_zero[h] : 0.f, vz = fixed ? c.v_zero[h] : 0.f;
  float ki = 1.f, vi = 1.f;
  if (s.kind == I8) {
    const float ks = fixed ? c.k_scale[h * UNIT] : int8_scale(k, s.dim);
    const float vs = fixed ? c.v_scale[h * UNIT] : int8_scale(v, s.dim);
    if (!fixed) { c.k_scale[row * UNIT + t] = ks; c.v_scale[row * UNIT + t] = vs; }
    ki = ks > 0 ? 1.f / ks : 0.f; vi = vs > 0 ? 1.f / vs : 0.f;
  }
  const bool pairs = s.kind == BF16 || s.kind == I8;
  for (int d = 0; d < s.dim; d++) {
    put_element(s.kind, kp, pairs ? (size_t)(d / 2) * 32 + t * 2 + d % 2 : (size_t)d * 16 + t, (k[d] - kz) * ki);
    put_element(s.kind, vp, pairs ? (t / 2) * s.width * 2 + d * 2 + t % 2 : t * s.width + d, (v[d] - vz) * vi);
  }
}

// ---------------------------------------------------------------- reading a unit as the dot products want it
static void unpack_pairs_flat(int kind, const uint8_t* from, float* even, float* odd, int n) {
  for (int i = 0; i < n; i++) {
    even[i] = kind == I8 ? (float)((const int8_t*)from)[2 * i] : bf16_float(((const uint16_t*)from)[2 * i]);
    odd[i] = kind == I8 ? (float)((const int8_t*)from)[2 * i + 1] : bf16_float(((const uint16_t*)from)[2 * i + 1]);
  }
}
// Pairs of int8 to pairs of bf16 (exact), or anything to float32 [rows][run], where two rows make one line of pairs.
static const uint8_t* unpack(int kind, const uint8_t* from, uint8_t* to, int width, int run) {
  const int n = UNIT * width;
  if (kind == F32 || (kind == BF16 && BF16_DOT)) return from;
  if (kind == F16) {
    for (int i = 0; i < n; i += 16) store((float*)to + i, load_f16((const uint16_t*)from + i));
  } else if (in_pairs(kind)) {
    for (int i = 0; i < n; i += 16) store_bf16((uint16_t*)to + i, load_i8((const int8_t*)from + i));
  } else {
    for (int i = 0; i < n; i += 2 * run)
      unpack_pairs_flat(kind, from + i * kv_element(kind), (float*)to + i, (float*)to + i + run, run);
  }
  return to;
}
// The unit's values with zeros in place of those from token `seen` on, which nobody has written or an earlier owner of
// the block has: what may be no number there would pass through a weight of 0. Int8 codes are numbers always.
static const uint8_t* blank_tail(int kind, const uint8_t* v, uint8_t* to, int width, int seen) {
  if (seen >= UNIT || kind == I8) return v;
  const size_t row = (size_t)width * (in_pairs(kind) ? 2 : 4);  // bytes of a token
  const int kept = in_pairs(kind) ? (seen + 1) / 2 * 2 : seen;
  if (v != to) memcpy(to, v, row * kept);
  if (kept > seen) {  // the other half of a pair
    uint16_t* pair = (uint16_t*)(to + row * (kept - 2));
    for (int d = 0; d < width; d++) pair[2 * d + 1] = 0;
  }
  memset(to + row * kept, 0, row * (UNIT - kept));
  return to;
}

// ---------------------------------------------------------------- queries against up to CHUNK units
struct View {  // the units of one round
  const uint8_t *k[CHUNK], *v[CHUNK];
  const float *k_scale[CHUNK], *v_scale[CHUNK];
  int first, units;  // first: token number of the first key
};
struct Queries {  // rows of one job: all heads of some tokens that share a kv head
  int count;
  uint8_t* q;              // [count][width] bf16 or float32, scaled
  float *acc, *top, *sum;  // [count][width] unnormalised output; running maximum and sum of the softmax
  float* shift;            // what K's zero adds to each of the row's scores
  int *lo, *hi;            // keys that the row sees: lo .. hi - 1
};

template <int R, bool PAIRS> static void scores(const Shape& s, const View& w, const Queries& q, int r0, float* out) {
  constexpr int N = R <= 4 ? 2 : 1;  // units at a time: enough independent sums
  for (int u = 0; u < w.units; u += N) {
    const uint8_t* k[N];
    for (int n = 0; n < N; n++) k[n] = w.k[u + n < w.units ? u + n : u];
    F a[N][R];
    for (auto& n : a) for (F& x : n) x = zero();
    for (int d = 0; d < s.width; d += PAIRS ? 2 : 1) {
      const size_t at = (size_t)d * (PAIRS ? 32 : 64);
      for (int n = 0; n < N; n++) {
        const I key = iload(k[n] + at);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const size_t i = (size_t)(r0 + r) * s.width + d;
          a[n][r] = PAIRS ? dot_bf16(a[n][r], key, broadcast4((const uint16_t*)q.q + i))
                          : fma(as_float(key), set1(((const float*)q.q)[i]), a[n][r]);
        }
      }
    }
    for (int n = 0; n < N && u + n < w.units; n++)
      for (int r = 0; r < R; r++) {
        F x = w.k_scale[u + n] ? a[n][r] * load(w.k_scale[u + n]) : a[n][r];
        if (s.softcap > 0) x = set1(s.softcap) * tanh((x + set1(q.shift[r0 + r])) * set1(1.f / s.softcap));
        const int first = w.first + (u + n) * UNIT;
        store(out + (r * CHUNK + u + n) * UNIT, between(x, q.lo[r0 + r] - first, q.hi[r0 + r] - first, -INFINITY));
      }
  }
}

// Scores of one row to weights e^(score - top), as PV wants them; updates the row's maximum, sum and output.
template <bool PAIRS> static void soften(const Shape& s, const View& w, const Queries& q, int r, float* score) {
  F most = set1(q.top[r]);
  for (int u = 0; u < w.units; u++) most = max(most, load(score + u * UNIT));
  const float top = reduce_max(most);
  F total = zero();
  for (int u = 0; u < w.units; u++) {
    const F x = load(score + u * UNIT);
    const F seen = set1(-1e30f), weight = exp(x - set1(top));
    total = total + above(x, seen, weight);
    const F p = above(x, seen, w.v_scale[u] ? weight * load(w.v_scale[u]) : weight);  // an unseen scale may be infinite
    if (PAIRS) store_bf16((uint16_t*)score + u * UNIT, p);
    else store(score + u * UNIT, p);
  }
  if (top > q.top[r]) {
    const F shrink = set1(q.top[r] == -INFINITY ? 0.f : expf(q.top[r] - top));
    float* acc = q.acc + (size_t)r * s.width;
    for (int d = 0; d < s.width; d += 16) store(acc + d, load(acc + d) * shrink);
    q.sum[r] *= shrink.p[0][0];
    q.top[r] = top;
  }
  q.sum[r] += reduce_add(total);
}

template <int R, bool PAIRS> static void weigh(const Shape& s, const View& w, const Queries& q, int r0, const float* p) {
  for (int d = 0; d < s.width; d += 16) {
    F acc[R];
    for (int r = 0; r < R; r++) acc[r] = load(q.acc + (size_t)(r0 + r) * s.width + d);
    for (int u = 0; u < w.units; u++)
      for (int t = 0; t < UNIT; t += PAIRS ? 2 : 1) {
        const I value = iload(w.v[u] + ((size_t)t * s.width + (PAIRS ? 2 * d : d)) * (PAIRS ? 2 : 4));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const float* row = p + r * CHUNK * UNIT;
          acc[r] = PAIRS ? dot_bf16(acc[r], value, broadcast4((const uint16_t*)row + u * UNIT + t))
                         : fma(as_float(value), set1(row[u * UNIT + t]), acc[r]);
        }
      }
    for (int r = 0; r < R; r++) store(q.acc + (size_t)(r0 + r) * s.width + d, acc[r]);
  }
}

template <int R, bool PAIRS> static void attend(int rows, const Shape& s, const View& w, const Queries& q, int r0) {
  if constexpr (R > 1) if (rows < R) return attend<R - 1, PAIRS>(rows, s, w, q, r0);
  alignas(64) float p[R * CHUNK * UNIT];
  scores<R, PAIRS>(s, w, q, r0, p);
  for (int r = 0; r < R; r++) soften<PAIRS>(s, w, q, r0 + r, p + r * CHUNK * UNIT);
  weigh<R, PAIRS>(s, w, q, r0, p);
}

// All rows of `q` over the keys from .. to - 1 of kv head h; `tiles` holds 2 * CHUNK unpacked units.
static void attend_range(const Shape& s, const Cache& c, const int32_t* blocks, int h, int from, int to,
                         const Queries& q, uint8_t* tiles) {
  const size_t tile = (size_t)UNIT * s.width * 4, unit_bytes = (size_t)UNIT * s.width * kv_element(s.kind);
  for (int first = from / UNIT * UNIT; first < to; first += CHUNK * UNIT) {
    View w;
    w.first = first;
    w.units = (to - first + UNIT - 1) / UNIT < CHUNK ? (to - first + UNIT - 1) / UNIT : CHUNK;
    for (int u = 0; u < w.units; u++) {
      const size_t row = (size_t)unit_of(blocks, s.block_len, first + u * UNIT) * s.kv_heads + h;
      w.k[u] = unpack(s.kind, c.k + row * unit_bytes, tiles + 2 * u * tile, s.width, UNIT);
      uint8_t* v = tiles + (2 * u + 1) * tile;
      w.v[u] = unpack(s.kind, c.v + row * unit_bytes, v, s.width, s.width);
      w.v[u] = blank_tail(s.kind, w.v[u], v, s.width, to - first - u * UNIT);
      const size_t scales = (c.k_zero ? h : row) * UNIT;
      w.k_scale[u] = s.kind == I8 ? c.k_scale + scales : nullptr;
      w.v_scale[u] = s.kind == I8 ? c.v_scale + scales : nullptr;
    }
    for (int r = 0; r < q.count; r += MAX_ROWS) {
      const int rows = q.count - r < MAX_ROWS ? q.count - r : MAX_ROWS;
      if (q.hi[r + rows - 1] <= first || q.lo[r] >= first + w.units * UNIT) continue;  // lo and hi rise with the row
      if (in_pairs(s.kind)) attend<MAX_ROWS, true>(rows, s, w, q, r);
      else attend<MAX_ROWS, false>(rows, s, w, q, r);
    }
  }
}
