// What a network computes on CPUs: convolutions, group normalisation and attention, fused.
//
// A map is float32 (N, H, W, C) with channels contiguous; C is a multiple of LANES wherever a
// convolution or a normalisation reads it. Convolutions of 3x3 use Winograd's minimal filtering
// F(4x4, 3x3) (Lavin & Gray 2016): a tile of 4x4 outputs takes 36 multiplications a pair of
// channels, where the definition takes 144. The interpolation points 0, +-1/sqrt(2), +-sqrt(2) and
// infinity keep rounding errors small (Barabasz et al. 2020). What comes before the convolution in
// a block (normalisation, SiLU, halving or doubling, joining two maps) is applied as tiles are
// read, what comes after (bias, residual) as they are written, so that a map passes memory once,
// and once before for its moments. Every output is computed in the same order whatever the batch
// and the number of threads: results do not depend on either.
//
// A function that takes a structure also takes the size that its caller knows, in bytes. It returns
// the size that it knows itself, and does nothing if they differ. It returns -1 if memory runs out.
//
// Convolutions multiply floats, or bfloat16 where the processor has instructions for it. Then what
// goes into a product is rounded, and sums, maps and transforms stay float32.

#include <stdlib.h>
#include <string.h>

#include "cpu_kernels.h"

enum { ROWS = LANES == 16 ? 8 : 6, COLUMNS = 2 };  // of the product that registers hold
enum { BLOCK = COLUMNS * LANES };                  // output channels computed together
enum { TILE = 4, PATCH = 6, POINTS = PATCH * PATCH, TAPS = 9 };
enum { TILES = 16, MORE_TILES = 32 };  // of a block, at most; more where it transforms weights
enum { PAD = 16 };      // floats between rows, as powers of two would share a cache set
enum { DEPTH = 64 };    // input channels whose weights are transformed at a time
enum { AHEAD = 16 };    // input channels whose weights are fetched early
enum { CHUNK = 64 };    // pixels whose moments are taken together
enum { WIDE = 4 };      // vectors whose moments are taken together
enum { PIXELS = 64 };   // of a pointwise convolution's block, at most
enum { QUERIES = 32 };  // of attention's block, at most

static inline vec silu(vec x) { return x / (1.0f + exponential(-x)); }

static const float A = 0.70710678118654752f, B = 1.41421356237309505f;

// What is multiplied: float, or bfloat16, the upper half of one. A product takes bfloat16 in pairs of
// neighbouring channels: two of a pixel lie side by side, and so do an output's two weights.
struct bfloat16 {
  uint16_t bits;
};
template <typename Number>
static constexpr int PAIR = sizeof(Number) == 4 ? 1 : 2;  // channels that a product takes at once

