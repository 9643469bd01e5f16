// SPDX-License-Identifier: Apache-2.0
// Forward pass: one warp a pixel, whose rays it marches one after the other. Images are written, and what a backward pass
// needs of each ray.
#include "distortion.cuh"
#include "features.cuh"
#include "mlp.cuh"
#include "ray_marching.cuh"

constexpr int COLOR_ROW = 8 * COLOR_TILES;
constexpr int SCRATCH = 3 * ROW > CELL_FLOATS ? 3 * ROW : CELL_FLOATS, ARRAYS = (2 * ROW + 3 + SCRATCH + 3) / 4 * 4;
constexpr int WARP_FLOATS = ARRAYS + N * COLOR_ROW;
static_assert(4 * (WEIGHT_FLOATS + WARPS * WARP_FLOATS) == SHARED_BYTES, "build.py counts alike");

// Densities and colors of the samples from `start` on, below `end`, at t; kept: of the ray, or null.
DEV void evaluate(const Params &p, const Mlp &mlp, const Ray &ray, const void *base, const float *t, int start, int end,
                  Cells *cells, float *raw, float *color, float *kept) {
  int g = lane_id() >> 2, q = lane_id() & 3;
#pragma unroll 1
  for (int first = start; first < end; first += 16) {
    int k = first + g;
    float f[2][CHUNKS][4], out[COLOR_TILES][4], dense[2];
    Four packed[CHUNKS][2], none[8];
    find_cells(p, ray, t[min(first + (lane_id() & 15), end - 1)], cells);
    gather(p, base, cells, f);
    pack(f, packed);
    if (KEEP_FEATURES && kept) keep_features(packed, kept, first, end);
    mlp_forward<false, false>(mlp, packed, nullptr, none, out, dense);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (k + 8 * half >= end) continue;
      if (q == 0) raw[k + 8 * half] = dense[half];
#pragma unroll
      for (int j = 0; j < COLOR_TILES; ++j) {
        float2 c = {fmaf(sigmoid2(out[j][2 * half]), 1.002f, -0.001f), fmaf(sigmoid2(out[j][2 * half + 1]), 1.002f, -0.001f)};
        *(float2 *)(color + (k + 8 * half) * COLOR_ROW + 8 * j + 2 * q) = c;
      }
    }
  }
  __syncwarp();
}

