// SPDX-License-Identifier: Apache-2.0
// Gradients of the planes: a tile's samples are added up by tensor cores before they go to memory.
#pragma once
#include "mlp.cuh"
#include "ray_marching.cuh"

// The four texels that a sample reads in a plane have four parities of (column, row). Successive samples of a tile that
// read the same texel are a run; of one parity a sample is in one run, or in none where the texel is outside. What texels
// get is a product then: [runs, samples] of weights, 0 where a sample is not in the run, times [samples, features] of
// gradients. (So one NaN among the gradients is in all runs of the tile.)
constexpr int PLANES = PRODUCT ? 1 : 3;  // go together, because one alone would mostly wait
constexpr int MOST_RUNS = PRODUCT ? 64 : 128;  // at a time: all of a plane, nearly always all of three
constexpr int TOGETHER = 2;  // 16s of runs
constexpr int GRADIENT_ROW = 32 * CHUNKS;

struct Runs {
  // First operands: of 16 runs lane 4 g + q has the weights of runs 2 g, 2 g + 1 for the samples that `Samples` names, in
  // its order.
  alignas(16) float weight[4 * WORDS * MOST_RUNS];
  int texel[MOST_RUNS];  // which of the scene's
};
constexpr int OUTSIDE = -(1 << 30);
constexpr int RUN_FLOATS = sizeof(Runs) / 4, GRADIENT_FLOATS = TILE_ROWS * GRADIENT_ROW;

// Texels that sample lane % 16 reads, along each axis the even and the odd one.
struct Spots {
  int texel[3][2];  // far below zero: outside
  float weight[3][2];
};

DEV Spots find_spots(const Params &p, const Ray &ray, float at) {
  Spots spots;
  int size = p.resolution;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    float pixel = fmaf(fmaf(at, ray.d[a], ray.o[a]), ray.scale, 0.5f * (float)size - 0.5f), whole = floorf(pixel);
    float fraction = pixel - whole, rest = 1.f - fraction;
    int first = (int)fminf(fmaxf(whole, -2.f), (float)size);  // so that adding one cannot wrap
    bool swapped = first & 1;
    int even = first + 1 & ~1, odd = first | 1;
    spots.texel[a][0] = (u32)even < (u32)size ? even : OUTSIDE;
    spots.texel[a][1] = (u32)odd < (u32)size ? odd : OUTSIDE;
    spots.weight[a][0] = swapped ? fraction : rest;
    spots.weight[a][1] = swapped ? rest : fraction;
  }
  return spots;
}

// What a sample has to do with runs, of both parities of rows. Lanes from 16 on have the texels of odd columns.
struct Found {
  int run[PLANES][2], texel[PLANES][2];  // -1: it is outside; the texel of a run's first sample, else -1
  float weight[PLANES][2];
};

// The runs of a tile in PLANES planes; returns how many there are.
DEV int find_runs(const Params &p, const Spots &spots, int first_plane, Found &found) {
  int lane = lane_id(), sample = lane & 15, total = 0, texel[PLANES][2], before[PLANES][2];
  bool odd = lane >= 16;
#pragma unroll
  for (int i = 0; i < PLANES; ++i) {
    int plane = first_plane + i, a = column_axis(plane), b = row_axis(plane);
    int column = (odd ? spots.texel[a][1] : spots.texel[a][0]) + plane * p.resolution * p.resolution;
    float across = odd ? spots.weight[a][1] : spots.weight[a][0];
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      int row = spots.texel[b][parity];
      texel[i][parity] = row < 0 ? OUTSIDE : row * p.resolution + column;
      before[i][parity] = __shfl_up_sync(ALL, texel[i][parity], 1, 16);
      found.weight[i][parity] = across * spots.weight[b][parity];
    }
  }
#pragma unroll
  for (int i = 0; i < PLANES; ++i)
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      int own = texel[i][parity];
      bool start = (sample == 0 || own != before[i][parity]) && own >= 0;
      u32 starts = __ballot_sync(ALL, start);
      found.run[i][parity] = own >= 0 ? total + __popc(starts & (0xffffffffu >> (31 - lane))) - 1 : -1;
      found.texel[i][parity] = start ? own : -1;
      total += __popc(starts);
    }
  return total;
}

// Writes the `count` runs from `low` on to where products take them.
DEV void write_runs(const Found &found, int low, int count, Runs &runs) {
  int sample = lane_id() & 15, q = sample & 3, others = sample >> 2 & 1, upper = sample >> 3;
#pragma unroll 1
  for (int i = lane_id(); i < WORDS * (count + 1 >> 1) * 2; i += 32) ((float4 *)runs.weight)[i] = {0.f, 0.f, 0.f, 0.f};
  __syncwarp();
#pragma unroll
  for (int i = 0; i < PLANES; ++i)
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      int run = found.run[i][parity] - low;
      if ((u32)run >= (u32)MOST_RUNS || found.run[i][parity] < 0) continue;
      float weight = found.weight[i][parity];
      int lane = 4 * (run >> 1) + q;  // and more lanes for more than 16 runs
#if FP32
      runs.weight[8 * lane + 4 * others + 2 * (run & 1) + upper] = weight;
#else
      ((unsigned short *)runs.weight)[8 * lane + 4 * (others ^ q & 1) + 2 * (run & 1) + upper] = (unsigned short)two(weight, 0.f);
#endif
      if (found.texel[i][parity] >= 0) runs.texel[run] = found.texel[i][parity];
    }
  __syncwarp();
}

