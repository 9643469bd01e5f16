// SPDX-License-Identifier: Apache-2.0
// What lies between an autoencoder's convolutions, and the total variation of planes. What is computed is defined in
// igae/models/layers.py and losses.py. Tensors have channels last; numbers are bfloat16 (HALF = 1) or float32, sums are
// float32. The order of all sums is fixed: equal calls give equal bits.
//
// Most kernels walk over pixels with a thread for eight channels: a block has `chunks` to the image, its threads are
// `rows` of pixels by C / 8.
// No CUDA header is included: NVRTC has none.

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

// --- group normalization, with what is added before and SiLU behind it ---

// Sums of x and of its square, both around the image's first pixel: squares of numbers far from 0 leave no digits.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) norm_sums(const Params a) {
  Place p = place_of(a, true);
  Eight pivot = load(a.x, p.image * a.pixels * (a.channels / 8) + p.column), sum = {}, square = {};
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    Eight x = load(a.x, at);
    for (int i = 0; i < 8; ++i) {
      float d = x.v[i] - pivot.v[i];
      sum.v[i] += d, square.v[i] += d * d;
    }
  }
  write_sums(a, p, sum, square);
}

extern "C" __global__ void __launch_bounds__(32) norm_coefficients(const Params a) {
  Group g = group_of(a);
  float *own = a.coefficients + g.image * COEFFICIENTS * a.channels + g.base;
  const float *weight = a.weight + g.base, *shift = a.shift + g.base, *bias = a.bias ? a.bias + g.base : nullptr;
  float mean = 0.f, variance = 0.f;
  for (int i = g.lane; i - g.lane < g.size; i += g.width) {
    float raw = chunk_sum(a, g, 0, i) / a.pixels;
    if (i >= g.size) continue;
    i64 first = g.image * a.pixels * a.channels + g.base + i;
    Eight pivots = load(a.x, first / 8);
#pragma unroll
    for (int k = 0; k < 8; ++k) raw += first % 8 == k ? pivots.v[k] : 0.f;
    own[MEAN * a.channels + i] = raw;
    mean += raw + (bias ? bias[i] : 0.f);
  }
  mean = group_sum(g, mean) / g.size;
  for (int i = g.lane; i - g.lane < g.size; i += g.width) {
    float offset = chunk_sum(a, g, 0, i) / a.pixels, square = chunk_sum(a, g, 1, i) / a.pixels;
    if (i >= g.size) continue;
    float further = own[MEAN * a.channels + i] + (bias ? bias[i] : 0.f) - mean;
    variance += max(square - offset * offset, 0.f) + further * further;
  }
  float inverse = rsqrtf(group_sum(g, variance) / g.size + a.eps);
  for (int i = threadIdx.x; i < g.size; i += 32) {
    float center = mean - (bias ? bias[i] : 0.f), scale = inverse * weight[i];
    own[SCALE * a.channels + i] = scale;
    own[SHIFT * a.channels + i] = shift[i] - scale * center;
    own[CENTER * a.channels + i] = center;
    own[INVERSE * a.channels + i] = inverse;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST) norm_apply(const Params a) {
  Place p = place_of(a);
  Eight scale = coefficient(a, p, SCALE), shift = coefficient(a, p, SHIFT);
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    Eight x = load(a.x, at);
    for (int i = 0; i < 8; ++i) {
      float z = scale.v[i] * x.v[i] + shift.v[i];
      x.v[i] = a.silu ? z * sigmoid(z) : z;
    }
    store(a.out, at, x);
  }
}

// The gradient of what `norm_apply` computes before SiLU.
DEV float before_silu(const Params &a, float gradient, float z) {
  if (!a.silu) return gradient;
  float s = sigmoid(z);
  return gradient * s * (1.f + z * (1.f - s));
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST) norm_gradient_sums(const Params a) {
  Place p = place_of(a, true);
  Eight scale = coefficient(a, p, SCALE), shift = coefficient(a, p, SHIFT), center = coefficient(a, p, CENTER);
  Eight sum = {}, product = {};
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    Eight x = load(a.x, at), y = load(a.y, at);
    for (int i = 0; i < 8; ++i) {
      float d = before_silu(a, y.v[i], scale.v[i] * x.v[i] + shift.v[i]);
      sum.v[i] += d, product.v[i] += d * (x.v[i] - center.v[i]);
    }
  }
  write_sums(a, p, sum, product);
}

