// Vectors of floats as wide as the machine's, for the kernels.

#pragma once

#include <stdint.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline vec load(const float *p) { return *(const vec *)p; }
static inline void store(float *p, vec v) { *(vec *)p = v; }
static inline vec all(float value) { return value - (vec){}; }

// The first ``count`` of LANES floats, of the others zero.
static inline vec load_some(const float *p, int64_t count) {
  if (count == LANES) return load(p);
  vec v = {};
  for (int64_t lane = 0; lane < count; lane++) v[lane] = p[lane];
  return v;
}

static inline void store_some(float *p, vec v, int64_t count) {
  if (count == LANES) return store(p, v);
  for (int64_t lane = 0; lane < count; lane++) p[lane] = v[lane];
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// e^x to about one unit in the last place, for x in [-87, 87]; beyond, that of the nearer end.
static inline vec exponential(vec x) {
  x = x < -87.0f ? all(-87.0f) : x;
  x = x > 87.0f ? all(87.0f) : x;
  const vec magic = all(12582912.0f);  // adding it rounds to a whole number
  vec shifted = x * 1.44269504f + magic;
  vec n = shifted - magic;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  ivec exponent = ((ivec)shifted - (ivec)magic + 127) << 23;
  return p * (vec)exponent;
}
