// SPDX-License-Identifier: Apache-2.0
// What the kernels of layers.cu share: their argument, eight numbers at a time, where a thread is, sums over chunks.
#pragma once

typedef long long i64;
#define DEV static __device__ __forceinline__

constexpr unsigned ALL = 0xffffffffu;
constexpr int THREADS = 256, WARPS = THREADS / 32, MOST_CHANNELS = 8 * THREADS;
#if HALF && __CUDA_ARCH__ < 1000
constexpr int LEAST = 3;  // blocks of a processor: as many as registers are for
#else
constexpr int LEAST = 2;
#endif

struct Params {
  const void *x, *y, *skip;   // inputs; skip and, for `bias_sum`, x may be null
  void *out;
  const float *bias;          // [C] or null: added to x before it is normalized, or to what is written
  const float *weight, *shift;
  float *sums;                // [images, chunks, 2, C]
  float *coefficients;        // [images, COEFFICIENTS, C]
  float *means;               // [images, 2, groups]: of gradients
  float *gradients;           // [images, 3, C]: of weight, shift and bias; or as a kernel says
  float *totals;              // [3, C]: over images
  i64 images, pixels, channels, chunks, height, width, groups;
  float eps;
  int silu;
};

// Of a channel: y = SCALE x + SHIFT; what a group's mean is at x; one over its deviation; the channel's own mean.
enum { SCALE, SHIFT, CENTER, INVERSE, MEAN, COEFFICIENTS };

// --- numbers ---

struct Eight {
  float v[8];
};
DEV float upper(unsigned bits) { return __uint_as_float(bits & 0xffff0000u); }
DEV float lower(unsigned bits) { return __uint_as_float(bits << 16); }
DEV unsigned pair(float low, float high) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
// The i-th eight numbers of a tensor that nothing writes meanwhile: loads may go ahead of stores.
DEV Eight load(const void *from, i64 i) {
#if HALF
  uint4 bits = __ldg((const uint4 *)from + i);
  return {{lower(bits.x), upper(bits.x), lower(bits.y), upper(bits.y), lower(bits.z), upper(bits.z), lower(bits.w),
           upper(bits.w)}};
#else
  float4 a = __ldg((const float4 *)from + 2 * i), b = __ldg((const float4 *)from + 2 * i + 1);
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
#endif
}
DEV void store(void *to, i64 i, const Eight &e) {
  const float *v = e.v;
#if HALF
  ((uint4 *)to)[i] = {pair(v[0], v[1]), pair(v[2], v[3]), pair(v[4], v[5]), pair(v[6], v[7])};
#else
  ((float4 *)to)[2 * i] = {v[0], v[1], v[2], v[3]};
  ((float4 *)to)[2 * i + 1] = {v[4], v[5], v[6], v[7]};
#endif
}
DEV Eight floats(const float *from, i64 i) {
  float4 a = __ldg((const float4 *)from + 2 * i), b = __ldg((const float4 *)from + 2 * i + 1);
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
DEV float sigmoid(float z) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(-1.44269504f * z));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.f + e));
  return s;
}
DEV float warp_sum(float v) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(ALL, v, d);
  return v;
}

// --- where a thread is ---

struct Place {
  i64 image, chunk, index, step;  // index of its eight channels of the first pixel, and from pixel to pixel
  int pixel, rows, count;         // the first pixel; from one to the next; how many
  int column, row;                // which eight channels; which of the block's pixels
  bool works;
};
// What has just been written is read from its end: that is still in the cache.
DEV Place place_of(const Params &a, bool from_end = false) {
  int columns = (int)a.channels / 8, rows = THREADS / columns, pixels = (int)a.pixels, chunks = (int)a.chunks;
  int block = from_end ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  Place p;
  p.image = block / chunks, p.chunk = block % chunks;
  p.column = (int)threadIdx.x % columns, p.row = (int)threadIdx.x / columns;
  int each = (pixels + chunks - 1) / chunks, start = (int)p.chunk * each, end = min(start + each, pixels);
  p.pixel = start + p.row, p.rows = rows, p.works = p.row < rows;
  p.count = p.works && p.pixel < end ? (end - p.pixel + rows - 1) / rows : 0;
  p.index = (p.image * pixels + p.pixel) * columns + p.column, p.step = (i64)rows * columns;
  return p;
}
DEV Eight coefficient(const Params &a, const Place &p, int which) {
  return floats(a.coefficients + (p.image * COEFFICIENTS + which) * a.channels, p.column);
}

// Writes what a block's threads have, added up, as `sums` [images, chunks].
DEV void write_block_sum(const Params &a, float sum) {
  __shared__ float shared[WARPS];
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < WARPS; ++w) sum += shared[w];
    a.sums[blockIdx.x] = sum;
  }
}

// Adds up two sums of each channel over the block's rows, and writes them where its chunk's are.
DEV void write_sums(const Params &a, const Place &p, const Eight &first, const Eight &second) {
  __shared__ float shared[2 * MOST_CHANNELS];
  int channels = (int)a.channels, rows = p.rows;
  if (p.works)
    for (int i = 0; i < 8; ++i) {
      int at = p.row * channels + 8 * p.column + i;
      shared[at] = first.v[i], shared[MOST_CHANNELS + at] = second.v[i];
    }
  __syncthreads();
  float *to = a.sums + (p.image * a.chunks + p.chunk) * 2 * channels;
  for (int c = threadIdx.x; c < 2 * channels; c += THREADS) {
    const float *from = shared + (c < channels ? c : MOST_CHANNELS + c - channels);
    float sum = 0.f;
    for (int r = 0; r < rows; ++r) sum += from[r * channels];
    to[c] = sum;
  }
}
// A warp for each group of each image: lanes are channels, `width` of them, by parts of the image's chunks.
struct Group {
  i64 image, base;
  int lane, size, width, part, parts;
};
DEV Group group_of(const Params &a) {
  Group g;
  g.size = (int)(a.channels / a.groups), g.image = blockIdx.x / (int)a.groups;
  g.base = blockIdx.x % (int)a.groups * g.size;
  for (g.width = 1; g.width < g.size && g.width < 32;) g.width *= 2;
  g.lane = (int)threadIdx.x % g.width, g.part = (int)threadIdx.x / g.width, g.parts = 32 / g.width;
  return g;
}
// A sum that `write_sums` wrote, over an image's chunks: of the group's i-th channel, or 0. For the whole warp.
DEV float chunk_sum(const Params &a, const Group &g, int which, int i) {
  const float *from = a.sums + (g.image * a.chunks * 2 + which) * a.channels + g.base + i;
  float sum = 0.f;
#pragma unroll 8
  for (int k = g.part; k < (i < g.size ? (int)a.chunks : 0); k += g.parts) sum += from[k * 2 * a.channels];
  for (int d = g.width; d < 32; d *= 2) sum += __shfl_xor_sync(ALL, sum, d);
  return sum;
}
// The sum over the group's channels, of what each lane has for its own.
DEV float group_sum(const Group &g, float v) {
  for (int d = g.width / 2; d > 0; d /= 2) v += __shfl_xor_sync(ALL, v, d);
  return v;
}
