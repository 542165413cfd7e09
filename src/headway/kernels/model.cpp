// The model's step: what is computed, in which order, and by whom.
#include <math.h>
#include <stdlib.h>

#include "attention.h"
#include "headway.h"
#include "matmul.h"
#include "memory.h"
#include "ops.h"
#include "simd.h"
#include "threads.h"

#define HW_EXPORT extern "C" __attribute__((visibility("default")))

using namespace headway;

namespace {

enum Error {
  SHAPE = -1,
  TOKEN_IDS = -2,
  PAST_LENS = -3,
  BEGINS = -4,
  BLOCK_INDICES = -5,
  BLOCK_BEGINS = -6,
  SAMPLE_ROWS = -7,
  LOGIT_ROWS = -8,
  TOO_LARGE = -9,
  STAGES = -10,
};

struct ActivationBuffer {
  Buffer values, meta;
  Activations view{};

  static size_t bytes(size_t rows, int inputs, bool is_int8) {
    return rows * inputs * (is_int8 ? 1 : sizeof(Brain)) + rows * (inputs / GROUP) * sizeof(GroupMeta);
  }
  bool make(size_t rows, int inputs, bool is_int8) {
    const size_t width = is_int8 ? 1 : sizeof(Brain);
    if (!values.make(rows * inputs * width)) return false;
    if (!meta.make(rows * (inputs / GROUP) * sizeof(GroupMeta))) return false;
    view.inputs = inputs;
    view.quantised = is_int8 ? values.as<i8>() : nullptr;
    view.brains = is_int8 ? nullptr : values.as<Brain>();
    view.meta = meta.as<GroupMeta>();
    return true;
  }
};

int q_size(const hw_shape& s) { return s.num_heads * s.head_dim; }
int kv_size(const hw_shape& s) { return s.num_kv_heads * s.head_dim; }
int qkv_size(const hw_shape& s) { return q_size(s) + 2 * kv_size(s); }
int query_group(const hw_shape& s) { return s.num_heads / s.num_kv_heads; }
// Rows of logits of a step: each token may be sampled after, and be rated.
size_t most_samples(const hw_shape& s) { return (size_t)s.max_tokens * 2; }
size_t thread_floats(const hw_shape& s) {
  // Whole cache lines, so that no two threads write to one.
  return (attention_scratch(query_group(s), s.head_dim) + 63) / 64 * 64;
}

bool is_supported(const hw_shape& s) {
  const int sizes[] = {s.num_layers, s.hidden_size, s.intermediate_size, s.vocab_size,
                       s.num_heads,  s.num_kv_heads, s.head_dim, s.max_model_len, s.max_tokens};
  for (int size : sizes) {
    if (size < 1) return false;
  }
  return s.hidden_size % GROUP == 0 && s.intermediate_size % GROUP == 0 && s.head_dim % 32 == 0 &&
         s.num_heads % s.num_kv_heads == 0 && s.num_threads >= 1 && s.num_threads <= 1024;
}

}  // namespace

struct hw_model {
  hw_shape shape;
  hw_weights weights;
  Team team;
  ActivationBuffer normed, attended, gated;
  Buffer layers, qkv, tiles, gates, scratch, best, lines;

  // Of the step that runs.
  const hw_cache* cache = nullptr;
  const hw_step* step = nullptr;
  int num_tiles = 0;
  bool decodes_only = false;
  int reached = 0;
  bool stops = false;

  hw_model(const hw_shape& shape, const hw_weights& weights) : shape(shape), weights(weights) {}

  // False if there is no memory, or no thread.
  bool start() {
    const bool is_int8 = shape.precision == HW_PRECISION_INT8;
    const size_t rows = shape.max_tokens, threads = shape.num_threads;
    if (!layers.make(shape.num_layers * sizeof(hw_layer))) return false;
    memcpy(layers.as<hw_layer>(), weights.layers, shape.num_layers * sizeof(hw_layer));
    weights.layers = layers.as<hw_layer>();
    return team.start(shape.num_threads) && normed.make(most_samples(shape), shape.hidden_size, is_int8) &&
           attended.make(rows, q_size(shape), is_int8) &&
           gated.make(rows, shape.intermediate_size, is_int8) &&
           qkv.make(rows * qkv_size(shape) * 4) && tiles.make(rows * sizeof(Tile)) &&
           gates.make(threads * rows * 64) && scratch.make(threads * thread_floats(shape) * 4) &&
           best.make(threads * most_samples(shape) * sizeof(Best)) &&
           lines.make(most_samples(shape) * 4);
  }

