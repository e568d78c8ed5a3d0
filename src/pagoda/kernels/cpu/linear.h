// y = W x for packed weights. Blocks of 16 output rows lie one after another (one stream of reads), padded with zeros:
//   F32, F16  [rows/16][cols][16]            BF16  [rows/16][cols/2][16][2]
//   W8        [rows/16][cols/4][16][4]       u8 = q + 128
//   W4        [rows/16][cols/8][16][4]       u8, low nibble column 8k..8k+3, high nibble 8k+4..8k+7, 0..15
//   scales    fp16 [rows/16][cols/group][16], times `unit`;  zeros (W4) u8, same shape; none: the zero point is 8
// Every output is one sum over the columns in their order, whatever the number of tokens and threads: a token's result
// does not depend on its company. Activations of W8 and W4 are int8 with one scale and one sum per (token, group): the
// sum takes the zero point out of the integer dot product exactly. Those of F32 and F16 are float32, those of BF16 are
// rounded to bf16.
#pragma once
#include "vector.h"

enum Kind { F32 = 0, F16 = 1, BF16 = 2, W8 = 3, W4 = 4, I8 = 5 };  // I8: a format of the KV cache only
struct Weight {
  int32_t kind, rows, cols, in, group;  // rows, cols: padded; in: the true number of columns
  float unit;
  const uint8_t* q;
  const uint16_t* scales;
  const uint8_t* zeros;    // null: symmetric
  const float* bias;       // padded, or null
  const int32_t* perm;     // column k of the weights takes input perm[k], none where perm[k] = in; or null
};
struct Act { uint8_t* q; float* scale; int32_t* sum; };

static inline bool is_int(const Weight& w) { return w.kind == W8 || w.kind == W4; }
static inline int num_groups(const Weight& w) { return is_int(w) ? w.cols / w.group : 0; }
static inline size_t act_bytes(const Weight& w) {  // of one token
  return (size_t)w.cols * (is_int(w) ? 1 : w.kind == BF16 && BF16_DOT ? 2 : 4);
}
static inline size_t block_bytes(const Weight& w) {
  return (size_t)w.cols * (w.kind == F32 ? 64 : w.kind == W8 ? 16 : w.kind == W4 ? 8 : 32);
}
constexpr int AHEAD = 1536;  // bytes between a read and its prefetch; of bf16 with several tokens, where sums take longer:
constexpr int BF16_AHEAD = 4096;

// ---------------------------------------------------------------- one token's activation
static void quantize_row(const Weight& w, const float* x, int8_t* q, float* scale, int32_t* sum) {
  for (int g = 0; g < num_groups(w); g++, x += w.group, q += w.group) {
    F largest = zero();
    for (int k = 0; k < w.group; k += 16) largest = max(largest, abs(load(x + k)));
    const float top = reduce_max(largest);
    const F inverse = set1(top > 0 ? 127.f / top : 0.f);
    I total = iset1(0);
    for (int k = 0; k < w.group; k += 16) {
      I v = round_int(load(x + k) * inverse);
      total = total + v;
      store_i8(q + k, v);
    }
    scale[g] = top / 127.f * w.unit;
    sum[g] = reduce_add(total);
  }
}
static void rms_norm(const float* x, const float* gain, int n, float eps, float* y) {  // x is zero from n to 16 | n
  F squares = zero();
  for (int k = 0; k < n; k += 16) squares = fma(load(x + k), load(x + k), squares);
  const float r = 1.f / sqrtf(reduce_add(squares) / n + eps);
  for (int k = 0; k < n; k++) y[k] = x[k] * r * gain[k];
}
// x [in] float32, normed where `gain` is given, to row m of `a`; `row` [2 * cols] is scratch.
static void prepare(const Weight& w, const float* x, const float* gain, float eps, float* row, const Act& a, int m) {
  if (gain) {
    float* normed = w.perm ? row + w.cols : row;
    rms_norm(x, gain, w.in, eps, normed);
    x = normed;
  }
  if (w.perm) {
    for (int k = 0; k < w.cols; k++) row[k] = w.perm[k] < w.in ? x[w.perm[k]] : 0.f;
  } else {
    if (x != row) memcpy(row, x, w.in * sizeof(float));
    for (int k = w.in; k < w.cols; k++) row[k] = 0.f;
  }
  uint8_t* q = a.q + m * act_bytes(w);
  const int groups = num_groups(w);
  if (is_int(w)) {
    quantize_row(w, row, (int8_t*)q, a.scale + (size_t)m * groups, a.sum + (size_t)m * groups);
  } else if (w.kind == BF16 && BF16_DOT) {
    for (int k = 0; k < w.cols; k += 16) store_bf16((uint16_t*)q + k, load(row + k));
  } else if (w.kind == BF16) {
    for (int k = 0; k < w.cols; k++) ((float*)q)[k] = bf16_float(float_bf16(row[k]));
  } else {
    memcpy(q, row, w.cols * sizeof(float));
  }
}

