#include "attention.h"

#include <math.h>

namespace headway {
namespace {

// The rows of queries that attend together: the softmax's running maximum and sum, and the sums.
struct Rows {
  int count, head_dim;
  Brain* queries;   // [count, head_dim], turned and scaled
  float* sums;      // [count, head_dim]
  Brain* weights;   // [count, BLOCK], of the block at hand
  float* maxima;    // [count]
  float* totals;    // [count, 16]
};

Rows rows_in(float* scratch, int count, int head_dim) {
  Rows rows;
  rows.count = count;
  rows.head_dim = head_dim;
  rows.sums = scratch;
  rows.totals = rows.sums + (size_t)count * head_dim;
  rows.queries = (Brain*)(rows.totals + (size_t)count * 16);
  rows.weights = (Brain*)((float*)rows.queries + (size_t)count * head_dim);
  rows.maxima = (float*)rows.weights + (size_t)count * BLOCK;
  return rows;
}

// A head's 16 values from `at` and from at + head_dim / 2 on, turned by their position.
HW_INLINE void rotate(const AttentionShape& shape, const float* x, const float* norm, float factor,
                      int position, int at, F16& first, F16& second) {
  const int half = shape.head_dim / 2;
  F16 a = load(x + at), b = load(x + at + half);
  if (norm != nullptr) {
    a = mul(mul(a, set(factor)), load(norm + at));
    b = mul(mul(b, set(factor)), load(norm + at + half));
  }
  const F16 c = load(shape.cosines + (size_t)position * half + at);
  const F16 s = load(shape.sines + (size_t)position * half + at);
  first = sub(mul(a, c), mul(b, s));
  second = add(mul(b, c), mul(a, s));
}

// 1 / root mean square of a head, where it is normalised.
HW_INLINE float norm_factor(const AttentionShape& shape, const float* x, const float* norm) {
  if (norm == nullptr) return 1.0f;
  F16 squares = zero();
  for (int d = 0; d < shape.head_dim; d += 16) squares = fma(load(x + d), load(x + d), squares);
  return 1.0f / sqrtf(reduce_add(squares) / (float)shape.head_dim + shape.rms_norm_eps);
}

// Scores of ROWS rows against the 32 keys of a block.
template <int ROWS>
HW_INLINE void score(const Rows& rows, int first, const u16* keys, F16 (&scores)[ROWS][2]) {
  HW_UNROLL for (int r = 0; r < ROWS; r++) scores[r][0] = scores[r][1] = zero();
  const Brain* queries = rows.queries + (size_t)first * rows.head_dim;
  for (int d = 0; d < rows.head_dim; d += 2, keys += 2 * BLOCK) {
    HW_UNROLL for (int h = 0; h < 2; h++) {
      const Pair pair = load_pair(keys + h * BLOCK);
      HW_UNROLL for (int r = 0; r < ROWS; r++) {
        scores[r][h] = dot_pair(scores[r][h], pair, queries + r * rows.head_dim + d);
      }
    }
  }
}

// From scores to weights that are relative to the maximum so far (Milakov and Gimelshein, "Online
// normalizer calculation for softmax", 2018).
HW_INLINE void weigh(const Rows& rows, int row, F16 a, F16 b, int visible) {
  if (visible < BLOCK) {
    const F16 nothing = set(-INFINITY);
    a = keep_first(a, visible, nothing);
    b = keep_first(b, visible - 16, nothing);
  }
  const float largest = reduce_max(max(a, b));
  float* totals = rows.totals + (size_t)row * 16;
  if (largest > rows.maxima[row]) {
    const F16 factor = exp(set(rows.maxima[row] - largest));
    store(totals, mul(load(totals), factor));
    float* sums = rows.sums + (size_t)row * rows.head_dim;
    for (int d = 0; d < rows.head_dim; d += 16) store(sums + d, mul(load(sums + d), factor));
    rows.maxima[row] = largest;
  }
  const F16 maximum = set(rows.maxima[row]);
  a = exp(sub(a, maximum));
  b = exp(sub(b, maximum));
  store(totals, add(add(load(totals), a), b));
  store_brains(rows.weights + (size_t)row * BLOCK, a);
  store_brains(rows.weights + (size_t)row * BLOCK + 16, b);
}

// Add the values of a block's first `pairs` pairs of tokens to the sums of ROWS rows.
template <int ROWS>
HW_INLINE void gather(const Rows& rows, int first, const u16* values, int pairs) {
  const int head_dim = rows.head_dim;
  const Brain* weights = rows.weights + (size_t)first * BLOCK;
  float* sums = rows.sums + (size_t)first * head_dim;
  for (int d = 0; d < head_dim; d += 32) {
    F16 totals[ROWS][2];
    HW_UNROLL for (int r = 0; r < ROWS; r++) {
      totals[r][0] = load(sums + r * head_dim + d);
      totals[r][1] = load(sums + r * head_dim + d + 16);
    }
    for (int t = 0; t < pairs; t++) {
      HW_UNROLL for (int h = 0; h < 2; h++) {
        const Pair pair = load_pair(values + (t * head_dim + d + h * 16) * 2);
        HW_UNROLL for (int r = 0; r < ROWS; r++) {
          totals[r][h] = dot_pair(totals[r][h], pair, weights + r * BLOCK + t * 2);
        }
      }
    }
    HW_UNROLL for (int r = 0; r < ROWS; r++) {
      store(sums + r * head_dim + d, totals[r][0]);
      store(sums + r * head_dim + d + 16, totals[r][1]);
    }
  }
}

// A block's part for ROWS rows; `visible`: of the block, what the tile's first position sees.
template <int ROWS>
__attribute__((noinline)) void attend_rows(const Rows& rows, int first, int group, const u16* keys,
                                           const u16* values, int visible) {
  F16 scores[ROWS][2];
  score<ROWS>(rows, first, keys, scores);
  HW_UNROLL for (int r = 0; r < ROWS; r++) {
    const int row = first + r;
    weigh(rows, row, scores[r][0], scores[r][1], visible + row / group);
  }
  const int seen = visible + (first + ROWS - 1) / group;
  gather<ROWS>(rows, first, values, seen >= BLOCK ? BLOCK / 2 : (seen + 1) / 2);
}

template <int ROWS = ROWS_SCORE>
HW_INLINE void choose_rows(int count, const Rows& rows, int first, int group, const u16* keys,
                           const u16* values, int visible) {
  if (count == ROWS) {
    attend_rows<ROWS>(rows, first, group, keys, values, visible);
  } else if constexpr (ROWS > 1) {
    choose_rows<ROWS - 1>(count, rows, first, group, keys, values, visible);
  }
}

}  // namespace

size_t attention_scratch(int group, int head_dim) {
  return (size_t)group * tile_positions(group) * (2 * head_dim + 16 + BLOCK + 1) + head_dim;
}

void write_kv(const AttentionShape& shape, const Tile& tile, int kv_head, float* scratch) {
  const int head_dim = shape.head_dim, half = head_dim / 2;
  for (int i = 0; i < tile.count; i++) {
    const int position = tile.position + i, token = position % BLOCK;
    const int block = shape.block_indices[tile.table + position / BLOCK];
    const float* row = shape.qkv + (tile.row + i) * shape.qkv_stride;
    const float* key = row + (shape.num_heads + kv_head) * head_dim;
    const float* value = row + (shape.num_heads + shape.num_kv_heads + kv_head) * head_dim;
    const float factor = norm_factor(shape, key, shape.k_norm);
    for (int d = 0; d < half; d += 16) {
      F16 first, second;
      rotate(shape, key, shape.k_norm, factor, position, d, first, second);
      store(scratch + d, first);
      store(scratch + half + d, second);
    }
    u16* keys = shape.keys(block, kv_head) + token * 2;
    for (int d = 0; d < head_dim; d++) {
      keys[d / 2 * (2 * BLOCK) + d % 2] = to_bf16(scratch[d]);
    }
    u16* values = shape.values(block, kv_head) + token / 2 * (2 * head_dim) + token % 2;
    for (int d = 0; d < head_dim; d++) values[d * 2] = to_bf16(value[d]);
    if (token % 2 == 0 && i + 1 == tile.count) {
      // The other half of the pair is multiplied by a weight of zero: it must be a number.
      for (int d = 0; d < head_dim; d++) values[d * 2 + 1] = 0;
    }
  }
}

void attend(const AttentionShape& shape, const Tile& tile, int kv_head, const Activations& out,
            float* scratch, const u16* next) {
  const int head_dim = shape.head_dim, half = head_dim / 2, group = shape.group();
  const Rows rows = rows_in(scratch, tile.count * group, head_dim);
  const F16 scale = set(1.0f / sqrtf((float)head_dim));
  for (int row = 0; row < rows.count; row++) {
    const int position = tile.position + row / group, head = kv_head * group + row % group;
    const float* query = shape.qkv + (tile.row + row / group) * shape.qkv_stride + head * head_dim;
    const float factor = norm_factor(shape, query, shape.q_norm);
    Brain* queries = rows.queries + (size_t)row * head_dim;
    for (int d = 0; d < half; d += 16) {
      F16 first, second;
      rotate(shape, query, shape.q_norm, factor, position, d, first, second);
      store_brains(queries + d, mul(first, scale));
      store_brains(queries + half + d, mul(second, scale));
    }
    for (int d = 0; d < head_dim; d += 16) store(rows.sums + row * head_dim + d, zero());
    store(rows.totals + row * 16, zero());
    rows.maxima[row] = -INFINITY;
  }
  const int32_t* table = shape.block_indices + tile.table;
  const int blocks = (tile.position + tile.count - 1) / BLOCK + 1;
  const int lines = (int)(shape.head_bytes() / 64);
  for (int b = 0; b < blocks; b++) {
    const u16* keys = shape.keys(table[b], kv_head);
    const u8* ahead = (const u8*)(b + 1 < blocks ? shape.keys(table[b + 1], kv_head) : next);
    for (int line = 0; line < 2 * lines; line++) prefetch(ahead + line * 64);
    const int visible = tile.position - b * BLOCK + 1;
    for (int first = 0; first < rows.count; first += ROWS_SCORE) {
      const int left = rows.count - first;
      choose_rows(left < ROWS_SCORE ? left : ROWS_SCORE, rows, first, group, keys,
                  shape.values(table[b], kv_head), visible);
    }
  }
  for (int row = 0; row < rows.count; row++) {
    const F16 inverse = set(1.0f / reduce_add(load(rows.totals + row * 16)));
    const float* sums = rows.sums + (size_t)row * head_dim;
    const int head = kv_head * group + row % group;
    for (int d = 0; d < head_dim; d += GROUP) {
      out.put(tile.row + row / group, (head * head_dim + d) / GROUP, mul(load(sums + d), inverse),
              mul(load(sums + d + 16), inverse));
    }
  }
}

}  // namespace headway
