// SPDX-License-Identifier: Apache-2.0
// Gradients of the MLP: each warp of a block owns a part of the hidden units, and adds up over all of the block's samples.
#pragma once
#include "common.cuh"

constexpr int UNITS = 4 / WARPS;  // 16s of hidden units a warp owns
constexpr int PARTIAL = HIDDEN * C + HIDDEN + (1 + OUT) * HIDDEN + 1 + OUT;  // floats of all gradients
// After its matrices a tile has gradients of the density, of samples g and g + 8 in pairs; then as many zeros.
constexpr int DENSE_AT = 8 * TILE_ROW, TILE_FLOATS = DENSE_AT + 32;

// Gradients of a block's hidden units: rows g, g + 8 of the products' layouts are units 16 (UNITS warp + u) + 2 g, + 1.
struct MlpGradient {
  float w1[UNITS][STEPS][4], w2[UNITS][COLOUR_TILES][4];
  float rest[UNITS][4];       // column 0: b1; column 1: the density's row of w2
  float b2[COLOUR_TILES];     // of output_column(j, g), from every fourth of the warp's own samples, from q on
  float dense;                // g == 1: the same of the density
};

// The column of which a product of B operands that lie in quads has column `column` of tile j.
DEV int quad_column(int j, int column) { return 8 * (2 * (j >> 1) + (column >> 2)) + 2 * (column & 3) + (j & 1); }
// Of outputs there may be a last tile on its own, which is read in pairs.
DEV int output_column(int j, int column) { return j + 1 == COLOUR_TILES && COLOUR_TILES % 2 == 1 ? 8 * j + column : quad_column(j, column); }

// Adds a tile's share to the gradients of this warp's hidden units. OWN: it is the warp's, and goes to the gradient of b2.
template <bool OWN>
DEV void accumulate(const float *tile, int warp, MlpGradient &grad) {
  int g = lane_id() >> 2, q = lane_id() & 3, place = q * TILE_ROW + permuted(q, 4 * g);
  float one = g == 0 ? 1.f : 0.f;
#pragma unroll
  for (int s = 0; s < 8; s += 4) {  // samples s + q and s + q + 8
    const float *row = tile + place + s * TILE_ROW, *units = row + 32 * UNITS * warp;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      float4 a = *(const float4 *)(units + G_HIDDEN_AT + 32 * u);
#pragma unroll
      for (int m = 0; m < STEPS; m += 2) {
        float4 b = *(const float4 *)(row + FEATURES_AT + 16 * m);
        mma(grad.w1[u][m], a.x, a.y, a.z, a.w, b.x, b.y);
        mma(grad.w1[u][m + 1], a.x, a.y, a.z, a.w, b.z, b.w);
      }
      mma(grad.rest[u], a.x, a.y, a.z, a.w, one, one);
      a = *(const float4 *)(units + HIDDEN_AT + 32 * u);
      float2 d = *(const float2 *)(tile + DENSE_AT + (g == 1 ? 0 : 16) + 2 * (s + q));
      mma(grad.rest[u], a.x, a.y, a.z, a.w, d.x, d.y);
      if (OWN && u == 0) grad.dense += d.x + d.y;
#pragma unroll
      for (int j = 0; j + 1 < COLOUR_TILES; j += 2) {
        float4 b = *(const float4 *)(row + G_OUT_AT + 16 * j);
        mma(grad.w2[u][j], a.x, a.y, a.z, a.w, b.x, b.y);
        mma(grad.w2[u][j + 1], a.x, a.y, a.z, a.w, b.z, b.w);
        if (OWN && u == 0) {
          grad.b2[j] += b.x + b.y;
          grad.b2[j + 1] += b.z + b.w;
        }
      }
      if (COLOUR_TILES % 2 == 1) {
        const float *last = tile + (s + q) * TILE_ROW + G_OUT_AT + 16 * (COLOUR_TILES - 1);
        float2 b = *(const float2 *)(last + permuted(q, 2 * g));
        mma(grad.w2[u][COLOUR_TILES - 1], a.x, a.y, a.z, a.w, b.x, b.y);
        if (OWN && u == 0) grad.b2[COLOUR_TILES - 1] += b.x + b.y;
      }
    }
  }
}

// Writes the block's sums, as the weights lie in memory: w1, b1, w2, b2. shared: scratch, of COLUMNS numbers a warp.
DEV void store(float *to, int warp, const MlpGradient &grad, float *shared) {
  constexpr int COLUMNS = 1 + 8 * COLOUR_TILES;
  int lane = lane_id(), g = lane >> 2, q = lane & 3;
  float *to_b1 = to + HIDDEN * C, *to_w2 = to_b1 + HIDDEN, *to_b2 = to_w2 + (1 + OUT) * HIDDEN;
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int unit = 16 * (UNITS * warp + u) + 2 * g + (e >> 1), column = 2 * q + (e & 1);
#pragma unroll
      for (int m = 0; m < STEPS; ++m) {
        int found = quad_column(m, column), c = feature_of(found >> 3, found & 7);
        if (c < C) to[unit * C + c] = CUT * LOG2E * grad.w1[u][m][e];
      }
      if (column == 0) to_b1[unit] = CUT * LOG2E * grad.rest[u][e];
      if (column == 1) to_w2[unit] = CUT * CUT * LN2 * grad.rest[u][e];
#pragma unroll
      for (int j = 0; j < COLOUR_TILES; ++j) {
        int n = output_column(j, column);
        if (n < OUT) to_w2[(1 + n) * HIDDEN + unit] = CUT * CUT * grad.w2[u][j][e];
      }
    }
#pragma unroll
  for (int j = 0; j < COLOUR_TILES; ++j) {
    float sum = row_sum(grad.b2[j]);
    if (q == 0) shared[COLUMNS * warp + 1 + output_column(j, g)] = sum;
  }
  float dense = row_sum(grad.dense);
  if (lane == 4) shared[COLUMNS * warp] = dense;
  __syncthreads();
#pragma unroll 1
  for (int n = threadIdx.x; n <= OUT; n += 32 * WARPS) {
    float sum = 0.f;
    for (int w = 0; w < WARPS; ++w) sum += shared[COLUMNS * w + n];
    to_b2[n] = n > 0 ? LOG2E * sum : sum;
  }
}