// The nearest bfloat16 in the upper half, the rest zero; of finite numbers.
static inline ivec rounded(vec x) {
  ivec bits = (ivec)x;
  return (bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000;
}

// LANES outputs' weights of one channel, or of the two channels of a pair.
static inline void store_weights(float *p, vec first, vec) { store(p, first); }
static inline void store_weights(bfloat16 *p, vec first, vec second) {
  ivec pairs = ((rounded(first) >> 16) & 0xffff) | rounded(second);
  memcpy(p, &pairs, sizeof(pairs));
}

#if defined(__AVX512BF16__)
static inline void store(bfloat16 *p, vec v) {
  _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
#endif

// G g: a row of three weights at the points, over the products of a point's distances.
static inline void weight_transform(const vec g[3], vec t[6]) {
  t[0] = g[0];
  t[5] = g[2];
  vec even = (g[0] * 2.0f + g[2]) * (-1.0f / 3), odd = g[1] * (A * -2.0f / 3);
  t[1] = even + odd;
  t[2] = even - odd;
  even = (g[0] * 0.5f + g[2]) * (1.0f / 3), odd = g[1] * (B / 6);
  t[3] = even + odd;
  t[4] = even - odd;
}

// B^T d: six values of an input patch along one side.
static inline void input_transform(const vec d[6], vec t[6]) {
  t[0] = d[0] - d[2] * 2.5f + d[4];
  t[5] = d[1] - d[3] * 2.5f + d[5];
  vec even = d[4] - d[2] * 2.0f, odd = (d[3] - d[1] * 2.0f) * A;
  t[1] = even + odd;
  t[2] = even - odd;
  even = d[4] - d[2] * 0.5f, odd = (d[3] - d[1] * 0.5f) * B;
  t[3] = even + odd;
  t[4] = even - odd;
}

// A^T m: four outputs along one side.
static inline void output_transform(const vec m[6], vec y[4]) {
  vec s1 = m[1] + m[2], d1 = (m[1] - m[2]) * A, s2 = m[3] + m[4], d2 = (m[3] - m[4]) * B;
  y[0] = m[0] + s1 + s2;
  y[1] = d1 + d2;
  y[2] = s1 * 0.5f + s2 * 2.0f;
  y[3] = d1 * 0.5f + d2 * 2.0f + m[5];
}

// G g G^T of ``channels`` input channels: (channels, 9, width) -> values ``step`` apart, each
// (channels, width), or (channels / 2, width, 2) in pairs.
template <typename Number>
static void transform_weights(const float *taps, int64_t channels, int64_t width, Number *values,
                              int64_t step) {
  constexpr int pair = PAIR<Number>;
  for (int64_t c = 0; c < channels; c += pair, taps += pair * TAPS * width, values += pair * width)
    for (int64_t o = 0; o < width; o += LANES) {
      vec half[pair][6][3];
      for (int k = 0; k < pair; k++) {
        for (int tap = 0; tap < TAPS; tap++)  // they may come from far, and are needed at once
          __builtin_prefetch(taps + ((AHEAD + k) * TAPS + tap) * width + o);
        for (int j = 0; j < 3; j++) {
          vec g[3], t[6];
          for (int i = 0; i < 3; i++) g[i] = load(taps + (k * TAPS + i * 3 + j) * width + o);
          weight_transform(g, t);
          for (int i = 0; i < 6; i++) half[k][i][j] = t[i];
        }
      }
      for (int i = 0; i < 6; i++) {
        vec t[pair][6];
        for (int k = 0; k < pair; k++) weight_transform(half[k][i], t[k]);
        for (int j = 0; j < 6; j++)
          store_weights(values + (i * 6 + j) * step + pair * o, t[0][j], t[pair - 1][j]);
      }
    }
}

// Memory of a thread that lasts from call to call.
struct Scratch {
  float *memory = NULL;
  int64_t size = 0;

  // At least so many floats, or NULL.
  float *floats(int64_t count) {
    if (count > size) {
      free(memory);
      memory = (float *)aligned_alloc(64, (count * 4 + 63) / 64 * 64);
      size = memory ? count : 0;
    }
    return memory;
  }
  ~Scratch() { free(memory); }
};

static thread_local Scratch scratch;

template <typename Number>
static void pack(const float *weight, int64_t channels, int64_t out_channels, int64_t values,
                 Number *packed, int64_t threads) {
  int64_t padded = ceil_div(out_channels, LANES) * LANES, each = smaller(values, TAPS);
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t first = 0; first < padded; first += BLOCK)
    for (int64_t c = 0; c < channels; c += LANES) {
      int64_t width = smaller(BLOCK, padded - first);
      float block[LANES * TAPS * BLOCK];
      for (int64_t o = 0; o < width; o++) {
        const float *row = weight + ((first + o) * channels + c) * each;
        for (int64_t i = 0; i < LANES * each; i++)
          block[i * width + o] = first + o < out_channels ? row[i] : 0.0f;
      }
      Number *out = packed + first * values * channels + c * width;
      if (values == POINTS)
        transform_weights(block, LANES, width, out, channels * width);
      else if (values == TAPS)
        memcpy((float *)packed + (first * channels + c * width) * TAPS, block,
               LANES * TAPS * width * sizeof(float));
      else
        for (int64_t k = 0; k < LANES; k += PAIR<Number>)
          for (int64_t o = 0; o < width; o += LANES) {
            const float *pair = block + k * width + o;
            store_weights(out + k * width + PAIR<Number> * o, load(pair),
                          load(pair + (PAIR<Number> - 1) * width));
          }
    }
}

extern "C" {

// Whether products can be of bfloat16.
int64_t has_bfloat16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// Floats of ``pack_weights``'s result, for products of floats or of bfloat16.
int64_t packed_size(int64_t channels, int64_t out_channels, int64_t values, int64_t reduced) {
  int64_t numbers = values * channels * ceil_div(out_channels, LANES) * LANES;
  return reduced && values != TAPS ? numbers / 2 : numbers;
}

// weight (out_channels, channels, 1, 1) or (out_channels, channels, 3, 3) -> blocks of output
// channels, each (channels, width) with ``values`` 1, (channels, 9, width) with 9, or transformed,
// (36, channels, width), with 36; for products of bfloat16 in pairs of channels, but for 9 values.
void pack_weights(const float *weight, int64_t channels, int64_t out_channels, int64_t values,
                  int64_t reduced, float *packed, int64_t threads) {
  if (reduced)
    pack(weight, channels, out_channels, values, (bfloat16 *)packed, threads);
  else
    pack(weight, channels, out_channels, values, packed, threads);
}

// Of 3x3 or of 1x1, which neither resizes nor doubles.
struct Convolution {
  const float *x[2];     // one or two maps, joined along the channels
  int64_t channels[2];   // of each
  int64_t count, height, width;  // of the maps
  const float *scale, *shift;    // (N, C): scale x + shift, of 3x3 its SiLU, is convolved; or NULL
  int64_t resize;                // 1: doubled, -1: halved before the convolution
  const float *weight;           // packed
  int64_t values;                // a pair of channels there: of 1x1 1; of 3x3 9, or 36 if transformed
  int64_t reduced;               // whether products are of bfloat16
  const float *bias;             // (out_channels), or NULL
  const float *residual;         // (N, H', W', out_channels) to add, or NULL; may be ``out``
  int64_t residual_doubled;      // whether it is (N, H'/2, W'/2, out_channels)
  float *out;                    // (N, H', W', out_channels)
  int64_t out_channels;
};
}

struct Shape {
  int64_t height, width;             // of the output
  int64_t down, across;              // tiles of an image
  int64_t tiles, images, tall, wide;  // of a block: at most, and how they lie
  int64_t channels, stride;          // of the input; from one tile's row to the next
};

static inline vec activated(const float *x, const float *scale,
                            const float *shift) {
  vec value = load(x);
  return scale ? silu(value * load(scale) + load(shift)) : value;
}

// Fills (height, width, C) of ``patch`` from the convolution's input around row ``top`` and column
// ``left`` of image n, zero outside.
static void read_patch(const Convolution &conv, const Shape &shape, int64_t n, int64_t top,
                       int64_t left, int64_t height, int64_t width, float *patch) {
  for (int64_t row = top; row < top + height; row++)
    for (int64_t column = left; column < left + width; column++, patch += shape.channels) {
      if (row < 0 || row >= shape.height || column < 0 || column >= shape.width) {
        memset(patch, 0, shape.channels * sizeof(float));
        continue;
      }
      float *own = patch;
      for (int part = 0; part < 2; part++) {
        int64_t channels = conv.channels[part];
        if (!channels) continue;
        int64_t before = own - patch;
        const float *scale = conv.scale ? conv.scale + n * shape.channels + before : NULL;
        const float *shift = conv.scale ? conv.shift + n * shape.channels + before : NULL;
        const float *x = conv.x[part] + n * conv.height * conv.width * channels;
        if (conv.resize >= 0) {
          x += ((row >> conv.resize) * conv.width + (column >> conv.resize)) * channels;
          for (int64_t c = 0; c < channels; c += LANES)
            store(own + c, activated(x + c, scale ? scale + c : NULL, scale ? shift + c : NULL));
        } else {
          x += (2 * row * conv.width + 2 * column) * channels;
          const float *below = x + conv.width * channels;
          for (int64_t c = 0; c < channels; c += LANES) {
            const float *s = scale ? scale + c : NULL, *t = scale ? shift + c : NULL;
            vec sum = activated(x + c, s, t) + activated(x + channels + c, s, t) +
                      activated(below + c, s, t) +
                      activated(below + channels + c, s, t);
            store(own + c, sum * 0.25f);
          }
        }
        own += channels;
      }
    }
}

// One tile's 36 values of every channel, ``step`` apart, from its patch in rows of ``pitch``.
template <typename Number>
static void transform_tile(const float *patch, int64_t pitch, int64_t channels, Number *values,
                           int64_t step) {
  for (int64_t c = 0; c < channels; c += LANES) {
    vec half[6][6];
    for (int j = 0; j < 6; j++) {
      vec d[6], t[6];
      for (int i = 0; i < 6; i++) d[i] = load(patch + i * pitch + j * channels + c);
      input_transform(d, t);
      for (int i = 0; i < 6; i++) half[i][j] = t[i];
    }
    for (int i = 0; i < 6; i++) {
      vec t[6];
      input_transform(half[i], t);
      for (int j = 0; j < 6; j++) store(values + (i * 6 + j) * step + c, t[j]);
    }
  }
}

// rows x depth times depth x columns, all in registers, on top of what ``out`` holds if ``adds``.
template <int rows, int columns>
static inline void product(const float *a, int64_t stride, const float *b, int64_t depth,
                           float *out, bool adds) {
  vec sum[rows][columns] = {};
  if (adds)
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < columns; j++) sum[i][j] = load(out + (i * columns + j) * LANES);
  for (int64_t k = 0; k < depth; k++, b += columns * LANES) {
    vec own[columns];
    for (int j = 0; j < columns; j++) own[j] = load(b + j * LANES);
    for (int i = 0; i < rows; i++) {
      vec value = all(a[i * stride + k]);
      for (int j = 0; j < columns; j++) sum[i][j] += value * own[j];
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < columns; j++) store(out + (i * columns + j) * LANES, sum[i][j]);
}

#if defined(__AVX512BF16__)
// The same of bfloat16: pairs along the depth are multiplied and added.
template <int rows, int columns>
static inline void product(const bfloat16 *a, int64_t stride, const bfloat16 *b, int64_t depth,
                           float *out, bool adds) {
  __m512 sum[rows][columns] = {};
  if (adds)
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < columns; j++) sum[i][j] = _mm512_loadu_ps(out + (i * columns + j) * LANES);
  for (int64_t k = 0; k < depth; k += 2, b += columns * LANES * 2) {
    __m512i weights[columns];
    for (int j = 0; j < columns; j++) weights[j] = _mm512_loadu_si512(b + j * LANES * 2);
    for (int i = 0; i < rows; i++) {
      int32_t pair;
      memcpy(&pair, a + i * stride + k, sizeof(pair));
      for (int j = 0; j < columns; j++)
        sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)_mm512_set1_epi32(pair),
                                     (__m512bh)weights[j]);
    }
  }
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < columns; j++) _mm512_storeu_ps(out + (i * columns + j) * LANES, sum[i][j]);
}
#endif