// Gradients of a tile's features, [samples][features] in fours: a column is a feature, 4 q + e and the one two further.
DEV void store_gradients(float *matrix, const float (&g_f)[2][CHUNKS][4]) {
  int q = lane_id() & 3;
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      store_columns<GRADIENT_ROW>(matrix, 8 * i + 2 * q + e, four(g_f[0][i][e], g_f[1][i][e], g_f[0][i][e + 2], g_f[1][i][e + 2]));
  __syncwarp();
}

DEV void load_gradients(const float *matrix, Columns (&gradient)[CHUNKS]) {
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) gradient[i] = load_columns<GRADIENT_ROW>(matrix, 8 * i + (lane_id() >> 2));
  __syncwarp();
}

#if DETERMINISTIC
typedef u64 Sum;
#else
typedef float Sum;
#endif

// Adds v to the four elements from `at` on.
DEV void add(const Params &p, Sum *at, float4 v) {
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
    if (fixed != 0) atomicAdd(at + e, (u64)fixed);
  }
#else
#if __CUDA_ARCH__ >= 900
#define ADD "red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
#else
#define ADD                                                               \
  "red.global.add.f32 [%0], %1; red.global.add.f32 [%0 + 4], %2;"         \
  "red.global.add.f32 [%0 + 8], %3; red.global.add.f32 [%0 + 12], %4;"
#endif
  asm volatile(ADD ::"l"(at), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
#endif
}

// Adds what `count` runs get, in units of `unit`; base: of this lane's features. gradient: see load_gradients.
DEV void add_runs(const Params &p, Sum *base, const Runs &runs, int count, const Columns (&gradient)[CHUNKS], float unit) {
  int lane = lane_id(), q = lane & 3;
#pragma unroll 1
  for (int first = 0; first < count; first += 16 * TOGETHER) {
    Samples a[TOGETHER];
    int2 texel[TOGETHER];
#pragma unroll
    for (int u = 0; u < TOGETHER; ++u) {
      texel[u] = *((const int2 *)(runs.texel + first + 16 * u) + (lane >> 2));
      const float *at = runs.weight + 4 * WORDS * (first + 16 * u) + 2 * WORDS * lane;
#if FP32
      a[u] = {*(const float4 *)at, *(const float4 *)(at + 4)};
#else
      uint4 both = *(const uint4 *)at;
      a[u] = {{both.x, both.y}, {both.z, both.w}};
#endif
    }
    float d[TOGETHER][CHUNKS][2][4] = {};
#pragma unroll
    for (int u = 0; u < TOGETHER; ++u)
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) mma(d[u][i][e], a[u].some, a[u].others, gradient[i].some[e], gradient[i].others[e]);
#pragma unroll
    for (int u = 0; u < TOGETHER; ++u)
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (first + 16 * u + (lane >> 2) * 2 + row >= count) continue;
        Sum *to = base + (long long)(row ? texel[u].y : texel[u].x) * C;
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
          const float *v = d[u][i][0] + 2 * row, *w = d[u][i][1] + 2 * row;
          if (C % 16 == 0 || 16 * i + 4 * q < C) add(p, to + 16 * i, {unit * v[0], unit * v[1], unit * w[0], unit * w[1]});
        }
      }
  }
  __syncwarp();
}

// Adds the gradients of a tile's features in PLANES planes, in which `total` runs were found.
DEV void scatter_planes(const Params &p, Sum *base, const Found &found, int total, const float *matrix, float unit, Runs &runs) {
  Columns gradient[CHUNKS];
  load_gradients(matrix, gradient);
#pragma unroll 1
  for (int low = 0; low < total; low += MOST_RUNS) {
    int count = min(total - low, MOST_RUNS);
    write_runs(found, low, count, runs);
    add_runs(p, base, runs, count, gradient, unit);
  }
}

// Adds the gradients of a tile's features, which are in `matrix` (of a product in g_f), to the planes, in units of `unit`; at:
// depth of sample lane % 16, where what is beyond the ray's last repeats it, with gradients of 0; spots are its; `total`
// runs were found in the first PLANES planes. runs and cells are scratch.
DEV void scatter(const Params &p, const Ray &ray, float at, const Spots &spots, Found &found, int total, float *matrix,
                 const float (&g_f)[2][CHUNKS][4], float unit, Runs &runs, Cells *cells) {
  Sum *base = (Sum *)p.g_planes + scene_offset(p, ray) + 4 * (lane_id() & 3);
  asm volatile("" : "+l"(base));  // else it is put together for each texel
#if PRODUCT
  // A plane's gradients are those of the features times what the other planes have.
  find_cells(p, ray, at, cells);
#pragma unroll
  for (int plane = 0; plane < 3; ++plane) {
    float f[2][CHUNKS][4];
    const void *planes = scene_planes(p, ray);
    plane == 0 ? gather<0>(p, planes, cells, f) : plane == 1 ? gather<1>(p, planes, cells, f) : gather<2>(p, planes, cells, f);
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) f[row][i][e] *= g_f[row][i][e];
    if (plane > 0) total = find_runs(p, spots, plane, found);
    store_gradients(matrix, f);
    scatter_planes(p, base, found, total, matrix, unit, runs);
  }
#else
  scatter_planes(p, base, found, total, matrix, unit, runs);
#endif
}
