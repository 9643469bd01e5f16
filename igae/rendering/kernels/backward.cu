// SPDX-License-Identifier: Apache-2.0
// Backward pass. A warp finds its ray's samples again from the densities that the forward pass kept, then goes along them
// from the last to the first, a tile at a time, through the MLP again and back. A block's warps go in step: after each tile
// they share its activations, and each adds up the gradient of its own part of the hidden units, in registers, for the
// whole kernel: of its own tile before it waits for the others, then of theirs.
#include "mlp_gradient.cuh"
#include "ray.cuh"
#include "scatter.cuh"

constexpr int BLOCK_FLOATS = WEIGHT_FLOATS + W1_FLOATS, ARRAYS = 4 * ROW, KEPT_PLACE = ARRAYS + TILE_FLOATS;
constexpr int WARP_FLOATS = KEPT_PLACE + 8 * COLOUR_TILES + 36;
static_assert(4 * (BLOCK_FLOATS + WARPS * WARP_FLOATS) == SHARED_BYTES, "build.py counts alike");

DEV float *tile_of(float *shared, int warp) { return shared + BLOCK_FLOATS + warp * WARP_FLOATS + ARRAYS; }

// --- a ray ---

struct RayGradient {
  float colour[8 * COLOUR_TILES];  // of the sum of w * colour
  float opacity, moment, end;      // of the opacity (the background's part included), of sum w (t - end); last t
  float depth;
};

// A warp's ray is kept in shared memory: there are no registers for it.
struct Kept {
  Ray ray;
  RayGradient grad;
  float worth[16];  // of the last sample of each tile but the last
  // Of the tiles that are done: gradient times weight of all their intervals; gradient of the foremost of these.
  float sum_behind, slope_behind;
};
static_assert(KEPT_PLACE + sizeof(Kept) / 4 <= WARP_FLOATS, "it fits");

DEV void find_gradient(const Params &p, const Ray &ray, int index, RayGradient &grad) {
  const float *background = p.background + (long long)ray.pixel * p.background_stride;
  float behind = 0.f;
  for (int c = lane_id(); c < 8 * COLOUR_TILES; c += 32) {
    float g = c < OUT && p.g_features ? 2.f * p.g_features[(long long)index * OUT + c] : 0.f;
    grad.colour[c] = g;
    if (c < OUT) behind = fmaf(g, background[c] + 0.001f, behind);  // a colour is 1.002 s - 0.001
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

// How much the colours of this lane's rows g and g + 8 are worth: the gradient's product with what sigmoid2 makes of the
// MLP's outputs, which `out` becomes.
DEV void find_worth(const RayGradient &grad, float (&out)[COLOUR_TILES][4], float (&worth)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < COLOUR_TILES; ++j) {
      float2 colour = colour_gradient(grad, j);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float &s = out[j][2 * half + e];
        s = sigmoid2(s);
        sum = fmaf(e ? colour.y : colour.x, s, sum);
      }
    }
    worth[half] = row_sum(sum);
  }
}

// Compositing, backward, goes along the ray from its end. Gradients of a tile's samples, from first on: w[row] of their
// colours, d[row] of their raw densities.
DEV void composite_backward(const float *t, const float *weight, const float *direct, const float *hidden, Kept &kept,
                            int first, const float (&worth)[2], float (&w)[2], float (&d)[2]) {
  const RayGradient &grad = kept.grad;
  int r = lane_id() & 15, k = first + r - 1;  // the interval before sample first + r
  bool inside = k >= 0 && k < N - 1;
  k = min(max(k, 0), N - 2);
  float low = __shfl_sync(ALL, worth[0], 4 * (r & 7)), high = __shfl_sync(ALL, worth[1], 4 * (r & 7));
  float own = r < 8 ? low : high, last = __shfl_up_sync(ALL, own, 1, 16);
  last = r == 0 ? kept.worth[max(first / 16 - 1, 0)] : last;
  float part = inside ? weight[k] : 0.f;
  float gradient = 0.501f * (own + last) + fmaf(grad.moment, 0.5f * (t[k] + t[k + 1]) - grad.end, grad.opacity);
  float sum = inside ? gradient * part : 0.f;
#pragma unroll
  for (int step = 1; step < 16; step <<= 1) {
    float other = __shfl_down_sync(ALL, sum, step, 16);
    sum += r + step < 16 ? other : 0.f;
  }
  float next = __shfl_down_sync(ALL, sum, 1, 16), all_behind = kept.sum_behind + (r == 15 ? 0.f : next);
  float slope = inside ? direct[k] * gradient - hidden[k] * all_behind : 0.f;
  // A sample has half of each of its two intervals.
  float other_part = __shfl_down_sync(ALL, part, 1, 16), other_slope = __shfl_down_sync(ALL, slope, 1, 16);
  float part_behind = weight[min(first + 15, N - 1)], slope_behind = kept.slope_behind;
  other_part = r == 15 ? part_behind : other_part;
  other_slope = r == 15 ? slope_behind : other_slope;
  // 1.002 s (1 - s) is the slope of a colour, for which LN2 times as much goes to what sigmoid2 is taken of.
  float w_sample = 0.501f * LN2 * (part + other_part), d_sample = 0.5f * (slope + other_slope);
  __syncwarp();
  if (lane_id() == 0) {
    kept.sum_behind += sum;
    kept.slope_behind = slope;
  }
  int g = lane_id() >> 2;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    w[row] = __shfl_sync(ALL, w_sample, g + 8 * row);
    d[row] = __shfl_sync(ALL, d_sample, g + 8 * row);
  }
}