template <int columns, typename Number>
static void products(const Number *a, int64_t stride, const Number *b, int64_t depth, int64_t rows,
                     float *out, bool adds) {
  for (; rows >= ROWS; rows -= ROWS, a += ROWS * stride, out += ROWS * columns * LANES)
    product<ROWS, columns>(a, stride, b, depth, out, adds);
  for (; rows >= 4; rows -= 4, a += 4 * stride, out += 4 * columns * LANES)
    product<4, columns>(a, stride, b, depth, out, adds);
  if (rows >= 2) {
    product<2, columns>(a, stride, b, depth, out, adds);
    rows -= 2, a += 2 * stride, out += 2 * columns * LANES;
  }
  if (rows) product<1, columns>(a, stride, b, depth, out, adds);
}

// Writes a tile's 4x4 pixels of LANES output channels from ``m``, its 36 values ``step`` apart.
static void write_tile(const Convolution &conv, const Shape &s, const float *m, int64_t step,
                       int64_t n, int64_t top, int64_t left, int64_t channel) {
  vec half[4][6];
  for (int j = 0; j < 6; j++) {
    vec column[6], y[4];
    for (int i = 0; i < 6; i++) column[i] = load(m + (i * 6 + j) * step);
    output_transform(column, y);
    for (int i = 0; i < 4; i++) half[i][j] = y[i];
  }
  const int64_t channels = conv.out_channels, height = s.height, width = s.width;
  const int64_t count = smaller(LANES, channels - channel);
  const int doubled = conv.residual_doubled ? 1 : 0;
  const float *residual = conv.residual;
  if (residual) residual += n * (height >> doubled) * (width >> doubled) * channels + channel;
  float *out = conv.out + n * height * width * channels + channel;
  const vec bias = conv.bias ? load_some(conv.bias + channel, count) : (vec){};
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    vec y[4];
    output_transform(half[i], y);
    const int64_t row = top + i;
    if (row >= height) break;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const int64_t column = left + j;
      if (column >= width) break;
      vec value = y[j] + bias;
      if (residual) {
        int64_t from = (row >> doubled) * (width >> doubled) + (column >> doubled);
        value += load_some(residual + from * channels, count);
      }
      store_some(out + (row * width + column) * channels, value, count);
    }
  }
}

