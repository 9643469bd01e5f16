// SPDX-License-Identifier: Apache-2.0
// Gradients of the MLP: each warp of a block owns a part of the hidden units, and adds up over all of the block's samples.
#pragma once
#include "common.cuh"

constexpr int UNITS = 4 / WARPS;  // 16s of hidden units a warp owns
constexpr int PARTIAL = HIDDEN * C + HIDDEN + (1 + OUT) * HIDDEN + 1 + OUT;  // floats of all gradients
constexpr int H_FLOATS = 8 * H_ROW, F_FLOATS = 8 * F_ROW, O_FLOATS = 8 * O_ROW, D_FLOATS = ALONE ? 32 : 0;
constexpr int TILE_FLOATS = 2 * H_FLOATS + F_FLOATS + O_FLOATS + D_FLOATS;

// Gradients of a block's hidden units: rows g, g + 8 of the products' layouts are units 16 (UNITS warp + u) + 2 g, + 1.
struct MlpGradient {
  float w1[UNITS][STEPS][4], w2[UNITS][COLOUR_TILES][4];
  float rest[UNITS][4];       // column 0: b1; column 1: of w2, what belongs to a density that is ALONE
  float b2[COLOUR_TILES][2];  // of outputs 8 j + 2 q + e, from the warp's own samples g and g + 8
  float dense;                // the same of a density that is ALONE
};

struct Tile {
  float *h, *g_h, *f, *g_out;  // matrices: activations, gradients before the activation, features, gradients of outputs
  float *dense;  // gradients of a density that is ALONE, of samples g and g + 8 in pairs; then as many zeros
};

DEV Tile tile_at(float *place) {
  return {place, place + H_FLOATS, place + 2 * H_FLOATS, place + 2 * H_FLOATS + F_FLOATS,
          place + 2 * H_FLOATS + F_FLOATS + O_FLOATS};
}

// The column of which a product of B operands that lie in quads has column `column` of tile j.
DEV int quad_column(int j, int column) { return 8 * (2 * (j >> 1) + (column >> 2)) + 2 * (column & 3) + (j & 1); }
// Of outputs there may be a last tile on its own, which is read in pairs.
DEV int output_column(int j, int column) { return j + 1 == COLOUR_TILES && COLOUR_TILES % 2 == 1 ? 8 * j + column : quad_column(j, column); }

// Adds a tile's share to the gradients of this warp's hidden units.
DEV void accumulate(const Tile &tile, int warp, MlpGradient &grad) {
  int g = lane_id() >> 2, q = lane_id() & 3, units = 32 * UNITS * warp, column = permuted(q, 4 * g);
  float one = g == 0 ? 1.f : 0.f;
#pragma unroll
  for (int s = 0; s < 8; s += 4) {  // samples s + q and s + q + 8
    const float *g_h = tile.g_h + (s + q) * H_ROW + units + column, *h = tile.h + (s + q) * H_ROW + units + column;
    const float *f = tile.f + (s + q) * F_ROW + column, *g_out = tile.g_out + (s + q) * O_ROW;
    const float *dense = tile.dense + (g == 1 ? 0 : 16) + 2 * (s + q);
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      float4 a = *(const float4 *)(g_h + 32 * u);
#pragma unroll
      for (int m = 0; m < STEPS; m += 2) {
        float4 b = *(const float4 *)(f + 16 * m);
        mma(grad.w1[u][m], a.x, a.y, a.z, a.w, b.x, b.y);
        mma(grad.w1[u][m + 1], a.x, a.y, a.z, a.w, b.z, b.w);
      }
      mma(grad.rest[u], a.x, a.y, a.z, a.w, one, one);
      a = *(const float4 *)(h + 32 * u);
      if (ALONE) {
        float2 b = *(const float2 *)dense;
        mma(grad.rest[u], a.x, a.y, a.z, a.w, b.x, b.y);
      }
#pragma unroll
      for (int j = 0; j + 1 < COLOUR_TILES; j += 2) {
        float4 b = *(const float4 *)(g_out + 16 * j + column);
        mma(grad.w2[u][j], a.x, a.y, a.z, a.w, b.x, b.y);
        mma(grad.w2[u][j + 1], a.x, a.y, a.z, a.w, b.z, b.w);
      }
      if (COLOUR_TILES % 2 == 1) {
        float2 b = *(const float2 *)(g_out + 16 * (COLOUR_TILES - 1) + permuted(q, 2 * g));
        mma(grad.w2[u][COLOUR_TILES - 1], a.x, a.y, a.z, a.w, b.x, b.y);
      }
    }
  }
}

// Writes the block's sums, as the weights lie in memory: w1, b1, w2, b2. shared: scratch, of 8 TILES numbers a warp.
DEV void store(float *to, int warp, const MlpGradient &grad, float *shared) {
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
      if (ALONE && column == 1) to_w2[out_row(OUT) * HIDDEN + unit] = CUT * CUT * out_unit(OUT) * grad.rest[u][e];
#pragma unroll
      for (int j = 0; j < COLOUR_TILES; ++j) {
        int n = output_column(j, column);
        if (out_row(n) >= 0) to_w2[out_row(n) * HIDDEN + unit] = CUT * CUT * out_unit(n) * grad.w2[u][j][e];
      }
    }
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = j < COLOUR_TILES ? grad.b2[j < COLOUR_TILES ? j : 0][e] : grad.dense;
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) sum += __shfl_xor_sync(ALL, sum, d);
      if (g == 0) shared[8 * (TILES * warp + j) + 2 * q + e] = sum;
    }
  __syncthreads();
  for (int n = threadIdx.x; n <= OUT; n += 32 * WARPS) {
    float sum = 0.f;
    for (int w = 0; w < WARPS; ++w) sum += shared[8 * TILES * w + n];
    to_b2[out_row(n)] = n < OUT ? LOG2E * sum : sum;
  }
}