  int32_t check() const;
  void cut_tiles();
  void run(Team::Member& member);
  void embed(Team::Member& member);
  void run_layer(Team::Member& member, int layer);
  void run_head(Team::Member& member);

  float* own_scratch(const Team::Member& member) const {
    return scratch.as<float>() + member.thread * thread_floats(shape);
  }
  // Bring what a thread begins with to its cache, while it waits for the others.
  void warm(const Team::Member& member, const hw_matrix& matrix) const {
    constexpr size_t MOST = 12288;
    const size_t bytes = panel_bytes(matrix);
    const int panel = (int)((int64_t)num_panels(matrix) * member.thread / shape.num_threads);
    const u8* p = matrix.data + panel * bytes;
    for (size_t i = 0; i < bytes && i < MOST; i += 64) prefetch(p + i);
  }
};

// Whether every index that the step's arrays hold is within what it is an index of.
int32_t hw_model::check() const {
  const hw_step& s = *step;
  if (s.num_tokens < 1 || s.num_seqs < 1 || s.num_seqs > s.num_tokens || s.num_blocks < 1 ||
      s.num_sampled < 0 || s.num_logits < 0 || s.num_logits > s.num_sampled) {
    return SHAPE;
  }
  if (s.num_tokens > shape.max_tokens || s.num_sampled > (int64_t)most_samples(shape)) return TOO_LARGE;
  if (s.first_stage < 0 || s.first_stage >= s.last_stage || s.last_stage > shape.num_layers + 1) {
    return STAGES;
  }
  for (int i = 0; i < s.num_tokens; i++) {
    if (s.token_ids[i] < 0 || s.token_ids[i] >= shape.vocab_size) return TOKEN_IDS;
  }
  if (s.begins[0] != 0 || s.begins[s.num_seqs] != s.num_tokens) return BEGINS;
  if (s.block_begins[0] != 0 || s.block_begins[s.num_seqs] != s.num_blocks) return BLOCK_BEGINS;
  for (int i = 0; i < s.num_seqs; i++) {
    const int64_t count = (int64_t)s.begins[i + 1] - s.begins[i];
    const int64_t blocks = (int64_t)s.block_begins[i + 1] - s.block_begins[i];
    if (count < 1 || s.begins[i + 1] > s.num_tokens) return BEGINS;
    if (s.past_lens[i] < 0 || s.past_lens[i] + count > shape.max_model_len) return PAST_LENS;
    if (blocks < 0 || s.block_begins[i + 1] > s.num_blocks) return BLOCK_BEGINS;
    if (blocks * BLOCK < s.past_lens[i] + count) return BLOCK_BEGINS;
  }
  for (int i = 0; i < s.num_blocks; i++) {
    if (s.block_indices[i] < 0 || s.block_indices[i] >= cache->num_blocks) return BLOCK_INDICES;
  }
  for (int i = 0; i < s.num_sampled; i++) {
    if (s.sample_rows[i] < 0 || s.sample_rows[i] >= s.num_tokens) return SAMPLE_ROWS;
  }
  for (int i = 0, least = 0; i < s.num_logits; i++) {
    if (s.logit_rows[i] < least || s.logit_rows[i] >= s.num_sampled) return LOGIT_ROWS;
    least = s.logit_rows[i] + 1;
  }
  return 0;
}

