// SPDX-License-Identifier: Apache-2.0
// Backward pass. A warp recomputes its ray's samples, then goes along them in order, a tile at a time, through the MLP
// again and back. A block's warps go in step: after each tile they share its activations, and each adds up the gradient
// of its own part of the hidden units, in registers, for the whole kernel.
#include "ray.cuh"

constexpr int UNITS = 4 / WARPS;  // 16s of hidden units a warp owns
// Lengths of rows that spread four samples of eight columns over all banks.
constexpr __host__ __device__ int padded(int columns) { return columns % 16 == 0 ? columns + 8 : columns; }
constexpr int H_ROW = padded(HIDDEN), F_ROW = padded(C), O_ROW = padded(8 * TILES), F_TILES = C / 8;
constexpr int H_FLOATS = 16 * H_ROW, F_FLOATS = 16 * F_ROW, O_FLOATS = 16 * O_ROW;
constexpr int ARRAYS = (3 * ROW + 3) / 4 * 4, WARP_FLOATS = ARRAYS + 2 * H_FLOATS + F_FLOATS + O_FLOATS;
static_assert(4 * (WEIGHT_FLOATS + WARPS * WARP_FLOATS) == SHARED_BYTES, "build.py counts alike");
constexpr int PARTIAL = HIDDEN * C + HIDDEN + (1 + OUT) * HIDDEN + 1 + OUT;
static_assert(TAP_FLOATS <= H_FLOATS && 3 * ROW <= H_FLOATS, "what else has the place of a tile's activations");

// --- gradients of the planes ---

// Successive samples share texels. Each of the four parities of the table of taps has eight lanes, which keep the sum of
// one texel until a sample has another texel of that parity: only then the sum goes to memory.
struct Accumulator {
  static constexpr int PARTS = (C + 31) / 32;  // lanes hold four features of each 32
  int texel[3];
  float4 sum[3][PARTS];
};

// start of the scene in g_planes and texel in the scene count elements.
DEV void flush(const Params &p, long long start, int texel, float4 v, int feature) {
  long long offset = start + texel + feature;
#if DETERMINISTIC
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
    if (fixed != 0) atomicAdd((u64 *)p.g_planes + offset + e, (u64)fixed);
  }
#else
  float *at = (float *)p.g_planes + offset;
#if __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
#else
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at), "f"(v.x) : "memory");
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at + 1), "f"(v.y) : "memory");
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at + 2), "f"(v.z) : "memory");
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at + 3), "f"(v.w) : "memory");
#endif
#endif
}

