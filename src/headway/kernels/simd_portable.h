// Any processor that GCC or clang know vectors of 16 bytes on: 16 lanes are four of them.
#pragma once
#include <math.h>

namespace headway {

constexpr int ROWS_INT4 = 4, ROWS_INT8 = 4, ROWS_FLOAT = 4, HALVES = 1;
constexpr int ROWS_SCORE = 3;

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

struct F16 {
  Float4 v[4];
};
struct I16 {
  Int4 v[4];
};

#define HW_EACH(result, expression)                       \
  ({                                                      \
    result each_;                                         \
    HW_UNROLL for (int i = 0; i < 4; i++) each_.v[i] = (expression); \
    each_;                                                \
  })

static HW_INLINE F16 set(float x) { return HW_EACH(F16, (Float4{x, x, x, x})); }
static HW_INLINE F16 zero() { return set(0.0f); }
static HW_INLINE F16 load(const float* p) {
  F16 x;
  memcpy(&x, p, 64);
  return x;
}
static HW_INLINE void store(float* p, F16 x) { memcpy(p, &x, 64); }
static HW_INLINE float half_to_float(u16 half) {
  const u32 sign = (u32)(half & 0x8000) << 16, rest = half & 0x7fff;
  u32 bits = rest << 13;
  float value;
  memcpy(&value, &bits, 4);
  value *= 0x1p112f;  // the exponents' biases are 15 and 127; denormals come out right, too
  memcpy(&bits, &value, 4);
  if (rest >= 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}
static HW_INLINE F16 load_half(const u8* p) {
  u16 halves[16];
  memcpy(halves, p, 32);
  F16 x;
  for (int i = 0; i < 16; i++) x.v[i / 4][i % 4] = half_to_float(halves[i]);
  return x;
}
static HW_INLINE F16 add(F16 x, F16 y) { return HW_EACH(F16, x.v[i] + y.v[i]); }
static HW_INLINE F16 sub(F16 x, F16 y) { return HW_EACH(F16, x.v[i] - y.v[i]); }
static HW_INLINE F16 mul(F16 x, F16 y) { return HW_EACH(F16, x.v[i] * y.v[i]); }
static HW_INLINE F16 div(F16 x, F16 y) { return HW_EACH(F16, x.v[i] / y.v[i]); }
static HW_INLINE Float4 choose(Int4 mask, Float4 then, Float4 other) {
  return (Float4)(((Int4)then & mask) | ((Int4)other & ~mask));
}
static HW_INLINE F16 max(F16 x, F16 y) {
  return HW_EACH(F16, choose(x.v[i] > y.v[i], x.v[i], y.v[i]));
}
static HW_INLINE F16 min(F16 x, F16 y) {
  return HW_EACH(F16, choose(x.v[i] < y.v[i], x.v[i], y.v[i]));
}
// x · y + z; rounded once where the processor can, which it then always does.
static HW_INLINE F16 fma(F16 x, F16 y, F16 z) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__FP_FAST_FMAF)
  F16 result;
  HW_UNROLL for (int i = 0; i < 4; i++) {
    HW_UNROLL for (int j = 0; j < 4; j++) {
      result.v[i][j] = __builtin_fmaf(x.v[i][j], y.v[i][j], z.v[i][j]);
    }
  }
  return result;
#else
  return HW_EACH(F16, x.v[i] * y.v[i] + z.v[i]);
#endif
}
static HW_INLINE F16 magnitude(F16 x) {
  const Int4 mask = {0x7fffffff, 0x7fffffff, 0x7fffffff, 0x7fffffff};
  return HW_EACH(F16, (Float4)((Int4)x.v[i] & mask));
}
static HW_INLINE F16 round(F16 x) {
  // Adding and taking away 1.5 · 2^23 rounds to even; for values below 2^22, as they all are here.
  const Float4 big = {12582912.0f, 12582912.0f, 12582912.0f, 12582912.0f};
  return HW_EACH(F16, (x.v[i] + big) - big);
}
static HW_INLINE I16 to_int(F16 x) { return HW_EACH(I16, __builtin_convertvector(x.v[i], Int4)); }
static HW_INLINE F16 to_float(I16 x) { return HW_EACH(F16, __builtin_convertvector(x.v[i], Float4)); }
static HW_INLINE F16 power_of_two(F16 n) {
  const I16 whole = to_int(n);
  return HW_EACH(F16, (Float4)((whole.v[i] + 127) << 23));
}
static HW_INLINE F16 where_less(F16 x, F16 y, F16 then, F16 other) {
  return HW_EACH(F16, choose(x.v[i] < y.v[i], then.v[i], other.v[i]));
}
static HW_INLINE F16 keep_first(F16 x, int count, F16 fill) {
  const Int4 lanes = {0, 1, 2, 3};
  return HW_EACH(F16, choose(lanes + 4 * i < count, x.v[i], fill.v[i]));
}
static HW_INLINE bool has_nan(F16 x) {
  Int4 any = {};
  for (int i = 0; i < 4; i++) any |= x.v[i] != x.v[i];
  return (any[0] | any[1] | any[2] | any[3]) != 0;
}
static HW_INLINE float reduce_add(F16 x) {
  const Float4 low = x.v[0] + x.v[2], high = x.v[1] + x.v[3], four = low + high;
  return (four[0] + four[2]) + (four[1] + four[3]);
}
static HW_INLINE float reduce_max(F16 x) {
  const F16 y = max(x, F16{{x.v[2], x.v[3], x.v[2], x.v[3]}});
  const Float4 four = choose(y.v[0] > y.v[1], y.v[0], y.v[1]);
  const float a = four[0] > four[2] ? four[0] : four[2], b = four[1] > four[3] ? four[1] : four[3];
  return a > b ? a : b;
}
static HW_INLINE int reduce_add(I16 x, I16 y) {
  const Int4 four = x.v[0] + x.v[1] + x.v[2] + x.v[3] + y.v[0] + y.v[1] + y.v[2] + y.v[3];
  return four[0] + four[1] + four[2] + four[3];
}
static HW_INLINE void store_quantised(i8* p, I16 x, I16 y) {
  constexpr int order[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  for (int i = 0; i < 16; i++) {
    const int from = i / 8 * 8 + order[i % 8];
    p[i] = (i8)x.v[from / 4][from % 4];
    p[i + 16] = (i8)y.v[from / 4][from % 4];
  }
}

// ---- integer products: 16 outputs × 4 inputs, a byte of each 32-bit lane after the other

template <int FORMAT>
struct Weights {
  I16 four;
};
template <int FORMAT>
struct Sum {
  I16 sum;
};

static HW_INLINE I16 load_ints(const u8* p) {
  I16 x;
  memcpy(&x, p, 64);
  return x;
}
template <int FORMAT>
static HW_INLINE Weights<FORMAT> load_weights(const u8* group, int half, int step) {
  if constexpr (FORMAT == INT4) {
    const I16 x = load_ints(group + (step / 2 * 2 + half) * 64);
    const int shift = step % 2 * 4;
    return {HW_EACH(I16, (x.v[i] >> shift) & 0x0f0f0f0f)};
  } else {
    return {load_ints(group + (step * 2 + half) * 64)};
  }
}
template <int FORMAT>
static HW_INLINE void begin(Sum<FORMAT>& sum, const GroupMeta& meta) {
  const int32_t bias = FORMAT == INT8 ? meta.bias : 0;
  sum.sum = HW_EACH(I16, (Int4{bias, bias, bias, bias}));
}
template <int FORMAT>
static HW_INLINE void dot(Sum<FORMAT>& sum, const Weights<FORMAT>& w, const i8* activations) {
  const int32_t a = activations[0], b = activations[1], c = activations[2], d = activations[3];
  HW_UNROLL for (int i = 0; i < 4; i++) {
    const Int4 x = w.four.v[i];
    sum.sum.v[i] += (x & 255) * a + ((x >> 8) & 255) * b + ((x >> 16) & 255) * c + ((x >> 24) & 255) * d;
  }
}
template <int FORMAT>
static HW_INLINE I16 total(const Sum<FORMAT>& sum) {
  return sum.sum;
}

// ---- products with bfloat16 on one side, in float32

// There is no instruction that multiplies bfloat16s: what would be rounded to them stays float.
using Brain = float;
struct Pair {
  F16 even, odd;
};

static HW_INLINE void store_brains(Brain* p, F16 x) { store(p, x); }
static HW_INLINE F16 as_brains(F16 x) { return x; }

static HW_INLINE Pair load_pair(const u16* p) {
  I16 x;
  memcpy(&x, p, 64);
  return {HW_EACH(F16, (Float4)(x.v[i] << 16)), HW_EACH(F16, (Float4)(x.v[i] & (int)0xffff0000))};
}
template <int FORMAT>
static HW_INLINE Pair weight_pair(const u8* group, int half, int pair) {
  const int chunk = pair / 4, place = pair % 4;
  if constexpr (FORMAT == INT4) {
    const I16 x = load_ints(group + (chunk * 2 + half) * 64);
    const int shift = 4 * place;
    return {to_float(HW_EACH(I16, (x.v[i] >> shift) & 15)),
            to_float(HW_EACH(I16, (x.v[i] >> (shift + 16)) & 15))};
  } else {
    const I16 x = load_ints(group + ((chunk * 2 + place % 2) * 2 + half) * 64);
    const int shift = place / 2 * 8;
    return {to_float(HW_EACH(I16, ((x.v[i] >> shift) & 255) - 128)),
            to_float(HW_EACH(I16, ((x.v[i] >> (shift + 16)) & 255) - 128))};
  }
}
static HW_INLINE F16 dot_pair(F16 sum, const Pair& x, const Brain* y) {
  return fma(x.odd, set(y[1]), fma(x.even, set(y[0]), sum));
}

static HW_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
static HW_INLINE void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace headway