static Shape shape_of(const Convolution &conv) {
  Shape s;
  s.height = conv.resize < 0 ? conv.height / 2 : conv.height << conv.resize;
  s.width = conv.resize < 0 ? conv.width / 2 : conv.width << conv.resize;
  s.down = ceil_div(s.height, TILE), s.across = ceil_div(s.width, TILE);
  s.tiles = conv.values == TAPS ? MORE_TILES : TILES;
  s.wide = smaller(s.across, 4);
  s.tall = smaller(s.down, s.tiles / s.wide);
  s.wide = smaller(s.across, s.tiles / s.tall);
  s.images = smaller(conv.count, s.tiles / (s.tall * s.wide));
  s.channels = conv.channels[0] + conv.channels[1];
  s.stride = s.channels + PAD;
  return s;
}

// Returns 0, or 1 where memory ran out.
template <typename Number>
static int64_t convolve_as(const Convolution &conv, int64_t threads) {
  const Shape s = shape_of(conv);
  int64_t down = ceil_div(s.down, s.tall), across = ceil_div(s.across, s.wide);
  int64_t blocks = ceil_div(conv.count, s.images) * down * across;
  int64_t padded = ceil_div(conv.out_channels, LANES) * LANES;
  int64_t channel_blocks = ceil_div(padded, BLOCK);
  int64_t parts = blocks < 2 * threads ? smaller(channel_blocks, ceil_div(2 * threads, blocks)) : 1;
  int64_t patch_size = (s.tall * TILE + 2) * (s.wide * TILE + 2) * s.channels;
  int64_t step = s.tiles * s.stride + PAD, m_step = s.tiles * BLOCK + PAD;
  int64_t own_step = DEPTH * BLOCK + PAD;
  int64_t failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(| : failed)
  for (int64_t task = 0; task < blocks * parts; task++) {
    float *patch = scratch.floats(patch_size + POINTS * (step + m_step + own_step) + PAD);
    if (!patch) {
      failed = 1;
      continue;
    }
    float *rest = patch + ceil_div(patch_size, PAD) * PAD, *m = rest + POINTS * step;
    Number *values = (Number *)rest, *weights = (Number *)(m + POINTS * m_step);
    int64_t part = task / blocks, block = task % blocks;
    int64_t column = block % across * s.wide, row = block / across % down * s.tall;
    int64_t image = block / across / down * s.images;
    int64_t images = smaller(s.images, conv.count - image);
    int64_t tall = smaller(s.tall, s.down - row), wide = smaller(s.wide, s.across - column);
    int64_t pitch = (wide * TILE + 2) * s.channels, tiles = 0;
    for (int64_t n = image; n < image + images; n++) {
      read_patch(conv, s, n, row * TILE - 1, column * TILE - 1, tall * TILE + 2, wide * TILE + 2,
                 patch);
      for (int64_t i = 0; i < tall; i++)
        for (int64_t j = 0; j < wide; j++, tiles++)
          transform_tile(patch + i * TILE * pitch + j * TILE * s.channels, pitch, s.channels,
                         values + tiles * s.stride, step);
    }
    for (int64_t own = part; own < channel_blocks; own += parts) {
      int64_t channel = own * BLOCK, width = smaller(BLOCK, padded - channel);
      const float *taps = conv.weight + channel * TAPS * s.channels;
      const Number *weight = (const Number *)conv.weight + channel * POINTS * s.channels;
      int64_t most = conv.values == TAPS ? (int64_t)DEPTH : s.channels;
      for (int64_t first = 0; first < s.channels; first += most) {
        int64_t depth = smaller(most, s.channels - first), weight_step = s.channels * width;
        const Number *transformed = weight;
        if (conv.values == TAPS) {
          weight_step = own_step;
          transform_weights(taps + first * TAPS * width, depth, width, weights, weight_step);
          transformed = weights;
        }
        for (int64_t point = 0; point < POINTS; point++) {
          const Number *a = values + point * step + first, *b = transformed + point * weight_step;
          float *out = m + point * m_step;
          if (width == BLOCK)
            products<COLUMNS>(a, s.stride, b, depth, tiles, out, first > 0);
          else
            products<1>(a, s.stride, b, depth, tiles, out, first > 0);
        }
      }
      for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t n = image + tile / (tall * wide), i = tile / wide % tall, j = tile % wide;
        for (int64_t c = 0; c < width; c += LANES)
          write_tile(conv, s, m + tile * width + c, m_step, n, (row + i) * TILE,
                     (column + j) * TILE, channel + c);
      }
    }
  }
  return failed;
}

