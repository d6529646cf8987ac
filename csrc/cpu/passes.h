// The passes over a block of a row: into the buffers, the sums, the gradient. Everything is
// internal to its source file, as in vec.h.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../row_math.h"
#include "rows.h"
#include "vec.h"

namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr int kFresh = -1;  // the mode of a row without teacher; otherwise see mode_of

// A stretch of the row whose exponentials were taken against the same two maxima.
struct Run {
  int64_t begin;
  double z_top, u_top;
};
static_assert(sizeof(Run) == 24, "dlb_scratch_bytes counts on it");

// 1 to 4: the temperature is that integer, so exp(x) is a power of exp(x / temperature). 0: it is
// another number.
inline int mode_of(double temperature) {
  for (int p = 1; p <= 4; ++p)
    if (temperature == p) return p;
  return 0;
}

template <class R>
struct Scratch {
  R* z;        // (kDlbBlock,) logits of the block
  R* u;        // (kDlbBlock,) teacher's logits of the block
  R* first;    // exp(x) of a fresh row, exp(x / temperature) of a taught one
  R* teacher;  // exp(u / temperature)
  R* hard;     // exp(x) of a taught row, where it is no power of `first`
  Run* runs;

  Scratch() = default;

  Scratch(char* p, int64_t row) {
    z = take(p, kDlbBlock);
    u = take(p, kDlbBlock);
    first = take(p, row + kLanes<R>);
    teacher = take(p, row + kLanes<R>);
    hard = take(p, row + kLanes<R>);
    runs = reinterpret_cast<Run*>(p);
  }

  // Aligned, with room for the rest of the last vector.
  static R* take(char*& p, int64_t n) {
    R* taken = reinterpret_cast<R*>(p);
    p += (size_t(n + kLanes<R>) * sizeof(R) + 63) / 64 * 64;
    return taken;
  }
};

template <class R>
inline R reference(R top) {
  return top == -std::numeric_limits<R>::infinity() ? 0 : top;
}

// std::exp, but for the commonest argument.
inline double exp_or_one(double x) { return x == 0 ? 1 : std::exp(x); }

// ---- passes over a block ----

// Converts n elements to `to`, fills the last vector with -inf, and returns the largest.
template <class T>
RealOf<T> load_block(const void* from, int64_t n, RealOf<T>* to) {
  using R = RealOf<T>;
  constexpr int64_t lanes = kLanes<R>, kUnroll = 4;  // one maximum would wait for the last one
  const T* p = static_cast<const T*>(from);
  Vector<R> top[kUnroll];
  for (auto& t : top) t = splat<Vector<R>>(-std::numeric_limits<R>::infinity());
  int64_t c = 0;
  for (; c + kUnroll * lanes <= n; c += kUnroll * lanes) {
    for (int64_t i = 0; i < kUnroll; ++i) {
      const Vector<R> v = load(p + c + i * lanes);
      store(to + c + i * lanes, v);
      top[i] = max_else_second(v, top[i]);
    }
  }
  for (; c < n; c += lanes) {
    const Vector<R> v =
        c + lanes <= n ? load(p + c) : load_some(p + c, n - c, -std::numeric_limits<R>::infinity());
    store(to + c, v);
    top[0] = max_else_second(v, top[0]);
  }
  top[0] = max_else_second(max_else_second(top[0], top[1]), max_else_second(top[2], top[3]));
  return max_lanes(top[0]);
}

template <class R>
bool has_nan(const R* z, int64_t n) {
  bool nan = false;
  for (int64_t c = 0; c < n; ++c) nan |= z[c] != z[c];
  return nan;
}

template <class R>
struct Exponents {
  using V = Vector<R>;
  Exponent<V, R> hard, soft;
  explicit Exponents(double temperature) : hard(kLog2E), soft(kLog2E / temperature) {}
};

// Vectors that are added up in one accumulator: it is then added to another, since the rounding
// errors of a long chain of additions would show in the gradient.
constexpr int64_t kChain = 16;

// The block or row to be loaded next, fetched into the cache while this one is summed: memory would
// stand idle meanwhile. May lie past the end of the tensor.
struct Ahead {
  uintptr_t z, u;
  int64_t z_size, u_size;  // bytes an element

