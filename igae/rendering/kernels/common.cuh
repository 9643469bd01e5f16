// SPDX-License-Identifier: Apache-2.0
// What both kernels share: arguments, warp primitives, activations, tensor-core products, the decoding MLP's weights.
//
// The build defines: C features, OUT colors, K coarse and KF fine samples, WARPS a block, SIDE (a pixel is the mean of
// SIDE x SIDE rays, which have successive indices), and the switches EG3D, PRODUCT, DISPARITY, FP32 (products
// of float32 numbers, else of float16), DETERMINISTIC, DISTORTION (a fourth image), KEEP_FEATURES (for the backward pass, which
// else reads the planes again). No CUDA header is included: NVRTC has none.
//
// One warp owns one ray. A tile is 16 samples of it, the rows of a matrix product. Lane = 4 g + q of the products' layouts:
// it holds rows g and g + 8, and of each 16 features the four from 4 q on, which is a 16-byte read.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
#define DEV static __device__ __forceinline__

constexpr u32 ALL = 0xffffffffu;
constexpr int HIDDEN = 64, N = K + KF, R16 = (N + 15) / 16;
constexpr int CHUNKS = (C + 15) / 16, STEPS = 2 * CHUNKS;            // features in 16s, and in 8s
constexpr int COLOR_TILES = (OUT + 7) / 8;                          // colors in 8s
constexpr int ROW = N + 2;                                           // floats of one of a ray's arrays
constexpr int WORDS = FP32 ? 4 : 2;                                  // 32-bit words of a Four
// Of a ray the backward pass gets, sorted along it, raw densities and depths of samples; colors of samples 15, 31 ..., which
// are the last ones of all tiles but the last; and, if KEEP_FEATURES, which sample of the forward pass each is, a byte, and,
// in the order of that pass, the features of all of them as products take them: LANE_WORDS for each of four lanes.
constexpr int LANE_WORDS = CHUNKS * WORDS, ORDER_FLOATS = KEEP_FEATURES ? (N + 3) / 4 : 0;
constexpr int COLORS_AT = 2 * N, ORDER_AT = COLORS_AT + (R16 - 1) * OUT, KEPT_FEATURES_AT = (ORDER_AT + ORDER_FLOATS + 3) / 4 * 4;
constexpr int KEPT = KEPT_FEATURES_AT + (KEEP_FEATURES ? 4 * N * LANE_WORDS : 0);
constexpr int RAYS = SIDE * SIDE;                                    // of a pixel
// Floats' places of all weights, and of those that only the backward pass has.
constexpr int W1_WORDS = 256 * CHUNKS * WORDS, W2_WORDS = 128 * COLOR_TILES * WORDS, DENSE_FLOATS = HIDDEN + 4;
constexpr int WEIGHT_FLOATS = W1_WORDS + W2_WORDS + HIDDEN + 8 * COLOR_TILES + DENSE_FLOATS;
constexpr int BACK_FLOATS = W1_WORDS + 256 * ((COLOR_TILES + 1) / 2) * WORDS;

struct Params {
  const void *planes;
  const float *w1, *b1, *w2, *b2, *cam2world, *intrinsics, *background;
  const long long *scene, *seed;
  float *features, *depth, *opacity, *distortion;                     // forward: results, the last if DISTORTION
  float *kept;                                                        // [rays, KEPT], see there; or null: nothing is kept
  const float *g_features, *g_depth, *g_opacity, *g_distortion;       // backward: their gradients, or null
  void *g_planes;                                                     // float, or 64-bit integers if DETERMINISTIC
  float *partial;                                                     // [partials, PARTIAL] sums of the MLP's gradients
  u32 *largest;                                                       // DETERMINISTIC: bits of the largest addend
  u64 seed_value;
  int rays, height, width, resolution, background_stride, jitter, measure, partials;
  float near, far, box;
};
enum { JITTER_HALF, JITTER_VALUE, JITTER_TENSOR };

// --- warp ---

DEV int lane_id() { return threadIdx.x & 31; }
// By way of a shuffle and a vote the compiler learns that a value is the same in all lanes.
DEV int warp_id() { return __shfl_sync(ALL, threadIdx.x >> 5, 0); }
DEV bool all_lanes(bool x) { return __all_sync(ALL, x); }

DEV float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(ALL, v, d);
  return v;
}

DEV float warp_max(float v) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL, v, d));
  return v;
}

