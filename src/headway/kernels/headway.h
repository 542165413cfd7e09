// The plain C interface of the kernels: all that Python knows of them (headway/kernels/library.py).
//
// One library is built for each instruction set ("path"); all of them export the same functions.
// Nothing is read or written outside the arrays that are given here: a step's arrays are checked
// before anything is computed.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// To be raised with every change of this file or of the packed layout.
enum { HW_VERSION = 1 };

enum hw_format {
  HW_INT4 = 4,  // groups of 32 along the input: 0 … 15, a float16 scale and a float16 minimum
  HW_INT8 = 8,  // groups of 32 along the input: −128 … 127, stored + 128, and a float16 scale
};

enum hw_precision {
  HW_PRECISION_INT8 = 0,  // activations in groups of 32, −127 … 127, with a float scale
  HW_PRECISION_BF16 = 1,  // activations rounded to bfloat16
};

// A packed matrix [outputs, inputs]; headway/models/packing.py has the layout.
typedef struct {
  const uint8_t* data;
  int32_t outputs;  // a multiple of 32: rounded up, the rows behind the end are zero
  int32_t inputs;   // a multiple of 32
  int32_t format;   // hw_format
  int32_t unused;
} hw_matrix;

typedef struct {
  int32_t num_layers, hidden_size, intermediate_size, vocab_size;
  int32_t num_heads, num_kv_heads, head_dim, max_model_len;
  float rms_norm_eps;
  int32_t precision;    // hw_precision
  int32_t num_threads;  // that compute, the caller's included
  int32_t max_tokens;   // that a step may have
} hw_shape;

typedef struct {
  const float* attn_norm;  // [hidden_size]
  const float* ffn_norm;   // [hidden_size]
  const float* qkv_bias;   // [q_size + 2 kv_size], or null
  const float* q_norm;     // [head_dim], or null
  const float* k_norm;     // [head_dim], or null
  hw_matrix qkv;           // queries, keys, values: [q_size + 2 kv_size, hidden_size]
  hw_matrix attn_output;   // [hidden_size, q_size]
  hw_matrix gate_up;       // 16 rows of gate, then the same 16 of up, and so on
  hw_matrix down;          // [hidden_size, intermediate_size]
} hw_layer;

typedef struct {
  const hw_layer* layers;    // [num_layers]
  hw_matrix embedding;       // [vocab_size, hidden_size]
  hw_matrix lm_head;         // [vocab_size, hidden_size]; the embedding where they are tied
  const float* output_norm;  // [hidden_size]
  const float* cosines;      // [max_model_len, head_dim / 2]
  const float* sines;        // [max_model_len, head_dim / 2]
} hw_weights;

// A block holds 32 tokens: for each layer and KV head its keys, then its values, in bfloat16;
// hw_block_bytes says how much that is. Blocks follow each other in the pool.
typedef struct {
  uint8_t* pool;
  int32_t num_blocks;
} hw_cache;

// T tokens of S sequences, laid end to end. A step goes through stages: one a layer, then the head.
typedef struct {
  int32_t num_tokens;    // T
  int32_t num_seqs;      // S
  int32_t num_blocks;    // B
  int32_t num_sampled;   // R
  int32_t num_logits;    // L
  int32_t first_stage;   // 0, or where the step was stopped
  int32_t last_stage;    // stop before this one; num_layers + 1 = go to the end
  const int32_t* token_ids;      // [T]
  const int32_t* past_lens;      // [S] tokens of each sequence that are in the cache
  const int32_t* begins;         // [S + 1] prefix sums of each sequence's tokens
  const int32_t* block_indices;  // [B] block tables, laid end to end
  const int32_t* block_begins;   // [S + 1] prefix sums of their lengths
  const int32_t* sample_rows;    // [R] tokens after which the next is asked for
  const int32_t* logit_rows;     // [L] those of them whose logits are wanted, ascending
  float* hidden;                 // [T, hidden_size] what the step holds between two stages
  int32_t* tokens;               // [R] the likeliest next tokens, the smallest among equals
  float* maxima;                 // [R] their logits; NaN where all logits of the row are
  float* logits;                 // [L, vocab_size]
  const int32_t* stop;           // looked at after each stage: other than 0 = stop there
} hw_step;

typedef struct hw_model hw_model;

int32_t hw_version(void);
// The path's name, as HEADWAY_KERNELS has it.
const char* hw_path(void);

// Null if there is no memory, or if a shape is not supported. Keeps the pointers.
hw_model* hw_model_new(const hw_shape* shape, const hw_weights* weights);
// Ends the threads. Not while a step runs.
void hw_model_free(hw_model* model);
// Bytes of a block.
int64_t hw_block_bytes(const hw_shape* shape);
// Bytes that the model takes beside weights and pool, once steps of max_tokens have run.
int64_t hw_scratch_bytes(const hw_shape* shape);
// Bind every thread to a processor of its own, or to none in particular.
void hw_model_pin(hw_model* model, int32_t pinned);

// Run a step from first_stage on. Returns the stage before which it stopped: last_stage, or an
// earlier one, after first_stage, where *stop was set. A negative number says which array is wrong
// (hw_error); nothing has been written then.
int32_t hw_run(hw_model* model, const hw_cache* cache, const hw_step* step);
// What a negative number means, in a few words.
const char* hw_error(int32_t code);

// The parts alone, for tests and benchmarks. y[rows, outputs] = x[rows, inputs] · matrixᵀ.
void hw_matmul(hw_model* model, const hw_matrix* matrix, int32_t rows, const float* x, float* y);

#ifdef __cplusplus
}
#endif
