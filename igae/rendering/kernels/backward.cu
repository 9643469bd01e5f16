// SPDX-License-Identifier: Apache-2.0
// Backward pass. A warp takes its ray's samples from what the forward pass kept and goes along them
// from the last to the first, a tile at a time, through the MLP again and back. A block's warps go in step: after each tile
// they share its activations, and each adds up the gradient of its own part of the hidden units, in registers, for the
// whole kernel: of its own tile before it waits for the others, then of theirs.
#include "distortion.cuh"
#include "features.cuh"
#include "mlp_gradient.cuh"
#include "scatter.cuh"

constexpr int BLOCK_FLOATS = WEIGHT_FLOATS + BACK_FLOATS, ARRAYS = 4 * ROW + (DISTORTION ? (ROW + 3) / 4 * 4 : 0);
constexpr int KEPT_PLACE = ARRAYS + TILE_FLOATS + GRADIENT_FLOATS;
constexpr int BIASES_PLACE = KEPT_PLACE + 8 * COLOR_TILES + 40, ORDER_PLACE = BIASES_PLACE + BIAS_FLOATS;
constexpr int OWN_FEATURES_PLACE = (ORDER_PLACE + ORDER_FLOATS + 3) / 4 * 4;
constexpr int WARP_FLOATS = KEEP_FEATURES ? OWN_FEATURES_PLACE + 64 * LANE_WORDS : ORDER_PLACE;
static_assert(4 * (BLOCK_FLOATS + WARPS * WARP_FLOATS) == SHARED_BYTES, "build.py counts alike");

DEV float *tile_of(float *shared, int warp) { return shared + BLOCK_FLOATS + warp * WARP_FLOATS + ARRAYS; }

// --- a ray ---

struct RayGradient {
  float color[8 * COLOR_TILES];  // of the sum of w * color
  float opacity, moment, end;      // of the opacity (the background's part included), of sum w (t - end); last t
  float depth, distortion;         // the latter in units of t
};

// A warp's ray is kept in shared memory: there are no registers for it.
struct Kept {
  Ray ray;
  RayGradient grad;
  float worth[16];  // of the last sample of each tile but the last
  // Of the tiles that are done: gradient times weight of all their intervals; gradient of the foremost of these.
  float sum_behind, slope_behind;
  // Of the ray's gradients, which are in a unit of their own: what makes up for it, and what brings them to the block's.
  float rest, share;
  float unit, gain;  // see block_unit
};
static_assert(KEPT_PLACE + sizeof(Kept) / 4 <= BIASES_PLACE, "it fits");

// Gradients of a ray's results: of this lane's color, of opacity, depth, distortion. It has an equal part in its pixel.
struct Given {
  float color, opacity, depth, distortion;
};
DEV Given find_given(const Params &p, int index) {
  constexpr float part = 1.f / RAYS;
  int pixel = index / RAYS;
  const float *colors = p.g_features + (long long)pixel * OUT;
  asm("" : "+l"(colors));  // as in the kernel
  return {p.g_features && lane_id() < OUT ? part * colors[lane_id()] : 0.f, p.g_opacity ? part * p.g_opacity[pixel] : 0.f,
          p.g_depth ? part * p.g_depth[pixel] : 0.f,
          DISTORTION && p.g_distortion ? part / p.box * p.g_distortion[pixel] : 0.f};
}

// This lane's part of a bound of what the weight of one of a ray's intervals can be worth.
DEV float worth_bound(const Params &p, const Given &given) {
  float length = p.far > 0.f ? p.far : 1.75f * p.box;
  float bound = fmaxf(4 * OUT * fabsf(given.color), fmaxf(fabsf(given.opacity), length * fabsf(given.depth)));
  return DISTORTION ? fmaxf(bound, 2 * length * fabsf(given.distortion)) : bound;
}

// A power of two for gradients, so that none that goes through float16 is too large for it, and as few as can be too small.
// Of positive floats the upper bits are the exponent. Gradients of features are hardly ever 16 times as large as the bound.
DEV float unit_of(float bound) {
  if (FP32) return 1.f;
  int exponent = (int)(__float_as_uint(bound) >> 23) - 127;
  return __uint_as_float((u32)(127 + min(max(11 - exponent, -100), 100)) << 23);
}

