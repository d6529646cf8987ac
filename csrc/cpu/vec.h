// Vectors of the widest kind that this compilation may use, and the conversions between them and
// the four storage types. GCC and Clang vector extensions; intrinsics only where those have no
// word. Everything is internal to its source file, since the file is compiled once per instruction
// set and the linker must not mix the results.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class R>
using Vector = typename VectorOf<R, kVectorBytes>::type;
template <class R>
constexpr int kLanes = kVectorBytes / int(sizeof(R));

using VF = Vector<float>;
using VD = Vector<double>;
using VU = Vector<uint32_t>;
using VL = Vector<uint64_t>;
using VU16 = VectorOf<uint16_t, kVectorBytes / 2>::type;  // as many lanes as VF

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class V, class T>
inline V bits_from(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast changes no size");
  return bits_from<To>(&from);
}

template <class V, class R>
inline V splat(R x) {
  return x - V{};
}

// The larger of each lane; b where either is NaN.
#if defined(__AVX512F__)
inline VF max_else_second(VF a, VF b) { return (VF)_mm512_max_ps((__m512)a, (__m512)b); }
inline VD max_else_second(VD a, VD b) { return (VD)_mm512_max_pd((__m512d)a, (__m512d)b); }
#elif defined(__AVX2__)
inline VF max_else_second(VF a, VF b) { return (VF)_mm256_max_ps((__m256)a, (__m256)b); }
inline VD max_else_second(VD a, VD b) { return (VD)_mm256_max_pd((__m256d)a, (__m256d)b); }
#elif defined(__x86_64__)
inline VF max_else_second(VF a, VF b) { return (VF)_mm_max_ps((__m128)a, (__m128)b); }
inline VD max_else_second(VD a, VD b) { return (VD)_mm_max_pd((__m128d)a, (__m128d)b); }
#else
template <class V>
inline V max_else_second(V a, V b) {
  return a > b ? a : b;
}
#endif

struct Add {
  template <class V>
  static V of(V a, V b) {
    return a + b;
  }
};
struct Max {
  template <class V>
  static V of(V a, V b) {
    return a > b ? a : b;
  }
};

// Through memory, as bits_from would take them, the halves come late.
#if defined(__AVX512F__)
inline VectorOf<float, 32>::type low_half(VF v) { return _mm512_castps512_ps256((__m512)v); }
inline VectorOf<float, 32>::type high_half(VF v) { return _mm512_extractf32x8_ps((__m512)v, 1); }
inline VectorOf<double, 32>::type low_half(VD v) { return _mm512_castpd512_pd256((__m512d)v); }
inline VectorOf<double, 32>::type high_half(VD v) { return _mm512_extractf64x4_pd((__m512d)v, 1); }
#endif
#if defined(__AVX2__)
inline VectorOf<float, 16>::type low_half(__m256 v) { return _mm256_castps256_ps128(v); }
inline VectorOf<float, 16>::type high_half(__m256 v) { return _mm256_extractf128_ps(v, 1); }
inline VectorOf<double, 16>::type low_half(__m256d v) { return _mm256_castpd256_pd128(v); }
inline VectorOf<double, 16>::type high_half(__m256d v) { return _mm256_extractf128_pd(v, 1); }
#endif

template <class Op, class R, int kBytes>
inline R fold_lanes(typename VectorOf<R, kBytes>::type v) {
  if constexpr (kBytes > 16) {
    return fold_lanes<Op, R, kBytes / 2>(Op::of(low_half(v), high_half(v)));
  } else if constexpr (sizeof(R) == 4) {
    return Op::of(Op::of(v[0], v[2]), Op::of(v[1], v[3]));
  } else {
    return Op::of(v[0], v[1]);
  }
}

inline float add_lanes(VF v) { return fold_lanes<Add, float, kVectorBytes>(v); }
inline double add_lanes(VD v) { return fold_lanes<Add, double, kVectorBytes>(v); }
inline float max_lanes(VF v) { return fold_lanes<Max, float, kVectorBytes>(v); }
inline double max_lanes(VD v) { return fold_lanes<Max, double, kVectorBytes>(v); }

// Lanes of a and b, counted on from those of a. (GCC has Clang's word from version 12 on.)
template <size_t... from, class V>
inline V pick_lanes(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, from...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){from...});
#endif
}