void hw_model::cut_tiles() {
  const hw_step& s = *step;
  const int size = tile_positions(query_group(shape));
  Tile* tile = tiles.as<Tile>();
  decodes_only = true;
  for (int i = 0; i < s.num_seqs; i++) {
    int row = s.begins[i], position = s.past_lens[i];
    if (s.begins[i + 1] - row > 1) decodes_only = false;
    while (row < s.begins[i + 1]) {
      const int room = size - position % size, left = s.begins[i + 1] - row;
      const int count = left < room ? left : room;
      *tile++ = {row, count, position, s.block_begins[i]};
      row += count;
      position += count;
    }
  }
  num_tiles = (int)(tile - tiles.as<Tile>());
}

void hw_model::run(Team::Member& member) {
  const int last = step->last_stage < shape.num_layers ? step->last_stage : shape.num_layers;
  if (step->first_stage == 0) embed(member);
  for (int layer = step->first_stage; layer < last; layer++) {
    run_layer(member, layer);
    if (stops) return;
  }
  if (step->last_stage > shape.num_layers) run_head(member);
}

void hw_model::embed(Team::Member& member) {
  const hw_step& s = *step;
  member.share(s.num_tokens, [&](int row) {
    unpack_row(weights.embedding, s.token_ids[row], s.hidden + (size_t)row * shape.hidden_size);
  });
}

void hw_model::run_layer(Team::Member& member, int layer) {
  const hw_step& s = *step;
  const hw_layer& l = weights.layers[layer];
  const int rows = s.num_tokens, hidden_size = shape.hidden_size;
  float* hidden = s.hidden;

  // A few rows each, so that a thread is not sent for every row of a long prompt.
  auto normalise_all = [&](const float* weight, const hw_matrix& next) {
    const int some = rows > 64 ? 8 : 1;
    member.share((rows + some - 1) / some, [&](int item) {
      for (int row = item * some; row < rows && row < (item + 1) * some; row++) {
        normalise(hidden + (size_t)row * hidden_size, weight, shape.rms_norm_eps, normed.view, row);
      }
    }, [&] { warm(member, next); });
  };
  auto add_product = [&](const hw_matrix& matrix, const Activations& x, auto&& before) {
    member.share(num_panels(matrix), [&](int panel) {
      float* column = hidden + panel * PANEL;
      multiply(matrix, panel, x, rows, [&](int row, F16 a, F16 b) {
        float* y = column + (size_t)row * hidden_size;
        store(y, add(load(y), a));
        store(y + 16, add(load(y + 16), b));
      });
    }, before);
  };

  normalise_all(l.attn_norm, l.qkv);
  const int qkv_width = qkv_size(shape);
  member.share(num_panels(l.qkv), [&](int panel) {
    float* column = qkv.as<float>() + panel * PANEL;
    const float* bias = l.qkv_bias == nullptr ? nullptr : l.qkv_bias + panel * PANEL;
    multiply(l.qkv, panel, normed.view, rows, [&](int row, F16 a, F16 b) {
      if (bias != nullptr) a = add(a, load(bias)), b = add(b, load(bias + 16));
      store(column + (size_t)row * qkv_width, a);
      store(column + (size_t)row * qkv_width + 16, b);
    });
  }, [&] { warm(member, l.attn_output); });

  AttentionShape about;
  about.num_heads = shape.num_heads;
  about.num_kv_heads = shape.num_kv_heads;
  about.head_dim = shape.head_dim;
  about.rms_norm_eps = shape.rms_norm_eps;
  about.block_bytes = (size_t)hw_block_bytes(&shape);
  about.layer_offset = about.block_bytes / shape.num_layers * layer;
  about.q_norm = l.q_norm;
  about.k_norm = l.k_norm;
  about.cosines = weights.cosines;
  about.sines = weights.sines;
  about.qkv = qkv.as<float>();
  about.qkv_stride = qkv_width;
  about.block_indices = s.block_indices;
  about.pool = cache->pool;
  const Tile* all = tiles.as<Tile>();
  const int heads = shape.num_kv_heads, items = num_tiles * heads;
  auto write_item = [&](int item) {
    write_kv(about, all[item / heads], item % heads, own_scratch(member));
  };
  auto attend_item = [&](int item) {
    const int following = item + 1 < items ? item + 1 : item;
    const u16* next = about.keys(s.block_indices[all[following / heads].table], following % heads);
    attend(about, all[item / heads], item % heads, attended.view, own_scratch(member), next);
  };
  if (decodes_only) {  // nobody reads what another item writes
    member.share(items, [&](int item) {
      write_item(item);
      attend_item(item);
    });
  } else {
    member.share(items, write_item);
    member.share(items, attend_item);
  }

  add_product(l.attn_output, attended.view, [&] { warm(member, l.gate_up); });
  normalise_all(l.ffn_norm, l.gate_up);
  // A panel is 16 gates and their 16 ups; two of them make a group of 32 for the next product.
  float* gates_own = gates.as<float>() + (size_t)member.thread * shape.max_tokens * 16;
  member.share(num_panels(l.gate_up) / 2, [&](int group) {
    multiply(l.gate_up, 2 * group, normed.view, rows, [&](int row, F16 gate, F16 up) {
      store(gates_own + row * 16, swiglu(gate, up));
    });
    multiply(l.gate_up, 2 * group + 1, normed.view, rows, [&](int row, F16 gate, F16 up) {
      gated.view.put(row, group, load(gates_own + row * 16), swiglu(gate, up));
    });
  }, [&] { warm(member, l.down); });
  const bool is_last = layer + 1 == shape.num_layers;
  add_product(l.down, gated.view, [&] {
    warm(member, is_last ? weights.lm_head : weights.layers[layer + 1].qkv);
    if (member.thread == 0) {  // the others read it after the barrier
      reached = layer + 1;
      stops = s.stop != nullptr && __atomic_load_n(s.stop, __ATOMIC_RELAXED) != 0;
    }
  });
}

