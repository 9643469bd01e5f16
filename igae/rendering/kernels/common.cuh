// SPDX-License-Identifier: Apache-2.0
// What both kernels share: arguments, warp primitives, activations, tensor-core products, the decoding MLP's weights.
//
// The build defines: C features, OUT colours, K coarse and KF fine samples, WARPS a block, and the switches EG3D, PRODUCT,
// DISPARITY, BF16 (planes), FP32 (three TF32 products for one), DETERMINISTIC. No CUDA header is included: NVRTC has none.
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
constexpr int COLOUR_TILES = (OUT + 7) / 8;                          // colours in 8s
constexpr int ROW = N + 2;                                           // floats of one of a ray's arrays
constexpr int W1_FLOATS = 8 * STEPS * 64, W2_FLOATS = COLOUR_TILES * 8 * 64;
constexpr int DENSE_FLOATS = HIDDEN + 4, WEIGHT_FLOATS = W1_FLOATS + W2_FLOATS + 2 * (HIDDEN + 8 * COLOUR_TILES) + DENSE_FLOATS;

struct Params {
  const void *planes;
  const float *w1, *b1, *w2, *b2, *cam2world, *intrinsics, *background, *noise_coarse, *noise_fine;
  const long long *scene, *seed;
  float *features, *depth, *opacity;                                  // forward: results
  float *densities;                                                   // [rays, N], raw, coarse ones first; or null: not kept
  const float *g_features, *g_depth, *g_opacity;                      // backward: their gradients, or null
  void *g_planes;                                                     // float, or 64-bit integers if DETERMINISTIC
  float *partial;                                                     // [blocks, PARTIAL] sums of the MLP's gradients
  u32 *largest;                                                       // DETERMINISTIC: bits of the largest addend
  u64 seed_value;
  int rays, height, width, resolution, background_stride, jitter, measure;
  float near, far, box;
};
enum { JITTER_HALF, JITTER_VALUE, JITTER_TENSOR, JITTER_NOISE };

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

DEV float round_tf32(float x) {
  u32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return __uint_as_float(y);
}

// A product cuts off all but 10 bits of its operands. This factor makes up for the mean of what is cut off of one: nearly the
// error of a rounding. It is put where it costs least: in what features are read with, in results, in what is added up.
constexpr float CUT = FP32 ? 1.f : 1.000352f;
constexpr float CUT_ROOT = FP32 ? 1.f : PRODUCT ? 1.00005866f : 1.000176f;  // a feature is a product of two such factors, or six

