// SPDX-License-Identifier: Apache-2.0
// Backward pass. A warp recomputes its ray's samples, then goes along them in order, a tile at a time, through the MLP
// again and back. A block's warps go in step: after each tile they share its activations, and each adds up the gradient
// of its own part of the hidden units, in registers, for the whole kernel.
#include "mlp_gradient.cuh"
#include "ray.cuh"
#include "scatter.cuh"

constexpr int ARRAYS = (3 * ROW + 3) / 4 * 4, KEPT_PLACE = ARRAYS + TILE_FLOATS;
constexpr int WARP_FLOATS = KEPT_PLACE + (8 * TILES + 14 + 3) / 4 * 4;
static_assert(4 * (WEIGHT_FLOATS + WARPS * WARP_FLOATS) == SHARED_BYTES, "build.py counts alike");

DEV Tile tile_of(float *shared, int warp) { return tile_at(shared + WEIGHT_FLOATS + warp * WARP_FLOATS + ARRAYS); }

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
