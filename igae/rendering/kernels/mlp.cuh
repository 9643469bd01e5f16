// SPDX-License-Identifier: Apache-2.0
// The decoding MLP: its weights in shared memory, and a tile's way through it.
#pragma once
#include "common.cuh"

struct Mlp {
  const Four *w1, *w2, *w1_back, *w2_back;  // as products take them, see load_mlp; *_back: backward only
  const float *b1, *b2;                     // b2: colors'
  const float *dense;                       // the density's row of w2, not rounded, and its bias
};

// Two fours of a lane that belong together lie where reading them meets no bank twice: behind each other if they are 16
// bytes, else 32 lanes apart.
DEV int pair_place(int block, int lane, int which) { return FP32 ? (2 * block + which) * 32 + lane : (block * 32 + lane) * 2 + which; }

DEV void load_pair(const Four *weights, int block, Four (&pair)[2]) {
#if FP32
  pair[0] = weights[pair_place(block, lane_id(), 0)];
  pair[1] = weights[pair_place(block, lane_id(), 1)];
#else
  uint4 both = *(const uint4 *)(weights + pair_place(block, lane_id(), 0));
  pair[0] = {both.x, both.y};
  pair[1] = {both.z, both.w};
#endif
}

// Fills `count` fours, of which element e (of x, y, z, w) is value(block, which, lane, e); SINGLE: they are no pairs.
template <bool SINGLE, class Value>
DEV void fill(Four *to, int count, Value value) {
#pragma unroll 4
  for (int i = threadIdx.x; i < 2 * count; i += 32 * WARPS) {
    int f = i >> 1, e = 2 * (i & 1), block = f >> 6, which = FP32 ? f >> 5 & 1 : f & 1, lane = FP32 ? f & 31 : f >> 1 & 31;
    if (SINGLE) block = f >> 5, which = 0, lane = f & 31;
    ((Two *)to)[i] = two(value(block, which, lane, e), value(block, which, lane, e + 1));
  }
}

// Units: the hidden layer's numbers are counted in units of ln 2, before and after the activation, and so are what colors
// are the sigmoid of; the raw density is not.
template <bool BACKWARD>
DEV Mlp load_mlp(float *shared, const Params &p) {
  float *w1 = shared, *w2 = w1 + W1_WORDS, *b1 = w2 + W2_WORDS, *b2 = b1 + HIDDEN, *dense = b2 + 8 * COLOR_TILES;
  float *w1_back = shared + WEIGHT_FLOATS, *w2_back = w1_back + W1_WORDS;
  // An infinity must not become the largest float16, which would hide it: NaN.
  auto seen = [](float w) { return w + (w - w); };
  auto first = [&](int h, int c) { return c < C ? seen(LOG2E * p.w1[h * C + min(c, C - 1)]) : 0.f; };
  auto second = [&](int n, int h) { return n < OUT ? seen(p.w2[(1 + min(n, OUT - 1)) * HIDDEN + h]) : 0.f; };
  // Pairs: two 8s of hidden units. A four: of one unit 4 features, which are inner indices two by two.
  fill<false>((Four *)w1, W1_WORDS / WORDS, [&](int block, int which, int lane, int e) {
    return first(8 * (2 * (block / CHUNKS) + which) + (lane >> 2), 16 * (block % CHUNKS) + 4 * (lane & 3) + e);
  });
  // A four: of one color, two units of one 8 and two of the next.
  fill<true>((Four *)w2, W2_WORDS / WORDS, [&](int block, int, int lane, int e) {
    return second(8 * (block >> 2) + (lane >> 2), 8 * (2 * (block & 3) + (e >> 1)) + 2 * (lane & 3) + (e & 1));
  });
  if (BACKWARD) {
    // Pairs: features. A four: of one feature, two units of one 8 and two of the next, which are inner indices.
    fill<false>((Four *)w1_back, W1_WORDS / WORDS, [&](int block, int which, int lane, int e) {
      int h = 8 * (2 * (block / CHUNKS) + (e >> 1)) + 2 * (lane & 3) + (e & 1);
      return first(h, 16 * (block % CHUNKS) + 4 * (lane >> 3) + 2 * which + (lane >> 2 & 1));
    });
    // A four: of one unit two colors of one 8 and two of the next, which are inner indices.
    constexpr int PAIRS = (COLOR_TILES + 1) / 2;
    fill<false>((Four *)w2_back, 256 * PAIRS, [&](int block, int which, int lane, int e) {
      int n = 8 * (2 * (block % PAIRS) + (e >> 1)) + 2 * (lane & 3) + (e & 1);
      return second(n, 8 * (2 * (block / PAIRS) + which) + (lane >> 2));
    });
  }
  for (int i = threadIdx.x; i < HIDDEN; i += 32 * WARPS) {
    b1[i] = LOG2E * p.b1[i];
    dense[i] = LN2 * p.w2[i];
    if (i < 8 * COLOR_TILES) b2[i] = i < OUT ? LOG2E * p.b2[1 + i] : 0.f;
    if (i == 0) dense[HIDDEN] = p.b2[0];
  }
  __syncthreads();
  return {(Four *)w1, (Four *)w2, (Four *)w1_back, (Four *)w2_back, b1, b2, dense};
}

