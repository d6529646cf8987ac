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
  R *z, *u;  // (kDlbBlock,) logits and teacher's logits of the block, where they are converted
  R *first, *teacher, *hard;  // as in Exponentials
  Run* runs;

  Scratch(char* p, int64_t row) {
    z = take(p, kDlbBlock);
    u = take(p, kDlbBlock);
    first = take(p, row + kLanes<R>);
    teacher = take(p, row + kLanes<R>);
    hard = take(p, row + kLanes<R>);
    runs = reinterpret_cast<Run*>(p);
  }

  // Aligned, with room for a vector more.
  static R* take(char*& p, int64_t n) {
    R* taken = reinterpret_cast<R*>(p);
    p += (size_t(n + kLanes<R>) * sizeof(R) + 63) / 64 * 64;
    return taken;
  }
};

// Where the exponentials of a row lie between the sums and the gradient.
template <class R>
struct Exponentials {
  R* first;    // exp(x) of a fresh row, exp(x / temperature) of a taught one
  R* teacher;  // exp(u / temperature)
  R* hard;     // exp(x) of a taught row, where it is no power of `first`

  Exponentials from(int64_t c) const { return {first + c, teacher + c, hard + c}; }
};

// n classes of a row. Where the label is (-1: elsewhere), z and u count as -inf. Vectors begin
// after `head` elements.
template <class R>
struct Block {
  const R *z, *u;
  int64_t n, head, label;
};

// Elements of row i before the first aligned vector, where the matrix begins at one, as torch's
// allocator makes it. Not by the address: the order of the sums, and so their bits, would change
// with it.
template <class R>
inline int64_t row_head(int64_t i, int64_t stride) {
  return int64_t(-uint64_t(i) * uint64_t(stride) % kLanes<R>);
}

// From p to the next aligned vector, in elements.
template <class T>
inline int64_t head_of(const T* p, uintptr_t bytes = kVectorBytes) {
  return int64_t(-reinterpret_cast<uintptr_t>(p) % bytes / sizeof(T));
}

template <class R>
inline R reference(R top) {
  return top == -std::numeric_limits<R>::infinity() ? 0 : top;
}

// std::exp, but for the commonest argument.
inline double exp_or_one(double x) { return x == 0 ? 1 : std::exp(x); }

// ---- passes over a block ----

template <class R>
struct Loaded {
  const R* at;
  R top;
};

