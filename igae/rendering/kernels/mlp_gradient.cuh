// SPDX-License-Identifier: Apache-2.0
// Gradients of the MLP: each warp of a block owns a part of the hidden units, and adds up over all of the block's samples.
#pragma once
#include "mlp.cuh"

constexpr int UNITS = 4 / WARPS;  // 16s of hidden units a warp owns
constexpr int PARTIAL = HIDDEN * C + HIDDEN + (1 + OUT) * HIDDEN + 1 + OUT;  // floats of all gradients

// Gradients of a block's hidden units: rows g, g + 8 of the products' layouts are units 16 (UNITS warp + u) + 2 g, + 1.
struct MlpGradient {
  float w1[UNITS][STEPS][4], w2[UNITS][COLOR_TILES][4];
  float rest[UNITS][4];  // column 0: b1; column 1: the density's row of w2
};
// Sums of gradients of outputs, which are those of b2, over a warp's own samples, in shared memory: of each 8 colors columns
// 2 q and 2 q + 1 from a lane's rows; then of the density, from lanes with q = 0.
constexpr int BIAS_FLOATS = 64 * COLOR_TILES + 32;

// The feature that is column `column` of the 8 columns `step` of the features' matrix.
DEV int feature_of(int step, int column) { return 16 * (step >> 1) + 4 * (column >> 1) + 2 * (step & 1) + (column & 1); }
// The column of which a product of second operands that lie in slots has column `column` of tile j.
DEV int slot_column(int j, int column) { return 8 * (2 * (j >> 1) + (column >> 2)) + 2 * (column & 3) + (j & 1); }
// Of outputs there may be a last tile on its own, whose slots are read by two lanes each.
DEV int output_column(int j, int column) { return j + 1 == COLOR_TILES && COLOR_TILES % 2 == 1 ? 8 * j + column : slot_column(j, column); }

// Gradients of the density of rows g, g + 8, for accumulate.
DEV void store_dense(float *tile, float first, float second) {
  int g = lane_id() >> 2;
  if ((lane_id() & 3) == 0) ((Two *)(tile + DENSE_AT))[FP32 ? g : 2 * (g & 3) + (g >> 2 ^ g & 1)] = two(first, second);
}
DEV void clear_dense(float *tile) {  // what is behind them
  if (lane_id() < 4 * WORDS) tile[DENSE_AT + 4 * WORDS + lane_id()] = 0.f;
}

// Adds a tile's share to the gradients of this warp's hidden units.
DEV void accumulate(const float *tile, int warp, MlpGradient &grad) {
  int g = lane_id() >> 2, q = lane_id() & 3;
  Two one = g == 0 ? two(1.f, 1.f) : two(0.f, 0.f);
#pragma unroll
  for (int u = 0; u < UNITS; ++u) {
    int units = 2 * (UNITS * warp + u);
    Samples a = load_samples(tile, G_HIDDEN_AT, units);
#pragma unroll
    for (int m = 0; m < STEPS; m += 2) {
      Columns b = load_columns(tile, FEATURES_AT, m);
#pragma unroll
      for (int i = 0; i < 2; ++i) mma(grad.w1[u][m + i], a.some, a.others, b.some[i], b.others[i]);
    }
    mma(grad.rest[u], a.some, a.others, one, one);
    a = load_samples(tile, HIDDEN_AT, units);
    const Two *dense = (const Two *)(tile + DENSE_AT) + (g == 1 ? 0 : 8);
    if (FP32) mma(grad.rest[u], a.some, a.others, dense[q], dense[q + 4]);
    else mma(grad.rest[u], a.some, a.others, dense[2 * q], dense[2 * q + 1]);
#pragma unroll
    for (int j = 0; j + 1 < COLOR_TILES; j += 2) {
      Columns b = load_columns(tile, G_OUT_AT, j);
#pragma unroll
      for (int i = 0; i < 2; ++i) mma(grad.w2[u][j + i], a.some, a.others, b.some[i], b.others[i]);
    }
    if (COLOR_TILES % 2 == 1) {
      Columns b = load_columns<TILE_ROW>(tile + G_OUT_AT, 4 * (COLOR_TILES - 1) + (g >> 1));
      bool odd = g & 1;
      mma(grad.w2[u][COLOR_TILES - 1], a.some, a.others, odd ? b.some[1] : b.some[0], odd ? b.others[1] : b.others[0]);
    }
  }
}

// Part of the sums over all blocks: as many blocks add to it as there are rows for, or it is this block's alone.
DEV void put(float *at, float v) {
#if DETERMINISTIC
  *at = v;
#else
  atomicAdd(at, v);
#endif
}

// Gives the block's sums times `unit` to where the weights lie so in memory: w1, b1, w2, b2. biases: the first warp's, and
// how far those of the next are.
DEV void store(float *to, int warp, const MlpGradient &grad, float unit, const float *biases, int stride) {
  int lane = lane_id(), g = lane >> 2, q = lane & 3;
  float *to_b1 = to + HIDDEN * C, *to_w2 = to_b1 + HIDDEN, *to_b2 = to_w2 + (1 + OUT) * HIDDEN;
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int h = 16 * (UNITS * warp + u) + 2 * g + (e >> 1), column = 2 * q + (e & 1);
#pragma unroll
      for (int m = 0; m < STEPS; ++m) {
        int found = slot_column(m, column), c = feature_of(found >> 3, found & 7);
        if (c < C) put(to + h * C + c, LOG2E * unit * grad.w1[u][m][e]);
      }
      if (column == 0) put(to_b1 + h, LOG2E * unit * grad.rest[u][e]);
      if (column == 1) put(to_w2 + h, LN2 * unit * grad.rest[u][e]);
#pragma unroll
      for (int j = 0; j < COLOR_TILES; ++j) {
        int n = output_column(j, column);
        if (n < OUT) put(to_w2 + (1 + n) * HIDDEN + h, unit * grad.w2[u][j][e]);
      }
    }
#pragma unroll 1
  for (int n = threadIdx.x; n <= OUT; n += 32 * WARPS) {
    const float *of = biases + (n == 0 ? 64 * COLOR_TILES : 64 * (n - 1 >> 3) + (n - 1 & 7));
    float sum = 0.f;
    for (int w = 0; w < WARPS; ++w)
      for (int row = 0; row < 8; ++row) sum += of[w * stride + (n == 0 ? 4 : 8) * row];
    put(to_b2 + n, unit * (n > 0 ? LOG2E * sum : sum));
  }
}
