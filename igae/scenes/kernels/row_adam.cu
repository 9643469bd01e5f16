// SPDX-License-Identifier: Apache-2.0
// Adam over the rows of a large tensor. What is computed is defined in igae/scenes/row_adam.py.
//
// A visit is `plan` (one warp a row: its deferred updates, in few parts) and `catch_up` (elements, each read once, and copied
// with the deferred updates: rows stay as they are); a step is `plan` again, if it was not just made, `begin` (one block) and
// `update`, which applies the deferred updates and then its own. To catch up is `plan` and `catch_up`, which then writes the
// rows. Only `plan` and `begin` read and write which updates rows have got and how many steps there were: the others find
// all they need in the records.
// No CUDA header is included: NVRTC has none.

typedef long long i64;
#define DEV static __device__ __forceinline__

constexpr unsigned ALL = 0xffffffffu;
constexpr double SPREAD = 1.2;
constexpr int SWEEPS = 6, THREADS = 256, ITEMS = 2;

// A slot has a Head and then its parts: deferred steps that are applied in one go, then the step with the gradient.
struct __align__(16) Head {
  i64 row;   // -1: none
  i64 done;  // the last step that it has got once its parts are applied
  int parts, unused[3];
};
struct __align__(16) Part {
  float weight0, weight1, weight2, decay1, scale0, scale1, scale2, decay2;
};
union Record {
  Head head;
  Part part;
};

struct Params {
  float *p, *m, *v;              // [count, size]
  float *copies;                 // [slots, size]: what a visit returns; or null, and `catch_up` writes the rows
  const float *gradient;         // [slots, size]
  const i64 *rows;               // [slots], or null: all rows
  i64 *updated, *visited;        // [count]
  i64 *steps;                    // []: how many there were
  double *rates;                 // [capacity]: their learning rates
  Record *records;               // [slots, 2 + parts]
  const double *lr;              // []; null: lr_value
  const unsigned char *apply;    // []; null: yes
  i64 count, size, slots, capacity, horizon;
  double lr_value, log1, log2;   // logarithms of the decays of the moments
  float eps, scale, new1, new2;  // 1 - decays
  int parts, settle;             // settle: what `plan` finds will be written
};

DEV Record *record_of(const Params &a, i64 slot) { return a.records + slot * (2 + a.parts); }

DEV i64 row_of(const Params &a, i64 slot) {
  i64 row = a.rows ? a.rows[slot] : slot;
  if (row >= a.count) __trap();  // as torch does where an index on the device is out of range
  return row;
}

DEV double warp_sum(double v) {
#pragma unroll
  for (int d = 16; d > 0; d >>= 1) v += __shfl_xor_sync(ALL, v, d);
  return v;
}

// --- deferred updates ---

// The deferred steps of a part, 32 at a time: each lane has one of them, `past` steps after the last one that was applied.
struct Steps {
  const double *rates;     // of the part's first step and on
  double first1, first2;   // beta1^past and beta2^(past / 2) of the lane's first step
  double stride1, stride2; // what 32 steps multiply them by
  double before1, before2; // beta1^t and beta2^t of the last step that was applied
  double now1, now2;
  i64 past;

  __device__ __forceinline__ void rewind() {
    past = 1 + (threadIdx.x & 31);
    now1 = first1;
    now2 = first2;
  }
  __device__ __forceinline__ void advance() {
    past += 32;
    now1 *= stride1;
    now2 *= stride2;
  }
  __device__ __forceinline__ double place() const { return now2 * rsqrt(1 - before2 * now2 * now2); }
  __device__ __forceinline__ double mass() const { return rates[past - 1] * now1 / (1 - before1 * now1); }
};

// Masses at places of a part, as a tridiagonal matrix, whose eigenvalues are the places of Gauss's rule less `center`.
struct Rule {
  double total, center, diagonal1, diagonal2, square1, square2;  // diagonal0 is 0; squares of the links
  i64 count;                                                     // steps of the part
};

// The first part of at most `deferred` steps. The matrix comes from Stieltjes's recurrence: each entry is a mean over the
// masses, so that what is computed stays in their range also where there are fewer places than nodes.
DEV Rule first_part(Steps &steps, i64 deferred) {
  Rule rule = {0, 0, 0, 0, 0, 0, 0};
  steps.rewind();
  double head = __shfl_sync(ALL, steps.place(), 0), shift = 0;
  for (unsigned taken = ALL; taken == ALL; steps.advance()) {
    double place = steps.place();
    bool together = steps.past <= deferred && place * SPREAD >= head;  // places fall from step to step
    if (together) {
      double mass = steps.mass();
      rule.total += mass;
      shift += mass * (place - head);
    }
    taken = __ballot_sync(ALL, together);
    rule.count += __popc(taken);
  }
  rule.total = warp_sum(rule.total);
  shift = warp_sum(shift);
  rule.center = rule.total > 0 ? head + shift / rule.total : head;

  double second = 0, third = 0;
  for (steps.rewind(); steps.past <= rule.count; steps.advance()) {
    double x = steps.place() - rule.center, share = steps.mass() * x * x;
    second += share;
    third += share * x;
  }
  second = warp_sum(second);
  third = warp_sum(third);
  if (!(second > 0)) return rule;
  rule.square1 = second / rule.total;
  rule.diagonal1 = third / second;

  double norm = 0, mean = 0;
  for (steps.rewind(); steps.past <= rule.count; steps.advance()) {
    double x = steps.place() - rule.center, y = (x - rule.diagonal1) * x - rule.square1;
    double share = steps.mass() * y * y;
    norm += share;
    mean += share * x;
  }
  norm = warp_sum(norm);
  mean = warp_sum(mean);
  if (!(norm > 0)) return rule;
  rule.square2 = norm / second;
  rule.diagonal2 = mean / norm;
  return rule;
}

