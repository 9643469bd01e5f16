// SPDX-License-Identifier: Apache-2.0
// The distortion of a ray: sum_ij w_i w_j |m_i - m_j| + sum_i w_i^2 d_i / 3 over its sorted intervals, of weights w, middles m
// and lengths d. Called by whole warps, where DISTORTION is set.
#pragma once
#include "ray_marching.cuh"

// Distortion's derivative by w_i is 2 sum_j w_j |m_i - m_j| + 2/3 w_i d_i, and as it is of second degree in w, half of the
// weights' sum of it is the distortion. With W and M as sums of w and w m up to i, and those of all intervals, the first part
// is 2 (m_i (2 W_i - W) - 2 M_i + M). `center` is taken from the middles, so that little cancels: a depth near which most is.
//
// Returns the distortion, times `scale`; with SLOPES writes its derivatives, times `scale`, to slope [COUNT - 1] instead.
template <int COUNT, bool SLOPES>
DEV float distortion(const float *t, const float *weight, float center, float scale, float *slope) {
  constexpr int ROUNDS = (COUNT + 30) / 32;
  float sum[2 * ROUNDS], opacity = 0.f, moment = 0.f, total = 0.f;  // sums of w, then of w m
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    int k = 32 * i + lane_id();
    sum[i] = k < COUNT - 1 ? weight[k] : 0.f;
    sum[ROUNDS + i] = k < COUNT - 1 ? weight[k] * (0.5f * (t[k] + t[k + 1]) - center) : 0.f;
  }
  scan_sum(sum);
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    sum[i] += opacity;
    sum[ROUNDS + i] += moment;
    opacity = __shfl_sync(ALL, sum[i], 31);
    moment = __shfl_sync(ALL, sum[ROUNDS + i], 31);
  }
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    int k = 32 * i + lane_id();
    if (k >= COUNT - 1) continue;
    float middle = 0.5f * (t[k] + t[k + 1]) - center, own = weight[k] * (t[k + 1] - t[k]);
    float derivative = 2.f * (middle * (2.f * sum[i] - opacity) - 2.f * sum[ROUNDS + i] + moment) + own * (2.f / 3.f);
    if (SLOPES)
      slope[k] = scale * derivative;
    else
      total = fmaf(weight[k], derivative, total);
  }
  if (SLOPES) __syncwarp();
  return SLOPES ? 0.f : 0.5f * scale * warp_sum(total);
}