// What `norm_gradient` needs of each group of each image, and its share of the weights' gradients.
extern "C" __global__ void __launch_bounds__(32) norm_gradient_means(const Params a) {
  Group g = group_of(a);
  const float *own = a.coefficients + g.image * COEFFICIENTS * a.channels + g.base, *weight = a.weight + g.base;
  float *to = a.gradients + g.image * 3 * a.channels + g.base;
  float inverse = own[INVERSE * a.channels], count = (float)(a.pixels * g.size), mean = 0.f, slope = 0.f;
  for (int i = g.lane; i - g.lane < g.size; i += g.width) {
    float sum = chunk_sum(a, g, 0, i), product = chunk_sum(a, g, 1, i);
    if (i >= g.size) continue;
    mean += weight[i] * sum, slope += weight[i] * product;
    to[i] = inverse * product, to[a.channels + i] = sum;
  }
  mean = group_sum(g, mean) * inverse / count, slope = group_sum(g, slope) * inverse * inverse * inverse / count;
  if (threadIdx.x == 0) {
    float *means = a.means + g.image * 2 * a.groups + blockIdx.x % (int)a.groups;
    means[0] = mean, means[a.groups] = slope;
  }
  for (int i = g.lane; i < g.size; i += g.width) {
    float far = own[MEAN * a.channels + i] - own[CENTER * a.channels + i];
    to[2 * a.channels + i] = own[SCALE * a.channels + i] * to[a.channels + i] - a.pixels * (mean + slope * far);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, LEAST) norm_gradient(const Params a) {
  Place p = place_of(a);
  Eight scale = coefficient(a, p, SCALE), shift = coefficient(a, p, SHIFT), center = coefficient(a, p, CENTER);
  // The first threads add up the weights' gradients.
  for (int i = blockIdx.x * THREADS + threadIdx.x; i < 3 * (int)a.channels; i += gridDim.x * THREADS) {
    float sum = 0.f;
#pragma unroll 8
    for (int k = 0; k < (int)a.images; ++k) sum += a.gradients[k * 3 * a.channels + i];
    a.totals[i] = sum;
  }
  Eight constant, slope;
  int size = (int)(a.channels / a.groups);
  for (int i = 0; i < 8; ++i) {
    const float *own = a.means + p.image * 2 * a.groups + (8 * p.column + i) / size;
    slope.v[i] = own[a.groups], constant.v[i] = slope.v[i] * center.v[i] - own[0];
  }
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    Eight x = load(a.x, at), y = load(a.y, at), d = {};
    if (a.skip) d = load(a.skip, at);
    for (int i = 0; i < 8; ++i) {
      float before = before_silu(a, y.v[i], scale.v[i] * x.v[i] + shift.v[i]);
      d.v[i] += scale.v[i] * before + (constant.v[i] - slope.v[i] * x.v[i]);
    }
    store(a.out, at, d);
  }
}

// --- sums ---

// x + y + bias; without x: y + bias.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) bias_sum(const Params a) {
  Place p = place_of(a);
  Eight bias = a.bias ? floats(a.bias, p.column) : Eight{};
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    Eight y = load(a.y, at), x = {};
    if (a.x) x = load(a.x, at);
    for (int i = 0; i < 8; ++i) y.v[i] = x.v[i] + y.v[i] + bias.v[i];
    store(a.out, at, y);
  }
}

// --- a 3 x 3 convolution of repeated pixels, as a 2 x 2 convolution ---

// Which of three taps, along one side, fall on the same pixel: bit k of [phase][tap].
DEV int taps(int phase, int tap) { return phase == 0 ? (tap == 0 ? 1 : 6) : (tap == 0 ? 3 : 4); }

// float32 weights [O, 3, 3, I] to numbers [2, 2, O, 2, 2, I]: those of each phase's convolution. (channels: I, pixels: O)
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) fold_weights(const Params a) {
  i64 columns = a.channels / 8, i = blockIdx.x * (i64)THREADS + threadIdx.x;
  if (i >= 16 * a.pixels * columns) return;
  int tap = (int)(i / columns % 4), phase = (int)(i / columns / 4 / a.pixels);
  i64 output = i / columns / 4 % a.pixels, column = i % columns;
  int rows = taps(phase >> 1, tap >> 1), cols = taps(phase & 1, tap & 1);
  Eight sum = {};
  for (int k = 0; k < 9; ++k) {
    if (!(rows >> k / 3 & 1 && cols >> k % 3 & 1)) continue;
    Eight w = floats(a.weight, (output * 9 + k) * columns + column);
    for (int e = 0; e < 8; ++e) sum.v[e] += w.v[e];
  }
  store(a.out, i, sum);
}

// The gradient of that: x as `fold_weights` writes, gradients as it reads.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) unfold_weights(const Params a) {
  i64 columns = a.channels / 8, i = blockIdx.x * (i64)THREADS + threadIdx.x;
  if (i >= 9 * a.pixels * columns) return;
  int k = (int)(i / columns % 9);
  i64 output = i / columns / 9, column = i % columns;
  Eight sum = {};
  for (int j = 0; j < 16; ++j) {
    int phase = j >> 2, tap = j & 3;
    if (!(taps(phase >> 1, tap >> 1) >> k / 3 & 1 && taps(phase & 1, tap & 1) >> k % 3 & 1)) continue;
    Eight w = load(a.x, ((phase * a.pixels + output) * 4 + tap) * columns + column);
    for (int e = 0; e < 8; ++e) sum.v[e] += w.v[e];
  }
  float4 *to = (float4 *)a.gradients;
  to[2 * i] = {sum.v[0], sum.v[1], sum.v[2], sum.v[3]}, to[2 * i + 1] = {sum.v[4], sum.v[5], sum.v[6], sum.v[7]};
}