template <class V, size_t... lane>
inline V interleave_low(V a, V b, std::index_sequence<lane...>) {
  return pick_lanes<(lane / 2 + lane % 2 * sizeof...(lane))...>(a, b);
}
template <class V, size_t... lane>
inline V interleave_high(V a, V b, std::index_sequence<lane...>) {
  constexpr size_t lanes = sizeof...(lane);
  return pick_lanes<((lane + lanes) / 2 + lane % 2 * lanes)...>(a, b);
}

// fold_lanes of as many vectors as one has lanes: lane j of the result is that of v[j].
template <class Op, class R, int kRows = kLanes<R>>
inline Vector<R> fold_rows(Vector<R>* v) {
  if constexpr (kRows == 1) {
    return v[0];
  } else {
    constexpr auto lanes = std::make_index_sequence<kLanes<R>>{};
    for (int j = 0; j < kRows / 2; ++j) {
      const Vector<R> a = v[j], b = v[j + kRows / 2];
      v[j] = Op::of(interleave_low(a, b, lanes), interleave_high(a, b, lanes));
    }
    return fold_rows<Op, R, kRows / 2>(v);
  }
}

// As many elements as VD has lanes.
inline VD load_doubles(const double* p) { return bits_from<VD>(p); }
inline VD load_doubles(const float* p) {
  return __builtin_convertvector((bits_from<VectorOf<float, kVectorBytes / 2>::type>(p)), VD);
}

// ---- storage to real ----

inline VF from_bits(VU16 h, BFloat16) { return bit_cast<VF>(__builtin_convertvector(h, VU) << 16); }

inline VF from_bits(VU16 h, Float16) {
#if defined(__AVX512F__)
  return (VF)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return (VF)_mm256_cvtph_ps((__m128i)h);
#else
  using VI = Vector<int32_t>;
  const VU wide = __builtin_convertvector(h, VU), magnitude = wide & 0x7fff;
  const VU normal = (magnitude << 13) + ((127u - 15) << 23);
  const VU special = (magnitude << 13) | 0x7f800000;
  const VF tiny = __builtin_convertvector((VI)magnitude, VF) * 0x1p-24f;
  const VU u = magnitude < 0x400 ? bit_cast<VU>(tiny) : magnitude < 0x7c00 ? normal : special;
  return bit_cast<VF>(u | (wide & 0x8000) << 16);
#endif
}

inline VF load(const float* p) { return bits_from<VF>(p); }
inline VD load(const double* p) { return bits_from<VD>(p); }
template <class H>
inline VF load(const H* p) {
  return from_bits(bits_from<VU16>(p), H{});
}

// ---- real to storage, rounded to nearest, ties to even ----

inline VU16 to_bits(VF f, BFloat16) {
  const VU u = bit_cast<VU>(f);
  const VU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(f == f ? rounded : (u >> 16 | 0x40), VU16);
}