DEV void mma_tf32(float d[4], const u32 a[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if FP32
DEV void split(float x, u32 &high, u32 &low) {
  float rounded = round_tf32(x);
  high = __float_as_uint(rounded);
  low = __float_as_uint(x - rounded);
}
#endif

// d[16x8] += a[16x8] b[8x8]. Rows g, g + 8 of d are d[0..1], d[2..3], columns 2 q, 2 q + 1. a0, a1 are rows g, g + 8 and a2,
// a3 the same rows again: an inner index belongs to (q, first | second), and how many of what it counts is the caller's
// choice, as long as b0 (first) and b1 (second), of column g, agree.
DEV void mma(float d[4], float a0, float a1, float a2, float a3, float b0, float b1) {
#if FP32
  u32 ah[4], al[4], bh[2], bl[2];
  split(a0, ah[0], al[0]);
  split(a1, ah[1], al[1]);
  split(a2, ah[2], al[2]);
  split(a3, ah[3], al[3]);
  split(b0, bh[0], bl[0]);
  split(b1, bh[1], bl[1]);
  mma_tf32(d, al, bh[0], bh[1]);
  mma_tf32(d, ah, bl[0], bl[1]);
  mma_tf32(d, ah, bh[0], bh[1]);
#else
  u32 a[4] = {__float_as_uint(a0), __float_as_uint(a1), __float_as_uint(a2), __float_as_uint(a3)};
  mma_tf32(d, a, __float_as_uint(b0), __float_as_uint(b1));
#endif
}

// --- the decoding MLP ---

// Weights lie in shared memory as 8x8 blocks, of which a product with the matrix takes columns 2 q, 2 q + 1 of row g, and one
// with its transpose column g of rows 2 q and 2 q + 1. Those of w1 are there once for either, two blocks' numbers of a
// lane together; in those of w2 rows are where neither reading meets a bank twice.
DEV int block_row(int n) { return 8 * ((n >> 1 & 1) | ((n ^ n >> 2) & 1) << 1 | (n & 4)); }

struct Mlp {
  const float *w1, *w1_back;  // [hidden / 8][features / 16][lane][4]; w1_back: backward only
  const float *w2, *b1, *b2;  // w2, b2: colours'; blocks [colours / 8][hidden / 8]; biases in pairs, twice: for two samples
  const float *dense;         // the density's row of w2, not rounded, and its bias
};

DEV float weight_operand(float w) { return FP32 ? w : round_tf32(w); }

// The feature that column `column` of block `step` of w1 belongs to, and its inverse.
DEV int feature_of(int step, int column) { return 16 * (step >> 1) + 4 * (column >> 1) + 2 * (step & 1) + (column & 1); }
DEV int step_of(int c) { return 2 * (c >> 4) + (c >> 1 & 1); }
DEV int column_of(int c) { return 2 * (c >> 2 & 3) + (c & 1); }

// Units: hidden activations are H = ln 2 h; products with w1 give log2(e) of what the MLP's definition says, and so do those
// of the colours' rows of w2 with h; the density's row gives the raw density itself.
template <bool BACKWARD>
DEV Mlp load_mlp(float *shared, const Params &p) {
  constexpr int WIDTH = 16 * CHUNKS;
  float *w1 = shared, *w2 = w1 + W1_FLOATS, *b1 = w2 + W2_FLOATS, *b2 = b1 + 2 * HIDDEN;
  float *dense = b2 + 16 * COLOUR_TILES, *w1_back = shared + WEIGHT_FLOATS;
#pragma unroll 8
  for (int i = threadIdx.x; i < HIDDEN * WIDTH; i += 32 * WARPS) {
    int h = i / WIDTH, c = i % WIDTH;
    float w = c < C ? p.w1[h * C + min(c, C - 1)] : 0.f;
    int row = h & 7, column = column_of(c), block = (h / 8 * CHUNKS + c / 16) * 128 + 2 * (step_of(c) & 1);
    w1[block + 16 * row + 4 * (column >> 1) + (column & 1)] = weight_operand(LOG2E * w);
    if (BACKWARD) w1_back[block + 16 * column + 4 * (row >> 1) + (row & 1)] = weight_operand(LOG2E * w);
  }
#pragma unroll 8
  for (int i = threadIdx.x; i < 8 * COLOUR_TILES * HIDDEN; i += 32 * WARPS) {
    int n = i / HIDDEN, h = i % HIDDEN, place = (n / 8 * 8 + h / 8) * 64 + block_row(n & 7) + (h & 7);
    w2[place] = n < OUT ? weight_operand(CUT * p.w2[HIDDEN + i]) : 0.f;
  }
  for (int i = threadIdx.x; i < HIDDEN; i += 32 * WARPS) {
    int place = 4 * (i >> 1) + (i & 1);
    b1[place] = b1[place + 2] = LOG2E * p.b1[i];
    dense[i] = LN2 * p.w2[i];
    if (i < 8 * COLOUR_TILES) b2[place] = b2[place + 2] = i < OUT ? LOG2E * p.b2[1 + i] : 0.f;
    if (i == 0) dense[HIDDEN] = p.b2[0];
  }
  __syncthreads();
  return {w1, w1_back, w2, b1, b2, dense};
}

// --- matrices of a tile in shared memory ---

// 8 rows of quads: of samples g and g + 8 two columns, which a lane writes as it has them of 8 columns, and which another
// reads as a product takes them: with the samples as inner indices, (g, g + 8) of one column and of the next are two B
// operands; both columns of g and both of g + 8 are one A operand. Quads are permuted by row so that neither meets a bank
// twice: writing, two rows of 16 floats; reading, four rows of 8.
//
// A warp's tile has four such matrices, side by side, so that one address of a lane does for all: activations,
// gradients before the activation, features, gradients of outputs.
constexpr int HIDDEN_AT = 0, G_HIDDEN_AT = 2 * HIDDEN, FEATURES_AT = 4 * HIDDEN, G_OUT_AT = FEATURES_AT + 16 * STEPS;
constexpr int TILE_ROW = G_OUT_AT + 32 * ((COLOUR_TILES + 1) / 2);

DEV int permuted(int row, int column) { return column ^ ((row & 1) << 4 | (row & 2) << 2); }

DEV float4 *quad(float *matrix, int n) {  // of columns 8 n to 8 n + 7
  int g = lane_id() >> 2, q = lane_id() & 3;
  return (float4 *)(matrix + g * TILE_ROW + permuted(g, 16 * (n & 1) + 4 * q) + 32 * (n >> 1));
}

DEV void store_quad(float *matrix, int n, float a, float b, float c, float d) { *quad(matrix, n) = {a, b, c, d}; }

// Hidden units from 8 n on, 16 of them, before their activation. Two products go side by side, because each waits for the
// one before.
DEV void mlp_hidden(const Mlp &mlp, const float (&f)[2][CHUNKS][4], int n, float (&h)[8][4]) {
  asm volatile("" ::: "memory");  // weights are read when they are needed: there are no registers for more
#pragma unroll
  for (int u = n; u < n + 2; ++u) {
    float4 bias = *(const float4 *)(mlp.b1 + 16 * u + 4 * (lane_id() & 3));
    h[u][0] = bias.x, h[u][1] = bias.y, h[u][2] = bias.z, h[u][3] = bias.w;
  }
#pragma unroll
  for (int u = n; u < n + 2; ++u)
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      float4 w = *((const float4 *)mlp.w1 + (u * CHUNKS + i) * 32 + lane_id());
      mma(h[u], f[0][i][0], f[1][i][0], f[0][i][1], f[1][i][1], w.x, w.y);
      mma(h[u], f[0][i][2], f[1][i][2], f[0][i][3], f[1][i][3], w.z, w.w);
    }
}

// f: features of rows g and g + 8, times CUT. out[tile][e]: column 8 tile + 2 q + (e & 1) of row g + 8 (e >> 1). Colours come
// before their sigmoid2. dense: densities of rows g and g + 8, in all lanes of a row; or null. They are no matrix product:
// one rounding of its weights would move all densities, and all that hangs on them. h: of 8 hidden units each, activations
// in the layout of out; KEEP: they go to the matrix `hidden` too. AHEAD: products are begun before the activations of those
// before them are found.
template <bool KEEP, bool AHEAD>
DEV void mlp_forward(const Mlp &mlp, const float (&f)[2][CHUNKS][4], float *hidden, float (&h)[8][4],
                     float (&out)[COLOUR_TILES][4], float *dense = nullptr) {
  int g = lane_id() >> 2, q = lane_id() & 3;
#pragma unroll
  for (int j = 0; j < COLOUR_TILES; ++j) {
    float4 bias = *(const float4 *)(mlp.b2 + 16 * j + 4 * q);
    out[j][0] = bias.x, out[j][1] = bias.y, out[j][2] = bias.z, out[j][3] = bias.w;
  }
  if (dense) dense[0] = dense[1] = 0.f;
  int row = block_row(g) + 2 * q;
  if (AHEAD) mlp_hidden(mlp, f, 0, h);
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
    if (n + 2 * AHEAD < 8) mlp_hidden(mlp, f, n + 2 * AHEAD, h);
#pragma unroll
    for (int u = n; u < n + 2; ++u)
#pragma unroll
      for (int e = 0; e < 4; ++e) h[u][e] = softplus2(h[u][e]);
#pragma unroll
    for (int j = 0; j < COLOUR_TILES; ++j)
#pragma unroll
      for (int u = n; u < n + 2; ++u) {
        float2 w = *(const float2 *)(mlp.w2 + (j * 8 + u) * 64 + row);
        mma(out[j], h[u][0], h[u][2], h[u][1], h[u][3], w.x, w.y);
      }
    if (dense) {
#pragma unroll
      for (int u = n; u < n + 2; ++u) {
        float2 w = *(const float2 *)(mlp.dense + 8 * u + 2 * q);
#pragma unroll
        for (int e = 0; e < 4; ++e) dense[e >> 1] = fmaf(e & 1 ? w.y : w.x, h[u][e], dense[e >> 1]);
      }
    }
    if (KEEP) {
#pragma unroll
      for (int u = n; u < n + 2; ++u) store_quad(hidden, u, h[u][0], h[u][1], h[u][2], h[u][3]);
    }
  }
  if (dense) {
#pragma unroll
    for (int r = 0; r < 2; ++r) dense[r] = row_sum(dense[r]) + mlp.dense[HIDDEN];
  }
}