// Adds a ray's value to the mean over its pixel, which this lane alone writes: the sum's order is that of the rays.
DEV void add_part(float *mean, float value, int part) {
  *mean = RAYS == 1 ? value : fmaf(value, 1.f / RAYS, part == 0 ? 0.f : *mean);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, FORWARD_BLOCKS) render_forward(const Params p) {
  extern __shared__ float4 shared4[];
  float *shared = (float *)shared4;
  Mlp mlp = load_mlp<false>(shared, p);
  int warp = warp_id(), lane = lane_id();
  float *t = shared + WEIGHT_FLOATS + warp * WARP_FLOATS, *raw = t + ROW;
  float *share = t + (2 * ROW + 3) / 4 * 4;  // and what follows is free while samples are evaluated: the cells' place
  Cells *cells = (Cells *)share;
  float *sorted_t = share + ROW, *sorted_raw = sorted_t + ROW, *color = t + ARRAYS;

  for (int pixel = blockIdx.x * WARPS + warp; pixel < p.rays / RAYS; pixel += gridDim.x * WARPS) {
#pragma unroll 1
    for (int part = 0; part < RAYS; ++part) {
      int index = pixel * RAYS + part;
      Ray ray = make_ray(p, index);
      const float *background = p.background + (long long)ray.pixel * p.background_stride;
      float *features = p.features + (long long)pixel * OUT;
      if (!all_lanes(ray.hit)) {
        if (lane < OUT) add_part(features + lane, 2.f * background[lane] - 1.f + (ray.near - ray.near), part);  // NaN stays
        if (lane == 0) {
          add_part(p.depth + pixel, ray.near, part);
          add_part(p.opacity + pixel, 0.f, part);
          if (DISTORTION) add_part(p.distortion + pixel, 0.f, part);
          if (p.kept) p.kept[(long long)index * KEPT] = __uint_as_float(0x7fc00000u);  // NaN: there is nothing
        }
        continue;
      }
      const void *base = scene_planes(p, ray);
      float *kept = p.kept ? p.kept + (long long)index * KEPT : nullptr;
      coarse_depths(p, ray, index, t);
      float *weight = sorted_raw + 1;  // while the samples are not sorted yet
      const float *ordered_t = t, *ordered_raw = raw;
      Places places = {};
#pragma unroll 1
      for (int stage = 0; stage < (KF > 0 ? 2 : 1); ++stage) {  // one copy of the code for coarse and fine samples
        asm volatile("" : "+r"(stage));  // or the compiler copies the loop's body
#if KF > 0
        if (stage == 1) {
          interval_weights<K, false>(t, raw, weight, nullptr, nullptr);
          places = importance_depths(p, index, t, weight, sorted_t, share, t + K);
        }
#endif
        evaluate(p, mlp, ray, base, t, stage * K, stage ? N : K, cells, raw, color, kept);
      }
#pragma unroll
      for (int i = 0; i < ALL_ROUNDS; ++i) {
        int k = sample_of(i), place = place_of(places, i);
        if (k < 0) continue;
        if (kept) {
          kept[place] = raw[k];
          kept[N + place] = t[k];
          if (KEEP_FEATURES) ((unsigned char *)(kept + ORDER_AT))[place] = k;
        }
        if (KF == 0) continue;
        sorted_t[place] = t[k];
        sorted_raw[place] = raw[k];
      }
#if KF > 0
      __syncwarp();
      ordered_t = sorted_t;
      ordered_raw = sorted_raw;
      weight = t + 1;  // no longer needed
#endif
      interval_weights<N, false>(ordered_t, ordered_raw, weight, nullptr, nullptr);
      if (lane == 0) weight[-1] = weight[N - 1] = 0.f;
      __syncwarp();
      Totals sum = totals<N>(ordered_t, weight);
#if DISTORTION
      float spread = distortion<N, false>(ordered_t, weight, sum.depth, 1.f / p.box, nullptr);
      if (lane == 0) add_part(p.distortion + pixel, spread, part);
#endif
      // A sample gets half of each of its intervals' weights.
      __syncwarp();
      int *last = (int *)sorted_t;  // samples whose colors are kept
#pragma unroll
      for (int i = 0; i < ALL_ROUNDS; ++i) {
        int k = sample_of(i), place = place_of(places, i);
        if (k < 0) continue;
        share[k] = 0.5f * (weight[place - 1] + weight[place]);
        if (place % 16 == 15) last[place / 16] = k;
      }
      __syncwarp();
      for (int i = lane; i < ORDER_AT - COLORS_AT && kept; i += 32) kept[COLORS_AT + i] = color[min((u32)last[i / OUT], (u32)N - 1) * COLOR_ROW + i % OUT];
      // PARTS groups of lanes share the samples; a lane of a group has a color.
      constexpr int WIDTH = OUT > 16 ? 32 : OUT > 8 ? 16 : OUT > 4 ? 8 : 4, PARTS = 32 / WIDTH;
      int channel = lane % WIDTH;
      float seen = 0.f;
      if (channel < OUT)
        for (int k = lane / WIDTH; k < N; k += PARTS) seen = fmaf(share[k], color[k * COLOR_ROW + channel], seen);
#pragma unroll
      for (int d = WIDTH; d < 32; d <<= 1) seen += __shfl_xor_sync(ALL, seen, d);
      if (lane < OUT) add_part(features + lane, 2.f * (seen + (1.f - sum.opacity) * background[lane]) - 1.f, part);
      if (lane == 0) {
        add_part(p.depth + pixel, sum.depth, part);
        add_part(p.opacity + pixel, sum.opacity, part);
      }
      __syncwarp();
    }
  }
}