// The largest of n elements, and where they lie as R: in `buffer`, if they had to be converted.
template <class T>
Loaded<RealOf<T>> load_block(const void* from, int64_t n, RealOf<T>* buffer) {
  using R = RealOf<T>;
  constexpr bool kConvert = !std::is_same_v<T, R>;
  constexpr R none = -std::numeric_limits<R>::infinity();
  constexpr int64_t lanes = kLanes<R>, kUnroll = 4;  // one maximum would wait for the last one
  const T* p = static_cast<const T*>(from);
  Vector<R> top[kUnroll];
  for (auto& t : top) t = splat<Vector<R>>(none);
  int64_t c = 0;
  for (; c + kUnroll * lanes <= n; c += kUnroll * lanes) {
    for (int64_t i = 0; i < kUnroll; ++i) {
      const Vector<R> v = load(p + c + i * lanes);
      if constexpr (kConvert) store(buffer + c + i * lanes, v);
      top[i] = max_else_second(v, top[i]);
    }
  }
  for (; c < n; c += lanes) {
    const Vector<R> v = c + lanes <= n ? load(p + c) : load_some(p + c, n - c, none);
    if constexpr (kConvert) store(buffer + c, v);
    top[0] = max_else_second(v, top[0]);
  }
  top[0] = max_else_second(max_else_second(top[0], top[1]), max_else_second(top[2], top[3]));
  if constexpr (kConvert) {
    return {buffer, max_lanes(top[0])};
  } else {
    return {p, max_lanes(top[0])};
  }
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

// The block or row to be loaded next, fetched into the cache while this one is summed: memory would
// stand idle meanwhile. May lie past the end of the tensor.
struct Ahead {
  uintptr_t z, u;
  int64_t z_size, u_size;  // bytes an element

  void fetch_z(int64_t c) const { __builtin_prefetch(reinterpret_cast<void*>(z + c * z_size)); }
  void fetch_u(int64_t c) const { __builtin_prefetch(reinterpret_cast<void*>(u + c * u_size)); }
};

// Goes over a block: `whole(begin, end)` for whole vectors, and `part(begin, count, hole)` for one
// that lacks elements or has the label, at begin + hole.
template <class R, class Whole, class Part>
[[gnu::always_inline]] inline void walk(const Block<R>& b, Whole whole, Part part) {
  constexpr int64_t lanes = kLanes<R>;
  const int64_t head = b.head < b.n ? b.head : b.n;
  const int64_t end = head + (b.n - head) / lanes * lanes;
  const bool inside = b.label >= head && b.label < end;
  const int64_t label_vector = inside ? b.label - (b.label - head) % lanes : end;
  const int64_t parts[3][2] = {{0, head}, {label_vector, inside ? lanes : 0}, {end, b.n - end}};
  int64_t at = 0;
  for (const auto& [begin, count] : parts) {
    if (at < begin) whole(at, begin);
    if (count > 0) part(begin, count, b.label - begin);
    at = begin + count;
  }
}

// `count` elements, the rest and the hole -inf.
template <class R>
inline Vector<R> load_part(const R* p, int64_t count, int64_t hole) {
  constexpr R none = -std::numeric_limits<R>::infinity();
  const Vector<R> v = count == kLanes<R> ? load(p) : load_some(p, count, none);
  return put_lane(v, hole, none);
}

template <class T>
inline void store_part(T* p, Vector<RealOf<T>> v, int64_t count) {
  if (count == kLanes<RealOf<T>>) {
    store(p, v);
  } else {
    store_some(p, v, count);
  }
}

// Vectors are added up in short chains, and those then to one another, since the rounding errors of
// a long chain of additions would show in the gradient.
template <class R>
inline int64_t chain_end(int64_t begin, int64_t end) {
  constexpr int64_t chain = 16 * kLanes<R>;
  return end - begin < chain ? end : begin + chain;
}

// Always inline: in a loop over rows the constants then stay in registers.
template <class R>
[[gnu::always_inline]] inline double sum_fresh(const Block<R> b, double z_top,
                                               const Exponents<R>& k, const Ahead ahead, R* first) {
  using V = Vector<R>;
  const V top = splat<V>(R(z_top));
  const Exponent<V, R> hard = k.hard;  // not read again after each store
  V total = {};
  const auto whole = [&](int64_t c, int64_t end) {
    while (c < end) {
      V sum = {};
      for (const int64_t stop = chain_end<R>(c, end); c < stop; c += kLanes<R>) {
        ahead.fetch_z(c);
        const V e = exp_of(load(b.z + c) - top, hard);
        store(first + c, e);
        sum += e;
      }
      total += sum;
    }
  };
  const auto part = [&](int64_t c, int64_t count, int64_t hole) {
    const V e = exp_of(load_part(b.z + c, count, hole) - top, hard);
    store_part(first + c, e, count);
    total += e;
  };
  walk(b, whole, part);
  return add_lanes(total);
}

// exp(x) from exp(x / kPower).
template <int kPower, class V>
inline V power(V e) {
  if constexpr (kPower == 0) return V{} + 1;
  if constexpr (kPower == 1) return e;
  if constexpr (kPower == 2) return e * e;
  if constexpr (kPower == 3) return e * e * e;
  if constexpr (kPower == 4) return (e * e) * (e * e);
}

template <class R>
struct TaughtSums {
  Vector<R> other, student, teacher, gap;

  void operator+=(const TaughtSums& s) {
    other += s.other;
    student += s.student;
    teacher += s.teacher;
    gap += s.gap;
  }
};

template <class R>
struct TaughtVector {
  Vector<R> first, teacher, hard;
};

// kMode: see mode_of.
template <class R, int kMode>
[[gnu::always_inline]] inline TaughtVector<R> taught_vector(Vector<R> x, Vector<R> u,
                                                            const Exponents<R>& k,
                                                            TaughtSums<R>& sum) {
  using V = Vector<R>;
  const V none = splat<V>(-std::numeric_limits<R>::infinity());
  const V soft = exp_of(x, k.soft), q = exp_of(u, k.soft);
  V hard;
  if constexpr (kMode == 0) {
    hard = exp_of(x, k.hard);
  } else {
    hard = power<kMode>(soft);
  }
  sum += {hard, soft, q, u > none ? q * (u - x) : V{}};
  return {soft, q, hard};
}

// Structs come by value, so that the stores cannot be thought to change them.
template <class R, int kMode>
[[gnu::always_inline]] inline void add_taught(const Block<R> b, const Exponentials<R> to,
                                              double z_top, double u_top, const Exponents<R> k,
                                              const Ahead ahead, RowSums<double>& sums) {
  using V = Vector<R>;
  const V z_ref = splat<V>(R(z_top)), u_ref = splat<V>(R(u_top));
  TaughtSums<R> total = {};
  const auto whole = [&](int64_t c, int64_t end) {
    while (c < end) {
      TaughtSums<R> sum = {};
      for (const int64_t stop = chain_end<R>(c, end); c < stop; c += kLanes<R>) {
        ahead.fetch_z(c);
        ahead.fetch_u(c);
        const auto e =
            taught_vector<R, kMode>(load(b.z + c) - z_ref, load(b.u + c) - u_ref, k, sum);
        store(to.first + c, e.first);
        store(to.teacher + c, e.teacher);
        if constexpr (kMode == 0) store(to.hard + c, e.hard);
      }
      total += sum;
    }
  };
  const auto part = [&](int64_t c, int64_t count, int64_t hole) {
    const V x = load_part(b.z + c, count, hole) - z_ref,
            u = load_part(b.u + c, count, hole) - u_ref;
    const auto e = taught_vector<R, kMode>(x, u, k, total);
    store_part(to.first + c, e.first, count);
    store_part(to.teacher + c, e.teacher, count);
    if constexpr (kMode == 0) store_part(to.hard + c, e.hard, count);
  };
  walk(b, whole, part);
  sums.other += add_lanes(total.other);
  sums.student += add_lanes(total.student);
  sums.teacher += add_lanes(total.teacher);
  sums.gap += add_lanes(total.gap);
}

template <class R, int kMode>
void sum_taught(const Block<R>& b, const Exponentials<R>& to, double z_top, double u_top,
                const Exponents<R>& k, const Ahead& ahead, RowSums<double>& sums) {
  add_taught<R, kMode>(b, to, z_top, u_top, k, ahead, sums);
}

template <class R>
struct Coefficients {
  R hard, soft, teacher, smooth;
};

// `first` was loaded from e.first + c.
template <class R, int kMode>
inline Vector<R> gradient_of(Vector<R> first, const Exponentials<R>& e, int64_t c,
                             const Coefficients<R>& k) {
  if constexpr (kMode == kFresh) {
    return first * k.hard - k.smooth;
  } else {
    const auto pull = load(e.teacher + c) * k.teacher + k.smooth;
    if constexpr (kMode == 0) {
      return load(e.hard + c) * k.hard + (first * k.soft - pull);
    } else {
      return first * (power<kMode - 1>(first) * k.hard + k.soft) - pull;
    }
  }
}

// Of classes [begin, end), into `row`, which may be where e.first is. The vector of the label,
// which is written once more, stays in the cache.
template <class T, int kMode, bool kStream>
void write_gradient(const Exponentials<RealOf<T>> e, int64_t begin, int64_t end,
                    const Coefficients<RealOf<T>> k, int64_t label, void* row) {
  using R = RealOf<T>;
  constexpr int64_t lanes = kLanes<R>;
  T* to = static_cast<T*>(row);
  const auto gradient_at = [e, k](int64_t c) {
    return gradient_of<R, kMode>(load(e.first + c), e, c, k);
  };
  int64_t c = begin;
  const int64_t head = head_of(to + c, lanes * sizeof(T));
  if (head > 0 && c + head + lanes <= end) {
    store_some(to + c, gradient_at(c), head);
    c += head;
  }
  if constexpr (kStream) {
    if (head_of(to + c, lanes * sizeof(T)) == 0)
      for (; c + lanes <= end; c += lanes) {
        const auto gradient = gradient_at(c);
        if (uint64_t(label - c) < uint64_t(lanes)) {
          store(to + c, gradient);
        } else {
          stream(to + c, gradient);
        }
      }
  }
  for (; c + lanes <= end; c += lanes) store(to + c, gradient_at(c));
  if (c == end) return;
  const Vector<R> rest = load_some(e.first + c, end - c, R(0));  // no memory may follow
  store_some(to + c, gradient_of<R, kMode>(rest, e, c, k), end - c);
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
using LoadBlock = Loaded<R> (*)(const void*, int64_t, R*);
template <class R>
using SumTaught = void (*)(const Block<R>&, const Exponentials<R>&, double, double,
                           const Exponents<R>&, const Ahead&, RowSums<double>&);
template <class R>
using WriteGradient = void (*)(Exponentials<R>, int64_t, int64_t, Coefficients<R>, int64_t, void*);

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
