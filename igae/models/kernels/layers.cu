// SPDX-License-Identifier: Apache-2.0
// What lies between an autoencoder's convolutions, the total variation of planes and LPIPS's distance. What is computed is
// defined in igae/models/layers.py, losses.py and lpips.py. Tensors have channels last; numbers are bfloat16 (HALF = 1) or float32, sums are
// float32. The order of all sums is fixed: equal calls give equal bits.
//
// Most kernels walk over pixels with a thread for eight channels: a block has `chunks` to the image, its threads are
// `rows` of pixels by C / 8.
// No CUDA header is included: NVRTC has none.

#include "common.cuh"
#include "perceptual.cuh"
#include "phases.cuh"
#include "variation.cuh"

// --- group normalization, with what is added before and SiLU behind it ---

// Sums of x and of its square, both around the image's first pixel: squares of numbers far from 0 leave no digits.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) norm_sums(const Params a) {
  Place p = place_of(a, true);
  Eight pivot = load(a.x, p.image * a.pixels * (a.channels / 8) + p.column), sum = {}, square = {};
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    Eight x = load(a.x, at);
    for (int i = 0; i < 8; ++i) {
      float d = x.v[i] - pivot.v[i];
      sum.v[i] += d, square.v[i] += d * d;
    }
  }
  write_sums(a, p, sum, square);
}

extern "C" __global__ void __launch_bounds__(32) norm_coefficients(const Params a) {
  Group g = group_of(a);
  float *own = a.coefficients + g.image * COEFFICIENTS * a.channels + g.base;
  const float *weight = a.weight + g.base, *shift = a.shift + g.base, *bias = a.bias ? a.bias + g.base : nullptr;
  float mean = 0.f, variance = 0.f;
  for (int i = g.lane; i - g.lane < g.size; i += g.width) {
    float raw = chunk_sum(a, g, 0, i) / a.pixels;
    if (i >= g.size) continue;
    i64 first = g.image * a.pixels * a.channels + g.base + i;
    Eight pivots = load(a.x, first / 8);
#pragma unroll
    for (int k = 0; k < 8; ++k) raw += first % 8 == k ? pivots.v[k] : 0.f;
    own[MEAN * a.channels + i] = raw;
    mean += raw + (bias ? bias[i] : 0.f);
  }
  mean = group_sum(g, mean) / g.size;
  for (int i = g.lane; i - g.lane < g.size; i += g.width) {
    float offset = chunk_sum(a, g, 0, i) / a.pixels, square = chunk_sum(a, g, 1, i) / a.pixels;
    if (i >= g.size) continue;
    float further = own[MEAN * a.channels + i] + (bias ? bias[i] : 0.f) - mean;
    variance += max(square - offset * offset, 0.f) + further * further;
  }
  float inverse = rsqrtf(group_sum(g, variance) / g.size + a.eps);
  for (int i = threadIdx.x; i < g.size; i += 32) {
    float center = mean - (bias ? bias[i] : 0.f), scale = inverse * weight[i];
    own[SCALE * a.channels + i] = scale;
    own[SHIFT * a.channels + i] = shift[i] - scale * center;
    own[CENTER * a.channels + i] = center;
    own[INVERSE * a.channels + i] = inverse;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST) norm_apply(const Params a) {
  Place p = place_of(a);
  Eight scale = coefficient(a, p, SCALE), shift = coefficient(a, p, SHIFT);
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    Eight x = load(a.x, at);
    for (int i = 0; i < 8; ++i) {
      float z = scale.v[i] * x.v[i] + shift.v[i];
      x.v[i] = a.silu ? z * sigmoid(z) : z;
    }
    store(a.out, at, x);
  }
}

