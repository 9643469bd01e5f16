// SPDX-License-Identifier: Apache-2.0
// The distance of two networks' features that LPIPS takes: x and y, [images, pixels, C], and `weight` [C].
#pragma once
#include "common.cuh"

// A pixel has `width` lanes, each with every width-th eight channels; a chunk's pixels go round among a block's groups.
struct Pixels {
  i64 image;
  int first, step, end, lane, width, columns;
};
DEV Pixels pixels_of(const Params &a) {
  Pixels p;
  p.columns = (int)a.channels / 8;
  for (p.width = 1; p.width < p.columns && p.width < 32;) p.width *= 2;
  int chunks = (int)a.chunks, pixels = (int)a.pixels, each = (pixels + chunks - 1) / chunks;
  int start = blockIdx.x % chunks * each;
  p.image = blockIdx.x / chunks, p.lane = (int)threadIdx.x % p.width;
  p.first = start + (int)threadIdx.x / p.width, p.step = THREADS / p.width, p.end = min(start + each, pixels);
  return p;
}
DEV float lanes_sum(const Pixels &p, float v) {
  for (int d = p.width / 2; d > 0; d /= 2) v += __shfl_xor_sync(ALL, v, d);
  return v;
}

// One over the lengths of x and y at a pixel, or 0 where it has none.
struct Inverse {
  float x, y;
};
DEV Inverse inverse_lengths(const Params &a, const Pixels &p, i64 at, bool inside) {
  float xx = 0.f, yy = 0.f;
  for (int c = p.lane; c < p.columns && inside; c += p.width) {
    Eight x = load(a.x, at + c), y = load(a.y, at + c);
    for (int i = 0; i < 8; ++i) xx += x.v[i] * x.v[i], yy += y.v[i] * y.v[i];
  }
  xx = lanes_sum(p, xx), yy = lanes_sum(p, yy);
  return {xx > a.eps * a.eps ? rsqrtf(xx) : 0.f, yy > a.eps * a.eps ? rsqrtf(yy) : 0.f};
}

// sum_c weight (x / |x| - y / |y|)^2, over each chunk's pixels, [images, chunks]; `sums` is that here.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) feature_distance(const Params a) {
  Pixels p = pixels_of(a);
  float sum = 0.f;
  // Lanes of a warp that have no pixel go along: they are needed in its sums.
  for (int pixel = p.first; pixel - (int)threadIdx.x / p.width < p.end; pixel += p.step) {
    bool inside = pixel < p.end;
    i64 at = (p.image * a.pixels + pixel) * p.columns;
    Inverse inverse = inverse_lengths(a, p, at, inside);
    for (int c = p.lane; c < p.columns && inside; c += p.width) {
      Eight x = load(a.x, at + c), y = load(a.y, at + c), w = floats(a.weight, c);
      for (int i = 0; i < 8; ++i) {
        float d = inverse.x * x.v[i] - inverse.y * y.v[i];
        sum += w.v[i] * d * d;
      }
    }
  }
  write_block_sum(a, sum);
}

// The gradient of x, of which image i's distance counts shift[i].
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) feature_distance_gradient(const Params a) {
  Pixels p = pixels_of(a);
  float factor = 2.f * a.shift[p.image];
  for (int pixel = p.first; pixel - (int)threadIdx.x / p.width < p.end; pixel += p.step) {
    bool inside = pixel < p.end;
    i64 at = (p.image * a.pixels + pixel) * p.columns;
    Inverse inverse = inverse_lengths(a, p, at, inside);
    float along = 0.f;  // what changes only the length of x / |x|
    for (int c = p.lane; c < p.columns && inside; c += p.width) {
      Eight x = load(a.x, at + c), y = load(a.y, at + c), w = floats(a.weight, c);
      for (int i = 0; i < 8; ++i) along += w.v[i] * (inverse.x * x.v[i] - inverse.y * y.v[i]) * inverse.x * x.v[i];
    }
    along = lanes_sum(p, along);
    for (int c = p.lane; c < p.columns && inside; c += p.width) {
      Eight x = load(a.x, at + c), y = load(a.y, at + c), w = floats(a.weight, c);
      for (int i = 0; i < 8; ++i)
        x.v[i] = factor * inverse.x * (w.v[i] * (inverse.x * x.v[i] - inverse.y * y.v[i]) - along * inverse.x * x.v[i]);
      store(a.out, at + c, x);
    }
  }
}
