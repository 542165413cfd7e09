// AVX2 with FMA and F16C: 16 lanes are two registers.
#pragma once
#include <immintrin.h>

namespace headway {

// Rows that a kernel computes at once, as registers allow; 16-lane halves of a panel at once.
constexpr int ROWS_INT4 = 6, ROWS_INT8 = 4, ROWS_FLOAT = 5, HALVES = 1;
// Rows of queries that attention computes at once.
constexpr int ROWS_SCORE = 3;

struct F16 {
  __m256 a, b;
};
struct I16 {
  __m256i a, b;
};

static HW_INLINE F16 set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static HW_INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static HW_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static HW_INLINE void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
static HW_INLINE F16 load_half(const u8* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
static HW_INLINE F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static HW_INLINE F16 sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static HW_INLINE F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static HW_INLINE F16 div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static HW_INLINE F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static HW_INLINE F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
// x · y + z, rounded once.
static HW_INLINE F16 fma(F16 x, F16 y, F16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static HW_INLINE F16 magnitude(F16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
static HW_INLINE F16 round(F16 x) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
// 2^n for whole n of −126 … 127.
static HW_INLINE F16 power_of_two(F16 n) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.a), bias), 23)),
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.b), bias), 23))};
}
// x < y ? then : other, lane by lane.
static HW_INLINE F16 where_less(F16 x, F16 y, F16 then, F16 other) {
  return {_mm256_blendv_ps(other.a, then.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
          _mm256_blendv_ps(other.b, then.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
// The first `count` lanes of x, and `fill` in the others.
static HW_INLINE F16 keep_first(F16 x, int count, F16 fill) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i a = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
  const __m256i b = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lanes);
  return {_mm256_blendv_ps(fill.a, x.a, _mm256_castsi256_ps(a)),
          _mm256_blendv_ps(fill.b, x.b, _mm256_castsi256_ps(b))};
}
static HW_INLINE bool has_nan(F16 x) {
  const __m256 a = _mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), b = _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q);
  return _mm256_movemask_ps(_mm256_or_ps(a, b)) != 0;
}
// Lanes i and i + 8, then i and i + 4, i + 2, i + 1.
static HW_INLINE float reduce_add(F16 x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
static HW_INLINE float reduce_max(F16 x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

static HW_INLINE I16 to_int(F16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
static HW_INLINE F16 to_float(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static HW_INLINE int reduce_add(I16 x, I16 y) {
  const __m256i eight = _mm256_add_epi32(_mm256_add_epi32(x.a, x.b), _mm256_add_epi32(y.a, y.b));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
// 32 int8s: of every 8, in the order 0 4 1 5 2 6 3 7 in which the packed weights have their inputs.
static HW_INLINE void store_quantised(i8* p, I16 x, I16 y) {
  const __m256i words = _mm256_packs_epi32(x.a, x.b), more = _mm256_packs_epi32(y.a, y.b);
  __m256i bytes = _mm256_packs_epi16(words, more);  // fours: x.a0 x.b0 y.a0 y.b0 x.a1 …
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i order = _mm256_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15,  //
                                         0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  _mm256_storeu_si256((__m256i*)p, _mm256_shuffle_epi8(bytes, order));
}

// ---- integer products

template <int FORMAT>
struct Weights;
template <int FORMAT>
struct Sum;

// 0 … 15: sixteen products of a byte pair fit into 16 bits, so a group is summed there.
template <>
struct Weights<INT4> {
  __m256i a, b;
};
template <>
struct Sum<INT4> {
  __m256i a, b;
};
// −128 … 127, as magnitudes and signs.
template <>
struct Weights<INT8> {
  __m256i a, b, size_a, size_b;
};
template <>
struct Sum<INT8> {
  __m256i a, b;
};

template <int FORMAT>
static HW_INLINE Weights<FORMAT> load_weights(const u8* group, int half, int step) {
  if constexpr (FORMAT == INT4) {
    const u8* p = group + (step / 2 * 2 + half) * 64;
    __m256i a = _mm256_loadu_si256((const __m256i*)p);
    __m256i b = _mm256_loadu_si256((const __m256i*)(p + 32));
    if (step % 2) a = _mm256_srli_epi16(a, 4), b = _mm256_srli_epi16(b, 4);
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)};
  } else {
    const u8* p = group + (step * 2 + half) * 64;
    const __m256i flip = _mm256_set1_epi8(-128);
    const __m256i a = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)p), flip);
    const __m256i b = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(p + 32)), flip);
    return {a, b, _mm256_abs_epi8(a), _mm256_abs_epi8(b)};
  }
}
template <int FORMAT>
static HW_INLINE void begin(Sum<FORMAT>& sum, const GroupMeta&) {
  sum = {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
static HW_INLINE __m256i broadcast4(const i8* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
static HW_INLINE void dot(Sum<INT4>& sum, const Weights<INT4>& w, const i8* activations) {
  const __m256i x = broadcast4(activations);
  sum.a = _mm256_add_epi16(sum.a, _mm256_maddubs_epi16(w.a, x));
  sum.b = _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(w.b, x));
}
static HW_INLINE void dot(Sum<INT8>& sum, const Weights<INT8>& w, const i8* activations) {
  const __m256i x = broadcast4(activations), ones = _mm256_set1_epi16(1);
  const __m256i a = _mm256_maddubs_epi16(w.size_a, _mm256_sign_epi8(x, w.a));
  const __m256i b = _mm256_maddubs_epi16(w.size_b, _mm256_sign_epi8(x, w.b));
  sum.a = _mm256_add_epi32(sum.a, _mm256_madd_epi16(a, ones));
  sum.b = _mm256_add_epi32(sum.b, _mm256_madd_epi16(b, ones));
}
static HW_INLINE I16 total(const Sum<INT4>& sum) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(sum.a, ones), _mm256_madd_epi16(sum.b, ones)};
}
static HW_INLINE I16 total(const Sum<INT8>& sum) { return {sum.a, sum.b}; }

