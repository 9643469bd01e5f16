// SPDX-License-Identifier: Apache-2.0
// A ray and its samples: docs/rendering.md in the order of its sections. All functions are called by whole warps.
#pragma once
#include "common.cuh"

constexpr float NEAREST = 1e-3f, LOG_LEAK = -23.0258509f, LEAK = 1e-10f, FAINT = 1e-6f;

// Axes of a plane along its columns and its rows.
DEV int column_axis(int plane) { return plane < 2 ? 0 : EG3D ? 2 : 1; }
DEV int row_axis(int plane) { return plane == 0 ? 1 : plane == 1 ? 2 : EG3D ? 0 : 2; }

// --- random numbers ---

DEV float uniform(u64 seed, u32 stage, u32 ray, u32 sample) {
  u32 x = (u32)seed, y = (u32)(seed >> 32) ^ stage, z = ray, w = sample;
  x = x * 1664525u + 1013904223u;
  y = y * 1664525u + 1013904223u;
  z = z * 1664525u + 1013904223u;
  w = w * 1664525u + 1013904223u;
#pragma unroll
  for (int turn = 0; turn < 2; ++turn) {
    x += y * w;
    y += z * x;
    z += x * y;
    w += y * z;
    if (turn == 0) {
      x ^= x >> 16;
      y ^= y >> 16;
      z ^= z >> 16;
      w ^= w >> 16;
    }
  }
  return (float)(w >> 8) * 5.9604644775390625e-8f;
}

DEV float jitter(const Params &p, u32 stage, int ray, int sample) {
  if (p.jitter == JITTER_HALF) return 0.5f;
  u64 seed = p.jitter == JITTER_TENSOR ? (u64)*p.seed : p.seed_value;
  return uniform(seed, stage, ray, sample);
}

// --- rays ---

struct Ray {
  float o[3], d[3], near, far, scale;  // scale: texels a unit of length
  int scene, pixel;
  bool hit;
};

DEV Ray make_ray(const Params &p, int index) {
  Ray ray;
  int pixels = p.height * p.width, place = index / RAYS, view = place / pixels, part = index - place * RAYS;
  ray.pixel = place - view * pixels;
  ray.scene = (int)p.scene[view];
  ray.scale = (float)p.resolution / p.box;
  int i = ray.pixel / p.width, j = ray.pixel - i * p.width;
  const float *k = p.intrinsics + view * 9, *m = p.cam2world + view * 16;
  float below = ((float)(part / SIDE) + 0.5f) / SIDE, right = ((float)(part % SIDE) + 0.5f) / SIDE;
  float u = ((float)j + right) / (float)p.width, v = ((float)i + below) / (float)p.height;
  float y = (v - k[5]) / k[4], x = (u - k[2] - k[1] * y) / k[0], square = 0.f;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    ray.d[a] = m[4 * a] * x + m[4 * a + 1] * y + m[4 * a + 2];
    ray.o[a] = m[4 * a + 3];
    square += ray.d[a] * ray.d[a];
  }
  float length = sqrtf(square);
#pragma unroll
  for (int a = 0; a < 3; ++a) ray.d[a] /= length;
  if (p.far > 0.f) {
    ray.near = p.near;
    ray.far = p.far;
    ray.hit = true;
    return ray;
  }
  float near = NEAREST * p.box, far = 3.4e38f, along = 0.f, half = 0.5f * p.box;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    float d = fabsf(ray.d[a]) < 1.0842022e-19f ? 1.0842022e-19f : ray.d[a];
    float first = (-half - ray.o[a]) / d, second = (half - ray.o[a]) / d;
    near = fmaxf(near, fminf(first, second));
    far = fminf(far, fmaxf(first, second));
    along += ray.o[a] * ray.d[a];
  }
  ray.hit = near < far && along == along;
  ray.near = ray.hit ? near : -(along > -NEAREST * p.box ? -NEAREST * p.box : along);
  ray.far = ray.hit ? far : ray.near;
  return ray;
}

DEV void coarse_depths(const Params &p, const Ray &ray, int index, float *t) {
#pragma unroll
  for (int k = lane_id(); k < K; k += 32) {
    float step = ((float)k + jitter(p, 0x636F6172u, index, k)) / (float)(K - 1);
#if DISPARITY
    float first = 1.f / ray.near;
    t[k] = 1.f / (first + fminf(step, 1.f) * (1.f / ray.far - first));
#else
    t[k] = ray.near + step * (ray.far - ray.near);
#endif
  }
  __syncwarp();
}

