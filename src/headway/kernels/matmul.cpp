#include "matmul.h"

namespace headway {
namespace {

// Float sums of ROWS rows and HALVES halves of a panel, from `half` on.
template <int ROWS>
using Totals = F16[ROWS][HALVES];

template <int FORMAT, int ROWS>
HW_INLINE void finish_group(const u8* group, int half, const GroupMeta* meta, size_t stride,
                            F16 (&products)[ROWS][HALVES], Totals<ROWS>& totals, bool scaled) {
  HW_UNROLL for (int h = 0; h < HALVES; h++) {
    const u8* scales = group + scales_at(FORMAT) + (half + h) * 32;
    const F16 scale = load_half(scales);
    HW_UNROLL for (int r = 0; r < ROWS; r++) {
      const F16 factor = scaled ? mul(scale, set(meta[r * stride].scale)) : scale;
      totals[r][h] = fma(products[r][h], factor, totals[r][h]);
    }
    if constexpr (FORMAT == INT4) {
      const F16 minimum = load_half(scales + 64);
      HW_UNROLL for (int r = 0; r < ROWS; r++) {
        totals[r][h] = fma(minimum, set(meta[r * stride].scaled_sum), totals[r][h]);
      }
    }
  }
}

template <int FORMAT, int ROWS>
HW_INLINE void add_int8_group(const u8* group, int half, const i8* x, size_t inputs,
                              const GroupMeta* meta, size_t stride, Totals<ROWS>& totals) {
  Sum<FORMAT> sums[ROWS][HALVES];
  HW_UNROLL for (int r = 0; r < ROWS; r++) {
    HW_UNROLL for (int h = 0; h < HALVES; h++) begin(sums[r][h], meta[r * stride]);
  }
  HW_UNROLL for (int step = 0; step < 8; step++) {
    Weights<FORMAT> weights[HALVES];
    HW_UNROLL for (int h = 0; h < HALVES; h++) {
      weights[h] = load_weights<FORMAT>(group, half + h, step);
    }
    HW_UNROLL for (int r = 0; r < ROWS; r++) {
      HW_UNROLL for (int h = 0; h < HALVES; h++) {
        dot(sums[r][h], weights[h], x + r * inputs + step * 4);
      }
    }
  }
  F16 products[ROWS][HALVES];
  HW_UNROLL for (int r = 0; r < ROWS; r++) {
    HW_UNROLL for (int h = 0; h < HALVES; h++) products[r][h] = to_float(total(sums[r][h]));
  }
  finish_group<FORMAT, ROWS>(group, half, meta, stride, products, totals, true);
}

template <int FORMAT, int ROWS>
HW_INLINE void add_bf16_group(const u8* group, int half, const Brain* x, size_t inputs,
                              const GroupMeta* meta, size_t stride, Totals<ROWS>& totals) {
  F16 products[ROWS][HALVES];
  HW_UNROLL for (int r = 0; r < ROWS; r++) {
    HW_UNROLL for (int h = 0; h < HALVES; h++) products[r][h] = zero();
  }
  HW_UNROLL for (int pair = 0; pair < GROUP / 2; pair++) {
    HW_UNROLL for (int h = 0; h < HALVES; h++) {
      const Pair weights = weight_pair<FORMAT>(group, half + h, pair);
      HW_UNROLL for (int r = 0; r < ROWS; r++) {
        products[r][h] = dot_pair(products[r][h], weights, x + r * inputs + pair * 2);
      }
    }
  }
  finish_group<FORMAT, ROWS>(group, half, meta, stride, products, totals, false);
}

template <int FORMAT, bool IS_INT8, int ROWS>
__attribute__((noinline)) void multiply_some(const u8* panel, const Activations& x, int first,
                                             float (*out)[PANEL], const u8* ahead, int lines) {
  const int groups = x.inputs / GROUP;
  const size_t inputs = x.inputs, stride = groups;
  for (int half = 0; half < 2; half += HALVES) {
    const u8* group = panel;
    const GroupMeta* meta = x.meta + first * stride;
    Totals<ROWS> totals;
    HW_UNROLL for (int r = 0; r < ROWS; r++) {
      HW_UNROLL for (int h = 0; h < HALVES; h++) totals[r][h] = zero();
    }
    for (int g = 0; g < groups; g++, group += group_bytes(FORMAT), meta++) {
      if (half == 0) {
        for (int line = 0; line < lines; line++) prefetch(ahead + line * 64);
        ahead += group_bytes(FORMAT);
      }
      if constexpr (IS_INT8) {
        const i8* values = x.quantised + first * inputs + g * GROUP;
        add_int8_group<FORMAT, ROWS>(group, half, values, inputs, meta, stride, totals);
      } else {
        const Brain* values = x.brains + first * inputs + g * GROUP;
        add_bf16_group<FORMAT, ROWS>(group, half, values, inputs, meta, stride, totals);
      }
    }
    HW_UNROLL for (int r = 0; r < ROWS; r++) {
      HW_UNROLL for (int h = 0; h < HALVES; h++) store(out[r] + (half + h) * 16, totals[r][h]);
    }
  }
}

constexpr int most_rows(int format, bool is_int8) {
  return !is_int8 ? ROWS_FLOAT : format == INT4 ? ROWS_INT4 : ROWS_INT8;
}

template <int FORMAT, bool IS_INT8, int ROWS = most_rows(FORMAT, IS_INT8)>
HW_INLINE void choose_rows(int rows, const u8* panel, const Activations& x, int first,
                           float (*out)[PANEL], const u8* ahead, int lines) {
  if (rows == ROWS) {
    multiply_some<FORMAT, IS_INT8, ROWS>(panel, x, first, out, ahead, lines);
  } else if constexpr (ROWS > 1) {
    choose_rows<FORMAT, IS_INT8, ROWS - 1>(rows, panel, x, first, out, ahead, lines);
  }
}

}  // namespace

int rows_at_once(int format, bool is_int8) { return most_rows(format, is_int8); }

void multiply_rows(const hw_matrix& matrix, const u8* panel, const Activations& x, int first,
                   int rows, float (*out)[PANEL], const u8* ahead, int lines) {
  const bool is_int8 = x.brains == nullptr;
  if (matrix.format == INT4) {
    if (is_int8) {
      choose_rows<INT4, true>(rows, panel, x, first, out, ahead, lines);
    } else {
      choose_rows<INT4, false>(rows, panel, x, first, out, ahead, lines);
    }
  } else {
    if (is_int8) {
      choose_rows<INT8, true>(rows, panel, x, first, out, ahead, lines);
    } else {
      choose_rows<INT8, false>(rows, panel, x, first, out, ahead, lines);
    }
  }
}

}  // namespace headway