// One tile back: fills the rest of `tile`, which all warps add up, and g_f with the gradients of the features. slope: of the
// hidden units' activations; out: sigmoid2 of the MLP's outputs; w, d: see composite_backward.
DEV void tile_backward(const Mlp &mlp, const float (&slope)[8][4], float (&out)[COLOUR_TILES][4], const RayGradient &grad,
                       const float (&w)[2], const float (&d)[2], float *tile, float (&g_f)[2][CHUNKS][4]) {
  int g = lane_id() >> 2, q = lane_id() & 3;
#pragma unroll
  for (int j = 0; j < COLOUR_TILES; ++j) {
    float2 colour = colour_gradient(grad, j);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int row = e >> 1;
      float s = out[j][e];
      out[j][e] = w[row] * (e & 1 ? colour.y : colour.x) * (s - s * s);  // the gradient is 0 beyond OUT
    }
    store_quad(tile + G_OUT_AT, j, out[j][0], out[j][2], out[j][1], out[j][3]);
  }
  if (q == 0) *(float2 *)(tile + DENSE_AT + 2 * g) = {d[0], d[1]};
  float back[STEPS][4];
#pragma unroll
  for (int s = 0; s < STEPS; ++s) back[s][0] = back[s][1] = back[s][2] = back[s][3] = 0.f;
  int even = block_row(2 * q) + g, odd = block_row(2 * q + 1) + g;
#pragma unroll
  for (int n = 0; n < 8; n += 2) {  // as in mlp_forward
    asm volatile("" ::: "memory");
    float g_h[2][4];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      float2 w = *(const float2 *)(mlp.dense + 8 * (n + u) + 2 * q);
#pragma unroll
      for (int e = 0; e < 4; ++e) g_h[u][e] = (e & 1 ? w.y : w.x) * d[e >> 1];
    }
#pragma unroll
    for (int j = 0; j < COLOUR_TILES; ++j)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const float *w = mlp.w2 + (j * 8 + n + u) * 64;
        mma(g_h[u], out[j][0], out[j][2], out[j][1], out[j][3], w[even], w[odd]);
      }
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int e = 0; e < 4; ++e) g_h[u][e] *= slope[n + u][e];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        float4 w = *((const float4 *)mlp.w1_back + ((n + u) * CHUNKS + i) * 32 + lane_id());
        mma(back[2 * i], g_h[u][0], g_h[u][2], g_h[u][1], g_h[u][3], w.x, w.y);
        mma(back[2 * i + 1], g_h[u][0], g_h[u][2], g_h[u][1], g_h[u][3], w.z, w.w);
      }
#pragma unroll
    for (int u = 0; u < 2; ++u) store_quad(tile + G_HIDDEN_AT, n + u, g_h[u][0], g_h[u][1], g_h[u][2], g_h[u][3]);
  }
#pragma unroll
  for (int s = 0; s < STEPS; ++s)