// Means of some vectors of channels in a chunk, with ``added``, and sums of squared distances.
template <int vectors>
static inline void chunk_moments(const float *x, int64_t channels, int64_t pixels,
                                 const float *added, float *mean, float *squares) {
  vec origin[vectors] = {}, sum[vectors] = {}, sum2[vectors] = {};
  for (int64_t p = 0; p < pixels; p++)
    for (int i = 0; i < vectors; i++) origin[i] += load(x + p * channels + i * LANES);
  // The means but for rounding, which the second pass mends.
  for (int i = 0; i < vectors; i++) origin[i] *= 1.0f / pixels;
  for (int64_t p = 0; p < pixels; p++)
    for (int i = 0; i < vectors; i++) {
      vec d = load(x + p * channels + i * LANES) - origin[i];
      sum[i] += d;
      sum2[i] += d * d;
    }
  for (int i = 0; i < vectors; i++) {
    vec average = sum[i] * (1.0f / pixels), rest = sum2[i] - sum[i] * average;
    vec own = added ? load(added + i * LANES) : (vec){};
    store(mean + i * LANES, origin[i] + average + own);
    store(squares + i * LANES, rest < 0.0f ? (vec){} : rest);  // rounding may take it below 0
  }
}

extern "C" {

struct Normalisation {
  const float *x[2];
  int64_t channels[2];
  int64_t count, pixels, groups;
  const float *weight, *bias;  // (C)
  const double *eps;
  const float *added;  // (N or 1, C) to add to the maps before, or NULL
  int64_t added_rows;
  const float *gain_offset;  // (N or 1, 2, C) for (1 + gain) norm(x) + offset, or NULL
  int64_t gain_offset_rows;
  float *scale, *shift;  // (N, C): the same as scale x + shift
};

int64_t group_norm(const Normalisation *given, int64_t bytes, int64_t threads) {
  if (bytes != sizeof(*given)) return sizeof(*given);
  const Normalisation norm = *given;
  int64_t channels = norm.channels[0] + norm.channels[1], chunks = ceil_div(norm.pixels, CHUNK);
  Scratch room;
  float *all_moments = room.floats(norm.count * chunks * 2 * channels);  // (N, chunks, 2, C)
  if (!all_moments) return -1;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t task = 0; task < norm.count * chunks; task++) {
      int64_t n = task / chunks, first = task % chunks * CHUNK;
      int64_t pixels = smaller(CHUNK, norm.pixels - first);
      float *mean = all_moments + task * 2 * channels, *squares = mean + channels;
      int64_t before = 0;
      for (int part = 0; part < 2; part++) {
        int64_t own = norm.channels[part];
        if (!own) continue;
        const float *x = norm.x[part] + (n * norm.pixels + first) * own;
        const float *added = norm.added;
        if (added) added += n % norm.added_rows * channels + before;
        int64_t c = 0;
        for (; c + WIDE * LANES <= own; c += WIDE * LANES)
          chunk_moments<WIDE>(x + c, own, pixels, added ? added + c : NULL, mean + c, squares + c);
        for (; c < own; c += LANES)
          chunk_moments<1>(x + c, own, pixels, added ? added + c : NULL, mean + c, squares + c);
        mean += own, squares += own, before += own;
      }
    }
#pragma omp for
    for (int64_t task = 0; task < norm.count * norm.groups; task++) {
      int64_t n = task / norm.groups, size = channels / norm.groups;
      int64_t first = task % norm.groups * size;
      const float *moments = all_moments + n * chunks * 2 * channels + first;
      double sum = 0, squares = 0;
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t c = 0; c < size; c++)
          sum += smaller(CHUNK, norm.pixels - chunk * CHUNK) *
                 (double)moments[chunk * 2 * channels + c];
      double mean = sum / (size * norm.pixels);
      for (int64_t chunk = 0; chunk < chunks; chunk++)
        for (int64_t c = 0; c < size; c++) {
          double d = moments[chunk * 2 * channels + c] - mean;
          squares += moments[(chunk * 2 + 1) * channels + c] +
                     smaller(CHUNK, norm.pixels - chunk * CHUNK) * d * d;
        }
      double variance = squares / (size * norm.pixels) + *norm.eps;
      double rstd = 1 / __builtin_sqrt(variance);
      for (int64_t c = first; c < first + size; c++) {
        double scale = rstd * norm.weight[c], shift = norm.bias[c] - mean * scale;
        if (norm.gain_offset) {
          const float *row = norm.gain_offset + n % norm.gain_offset_rows * 2 * channels;
          double gain = 1 + row[c];
          scale *= gain;
          shift = shift * gain + row[channels + c];
        }
        if (norm.added) shift += scale * norm.added[n % norm.added_rows * channels + c];
        norm.scale[n * channels + c] = (float)scale;
        norm.shift[n * channels + c] = (float)shift;
      }
    }
  }
  return bytes;
}
}

