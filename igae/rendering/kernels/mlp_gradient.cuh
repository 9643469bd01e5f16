// SPDX-License-Identifier: Apache-2.0
// Gradients of the MLP: each warp of a block owns a part of the hidden units, and adds up over all of the block's samples.
#pragma once
#include "common.cuh"

constexpr int UNITS = 4 / WARPS;  // 16s of hidden units a warp owns
constexpr int B2_TILES = (TILES + WARPS - 1) / WARPS;
constexpr int PARTIAL = HIDDEN * C + HIDDEN + (1 + OUT) * HIDDEN + 1 + OUT;  // floats of all gradients
constexpr int H_FLOATS = 8 * H_ROW, F_FLOATS = 8 * F_ROW, O_FLOATS = 8 * O_ROW;
constexpr int TILE_FLOATS = 2 * H_FLOATS + F_FLOATS + O_FLOATS;

// Gradients of a block's hidden units: rows 16 (UNITS warp + u) + g (+ 8) of the products' layouts.
struct MlpGradient {
  float w1[UNITS][STEPS][4], b1[UNITS][4], w2[UNITS][TILES][4];
  float b2[B2_TILES];  // of outputs 8 (warp + WARPS i) + g
};

struct Tile {
  float *h, *g_h, *f, *g_out;  // matrices: activations, gradients before the activation, features, gradients of outputs
};

DEV Tile tile_at(float *place) {
  return {place, place + H_FLOATS, place + 2 * H_FLOATS, place + 2 * H_FLOATS + F_FLOATS};
}

// Adds a tile's share to the gradients of this warp's hidden units.
DEV void accumulate(const Tile &tile, int warp, MlpGradient &grad) {
  int g = lane_id() >> 2, q = lane_id() & 3, units = 32 * UNITS * warp;
  int column[2] = {permuted(q, 2 * g), permuted(q, 2 * g + 16)};  // of the even and the odd eight columns
  float one = g == 0 ? 1.f : 0.f;
#pragma unroll
  for (int s = 0; s < 8; s += 4) {  // samples s + q and s + q + 8
    const float *g_h = tile.g_h + (s + q) * H_ROW + units, *h = tile.h + (s + q) * H_ROW + units;
    const float *f = tile.f + (s + q) * F_ROW, *g_out = tile.g_out + (s + q) * O_ROW;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      float2 low = *(const float2 *)(g_h + 32 * u + column[0]), high = *(const float2 *)(g_h + 32 * u + column[1]);
#pragma unroll
      for (int m = 0; m < STEPS; ++m) {
        float2 b = *(const float2 *)(f + 32 * (m >> 1) + column[m & 1]);
        mma(grad.w1[u][m], low.x, high.x, low.y, high.y, b.x, b.y);
      }
      mma(grad.b1[u], low.x, high.x, low.y, high.y, one, one);
      low = *(const float2 *)(h + 32 * u + column[0]), high = *(const float2 *)(h + 32 * u + column[1]);
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        float2 b = *(const float2 *)(g_out + 32 * (j >> 1) + column[j & 1]);
        mma(grad.w2[u][j], low.x, high.x, low.y, high.y, b.x, b.y);
        if (u == 0 && j % WARPS == warp) grad.b2[j / WARPS] += b.x + b.y;
      }
    }
  }
}

// Writes the block's sums, as the weights lie in memory: w1, b1, w2, b2.
DEV void store(float *to, int warp, const MlpGradient &grad) {
  int lane = lane_id(), g = lane >> 2, q = lane & 3;
  float *to_b1 = to + HIDDEN * C, *to_w2 = to_b1 + HIDDEN, *to_b2 = to_w2 + (1 + OUT) * HIDDEN;
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int unit = 16 * (UNITS * warp + u) + g + (e & 2) * 4, column = 2 * q + (e & 1);
#pragma unroll
      for (int m = 0; m < STEPS; ++m) {
        int c = feature_of(m, column);
        if (c < C) to[unit * C + c] = CUT * CUT * LOG2E * grad.w1[u][m][e];
      }
      if (column == 0) to_b1[unit] = CUT * LOG2E * grad.b1[u][e];
#pragma unroll
      for (int j = 0; j < TILES; ++j)
        if (out_row(8 * j + column) >= 0) to_w2[out_row(8 * j + column) * HIDDEN + unit] = CUT * CUT * out_unit(8 * j + column) * grad.w2[u][j][e];
    }
#pragma unroll
  for (int i = 0; i < B2_TILES; ++i) {
    float sum = grad.b2[i];
    sum += __shfl_xor_sync(ALL, sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    int n = 8 * (warp + WARPS * i) + g;
    if (q == 0 && n <= OUT) to_b2[out_row(n)] = n < OUT ? LOG2E * sum : sum;
  }
}