// One of Jacobi's rotations, which makes `pq` 0: of the matrix, and of the first row of its eigenvectors.
DEV void rotate(double &pp, double &qq, double &pq, double &pr, double &qr, double &vp, double &vq) {
  if (!(fabs(pq) > 1e-300)) return;
  double theta = (qq - pp) / (2 * pq);
  double t = copysign(1 / (fabs(theta) + sqrt(theta * theta + 1)), theta);
  double c = rsqrt(t * t + 1), s = t * c, r = pr, v = vp;
  pp -= t * pq;
  qq += t * pq;
  pq = 0;
  pr = c * r - s * qr;
  qr = s * r + c * qr;
  vp = c * v - s * vq;
  vq = s * v + c * vq;
}

DEV Part part_of(const Rule &rule, double log1, double log2) {
  double a = 0, b = rule.diagonal1, c = rule.diagonal2;
  double ab = sqrt(rule.square1), bc = sqrt(rule.square2), ac = 0, va = 1, vb = 0, vc = 0;
#pragma unroll 1
  for (int sweep = 0; sweep < SWEEPS; ++sweep) {
    rotate(a, b, ab, ac, bc, va, vb);
    rotate(a, c, ac, ab, bc, va, vc);
    rotate(b, c, bc, ab, ac, vb, vc);
  }
  return {float(rule.total * va * va), float(rule.total * vb * vb), float(rule.total * vc * vc),
          float(exp(log1 * rule.count)), float(rule.center + a), float(rule.center + b), float(rule.center + c),
          float(exp(log2 * rule.count))};
}

// One warp a block, one block a slot.
extern "C" __global__ void __launch_bounds__(32) plan(const Params a) {
  i64 slot = blockIdx.x, row = row_of(a, slot);
  Record *record = record_of(a, slot);
  int lane = threadIdx.x, parts = 0;
  i64 done = row >= 0 ? a.updated[row] : 0;
  if (row >= 0 && a.visited[row] > 0) {
    i64 until = min(a.visited[row] + a.horizon, *a.steps);
    if (done < until) {
      Steps steps;
      steps.first1 = exp(a.log1 * (1 + lane));
      steps.first2 = exp(a.log2 * (0.5 * (1 + lane)));
      steps.stride1 = exp(a.log1 * 32);
      steps.stride2 = exp(a.log2 * 16);
      while (done < until && parts < a.parts) {
        Rule mine = {0, 0, 0, 0, 0, 0, 0};  // each lane finishes one part
        int first = parts;
        do {
          steps.rates = a.rates + done;
          steps.before1 = exp(a.log1 * done);
          steps.before2 = exp(a.log2 * done);
          Rule rule = first_part(steps, until - done);
          if (lane == parts - first) mine = rule;
          done += rule.count;
          ++parts;
        } while (done < until && parts < a.parts && parts - first < 32);
        if (lane < parts - first) record[1 + first + lane].part = part_of(mine, a.log1, a.log2);
      }
      __syncwarp();  // all lanes have read it
      if (lane == 0 && a.settle) a.updated[row] = done;
    }
  }
  if (lane == 0) {
    record->head.row = row;
    record->head.done = done;
    record->head.parts = parts;
  }
}

// One block. Counts the step, unless it is not to be made.
extern "C" __global__ void __launch_bounds__(1024) begin(const Params a) {
  bool wanted = !a.apply || *a.apply;
  i64 now = *a.steps + 1;
  double lr = a.lr ? *a.lr : a.lr_value;
  __syncthreads();  // all threads have read it
  if (threadIdx.x == 0 && wanted) {
    if (now > a.capacity) __trap();  // a captured graph has made more steps than were reserved
    a.rates[now - 1] = lr;
    *a.steps = now;
  }
  for (i64 slot = threadIdx.x; slot < a.slots; slot += blockDim.x) {
    i64 row = row_of(a, slot);
    Record *record = record_of(a, slot);
    record->head.row = wanted ? row : -1;
    if (row < 0 || !wanted) continue;
    i64 updated = record->head.done, step = now;
    asm("" : "+l"(step));  // else what it is used for is kept through the loop, in more registers than there are
    // Steps beyond the horizon updated nothing, but the moments decayed in them.
    i64 decayed = a.visited[row] == 0 ? 1 : now - updated;
    record[1 + record->head.parts].part = {float(lr / (1 - exp(a.log1 * step))), 0, 0, float(exp(a.log1 * decayed)),
                      float(rsqrt(1 - exp(a.log2 * step))), 0, 0, float(exp(a.log2 * decayed))};
    a.updated[row] = step;
    a.visited[row] = now;
  }
}

