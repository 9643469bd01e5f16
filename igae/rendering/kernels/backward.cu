// SPDX-License-Identifier: Apache-2.0
// Backward pass. A warp recomputes its ray's samples, then goes along them in order, a tile at a time, through the MLP
// again and back. A block's warps go in step: after each tile they share its activations, and each adds up the gradient
// of its own part of the hidden units, in registers, for the whole kernel.
#include "ray.cuh"

constexpr int UNITS = 4 / WARPS;  // 16s of hidden units a warp owns
constexpr int H_FLOATS = 8 * H_ROW, F_FLOATS = 8 * F_ROW, O_FLOATS = 8 * O_ROW;
constexpr int G_ROW = C % 32 != 16 && C <= 48 ? C + 16 : C;  // of the features' gradients, 16 rows
constexpr int ARRAYS = (3 * ROW + 3) / 4 * 4, KEPT_PLACE = ARRAYS + 2 * H_FLOATS + F_FLOATS + O_FLOATS;
constexpr int WARP_FLOATS = KEPT_PLACE + (8 * TILES + 14 + 3) / 4 * 4;
static_assert(4 * (WEIGHT_FLOATS + WARPS * WARP_FLOATS) == SHARED_BYTES, "build.py counts alike");
constexpr int PARTIAL = HIDDEN * C + HIDDEN + (1 + OUT) * HIDDEN + 1 + OUT;

// --- gradients of the planes ---

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

// Adds the gradients of `count` samples' features (g_f [16][G_ROW]) to the planes.
DEV void scatter(const Params &p, const Ray &ray, const int2 *table, const float *g_f, int count, Accumulator &acc) {
  int parity = lane_id() >> 3, feature = 4 * (lane_id() & 7);
  Sum *g_base = scene_sums(p, ray);
  for (int s = 0; s < count; ++s) {
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

// --- the MLP ---

constexpr int B2_TILES = (TILES + WARPS - 1) / WARPS;

// Gradients of a block's hidden units: rows 16 (UNITS warp + u) + g (+ 8) of the products' layouts.
struct MlpGradient {
  float w1[UNITS][STEPS][4], b1[UNITS][4], w2[UNITS][TILES][4];
  float b2[B2_TILES];  // of outputs 8 (warp + WARPS i) + g
};

struct Tile {
  float *h, *g_h, *f, *g_out;  // [16][...]: activations, gradients before the activation, features, gradients of outputs
};

DEV Tile tile_of(float *shared, int warp) {
  float *h = shared + WEIGHT_FLOATS + warp * WARP_FLOATS + ARRAYS;
  return {h, h + H_FLOATS, h + 2 * H_FLOATS, h + 2 * H_FLOATS + F_FLOATS};
}

// Adds a tile's share to the gradients of this warp's hidden units.
DEV void accumulate(const Tile &tile, int warp, MlpGradient &grad) {
  int g = lane_id() >> 2, q = lane_id() & 3, units = 32 * UNITS * warp;
  int column[2] = {permuted(q, 2 * g), permuted(q, 2 * g + 16)};  // of the even and the odd eight columns
  float one = g == 0 ? 1.f : 0.f;
#pragma unroll
  for (int s = 0; s < 8; s += 4) {  // samples s + q and s + q + 8
    const float *g_h = tile.g_h + (s + q) * H_ROW + units, *h = tile.h + (s + q) * H_ROW + units;
    const float *f = tile.f + (s + q) * F_ROW, *g_out = tile.g_out + (s + q) * O_ROW;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      float2 low = *(const float2 *)(g_h + 32 * u + column[0]), high = *(const float2 *)(g_h + 32 * u + column[1]);
#pragma unroll
      for (int m = 0; m < STEPS; ++m) {
        float2 b = *(const float2 *)(f + 32 * (m >> 1) + column[m & 1]);
        mma(grad.w1[u][m], low.x, high.x, low.y, high.y, b.x, b.y);
      }
      mma(grad.b1[u], low.x, high.x, low.y, high.y, one, one);
      low = *(const float2 *)(h + 32 * u + column[0]), high = *(const float2 *)(h + 32 * u + column[1]);
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        float2 b = *(const float2 *)(g_out + 32 * (j >> 1) + column[j & 1]);
        mma(grad.w2[u][j], low.x, high.x, low.y, high.y, b.x, b.y);
        if (u == 0 && j % WARPS == warp) grad.b2[j / WARPS] += b.x + b.y;
      }
    }
  }
}

