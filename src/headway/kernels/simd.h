// Vectors of 16 lanes, in the terms that the kernels are written in; one file a path says how.
//
//   F16             16 floats: zero set load store add sub mul div max min fma exp round_to_int …
//   I16             16 int32
//   Weights<f>      16 outputs × 4 inputs of a packed matrix (headway/models/packing.py)
//   Sum<f>          integer sums of 16 outputs: begin, dot, total
//   Pair, Brain     16 lanes × 2 inputs, and the numbers that they are multiplied by: bfloat16s
//                   where the processor multiplies them, else floats; dot_pair
//
// What must hold: an operation on a lane depends on that lane alone, and the reductions over lanes
// have the one order that is written in them. Then the result of a row does not depend on how many
// rows a kernel computes at once. Integer sums are exact in every order.
#pragma once
#include <stdint.h>
#include <string.h>

#include "headway.h"

#define HW_INLINE inline __attribute__((always_inline))
#define HW_UNROLL _Pragma("GCC unroll 16")

namespace headway {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using i8 = int8_t;

// Tokens in a KV block, inputs in a group of weights, outputs in a panel.
constexpr int BLOCK = 32, GROUP = 32, PANEL = 32;
// Of the packed formats: bytes of a group of a panel, and where in it the scales are.
constexpr int INT4 = HW_INT4, INT8 = HW_INT8;
constexpr int group_bytes(int format) { return format == INT4 ? 640 : 1088; }
constexpr int scales_at(int format) { return format == INT4 ? 512 : 1024; }

// What the integer products need to know of a group of activations.
struct GroupMeta {
  float scale;       // value = scale · quantised
  float scaled_sum;  // scale · sum of the quantised
  int32_t bias;      // −128 · that sum: what weights that are stored + 128 add too much
  int32_t unused;
};

static HW_INLINE u16 to_bf16(float x) {
  u32 bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (u16)(bits >> 16 | 0x40);  // a NaN stays one
  return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static HW_INLINE float from_bf16(u16 x) {
  const u32 bits = (u32)x << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace headway

#if defined(HEADWAY_PATH_AVX512BF16)
#define HW_PATH_NAME "avx512bf16"
#include "simd_avx512.h"
#elif defined(HEADWAY_PATH_AVX512)
#define HW_PATH_NAME "avx512"
#include "simd_avx512.h"
#elif defined(HEADWAY_PATH_AVX2)
#define HW_PATH_NAME "avx2"
#include "simd_avx2.h"
#else
#define HW_PATH_NAME "portable"
#include "simd_portable.h"
#endif

namespace headway {

// e^x to about 1 ulp, 0 below −87, NaN of a NaN; the same on every path. Cephes' polynomial.
static HW_INLINE F16 exp(F16 x) {
  const F16 least = set(-87.0f);
  const F16 clamped = max(least, min(set(88.0f), x));  // of a NaN: the second
  const F16 n = round(mul(clamped, set(1.44269504f)));
  F16 r = fma(n, set(-0.693359375f), clamped);
  r = fma(n, set(2.12194440e-4f), r);
  F16 p = set(1.9875691500e-4f);
  p = fma(p, r, set(1.3981999507e-3f));
  p = fma(p, r, set(8.3334519073e-3f));
  p = fma(p, r, set(4.1665795894e-2f));
  p = fma(p, r, set(1.6666665459e-1f));
  p = fma(p, r, set(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set(1.0f)));
  return where_less(x, least, zero(), mul(p, power_of_two(n)));
}

// Gate · sigmoid(gate) · up.
static HW_INLINE F16 swiglu(F16 gate, F16 up) {
  return mul(div(gate, add(set(1.0f), exp(sub(zero(), gate)))), up);
}

}  // namespace headway
