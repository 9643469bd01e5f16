// SPDX-License-Identifier: Apache-2.0
// A ray and its samples: docs/rendering.md in the order of its sections. All functions are called by whole warps.
#pragma once
#include "common.cuh"

constexpr float NEAREST = 1e-3f, LOG_LEAK = -23.0258509f, LEAK = 1e-10f, FAINT = 1e-6f;

// Axes of a plane along its columns and its rows.
DEV int column_axis(int plane) { return plane < 2 ? 0 : EG3D ? 2 : 1; }
DEV int row_axis(int plane) { return plane == 0 ? 1 : plane == 1 ? 2 : EG3D ? 0 : 2; }

// --- random numbers ---

DEV float uniform(u64 seed, u32 stage, u32 ray, u32 sample) {
  u32 x = (u32)seed, y = (u32)(seed >> 32) ^ stage, z = ray, w = sample;
  x = x * 1664525u + 1013904223u;
  y = y * 1664525u + 1013904223u;
  z = z * 1664525u + 1013904223u;
  w = w * 1664525u + 1013904223u;
#pragma unroll
  for (int turn = 0; turn < 2; ++turn) {
    x += y * w;
    y += z * x;
    z += x * y;
    w += y * z;
    if (turn == 0) {
      x ^= x >> 16;
      y ^= y >> 16;
      z ^= z >> 16;
      w ^= w >> 16;
    }
  }
  return (float)(w >> 8) * 5.9604644775390625e-8f;
}

DEV float jitter(const Params &p, const float *noise, u32 stage, int count, int ray, int sample) {
  if (p.jitter == JITTER_HALF) return 0.5f;
  if (p.jitter == JITTER_NOISE) return noise[(long long)ray * count + sample];
  u64 seed = p.jitter == JITTER_TENSOR ? (u64)*p.seed : p.seed_value;
  return uniform(seed, stage, ray, sample);
}

// --- rays ---

struct Ray {
  float o[3], d[3], near, far, scale;  // scale: texels a unit of length
  int scene, pixel;
  bool hit;
};

DEV Ray make_ray(const Params &p, int index) {
  Ray ray;
  int pixels = p.height * p.width, view = index / pixels;
  ray.pixel = index - view * pixels;
  ray.scene = (int)p.scene[view];
  ray.scale = (float)p.resolution / p.box;
  int i = ray.pixel / p.width, j = ray.pixel - i * p.width;
  const float *k = p.intrinsics + view * 9, *m = p.cam2world + view * 16;
  float u = ((float)j + 0.5f) / (float)p.width, v = ((float)i + 0.5f) / (float)p.height;
  float y = (v - k[5]) / k[4], x = (u - k[2] - k[1] * y) / k[0], square = 0.f;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    ray.d[a] = m[4 * a] * x + m[4 * a + 1] * y + m[4 * a + 2];
    ray.o[a] = m[4 * a + 3];
    square += ray.d[a] * ray.d[a];
  }
  float length = sqrtf(square);
#pragma unroll
  for (int a = 0; a < 3; ++a) ray.d[a] /= length;
  if (p.far > 0.f) {
    ray.near = p.near;
    ray.far = p.far;
    ray.hit = true;
    return ray;
  }
  float near = NEAREST * p.box, far = 3.4e38f, along = 0.f, half = 0.5f * p.box;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    float d = fabsf(ray.d[a]) < 1.0842022e-19f ? 1.0842022e-19f : ray.d[a];
    float first = (-half - ray.o[a]) / d, second = (half - ray.o[a]) / d;
    near = fmaxf(near, fminf(first, second));
    far = fminf(far, fmaxf(first, second));
    along += ray.o[a] * ray.d[a];
  }
  ray.hit = near < far && along == along;
  ray.near = ray.hit ? near : -(along > -NEAREST * p.box ? -NEAREST * p.box : along);
  ray.far = ray.hit ? far : ray.near;
  return ray;
}

DEV void coarse_depths(const Params &p, const Ray &ray, int index, float *t) {
#pragma unroll
  for (int k = lane_id(); k < K; k += 32) {
    float step = ((float)k + jitter(p, p.noise_coarse, 0x636F6172u, K, index, k)) / (float)(K - 1);
#if DISPARITY
    float first = 1.f / ray.near;
    t[k] = 1.f / (first + fminf(step, 1.f) * (1.f / ray.far - first));
#else
    t[k] = ray.near + step * (ray.far - ray.near);
#endif
  }
  __syncwarp();
}

// --- compositing ---

struct Interval {
  float mean, length, depth;  // raw density - 1, t, optical depth
};

DEV Interval interval(const float *t, const float *raw, int k) {
  float mean = 0.5f * (raw[k] + raw[k + 1]) - 1.f, length = t[k + 1] - t[k];
  return {mean, length, softplus_exact(mean) * length};
}