// The unit of this block's gradients of the MLP, and how much larger than the worth of an interval's weight a gradient can
// be. shared: scratch of three floats a warp.
DEV float2 block_unit(const Params &p, float *shared) {
  if (FP32) return {1.f, 1.f};
  float found[3] = {};  // the largest: of the density's weights, of colors', worth
  int warp = warp_id(), i = threadIdx.x;
#pragma unroll 8
  for (int k = i; k < HIDDEN * (1 + OUT); k += 32 * WARPS) found[k >= HIDDEN] = fmaxf(found[k >= HIDDEN], fabsf(p.w2[k]));
#pragma unroll 4
  for (int start = blockIdx.x * WARPS; start < p.rays; start += gridDim.x * WARPS) {
    int index = min(start + warp, p.rays - 1);
    float first = p.kept[(long long)index * KEPT], bound = worth_bound(p, find_given(p, index));
    if (first == first) found[2] = fmaxf(found[2], bound);  // not of a ray that misses
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    found[k] = warp_max(found[k]);
    if (lane_id() == 0) shared[3 * warp + k] = found[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 3; ++k)
#pragma unroll
    for (int w = 0; w < WARPS; ++w) found[k] = fmaxf(found[k], shared[3 * w + k]);
  __syncthreads();
  // Of a hidden unit: at most as much from the density; from all colors, whose slope is at most a half, a sixteenth of it.
  float gain = fmaxf(1.f, found[0] + found[1] / 16.f);
  return {unit_of(gain * found[2]), gain};
}

DEV void find_gradient(const Params &p, const Ray &ray, int index, Kept &kept) {
  Given given = find_given(p, index);
  float unit = unit_of(kept.gain * warp_max(worth_bound(p, given))), g = 2.f * unit * given.color, behind = 0.f;
  if (lane_id() < 8 * COLOR_TILES) kept.grad.color[lane_id()] = g;
  const float *background = p.background + (long long)ray.pixel * p.background_stride;
  if (lane_id() < OUT) behind = g * (background[lane_id()] + 0.001f);  // a color is 1.002 s - 0.001
  behind = warp_sum(behind);
  if (lane_id() == 0) {
    kept.grad.opacity = unit * given.opacity - behind;
    kept.grad.depth = unit * given.depth;
    if (DISTORTION) kept.grad.distortion = unit * given.distortion;
    kept.rest = 1.f / unit;
    kept.share = kept.unit / unit;
  }
  __syncwarp();
}

DEV float2 color_gradient(const RayGradient &grad, int tile) {  // of this lane's columns
  return *(const float2 *)(grad.color + 8 * tile + 2 * (lane_id() & 3));
}

// How much the colors of this lane's rows g and g + 8 are worth: the gradient's product with what sigmoid2 makes of the
// MLP's outputs, which `out` becomes.
DEV void find_worth(const RayGradient &grad, float (&out)[COLOR_TILES][4], float (&worth)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < COLOR_TILES; ++j) {
      float2 color = color_gradient(grad, j);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float &s = out[j][2 * half + e];
        s = sigmoid2(s);
        sum = fmaf(e ? color.y : color.x, s, sum);
      }
    }
    worth[half] = row_sum(sum);
  }
}

// The same of the last samples of all tiles but the last, from their colors.
DEV void find_last_worth(const float *colors, Kept &kept) {
  int g = lane_id() >> 2, q = lane_id() & 3;
#pragma unroll
  for (int first = 0; first < R16 - 1; first += 8) {
    float sum = 0.f;
    if (first + g < R16 - 1)
#pragma unroll
      for (int c = q; c < OUT; c += 4)
        sum = fmaf(kept.grad.color[c], fmaf(colors[(first + g) * OUT + c], 1.f / 1.002f, 0.001f / 1.002f), sum);
    sum = row_sum(sum);
    if (q == 0 && first + g < R16 - 1) kept.worth[first + g] = sum;
  }
}

