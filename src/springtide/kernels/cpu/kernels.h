// What a level of instructions (portable, AVX2, AVX-512, AMX) offers. Elements are float or bf16; arithmetic is fp32.
#pragma once

#include <cstdint>
#include <vector>

namespace springtide {

struct bf16 {
  std::uint16_t bits;
};

constexpr std::int64_t kPage = 128;   // slots of a page
constexpr std::int64_t kSpan = 2048;  // slots of a unit of work, which begins at a multiple of it

// One layer's pages: keys of page p begin p * `page` elements after k, each KV head's `head` elements after the one
// before, and a head's slots lie one after the other. Values likewise.
struct Pages {
  void *k, *v;
  std::int64_t page, head, kv_heads, dim;

  template <class T>
  const T* keys(std::int64_t page_, std::int64_t head_) const {
    return static_cast<const T*>(k) + page_ * page + head_ * head;
  }

  template <class T>
  const T* values(std::int64_t page_, std::int64_t head_) const {
    return static_cast<const T*>(v) + page_ * page + head_ * head;
  }
};

// What one row of a pass sees: slots from `low` on up to `high`, of which those from `prefix` on only where `tail`
// [high - prefix] says so, if there is one.
struct Row {
  const std::int64_t* table;  // the page numbers of its request
  std::int64_t length;        // slots of its request
  std::int64_t low, high, prefix;
  const std::uint8_t* tail;

  bool sees(std::int64_t slot) const {
    if (slot < low || slot >= high) return false;
    return slot < prefix || !tail || tail[slot - prefix];
  }
};

// Rows that read the same pages from span `first` up to span `last`: units of work are of all of them.
struct Group {
  std::vector<std::int32_t> rows;
  const std::int64_t* table;
  std::int64_t first, last;
  int depth;  // how many groups come before it, for each of its rows
};

// One of a row's groups, and which of the group's rows it is there.
struct Place {
  std::int32_t group, row;
};

// What the rows of several requests read, side by side: prepared once, used in every layer.
struct Reads {
  struct Request {
    std::vector<std::int64_t> table;
    std::int64_t prefix, length, rows;
    std::vector<std::int32_t> low, positions;
    std::vector<std::uint8_t> tail;
  };

  std::vector<Request> requests;
  std::vector<Row> rows;
  std::vector<Group> groups;               // those that come first in a row first
  std::vector<std::vector<Place>> places;  // of each row, along its slots
  std::int64_t pages = 0;                   // one more than the highest page number
  std::int64_t depths = 0;

  explicit Reads(std::vector<Request> requests);
  Reads(const Reads&) = delete;
};

// Softmax attention of q [rows, heads, dim] over what the rows see. Strides count elements; a head's elements are
// contiguous. `out` [rows, heads, dim] is contiguous, and so is `lse` [rows, heads]: the logarithm of the sum of
// exponentials of logits.
struct Attend {
  const void* q;
  void* out;
  float* lse;
  std::int64_t heads, q_row, q_head;
  float scale, softcap;  // softcap 0: none
  const Reads* reads;
  Pages pages;
  int threads;
};

// The same over the slots `index` [rows, kv_heads, budget] alone, less those that `mask` (same shape) hides. Besides,
// every row reads `means` more slots, mean_k and mean_v [kv_heads, means, dim], each of which counts `weight` times.
struct Gather : Attend {
  const std::int64_t* index;
  const std::uint8_t* mask;
  std::int64_t budget;
  const void *mean_k, *mean_v;
  std::int64_t means, mean_k_head, mean_v_head;
  float weight;
};

// The `budget` slots that each row of one request wants most, ascending, in index [rows, kv_heads, budget]. First the
// row itself, its `recent` newest slots and the `sinks` oldest; then by the mean over a group's query heads of their
// probabilities, or by their largest logit (`largest`). `joined`: all KV heads share one set.
struct Select {
  const void* q;
  std::int64_t* index;
  std::int64_t heads, q_row, q_head, budget, sinks, recent;
  float scale, softcap;
  const Reads* reads;
  Pages pages;
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
  void (*gather[2])(const Gather&);
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