// ---------------------------------------------------------------- RB blocks of 16 rows times M tokens
template <int M, int RB> static void dense_bf16(const Weight& w, const uint8_t* q, const uint8_t* a, F* out) {
  constexpr int FAR = M == 1 ? AHEAD : BF16_AHEAD;
  const size_t block = block_bytes(w), row = act_bytes(w);
  F acc[RB][M];
  for (auto& r : acc) for (F& c : r) c = zero();
  for (int k = 0; k < w.cols; k += 4, q += 128) {
    for (int r = 0; r < RB; r++) { prefetch(q + r * block + FAR); prefetch(q + r * block + FAR + 64); }
#pragma GCC unroll 2
    for (int j = 0; j < 4; j += 2) {
      I v[RB];
      for (int r = 0; r < RB; r++) v[r] = iload(q + r * block + 32 * j);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        if (BF16_DOT) {
          const I x = broadcast4((const uint16_t*)(a + m * row) + k + j);
          for (int r = 0; r < RB; r++) acc[r][m] = dot_bf16(acc[r][m], v[r], x);
        } else {
          const float* x = (const float*)(a + m * row) + k + j;
          for (int r = 0; r < RB; r++)
            acc[r][m] = fma(pair_odd(v[r]), set1(x[1]), fma(pair_even(v[r]), set1(x[0]), acc[r][m]));
        }
      }
    }
  }
  for (int r = 0; r < RB; r++) for (int m = 0; m < M; m++) out[r * M + m] = acc[r][m];
}

template <int M, int RB, bool HALF> static void dense_flat(const Weight& w, const uint8_t* q, const uint8_t* a, F* out) {
  constexpr int STEP = HALF ? 32 : 64;
  const size_t block = block_bytes(w), row = act_bytes(w);
  F acc[RB][M];
  for (auto& r : acc) for (F& c : r) c = zero();
  for (int k = 0; k < w.cols; k += 4, q += 4 * STEP) {
    for (int r = 0; r < RB; r++)
      for (int j = 0; j < 4 * STEP; j += 64) prefetch(q + r * block + AHEAD + j);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      F v[RB];
      for (int r = 0; r < RB; r++) {
        const uint8_t* p = q + r * block + j * STEP;
        v[r] = HALF ? load_f16((const uint16_t*)p) : load((const float*)p);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const F x = set1(((const float*)(a + m * row))[k + j]);
        for (int r = 0; r < RB; r++) acc[r][m] = fma(v[r], x, acc[r][m]);
      }
    }
  }
  for (int r = 0; r < RB; r++) for (int m = 0; m < M; m++) out[r * M + m] = acc[r][m];
}

