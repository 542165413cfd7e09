// AVX-512 with VNNI, and with BF16 where the path says so: 16 lanes are one register.
#pragma once
#include <immintrin.h>

namespace headway {

constexpr int ROWS_INT4 = 6, ROWS_INT8 = 6, ROWS_FLOAT = 6, HALVES = 2;
constexpr int ROWS_SCORE = 12;

struct F16 {
  __m512 v;
};
struct I16 {
  __m512i v;
};

static HW_INLINE F16 set(float x) { return {_mm512_set1_ps(x)}; }
static HW_INLINE F16 zero() { return {_mm512_setzero_ps()}; }
static HW_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
static HW_INLINE void store(float* p, F16 x) { _mm512_storeu_ps(p, x.v); }
static HW_INLINE F16 load_half(const u8* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
static HW_INLINE F16 add(F16 x, F16 y) { return {_mm512_add_ps(x.v, y.v)}; }
static HW_INLINE F16 sub(F16 x, F16 y) { return {_mm512_sub_ps(x.v, y.v)}; }
static HW_INLINE F16 mul(F16 x, F16 y) { return {_mm512_mul_ps(x.v, y.v)}; }
static HW_INLINE F16 div(F16 x, F16 y) { return {_mm512_div_ps(x.v, y.v)}; }
static HW_INLINE F16 max(F16 x, F16 y) { return {_mm512_max_ps(x.v, y.v)}; }
static HW_INLINE F16 min(F16 x, F16 y) { return {_mm512_min_ps(x.v, y.v)}; }
// x · y + z, rounded once.
static HW_INLINE F16 fma(F16 x, F16 y, F16 z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
static HW_INLINE F16 magnitude(F16 x) { return {_mm512_abs_ps(x.v)}; }
static HW_INLINE F16 round(F16 x) {
  return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static HW_INLINE F16 power_of_two(F16 n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(biased, 23))};
}
static HW_INLINE F16 where_less(F16 x, F16 y, F16 then, F16 other) {
  return {_mm512_mask_mov_ps(other.v, _mm512_cmp_ps_mask(x.v, y.v, _CMP_LT_OQ), then.v)};
}
static HW_INLINE F16 keep_first(F16 x, int count, F16 fill) {
  const __mmask16 kept = (__mmask16)(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
  return {_mm512_mask_mov_ps(fill.v, kept, x.v)};
}
static HW_INLINE bool has_nan(F16 x) { return _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q) != 0; }
static HW_INLINE __m256 upper(__m512 x) {
  return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
}
// Lanes i and i + 8, then i and i + 4, i + 2, i + 1.
static HW_INLINE float reduce_add(F16 x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), upper(x.v));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
static HW_INLINE float reduce_max(F16 x) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.v), upper(x.v));
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

static HW_INLINE I16 to_int(F16 x) { return {_mm512_cvtps_epi32(x.v)}; }
static HW_INLINE F16 to_float(I16 x) { return {_mm512_cvtepi32_ps(x.v)}; }
static HW_INLINE int reduce_add(I16 x, I16 y) {
  return _mm512_reduce_add_epi32(_mm512_add_epi32(x.v, y.v));
}
// 32 int8s: of every 8, in the order 0 4 1 5 2 6 3 7 in which the packed weights have their inputs.
static HW_INLINE void store_quantised(i8* p, I16 x, I16 y) {
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  _mm_storeu_si128((__m128i*)p, _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(x.v), order));
  _mm_storeu_si128((__m128i*)(p + 16), _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(y.v), order));
}

// ---- integer products

template <int FORMAT>
struct Weights {
  __m512i v;
};
template <int FORMAT>
struct Sum {
  __m512i v;
};

template <int FORMAT>
static HW_INLINE Weights<FORMAT> load_weights(const u8* group, int half, int step) {
  if constexpr (FORMAT == INT4) {
    __m512i x = _mm512_loadu_si512(group + (step / 2 * 2 + half) * 64);
    if (step % 2) x = _mm512_srli_epi16(x, 4);
    return {_mm512_and_si512(x, _mm512_set1_epi8(15))};
  } else {
    return {_mm512_loadu_si512(group + (step * 2 + half) * 64)};
  }
}
template <int FORMAT>
static HW_INLINE void begin(Sum<FORMAT>& sum, const GroupMeta& meta) {
  sum.v = FORMAT == INT8 ? _mm512_set1_epi32(meta.bias) : _mm512_setzero_si512();
}
template <int FORMAT>
static HW_INLINE void dot(Sum<FORMAT>& sum, const Weights<FORMAT>& w, const i8* activations) {
  int32_t four;
  memcpy(&four, activations, 4);
  sum.v = _mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(four));
}
template <int FORMAT>
static HW_INLINE I16 total(const Sum<FORMAT>& sum) {
  return {sum.v};
}