// Writes the block's sums, as the weights lie in memory: w1, b1, w2, b2.
DEV void store(float *to, int warp, const MlpGradient &grad) {
  int lane = lane_id(), g = lane >> 2, q = lane & 3;
  float *to_b1 = to + HIDDEN * C, *to_w2 = to_b1 + HIDDEN, *to_b2 = to_w2 + (1 + OUT) * HIDDEN;
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int unit = 16 * (UNITS * warp + u) + g + (e & 2) * 4, column = 2 * q + (e & 1);
#pragma unroll
      for (int m = 0; m < STEPS; ++m) {
        int c = feature_of(m, column);
        if (c < C) to[unit * C + c] = LOG2E * grad.w1[u][m][e];
      }
      if (column == 0) to_b1[unit] = LOG2E * grad.b1[u][e];
#pragma unroll
      for (int j = 0; j < TILES; ++j)
        if (out_row(8 * j + column) >= 0) to_w2[out_row(8 * j + column) * HIDDEN + unit] = out_unit(8 * j + column) * grad.w2[u][j][e];
    }
#pragma unroll
  for (int i = 0; i < B2_TILES; ++i) {
    float sum = grad.b2[i] / CUT;
    sum += __shfl_xor_sync(ALL, sum, 1);
    sum += __shfl_xor_sync(ALL, sum, 2);
    int n = 8 * (warp + WARPS * i) + g;
    if (q == 0 && n <= OUT) to_b2[out_row(n)] = n < OUT ? LOG2E * sum : sum;
  }
}

// --- a ray ---

struct RayGradient {
  float colour[8 * TILES];  // of the sum of w * colour
  float opacity, depth;     // of the opacity (the background's part included) and of the depth
};

// A warp's ray is kept in shared memory: there are no registers for it.
struct Kept {
  Ray ray;
  RayGradient grad;
};
static_assert(KEPT_PLACE + sizeof(Kept) / 4 <= WARP_FLOATS, "it fits");

DEV void find_gradient(const Params &p, const Ray &ray, int index, RayGradient &grad) {
  const float *background = p.background + (long long)ray.pixel * p.background_stride;
  float behind = 0.f;
  for (int c = lane_id(); c < 8 * TILES; c += 32) {
    float g = c < OUT && p.g_features ? 2.f * p.g_features[(long long)index * OUT + c] : 0.f;
    grad.colour[c] = g;
    if (c < OUT) behind = fmaf(g, background[c], behind);
  }
  behind = warp_sum(behind);
  if (lane_id() == 0) {
    grad.opacity = (p.g_opacity ? p.g_opacity[index] : 0.f) - behind;
    grad.depth = p.g_depth ? p.g_depth[index] : 0.f;
  }
  __syncwarp();
}

DEV float2 colour_gradient(const RayGradient &grad, int tile) {  // of this lane's columns
  return *(const float2 *)(grad.colour + 8 * tile + 2 * (lane_id() & 3));
}

// Raw densities of `count` samples at t, and how much each colour is worth: the gradient's product with it.
DEV void evaluate(const Params &p, const Mlp &mlp, const Ray &ray, const RayGradient &grad,
                  const float *t, int count, Cells *cells, float *raw, float *worth) {
  int g = lane_id() >> 2, q = lane_id() & 3;
#pragma unroll 1
  for (int first = 0; first < count; first += 16) {
    int k = first + g;
    float f[2][CHUNKS][4], out[TILES][4];
    find_cells(p, ray, t + first, count - first, cells);
    gather(p, scene_planes(p, ray), cells, f);
    mlp_forward(mlp, f, nullptr, out);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < TILES; ++j) {
        float2 colour = colour_gradient(grad, j);
        sum = fmaf(colour.x, fmaf(sigmoid2(out[j][2 * half]), 1.002f, -0.001f), sum);
        sum = fmaf(colour.y, fmaf(sigmoid2(out[j][2 * half + 1]), 1.002f, -0.001f), sum);
      }
      sum += __shfl_xor_sync(ALL, sum, 1);
      sum += __shfl_xor_sync(ALL, sum, 2);
      if (k + 8 * half < count) {
        if (q == DENSE_Q) raw[k + 8 * half] = out[DENSE_TILE][2 * half + DENSE_E];
        if (q == 0) worth[k + 8 * half] = sum;
      }
    }
  }
  __syncwarp();
}