// c += the integer dot product of one group: `q` at its first column, `a` likewise; both rows of blocks apart.
template <int M, int RB, int BITS>
static inline void group_dot(const Weight& w, const uint8_t* q, size_t block, const int8_t* a, I (&c)[RB][M]) {
  for (int k0 = 0; k0 < w.group; k0 += 32)
#pragma GCC unroll 4
    for (int k = k0; k < k0 + 32; k += 8, q += 16 * BITS) {
      I lo[RB], hi[RB];
      for (int r = 0; r < RB; r++) {
        const uint8_t* p = q + r * block;
        prefetch(p + AHEAD);
        lo[r] = iload(p);
        if (BITS == 4) {
          hi[r] = shift_right(lo[r], 4) & iset1(0x0f0f0f0f);
          lo[r] = lo[r] & iset1(0x0f0f0f0f);
        } else {
          prefetch(p + AHEAD + 64);
          hi[r] = iload(p + 64);
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        const int8_t* x = a + (size_t)m * w.cols + k;
        const I first = broadcast4(x), second = broadcast4(x + 4);
        for (int r = 0; r < RB; r++)
          c[r][m] = BITS == 4 ? dot_w4(dot_w4(c[r][m], lo[r], first), hi[r], second)
                              : dot_w8(dot_w8(c[r][m], lo[r], first), hi[r], second);
      }
    }
}
template <int M, int RB, int BITS>
static void integer(const Weight& w, int nb, const Act& act, int m0, F* out) {
  const int groups = num_groups(w);
  const size_t block = block_bytes(w), next = (size_t)groups * 16;
  const int8_t* a = (const int8_t*)act.q + (size_t)m0 * w.cols;
  const float* scale = act.scale + (size_t)m0 * groups;
  const int32_t* sum = act.sum + (size_t)m0 * groups;
  F total[RB][M];
  for (auto& r : total) for (F& f : r) f = zero();
  for (int g = 0; g < groups; g++) {
    const size_t at = ((size_t)nb * groups + g) * 16;
    I c[RB][M];
    for (int r = 0; r < RB; r++) {
      I start = iset1(-(BITS == 4 ? 8 : BYTE_ZERO));
      if (BITS == 4 && w.zeros) start = iset1(0) - load_u8(w.zeros + at + r * next);
      for (int m = 0; m < M; m++) c[r][m] = start * iset1(sum[m * groups + g]);
    }
    group_dot<M, RB, BITS>(w, w.q + nb * block + (size_t)g * w.group * 2 * BITS, block, a + (size_t)g * w.group, c);
    for (int r = 0; r < RB; r++) {
      const F s = load_f16(w.scales + at + r * next);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
        total[r][m] = fma(to_float(c[r][m]), s * set1(scale[m * groups + g]), total[r][m]);
    }
  }
  for (int r = 0; r < RB; r++) for (int m = 0; m < M; m++) out[r * M + m] = total[r][m];
}

// out[r * M + m] = rows 16 (nb + r) .. + 15 of W x for token m0 + m, bias added
template <int M, int RB> static void tile(const Weight& w, int nb, const Act& act, int m0, F* out) {
  const uint8_t *q = w.q + nb * block_bytes(w), *a = act.q + m0 * act_bytes(w);
  switch (w.kind) {
    case F32: dense_flat<M, RB, false>(w, q, a, out); break;
    case F16: dense_flat<M, RB, true>(w, q, a, out); break;
    case BF16: dense_bf16<M, RB>(w, q, a, out); break;
    case W8: integer<M, RB, 8>(w, nb, act, m0, out); break;
    default: integer<M, RB, 4>(w, nb, act, m0, out); break;
  }
  if (!w.bias) return;
  for (int r = 0; r < RB; r++)
    for (int m = 0; m < M; m++) out[r * M + m] = out[r * M + m] + load(w.bias + (nb + r) * 16);
}
// The same for `step` blocks and `count` <= M tokens; several blocks at a time as far as registers and latency ask.
template <int M> static void tiles(int count, int step, const Weight& w, int nb, const Act& act, int m0, F* out) {
  if constexpr (M > 1) if (count < M) return tiles<M - 1>(count, step, w, nb, act, m0, out);
  constexpr int BEST = M == 1 ? (PART == 4 ? 2 : 4) : M == 2 ? (PART == 4 ? 1 : 2)
                     : PART == 16 && (M <= 4 || M == MAX_ROWS) ? 2 : 1;
  int r = 0;
  for (; r + BEST <= step; r += BEST) tile<M, BEST>(w, nb + r, act, m0, out + r * M);
  for (; r < step; r++) tile<M, 1>(w, nb + r, act, m0, out + r * M);
}

// Blocks b0 .. b1 - 1 (with PAIRS both even) for tokens m0 .. m1 - 1. put(m, nb, first, second): with PAIRS the rows of
// two neighbouring blocks come together (gate and up), otherwise `second` means nothing.
template <bool PAIRS, class Put>
static void multiply(const Weight& w, const Act& act, int b0, int b1, int m0, int m1, const Put& put) {
  constexpr int STEP = 4, BY = PAIRS ? 2 : 1;
  F out[STEP * MAX_ROWS];
  for (int nb = b0; nb < b1; nb += STEP) {
    const int step = b1 - nb < STEP ? b1 - nb : STEP;
    for (int m = m0; m < m1; m += MAX_ROWS) {
      const int count = m1 - m < MAX_ROWS ? m1 - m : MAX_ROWS;
      tiles<MAX_ROWS>(count, step, w, nb, act, m, out);
      for (int r = 0; r < step; r += BY)
        for (int i = 0; i < count; i++) put(m + i, nb + r, out[r * count + i], out[(r + BY - 1) * count + i]);
    }
  }
}
