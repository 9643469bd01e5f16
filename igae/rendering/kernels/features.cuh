// SPDX-License-Identifier: Apache-2.0
// Features of samples on their way from the forward to the backward pass: see KEPT_FEATURES_AT.
#pragma once
#include "common.cuh"

// The features of one of this lane's rows, as they are kept.
struct alignas(LANE_WORDS % 4 == 0 ? 16 : 8) Features {
  Two pair[2 * CHUNKS];
};
static_assert(sizeof(Features) == 4 * LANE_WORDS, "KEPT counts alike");

DEV Features *kept_features(float *kept, int sample) {
  return (Features *)(kept + KEPT_FEATURES_AT) + 4 * sample + (lane_id() & 3);
}

// Of samples first + g and first + g + 8, if they are below `count`.
DEV void keep_features(const Four (&packed)[CHUNKS][2], float *kept, int first, int count) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int k = first + (lane_id() >> 2) + 8 * half;
    Features own;
#pragma unroll
    for (int i = 0; i < 2 * CHUNKS; ++i) own.pair[i] = half ? right(packed[i >> 1][i & 1]) : left(packed[i >> 1][i & 1]);
    if (k < count) *kept_features(kept, k) = own;
  }
}

// Starts copying to shared memory, for this lane alone, what keep_features had of the samples that are the tile's from `first` on.
DEV void fetch_features(float *kept, const unsigned char *order, int first, Features *own) {
  constexpr int PIECE = alignof(Features);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const char *from = (const char *)kept_features(kept, order[min(first + (lane_id() >> 2) + 8 * half, N - 1)]);
    char *to = (char *)(own + 32 * half + lane_id());
#pragma unroll
    for (int i = 0; i < (int)sizeof(Features); i += PIECE) {
#define COPY(BYTES) "{.reg .u64 at; cvta.to.shared.u64 at, %0; cp.async.ca.shared.global [at], [%1], " #BYTES ";}"
      if (PIECE == 16) asm volatile(COPY(16) ::"l"(to + i), "l"(from + i) : "memory");
      else asm volatile(COPY(8) ::"l"(to + i), "l"(from + i) : "memory");
    }
  }
}

DEV void await_features(const Features *own, Four (&packed)[CHUNKS][2]) {
  asm volatile("cp.async.wait_all;" ::: "memory");
  Features rows[2] = {own[lane_id()], own[32 + lane_id()]};
#pragma unroll
  for (int i = 0; i < 2 * CHUNKS; ++i) packed[i >> 1][i & 1] = joined(rows[0].pair[i], rows[1].pair[i]);
}