  void fetch_z(int64_t c) const { __builtin_prefetch(reinterpret_cast<void*>(z + c * z_size)); }
  void fetch_u(int64_t c) const { __builtin_prefetch(reinterpret_cast<void*>(u + c * u_size)); }
};

// Always inline: in a loop over rows the constants then stay in registers.
template <class R>
[[gnu::always_inline]] inline double sum_fresh(const R* z, int64_t n, double z_top,
                                               const Exponents<R>& k, const Ahead ahead, R* first) {
  using V = Vector<R>;
  const V top = splat<V>(R(z_top));
  const Exponent<V, R> hard = k.hard;  // not read again after each store
  V total = {};
  for (int64_t begin = 0; begin < n; begin += kChain * kLanes<R>) {
    const int64_t end = n - begin < kChain * kLanes<R> ? n : begin + kChain * kLanes<R>;
    V sum = {};
    for (int64_t c = begin; c < end; c += kLanes<R>) {
      ahead.fetch_z(c);
      const V e = exp_of(load(z + c) - top, hard);
      store(first + c, e);
      sum += e;
    }
    total += sum;
  }
  return add_lanes(total);
}

// exp(x) from exp(x / kPower).
template <int kPower, class V>
inline V power(V e) {
  if constexpr (kPower == 1) return e;
  if constexpr (kPower == 2) return e * e;
  if constexpr (kPower == 3) return e * e * e;
  if constexpr (kPower == 4) return (e * e) * (e * e);
}

template <class R>
struct TaughtSums {
  Vector<R> other, student, teacher, gap;
};

// kMode: see mode_of.
// Structs come by value, so that the stores cannot be thought to change them.
template <class R, int kMode>
[[gnu::always_inline]] inline TaughtSums<R> sum_chain(const Scratch<R> s, int64_t at, int64_t begin,
                                                      int64_t end, Vector<R> z_ref, Vector<R> u_ref,
                                                      const Exponents<R> k, const Ahead ahead) {
  using V = Vector<R>;
  const V none = splat<V>(-std::numeric_limits<R>::infinity());
  TaughtSums<R> sum = {};
  for (int64_t c = begin; c < end; c += kLanes<R>) {
    ahead.fetch_z(c);
    ahead.fetch_u(c);
    const V x = load(s.z + c) - z_ref, u = load(s.u + c) - u_ref;
    const V soft = exp_of(x, k.soft), q = exp_of(u, k.soft);
    V hard;
    if constexpr (kMode == 0) {
      hard = exp_of(x, k.hard);
      store(s.hard + at + c, hard);
    } else {
      hard = power<kMode>(soft);
    }
    store(s.first + at + c, soft);
    store(s.teacher + at + c, q);
    sum.other += hard;
    sum.student += soft;
    sum.teacher += q;
    sum.gap += u > none ? q * (u - x) : V{};
  }
  return sum;
}

template <class R, int kMode>
[[gnu::always_inline]] inline void add_taught(const Scratch<R>& s, int64_t at, int64_t n,
                                              double z_top, double u_top, const Exponents<R>& k,
                                              const Ahead& ahead, RowSums<double>& sums) {
  const Vector<R> z_ref = splat<Vector<R>>(R(z_top)), u_ref = splat<Vector<R>>(R(u_top));
  TaughtSums<R> total = {};
  for (int64_t begin = 0; begin < n; begin += kChain * kLanes<R>) {
    const int64_t end = n - begin < kChain * kLanes<R> ? n : begin + kChain * kLanes<R>;
    const TaughtSums<R> sum = sum_chain<R, kMode>(s, at, begin, end, z_ref, u_ref, k, ahead);
    total.other += sum.other;
    total.student += sum.student;
    total.teacher += sum.teacher;
    total.gap += sum.gap;
  }
  sums.other += add_lanes(total.other);
  sums.student += add_lanes(total.student);
  sums.teacher += add_lanes(total.teacher);
  sums.gap += add_lanes(total.gap);
}

