// 16-bit floats from and to float, rounded to nearest even as by a GPU. Included after simt.h.
#pragma once
#include <math.h>

static float from_half(unsigned bits) {
  const unsigned sign = (bits & 0x8000) << 16, rest = bits & 0x7fff;
  if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(rest << 13) * 0x1p112f));
}

static unsigned to_half(float x) {
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000;
  x = fabsf(x);
  if (x != x) return 0x7fff;
  if (x >= 65520) return sign | 0x7c00;
  if (x < 0x1p-14f) return sign | unsigned(nearbyintf(x * 0x1p24f));
  const unsigned bits = __float_as_uint(x) - (112u << 23);
  return sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13;
}

static unsigned to_bfloat(float x) {
  if (x != x) return 0x7fff;
  const unsigned bits = __float_as_uint(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