// Copies ``rows`` pixels of image n from ``first`` on, both maps side by side, ``stride`` apart.
template <typename Number>
static void read_pixels(const Convolution &conv, int64_t n, int64_t first, int64_t rows,
                        int64_t stride, Number *out) {
  int64_t total = conv.channels[0] + conv.channels[1], pixels = conv.height * conv.width;
  int64_t before = 0;
  for (int part = 0; part < 2; part++) {
    int64_t channels = conv.channels[part];
    const float *x = conv.x[part] + (n * pixels + first) * channels;
    const float *scale = conv.scale ? conv.scale + n * total + before : NULL;
    const float *shift = conv.scale ? conv.shift + n * total + before : NULL;
    for (int64_t row = 0; row < rows; row++, x += channels)
      for (int64_t c = 0; c < channels; c += LANES) {
        vec value = load(x + c);
        if (scale) value = value * load(scale + c) + load(shift + c);
        store(out + row * stride + before + c, value);
      }
    before += channels;
  }
}

// Returns 0, or 1 where memory ran out.
template <typename Number>
static int64_t pointwise_as(const Convolution &conv, int64_t threads) {
  int64_t channels = conv.channels[0] + conv.channels[1], stride = channels + PAD;
  int64_t padded = ceil_div(conv.out_channels, LANES) * LANES;
  int64_t channel_blocks = ceil_div(padded, BLOCK);
  int64_t pixels = conv.height * conv.width;
  int64_t across = ceil_div(pixels, PIXELS), blocks = conv.count * across;
  int64_t parts = blocks < 2 * threads ? smaller(channel_blocks, ceil_div(2 * threads, blocks)) : 1;
  int64_t failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(| : failed)
  for (int64_t task = 0; task < blocks * parts; task++) {
    float *m = scratch.floats(PIXELS * (stride + BLOCK));
    if (!m) {
      failed = 1;
      continue;
    }
    Number *x = (Number *)(m + PIXELS * BLOCK);
    int64_t part = task / blocks, n = task % blocks / across, first = task % across * PIXELS;
    int64_t rows = smaller(PIXELS, pixels - first);
    read_pixels(conv, n, first, rows, stride, x);
    for (int64_t own = part; own < channel_blocks; own += parts) {
      int64_t channel = own * BLOCK, width = smaller(BLOCK, padded - channel);
      const Number *weight = (const Number *)conv.weight + channel * channels;
      if (width == BLOCK)
        products<COLUMNS>(x, stride, weight, channels, rows, m, false);
      else
        products<1>(x, stride, weight, channels, rows, m, false);
      for (int64_t c = 0; c < width; c += LANES) {
        int64_t at = channel + c, count = smaller(LANES, conv.out_channels - at);
        vec bias = conv.bias ? load_some(conv.bias + at, count) : (vec){};
        for (int64_t row = 0; row < rows; row++) {
          int64_t place = (n * pixels + first + row) * conv.out_channels + at;
          vec value = load(m + row * width + c) + bias;
          if (conv.residual) value += load_some(conv.residual + place, count);
          store_some(conv.out + place, value, count);
        }
      }
    }
  }
  return failed;
}

