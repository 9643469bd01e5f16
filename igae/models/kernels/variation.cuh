// SPDX-License-Identifier: Apache-2.0
// Total variation of planes: float32, [images, height, width, C], and weights of the images.
#pragma once
#include "common.cuh"

DEV bool next_of(const Params &a, const Place &p, int row, int column, Eight &other) {
  if (row < 0 || row >= a.height || column < 0 || column >= a.width) return false;
  other = floats((const float *)a.x, (p.image * a.pixels + row * a.width + column) * (a.channels / 8) + p.column);
  return true;
}

// The sum of each chunk, [images, chunks]; `sums` is that here.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) variation(const Params a) {
  Place p = place_of(a);
  float weight = a.weight[p.image], down = weight / ((a.height - 1) * a.width * a.channels);
  float right = weight / (a.height * (a.width - 1) * a.channels), sum = 0.f;
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    unsigned wide = (unsigned)a.width, pixel = p.pixel + k * p.rows;
    int row = (int)(pixel / wide), column = (int)(pixel % wide);
    Eight own = floats((const float *)a.x, at), other;
    if (next_of(a, p, row + 1, column, other))
      for (int i = 0; i < 8; ++i) sum += down * (other.v[i] - own.v[i]) * (other.v[i] - own.v[i]);
    if (next_of(a, p, row, column + 1, other))
      for (int i = 0; i < 8; ++i) sum += right * (other.v[i] - own.v[i]) * (other.v[i] - own.v[i]);
  }
  write_block_sum(a, sum);
}

// Its gradient times *shift.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) variation_gradient(const Params a) {
  Place p = place_of(a);
  float weight = 2.f * a.weight[p.image] * *a.shift, vertical = weight / ((a.height - 1) * a.width * a.channels);
  float horizontal = weight / (a.height * (a.width - 1) * a.channels);
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    unsigned wide = (unsigned)a.width, pixel = p.pixel + k * p.rows;
    int row = (int)(pixel / wide), column = (int)(pixel % wide);
    Eight own = floats((const float *)a.x, at), other, d = {};
#pragma unroll
    for (int side = 0; side < 4; ++side) {
      int step = side & 1 ? 1 : -1;
      float factor = side < 2 ? vertical : horizontal;
      if (next_of(a, p, row + (side < 2 ? step : 0), column + (side < 2 ? 0 : step), other))
        for (int i = 0; i < 8; ++i) d.v[i] += factor * (own.v[i] - other.v[i]);
    }
    float4 *to = (float4 *)a.out;
    i64 i = at;
    to[2 * i] = {d.v[0], d.v[1], d.v[2], d.v[3]}, to[2 * i + 1] = {d.v[4], d.v[5], d.v[6], d.v[7]};
  }
}