// Gradients through compositing, from sorted t, raw, worth: weight[k] and slope[k] (gradient of the mean raw density) of
// interval k, zero at -1 and N - 1.
DEV void composite_backward(const float *t, const float *raw, const float *worth, const RayGradient &grad, float *weight,
                            float *slope, float *reach) {
  int lane = lane_id();
  interval_weights<N>(t, raw, weight, reach);
  if (lane == 0) weight[-1] = weight[N - 1] = slope[-1] = slope[N - 1] = 0.f;
  Totals sum = totals<N>(t, weight);
  float g_moment = grad.depth * sum.free / fmaxf(sum.opacity, FAINT), g_opacity = grad.opacity;
  if (sum.opacity >= FAINT) g_opacity -= g_moment * sum.moment / sum.opacity;
  constexpr int ROUNDS = (N + 30) / 32;
  float g_weight[ROUNDS], suffix[ROUNDS], behind = 0.f;  // behind: sum of gradient times weight of the intervals behind
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    int k = 32 * i + lane;
    g_weight[i] = suffix[i] = 0.f;
    if (k < N - 1) {
      g_weight[i] = 0.5f * (worth[k] + worth[k + 1]) + g_moment * (0.5f * (t[k] + t[k + 1]) - sum.end) + g_opacity;
      suffix[i] = g_weight[i] * weight[k];
    }
  }
  suffix_sum(suffix);
#pragma unroll
  for (int i = ROUNDS - 1; i >= 0; --i) {
    int k = 32 * i + lane;
    float next = __shfl_down_sync(ALL, suffix[i], 1);
    if (k < N - 1) {
      Interval in = interval(t, raw, k);
      float through = fast_exp(-in.depth), all_behind = behind + (lane == 31 ? 0.f : next);
      float g_depth = through * (g_weight[i] * reach[k] - all_behind * fast_reciprocal(through + LEAK));
      slope[k] = g_depth * in.length * sigmoid2(LOG2E * in.mean);
    }
    behind += __shfl_sync(ALL, suffix[i], 0);
  }
  __syncwarp();
}

// One tile forward and back: fills `tile` for the other warps and g_f with the gradients of the features.
DEV void tile_backward(const Mlp &mlp, const float (&f)[2][CHUNKS][4], const RayGradient &grad, const float (&weight)[2],
                       const float (&slope)[2], const Tile &tile, float (&g_f)[2][CHUNKS][4]) {
  int g = lane_id() >> 2, q = lane_id() & 3;
  float out[TILES][4];
  mlp_forward(mlp, f, tile.h, out);
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    int i = s >> 1, b = 2 * (s & 1);
    store_quad(tile.f, F_ROW, s, f[0][i][b], f[1][i][b], f[0][i][b + 1], f[1][i][b + 1]);
  }
#pragma unroll
  for (int j = 0; j < TILES; ++j) {
    float2 colour = colour_gradient(grad, j);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int row = e >> 1;
      float s = sigmoid2(out[j][e]);
      out[j][e] = weight[row] * (e & 1 ? colour.y : colour.x) * (s - s * s);  // the gradient is 0 beyond OUT
      if (j == DENSE_TILE && (e & 1) == DENSE_E && q == DENSE_Q) out[j][e] = slope[row];
      out[j][e] = to_tf32(out[j][e]);
    }
    store_quad(tile.g_out, O_ROW, j, out[j][0], out[j][2], out[j][1], out[j][3]);
  }
  float back[STEPS][4];
#pragma unroll
  for (int s = 0; s < STEPS; ++s) back[s][0] = back[s][1] = back[s][2] = back[s][3] = 0.f;
  int even = block_row(2 * q) + g, odd = block_row(2 * q + 1) + g;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    asm volatile("" ::: "memory");  // weights are read when they are needed: there are no registers for more
    float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      const float *w = mlp.w2 + (j * 8 + n) * 64;
      mma(d, out[j][0], out[j][2], out[j][1], out[j][3], w[even], w[odd]);
    }
    float4 h4 = *quad(tile.h, H_ROW, n);
    float h[4] = {h4.x, h4.z, h4.y, h4.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] *= fmaf(fast_exp2(-h[e]), -CUT, CUT);  // the slope of softplus2, from its value
    store_quad(tile.g_h, H_ROW, n, d[0], d[2], d[1], d[3]);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const float *w = mlp.w1 + (n * STEPS + s) * 64;
      mma(back[s], d[0], d[2], d[1], d[3], w[even], w[odd]);
    }
  }
#pragma unroll
  for (int s = 0; s < STEPS; ++s)