// [images, height + 1, width + 1, 2, 2, C] to [images, 2 height, 2 width, C] + bias: each phase has each second pixel.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) weave(const Params a) {
  Place p = place_of(a);
  i64 columns = a.channels / 8;
  Eight bias = a.bias ? floats(a.bias, p.column) : Eight{};
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    unsigned wide = 2 * (unsigned)a.width, pixel = p.pixel + k * p.rows, row = pixel / wide, column = pixel % wide;
    unsigned v = row & 1, u = column & 1;
    i64 from = (p.image * (a.height + 1) + row / 2 + v) * (a.width + 1) + column / 2 + u;
    Eight y = load(a.x, (from * 4 + v * 2 + u) * columns + p.column);
    for (int i = 0; i < 8; ++i) y.v[i] += bias.v[i];
    store(a.out, at, y);
  }
}

// The gradient of that. Here channels are those of all phases together, and pixels those of the wide grid.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) unweave(const Params a) {
  Place p = place_of(a);
  i64 columns = a.channels / 32;
  int phase = p.column / (int)columns, v = phase >> 1, u = phase & 1;
#pragma unroll 4
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    unsigned wide = (unsigned)a.width + 1, pixel = p.pixel + k * p.rows;
    int row = (int)(pixel / wide) - v, column = (int)(pixel % wide) - u;
    Eight y = {};
    if (row >= 0 && row < a.height && column >= 0 && column < a.width) {
      i64 from = (p.image * 2 * a.height + 2 * row + v) * 2 * a.width + 2 * column + u;
      y = load(a.x, from * columns + p.column % columns);
    }
    store(a.out, at, y);
  }
}

// --- total variation of planes: float32, [images, height, width, C] and weights of the images ---

DEV bool next_of(const Params &a, const Place &p, int row, int column, Eight &other) {
  if (row < 0 || row >= a.height || column < 0 || column >= a.width) return false;
  other = floats((const float *)a.x, (p.image * a.pixels + row * a.width + column) * (a.channels / 8) + p.column);
  return true;
}

// The sum of each chunk, [images, chunks]; `sums` is that here.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) variation(const Params a) {
  __shared__ float shared[WARPS];
  Place p = place_of(a);
  float weight = a.weight[p.image], down = weight / ((a.height - 1) * a.width * a.channels);
  float right = weight / (a.height * (a.width - 1) * a.channels), sum = 0.f;
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    unsigned wide = (unsigned)a.width, pixel = p.pixel + k * p.rows;
    int row = (int)(pixel / wide), column = (int)(pixel % wide);
    Eight own = floats((const float *)a.x, at), other;
    if (next_of(a, p, row + 1, column, other))
      for (int i = 0; i < 8; ++i) sum += down * (other.v[i] - own.v[i]) * (other.v[i] - own.v[i]);
    if (next_of(a, p, row, column + 1, other))
      for (int i = 0; i < 8; ++i) sum += right * (other.v[i] - own.v[i]) * (other.v[i] - own.v[i]);
  }
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < WARPS; ++w) sum += shared[w];
    a.sums[blockIdx.x] = sum;
  }
}

// Its gradient times *shift.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST) variation_gradient(const Params a) {
  Place p = place_of(a);
  float weight = 2.f * a.weight[p.image] * *a.shift, vertical = weight / ((a.height - 1) * a.width * a.channels);
  float horizontal = weight / (a.height * (a.width - 1) * a.channels);
  for (int k = 0; k < p.count; ++k) {
    i64 at = p.index + k * p.step;
    unsigned wide = (unsigned)a.width, pixel = p.pixel + k * p.rows;
    int row = (int)(pixel / wide), column = (int)(pixel % wide);
    Eight own = floats((const float *)a.x, at), other, d = {};
#pragma unroll
    for (int side = 0; side < 4; ++side) {
      int step = side & 1 ? 1 : -1;
      float factor = side < 2 ? vertical : horizontal;
      if (next_of(a, p, row + (side < 2 ? step : 0), column + (side < 2 ? 0 : step), other))
        for (int i = 0; i < 8; ++i) d.v[i] += factor * (own.v[i] - other.v[i]);
    }
    float4 *to = (float4 *)a.out;
    i64 i = at;
    to[2 * i] = {d.v[0], d.v[1], d.v[2], d.v[3]}, to[2 * i + 1] = {d.v[4], d.v[5], d.v[6], d.v[7]};
  }
}