// The gradient of what `norm_apply` computes before SiLU.
DEV float before_silu(const Params &a, float gradient, float z) {
  if (!a.silu) return gradient;
  float s = sigmoid(z);
  return gradient * s * (1.f + z * (1.f - s));
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST) norm_gradient_sums(const Params a) {
  Place p = place_of(a, true);
  Eight scale = coefficient(a, p, SCALE), shift = coefficient(a, p, SHIFT), center = coefficient(a, p, CENTER);
  Eight sum = {}, product = {};
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    Eight x = load(a.x, at), y = load(a.y, at);
    for (int i = 0; i < 8; ++i) {
      float d = before_silu(a, y.v[i], scale.v[i] * x.v[i] + shift.v[i]);
      sum.v[i] += d, product.v[i] += d * (x.v[i] - center.v[i]);
    }
  }
  write_sums(a, p, sum, product);
}

// What `norm_gradient` needs of each group of each image, and its share of the weights' gradients.
extern "C" __global__ void __launch_bounds__(32) norm_gradient_means(const Params a) {
  Group g = group_of(a);
  const float *own = a.coefficients + g.image * COEFFICIENTS * a.channels + g.base, *weight = a.weight + g.base;
  float *to = a.gradients + g.image * 3 * a.channels + g.base;
  float inverse = own[INVERSE * a.channels], count = (float)(a.pixels * g.size), mean = 0.f, slope = 0.f;
  for (int i = g.lane; i - g.lane < g.size; i += g.width) {
    float sum = chunk_sum(a, g, 0, i), product = chunk_sum(a, g, 1, i);
    if (i >= g.size) continue;
    mean += weight[i] * sum, slope += weight[i] * product;
    to[i] = inverse * product, to[a.channels + i] = sum;
  }
  mean = group_sum(g, mean) * inverse / count, slope = group_sum(g, slope) * inverse * inverse * inverse / count;
  if (threadIdx.x == 0) {
    float *means = a.means + g.image * 2 * a.groups + blockIdx.x % (int)a.groups;
    means[0] = mean, means[a.groups] = slope;
  }
  for (int i = g.lane; i < g.size; i += g.width) {
    float far = own[MEAN * a.channels + i] - own[CENTER * a.channels + i];
    to[2 * a.channels + i] = own[SCALE * a.channels + i] * to[a.channels + i] - a.pixels * (mean + slope * far);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST) norm_gradient(const Params a) {
  Place p = place_of(a);
  Eight scale = coefficient(a, p, SCALE), shift = coefficient(a, p, SHIFT), center = coefficient(a, p, CENTER);
  // The first threads add up the weights' gradients.
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < 3 * (int)a.channels; i += gridDim.x * THREADS) {
    float sum = 0.f;
#pragma unroll 8
    for (int k = 0; k < (int)a.images; ++k) sum += a.gradients[k * 3 * a.channels + i];
    a.totals[i] = sum;
  }
  Eight constant, slope;
  int size = (int)(a.channels / a.groups);
  for (int i = 0; i < 8; ++i) {
    const float *own = a.means + p.image * 2 * a.groups + (8 * p.column + i) / size;
    slope.v[i] = own[a.groups], constant.v[i] = slope.v[i] * center.v[i] - own[0];
  }
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    Eight x = load(a.x, at), y = load(a.y, at), d = {};
    if (a.skip) d = load(a.skip, at);
    for (int i = 0; i < 8; ++i) {
      float before = before_silu(a, y.v[i], scale.v[i] * x.v[i] + shift.v[i]);
      d.v[i] += scale.v[i] * before + (constant.v[i] - slope.v[i] * x.v[i]);
    }
    store(a.out, at, d);
  }
}

// --- sums ---

// x + y + bias; without x: y + bias.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) bias_sum(const Params a) {
  Place p = place_of(a);
  Eight bias = a.bias ? floats(a.bias, p.column) : Eight{};
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    Eight y = load(a.y, at), x = {};
    if (a.x) x = load(a.x, at);
    for (int i = 0; i < 8; ++i) y.v[i] = x.v[i] + y.v[i] + bias.v[i];
    store(a.out, at, y);
  }
}