// --- elements ---

template <int WIDTH> struct Vector;
template <> struct Vector<1> { typedef float type; };
template <> struct Vector<4> { typedef float4 type; };

template <int WIDTH> struct Elements {
  typedef typename Vector<WIDTH>::type Type;
  union {
    Type all[ITEMS];
    float each[ITEMS * WIDTH];
  };

  // `from` on, and THREADS vectors further on again; what is beyond `size` is left out. Rows are used once: they must not
  // drive what comes next out of the cache.
  __device__ __forceinline__ void read(const float *row, i64 from, i64 size) {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      if (from + i * THREADS * WIDTH < size) all[i] = __ldcs((const Type *)(row + from) + i * THREADS);
  }
  __device__ __forceinline__ void write(float *row, i64 from, i64 size, bool once = true) const {
#pragma unroll
    for (int i = 0; i < ITEMS; ++i)
      if (from + i * THREADS * WIDTH < size) {
        Type *place = (Type *)(row + from) + i * THREADS;
        once ? __stcs(place, all[i]) : void(*place = all[i]);
      }
  }
};

// The slot of a block and the thread's first element in it.
template <int WIDTH> DEV i64 place_of(const Params &a, i64 &from) {
  i64 chunk = WIDTH * ITEMS * THREADS, chunks = (a.size + chunk - 1) / chunk;
  from = blockIdx.x % chunks * chunk + WIDTH * threadIdx.x;
  return blockIdx.x / chunks;
}

// Applies the deferred updates.
template <int WIDTH> DEV void apply_deferred(const Params &a, const Record *record, int parts, Elements<WIDTH> &p,
                                              Elements<WIDTH> &m, Elements<WIDTH> &v) {
  for (int k = 1; k <= parts; ++k) {
    Part part = record[k].part;
#pragma unroll
    for (int i = 0; i < ITEMS * WIDTH; ++i) {
      float x = sqrtf(v.each[i]), total = part.weight0 / fmaf(part.scale0, x, a.eps);
      total += part.weight1 / fmaf(part.scale1, x, a.eps);
      total += part.weight2 / fmaf(part.scale2, x, a.eps);
      p.each[i] = fmaf(-m.each[i], total, p.each[i]);
      m.each[i] *= part.decay1;
      v.each[i] *= part.decay2;
    }
  }
}

template <int WIDTH> DEV void catch_up(const Params &a) {
  i64 from, slot = place_of<WIDTH>(a, from);
  const Record *record = record_of(a, slot);
  i64 row = record->head.row, start = row * a.size;
  int parts = record->head.parts;
  Elements<WIDTH> p = {}, m = {}, v = {};
  if (row >= 0 && (parts > 0 || a.copies)) p.read(a.p + start, from, a.size);
  if (parts > 0) {
    m.read(a.m + start, from, a.size);
    v.read(a.v + start, from, a.size);
    apply_deferred<WIDTH>(a, record, parts, p, m, v);
  }
  if (a.copies) {
    p.write(a.copies + slot * a.size, from, a.size, false);
  } else if (parts > 0) {
    p.write(a.p + start, from, a.size);
    m.write(a.m + start, from, a.size);
    v.write(a.v + start, from, a.size);
  }
}

template <int WIDTH> DEV void update(const Params &a) {
  i64 from, slot = place_of<WIDTH>(a, from);
  const Record *record = record_of(a, slot);
  i64 row = record->head.row, start = row * a.size;
  if (row < 0) return;
  int parts = record->head.parts;
  Elements<WIDTH> p = {}, m = {}, v = {}, g = {};
  g.read(a.gradient + slot * a.size, from, a.size);
  p.read(a.p + start, from, a.size);
  m.read(a.m + start, from, a.size);
  v.read(a.v + start, from, a.size);
  apply_deferred<WIDTH>(a, record, parts, p, m, v);
  Part part = record[1 + parts].part;
#pragma unroll
  for (int i = 0; i < ITEMS * WIDTH; ++i) {
    float gradient = g.each[i] * a.scale;
    m.each[i] = fmaf(m.each[i], part.decay1, a.new1 * gradient);
    v.each[i] = fmaf(v.each[i], part.decay2, a.new2 * gradient * gradient);
    p.each[i] = fmaf(-m.each[i], part.weight0 / fmaf(part.scale0, sqrtf(v.each[i]), a.eps), p.each[i]);
  }
  p.write(a.p + start, from, a.size);
  m.write(a.m + start, from, a.size);
  v.write(a.v + start, from, a.size);
}

extern "C" __global__ void __launch_bounds__(THREADS) catch_up1(const Params a) { catch_up<1>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) catch_up4(const Params a) { catch_up<4>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) update1(const Params a) { update<1>(a); }
extern "C" __global__ void __launch_bounds__(THREADS) update4(const Params a) { update<4>(a); }