// --- compositing ---

struct Interval {
  float mean, length, depth;  // raw density - 1, t, optical depth
};

DEV Interval interval(const float *t, const float *raw, int k) {
  float mean = 0.5f * (raw[k] + raw[k + 1]) - 1.f, length = t[k + 1] - t[k];
  return {mean, length, softplus_exact(mean) * length};
}

// Weights of the COUNT - 1 intervals between sorted samples. With SLOPES also how the gradient of an interval's mean raw
// density follows from that of its weight, g, and from the sum h of gradient times weight of all intervals behind it:
// direct g - hidden h. (hidden may be where raw is.)
template <int COUNT, bool SLOPES>
DEV void interval_weights(const float *t, const float *raw, float *weight, float *direct, float *hidden) {
  constexpr int ROUNDS = (COUNT + 30) / 32;
  Interval in[ROUNDS];
  float sum[ROUNDS], passed = 0.f;
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    int k = 32 * i + lane_id();
    in[i] = k < COUNT - 1 ? interval(t, raw, k) : Interval{0.f, 0.f, 0.f};
    float high = fmaxf(-in[i].depth, LOG_LEAK), gap = fabsf(-in[i].depth - LOG_LEAK);
    sum[i] = high + LN2 * fast_log2(1.f + fast_exp(-gap));
  }
  scan_sum(sum);
  if (SLOPES) __syncwarp();
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    int k = 32 * i + lane_id();
    float before = __shfl_up_sync(ALL, sum[i], 1), light = fast_exp(passed + (lane_id() == 0 ? 0.f : before));
    if (k < COUNT - 1) {
      weight[k] = -expm1f(-in[i].depth) * light;
      if (SLOPES) {
        float through = fast_exp(-in[i].depth), slope = through * in[i].length * sigmoid2(LOG2E * in[i].mean);
        direct[k] = slope * light;
        hidden[k] = slope * fast_reciprocal(through + LEAK);
      }
    }
    passed += __shfl_sync(ALL, sum[i], 31);
  }
  __syncwarp();
}

struct Totals {
  float opacity, moment, end, depth, free;  // sum w, sum w (t - end), last t, depth, and d depth / d (unclamped depth)
};

template <int COUNT>
DEV Totals totals(const float *t, const float *weight) {
  Totals sum = {0.f, 0.f, t[COUNT - 1], 0.f, 0.f};
#pragma unroll
  for (int k = lane_id(); k < COUNT - 1; k += 32) {
    sum.opacity += weight[k];
    sum.moment += weight[k] * (0.5f * (t[k] + t[k + 1]) - sum.end);
  }
  sum.opacity = warp_sum(sum.opacity);
  sum.moment = warp_sum(sum.moment);
  float depth = sum.end + sum.moment / fmaxf(sum.opacity, FAINT), start = t[0];
  // Where a bound is met exactly, half of the gradient passes: so does that of torch.minimum.
  sum.free = (depth > start ? 1.f : depth == start ? 0.5f : 0.f) * (depth < sum.end ? 1.f : depth == sum.end ? 0.5f : 0.f);
  sum.depth = fminf(fmaxf(depth, start), sum.end);
  return sum;
}

// --- importance samples ---

constexpr int C_ROUNDS = (K + 31) / 32, F_ROUNDS = KF > 0 ? (KF + 31) / 32 : 1, ALL_ROUNDS = C_ROUNDS + (KF > 0 ? F_ROUNDS : 0);

// A lane's samples, coarse ones first, i from 0 to ALL_ROUNDS: which (-1: none), and its place among all.
DEV int sample_of(int i) {
  int k = 32 * (i < C_ROUNDS ? i : i - C_ROUNDS) + lane_id();
  return i < C_ROUNDS ? (k < K ? k : -1) : k < KF ? K + k : -1;
}

struct Places {
  u32 bytes[(ALL_ROUNDS + 3) / 4];  // places fit in a byte
};

DEV void set_place(Places &places, int i, int place) { places.bytes[i / 4] |= (u32)place << (8 * (i % 4)); }
DEV int place_of(const Places &places, int i) {
  return KF == 0 ? 32 * i + lane_id() : places.bytes[i / 4] >> (8 * (i % 4)) & 255;
}