DEV void flush(const Params &p, long long start, Accumulator &acc, int plane) {
  int feature = 4 * (lane_id() & 7);
#pragma unroll
  for (int i = 0; i < Accumulator::PARTS; ++i) {
    if (acc.texel[plane] >= 0 && feature + 32 * i < C) flush(p, start, acc.texel[plane], acc.sum[plane][i], feature + 32 * i);
    acc.sum[plane][i] = {0.f, 0.f, 0.f, 0.f};
  }
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

// Adds the gradients of `count` samples' features (g_f [16][F_ROW]) to the planes.
DEV void scatter(const Params &p, const void *base, long long start, const int2 *table, const float *g_f, int count, Accumulator &acc) {
  int parity = lane_id() >> 3, feature = 4 * (lane_id() & 7);
  for (int s = 0; s < count; ++s) {
    int2 tap[3];
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
      tap[plane] = table[s * TAP_ROW + plane * 4 + parity];
      if (tap[plane].y << 1 != 0 && tap[plane].x != acc.texel[plane]) {  // the weight is not 0
        flush(p, start, acc, plane);
        acc.texel[plane] = tap[plane].x;
      }
    }
#pragma unroll
    for (int i = 0; i < Accumulator::PARTS; ++i) {
      if (C % 32 != 0 && feature + 32 * i >= C && !PRODUCT) continue;
      bool mine = feature + 32 * i < C;
      float4 g = mine ? *(const float4 *)(g_f + s * F_ROW + feature + 32 * i) : float4{0.f, 0.f, 0.f, 0.f};
      float4 share[3] = {g, g, g};
#if PRODUCT
      float4 read[3];
#pragma unroll
      for (int plane = 0; plane < 3; ++plane) {
        float4 v = {0.f, 0.f, 0.f, 0.f};
        float w = __int_as_float(tap[plane].y);
        if (mine) v = read_texel(advance(base, feature + 32 * i), tap[plane].x);
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

// Gradients of a block's hidden units: rows 16 (UNITS warp + u) + g (+ 8) of the products' layouts.
struct MlpGradient {
  float w1[UNITS][F_TILES][4], b1[UNITS][4], w2[UNITS][TILES][4];
  float b2[TILES][2];  // of this warp's own samples, columns 8 tile + 2 q (+ 1)
};

struct Tile {
  float *h, *g_h, *f, *g_out;  // [16][...]: activations, gradients before the activation, features, gradients of outputs
};

// Adds a tile's share to the gradients of this warp's hidden units.
DEV void accumulate(const Tile &tile, int warp, MlpGradient &grad) {
  int g = lane_id() >> 2, q = lane_id() & 3;
  float one = g == 0 ? 1.f : 0.f;
#pragma unroll
  for (int s = 0; s < 16; s += 8) {
    int low = s + q, high = s + q + 4;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      int unit = 16 * (UNITS * warp + u) + g;
      const float *a = tile.g_h + unit, *b = tile.h + unit;
      float a0 = a[low * H_ROW], a1 = a[low * H_ROW + 8], a2 = a[high * H_ROW], a3 = a[high * H_ROW + 8];
#pragma unroll
      for (int m = 0; m < F_TILES; ++m)
        mma(grad.w1[u][m], a0, a1, a2, a3, tile.f[low * F_ROW + 8 * m + g], tile.f[high * F_ROW + 8 * m + g]);
      mma(grad.b1[u], a0, a1, a2, a3, one, one);
      a0 = b[low * H_ROW], a1 = b[low * H_ROW + 8], a2 = b[high * H_ROW], a3 = b[high * H_ROW + 8];
#pragma unroll
      for (int j = 0; j < TILES; ++j)
        mma(grad.w2[u][j], a0, a1, a2, a3, tile.g_out[low * O_ROW + 8 * j + g], tile.g_out[high * O_ROW + 8 * j + g]);
    }
  }
}

// Writes the block's sums, as the weights lie in memory: w1, b1, w2, b2.
DEV void store(float *to, int warp, const MlpGradient &grad, float *shared) {
  int lane = lane_id(), g = lane >> 2, q = lane & 3;
  float *to_b1 = to + HIDDEN * C, *to_w2 = to_b1 + HIDDEN, *to_b2 = to_w2 + (1 + OUT) * HIDDEN;
#pragma unroll
  for (int u = 0; u < UNITS; ++u)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int unit = 16 * (UNITS * warp + u) + g + (e & 2) * 4, column = 2 * q + (e & 1);
#pragma unroll
      for (int m = 0; m < F_TILES; ++m) to[unit * C + 8 * m + column] = grad.w1[u][m][e];
      if (column == 0) to_b1[unit] = grad.b1[u][e];
#pragma unroll
      for (int j = 0; j < TILES; ++j)
        if (out_row(8 * j + column) >= 0) to_w2[out_row(8 * j + column) * HIDDEN + unit] = grad.w2[u][j][e];
    }
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = grad.b2[j][e];
#pragma unroll
      for (int d = 4; d < 32; d <<= 1) sum += __shfl_xor_sync(ALL, sum, d);
      if (g == 0) shared[warp * 8 * TILES + 8 * j + 2 * q + e] = sum;
    }
  __syncthreads();
  for (int n = threadIdx.x; n < 1 + OUT; n += blockDim.x) {
    float sum = 0.f;
    for (int w = 0; w < WARPS; ++w) sum += shared[w * 8 * TILES + n];
    to_b2[out_row(n)] = sum;
  }
}

// --- a ray ---

struct RayGradient {
  float colour[TILES][2];  // of the sum of w * colour, columns 8 tile + 2 q (+ 1)
  float opacity, depth;    // of the opacity (the background's part included) and of the depth
};

DEV RayGradient ray_gradient(const Params &p, const Ray &ray, int index) {
  RayGradient grad;
  int q = lane_id() & 3;
  const float *background = p.background + (long long)ray.pixel * p.background_stride;
  float behind = 0.f;
#pragma unroll
  for (int j = 0; j < TILES; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int c = 8 * j + 2 * q + e;
      grad.colour[j][e] = c < OUT && p.g_features ? 2.f * p.g_features[(long long)index * OUT + c] : 0.f;
      if (c < OUT) behind = fmaf(grad.colour[j][e], background[c], behind);
    }
  behind += __shfl_xor_sync(ALL, behind, 1);
  behind += __shfl_xor_sync(ALL, behind, 2);
  grad.opacity = (p.g_opacity ? p.g_opacity[index] : 0.f) - behind;
  grad.depth = p.g_depth ? p.g_depth[index] : 0.f;
  return grad;
}

// Raw densities of `count` samples at t, and how much each colour is worth: the gradient's product with it.
DEV void evaluate(const Params &p, const Mlp &mlp, const Ray &ray, const void *base, const RayGradient &grad,
                  const float *t, int count, int2 *table, float *raw, float *worth) {
  int g = lane_id() >> 2, q = lane_id() & 3;
#pragma unroll 1
  for (int first = 0; first < count; first += 16) {
    int k = first + g;
    float f[2][CHUNKS][4], out[TILES][4];
    tap_table(p, ray, t + first, count - first, table);
    gather(base, table, f);
    mlp_forward<false>(mlp, f, nullptr, out);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < TILES; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          sum = fmaf(grad.colour[j][e], fmaf(sigmoid(out[j][2 * half + e]), 1.002f, -0.001f), sum);
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
  float behind = 0.f;  // sum of gradient times weight of the intervals behind
#pragma unroll
  for (int base = (N - 2) / 32 * 32; base >= 0; base -= 32) {
    int k = base + lane;
    bool valid = k < N - 1;
    float g_weight = 0.f;
    if (valid) g_weight = 0.5f * (worth[k] + worth[k + 1]) + g_moment * (0.5f * (t[k] + t[k + 1]) - sum.end) + g_opacity;
    float suffix = suffix_sum(valid ? g_weight * weight[k] : 0.f), next = __shfl_down_sync(ALL, suffix, 1);
    if (valid) {
      Interval i = interval(t, raw, k);
      float through = expf(-i.depth);
      float g_depth = through * (g_weight * reach[k] - (behind + (lane == 31 ? 0.f : next)) / (through + LEAK));
      slope[k] = g_depth * i.length / (1.f + expf(-i.mean));
    }
    behind += __shfl_sync(ALL, suffix, 0);
  }
  __syncwarp();
}

// One tile forward and back: fills `tile` for the other warps and g_f with the gradients of the features.
DEV void tile_backward(const Mlp &mlp, const float (&f)[2][CHUNKS][4], const RayGradient &grad, const float (&weight)[2],
                       const float (&slope)[2], const Tile &tile, MlpGradient &sums, float (&g_f)[2][CHUNKS][4]) {
  int g = lane_id() >> 2, q = lane_id() & 3;
  float h[8][4], out[TILES][4];
  mlp_forward<true>(mlp, f, h, out);
#pragma unroll
  for (int row = 0; row < 2; ++row)
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
      if (C % 16 == 0 || 16 * i + 4 * q < C)
        *(float4 *)(tile.f + (g + 8 * row) * F_ROW + 16 * i + 4 * q) = {f[row][i][0], f[row][i][1], f[row][i][2], f[row][i][3]};
#pragma unroll
  for (int j = 0; j < TILES; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int row = e >> 1;
      float s = sigmoid(out[j][e]);
      out[j][e] = weight[row] * grad.colour[j][e & 1] * 1.002f * s * (1.f - s);  // the gradient is 0 beyond OUT
      if (j == DENSE_TILE && (e & 1) == DENSE_E && q == DENSE_Q) out[j][e] = slope[row];
      sums.b2[j][e & 1] += out[j][e];
      out[j][e] = to_tf32(out[j][e]);
    }
    *(float2 *)(tile.g_out + g * O_ROW + 8 * j + 2 * q) = {out[j][0], out[j][1]};
    *(float2 *)(tile.g_out + (g + 8) * O_ROW + 8 * j + 2 * q) = {out[j][2], out[j][3]};
  }
  float back[STEPS][4];
#pragma unroll
  for (int s = 0; s < STEPS; ++s) back[s][0] = back[s][1] = back[s][2] = back[s][3] = 0.f;
  int even = block_row(2 * q) + g, odd = block_row(2 * q + 1) + g;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
      const float *w = mlp.w2 + (j * 8 + n) * 64;
      mma(d, out[j][0], out[j][2], out[j][1], out[j][3], w[even], w[odd]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) d[e] = to_tf32(d[e] * softplus_slope(h[n][e]));
    float *to = tile.h + g * H_ROW + 8 * n + 2 * q, *to_g = tile.g_h + g * H_ROW + 8 * n + 2 * q;
    *(float2 *)to = {h[n][0], h[n][1]};
    *(float2 *)(to + 8 * H_ROW) = {h[n][2], h[n][3]};
    *(float2 *)to_g = {d[0], d[1]};
    *(float2 *)(to_g + 8 * H_ROW) = {d[2], d[3]};
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
  auto tile_of = [&](int w) {
    float *h = shared + WEIGHT_FLOATS + w * WARP_FLOATS + ARRAYS;
    return Tile{h, h + H_FLOATS, h + 2 * H_FLOATS, h + 2 * H_FLOATS + F_FLOATS};
  };
  Tile tile = tile_of(warp);
  float *t = shared + WEIGHT_FLOATS + warp * WARP_FLOATS, *raw = t + ROW, *sorted_t = raw + ROW;
  float *worth = tile.h, *sorted_raw = worth + ROW, *sorted_worth = sorted_raw + ROW;  // until the first tile
  MlpGradient sums = {};
  Accumulator acc = {};
  acc.texel[0] = acc.texel[1] = acc.texel[2] = -1;

  for (int start = blockIdx.x * WARPS; start < p.rays; start += gridDim.x * WARPS) {
    int index = start + warp;
    Ray ray = make_ray(p, min(index, p.rays - 1));
    bool hit = all_lanes(ray.hit && index < p.rays);
    const void *base = scene_planes(p, ray);
    long long start_of_scene = scene_offset(p, ray);
    RayGradient grad = ray_gradient(p, ray, min(index, p.rays - 1));
    float *weight = t + 1, *slope = raw + 1;
    if (hit) {
      coarse_depths(p, ray, index, t);
#pragma unroll 1
      for (int stage = 0; stage < (KF > 0 ? 2 : 1); ++stage) {
        asm volatile("" : "+r"(stage));  // or the compiler copies the loop's body
        if (stage == 1) {
          interval_weights<K>(t, raw, sorted_raw, nullptr);
          importance_depths(p, index, t, sorted_raw, sorted_t, t + K);
        }
        int first = stage * K;
        evaluate(p, mlp, ray, base, grad, t + first, stage ? KF : K, (int2 *)tile.g_h, raw + first, worth + first);
      }
#pragma unroll
      for (int k = lane; k < N; k += 32) {
        int place = KF > 0 ? merged_rank(t, k) : k;
        sorted_t[place] = t[k];
        sorted_raw[place] = raw[k];
        sorted_worth[place] = worth[k];
      }
      __syncwarp();
      composite_backward(sorted_t, sorted_raw, sorted_worth, grad, weight, slope, worth);
    }
    if (lane == 0) busy[warp] = hit;
    if (!__syncthreads_or(hit)) continue;
#pragma unroll 1
    for (int first = 0; first < N; first += 16) {
      float g_f[2][CHUNKS][4];
      if (hit) {
        float f[2][CHUNKS][4], w[2], d[2];
        int k = first + g;
        tap_table(p, ray, sorted_t + first, N - first, (int2 *)tile.g_h);
        gather(base, (int2 *)tile.g_h, f);
        __syncwarp();
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          bool valid = k + 8 * row < N;
          w[row] = valid ? 0.5f * (weight[k + 8 * row - 1] + weight[k + 8 * row]) : 0.f;
          d[row] = valid ? 0.5f * (slope[k + 8 * row - 1] + slope[k + 8 * row]) : 0.f;
        }
        tile_backward(mlp, f, grad, w, d, tile, sums, g_f);
      }
      __syncthreads();
      for (int w = 0; w < WARPS; ++w)
        if (busy[w]) accumulate(tile_of(w), warp, sums);
      __syncthreads();
      if (hit) {  // the tile's places are free again
#pragma unroll
        for (int row = 0; row < 2; ++row)
#pragma unroll
          for (int i = 0; i < CHUNKS; ++i)
            if (C % 16 == 0 || 16 * i + 4 * q < C)
              *(float4 *)(tile.f + (g + 8 * row) * F_ROW + 16 * i + 4 * q) = {g_f[row][i][0], g_f[row][i][1], g_f[row][i][2], g_f[row][i][3]};
        int2 *table = (int2 *)tile.h;
        tap_table(p, ray, sorted_t + first, N - first, table);
        scatter(p, base, start_of_scene, table, tile.f, min(16, N - first), acc);
        __syncwarp();
      }
    }
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) {
      flush(p, start_of_scene, acc, plane);
      acc.texel[plane] = -1;
    }
  }
  __syncthreads();
  store(p.partial + (long long)blockIdx.x * PARTIAL, warp, sums, shared + WEIGHT_FLOATS);
}