// ---- products with bfloat16 on both sides, or on one


// The whole numbers in `count` bits from `shift` on of every lane, less `offset`.
static HW_INLINE __m512 numbers(__m512i x, int shift, int mask, float offset) {
  const __m512i part = _mm512_and_si512(_mm512_srli_epi32(x, shift), _mm512_set1_epi32(mask));
  return _mm512_sub_ps(_mm512_cvtepi32_ps(part), _mm512_set1_ps(offset));
}
// Where inputs 2 · pair and 2 · pair + 1 of a group of packed weights are.
template <int FORMAT>
static HW_INLINE __m512i weight_lanes(const u8* group, int half, int pair) {
  const int chunk = pair / 4, place = pair % 4;
  // INT8's steps hold the inputs 0 4 1 5 and 2 6 3 7 of 8: pairs 0 and 2, then 1 and 3.
  const int index = FORMAT == INT4 ? chunk : chunk * 2 + place % 2;
  return _mm512_loadu_si512(group + (index * 2 + half) * 64);
}
template <int FORMAT>
static HW_INLINE void weight_floats(const u8* group, int half, int pair, __m512& even, __m512& odd) {
  const int shift = FORMAT == INT4 ? pair % 4 * 4 : pair % 4 / 2 * 8;
  const int mask = FORMAT == INT4 ? 15 : 255;
  const float offset = FORMAT == INT4 ? 0.0f : 128.0f;
  const __m512i x = weight_lanes<FORMAT>(group, half, pair);
  even = numbers(x, shift, mask, offset);
  odd = numbers(x, shift + 16, mask, offset);
}

#if defined(HEADWAY_PATH_AVX512BF16)

using Brain = u16;
struct Pair {
  __m512i v;
};

static HW_INLINE void store_brains(Brain* p, F16 x) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x.v));
}
static HW_INLINE F16 as_brains(F16 x) {
  const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x.v));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

static HW_INLINE Pair load_pair(const u16* p) { return {_mm512_loadu_si512(p)}; }
template <int FORMAT>
static HW_INLINE Pair weight_pair(const u8* group, int half, int pair) {
  if constexpr (FORMAT == INT4) {
    // The permutation looks at five bits of each 16: the number, and a bit of the next, which the
    // table has both values of.
    alignas(64) static constexpr u16 table[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
        0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
        0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    const __m512i x = weight_lanes<INT4>(group, half, pair);
    return {_mm512_permutexvar_epi16(_mm512_srli_epi16(x, pair % 4 * 4), _mm512_load_si512(table))};
  } else {
    __m512 even, odd;
    weight_floats<FORMAT>(group, half, pair, even, odd);
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);  // whole numbers to 256 lose nothing
    return {_mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(even), 16),
                            _mm512_and_si512(_mm512_castps_si512(odd), high))};
  }
}
static HW_INLINE F16 dot_pair(F16 sum, const Pair& x, const Brain* y) {
  int32_t two;
  memcpy(&two, y, 4);
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)x.v, (__m512bh)_mm512_set1_epi32(two))};
}

#else

// There is no instruction that multiplies bfloat16s: what would be rounded to them stays float.
using Brain = float;
struct Pair {
  F16 even, odd;
};

static HW_INLINE void store_brains(Brain* p, F16 x) { store(p, x); }
static HW_INLINE F16 as_brains(F16 x) { return x; }

static HW_INLINE Pair load_pair(const u16* p) {
  const __m512i x = _mm512_loadu_si512(p);
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)))}};
}
template <int FORMAT>
static HW_INLINE Pair weight_pair(const u8* group, int half, int pair) {
  Pair result;
  weight_floats<FORMAT>(group, half, pair, result.even.v, result.odd.v);
  return result;
}
static HW_INLINE F16 dot_pair(F16 sum, const Pair& x, const Brain* y) {
  return fma(x.odd, set(y[1]), fma(x.even, set(y[0]), sum));
}

#endif

static HW_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
static HW_INLINE void pause() { _mm_pause(); }

}  // namespace headway