// Compositing, backward, goes along the ray from its end. Gradients of a tile's samples, from first on: w[row] of their
// colors, d[row] of their raw densities. bent: gradients of the weights by way of the distortion.
DEV void composite_backward(const float *t, const float *weight, const float *direct, const float *hidden,
                            const float *bent, Kept &kept, int first, const float (&worth)[2], float (&w)[2], float (&d)[2]) {
  const RayGradient &grad = kept.grad;
  int r = lane_id() & 15, k = first + r - 1;  // the interval before sample first + r
  bool inside = k >= 0 && k < N - 1;
  k = min(max(k, 0), N - 2);
  float low = __shfl_sync(ALL, worth[0], 4 * (r & 7)), high = __shfl_sync(ALL, worth[1], 4 * (r & 7));
  float own = r < 8 ? low : high, last = __shfl_up_sync(ALL, own, 1, 16);
  last = r == 0 ? kept.worth[max(first / 16 - 1, 0)] : last;
  float part = inside ? weight[k] : 0.f;
  float gradient = 0.501f * (own + last) + fmaf(grad.moment, 0.5f * (t[k] + t[k + 1]) - grad.end, grad.opacity);
  if (DISTORTION) gradient += bent[k];
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
  // 1.002 s (1 - s) is the slope of a color, for which LN2 times as much goes to what sigmoid2 is taken of.
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

// One tile back: fills the rest of `tile`, which all warps add up, in the block's unit, and g_f with the gradients of the
// features. slope: of the hidden units' activations; out: sigmoid2 of the MLP's outputs; w, d: see composite_backward.
// sums: see BIAS_FLOATS.
DEV void tile_backward(const Mlp &mlp, const Four (&slope)[8], const float (&out)[COLOR_TILES][4], const Kept &kept,
                       const float (&w)[2], const float (&d)[2], float *tile, float (&g_f)[2][CHUNKS][4], float *sums) {
  constexpr int PAIRS = (COLOR_TILES + 1) / 2;
  int q = lane_id() & 3;
  float share = kept.share;
  Four g_out[2 * PAIRS], shares = four(share, share, share, share);
#pragma unroll
  for (int j = 0; j < COLOR_TILES; ++j) {
    float2 color = color_gradient(kept.grad, j);
    float g[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float s = out[j][e];
      g[e] = w[e >> 1] * (e & 1 ? color.y : color.x) * (s - s * s);  // the gradient is 0 beyond OUT
    }
    float2 &sum = ((float2 *)sums)[32 * j + lane_id()];
    sum = {fmaf(share, g[0] + g[2], sum.x), fmaf(share, g[1] + g[3], sum.y)};
    g_out[j] = four(g[0], g[1], g[2], g[3]);
    store_columns(tile, G_OUT_AT, j, crossed(FP32 ? g_out[j] : times(g_out[j], shares)));
  }
  if (COLOR_TILES % 2 == 1) g_out[COLOR_TILES] = four(0.f, 0.f, 0.f, 0.f);
  store_dense(tile, share * d[0], share * d[1]);
  if (q == 0) sums[64 * COLOR_TILES + lane_id()] += share * (d[0] + d[1]);
  float back[STEPS][4];
#pragma unroll
  for (int s = 0; s < STEPS; ++s) back[s][0] = back[s][1] = back[s][2] = back[s][3] = 0.f;
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
    for (int j = 0; j < PAIRS; ++j) {
      Four w[2];
      load_pair(mlp.w2_back, n / 2 * PAIRS + j, w);
#pragma unroll
      for (int u = 0; u < 2; ++u) mma(g_h[u], g_out[2 * j], g_out[2 * j + 1], left(w[u]), right(w[u]));
    }
    Four a[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      a[u] = times(four(g_h[u][0], g_h[u][1], g_h[u][2], g_h[u][3]), slope[n + u]);
      store_samples(tile, G_HIDDEN_AT, n + u, crossed(FP32 ? a[u] : times(a[u], shares)));
    }
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      Four w[2];
      load_pair(mlp.w1_back, n / 2 * CHUNKS + i, w);
#pragma unroll
      for (int e = 0; e < 2; ++e) mma(back[2 * i + e], a[0], a[1], left(w[e]), right(w[e]));
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
  Mlp mlp = load_mlp<true>(shared, p);
  int warp = warp_id(), lane = lane_id(), g = lane >> 2, q = lane & 3;
  float *tile = tile_of(shared, warp), *t = shared + BLOCK_FLOATS + warp * WARP_FLOATS;
  float *raw = t + ROW, *sorted_t = raw + ROW, *sorted_raw = sorted_t + ROW;
  float *weight = t + 1, *direct = raw, *hidden = sorted_raw, *bent = sorted_raw + ROW;  // what is in these places later
  // Other uses of a tile's place, while it has no activations.
  float *colors = tile, *gradients = tile + TILE_FLOATS;
  unsigned char *order = (unsigned char *)(t + ORDER_PLACE);
  Features *own_features = (Features *)(t + OWN_FEATURES_PLACE);
  Runs &runs = *(Runs *)tile;
  Cells *cells = (Cells *)(tile + (PRODUCT ? RUN_FLOATS : 0));
  static_assert(ORDER_AT - COLORS_AT <= DENSE_AT && RUN_FLOATS + (PRODUCT ? CELL_FLOATS : 0) <= DENSE_AT, "they fit");
  Kept &kept = *(Kept *)(t + KEPT_PLACE);
  const Ray &ray = kept.ray;
  const RayGradient &grad = kept.grad;
  MlpGradient sums = {};
  float *biases = t + BIASES_PLACE;
  for (int i = lane; i < BIAS_FLOATS; i += 32) biases[i] = 0.f;
  clear_dense(tile);
  float2 unit = block_unit(p, shared + BLOCK_FLOATS);
  if (lane == 0) kept.unit = unit.x, kept.gain = unit.y;
  __syncwarp();

  for (int start = blockIdx.x * WARPS; start < p.rays; start += gridDim.x * WARPS) {
    int index = start + warp;
    __syncwarp();
    if (lane == 0) kept.ray = make_ray(p, min(index, p.rays - 1));
    __syncwarp();
    bool hit = all_lanes(ray.hit && index < p.rays);
    if (hit) {
      float *own = p.kept + (long long)index * KEPT;
      asm("" : "+l"(own));  // else a pair of registers is taken up by the place of the lane's numbers among all
#pragma unroll
      for (int k = lane; k < COLORS_AT; k += 32) *(k < N ? sorted_raw + k : sorted_t + k - N) = own[k];
#pragma unroll
      for (int k = lane; k < ORDER_AT - COLORS_AT; k += 32) colors[k] = own[COLORS_AT + k];
      for (int k = lane; k < ORDER_FLOATS; k += 32) ((float *)order)[k] = own[ORDER_AT + k];
      __syncwarp();
      if (KEEP_FEATURES) fetch_features(own, order, 16 * (R16 - 1), own_features);
      find_gradient(p, ray, index, kept);
      find_last_worth(colors, kept);
      interval_weights<N, true>(sorted_t, sorted_raw, weight, direct, hidden);
      Totals sum = totals<N>(sorted_t, weight);
      if (DISTORTION) distortion<N, true>(sorted_t, weight, sum.depth, grad.distortion, bent);
      if (lane == 0) {
        weight[-1] = weight[N - 1] = kept.sum_behind = kept.slope_behind = 0.f;
        float g_moment = grad.depth * sum.free / fmaxf(sum.opacity, FAINT);
        kept.grad.moment = g_moment;
        kept.grad.end = sum.end;
        if (sum.opacity >= FAINT) kept.grad.opacity -= g_moment * sum.moment / sum.opacity;
      }
      __syncwarp();
    }
    if (!hit)  // what the others add up of it is nothing
      for (int i = lane; i < TILE_FLOATS / 4; i += 32) ((float4 *)tile)[i] = {0.f, 0.f, 0.f, 0.f};
    if (!__syncthreads_or(hit)) continue;
#pragma unroll 1
    for (int first = 16 * (R16 - 1); first >= 0; first -= 16) {
      float g_f[2][CHUNKS][4];
      if (hit) {
        float out[COLOR_TILES][4], worth[2], w[2], d[2];
        Four packed[CHUNKS][2], slope[8];
#if KEEP_FEATURES
        await_features(own_features, packed);
#else
        float f[2][CHUNKS][4];
        find_cells(p, ray, sorted_t[min(first + (lane & 15), N - 1)], cells);
        gather(p, scene_planes(p, ray), cells, f);
        __syncwarp();
        pack(f, packed);
#endif
#pragma unroll
        for (int s = 0; s < STEPS; ++s) store_columns(tile, FEATURES_AT, s, crossed(packed[s >> 1][s & 1]));
        asm volatile("" ::: "memory");  // fewer numbers are alive if features are stored first
        mlp_forward<true, true>(mlp, packed, tile, slope, out);
        if (KEEP_FEATURES && first > 0) fetch_features(p.kept + (long long)index * KEPT, order, first - 16, own_features);
        find_worth(grad, out, worth);
        composite_backward(sorted_t, weight, direct, hidden, bent, kept, first, worth, w, d);
        tile_backward(mlp, slope, out, kept, w, d, tile, g_f, biases);
        if (!PRODUCT) store_gradients(gradients, g_f);
        __syncwarp();
        accumulate(tile, warp, sums);  // before the others have theirs
      }
      __syncthreads();
      float at = sorted_t[min(first + (lane & 15), N - 1)];
      Spots spots = find_spots(p, ray, at);  // for rays that hit; of others it is nothing that would be used
      Found found;
      int total = find_runs(p, spots, 0, found);  // goes along with the products that follow
#pragma unroll
      for (int w = 1; w < WARPS; ++w) accumulate(tile_of(shared, (warp + w) % WARPS), warp, sums);
      __syncthreads();
      if (hit) scatter(p, ray, at, spots, found, total, gradients, g_f, kept.rest, runs, cells);  // the places are free
    }
  }
  __syncthreads();
  store(p.partial + (long long)(blockIdx.x % p.partials) * PARTIAL, warp, sums, 1.f / kept.unit,
        shared + BLOCK_FLOATS + BIASES_PLACE, WARP_FLOATS);
}
