// Attention over the blocks of a paged KV cache, and writing to it.
//
// A block of a layer and KV head holds the keys of 32 tokens as [head_dim / 2][32][2] and their
// values as [16][head_dim][2], bfloat16s: pairs lie as products take them, and nothing is summed
// across lanes.
#pragma once
#include "headway.h"
#include "matmul.h"
#include "simd.h"

namespace headway {

// Positions next to each other of one sequence; they are computed together.
struct Tile {
  int row;       // of the first, in the step
  int count;     // of them
  int position;  // of the first
  int table;     // where the sequence's block table begins in block_indices
};

struct AttentionShape {
  int num_heads, num_kv_heads, head_dim;
  float rms_norm_eps;
  size_t block_bytes, layer_offset;  // in the pool: from block to block, and to this layer
  const float *q_norm, *k_norm;      // null where the model has none
  const float *cosines, *sines;      // [positions, head_dim / 2]
  const float* qkv;                  // [rows, qkv_stride]
  size_t qkv_stride;
  const int32_t* block_indices;
  u8* pool;

  int group() const { return num_heads / num_kv_heads; }
  size_t head_bytes() const { return (size_t)BLOCK * head_dim * 2; }
  u16* keys(int block, int kv_head) const {
    return (u16*)(pool + block * block_bytes + layer_offset + kv_head * 2 * head_bytes());
  }
  u16* values(int block, int kv_head) const {
    return (u16*)((u8*)keys(block, kv_head) + head_bytes());
  }
};

// Positions in a tile, which begins at a multiple of that: so many that their rows of queries keep a
// kernel busy, and an even number, since a pair of values is written by one thread.
static inline int tile_positions(int group) { return group == 1 ? 8 : group <= 3 ? 4 : 2; }
// Floats that a thread needs to attend with.
size_t attention_scratch(int group, int head_dim);

// Write the keys and values of a tile for one KV head.
void write_kv(const AttentionShape& shape, const Tile& tile, int kv_head, float* scratch);

// Attend with the queries of a tile that share a KV head, whose keys and values up to the tile's
// end have been written. `next` is what this thread will probably attend to next.
void attend(const AttentionShape& shape, const Tile& tile, int kv_head, const Activations& out,
            float* scratch, const u16* next);

}  // namespace headway