// Weights of the COUNT - 1 intervals between sorted samples, and (if wanted) what light reaches each.
template <int COUNT>
DEV void interval_weights(const float *t, const float *raw, float *weight, float *reach) {
  float passed = 0.f;
#pragma unroll
  for (int base = 0; base < COUNT - 1; base += 32) {
    int k = base + lane_id();
    bool valid = k < COUNT - 1;
    float depth = valid ? interval(t, raw, k).depth : 0.f;
    float high = fmaxf(-depth, LOG_LEAK), gap = fabsf(-depth - LOG_LEAK);
    float log_pass = valid ? high + log1pf(expf(-gap)) : 0.f;
    float sum = scan_sum(log_pass), before = __shfl_up_sync(ALL, sum, 1);
    float light = expf(passed + (lane_id() == 0 ? 0.f : before));
    if (valid) {
      weight[k] = -expm1f(-depth) * light;
      if (reach) reach[k] = light;
    }
    passed += __shfl_sync(ALL, sum, 31);
  }
  __syncwarp();
}

struct Totals {
  float opacity, moment, end, depth, free;  // sum w, sum w (t - end), last t, depth, and d depth / d (unclamped depth)
};

template <int COUNT>
DEV Totals totals(const float *t, const float *weight) {
  Totals sum = {0.f, 0.f, t[COUNT - 1], 0.f, 0.f};
#pragma unroll
  for (int k = lane_id(); k < COUNT - 1; k += 32) {
    sum.opacity += weight[k];
    sum.moment += weight[k] * (0.5f * (t[k] + t[k + 1]) - sum.end);
  }
  sum.opacity = warp_sum(sum.opacity);
  sum.moment = warp_sum(sum.moment);
  float depth = sum.end + sum.moment / fmaxf(sum.opacity, FAINT), start = t[0];
  // Where a bound is met exactly, half of the gradient passes: so does that of torch.minimum.
  sum.free = (depth > start ? 1.f : depth == start ? 0.5f : 0.f) * (depth < sum.end ? 1.f : depth == sum.end ? 0.5f : 0.f);
  sum.depth = fminf(fmaxf(depth, start), sum.end);
  return sum;
}

// --- importance samples ---

DEV int count_below(const float *sorted, int count, float x, bool equal) {  // elements < x (or <= x)
  int low = 0, high = count;
  while (low < high) {
    int middle = (low + high) >> 1;
    if (sorted[middle] < x || (equal && sorted[middle] == x)) low = middle + 1;
    else high = middle;
  }
  return low;
}

// KF sorted depths from sorted coarse t and weights [K - 1]; weight and cdf are overwritten.
DEV void importance_depths(const Params &p, int index, const float *t, float *weight, float *cdf, float *fine) {
  constexpr int ROUNDS = (K + 30) / 32;
  float smooth[ROUNDS], total = 0.f, below = 0.f, last = -3.4e38f;
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    int k = 32 * i + lane_id();
    smooth[i] = 0.f;
    if (k < K - 1) {
      float own = weight[k], left = k > 0 ? weight[k - 1] : 0.f, right = k < K - 2 ? weight[k + 1] : 0.f;
      smooth[i] = 0.5f * (fmaxf(left, own) + fmaxf(own, right)) + 0.01f;
    }
    total += smooth[i];
  }
  total = warp_sum(total);
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    int k = 32 * i + lane_id();
    float probability = smooth[i] / total, sum = scan_sum(probability);
    if (k < K - 1) {
      weight[k] = probability;
      cdf[k] = below + sum;
    }
    below += __shfl_sync(ALL, sum, 31);
  }
  __syncwarp();
#pragma unroll
  for (int base = 0; base < KF; base += 32) {
    int j = base + lane_id();
    float at = -3.4e38f;
    if (j < KF) {
      float u = ((float)j + jitter(p, p.noise_fine, 0x66696E65u, KF, index, j)) / (float)KF;
      int k = min(count_below(cdf, K - 1, u, true), K - 2);
      float fraction = __saturatef((u - (k > 0 ? cdf[k - 1] : 0.f)) / weight[k]);
      at = fmaf(fraction, t[k + 1] - t[k], t[k]);
    }
    // They ascend but for rounding; the merge relies on it.
    at = fmaxf(scan_max(at), last);
    last = __shfl_sync(ALL, at, 31);
    if (j < KF) fine[j] = at;
  }
  __syncwarp();
}

// Where unsorted sample k (coarse ones first) stands among all: two sorted lists, equals in the order of the lists.
DEV int merged_rank(const float *t, int k) {
  return k < K ? k + count_below(t + K, KF, t[k], false) : k - K + count_below(t, K, t[k], true);
}

// --- the planes ---

// Four features of the texel that begins `start` elements after base, which counts this lane's features in already.
DEV float4 read_texel(const void *base, u32 start) {
  u64 at;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(at) : "r"(start), "n"(BF16 ? 2 : 4), "l"(base));  // one instruction
