// SPDX-License-Identifier: Apache-2.0
// What CUDA kernels need, for g++ on x86-64: included before a kernel's source by emulated_cuda.py, which says what is
// emulated and what is not. Each thread of a block is a fiber; one runs until it has to wait for others.
#pragma once
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
template <class T>
static T min(T a, T b) { return b < a ? b : a; }
template <class T>
static T max(T a, T b) { return a < b ? b : a; }
static float min(float a, float b) { return fminf(a, b); }  // the other one, where one is NaN
static float max(float a, float b) { return fmaxf(a, b); }

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 { int x, y, z; };

// The registers of a thread that calls, its stack last, are kept at *from; those of `to` are taken up.
extern "C" void emulated_switch(void **from, void *to) __attribute__((visibility("hidden")));
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
emulated_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp, (%rdi)
 movq %rsi, %rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
)");

namespace emulated {
constexpr int MOST_THREADS = 1024, STACK = 1 << 18;  // bytes
constexpr int BLOCK = 32;                            // the block's barrier; those before are of warps
constexpr unsigned UNWRITTEN = 0x7fc12345u;          // a NaN

static int current, threads;
static dim3 thread_index[MOST_THREADS];
static void *host, *place[MOST_THREADS];
static char *stack[MOST_THREADS], *shared_memory;
static bool done[MOST_THREADS];
static int arrived[BLOCK + 1], rounds[BLOCK + 1];
static bool progress;
static const char *failure;

static void yield() { emulated_switch(&place[current], host); }

[[noreturn]] static void fail(const char *what) {
  failure = what;
  for (;;) yield();
}

static void wrong_address(int) { fail("memory is accessed at an address where there is none, or that is not aligned"); }

static void barrier(int which, int count) {
  progress = true;
  int round = rounds[which];
  if (++arrived[which] == count) {
    arrived[which] = 0;
    ++rounds[which];
    return;
  }
  while (rounds[which] == round) yield();
}
static void warp_barrier() { barrier(current >> 5, 32); }

// Lays a value out for the warp and returns those of all lanes. Two places by turns: a lane may be one exchange ahead.
template <class T>
static const T *exchange(const T &value) {
  static T box[2][MOST_THREADS];
  static unsigned char turn[MOST_THREADS];
  int side = turn[current] ^= 1;
  box[side][current] = value;
  warp_barrier();
  return box[side] + (current & ~31);
}

template <class T>
static void check_alignment(const T *at, size_t bytes) {
  if ((uintptr_t)at % bytes) fail("memory is accessed at an address that is no multiple of the access's size");
}

// What the kernels' casts to int go through: a GPU makes NaN 0, and what is too large the largest int.
struct Int {
  int value;
  template <class T>
  Int(T x) : value((int)x) {}
  Int(float x) : value(x != x ? 0 : x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : (int)x) {}
  operator int() const { return value; }
};

// An operand as tensor cores take it: without what is beyond 10 bits.
static double cut(unsigned bits) {
  float x;
  bits &= 0xffffe000u;
  memcpy(&x, &bits, 4);
  return x;
}

static unsigned bits_of(float x) {  // of the nearest float16
  _Float16 h = (_Float16)x;
  unsigned short bits;
  memcpy(&bits, &h, 2);
  return bits;
}
static float half_of(unsigned pair, int which) {
  unsigned short bits = pair >> 16 * which;
  _Float16 h;
  memcpy(&h, &bits, 2);
  return (float)h;
}
// A pair of float16: `high` in the upper half. What is too large becomes the largest.
static unsigned half2(float high, float low) {
  auto limited = [](float x) { return x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x; };
  return bits_of(limited(high)) << 16 | bits_of(limited(low));
}
// A pair of bfloat16, rounded to the nearest, ties to even: `high` in the upper half.
static unsigned bfloat2(float high, float low) {
  auto rounded = [](float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return rounded(high) << 16 | rounded(low);
}
static unsigned times(unsigned a, unsigned b) {
  return bits_of(half_of(a, 1) * half_of(b, 1)) << 16 | bits_of(half_of(a, 0) * half_of(b, 0));
}

struct Operands { unsigned a[4], b[2]; };
// d[16, 8] += a[16, K] b[K, 8], with the PTX manual's distribution over lanes; summed up in float64. Of a register with two
// numbers number(register, 1) is the later one.
template <int K, class Number>
static void product(float *const (&d)[4], const Operands &own, Number number) {
  constexpr int HALF = K / 2, EACH = K / 8;  // inner indices of a register in all lanes; of one lane
  const Operands *lanes = exchange<Operands>(own);
  int g = (current & 31) >> 2, q = current & 3;
  for (int e = 0; e < 4; ++e) {
    int upper = e >> 1, column = 2 * q + (e & 1);
    double sum = *d[e];
    for (int k = 0; k < K; ++k) {
      int lane = k % HALF / EACH, which = k / HALF;
      sum += (double)number(lanes[4 * g + lane].a[upper + 2 * which], k % EACH) *
             number(lanes[4 * column + lane].b[which], k % EACH);
    }
    *d[e] = (float)sum;
  }
}
static void mma(float &d0, float &d1, float &d2, float &d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                unsigned b0, unsigned b1) {  // m16n8k8 of TF32
  product<8>({&d0, &d1, &d2, &d3}, {{a0, a1, a2, a3}, {b0, b1}}, [](unsigned bits, int) { return cut(bits); });
}
static void mma_f16(float &d0, float &d1, float &d2, float &d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                    unsigned b0, unsigned b1) {  // m16n8k16 of float16
  product<16>({&d0, &d1, &d2, &d3}, {{a0, a1, a2, a3}, {b0, b1}}, half_of);
}

static void add4(float *at, float x, float y, float z, float w) {
  check_alignment(at, 16);
  at[0] += x, at[1] += y, at[2] += z, at[3] += w;
}

// Memory of `shared` bytes is followed by 128 that must stay as they are.
static bool run_block(void (*entry)(), bool reverse, long shared) {
  memset(arrived, 0, sizeof arrived);
  for (int i = 0; i < shared / 4 + 32; ++i) ((unsigned *)shared_memory)[i] = UNWRITTEN;
  for (int i = 0; i < threads; ++i) {
    if (!stack[i]) stack[i] = (char *)aligned_alloc(64, STACK);
    thread_index[i] = {i, 0, 0}, done[i] = false;
    void **top = (void **)(stack[i] + STACK - 64);
    *--top = nullptr;  // aligns the stack as a call does
    *--top = (void *)entry;
    place[i] = top - 6;
  }
  // A warp goes as far as it can before the next one runs: what only happens to be in step shows.
  for (int left = threads, warps = (threads + 31) / 32; left > 0;) {
    bool any = false;
    for (int w = 0; w < warps; ++w) {
      int first = 32 * (reverse ? warps - 1 - w : w), lanes = min(32, threads - first);
      do {
        progress = false;
        for (int i = 0; i < lanes; ++i) {
          current = first + (reverse ? lanes - 1 - i : i);
          if (done[current]) continue;
          emulated_switch(&host, place[current]);
          if (failure) return false;
          if (done[current]) progress = true, --left;
        }
        any |= progress;
      } while (progress);
    }
    if (!any) {
      failure = "threads wait for others that have ended or wait elsewhere";
      return false;
    }
  }
  for (int i = 0; i < 32; ++i)
    if (((unsigned *)shared_memory)[shared / 4 + i] != UNWRITTEN) failure = "shared memory is written past its end";
  return !failure;
}
}  // namespace emulated

static dim3 blockIdx, gridDim, blockDim;
#define threadIdx (emulated::thread_index[emulated::current])

namespace emulated {
// Runs a kernel, block after block; threads of a block by turns, from the first or in reverse. Returns what went wrong,
// or null.
template <class Params, void (*kernel)(Params)>
static const char *launch(const Params &given, int blocks, int count, long shared, bool reverse) {
  static const Params *params;
  params = &given, threads = count, failure = nullptr;
  gridDim = {blocks, 1, 1}, blockDim = {count, 1, 1};
  shared_memory = (char *)aligned_alloc(128, (shared + 128 + 127) / 128 * 128);
  auto entry = [] {
    kernel(*params);
    done[current] = true;
    for (;;) yield();
  };
  struct sigaction ours = {}, before;
  ours.sa_handler = wrong_address;
  ours.sa_flags = SA_NODEFER;  // the handler is left by a switch
  sigaction(SIGSEGV, &ours, &before);
  for (int block = 0; block < blocks; ++block) {
    blockIdx = {block, 0, 0};
    if (!run_block(entry, reverse, shared)) break;
  }
  sigaction(SIGSEGV, &before, nullptr);
  free(shared_memory);
  return failure;
}
}  // namespace emulated

static void __syncwarp() { emulated::warp_barrier(); }
static void __syncthreads() { emulated::barrier(emulated::BLOCK, emulated::threads); }
static int __syncthreads_or(int x) {
  using namespace emulated;
  static int any, result[2];
  if (arrived[BLOCK] == 0) any = 0;
  any |= x != 0;
  int side = rounds[BLOCK] & 1;
  if (arrived[BLOCK] == threads - 1) result[side] = any;
  barrier(BLOCK, threads);
  return result[side];
}
template <class T>
static T __shfl_sync(unsigned, T v, int from, int width = 32) {
  int lane = emulated::current & 31;
  return emulated::exchange(v)[(lane & ~(width - 1)) | (from & (width - 1))];
}
template <class T>
static T __shfl_xor_sync(unsigned, T v, int mask, int = 32) {
  int lane = emulated::current & 31;
  return emulated::exchange(v)[lane ^ mask];
}
template <class T>
static T __shfl_up_sync(unsigned, T v, int by, int width = 32) {
  int lane = emulated::current & 31, from = lane - by;
  return emulated::exchange(v)[from < (lane & ~(width - 1)) ? lane : from];
}
template <class T>
static T __shfl_down_sync(unsigned, T v, int by, int width = 32) {
  int lane = emulated::current & 31, from = lane + by;
  return emulated::exchange(v)[from > (lane | (width - 1)) ? lane : from];
}
static unsigned __ballot_sync(unsigned, int x) {
  const bool *votes = emulated::exchange<bool>(x != 0);
  unsigned all = 0;
  for (int i = 0; i < 32; ++i) all |= (unsigned)votes[i] << i;
  return all;
}
static bool __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x) == ~0u; }
static bool __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static int __ffs(int x) { return __builtin_ffs(x); }
static int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
static float __uint_as_float(unsigned x) {
  float f;
  memcpy(&f, &x, 4);
  return f;
}
static unsigned __float_as_uint(float x) {
  unsigned u;
  memcpy(&u, &x, 4);
  return u;
}
static float __int_as_float(int x) { return __uint_as_float(x); }
static int __float_as_int(float x) { return (int)__float_as_uint(x); }
static float rsqrtf(float x) { return 1.f / sqrtf(x); }
static float __saturatef(float x) { return x > 0 ? min(x, 1.f) : 0.f; }  // of NaN, too
template <class T>
static T __ldg(const T *at) {
  emulated::check_alignment(at, sizeof(T));
  return *at;
}
template <class T>
static T __ldcs(const T *at) { return __ldg(at); }
template <class T>
static void __stcs(T *at, T v) {
  emulated::check_alignment(at, sizeof(T));
  *at = v;
}
static long long __double2ll_rn(double x) { return llrint(x); }
[[noreturn]] static void __trap() { emulated::fail("the kernel ended in a trap"); }
static void atomicMax(unsigned *at, unsigned v) { *at = max(*at, v); }
static void atomicAdd(unsigned long long *at, unsigned long long v) { *at += v; }
static void atomicAdd(float *at, float v) { *at += v; }
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned found = 0;
  for (int i = 0; i < 4; ++i) found |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return found;
}
static double rsqrt(double x) { return 1 / std::sqrt(x); }
