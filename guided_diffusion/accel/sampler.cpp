// What the sampler computes beside the network on CPUs: noise, and the steps of the loop, each in
// one pass over memory.
//
// Noise is that of torch's generator (Mersenne Twister 19937, Matsumoto & Nishimura 1998; Box &
// Muller 1958), number by number, to rounding.

#include <math.h>
#include <string.h>

#include "cpu_kernels.h"

enum { WORDS = 624, SHIFT = 397 };     // of the generator's state
enum { HALF = 8, GROUP = 2 * HALF };   // numbers that are turned into normal ones together
enum { FEW = 32768 };                  // numbers that are not worth a second thread

struct Generator {
  uint32_t state[WORDS];
  uint32_t next;  // the word that comes next; WORDS: none is left
};

static inline uint32_t twist(uint32_t high, uint32_t low) {
  return (((high & 0x80000000u) | (low & 0x7fffffffu)) >> 1) ^ (-(low & 1) & 0x9908b0dfu);
}

static void refill(Generator &generator) {
  uint32_t *s = generator.state;
  for (int i = 0; i < WORDS - SHIFT; i++) s[i] = s[i + SHIFT] ^ twist(s[i], s[i + 1]);
  for (int i = WORDS - SHIFT; i < WORDS - 1; i++)
    s[i] = s[i + SHIFT - WORDS] ^ twist(s[i], s[i + 1]);
  s[WORDS - 1] = s[SHIFT - 1] ^ twist(s[WORDS - 1], s[0]);
  generator.next = 0;
}

// Uniform numbers in [0, 1), of 24 bits.
static void draw_uniform(Generator &generator, float *out, int64_t count) {
  while (count > 0) {
    if (generator.next >= WORDS) refill(generator);
    int64_t own = smaller(count, WORDS - generator.next);
    const uint32_t *words = generator.state + generator.next;
    for (int64_t i = 0; i < own; i++) {
      uint32_t y = words[i];
      y ^= y >> 11;
      y ^= (y << 7) & 0x9d2c5680u;
      y ^= (y << 15) & 0xefc60000u;
      y ^= y >> 18;
      out[i] = (float)(int32_t)(y & 0xffffff) * 0x1p-24f;
    }
    generator.next += own, out += own, count -= own;
  }
}

static inline float bits_to_float(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline int32_t float_to_bits(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ln x of a normal number, to about one unit in the last place.
static inline float logarithm(float x) {
  const int32_t root_half = 0x3f3504f3;
  int32_t bits = float_to_bits(x), n = (bits - root_half) >> 23;
  float m = bits_to_float(bits - n * (1 << 23)) - 1.0f, e = (float)n;  // x = 2^n (1 + m)
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  float square = m * m, low = p * m * square - e * 2.12194440e-4f - 0.5f * square;
  return m + low + e * 0.693359375f;
}

// Turns GROUP uniform numbers into normal ones: the first half are radii, the second angles.
static inline void normal_group(float *p) {
#pragma omp simd
  for (int i = 0; i < HALF; i++) {
    float radius = sqrtf(-2.0f * logarithm(1.0f - p[i]));
    float angle = 6.283185307f * p[i + HALF];
    float shifted = angle * 0.636619772f + 12582912.0f;  // rounds to a whole number of quarters
    int32_t quarter = float_to_bits(shifted);
    float n = shifted - 12582912.0f;
    float r = angle - n * 1.5703125f;
    r = r - n * 4.837512969970703125e-4f;
    r = r - n * 7.549789948768648e-8f;
    float z = r * r;
    float sine = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
    float cosine = (2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f;
    cosine = cosine * z * z - 0.5f * z + 1.0f;
    float x = quarter & 1 ? sine : cosine, y = quarter & 1 ? cosine : sine;
    x = (quarter + 1) & 2 ? -x : x;
    y = quarter & 2 ? -y : y;
    p[i] = radius * x;
    p[i + HALF] = radius * y;
  }
}

extern "C" {

// Fills (count, size) with each generator's next standard normal numbers; size is at least GROUP.
void draw_normal(Generator *generators, int64_t count, int64_t size, float *out, int64_t threads) {
#pragma omp parallel for num_threads(threads) if (count * size > FEW)
  for (int64_t n = 0; n < count; n++) {
    float *own = out + n * size;
    draw_uniform(generators[n], own, size);
    for (int64_t i = 0; i + GROUP <= size; i += GROUP) normal_group(own + i);
    if (size % GROUP) {  // the last ones are drawn anew
      draw_uniform(generators[n], own + size - GROUP, GROUP);
      normal_group(own + size - GROUP);
    }
  }
}

// out = a x + b y.
void mix(float a, const float *x, float b, const float *y, float *out, int64_t size,
         int64_t threads) {
#pragma omp parallel for simd num_threads(threads) if (parallel : size > FEW)
  for (int64_t i = 0; i < size; i++) out[i] = a * x[i] + b * y[i];
}

struct Denoising {
  const float *output;    // (N, channels, pixels), channels 3 or 6
  const float *x, *noise; // (N, 3, pixels); noise NULL: none
  float *x_start, *out;   // (N, 3, pixels)
  int64_t count, size, output_size;  // size is 3 pixels, output_size channels * pixels
  int64_t predict_xstart, clip, learn_sigma;
  float from_x, from_eps;            // x_0 = from_x x + from_eps eps
  float mean_x_start, mean_x;        // mean = mean_x_start x_0 + mean_x x
  float sigma_slope, sigma_offset;   // ln sigma = slope v + offset, v the output's second half
};

void denoise(const Denoising *given, int64_t threads) {
  const Denoising d = *given;
  const int64_t chunk = FEW / 4, chunks = ceil_div(d.size, chunk);
#pragma omp parallel for num_threads(threads) if (d.count * d.size > FEW)
  for (int64_t task = 0; task < d.count * chunks; task++) {
    int64_t n = task / chunks, first = task % chunks * chunk;
    const float *output = d.output + n * d.output_size;
    for (int64_t i = first; i < smaller(first + chunk, d.size); i += LANES) {
      int64_t count = smaller(LANES, d.size - i), at = n * d.size + i;
      vec x = load_some(d.x + at, count), x_start = load_some(output + i, count);
      if (!d.predict_xstart) x_start = d.from_x * x + d.from_eps * x_start;
      if (d.clip) {
        x_start = x_start < -1.0f ? all(-1.0f) : x_start;
        x_start = x_start > 1.0f ? all(1.0f) : x_start;
      }
      store_some(d.x_start + at, x_start, count);
      vec value = d.mean_x_start * x_start + d.mean_x * x;
      if (d.noise) {
        vec log_sigma = all(d.sigma_offset);
        if (d.learn_sigma) log_sigma += d.sigma_slope * load_some(output + d.size + i, count);
        value += exponential(log_sigma) * load_some(d.noise + at, count);
      }
      store_some(d.out + at, value, count);
    }
  }
}
}