// Either kind of convolution.
template <typename Number>
static int64_t any_size(const Convolution &conv, int64_t threads) {
  return conv.values == 1 ? pointwise_as<Number>(conv, threads) : convolve_as<Number>(conv, threads);
}

extern "C" {

int64_t convolve(const Convolution *conv, int64_t bytes, int64_t threads) {
  if (bytes != sizeof(*conv)) return sizeof(*conv);
#if defined(__AVX512BF16__)
  if (conv->reduced) return any_size<bfloat16>(*conv, threads) ? -1 : bytes;
#endif
  return any_size<float>(*conv, threads) ? -1 : bytes;
}
}

struct Attention {
  const float *qkv;  // (N, tokens, 3 heads width)
  int64_t count, tokens, heads, width;
  int64_t head_step, part_step;  // from one head to the next; from q to k and from k to v
  float *out;                    // (N, tokens, heads width)
};

// Floats that a head's packed keys and values take.
static int64_t packed_head(const Attention &a) {
  int64_t keys = ceil_div(a.tokens, BLOCK) * BLOCK;
  return keys * (a.width + ceil_div(a.width, BLOCK) * BLOCK);
}


// Packs the keys of a head as blocks of BLOCK, each (width, BLOCK), and the values behind them as
// blocks of BLOCK columns, each (tokens, BLOCK); zero where there are none.
static void pack_head(const Attention &a, const float *keys, float *packed) {
  int64_t row = 3 * a.heads * a.width, blocks = ceil_div(a.tokens, BLOCK);
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t i = 0; i < BLOCK; i++) {
      int64_t token = block * BLOCK + i;
      for (int64_t k = 0; k < a.width; k++)
        packed[(block * a.width + k) * BLOCK + i] = token < a.tokens ? keys[token * row + k] : 0;
    }
  packed += blocks * BLOCK * a.width;
  const float *values = keys + a.part_step;
  for (int64_t first = 0; first < a.width; first += BLOCK)
    for (int64_t token = 0; token < a.tokens; token++, packed += BLOCK)
      for (int64_t i = 0; i < BLOCK; i++)
        packed[i] = first + i < a.width ? values[token * row + first + i] : 0;
}

