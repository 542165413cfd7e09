// The small operators: looking up an embedding, normalising a row, the likeliest token.
#pragma once
#include <math.h>

#include "matmul.h"
#include "simd.h"

namespace headway {

static inline float half_to_float(const u8* p) {
  alignas(64) u8 halves[32] = {};
  alignas(64) float floats[16];
  memcpy(halves, p, 2);
  store(floats, load_half(halves));
  return floats[0];
}

// One output of a packed matrix: a row of the embedding.
static inline void unpack_row(const hw_matrix& matrix, int output, float* row) {
  const u8* group = matrix.data + output / PANEL * panel_bytes(matrix);
  const int c = output % PANEL, half = c / 16, lane = c % 16;
  for (int g = 0; g < matrix.inputs / GROUP; g++, group += group_bytes(matrix.format)) {
    const u8* scales = group + scales_at(matrix.format);
    const float scale = half_to_float(scales + c * 2);
    for (int i = 0; i < GROUP; i++) {
      const int chunk = i / 8, place = i % 8;
      float value;
      if (matrix.format == INT4) {
        // Bits 4j … of 16 are the inputs 2j and, in the next 16, 2j + 1.
        const u8* p = group + (chunk * 2 + half) * 64 + lane * 4 + place % 2 * 2 + place / 4;
        const float minimum = half_to_float(scales + 64 + c * 2);
        value = scale * (float)(*p >> (place / 2 % 2 * 4) & 15) + minimum;
      } else {
        // Two steps of four inputs: 0 4 1 5, then 2 6 3 7.
        const int step = chunk * 2 + place / 2 % 2, byte = place % 2 * 2 + place / 4;
        value = scale * (float)(group[(step * 2 + half) * 64 + lane * 4 + byte] - 128);
      }
      row[g * GROUP + i] = value;
    }
  }
}

// x / root mean square · weight, as the next product takes it.
static inline void normalise(const float* x, const float* weight, float epsilon,
                             const Activations& out, int row) {
  F16 a = zero(), b = zero();
  for (int i = 0; i < out.inputs; i += 32) {
    const F16 first = load(x + i), second = load(x + i + 16);
    a = fma(first, first, a);
    b = fma(second, second, b);
  }
  const F16 factor = set(1.0f / sqrtf(reduce_add(add(a, b)) / (float)out.inputs + epsilon));
  for (int i = 0; i < out.inputs; i += 32) {
    out.put(row, i / GROUP, mul(mul(load(x + i), factor), load(weight + i)),
            mul(mul(load(x + i + 16), factor), load(weight + i + 16)));
  }
}

// The largest logit so far of every lane of a panel, and the panel that it is in.
struct Best {
  float value[PANEL];
  float panel[PANEL];  // whole numbers: panels are few

  static constexpr float NONE = 1e9f;

  void clear() {
    for (int i = 0; i < PANEL; i++) value[i] = -INFINITY, panel[i] = NONE;
  }
  // In any order of the panels: of equal logits the first panel's counts. NaNs do not count.
  HW_INLINE void see(int lane, F16 logits, float place) {
    const F16 known = load(value + lane), where = load(panel + lane), here = set(place);
    logits = max(logits, set(-INFINITY));  // of a NaN: the second
    const F16 equal = where_less(logits, known, where, min(where, here));
    store(panel + lane, where_less(known, logits, here, equal));
    store(value + lane, max(logits, known));
  }
};

// The likeliest of what some threads have seen; its logit is NaN if they have seen no number.
static inline void likeliest(const Best* best, size_t stride, int count, int32_t* token,
                             float* maximum) {
  *token = 0;
  *maximum = NAN;
  for (int i = 0; i < count; i++, best += stride) {
    for (int lane = 0; lane < PANEL; lane++) {
      if (best->value[lane] == -INFINITY) continue;
      const int32_t id = (int32_t)best->panel[lane] * PANEL + lane;
      const float value = best->value[lane];
      if (!(value <= *maximum) || (value == *maximum && id < *token)) {
        *token = id;
        *maximum = value;
      }
    }
  }
}

}  // namespace headway
