// SPDX-License-Identifier: Apache-2.0
// A 3 x 3 convolution of repeated pixels, as a 2 x 2 convolution.
#pragma once
#include "common.cuh"

// Which of three taps, along one side, fall on the same pixel: bit k of [phase][tap].
DEV int taps(int phase, int tap) { return phase == 0 ? (tap == 0 ? 1 : 6) : (tap == 0 ? 3 : 4); }

// float32 weights [O, 3, 3, I] to numbers [2, 2, O, 2, 2, I]: those of each phase's convolution. Channels are I, pixels
// are O.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) fold_weights(const Params a) {
  i64 columns = a.channels / 8, i = blockIdx.x * (i64)THREADS + threadIdx.x;
  if (i >= 16 * a.pixels * columns) return;
  int tap = (int)(i / columns % 4), phase = (int)(i / columns / 4 / a.pixels);
  i64 output = i / columns / 4 % a.pixels, column = i % columns;
  int rows = taps(phase >> 1, tap >> 1), cols = taps(phase & 1, tap & 1);
  Eight sum = {};
  for (int k = 0; k < 9; ++k) {
    if (!(rows >> k / 3 & 1 && cols >> k % 3 & 1)) continue;
    Eight w = floats(a.weight, (output * 9 + k) * columns + column);
    for (int e = 0; e < 8; ++e) sum.v[e] += w.v[e];
  }
  store(a.out, i, sum);
}

// The gradient of that: x as `fold_weights` writes, gradients as it reads.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) unfold_weights(const Params a) {
  i64 columns = a.channels / 8, i = blockIdx.x * (i64)THREADS + threadIdx.x;
  if (i >= 9 * a.pixels * columns) return;
  int k = (int)(i / columns % 9);
  i64 output = i / columns / 9, column = i % columns;
  Eight sum = {};
  for (int j = 0; j < 16; ++j) {
    int phase = j >> 2, tap = j & 3;
    if (!(taps(phase >> 1, tap >> 1) >> k / 3 & 1 && taps(phase & 1, tap & 1) >> k % 3 & 1)) continue;
    Eight w = load(a.x, ((phase * a.pixels + output) * 4 + tap) * columns + column);
    for (int e = 0; e < 8; ++e) sum.v[e] += w.v[e];
  }
  float4 *to = (float4 *)a.gradients;
  to[2 * i] = {sum.v[0], sum.v[1], sum.v[2], sum.v[3]}, to[2 * i + 1] = {sum.v[4], sum.v[5], sum.v[6], sum.v[7]};
}

// [images, height + 1, width + 1, 2, 2, C] to [images, 2 height, 2 width, C] + bias: each phase has each second pixel.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) weave(const Params a) {
  Place p = place_of(a);
  i64 columns = a.channels / 8;
  Eight bias = a.bias ? floats(a.bias, p.column) : Eight{};
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    unsigned wide = 2 * (unsigned)a.width, pixel = p.pixel + k * p.rows, row = pixel / wide, column = pixel % wide;
    unsigned v = row & 1, u = column & 1;
    i64 from = (p.image * (a.height + 1) + row / 2 + v) * (a.width + 1) + column / 2 + u;
    Eight y = load(a.x, (from * 4 + v * 2 + u) * columns + p.column);
    for (int i = 0; i < 8; ++i) y.v[i] += bias.v[i];
    store(a.out, at, y);
  }
}

// The gradient of that. Here channels are those of all phases together, and pixels those of the wide grid.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) unweave(const Params a) {
  Place p = place_of(a);
  i64 columns = a.channels / 32;
  int phase = p.column / (int)columns, v = phase >> 1, u = phase & 1;
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    unsigned wide = (unsigned)a.width + 1, pixel = p.pixel + k * p.rows;
    int row = (int)(pixel / wide) - v, column = (int)(pixel % wide) - u;
    Eight y = {};
    if (row >= 0 && row < a.height && column >= 0 && column < a.width) {
      i64 from = (p.image * 2 * a.height + 2 * row + v) * 2 * a.width + 2 * column + u;
      y = load(a.x, from * columns + p.column % columns);
    }
    store(a.out, at, y);
  }
}