#if BF16
  uint2 v = __ldg((const uint2 *)at);
  return {__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.y << 16),
          __uint_as_float(v.y & 0xffff0000u)};
#else
  return __ldg((const float4 *)at);
#endif
}

DEV const void *advance(const void *base, long long elements) { return (const char *)base + elements * (BF16 ? 2 : 4); }

// A tile's taps, table[sample][plane][parity]: where the texel begins in the scene's planes, in elements, and its weight
// (0 outside, where the texel is any).
// The four taps of a sample and plane are a 2 x 2 cell, whose texels have four parities of (column, row); so a texel has
// the same place in the table of every sample that reads it. Rows of TAP_ROW keep the banks of four samples apart.
constexpr int TAP_ROW = 14, TAP_FLOATS = 16 * 2 * TAP_ROW;

DEV void tap_table(const Params &p, const Ray &ray, const float *t, int count, int2 *table) {
  int sample = lane_id() >> 1, odd = lane_id() & 1, size = p.resolution;
  float at = t[min(sample, count - 1)], fraction[3];
  int first[3];
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    // Places between texel centres, along any axis of a plane.
    float pixel = fmaf(fmaf(at, ray.d[a], ray.o[a]), ray.scale, 0.5f * (float)size - 0.5f), whole = floorf(pixel);
    first[a] = (int)fminf(fmaxf(whole, -2.f), (float)size);  // so that adding one cannot wrap
    fraction[a] = pixel - whole;
  }
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    int a = column_axis(plane), b = row_axis(plane);
    int right = (first[a] ^ odd) & 1, column = first[a] + right;
    float across = right ? fraction[a] : 1.f - fraction[a];
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      int below = (first[b] ^ parity) & 1, row = first[b] + below;
      float w = across * (below ? fraction[b] : 1.f - fraction[b]);
      bool inside = (u32)column < (u32)size && (u32)row < (u32)size;
      int texel = ((plane * size + row) * size + column) * C;
      table[sample * TAP_ROW + plane * 4 + 2 * parity + odd] = int2{inside ? texel : 0, __float_as_int(inside ? w : 0.f)};
    }
  }
  __syncwarp();
}

// Features of a tile, rounded for the products; base: of the scene's planes. Eight lanes read 128 bytes of a texel, for
// the samples that are rows of theirs; then neighbours swap what the other's row needs.
DEV void gather(const void *base, const int2 *table, float (&f)[2][CHUNKS][4]) {
  constexpr int WIDE = (CHUNKS + 1) / 2;
  int lane = lane_id(), odd = lane >> 2 & 1, q = lane & 3, feature = 16 * odd + 4 * q;
  const void *at = advance(base, feature);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    asm volatile("" ::: "memory");  // else all reads are begun at once, for which there are no registers
    float read[2][WIDE][4];
#pragma unroll
    for (int other = 0; other < 2; ++other) {
      const int4 *taps = (const int4 *)(table + (2 * (lane >> 3) + other + 8 * row) * TAP_ROW);
      float part[WIDE][4];
#pragma unroll
      for (int pair = 0; pair < 6; ++pair) {
        int4 two = taps[pair];
#pragma unroll
        for (int i = 0; i < WIDE; ++i) {
          bool begins = pair == 0 || (PRODUCT && pair % 2 == 0);
          if (begins) part[i][0] = part[i][1] = part[i][2] = part[i][3] = 0.f;
          if (C % 32 == 0 || 32 * i + feature < C) {
#pragma unroll
            for (int tap = 0; tap < 2; ++tap) {
              float w = __int_as_float(tap ? two.w : two.y);
              float4 v = read_texel(advance(at, 32 * i), tap ? two.z : two.x);
              part[i][0] = fmaf(w, v.x, part[i][0]);
              part[i][1] = fmaf(w, v.y, part[i][1]);
              part[i][2] = fmaf(w, v.z, part[i][2]);
              part[i][3] = fmaf(w, v.w, part[i][3]);
            }
          }
          if (pair == 5 || (PRODUCT && pair % 2 == 1)) {
#pragma unroll
            for (int e = 0; e < 4; ++e) read[other][i][e] = PRODUCT && pair > 1 ? read[other][i][e] * part[i][e] : part[i][e];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < WIDE; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float mine = to_tf32(read[0][i][e]), second = to_tf32(read[1][i][e]);
        float received = __shfl_xor_sync(ALL, odd ? mine : second, 4);
        f[row][2 * i][e] = odd ? received : mine;
        if (2 * i + 1 < CHUNKS) f[row][2 * i + 1 < CHUNKS ? 2 * i + 1 : 0][e] = odd ? second : received;
      }
  }
}

DEV long long scene_offset(const Params &p, const Ray &ray) {  // in elements
  return (long long)ray.scene * 3 * p.resolution * p.resolution * C;
}

DEV const void *scene_planes(const Params &p, const Ray &ray) {
  return advance(p.planes, scene_offset(p, ray));
}
