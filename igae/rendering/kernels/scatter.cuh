// SPDX-License-Identifier: Apache-2.0
// Gradients of the planes: added up along a ray before they go to memory.
#pragma once
#include "ray.cuh"

constexpr int G_ROW = C % 32 != 16 && C <= 48 ? C + 16 : C;  // of the features' gradients, 16 rows

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

// Successive samples share texels. Each of the four parities of the table of taps has eight lanes, which keep the sum of
// one texel until a sample has another texel of that parity: only then the sum goes to memory.
struct Accumulator {
  static constexpr int PARTS = (C + 31) / 32;  // lanes hold four features of each 32
  int texel[3];
  float4 sum[3][PARTS];
};

#if DETERMINISTIC
typedef u64 Sum;
#else
typedef float Sum;
#endif

DEV Sum *scene_sums(const Params &p, const Ray &ray) {  // in g_planes, from this lane's features on
  return (Sum *)p.g_planes + scene_offset(p, ray) + 4 * (lane_id() & 7);
}

// Adds v to the four elements that begin `texel` elements after `base`, if told to.
DEV void add(const Params &p, Sum *base, int texel, float4 v, bool wanted) {
#if DETERMINISTIC
  if (!wanted) return;
  float values[4] = {v.x, v.y, v.z, v.w};
  if (p.measure) {
    // Of positive floats, and NaN above all, the bits are in order.
    u32 largest = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) largest = max(largest, __float_as_uint(values[e]) & 0x7fffffffu);
    if (largest > 0) atomicMax(p.largest, largest);
    return;
  }
  // The largest addend becomes about 2^38: 2^24 of them fit. Integer sums do not depend on their order.
  int exponent = (int)(*p.largest >> 23) - 127;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    long long fixed = __double2ll_rn(scalbn((double)values[e], 37 - exponent));
    if (fixed != 0) atomicAdd(base + texel + e, (u64)fixed);
  }
#else
#if __CUDA_ARCH__ >= 900
#define ADD "@wanted red.global.add.v4.f32 [at], {%2, %3, %4, %5};"
#else
#define ADD                                                                                     \
  "@wanted red.global.add.f32 [at], %2; @wanted red.global.add.f32 [at + 4], %3;"               \
  "@wanted red.global.add.f32 [at + 8], %4; @wanted red.global.add.f32 [at + 12], %5;"
#endif
  asm volatile("{ .reg .pred wanted; .reg .u64 at; setp.ne.s32 wanted, %6, 0; @wanted mad.wide.s32 at, %1, 4, %0;" ADD " }"
               ::"l"(base), "r"(texel), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"((int)wanted)
               : "memory");
#endif
}

// The plane's sums go to memory where the texel is another one than before; base: of this lane's features in g_planes.
DEV void change(const Params &p, Sum *base, Accumulator &acc, int plane, int texel) {
  int feature = 4 * (lane_id() & 7);
  bool other = texel != acc.texel[plane], wanted = other && acc.texel[plane] >= 0;
#pragma unroll
  for (int i = 0; i < Accumulator::PARTS; ++i) {
    float4 &sum = acc.sum[plane][i];
    bool mine = C % 32 == 0 || feature + 32 * i < C;
    add(p, base + 32 * i, acc.texel[plane], sum, wanted && mine);
    sum.x = other ? 0.f : sum.x;
    sum.y = other ? 0.f : sum.y;
    sum.z = other ? 0.f : sum.z;
    sum.w = other ? 0.f : sum.w;
  }
  acc.texel[plane] = texel;
}

DEV float4 sum_taps(float4 v) {  // over the four parities
#pragma unroll
  for (int d = 8; d < 32; d <<= 1) {
    v.x += __shfl_xor_sync(ALL, v.x, d);
    v.y += __shfl_xor_sync(ALL, v.y, d);
    v.z += __shfl_xor_sync(ALL, v.z, d);
    v.w += __shfl_xor_sync(ALL, v.w, d);
  }
  return v;
}

DEV float4 operator*(float4 a, float4 b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }

// Adds the gradients of `count` samples' features (g_f [16][G_ROW]) to the planes, the last sample first.
DEV void scatter(const Params &p, const Ray &ray, const int2 *table, const float *g_f, int count, Accumulator &acc) {
  int parity = lane_id() >> 3, feature = 4 * (lane_id() & 7);
  Sum *g_base = scene_sums(p, ray);
#pragma unroll 2  // of four there are too many numbers alive for some compilers
  for (int s = count - 1; s >= 0; --s) {
    int2 tap[3];
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
      tap[plane] = table[s * TAP_ROW + plane * 4 + parity];
      change(p, g_base, acc, plane, tap[plane].x);
    }
#pragma unroll
    for (int i = 0; i < Accumulator::PARTS; ++i) {
      if (C % 32 != 0 && feature + 32 * i >= C && !PRODUCT) continue;
      bool mine = feature + 32 * i < C;
      float4 g = mine ? *(const float4 *)(g_f + s * G_ROW + feature + 32 * i) : float4{0.f, 0.f, 0.f, 0.f};
      float4 share[3] = {g, g, g};
#if PRODUCT
      float4 read[3];
#pragma unroll
      for (int plane = 0; plane < 3; ++plane) {
        float4 v = {0.f, 0.f, 0.f, 0.f};
        float w = __int_as_float(tap[plane].y);
        if (mine) v = read_texel(advance(scene_planes(p, ray), tap[plane].x + feature + 32 * i));
        read[plane] = sum_taps(v * float4{w, w, w, w});
      }
      share[0] = g * read[1] * read[2];
      share[1] = g * read[0] * read[2];
      share[2] = g * read[0] * read[1];
#endif
#pragma unroll
      for (int plane = 0; plane < 3; ++plane) {
        float w = __int_as_float(tap[plane].y);
        float4 &sum = acc.sum[plane][i];
        sum.x = fmaf(w, share[plane].x, sum.x);
        sum.y = fmaf(w, share[plane].y, sum.y);
        sum.z = fmaf(w, share[plane].z, sum.z);
        sum.w = fmaf(w, share[plane].w, sum.w);
      }
    }
  }
}