DEV float row_sum(float v) {  // over the lanes of rows g, g + 8 of a product
  v += __shfl_xor_sync(ALL, v, 1);
  return v + __shfl_xor_sync(ALL, v, 2);
}

// Scans of COUNT values a lane, each on its own: together, because one alone would mostly wait.
template <int COUNT>
DEV void scan_sum(float (&v)[COUNT]) {  // inclusive
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    float other[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) other[i] = __shfl_up_sync(ALL, v[i], d);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i] += lane_id() >= d ? other[i] : 0.f;
  }
}

// --- activations ---

DEV float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEV float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEV float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
constexpr float LOG2E = 1.44269504f, LN2 = 0.69314718f;
DEV float fast_exp(float x) { return fast_exp2(LOG2E * x); }
// The hidden layer's numbers are counted in units of ln 2, before and after the activation: load_mlp scales the weights.
// Absolute error about 2e-7.
DEV float softplus2(float x) { return fmaxf(x, 0.f) + fast_log2(1.f + fast_exp2(-fabsf(x))); }
DEV float sigmoid2(float x) { return fast_reciprocal(1.f + fast_exp2(-x)); }  // of x ln 2
// Of the density, where small values count.
DEV float softplus_exact(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }

// --- tensor cores ---

// Operands of products are fours of numbers, x y z w, and twos: of float32, or of float16 in pairs.
// As the first operand a four has rows g (x, y) and g + 8 (z, w) for two inner indices; as the second one, two columns
// (x, y and z, w) for them. Which two numbers are meant by a lane's two inner indices is the caller's choice, as long as
// both operands agree.
#if FP32
typedef float4 Four;
typedef float2 Two;
DEV Two two(float x, float y) { return {x, y}; }
DEV Four four(float x, float y, float z, float w) { return {x, y, z, w}; }
DEV Two left(Four a) { return {a.x, a.y}; }
DEV Two right(Four a) { return {a.z, a.w}; }
DEV Four joined(Two a, Two b) { return {a.x, a.y, b.x, b.y}; }
DEV Four crossed(Four a) { return {a.x, a.z, a.y, a.w}; }
DEV Four times(Four a, Four b) { return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w}; }

// Tensor cores take the upper 19 bits of a number for TF32; `low` is what is left of it.
DEV void split(float x, u32 &high, u32 &low) {
  high = __float_as_uint(x);
  low = __float_as_uint(x - __uint_as_float(high & 0xffffe000u));
}
DEV void mma_tf32(float d[4], const u32 a[4], const u32 b[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// d[16x8] += a[16x8] b[8x8]. Rows g, g + 8 of d are d[0..1], d[2..3], columns 2 q, 2 q + 1. Three products of what tensor
// cores take of float32 numbers make up for one.
DEV void mma(float d[4], Four a, Two b) {
  u32 ah[4], al[4], bh[2], bl[2];
  split(a.x, ah[0], al[0]);
  split(a.z, ah[1], al[1]);
  split(a.y, ah[2], al[2]);
  split(a.w, ah[3], al[3]);
  split(b.x, bh[0], bl[0]);
  split(b.y, bh[1], bl[1]);
  mma_tf32(d, al, bh);
  mma_tf32(d, ah, bl);
  mma_tf32(d, ah, bh);
}
// Of 16 inner indices.
DEV void mma(float d[4], Four a, Four a2, Two b, Two b2) {
  mma(d, a, b);
  mma(d, a2, b2);
}
#else
typedef uint2 Four;
typedef u32 Two;
DEV Two two(float x, float y) {  // what is too large becomes the largest, 65504
  u32 pair;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
}
DEV Four four(float x, float y, float z, float w) { return {two(x, y), two(z, w)}; }
DEV Two left(Four a) { return a.x; }
DEV Two right(Four a) { return a.y; }
DEV Four joined(Two a, Two b) { return {a, b}; }
DEV Four crossed(Four a) { return {__byte_perm(a.x, a.y, 0x5410), __byte_perm(a.x, a.y, 0x7632)}; }
DEV u32 times(u32 a, u32 b) {
  u32 c;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
DEV Four times(Four a, Four b) { return {times(a.x, b.x), times(a.y, b.y)}; }

// d[16x8] += a[16x16] b[16x8]. Rows g, g + 8 of d are d[0..1], d[2..3], columns 2 q, 2 q + 1.
DEV void mma(float d[4], Four a, Four a2, Two b, Two b2) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a2.x), "r"(a2.y), "r"(b), "r"(b2));
}
#endif