// ---- products with bfloat16 on one side, in float32

// There is no instruction that multiplies bfloat16s: what would be rounded to them stays float.
using Brain = float;
struct Pair {
  F16 even, odd;
};

static HW_INLINE void store_brains(Brain* p, F16 x) { store(p, x); }
static HW_INLINE F16 as_brains(F16 x) { return x; }

// 16 pairs of bfloat16s that lie side by side.
static HW_INLINE Pair load_pair(const u16* p) {
  const __m256i a = _mm256_loadu_si256((const __m256i*)p);
  const __m256i b = _mm256_loadu_si256((const __m256i*)(p + 16));
  const __m256i high = _mm256_set1_epi32((int)0xffff0000);
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))}};
}
// Inputs 2 · pair and 2 · pair + 1 of a group of packed weights.
template <int FORMAT>
static HW_INLINE Pair weight_pair(const u8* group, int half, int pair) {
  const int chunk = pair / 4, place = pair % 4;
  auto numbers = [](__m256i a, __m256i b, int shift, int mask) {
    const __m256i m = _mm256_set1_epi32(mask);
    return F16{_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(a, shift), m)),
               _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(b, shift), m))};
  };
  if constexpr (FORMAT == INT4) {
    const u8* p = group + (chunk * 2 + half) * 64;
    const __m256i a = _mm256_loadu_si256((const __m256i*)p);
    const __m256i b = _mm256_loadu_si256((const __m256i*)(p + 32));
    return {numbers(a, b, 4 * place, 15), numbers(a, b, 4 * place + 16, 15)};
  } else {
    // Steps hold the inputs 0 4 1 5 and 2 6 3 7 of 8: pairs 0 and 2, then 1 and 3.
    const u8* p = group + ((chunk * 2 + place % 2) * 2 + half) * 64;
    const __m256i a = _mm256_loadu_si256((const __m256i*)p);
    const __m256i b = _mm256_loadu_si256((const __m256i*)(p + 32));
    const int shift = place / 2 * 8;
    const F16 offset = set(128.0f);
    return {sub(numbers(a, b, shift, 255), offset), sub(numbers(a, b, shift + 16, 255), offset)};
  }
}
static HW_INLINE F16 dot_pair(F16 sum, const Pair& x, const Brain* y) {
  return fma(x.odd, set(y[1]), fma(x.even, set(y[0]), sum));
}

static HW_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
static HW_INLINE void pause() { _mm_pause(); }

}  // namespace headway
