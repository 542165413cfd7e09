// Products of activations with packed matrices, panel by panel.
//
// A product of one row and one output goes through the groups of 32 inputs in order:
//
//   int8:  y += float(sum of quantised products) · (weight scale · activation scale)
//   bf16:  t  = products of the group, pair by pair, in float32;  y += t · weight scale
//   then, where the format has minima:  y += minimum · sum of the group's activations
//
// in every kernel, however many rows it computes at once. So the bits of a row's result depend on
// that row alone.
#pragma once
#include "headway.h"
#include "simd.h"

namespace headway {

// Rows of activations as products read them; `quantised` or `brains`, as the precision is.
struct Activations {
  i8* quantised;    // [rows, inputs], the inputs of every 8 in the order of the packed weights
  Brain* brains;    // [rows, inputs]
  GroupMeta* meta;  // [rows, inputs / 32]
  int inputs;

  // Take 32 inputs of a row. A row with a NaN is multiplied to NaNs, and so, where activations are
  // integers, is one with an infinity.
  HW_INLINE void put(int row, int group, F16 x, F16 y) const {
    GroupMeta& about = meta[(size_t)row * (inputs / GROUP) + group];
    const size_t place = (size_t)row * inputs + group * GROUP;
    if (brains != nullptr) {
      store_brains(brains + place, x);
      store_brains(brains + place + 16, y);
      about.scaled_sum = reduce_add(add(as_brains(x), as_brains(y)));
      return;
    }
    float largest = reduce_max(max(magnitude(x), magnitude(y)));
    const F16 inverse = set(largest > 1e-30f ? 127.0f / largest : 0.0f);
    I16 a = to_int(round(mul(x, inverse))), b = to_int(round(mul(y, inverse)));
    if (!(largest < __builtin_inff()) || has_nan(add(x, y))) {
      largest = __builtin_nanf("");
      a = b = to_int(zero());
    }
    store_quantised(quantised + place, a, b);
    const int sum = reduce_add(a, b);
    about.scale = largest / 127.0f;
    about.scaled_sum = about.scale * (float)sum;
    about.bias = -128 * sum;
  }
};

// Rows that are computed at once.
int rows_at_once(int format, bool is_int8);

// out[row][0 … 31] = the outputs of a panel for up to rows_at_once rows from `first` on. Meanwhile
// `lines` cache lines from `ahead` on are fetched for every group, which are `stride` bytes apart.
void multiply_rows(const hw_matrix& matrix, const u8* panel, const Activations& x, int first,
                   int rows, float (*out)[PANEL], const u8* ahead, int lines);

static HW_INLINE size_t panel_bytes(const hw_matrix& matrix) {
  return (size_t)group_bytes(matrix.format) * (matrix.inputs / GROUP);
}
static HW_INLINE int num_panels(const hw_matrix& matrix) { return matrix.outputs / PANEL; }

// take(row, outputs 0 … 15, outputs 16 … 31) for the first `rows` rows, of one panel.
template <class Take>
static HW_INLINE void multiply(const hw_matrix& matrix, int panel, const Activations& x, int rows,
                               Take&& take) {
  alignas(64) float out[8][PANEL];
  const size_t bytes = panel_bytes(matrix);
  const u8* data = matrix.data + panel * bytes;
  const int most = rows_at_once(matrix.format, x.brains == nullptr);
  const int parts = (rows + most - 1) / most;
  // The next panel is fetched while the rows after the first few are computed: those bring in this
  // panel themselves.
  const bool has_next = panel + 1 < num_panels(matrix);
  const int all_lines = group_bytes(matrix.format) / 64;
  const int lines = parts > 1 ? (all_lines + parts - 2) / (parts - 1) : 0;
  int first = 0;
  for (int part = 0; part < parts; part++) {
    const int count = (rows - first + parts - part - 1) / (parts - part);
    const int line = (part - 1) * lines;
    const int left = has_next && part > 0 && line < all_lines
                         ? (lines < all_lines - line ? lines : all_lines - line)
                         : 0;
    multiply_rows(matrix, data, x, first, count, out, data + bytes + line * 64, left);
    for (int row = 0; row < count; row++) take(first + row, load(out[row]), load(out[row] + 16));
    first += count;
  }
}

}  // namespace headway
