// What a level of instructions (portable, AVX2, AVX-512, AMX) offers. Elements are float or bf16; arithmetic is fp32.
#pragma once

#include <cstdint>

namespace springtide {

struct bf16 {
  std::uint16_t bits;
};

// Which slots a row sees: those below `prefix` from low[row] on (all, without `low`); of the later ones those that
// tail[row, slot - prefix] marks or, without `tail`, those up to the row's own, which is prefix + row.
struct Visible {
  std::int64_t prefix;
  const std::int32_t* low;
  const std::uint8_t* tail;
};

// Softmax attention of q [rows, heads, dim] over k, v [kv_heads, length, dim]. Strides count elements; a head's slots
// and a row's heads' elements are contiguous. With `index` [rows, kv_heads, budget] only those slots are read, less
// those that `mask` (same shape) hides, and `visible` is not looked at; besides, every row reads `means` more slots,
// mean_k and mean_v [kv_heads, means, dim], each of which counts `weight` times. `out` [rows, heads, dim] is contiguous.
struct Attend {
  const void *q, *k, *v;
  void* out;
  std::int64_t rows, heads, kv_heads, dim, length;
  std::int64_t q_row, q_head, k_head, v_head;
  float scale, softcap;  // softcap 0: none
  Visible visible;
  const std::int64_t* index;
  const std::uint8_t* mask;
  std::int64_t budget;
  const void *mean_k, *mean_v;
  std::int64_t means, mean_k_head, mean_v_head;
  float weight;
  int threads;
};

// The `budget` slots that each row wants most, ascending, in index [rows, kv_heads, budget]. First of all the row
// itself, its `recent` newest slots and the `sinks` oldest; then by the mean over a group's query heads of their
// probabilities, or by their largest logit (`largest`). `joined`: all KV heads share one set.
struct Select {
  const void *q, *k;
  std::int64_t* index;
  std::int64_t rows, heads, kv_heads, dim, length, budget, sinks, recent;
  std::int64_t q_row, q_head, k_head;
  float scale, softcap;
  Visible visible;
  const std::int32_t* positions;  // of the rows
  bool largest, joined;
  int threads;
};

// weight [outputs, inputs], contiguous; bias [outputs] or null.
struct Matrix {
  const void *weight, *bias;
  std::int64_t outputs, inputs;
};

// A pre-norm transformer layer with gated MLP: what surrounds its attention.
struct Block {
  const void *input_norm, *output_norm;  // RMSNorm weights [hidden]
  const void *q_norm, *k_norm;           // [dim] or null
  Matrix q, k, v, o, gate, up, down;
  std::int64_t heads, kv_heads, dim, hidden, rotary;  // rotary: leading dimensions of a head that turn; 0 for none
  float epsilon;
};

struct Level {
  const char* name;
  // Indexed by whether elements are bf16.
  void (*attend[2])(const Attend&);
  void (*select[2])(const Select&);
  // out [rows, outputs] = x [rows, inputs] weight^T + bias.
  void (*linear[2])(const Matrix&, const void* x, void* out, std::int64_t rows, int threads);
  // q [rows, heads, dim] and k, v [kv_heads, rows, dim] of x [rows, hidden]; cos, sin [rows, rotary].
  void (*before[2])(const Block&, const void* x, const void* cos, const void* sin, void* q, void* k, void* v,
                    std::int64_t rows, int threads);
  // out [rows, hidden]: the layer's output from its input x and its attention [rows, heads, dim].
  void (*after[2])(const Block&, const void* x, const void* attention, void* out, std::int64_t rows, int threads);
};

extern const Level portable, avx2, avx512, amx;

}  // namespace springtide