void hw_model::run_head(Team::Member& member) {
  const hw_step& s = *step;
  const int rows = s.num_sampled, size = shape.num_threads;
  const hw_matrix& head = weights.lm_head;
  Best* own = best.as<Best>() + (size_t)member.thread * rows;
  int32_t* line = lines.as<int32_t>();
  for (int row = 0; row < rows; row++) own[row].clear();
  member.share(rows, [&](int row) {
    const float* x = s.hidden + (size_t)s.sample_rows[row] * shape.hidden_size;
    normalise(x, weights.output_norm, shape.rms_norm_eps, normed.view, row);
  }, [&] {
    if (member.thread != 0) return;
    for (int row = 0, next = 0; row < rows; row++) {
      const bool is_wanted = next < s.num_logits && s.logit_rows[next] == row;
      line[row] = is_wanted ? next++ : -1;
    }
  });
  const int panels = num_panels(head), some = 4;
  member.share((panels + some - 1) / some, [&](int item) {
    for (int panel = item * some; panel < panels && panel < (item + 1) * some; panel++) {
      const int valid = shape.vocab_size - panel * PANEL;
      multiply(head, panel, normed.view, rows, [&](int row, F16 a, F16 b) {
        if (line[row] >= 0) {
          float* logits = s.logits + (size_t)line[row] * shape.vocab_size + panel * PANEL;
          alignas(64) float both[PANEL];
          store(both, a);
          store(both + 16, b);
          memcpy(logits, both, (valid < PANEL ? valid : PANEL) * 4);
        }
        if (valid < PANEL) {
          a = keep_first(a, valid, set(-INFINITY));
          b = keep_first(b, valid - 16, set(-INFINITY));
        }
        own[row].see(0, a, (float)panel);
        own[row].see(16, b, (float)panel);
      });
    }
  });
  member.share(rows, [&](int row) {
    likeliest(best.as<Best>() + row, rows, size, s.tokens + row, s.maxima + row);
  });
  if (member.thread == 0) reached = shape.num_layers + 1;
}

HW_EXPORT int32_t hw_version(void) { return HW_VERSION; }

HW_EXPORT const char* hw_path(void) { return HW_PATH_NAME; }