// KF sorted depths from sorted coarse t and weights [K - 1]. weight, cdf and draws are scratch.
DEV Places importance_depths(const Params &p, int index, const float *t, float *weight, float *cdf, float *draws, float *fine) {
  constexpr int ROUNDS = (K + 30) / 32;
  float smooth[ROUNDS], sum[ROUNDS], u[F_ROUNDS], total = 0.f, below = 0.f;
  int lane = lane_id();
#pragma unroll
  for (int i = 0; i < F_ROUNDS; ++i) {
    int j = 32 * i + lane;
    u[i] = ((float)j + jitter(p, 0x66696E65u, index, min(j, KF - 1))) / (float)KF;
    if (j < KF) draws[j] = u[i];
  }
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    int k = 32 * i + lane;
    smooth[i] = 0.f;
    if (k < K - 1) {
      float own = weight[k], left = k > 0 ? weight[k - 1] : 0.f, right = k < K - 2 ? weight[k + 1] : 0.f;
      smooth[i] = 0.5f * (fmaxf(left, own) + fmaxf(own, right)) + 0.01f;
    }
    total += smooth[i];
  }
  total = 1.f / warp_sum(total);
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) sum[i] = smooth[i] *= total;
  scan_sum(sum);
  __syncwarp();  // neighbors have read their weights
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    int k = 32 * i + lane;
    if (k < K - 1) {
      weight[k] = smooth[i];
      cdf[k] = k < K - 2 ? below + sum[i] : 2.f;  // rounding may leave the last bound below a draw
    }
    below += __shfl_sync(ALL, sum[i], 31);
  }
  __syncwarp();
  // The interval of a draw: as many as have their upper bound at or below it, found bit by bit.
  constexpr int TOP = K > 65 ? 64 : K > 33 ? 32 : K > 17 ? 16 : K > 9 ? 8 : K > 5 ? 4 : K > 3 ? 2 : 1;
  int interval[F_ROUNDS] = {};
#pragma unroll
  for (int step = TOP; step > 0; step >>= 1)
#pragma unroll
    for (int i = 0; i < F_ROUNDS; ++i) {
      int more = interval[i] + step;
      if (cdf[min(more, K - 1) - 1] <= u[i]) interval[i] = more;
    }
  Places places = {};
#pragma unroll
  for (int i = 0; i < F_ROUNDS; ++i) {
    int j = 32 * i + lane, k = min(interval[i], K - 2);
    float fraction = __saturatef((u[i] - (k > 0 ? cdf[k - 1] : 0.f)) / weight[k]);
    if (j < KF) fine[j] = fminf(fmaf(fraction, t[k + 1] - t[k], t[k]), t[k + 1]);
    set_place(places, C_ROUNDS + i, min(j + k + 1, N - 1));  // behind the coarse samples up to k
  }
  // A coarse sample stands behind the draws below its interval. There is one draw in each KF-th, so that one to either
  // side of a guess decides how many these are.
#pragma unroll
  for (int i = 0; i < C_ROUNDS; ++i) {
    int k = 32 * i + lane, count = 0;
    if (k > 0 && k < K) {
      float bound = cdf[k - 1];
      count = max(min((int)(bound * (float)KF), KF) - 1, 0);
      int first = count;
#pragma unroll
      for (int j = 0; j < 3; ++j) count += first + j < KF && draws[min(first + j, KF - 1)] < bound;
    }
    set_place(places, i, min(k + count, N - 1));
  }
  __syncwarp();
  return places;
}

// --- the planes ---

// In bytes: compilers make another code of sums of float pointers, with other registers.
DEV const void *advance(const void *base, long long elements) { return (const char *)base + elements * 4; }

// A sample's cells: where, in elements, the lower corner of its 2 x 2 texels begins in each plane; and its weights, which
// are zero outside, along x, y, z: a corner is moved into the plane (of at least 2 x 2 texels), and its weights with it.
struct Cells {
  int corner[4];
  float weight[4][2];
};
constexpr int CELL_FLOATS = 16 * sizeof(Cells) / 4;