#pragma unroll
    for (int e = 0; e < 4; ++e) g_f[e >> 1][s >> 1][2 * (s & 1) + (e & 1)] = back[s][e];
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BACKWARD_BLOCKS) render_backward(const Params p) {
  extern __shared__ float4 shared4[];
  float *shared = (float *)shared4;
  __shared__ int busy[WARPS];
  Mlp mlp = load_mlp(shared, p);
  int warp = warp_id(), lane = lane_id(), g = lane >> 2, q = lane & 3;
  Tile tile = tile_of(shared, warp);
  float *t = shared + WEIGHT_FLOATS + warp * WARP_FLOATS, *raw = t + ROW, *sorted_t = raw + ROW;
  // Other uses of a tile's place, while it has no activations.
  float *worth = tile.h, *sorted_raw = worth + ROW, *sorted_worth = sorted_raw + ROW;
  Cells *cells = (Cells *)tile.g_out;
  int2 *table = (int2 *)tile.h;
  static_assert(3 * ROW <= H_FLOATS && CELL_FLOATS <= O_FLOATS && TAP_FLOATS <= H_FLOATS && 16 * G_ROW <= H_FLOATS, "fit");
  Kept &kept = *(Kept *)(tile.g_out + O_FLOATS);
  const Ray &ray = kept.ray;
  const RayGradient &grad = kept.grad;
  MlpGradient sums = {};

  for (int start = blockIdx.x * WARPS; start < p.rays; start += gridDim.x * WARPS) {
    int index = start + warp;
    __syncwarp();
    if (lane == 0) kept.ray = make_ray(p, min(index, p.rays - 1));
    __syncwarp();
    bool hit = all_lanes(ray.hit && index < p.rays);
    find_gradient(p, ray, min(index, p.rays - 1), kept.grad);
    float *weight = t + 1, *slope = raw + 1;
    if (hit) {
      coarse_depths(p, ray, index, t);
      Places places = {};
#pragma unroll 1
      for (int stage = 0; stage < (KF > 0 ? 2 : 1); ++stage) {
        asm volatile("" : "+r"(stage));  // or the compiler copies the loop's body
#if KF > 0
        if (stage == 1) {
          interval_weights<K>(t, raw, sorted_raw, nullptr);
          places = importance_depths(p, index, t, sorted_raw, sorted_t, worth + K, t + K);
        }
#endif
        int first = stage * K;
        evaluate(p, mlp, ray, grad, t + first, stage ? KF : K, cells, raw + first, worth + first);
      }
#pragma unroll
      for (int i = 0; i < ALL_ROUNDS; ++i) {
        int k = sample_of(i), place = place_of(places, i);
        if (k < 0) continue;
        sorted_t[place] = t[k];
        sorted_raw[place] = raw[k];
        sorted_worth[place] = worth[k];
      }
      __syncwarp();
      composite_backward(sorted_t, sorted_raw, sorted_worth, grad, weight, slope, worth);
    }
    if (lane == 0) busy[warp] = hit;
    if (!__syncthreads_or(hit)) continue;
    Accumulator acc = {};
    acc.texel[0] = acc.texel[1] = acc.texel[2] = -1;
#pragma unroll 1
    for (int first = 0; first < N; first += 16) {
      float g_f[2][CHUNKS][4];
      if (hit) {
        float f[2][CHUNKS][4], w[2], d[2];
        int k = first + g;
        find_cells(p, ray, sorted_t + first, N - first, cells);
        gather(p, scene_planes(p, ray), cells, f);
        __syncwarp();
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          bool valid = k + 8 * row < N;
          // 1.002 s (1 - s) is the slope of a colour, for which LN2 times as much goes to what sigmoid2 is taken of.
          w[row] = valid ? 0.501f * LN2 * (weight[k + 8 * row - 1] + weight[k + 8 * row]) : 0.f;
          d[row] = valid ? 0.5f * (slope[k + 8 * row - 1] + slope[k + 8 * row]) : 0.f;
        }
        tile_backward(mlp, f, grad, w, d, tile, g_f);
      }
      __syncthreads();
      for (int w = 0; w < WARPS; ++w)
        if (busy[w]) accumulate(tile_of(shared, w), warp, sums);
      __syncthreads();
      if (hit) {  // the tile's places are free again
#pragma unroll
        for (int row = 0; row < 2; ++row)
#pragma unroll
          for (int i = 0; i < CHUNKS; ++i)
            if (C % 16 == 0 || 16 * i + 4 * q < C)
              *(float4 *)(tile.g_h + (g + 8 * row) * G_ROW + 16 * i + 4 * q) = {g_f[row][i][0], g_f[row][i][1], g_f[row][i][2], g_f[row][i][3]};
        tap_table(p, ray, sorted_t + first, N - first, table);
        scatter(p, ray, table, tile.g_h, min(16, N - first), acc);
        __syncwarp();
      }
    }
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) change(p, scene_sums(p, ray), acc, plane, -1);
  }
  store(p.partial + (long long)blockIdx.x * PARTIAL, warp, sums);
}