// Turns a query's scores, in blocks ``step`` apart, into their exponentials; returns their sum.
static float exponentials(float *scores, int64_t step, int64_t tokens) {
  vec largest = all(-3e38f);
  for (int64_t first = 0; first < tokens; first += BLOCK) {
    float *own = scores + first / BLOCK * step;
    for (int64_t i = tokens - first; i < BLOCK; i++) own[i] = -3e38f;  // beyond the last
    for (int64_t i = 0; i < BLOCK; i += LANES) {
      vec score = load(own + i);
      largest = score > largest ? score : largest;
    }
  }
  float most = largest[0];
  for (int lane = 1; lane < LANES; lane++) most = largest[lane] > most ? largest[lane] : most;
  vec sum = {};
  for (int64_t first = 0; first < tokens; first += BLOCK)
    for (int64_t i = 0; i < BLOCK; i += LANES) {
      float *own = scores + first / BLOCK * step + i;
      vec value = exponential(load(own) - most);
      store(own, value);
      sum += value;
    }
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += sum[lane];
  return total;
}

extern "C" {

// Softmax attention over the tokens.
int64_t attend(const Attention *given, int64_t bytes, int64_t threads) {
  if (bytes != sizeof(*given)) return sizeof(*given);
  const Attention a = *given;
  int64_t row = 3 * a.heads * a.width, head_size = packed_head(a);
  int64_t blocks = ceil_div(a.tokens, BLOCK), query_blocks = ceil_div(a.tokens, QUERIES);
  float scale = (float)(1 / __builtin_sqrt((double)a.width));
  Scratch room;
  float *packed = room.floats(a.count * a.heads * head_size);
  if (!packed) return -1;
  int64_t failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
#pragma omp for
    for (int64_t task = 0; task < a.count * a.heads; task++) {
      const float *image = a.qkv + task / a.heads * a.tokens * row;
      pack_head(a, image + task % a.heads * a.head_step + a.part_step, packed + task * head_size);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < a.count * a.heads * query_blocks; task++) {
      int64_t head = task / query_blocks, n = head / a.heads;
      int64_t first = task % query_blocks * QUERIES, rows = smaller(QUERIES, a.tokens - first);
      int64_t step = QUERIES * BLOCK + PAD, stride = a.width + PAD;
      float *scores = scratch.floats(blocks * step + QUERIES * (BLOCK + stride));
      if (!scores) {
        failed = 1;
        continue;
      }
      float *m = scores + blocks * step, *queries = m + QUERIES * BLOCK;
      const float *q = a.qkv + (n * a.tokens + first) * row + head % a.heads * a.head_step;
      for (int64_t i = 0; i < rows; i++)
        for (int64_t k = 0; k < a.width; k++) queries[i * stride + k] = q[i * row + k] * scale;
      const float *keys = packed + head * head_size, *values = keys + blocks * BLOCK * a.width;
      for (int64_t block = 0; block < blocks; block++)
        products<COLUMNS>(queries, stride, keys + block * BLOCK * a.width, a.width, rows,
                          scores + block * step, false);
      float rescale[QUERIES];
      for (int64_t i = 0; i < rows; i++)
        rescale[i] = 1 / exponentials(scores + i * BLOCK, step, a.tokens);
      float *out = a.out + ((n * a.tokens + first) * a.heads + head % a.heads) * a.width;
      for (int64_t c = 0; c < a.width; c += BLOCK, values += a.tokens * BLOCK) {
        for (int64_t block = 0; block < blocks; block++)
          products<COLUMNS>(scores + block * step, BLOCK, values + block * BLOCK * BLOCK,
                            smaller(BLOCK, a.tokens - block * BLOCK), rows, m, block > 0);
        int64_t width = smaller(BLOCK, a.width - c);
        for (int64_t i = 0; i < rows; i++)
          for (int64_t k = 0; k < width; k++)
            out[i * a.heads * a.width + c + k] = m[i * BLOCK + k] * rescale[i];
      }
    }
  }
  return failed ? -1 : bytes;
}
}