inline VU16 to_bits(VF f, Float16) {
#if defined(__AVX512F__)
  return (VU16)_mm512_cvtps_ph((__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (VU16)_mm256_cvtps_ph((__m256)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VU u = bit_cast<VU>(f), sign = u & 0x80000000, magnitude = u ^ sign;
  const VU normal = (magnitude - ((127u - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // 0.5 has the weight of the last bit of a subnormal half in its own last bit.
  const VU tiny = bit_cast<VU>(bit_cast<VF>(magnitude) + 0.5f) - 0x3f000000;
  const VU nan_or_inf = magnitude > 0x7f800000 ? 0x7e00 + VU{} : 0x7c00 + VU{};
  const VU h = magnitude < 0x38800000 ? tiny : magnitude < 0x477ff000 ? normal : nan_or_inf;
  return __builtin_convertvector(h | sign >> 16, VU16);
#endif
}

inline void store(float* p, VF v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, VD v) { std::memcpy(p, &v, sizeof(v)); }
template <class H>
inline void store(H* p, VF v) {
  const VU16 h = to_bits(v, H{});
  std::memcpy(p, &h, sizeof(h));
}

template <class R, class T>
inline void store_one(T* p, R x) {
  if constexpr (sizeof(T) == 2) {
    const VU16 h = to_bits(splat<VF>(float(x)), T{});
    p->bits = h[0];
  } else {
    *p = T(x);
  }
}

// ---- the first n < kLanes elements ----

template <class T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
inline auto load_some(const T* p, int64_t n, RealOf<T> fill) {
  using R = RealOf<T>;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const Vector<R> rest = splat<Vector<R>>(fill);
  if constexpr (std::is_same_v<T, float>) {
    return (VF)_mm512_mask_loadu_ps((__m512)rest, __mmask16((1u << n) - 1), p);
  } else if constexpr (std::is_same_v<T, double>) {
    return (VD)_mm512_mask_loadu_pd((__m512d)rest, __mmask8((1u << n) - 1), p);
  } else {
    const __mmask16 mask = __mmask16((1u << n) - 1);
    const VF v = from_bits((VU16)_mm256_maskz_loadu_epi16(mask, p), T{});
    return (VF)_mm512_mask_mov_ps((__m512)rest, mask, (__m512)v);
  }
#else
  T head[kLanes<R>] = {};
  for (int64_t i = 0; i < n; ++i) head[i] = p[i];
  Vector<R> v = load(head);
  for (int64_t i = n; i < kLanes<R>; ++i) v[i] = fill;
  return v;
#endif
}

template <class T>
inline void store_some(T* p, Vector<RealOf<T>> v, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  } else if constexpr (std::is_same_v<T, double>) {
    _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
  } else {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)to_bits(v, T{}));
  }
#else
  T head[kLanes<RealOf<T>>];
  store(head, v);
  for (int64_t i = 0; i < n; ++i) p[i] = head[i];
#endif
}

// v with x in one lane; as it is, if there is no such lane.
inline VF put_lane(VF v, int64_t lane, float x) {
  using VI = Vector<int32_t>;
  alignas(64) constexpr int32_t numbers[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                               8, 9, 10, 11, 12, 13, 14, 15};
  return bits_from<VI>(numbers) == int32_t(lane) ? splat<VF>(x) : v;
}

inline VD put_lane(VD v, int64_t lane, double x) {
  alignas(64) constexpr int64_t numbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  return bits_from<Vector<int64_t>>(numbers) == lane ? splat<VD>(x) : v;
}

// ---- stores past the caches, for outputs that no cache could hold; p must be aligned ----

#if defined(__AVX512F__)
inline void stream_bits(void* p, VU v) { _mm512_stream_si512((__m512i*)p, (__m512i)v); }
inline void stream_bits(void* p, VU16 v) { _mm256_stream_si256((__m256i*)p, (__m256i)v); }
#elif defined(__AVX2__)
inline void stream_bits(void* p, VU v) { _mm256_stream_si256((__m256i*)p, (__m256i)v); }
inline void stream_bits(void* p, VU16 v) { _mm_stream_si128((__m128i*)p, (__m128i)v); }
#elif defined(__x86_64__)
inline void stream_bits(void* p, VU v) { _mm_stream_si128((__m128i*)p, (__m128i)v); }
inline void stream_bits(void* p, VU16 v) { _mm_stream_si64((long long*)p, bit_cast<int64_t>(v)); }
#else
template <class V>
inline void stream_bits(void* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}
#endif

template <class T>
inline void stream(T* p, Vector<RealOf<T>> v) {
  if constexpr (sizeof(T) == 2) {
    stream_bits(p, to_bits(v, T{}));
  } else {
    stream_bits(p, bit_cast<VU>(v));
  }
}

inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- exp ----

// exp(x / t) for x <= 0 as 2^(k x); set up once a row. One float for k would leave an error of
// 1e-6 at x = -40, so what it lacks is added: with FMA as a second product, else by steps of 1 / k.
template <class V, class R>
struct Exponent {
  V k, k_rest, step, step_rest, low;
  explicit Exponent(double log2_base) {
    k = splat<V>(R(log2_base));
    k_rest = splat<V>(R(log2_base - double(R(log2_base))));
    const double short_step = double(float(1 / log2_base * 4097) - float(1 / log2_base * 4096));
    step = splat<V>(R(short_step));  // few bits: its products with the whole numbers are exact
    step_rest = splat<V>(R(1 / log2_base - short_step));
    low = splat<V>(R((std::is_same_v<R, float> ? -127.0 : -1023.0) / log2_base));
  }
};

// 2^r on [-1/2, 1/2] with 2^0 = 1 exactly, by Remez: relative error 2.5e-9 and 7.2e-18.
inline VF exp2_fraction(VF r) {
  VF p = 1.54614447e-4f + VF{};
  p = p * r + 1.34004282e-3f;
  p = p * r + 9.61805668e-3f;
  p = p * r + 5.55032723e-2f;
  p = p * r + 2.40226509e-1f;
  p = p * r + 6.93147207e-1f;
  return p * r + 1.0f;
}

inline VD exp2_fraction(VD r) {
  VD p = 4.44899076332136106e-10 + VD{};
  p = p * r + 7.07318966929515078e-9;
  p = p * r + 1.0178099728335212e-7;
  p = p * r + 1.32154388022117461e-6;
  p = p * r + 1.52527337473860087e-5;
  p = p * r + 1.54035304499086718e-4;
  p = p * r + 1.33335581464932382e-3;
  p = p * r + 9.618129107599958e-3;
  p = p * r + 5.55041086648213308e-2;
  p = p * r + 2.40226506959101163e-1;
  p = p * r + 6.93147180559945311e-1;
  return p * r + 1.0;
}

#if defined(__AVX512F__)
// Sixteenths: 2^(j / 16) comes from one register, so a shorter polynomial does. `magic` leaves
// 16 times the biased exponent + j in the low bits; j's own bits, which the shift also moves into
// the result, are taken off in the table. Relative error 1.6e-7.
inline VF exp_of(VF x, const Exponent<VF, float>& e) {
  constexpr float magic = 0x1.8p19f + 127;
  constexpr VU powers = {0x00000000, 0xfffdaac3, 0xfffb95c2, 0xfff9c3d3, 0xfff837f0, 0xfff6f532,
                         0xfff5fed7, 0xfff5583f, 0xfff504f3, 0xfff508a4, 0xfff5672a, 0xfff6248c,
                         0xfff744fd, 0xfff8ccdf, 0xfffac0c7, 0xfffd257d};
  x = max_else_second(e.low, x);
  const VF shifted = x * e.k + magic;
  const VF r = x * e.k_rest + (x * e.k - (shifted - magic));
  const __m512i bits = (__m512i)bit_cast<VU>(shifted);
  const VU power = (VU)_mm512_permutexvar_epi32(bits, (__m512i)powers) + ((VU)bits << 19);
  VF p = 5.5502135e-2f + VF{};
  p = p * r + 2.4023429e-1f;
  p = p * r + 6.931472e-1f;
  return (p * r + 1.0f) * bit_cast<VF>(power);
}
#else
// Adding `magic` rounds to an integer and leaves the biased exponent in the low bits. Below the
// normal range the exponent field is 0, so the result is exactly 0. NaN stays NaN.
inline VF exp_of(VF x, const Exponent<VF, float>& e) {
  constexpr float magic = 0x1.8p23f + 127;
  x = max_else_second(e.low, x);
  const VF shifted = x * e.k + magic;
  const VF n = shifted - magic;
#ifdef __FMA__
  const VF r = x * e.k_rest + (x * e.k - n);
#else
  const VF r = (x - n * e.step - n * e.step_rest) * e.k;
#endif
  return exp2_fraction(r) * bit_cast<VF>(bit_cast<VU>(shifted) << 23);
}
#endif

inline VD exp_of(VD x, const Exponent<VD, double>& e) {
  constexpr double magic = 0x1.8p52 + 1023;
  x = max_else_second(e.low, x);
  const VD shifted = x * e.k + magic;
  const VD r = x * e.k - (shifted - magic);
  return exp2_fraction(r) * bit_cast<VD>(bit_cast<VL>(shifted) << 52);
}

// ---- log ----

// Of normal positive numbers; below 3 units in the last place wrong.
inline VD log_of(VD x) {
  constexpr int64_t root_half = 0x3fe6a09e667f3bcd;  // the bits of sqrt(1/2)
  constexpr double magic = 0x1.8p52;                 // makes an integer's bits those of a double
  using VI = Vector<int64_t>;
  const VI bits = bit_cast<VI>(x), k = (bits - root_half) >> 52;
  const VD m = bit_cast<VD>(bits - (k << 52));  // from sqrt(1/2) to sqrt(2)
  const VD s = (m - 1) / (m + 1), s2 = s * s;
  VD p = {};  // atanh(s) / s
  for (int n = 21; n >= 1; n -= 2) p = p * s2 + 1.0 / n;
  const VD exponent = bit_cast<VD>(k + bit_cast<VI>(magic + VD{})) - magic;
  return exponent * 0.693147180559945309 + 2 * s * p;
}

}  // namespace