HW_EXPORT hw_model* hw_model_new(const hw_shape* shape, const hw_weights* weights) {
  if (!is_supported(*shape)) return nullptr;
  void* place = aligned_alloc(alignof(hw_model), sizeof(hw_model));
  if (place == nullptr) return nullptr;
  hw_model* model = new (place) hw_model(*shape, *weights);
  if (model->start()) return model;
  hw_model_free(model);
  return nullptr;
}

HW_EXPORT void hw_model_free(hw_model* model) {
  if (model == nullptr) return;
  model->~hw_model();
  free(model);
}

HW_EXPORT int64_t hw_block_bytes(const hw_shape* shape) {
  return (int64_t)shape->num_layers * kv_size(*shape) * BLOCK * 2 * 2;
}

HW_EXPORT int64_t hw_scratch_bytes(const hw_shape* shape) {
  const hw_shape& s = *shape;
  const bool is_int8 = s.precision == HW_PRECISION_INT8;
  const size_t rows = s.max_tokens, threads = s.num_threads;
  return (int64_t)(ActivationBuffer::bytes(most_samples(s), s.hidden_size, is_int8) +
                   ActivationBuffer::bytes(rows, q_size(s), is_int8) +
                   ActivationBuffer::bytes(rows, s.intermediate_size, is_int8) +
                   rows * (qkv_size(s) * 4 + sizeof(Tile)) + threads * rows * 64 +
                   threads * thread_floats(s) * 4 +
                   most_samples(s) * (threads * sizeof(Best) + 4));
}

HW_EXPORT void hw_model_pin(hw_model* model, int32_t pinned) { model->team.pin(pinned != 0); }

HW_EXPORT int32_t hw_run(hw_model* model, const hw_cache* cache, const hw_step* step) {
  model->cache = cache;
  model->step = step;
  const int32_t error = model->check();
  if (error != 0) return error;
  model->cut_tiles();
  model->stops = false;
  model->reached = step->first_stage;
  model->team.run(
      [](void* argument, Team::Member& member) { static_cast<hw_model*>(argument)->run(member); },
      model);
  return model->reached;
}

HW_EXPORT const char* hw_error(int32_t code) {
  switch (code) {
    case SHAPE: return "the numbers of tokens, sequences, blocks or samples do not fit together";
    case TOKEN_IDS: return "a token id is outside the vocabulary";
    case PAST_LENS: return "a sequence is longer than the context";
    case BEGINS: return "the sequences' tokens do not follow each other";
    case BLOCK_INDICES: return "a block is outside the pool";
    case BLOCK_BEGINS: return "a block table is too short for its sequence";
    case SAMPLE_ROWS: return "a sampled row is outside the step";
    case LOGIT_ROWS: return "the rows of logits are not sampled, or do not ascend";
    case TOO_LARGE: return "the step has more tokens than there is scratch space for";
    case STAGES: return "the stages do not ascend";
    default: return "unknown";
  }
}

HW_EXPORT void hw_matmul(hw_model* model, const hw_matrix* matrix, int32_t rows, const float* x,
                         float* y) {
  struct Work {
    const hw_matrix& matrix;
    int rows;
    const float* x;
    float* y;
    ActivationBuffer buffer;
  } work{*matrix, rows, x, y, {}};
  const int inputs = matrix->inputs;
  if (!work.buffer.make(rows, inputs, model->shape.precision == HW_PRECISION_INT8)) return;
  for (int row = 0; row < rows; row++) {
    for (int g = 0; g < inputs / GROUP; g++) {
      const float* group = x + (size_t)row * inputs + g * GROUP;
      work.buffer.view.put(row, g, load(group), load(group + 16));
    }
  }
  model->team.run(
      [](void* argument, Team::Member& member) {
        Work& work = *static_cast<Work*>(argument);
        member.share(num_panels(work.matrix), [&](int panel) {
          float* column = work.y + panel * PANEL;
          multiply(work.matrix, panel, work.buffer.view, work.rows, [&](int row, F16 a, F16 b) {
            store(column + (size_t)row * work.matrix.outputs, a);
            store(column + (size_t)row * work.matrix.outputs + 16, b);
          });
        });
      },
      &work);
}