#pragma unroll
    for (int e = 0; e < 4; ++e) g_f[e >> 1][s >> 1][2 * (s & 1) + (e & 1)] = back[s][e];
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BACKWARD_BLOCKS) render_backward(const Params p) {
  extern __shared__ float4 shared4[];
  float *shared = (float *)shared4;
  Mlp mlp = load_mlp<true>(shared, p);
  int warp = warp_id(), lane = lane_id(), g = lane >> 2, q = lane & 3;
  float *tile = tile_of(shared, warp), *t = shared + BLOCK_FLOATS + warp * WARP_FLOATS;
  float *raw = t + ROW, *sorted_t = raw + ROW, *sorted_raw = sorted_t + ROW;
  float *weight = t + 1, *direct = raw, *hidden = sorted_raw;  // what is in these places later
  // Other uses of a tile's place, while it has no activations.
  float *draws = tile, *gradients = tile;  // before there are runs
  Runs &runs = *(Runs *)tile;
  Cells *cells = (Cells *)(tile + (PRODUCT ? MATRIX_FLOATS : 0));
  static_assert(ROW <= DENSE_AT && MATRIX_FLOATS + (PRODUCT ? CELL_FLOATS : 0) <= DENSE_AT, "they fit");
  Kept &kept = *(Kept *)(t + KEPT_PLACE);
  const Ray &ray = kept.ray;
  const RayGradient &grad = kept.grad;
  MlpGradient sums = {};
  if (lane < 16) tile[DENSE_AT + 16 + lane] = 0.f;

  for (int start = blockIdx.x * WARPS; start < p.rays; start += gridDim.x * WARPS) {
    int index = start + warp;
    __syncwarp();
    if (lane == 0) kept.ray = make_ray(p, min(index, p.rays - 1));
    __syncwarp();
    bool hit = all_lanes(ray.hit && index < p.rays);
    if (hit) {
#pragma unroll
      for (int k = lane; k < N; k += 32) raw[k] = p.densities[(long long)index * N + k];
      find_gradient(p, ray, index, kept.grad);
      coarse_depths(p, ray, index, t);
      Places places = {};
#if KF > 0
      interval_weights<K, false>(t, raw, sorted_raw, nullptr, nullptr);
      places = importance_depths(p, index, t, sorted_raw, sorted_t, draws, t + K);
#endif
#pragma unroll
      for (int i = 0; i < ALL_ROUNDS; ++i) {
        int k = sample_of(i), place = place_of(places, i);
        if (k < 0) continue;
        sorted_t[place] = t[k];
        sorted_raw[place] = raw[k];
      }
      __syncwarp();
      interval_weights<N, true>(sorted_t, sorted_raw, weight, direct, hidden);
      Totals sum = totals<N>(sorted_t, weight);
      if (lane == 0) {
        weight[-1] = weight[N - 1] = kept.sum_behind = kept.slope_behind = 0.f;
        float g_moment = grad.depth * sum.free / fmaxf(sum.opacity, FAINT);
        kept.grad.moment = g_moment;
        kept.grad.end = sum.end;
        if (sum.opacity >= FAINT) kept.grad.opacity -= g_moment * sum.moment / sum.opacity;
      }
      __syncwarp();
      if (R16 > 1) {  // a tile of the last samples of tiles
        constexpr int HALVES = R16 > 9 ? 2 : 1;
        float f[2][CHUNKS][4] = {}, h[8][4], out[COLOUR_TILES][4], worth[2];
        find_cells(p, ray, sorted_t[min(16 * (lane & 15) + 15, N - 1)], cells);
        gather<HALVES>(p, scene_planes(p, ray), cells, f);
        mlp_forward<false, false>(mlp, f, nullptr, h, out);
        find_worth(grad, out, worth);
        if (q == 0) {
          kept.worth[g] = worth[0];
          kept.worth[g + 8] = worth[1];
        }
        __syncwarp();
      }
    }
    if (!hit)  // what the others add up of it is nothing
      for (int i = lane; i < TILE_FLOATS / 4; i += 32) ((float4 *)tile)[i] = {0.f, 0.f, 0.f, 0.f};
    if (!__syncthreads_or(hit)) continue;
#pragma unroll 1
    for (int first = 16 * (R16 - 1); first >= 0; first -= 16) {
      float g_f[2][CHUNKS][4];
      if (hit) {
        float f[2][CHUNKS][4], h[8][4], out[COLOUR_TILES][4], worth[2], w[2], d[2];
        find_cells(p, ray, sorted_t[min(first + (lane & 15), N - 1)], cells);
        gather<2>(p, scene_planes(p, ray), cells, f);
        __syncwarp();
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
          int i = s >> 1, b = 2 * (s & 1);
          store_quad(tile + FEATURES_AT, s, f[0][i][b], f[1][i][b], f[0][i][b + 1], f[1][i][b + 1]);
        }
        asm volatile("" ::: "memory");  // fewer numbers are alive if features are stored first
        mlp_forward<true, true>(mlp, f, tile + HIDDEN_AT, h, out);
        find_worth(grad, out, worth);
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) h[n][e] = 1.f - fast_exp2(-h[n][e]);  // the slope of softplus2, from its value
        composite_backward(sorted_t, weight, direct, hidden, kept, first, worth, w, d);
        tile_backward(mlp, h, out, grad, w, d, tile, g_f);
        __syncwarp();
        accumulate<true>(tile, warp, sums);  // before the others have theirs
      }
      __syncthreads();
      float at = sorted_t[min(first + (lane & 15), N - 1)];
      Spots spots = find_spots(p, ray, at);  // for rays that hit; of others it is nothing that would be used
      Found found;
      int total = find_runs(p, spots, 0, found);  // goes along with the products that follow
#pragma unroll
      for (int w = 1; w < WARPS; ++w) accumulate<false>(tile_of(shared, (warp + w) % WARPS), warp, sums);
      __syncthreads();
      if (hit) scatter(p, ray, at, spots, found, total, g_f, gradients, runs, cells);  // the places are free
    }
  }
  __syncthreads();
  store(p.partial + (long long)blockIdx.x * PARTIAL, warp, sums, shared + BLOCK_FLOATS);
}
