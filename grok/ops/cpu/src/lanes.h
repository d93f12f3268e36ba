// Vectors of float32 as wide as the processor's registers, and weights of any stored type as such
// vectors. Plain C with the vector extensions of GCC and Clang.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define LANES 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint32_t vuint __attribute__((vector_size(4 * LANES)));

// Stored types of weights. ROUNDED is float32 that is used as bfloat16.
enum type { FLOAT32, ROUNDED, BFLOAT16, INT8, INT4 };

INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// a b + c, rounded as often as where vectors are multiplied and added.
INLINE float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

INLINE float from_bfloat16(uint16_t bits) { return float_of_bits((uint32_t)bits << 16); }

// The nearest bfloat16, the even one of two.
INLINE float to_bfloat16(float value) {
  uint32_t bits = bits_of_float(value);
  bits += 0x7fff + ((bits >> 16) & 1);
  return value != value ? value : float_of_bits(bits & 0xffff0000u);
}

INLINE vfloat to_bfloat16s(vfloat values) {
  vuint bits = (vuint)values;
  bits += 0x7fff + ((bits >> 16) & 1);
  vint is_number = values == values;
  return (vfloat)((bits & 0xffff0000u & (vuint)is_number) | ((vuint)values & ~(vuint)is_number));
}

INLINE vfloat load(const float *at) {
  vfloat values;
  memcpy(&values, at, sizeof values);
  return values;
}

INLINE void store(float *at, vfloat values) { memcpy(at, &values, sizeof values); }

INLINE vfloat load_bfloat16s(const uint16_t *at) {
#if LANES == 16
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
  return (vfloat)_mm512_slli_epi32(wide, 16);
#elif LANES == 8
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
  return (vfloat)_mm256_slli_epi32(wide, 16);
#else
  typedef uint16_t half __attribute__((vector_size(2 * LANES)));
  half values;
  memcpy(&values, at, sizeof values);
  return (vfloat)(__builtin_convertvector(values, vuint) << 16);
#endif
}

typedef int8_t vbyte __attribute__((vector_size(LANES)));

INLINE vfloat from_bytes(vbyte values) {
#if LANES == 16
  return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)values));
#elif LANES == 8
  __m128i low = {0};
  memcpy(&low, &values, sizeof values);
  return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
#else
  return __builtin_convertvector(values, vfloat);
#endif
}

INLINE vfloat load_int8s(const int8_t *at) {
  vbyte values;
  memcpy(&values, at, sizeof values);
  return from_bytes(values);
}

// The int4 at `index` of an array whose bytes hold two, the lower half first.
INLINE float int4_at(const uint8_t *values, int64_t index) {
  int nibble = values[index >> 1] >> (index & 1 ? 4 : 0) & 15;
  return (float)((nibble ^ 8) - 8);
}

// From an even index on.
INLINE vfloat load_int4s(const uint8_t *values, int64_t index) {
  values += index >> 1;
#if LANES == 16
  // Each lane gets the four bytes that its value is among, shifted, and looks up the lowest bits.
  const __m512i halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m512i shifts =
      _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  __m512i bytes = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i *)values));
  __m512i lanes = _mm512_srlv_epi32(_mm512_permutexvar_epi32(halves, bytes), shifts);
  return (vfloat)_mm512_permutexvar_ps(lanes, table);
#else
  vfloat result;
  UNROLL for (int lane = 0; lane < LANES; lane++) result[lane] = int4_at(values, lane);
  return result;
#endif
}

// The weight, or the next LANES weights, at `index` of `values`; an int without its scale.
INLINE float weight_at(enum type type, const void *values, int64_t index) {
  switch (type) {
    case FLOAT32: return ((const float *)values)[index];
    case ROUNDED: return to_bfloat16(((const float *)values)[index]);
    case BFLOAT16: return from_bfloat16(((const uint16_t *)values)[index]);
    case INT8: return ((const int8_t *)values)[index];
    default: return int4_at(values, index);
  }
}

INLINE vfloat weights_at(enum type type, const void *values, int64_t index) {
  switch (type) {
    case FLOAT32: return load((const float *)values + index);
    case ROUNDED: return to_bfloat16s(load((const float *)values + index));
    case BFLOAT16: return load_bfloat16s((const uint16_t *)values + index);
    case INT8: return load_int8s((const int8_t *)values + index);
    default: return load_int4s(values, index);
  }
}

INLINE int64_t bytes_of(enum type type, int64_t count) {
  return type == INT4 ? count / 2 : count * (type == INT8 ? 1 : type == BFLOAT16 ? 2 : 4);
}

INLINE const char *address_of(enum type type, const void *values, int64_t index) {
  return (const char *)values + bytes_of(type, index);
}

// exp by Cody and Waite's reduction and a polynomial of degree 6: within two units in the last
// place, and never infinite.
INLINE vfloat exp_of(vfloat x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vfloat zero = {0};
  vfloat high = zero + 88.0f, low = zero - 87.0f;
  vint above = x > high, below = x < low;
  x = (vfloat)(((vint)x & ~above & ~below) | ((vint)high & above) | ((vint)low & below));
  vfloat shifted = x * 1.44269504f + magic;
  vfloat n = shifted - magic;
  vfloat r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vfloat p = r * 1.3888889e-3f + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (vfloat)((vint)p + ((vint)shifted << 23));
}

// tanh by exp: within two units in the last place of 1.
INLINE vfloat tanh_of(vfloat x) {
  vuint sign = (vuint)x & 0x80000000u;
  vfloat magnitude = (vfloat)((vuint)x ^ sign);
  vfloat small = exp_of(-2.0f * magnitude);
  return (vfloat)((vuint)((1.0f - small) / (1.0f + small)) | sign);
}

// The sum of the lanes, by halves.
INLINE float sum_of(vfloat values) {
#if LANES == 16
  __m512 all = (__m512)values;
  __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(all),
                               _mm256_castsi256_ps(_mm512_extracti64x4_epi64((__m512i)all, 1)));
#elif LANES == 8
  __m256 eight = (__m256)values;
#endif
#if LANES >= 8
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  return (values[0] + values[2]) + (values[1] + values[3]);
#endif
}