// at: depth of sample lane % 16 of the tile.
DEV void find_cells(const Params &p, const Ray &ray, float at, Cells *cells) {
  int sample = lane_id() & 15, size = p.resolution, place[3];
  Cells found;
#pragma unroll
  for (int a = 0; a < 3; ++a) {
    // Places between texel centers, along any axis of a plane.
    float pixel = fmaf(fmaf(at, ray.d[a], ray.o[a]), ray.scale, 0.5f * (float)size - 0.5f), whole = floorf(pixel);
    float fraction = pixel - whole;
    int first = (int)whole;
    place[a] = min(max(first, 0), size - 2);
    int moved = first - place[a];
    float rest = 1.f - fraction;
    found.weight[a][0] = moved == 0 ? rest : moved == -1 ? fraction : 0.f;
    found.weight[a][1] = moved == 0 ? fraction : moved == 1 ? rest : 0.f;
  }
#pragma unroll
  for (int plane = 0; plane < 3; ++plane)
    found.corner[plane] = ((plane * size + place[row_axis(plane)]) * size + place[column_axis(plane)]) * C;
  found.corner[3] = 0;
  found.weight[3][0] = found.weight[3][1] = 0.f;
  if (lane_id() < 16) cells[sample] = found;
  __syncwarp();
}

// Features of a tile; base: of the scene's planes. Eight lanes read 128 bytes of a texel, for the samples that are rows of
// theirs; then neighbors swap what the other's row needs. WITHOUT: a plane that is left out of a product.
template <int WITHOUT = -1>
DEV void gather(const Params &p, const void *base, const Cells *cells, float (&f)[2][CHUNKS][4]) {
  constexpr int WIDE = (CHUNKS + 1) / 2;
  int lane = lane_id(), odd = lane >> 2 & 1, q = lane & 3, feature = 16 * odd + 4 * q;
  const void *upper = advance(base, feature), *lower = advance(upper, p.resolution * C);  // rows of texels
  asm("" : "+l"(upper));  // else they are put together for each texel
  asm("" : "+l"(lower));
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    asm volatile("" ::: "memory");  // else all reads are begun at once, for which there are no registers
    float read[2][WIDE][4];
#pragma unroll
    for (int other = 0; other < 2; ++other) {
      const Cells *at = cells + 2 * (lane >> 3) + other + 8 * row;
      int4 corners = *(const int4 *)at->corner;
      float4 xy = *(const float4 *)at->weight;
      float2 z = *(const float2 *)at->weight[2];
      float weight[3][2] = {{xy.x, xy.y}, {xy.z, xy.w}, {z.x, z.y}};
      float part[WIDE][4];
#pragma unroll
      for (int plane = 0; plane < 3; ++plane) {
        if (plane == WITHOUT) continue;
        int corner = plane == 0 ? corners.x : plane == 1 ? corners.y : corners.z;
        const void *rows[2] = {advance(upper, corner), advance(lower, corner)};
#pragma unroll
        for (int i = 0; i < WIDE; ++i) {
          if (plane == 0 || PRODUCT) part[i][0] = part[i][1] = part[i][2] = part[i][3] = 0.f;
          if (C % 32 == 0 || 32 * i + feature < C) {
#pragma unroll
            for (int tap = 0; tap < 4; ++tap) {
              float w = weight[row_axis(plane)][tap >> 1] * weight[column_axis(plane)][tap & 1];
              float4 v = __ldg((const float4 *)advance(rows[tap >> 1], (tap & 1) * C + 32 * i));
              part[i][0] = fmaf(w, v.x, part[i][0]);
              part[i][1] = fmaf(w, v.y, part[i][1]);
              part[i][2] = fmaf(w, v.z, part[i][2]);
              part[i][3] = fmaf(w, v.w, part[i][3]);
            }
          }
          if (plane == 2 || PRODUCT) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
              read[other][i][e] = PRODUCT && plane > (WITHOUT == 0) ? read[other][i][e] * part[i][e] : part[i][e];
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < WIDE; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float first = read[0][i][e], second = read[1][i][e];
        float received = __shfl_xor_sync(ALL, odd ? first : second, 4);
        f[row][2 * i][e] = odd ? received : first;
        if (2 * i + 1 < CHUNKS) f[row][2 * i + 1 < CHUNKS ? 2 * i + 1 : 0][e] = odd ? second : received;
      }
  }
}

// Features as first operands of products.
DEV void pack(const float (&f)[2][CHUNKS][4], Four (&packed)[CHUNKS][2]) {
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
    for (int b = 0; b < 2; ++b) packed[i][b] = four(f[0][i][2 * b], f[0][i][2 * b + 1], f[1][i][2 * b], f[1][i][2 * b + 1]);
}

DEV long long scene_offset(const Params &p, const Ray &ray) {  // in elements
  return (long long)ray.scene * 3 * p.resolution * p.resolution * C;
}

DEV const void *scene_planes(const Params &p, const Ray &ray) {
  return advance(p.planes, scene_offset(p, ray));
}
