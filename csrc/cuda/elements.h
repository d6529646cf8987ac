// The four storage types: 16 bytes of them at a time, as reals (float, or double for double).
#pragma once
#include <cstring>
#include <type_traits>

#include "device.h"

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Element;  // Real; unpack: 16 bytes -> reals; pack: the way back, rounding once

template <>
struct Element<float> {
  using Real = float;
  static DLB_DEVICE void unpack(const uint4& raw, float (&x)[4]) {
    x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
    x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
  }
  static DLB_DEVICE uint4 pack(const float (&x)[4]) {
    return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
            __float_as_uint(x[3])};
  }
  static DLB_DEVICE uint32_t larger_word(uint32_t a, uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
};

template <>
struct Element<double> {
  using Real = double;
  static DLB_DEVICE double join(uint32_t low, uint32_t high) {
    return __longlong_as_double(static_cast<long long>(uint64_t(high) << 32 | low));
  }
  static DLB_DEVICE void unpack(const uint4& raw, double (&x)[2]) {
    x[0] = join(raw.x, raw.y), x[1] = join(raw.z, raw.w);
  }
  static DLB_DEVICE uint4 pack(const double (&x)[2]) {
    const uint64_t a = static_cast<uint64_t>(__double_as_longlong(x[0]));
    const uint64_t b = static_cast<uint64_t>(__double_as_longlong(x[1]));
    return {uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32)};
  }
};

template <>
struct Element<BFloat16> {
  using Real = float;
  static DLB_DEVICE void pair(uint32_t word, float& low, float& high) {
    low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
  }
  static DLB_DEVICE void unpack(const uint4& raw, float (&x)[8]) {
    pair(raw.x, x[0], x[1]), pair(raw.y, x[2], x[3]);
    pair(raw.z, x[4], x[5]), pair(raw.w, x[6], x[7]);
  }
  static DLB_DEVICE uint4 pack(const float (&x)[8]) {
    return {floats_bfloat2(x[0], x[1]), floats_bfloat2(x[2], x[3]), floats_bfloat2(x[4], x[5]),
            floats_bfloat2(x[6], x[7])};
  }
  static DLB_DEVICE uint32_t larger_word(uint32_t a, uint32_t b) { return larger_bfloat2(a, b); }
};

template <>
struct Element<Float16> {
  using Real = float;
  static DLB_DEVICE void pair(uint32_t word, float& low, float& high) {
    const float2 both = half2_floats(word);
    low = both.x, high = both.y;
  }
  static DLB_DEVICE void unpack(const uint4& raw, float (&x)[8]) {
    pair(raw.x, x[0], x[1]), pair(raw.y, x[2], x[3]);
    pair(raw.z, x[4], x[5]), pair(raw.w, x[6], x[7]);
  }
  static DLB_DEVICE uint4 pack(const float (&x)[8]) {
    return {floats_half2(x[0], x[1]), floats_half2(x[2], x[3]), floats_half2(x[4], x[5]),
            floats_half2(x[6], x[7])};
  }
  static DLB_DEVICE uint32_t larger_word(uint32_t a, uint32_t b) { return larger_half2(a, b); }
};

template <class T>
using Real = typename Element<T>::Real;
template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of 16 bytes

DLB_DEVICE float real_of(float x) { return x; }
DLB_DEVICE double real_of(double x) { return x; }
DLB_DEVICE float real_of(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DLB_DEVICE float real_of(Float16 x) { return half2_floats(x.bits).x; }

template <class T>
DLB_DEVICE T element_of(Real<T> x) {
  if constexpr (sizeof(T) == sizeof(Real<T>)) {
    return x;
  } else if constexpr (sizeof(T) == 2) {
    T result;
    uint32_t word;
    if constexpr (std::is_same_v<T, BFloat16>) {
      word = floats_bfloat2(x, 0);
    } else {
      word = floats_half2(x, 0);
    }
    result.bits = uint16_t(word);
    return result;
  }
}

// One element in global memory, by its bits: they are no more than 2, 4 or 8 bytes to it.
template <class T>
DLB_DEVICE T load_element(const T* from) {
  if constexpr (sizeof(T) == 2) return T{load(reinterpret_cast<const uint16_t*>(from))};
  if constexpr (sizeof(T) > 2) return load(from);
}
template <class T>
DLB_DEVICE void store_element(T* to, T value) {
  if constexpr (sizeof(T) == 2) {
    store(reinterpret_cast<uint16_t*>(to), value.bits);
  } else {
    store(to, value);
  }
}

DLB_DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // the other one of a NaN
DLB_DEVICE double larger(double a, double b) { return fmax(a, b); }

// Of each element of two vectors the larger one, or the one that is no NaN.
template <class T>
DLB_DEVICE uint4 larger_of(const uint4& a, const uint4& b) {
  if constexpr (sizeof(T) == 8) {
    double x[2], y[2];
    Element<T>::unpack(a, x), Element<T>::unpack(b, y);
    for (int j = 0; j < 2; ++j) x[j] = larger(x[j], y[j]);
    return Element<T>::pack(x);
  } else {
    return {Element<T>::larger_word(a.x, b.x), Element<T>::larger_word(a.y, b.y),
            Element<T>::larger_word(a.z, b.z), Element<T>::larger_word(a.w, b.w)};
  }
}

template <class R>
DLB_DEVICE constexpr R infinity() {
  return R(__builtin_huge_val());
}
template <class R>
DLB_DEVICE constexpr R nan() {
  return R(__builtin_nan(""));
}

// A vector that may be partly outside of a row of C elements, whose first one is that of column
// `first`: from get(column), -inf outside; and to put(column, element).
template <class T, class Get>
DLB_DEVICE uint4 gather_edge(int first, int C, Get get) {
  T element[kVector<T>];
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) {
    element[j] = element_of<T>(-infinity<Real<T>>());
    if (unsigned(first + j) < unsigned(C)) element[j] = get(first + j);
  }
  uint4 raw;
  memcpy(&raw, element, sizeof(raw));
  return raw;
}
template <class T, class Put>
DLB_DEVICE void scatter_edge(const uint4& raw, int first, int C, Put put) {
  T element[kVector<T>];
  memcpy(element, &raw, sizeof(raw));
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) {
    if (unsigned(first + j) < unsigned(C)) put(first + j, element[j]);
  }
}

DLB_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
DLB_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

template <class R>
constexpr R kLowest = sizeof(R) == 8 ? R(-1.7976931348623157e308) : R(-3.4028234663852886e38);
template <class R>
constexpr R kLog2e = R(1.4426950408889634);
template <class R>
constexpr R kLn2 = R(0.6931471805599453);