template <class R, int kMode>
void sum_taught(const Scratch<R>& s, int64_t at, int64_t n, double z_top, double u_top,
                const Exponents<R>& k, const Ahead& ahead, RowSums<double>& sums) {
  add_taught<R, kMode>(s, at, n, z_top, u_top, k, ahead, sums);
}

template <class R>
struct Coefficients {
  R hard, soft, teacher, smooth;
};

// Gradient of n classes whose exponentials lie at `at` in the scratch, into `to`.
template <class T, int kMode>
inline Vector<RealOf<T>> gradient_at(const Scratch<RealOf<T>>& s, int64_t c,
                                     const Coefficients<RealOf<T>>& k) {
  const auto first = load(s.first + c);
  if constexpr (kMode == kFresh) {
    return first * k.hard - k.smooth;
  } else {
    const auto drift = first * k.soft - load(s.teacher + c) * k.teacher - k.smooth;
    if constexpr (kMode == 0) {
      return load(s.hard + c) * k.hard + drift;
    } else {
      return power<kMode>(first) * k.hard + drift;
    }
  }
}

template <class T, int kMode, bool kStream>
void write_gradient(const Scratch<RealOf<T>>& s, int64_t begin, int64_t end,
                    const Coefficients<RealOf<T>>& k, void* row) {
  constexpr int64_t lanes = kLanes<RealOf<T>>;
  T* to = static_cast<T*>(row);
  int64_t c = begin;
  if constexpr (kStream) {
    constexpr uintptr_t bytes = lanes * sizeof(T);
    const int64_t head = int64_t(-reinterpret_cast<uintptr_t>(to + c) % bytes / sizeof(T));
    if (head && c + head <= end) {
      store_some(to + c, gradient_at<T, kMode>(s, c, k), head);
      c += head;
    }
    for (; c + lanes <= end; c += lanes) stream(to + c, gradient_at<T, kMode>(s, c, k));
  } else {
    for (; c + lanes <= end; c += lanes) store(to + c, gradient_at<T, kMode>(s, c, k));
  }
  if (c < end) store_some(to + c, gradient_at<T, kMode>(s, c, k), end - c);
}

void copy_bytes(char* to, const char* from, int64_t n, bool past_caches) {
  int64_t i = 0;
  if (past_caches) {
    const int64_t head = -reinterpret_cast<uintptr_t>(to) % kVectorBytes;
    i = head < n ? head : n;
    std::memcpy(to, from, size_t(i));
    for (; i + kVectorBytes <= n; i += kVectorBytes) stream_bits(to + i, bits_from<VU>(from + i));
  }
  std::memcpy(to + i, from + i, size_t(n - i));
}

// ---- what depends on the types ----

template <class R>
using LoadBlock = R (*)(const void*, int64_t, R*);
template <class R>
using SumTaught = void (*)(const Scratch<R>&, int64_t, int64_t, double, double, const Exponents<R>&,
                           const Ahead&, RowSums<double>&);
template <class R>
using WriteGradient = void (*)(const Scratch<R>&, int64_t, int64_t, const Coefficients<R>&, void*);

template <class R>
constexpr SumTaught<R> kSumTaught[] = {sum_taught<R, 0>, sum_taught<R, 1>, sum_taught<R, 2>,
                                       sum_taught<R, 3>, sum_taught<R, 4>};

template <class T, bool kStream>
constexpr WriteGradient<RealOf<T>> kWriteGradient[] = {
    write_gradient<T, kFresh, kStream>, write_gradient<T, 0, kStream>,
    write_gradient<T, 1, kStream>,      write_gradient<T, 2, kStream>,
    write_gradient<T, 3, kStream>,      write_gradient<T, 4, kStream>};

template <class R>
LoadBlock<R> loader(int32_t dtype) {
  if constexpr (std::is_same_v<R, double>) {
    return load_block<double>;
  } else {
    return dtype == DLB_BFLOAT16  ? load_block<BFloat16>
           : dtype == DLB_FLOAT16 ? load_block<Float16>
                                  : load_block<float>;
  }
}

int64_t size_of(int32_t dtype) { return dtype == DLB_FLOAT64 ? 8 : dtype == DLB_FLOAT32 ? 4 : 2; }
}  // namespace