// --- matrices of a tile in shared memory ---

// Numbers of 16 samples, in columns, of which 8 n + 2 q and the next are a slot, 4 n + q. A lane writes a slot of samples g
// and g + 8 as a four: x, y of the one column, z, w of the other. Another one reads it, and that of samples four further,
// as operands whose inner indices are samples: one first operand (Samples), or two second ones (Columns). In float16 all
// that a lane reads lies together, as it will take it; lanes with odd q have the samples that are four further first, which
// does not matter: both operands of a product have it so. Slots are permuted by row so that few meet a bank twice.
constexpr int TILE_ROWS = FP32 ? 8 : 4;
DEV int permuted(int row) { return FP32 ? (row & 1) * 20 | (row & 2) << 2 : row << 3 | (row & 2) << 1; }

struct Samples {
  Four some, others;  // of samples q and q + 8; of q + 4 and q + 12
};
struct Columns {
  Two some[2], others[2];  // of two columns, the same samples
};

#if FP32
typedef float4 Slot;
#else
typedef uint4 Slot;  // also of samples four further
#endif
template <int ROW_WORDS>
DEV Slot *slot_at(const float *matrix, int row, int slot) {
  return (Slot *)(matrix + row * ROW_WORDS + (4 * slot ^ permuted(row)));
}

template <int ROW_WORDS>
DEV void store_samples(float *matrix, int slot, Four v) {
  int g = lane_id() >> 2;
#if FP32
  *slot_at<ROW_WORDS>(matrix, g, slot) = v;
#else
  ((uint2 *)slot_at<ROW_WORDS>(matrix, g & 3, slot))[g >> 2 ^ g & 1] = v;
#endif
}

template <int ROW_WORDS>
DEV Samples load_samples(const float *matrix, int slot) {
  int q = lane_id() & 3;
#if FP32
  return {*slot_at<ROW_WORDS>(matrix, q, slot), *slot_at<ROW_WORDS>(matrix, q + 4, slot)};
#else
  uint4 both = *slot_at<ROW_WORDS>(matrix, q, slot);
  return {{both.x, both.y}, {both.z, both.w}};
#endif
}

template <int ROW_WORDS>
DEV void store_columns(float *matrix, int slot, Four v) {
#if FP32
  store_samples<ROW_WORDS>(matrix, slot, v);
#else
  int g = lane_id() >> 2;
  u32 *at = (u32 *)slot_at<ROW_WORDS>(matrix, g & 3, slot) + (g >> 2 ^ g & 1);
  at[0] = v.x;
  at[2] = v.y;
#endif
}

template <int ROW_WORDS>
DEV Columns load_columns(const float *matrix, int slot) {
#if FP32
  Samples s = load_samples<ROW_WORDS>(matrix, slot);
  return {{left(s.some), right(s.some)}, {left(s.others), right(s.others)}};
#else
  uint4 both = *slot_at<ROW_WORDS>(matrix, lane_id() & 3, slot);
  return {{both.x, both.z}, {both.y, both.w}};
#endif
}

// A warp's tile has four such matrices, side by side, so that one address of a lane does for all: activations,
// gradients before the activation, features, gradients of outputs. Then it has gradients of the density, as the second
// operand of a product; then as many zeros.
constexpr int HIDDEN_AT = 0, G_HIDDEN_AT = 2 * HIDDEN, FEATURES_AT = 4 * HIDDEN, G_OUT_AT = FEATURES_AT + 16 * STEPS;
constexpr int TILE_ROW = G_OUT_AT + 32 * ((COLOR_TILES + 1) / 2);
constexpr int DENSE_AT = TILE_ROWS * TILE_ROW, TILE_FLOATS = DENSE_AT + 8 * WORDS;

// Of the 8 columns from 8 n on, and of those and the next 8.
DEV void store_samples(float *tile, int at, int n, Four v) { store_samples<TILE_ROW>(tile + at, 4 * n + (lane_id() & 3), v); }
DEV void store_columns(float *tile, int at, int n, Four v) { store_columns<TILE_ROW>(tile + at, 4 * n + (lane_id() & 3), v); }
DEV Samples load_samples(const float *tile, int at, int n) { return load_samples<TILE_ROW>(tile + at, 4 * n + (lane_id() >> 2)); }
DEV Columns load_columns(const float *tile, int at, int n) { return load_columns<TILE_ROW>(tile + at, 4 * n + (lane_id() >> 2)); }

// --- forward ---

// Hidden units from 8 n on, 16 of them, before their activation. Two products go side by side, because each waits for the
// one before.
DEV void mlp_hidden(const Mlp &mlp, const Four (&f)[CHUNKS][2], int n, float (&h)[2][4]) {
  asm volatile("" ::: "memory");  // weights are read when they are needed: there are no registers for more
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    float2 bias = *(const float2 *)(mlp.b1 + 8 * (n + u) + 2 * (lane_id() & 3));
    h[u][0] = h[u][2] = bias.x;
    h[u][1] = h[u][3] = bias.y;
  }
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    Four w[2];
    load_pair(mlp.w1, n / 2 * CHUNKS + i, w);
#pragma unroll
    for (int u = 0; u < 2; ++u) mma(h[u], f[i][0], f[i][1], left(w[u]), right(w[u]));
  }
}

// f: features, first operands: [16s][their halves]. out[tile][e]: column 8 tile + 2 q + (e & 1) of row g + 8 (e >> 1).
// Colors come before their sigmoid2. dense: densities of rows g and g + 8, in all lanes of a row; or null. They are no
// matrix product: one rounding of its weights would move all densities, and all that hangs on them. KEEP: activations go
// to the tile, and their slopes to `slope`. AHEAD: products are begun before the activations of those before them are
// found.
template <bool KEEP, bool AHEAD>
DEV void mlp_forward(const Mlp &mlp, const Four (&f)[CHUNKS][2], float *tile, Four (&slope)[8], float (&out)[COLOR_TILES][4],
                     float *dense = nullptr) {
  int q = lane_id() & 3;
#pragma unroll
  for (int j = 0; j < COLOR_TILES; ++j) {
    float2 bias = *(const float2 *)(mlp.b2 + 8 * j + 2 * q);
    out[j][0] = out[j][2] = bias.x;
    out[j][1] = out[j][3] = bias.y;
  }
  if (dense) dense[0] = dense[1] = 0.f;
  float next[2][4];
  if (AHEAD) mlp_hidden(mlp, f, 0, next);
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
    float h[2][4];
    if (!AHEAD) mlp_hidden(mlp, f, n, next);
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int e = 0; e < 4; ++e) h[u][e] = next[u][e];
    if (AHEAD && n < 6) mlp_hidden(mlp, f, n + 2, next);
    Four a[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int e = 0; e < 4; ++e) h[u][e] = softplus2(h[u][e]);
      a[u] = four(h[u][0], h[u][1], h[u][2], h[u][3]);
    }
#pragma unroll
    for (int j = 0; j < COLOR_TILES; ++j) {
      Four w = mlp.w2[(4 * j + n / 2) * 32 + lane_id()];
      mma(out[j], a[0], a[1], left(w), right(w));
    }
    if (dense) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        float2 w = *(const float2 *)(mlp.dense + 8 * (n + u) + 2 * q);
#pragma unroll
        for (int e = 0; e < 4; ++e) dense[e >> 1] = fmaf(e & 1 ? w.y : w.x, h[u][e], dense[e >> 1]);
      }
    }
    if (KEEP) {
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        store_samples(tile, HIDDEN_AT, n + u, crossed(a[u]));
        float s[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) s[e] = 1.f - fast_exp2(-h[u][e]);  // the slope of softplus2, from its value
        slope[n + u] = four(s[0], s[1], s[2], s[3]);
      }
    }
  }
  if (dense) {
#pragma unroll
    for (int r = 0; r < 2; ++r) dense[r] = row_sum(dense[r]) + mlp.dense[HIDDEN];
  }
}
