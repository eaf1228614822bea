// bf16 kernels for Intel's matrix tiles (AMX) with AVX-512; everything else is the AVX-512 code.
//
// A tile holds 16 rows of 64 bytes. TDPBF16PS adds to C [16, 16] the product of A [16, 32] and B [32, 16], where B has
// two consecutive rows interleaved. Weights and keys are A as they lie in memory, so that nothing is repacked on the
// way from memory; what few rows there are of the other side is packed as B.

#include <immintrin.h>

#define SPRINGTIDE_WIDTH 16
#include "vector.inc"

namespace springtide {
namespace {

constexpr int kTile = 16;   // rows of a tile, and columns of C
constexpr int kDepth = 32;  // bf16 elements in a row of A

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The compiler's own tile intrinsics take no template arguments, and let it move or drop stores that they read.
inline void enter_tiles() {
  TileConfig config;
  asm volatile("ldtilecfg (%0)" ::"r"(&config) : "memory");
}

template <int Tile>
inline void tile_load(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
inline void tile_store(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}

template <int Tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}

// C += A B.
template <int C, int A, int B>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

inline __m512i load_line(const void* p) { return _mm512_loadu_si512(p); }

// Transpose 16 rows of 16 dwords.
inline void transpose(__m512i x[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    x[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    x[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    x[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The transpose of a tile of 16 rows of 16 dwords, and its first four rows alone, which cost a quarter.
inline void all_rows(const float* tile, __m512i x[16]) {
  for (int i = 0; i < kTile; i++) x[i] = load_line(tile + i * kTile);
  transpose(x);
}

inline void first_four(const float* tile, __m512i x[4]) {
  __m512 y[4];
  for (int i = 0; i < 4; i++) {
    y[i] = _mm512_castps128_ps512(_mm_load_ps(tile + i * kTile));
    y[i] = _mm512_insertf32x4(y[i], _mm_load_ps(tile + (4 + i) * kTile), 1);
    y[i] = _mm512_insertf32x4(y[i], _mm_load_ps(tile + (8 + i) * kTile), 2);
    y[i] = _mm512_insertf32x4(y[i], _mm_load_ps(tile + (12 + i) * kTile), 3);
  }
  const __m512i a = (__m512i)_mm512_unpacklo_ps(y[0], y[1]), b = (__m512i)_mm512_unpackhi_ps(y[0], y[1]);
  const __m512i c = (__m512i)_mm512_unpacklo_ps(y[2], y[3]), d = (__m512i)_mm512_unpackhi_ps(y[2], y[3]);
  x[0] = _mm512_unpacklo_epi64(a, c), x[1] = _mm512_unpackhi_epi64(a, c);
  x[2] = _mm512_unpacklo_epi64(b, d), x[3] = _mm512_unpackhi_epi64(b, d);
}

// Up to 16 rows of up to 32 elements as a B tile: rows become columns. Missing ones are zero.
inline void pack_tile(const bf16* const* rows, int count, std::int64_t from, int elements, bf16* tile) {
  __m512i x[16];
  __mmask32 some = elements >= kDepth ? 0xffffffffu : (1u << elements) - 1;
  for (int r = 0; r < 16; r++) x[r] = r < count ? _mm512_maskz_loadu_epi16(some, rows[r] + from) : __m512i{};
  transpose(x);
  for (int r = 0; r < 16; r++) _mm512_store_si512(tile + r * kDepth, x[r]);
}

// 2^x to a relative error of 1e-4, which is nothing beside a weight's in bf16, and exactly 1 for 0; 0 for minus infinity.
inline __m512 fast_exp2(__m512 x) {
  __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.0781455737f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.226173572f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.695556856f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

// -- attention ------------------------------------------------------------------------------------------------------

// As VectorCore. Logits come as [slot, row], so that softmax runs along lanes; weights are transposed into A tiles.
// Pairs of values are interleaved within 128-bit lanes, which permutes the output's dimensions until the end.
//
// 16 rows are a column. Columns are taken two at a time, so that each tile of keys or values that is loaded is
// multiplied twice.
class TileCore {
 public:
  static constexpr int kRows = 64, kTokens = 64;

  static std::size_t bytes(int dim) {
    int wide = up(dim, kDepth);
    return Arena::room<bf16>(kRows * wide) + Arena::room<float>(kRows * wide) + 3 * Arena::room<bf16>(kTokens * wide) +
           2 * Arena::room<float>(kTokens * kTile) + 2 * Arena::room<bf16>(kTokens * kTile) +
           2 * Arena::room<float>(kRows);
  }

  TileCore(int dim, float scale, float softcap, Arena& arena)
      : dim_(dim), wide_(up(dim, kDepth)), tiles_(wide_ / kTile), logit_(scale, softcap) {
    q_ = arena.take<bf16>(kRows * wide_);
    out_ = arena.take<float>(kRows * wide_);
    staged_k_ = arena.take<bf16>(kTokens * wide_);
    staged_v_ = arena.take<bf16>(kTokens * wide_);
    v_ = arena.take<bf16>(kTokens * wide_);
    for (int i = 0; i < 2; i++) {
      s_[i] = arena.take<float>(kTokens * kTile);
      p_[i] = arena.take<bf16>(kTokens * kTile);
    }
    top_ = arena.take<float>(kRows);
    total_ = arena.take<float>(kRows);
    enter_tiles();
  }

  static void leave() { _tile_release(); }

  void start(const bf16* const* q, int rows) {
    rows_ = rows, columns_ = (rows + kTile - 1) / kTile;
    fresh_ = true;
    for (int c = 0; c < columns_; c++)
      for (int d = 0; d < wide_ / kDepth; d++)
        pack_tile(q + c * kTile, std::min(kTile, rows - c * kTile), d * kDepth, std::min(kDepth, dim_ - d * kDepth),
                  query(c) + d * kTile * kDepth);
    for (int r = 0; r < kRows; r++) top_[r] = -kInfinity, total_[r] = 0;
    std::memset(out_, 0, sizeof(float) * columns_ * kTile * wide_);
  }

  void tokens(const bf16* k, const bf16* v, const std::int64_t* places, int count, std::int64_t left, Next<bf16> next,
              const std::uint8_t* mask) {
    Block b{k, v, mask, dim_, count, static_cast<int>(up(count, kDepth))};
    Fetch fetch = fetch_after(k, v, places, left, next);
    if (places && fresh_) {
      Fetch first{*this, k, v, places, 0, std::min<std::int64_t>(left, 2 * kTokens), 1};
      while (first.at < first.end) first.one();
    }
    fresh_ = false;
    if (places || count < b.padded || dim_ != wide_) {
      b.k = stage(k, places, count, b.padded, staged_k_);
      b.v = stage(v, places, count, b.padded, staged_v_);
      b.stride = wide_;
    }
    for (int t = 0; t < b.padded; t += 2) {
      interleave(b, t);
      fetch.some();
    }
    for (int c = 0; c < columns_; c += 2)
      if (c + 1 < columns_)
        add_block<2>(c, b, fetch);
      else
        add_block<1>(c, b, fetch);
  }

  void finish(float* out, float* top, float* total) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int r = 0; r < rows_; r++) {
      for (int d = 0; d < dim_; d += kDepth) {
        const float* own = sums(r / kTile, d / kTile) + r % kTile * kTile;
        __m512 x = _mm512_loadu_ps(own), y = _mm512_loadu_ps(own + kTile * kTile);
        const __mmask32 some = dim_ - d >= kDepth ? 0xffffffffu : (1u << (dim_ - d)) - 1;
        float* to = out + r * dim_ + d;
        _mm512_mask_storeu_ps(to, some, _mm512_permutex2var_ps(x, low, y));
        _mm512_mask_storeu_ps(to + kTile, some >> kTile, _mm512_permutex2var_ps(x, high, y));
      }
      top[r] = top_[r], total[r] = total_[r];
    }
  }

  void logits(const bf16* k, std::int64_t count, const bf16* next, float* out, std::int64_t stride) {
    for (std::int64_t first = 0; first < count; first += kTile) {
      const int n = std::min<std::int64_t>(kTile, count - first);
      const bf16* own = k + first * dim_;
      int step = dim_;
      if (n < kTile || dim_ != wide_) {
        own = stage(own, nullptr, n, kTile, staged_k_);
        step = wide_;
      }
      const std::int64_t ahead = first + 2 * kTile;
      fetch_rows(ahead < count ? k + ahead * dim_ : next + (ahead - up(count, kTile)) * dim_, kTile);
      for (int c = 0; c < columns_; c++) {
        const int rows = std::min(kTile, rows_ - c * kTile);
        tile_zero<0>();
        for (int d = 0; d < wide_; d += kDepth) {
          tile_load<4>(own + d, step * 2);
          tile_load<6>(query(c) + d * kTile, 64);
          tile_multiply<0, 4, 6>();
        }
        tile_store<0>(s_[0], 64);
        __m512i x[16];
        rows <= 4 ? first_four(s_[0], x) : all_rows(s_[0], x);
        for (int r = 0; r < rows; r++)
          store(out + (c * kTile + r) * stride + first, logit_((vf)_mm512_castsi512_ps(x[r])));
      }
    }
  }

 private:
  struct Block {
    const bf16 *k, *v;
    const std::uint8_t* mask;
    int stride, count, padded;
  };

  bf16* query(int column) const { return q_ + column * kTile * wide_; }
  float* sums(int column, int tile) const { return out_ + (column * tiles_ + tile) * kTile * kTile; }

  const bf16* stage(const bf16* from, const std::int64_t* places, int count, int padded, bf16* to) const {
    for (int t = 0; t < padded; t++) {
      const int own = std::min(t, count - 1);
      const bf16* row = from + (places ? places[own] : own * dim_);
      for (int d = 0; d < wide_; d += kDepth) {
        __mmask32 some = dim_ - d >= kDepth ? 0xffffffffu : (1u << (dim_ - d)) - 1;
        if (t >= count) some = 0;
        _mm512_store_si512(to + t * wide_ + d, _mm512_maskz_loadu_epi16(some, row + d));
      }
    }
    return to;
  }

  // Inlined by force: GCC takes a function that only prefetches for one without effect.
  [[gnu::always_inline]] void fetch_rows(const bf16* rows, int count) const {
    for (int d = 0; d < count * dim_; d += kDepth)
      _mm_prefetch(reinterpret_cast<const char*>(rows + d), _MM_HINT_T0);
  }

  // What comes after a block, fetched little by little while the block is computed: the next slots in memory, or those
  // to be gathered two blocks later, since their places cannot be foreseen by the processor.
  struct Fetch {
    const TileCore& core;
    const bf16 *k, *v;
    const std::int64_t* places;
    std::int64_t at, end;
    int calls, due = 0;

    [[gnu::always_inline]] void one() {
      const std::int64_t place = places ? places[at] : at * core.dim_;
      core.fetch_rows(k + place, 1);
      core.fetch_rows(v + place, 1);
      at++;
    }

    // Called `calls` times in a block.
    [[gnu::always_inline]] void some() {
      for (due += kTokens; due >= calls; due -= calls)
        if (at < end) one();
    }
  };

  Fetch fetch_after(const bf16* k, const bf16* v, const std::int64_t* places, std::int64_t left,
                    Next<bf16> next) const {
    const int pairs = (columns_ + 1) / 2, steps = kTokens / kDepth * wide_ / kDepth;
    const int calls = kTokens / 2 * (1 + columns_) + 4 * pairs * steps;
    if (places) return {*this, k, v, places, 2 * kTokens, std::min<std::int64_t>(left, 3 * kTokens), calls};
    return {*this, next.k, next.v, nullptr, 0, std::min<std::int64_t>(left - kTokens, kTokens), calls};
  }

  // s_[i] [slot, row]: dot products of the keys with column `first` + i of the queries.
  template <int C>
  void dots(const Block& b, int first, Fetch& fetch) const {
    const bf16 *q = query(first), *other = query(first + C - 1);
    for (int t = 0; t < b.padded; t += kDepth) {
      const bf16* k = b.k + t * b.stride;
      tile_zero<0>();
      tile_zero<1>();
      if (C > 1) tile_zero<2>();
      if (C > 1) tile_zero<3>();
      for (int d = 0; d < wide_; d += kDepth) {
        tile_load<4>(k + d, b.stride * 2);
        tile_load<5>(k + kTile * b.stride + d, b.stride * 2);
        tile_load<6>(q + d * kTile, 64);
        if (C > 1) tile_load<7>(other + d * kTile, 64);
        tile_multiply<0, 4, 6>();
        tile_multiply<1, 5, 6>();
        if (C > 1) tile_multiply<2, 4, 7>();
        if (C > 1) tile_multiply<3, 5, 7>();
        fetch.some(), fetch.some();
      }
      tile_store<0>(s_[0] + t * kTile, 64);
      tile_store<1>(s_[0] + (t + kTile) * kTile, 64);
      if (C > 1) tile_store<2>(s_[1] + t * kTile, 64);
      if (C > 1) tile_store<3>(s_[1] + (t + kTile) * kTile, 64);
    }
  }

  // Values of two slots as rows of B tiles, two of these for each 32 slots and 32 dimensions.
  void interleave(const Block& b, int t) const {
    const bf16* from = b.v + t * b.stride;
    bf16* to = v_ + (t / kDepth * tiles_ * kTile + t % kDepth / 2) * kDepth;
    for (int d = 0; d < wide_; d += kDepth) {
      __m512i x = load_line(from + d), y = load_line(from + b.stride + d);
      _mm512_store_si512(to + d * kDepth, _mm512_unpacklo_epi16(x, y));
      _mm512_store_si512(to + (d + kTile) * kDepth, _mm512_unpackhi_epi16(x, y));
    }
  }

  // C columns of rows, from column `first` on, take in a block.
  template <int C>
  void add_block(int first, const Block& b, Fetch& fetch) {
    dots<C>(b, first, fetch);
    for (int i = 0; i < C; i++) weigh(first + i, b, s_[i], p_[i], fetch);
    for (int d = 0; d < tiles_; d += 2) {
      tile_load<0>(sums(first, d), 64);
      tile_load<1>(sums(first, d + 1), 64);
      if (C > 1) tile_load<2>(sums(first + 1, d), 64);
      if (C > 1) tile_load<3>(sums(first + 1, d + 1), 64);
      for (int t = 0; t < b.padded; t += kDepth) {
        const bf16* v = v_ + (t / kDepth * tiles_ + d) * kTile * kDepth;
        tile_load<4>(p_[0] + t * kTile, 64);
        tile_load<6>(v, 64);
        tile_load<7>(v + kTile * kDepth, 64);
        if (C > 1) tile_load<5>(p_[1] + t * kTile, 64);
        tile_multiply<0, 4, 6>();
        tile_multiply<1, 4, 7>();
        if (C > 1) tile_multiply<2, 5, 6>();
        if (C > 1) tile_multiply<3, 5, 7>();
        fetch.some(), fetch.some();
      }
      tile_store<0>(sums(first, d), 64);
      tile_store<1>(sums(first, d + 1), 64);
      if (C > 1) tile_store<2>(sums(first + 1, d), 64);
      if (C > 1) tile_store<3>(sums(first + 1, d + 1), 64);
    }
  }

  // A column's logits in units of log2, where they are not just scaled dot products.
  void adjust(float* s, int column, const Block& b) const {
    for (int t = 0; t < b.count; t++) {
      __m512 x = _mm512_loadu_ps(s + t * kTile);
      if (logit_.cap > 0) x = (__m512)logit_((vf)x);
      if (b.mask) {
        __m128i own = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b.mask + t * kRows + column * kTile));
        x = _mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), _mm_test_epi8_mask(own, own), x);
      }
      _mm512_storeu_ps(s + t * kTile, x);
    }
  }

  // A column's weights p as A tiles, from its dot products s; its rows' new maxima and totals; and the sums of values
  // that it has, scaled to the new maxima.
  void weigh(int column, const Block& b, float* s, bf16* p, Fetch& fetch) {
    if (b.mask || logit_.cap > 0) adjust(s, column, b);
    for (int t = b.count; t < b.padded; t++) _mm512_storeu_ps(s + t * kTile, _mm512_set1_ps(-kInfinity));
    const __m512 scale = _mm512_set1_ps(logit_.cap > 0 ? 1.0f : logit_.scale);
    __m512 tops[4];
    for (auto& top : tops) top = _mm512_set1_ps(-kInfinity);
    for (int t = 0; t < b.padded; t += 4)
      for (int i = 0; i < 4; i++) tops[i] = _mm512_max_ps(tops[i], _mm512_loadu_ps(s + (t + i) * kTile));
    __m512 best = _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
    const __m512 old = _mm512_loadu_ps(top_ + column * kTile);
    best = _mm512_max_ps(old, _mm512_mul_ps(best, scale));
    const __mmask16 none = _mm512_cmp_ps_mask(best, _mm512_set1_ps(-kInfinity), _CMP_EQ_OQ);
    const __m512 base = _mm512_mask_mov_ps(best, none, _mm512_setzero_ps());
    const __m512 keep = fast_exp2(_mm512_sub_ps(old, base));
    _mm512_storeu_ps(top_ + column * kTile, best);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    __m512 mass[2] = {};
    for (int t = 0; t < b.padded; t += kDepth) {
      __m512i pairs[16];
      for (int i = 0; i < 16; i++) {
        const float* at = s + (t + 2 * i) * kTile;
        __m512 x = fast_exp2(_mm512_fmsub_ps(_mm512_loadu_ps(at), scale, base));
        __m512 y = fast_exp2(_mm512_fmsub_ps(_mm512_loadu_ps(at + kTile), scale, base));
        mass[0] = _mm512_add_ps(mass[0], x), mass[1] = _mm512_add_ps(mass[1], y);
        pairs[i] = _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(y, x));
        fetch.some();
      }
      transpose(pairs);
      for (int i = 0; i < 16; i++) _mm512_store_si512(p + (t / 2 + i) * kDepth, pairs[i]);
    }
    float* total = total_ + column * kTile;
    _mm512_storeu_ps(total, _mm512_fmadd_ps(_mm512_loadu_ps(total), keep, _mm512_add_ps(mass[0], mass[1])));
    // Maxima seldom move after the first slots.
    if (_mm512_cmp_ps_mask(keep, _mm512_set1_ps(1.0f), _CMP_NEQ_OQ)) {
      alignas(64) float kept[kTile];
      _mm512_store_ps(kept, keep);
      for (int d = 0; d < tiles_; d++)
        for (int r = 0; r < kTile; r++) {
          float* sum = sums(column, d) + r * kTile;
          _mm512_storeu_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), _mm512_set1_ps(kept[r])));
        }
    }
  }

  int dim_, wide_, tiles_, rows_ = 0, columns_ = 0;  // tiles_ of 16 dimensions
  bool fresh_ = true;  // no slots were given yet
  Logit logit_;
  bf16 *q_, *staged_k_, *staged_v_, *v_, *p_[2];
  float *out_, *s_[2], *top_, *total_;
};

// -- linear layers --------------------------------------------------------------------------------------------------

// As VectorLinear: a tile of 16 outputs' weights is A, 16 rows (a column) are B. Products are summed along the inputs
// one tile after the other, so that a row's result does not depend on how many rows there are with it.
//
// Few rows are limited by memory: weights are read where they lie, once. Many are limited by the tile unit: a panel of
// weights is copied to the second cache, tile by tile, and two tiles of it are multiplied with two columns at a time.
struct TileLinear {
  static std::size_t packed(std::int64_t rows, std::int64_t inputs) {
    return up(rows, kTile) * inputs * sizeof(bf16);
  }

  static std::size_t own(std::int64_t rows) {
    if (rows <= kFew) return 0;
    return Arena::room<bf16>(kPanel * kInputs) + Arena::room<float>(kPanel * up(rows, kTile));
  }

  // B tiles, one column's after the other's.
  static void pack(const bf16* x, std::int64_t rows, std::int64_t inputs, void* to) {
    const std::int64_t columns = (rows + kTile - 1) / kTile, depth = inputs / kDepth;
    Share share(depth * columns, 1);
    for (std::int64_t i = share.first; i < share.last; i++) {
      const std::int64_t c = i / depth, d = i % depth;
      const bf16* own[kTile];
      int count = std::min<std::int64_t>(kTile, rows - c * kTile);
      for (int r = 0; r < count; r++) own[r] = x + (c * kTile + r) * inputs;
      pack_tile(own, count, d * kDepth, kDepth, static_cast<bf16*>(to) + i * kElements);
    }
#pragma omp barrier
  }

  static void multiply(const Matrix& m, const void* packed, std::int64_t rows, bf16* out) {
    enter_tiles();
    const bf16* x = static_cast<const bf16*>(packed);
    if (rows > kFew) {
      multiply_many(m, x, rows, out);
      return;
    }
#pragma omp for schedule(dynamic, 4) nowait
    for (std::int64_t n = 0; n < m.outputs; n += kTile) {
      if (rows > 3 * kTile)
        outputs<4>(m, x, n, rows, out);
      else if (rows > 2 * kTile)
        outputs<3>(m, x, n, rows, out);
      else if (rows > kTile)
        outputs<2>(m, x, n, rows, out);
      else
        outputs<1>(m, x, n, rows, out);
    }
  }

  static bool fits(const Matrix& m) { return m.inputs % kDepth == 0 && m.outputs % kTile == 0; }

  static void leave() { _tile_release(); }

 private:
  static constexpr std::int64_t kFew = 64;     // rows
  static constexpr std::int64_t kAhead = 128;  // elements between what is read of a row and what is fetched meanwhile
  static constexpr int kElements = kTile * kDepth;  // of a tile
  static constexpr int kSums = kTile * kTile;       // of a tile of C
  static constexpr std::int64_t kPanel = 256;       // outputs in a panel
  static constexpr std::int64_t kInputs = 2048;     // inputs of a panel that are copied at a time

  // 16 outputs, from n on, of up to C columns.
  template <int C>
  static void outputs(const Matrix& m, const bf16* x, std::int64_t n, std::int64_t rows, bf16* out) {
    const bf16* w = static_cast<const bf16*>(m.weight) + n * m.inputs;
    const std::int64_t column = m.inputs * kTile;  // elements of a packed column
    tile_zero<0>();
    if (C > 1) tile_zero<1>();
    if (C > 2) tile_zero<2>();
    if (C > 3) tile_zero<3>();
    for (std::int64_t d = 0; d < m.inputs; d += kDepth, x += kElements) {
      // Near the end of these 16 rows, the beginning of the next 16.
      const std::int64_t ahead = d + kAhead < m.inputs ? d + kAhead : d + kAhead + (kTile - 1) * m.inputs;
      for (int i = 0; i < kTile; i++)
        _mm_prefetch(reinterpret_cast<const char*>(w + i * m.inputs + ahead), _MM_HINT_T1);
      tile_load<4>(w + d, m.inputs * 2);
      tile_load<5>(x, 64);
      tile_multiply<0, 4, 5>();
      if (C > 1) {
        tile_load<6>(x + column, 64);
        tile_multiply<1, 4, 6>();
      }
      if (C > 2) {
        tile_load<7>(x + 2 * column, 64);
        tile_multiply<2, 4, 7>();
      }
      if (C > 3) {
        tile_load<5>(x + 3 * column, 64);
        tile_multiply<3, 4, 5>();
      }
    }
    alignas(64) float c[4][kSums];
    tile_store<0>(c[0], 64);
    if (C > 1) tile_store<1>(c[1], 64);
    if (C > 2) tile_store<2>(c[2], 64);
    if (C > 3) tile_store<3>(c[3], 64);
    for (int j = 0; j < C; j++) put(m, c[j], n, j * kTile, rows, out);
  }

  static void multiply_many(const Matrix& m, const bf16* x, std::int64_t rows, bf16* out) {
    const std::int64_t columns = (rows + kTile - 1) / kTile;
    Arena arena(kOwn);
    arena.reserve(own(rows));  // the thread has it already
    bf16* panel = arena.take<bf16>(kPanel * kInputs);
    float* sums = arena.take<float>(kPanel * columns * kTile);
#pragma omp for schedule(dynamic) nowait
    for (std::int64_t first = 0; first < m.outputs; first += kPanel) {
      const int tiles = std::min(kPanel, m.outputs - first) / kTile;
      for (std::int64_t from = 0; from < m.inputs; from += kInputs) {
        const int depth = std::min(kInputs, m.inputs - from) / kDepth;
        copy_panel(static_cast<const bf16*>(m.weight) + first * m.inputs + from, m.inputs, tiles, depth, panel);
        for (std::int64_t c = 0; c < columns; c += 2) {
          const bf16* own = x + (c * (m.inputs / kDepth) + from / kDepth) * kElements;
          for (int n = 0; n < tiles; n += 2) {
            const bf16* w = panel + n * depth * kElements;
            float* to = sums + (c * tiles + n) * kSums;
            const bool two = n + 1 < tiles, pair = c + 1 < columns;
            const std::int64_t next = m.inputs * kTile, after = tiles * kSums;
            if (two && pair)
              square<2, 2>(w, own, next, depth, from > 0, to, after);
            else if (two)
              square<2, 1>(w, own, next, depth, from > 0, to, after);
            else if (pair)
              square<1, 2>(w, own, next, depth, from > 0, to, after);
            else
              square<1, 1>(w, own, next, depth, from > 0, to, after);
          }
        }
      }
      for (std::int64_t c = 0; c < columns; c++)
        for (int n = 0; n < tiles; n++)
          put(m, sums + (c * tiles + n) * kSums, first + n * kTile, c * kTile, rows, out);
    }
  }

  // A tiles of 16 outputs, one after the other.
  static void copy_panel(const bf16* w, std::int64_t stride, int tiles, int depth, bf16* to) {
    for (int n = 0; n < tiles; n++)
      for (int r = 0; r < kTile; r++) {
        const bf16* row = w + (n * kTile + r) * stride;
        bf16* own = to + n * depth * kElements + r * kDepth;
        for (int d = 0; d < depth; d++) _mm512_store_si512(own + d * kElements, load_line(row + d * kDepth));
      }
  }

  // N tiles of outputs times C columns, added to `sums` if there are any yet. x: a column's tiles, the next one's `next`
  // elements later; sums: a column's tiles, the next one's `after` elements later.
  template <int N, int C>
  static void square(const bf16* w, const bf16* x, std::int64_t next, int depth, bool more, float* sums,
                     std::int64_t after) {
    if (more) {
      tile_load<0>(sums, 64);
      if (C > 1) tile_load<1>(sums + after, 64);
      if (N > 1) tile_load<2>(sums + kSums, 64);
      if (N > 1 && C > 1) tile_load<3>(sums + after + kSums, 64);
    } else {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
    }
    const bf16* second = w + depth * kElements;
    for (int d = 0; d < depth; d++) {
      tile_load<4>(w + d * kElements, 64);
      tile_load<6>(x + d * kElements, 64);
      tile_multiply<0, 4, 6>();
      if (C > 1) {
        tile_load<7>(x + next + d * kElements, 64);
        tile_multiply<1, 4, 7>();
      }
      if (N > 1) {
        tile_load<5>(second + d * kElements, 64);
        tile_multiply<2, 5, 6>();
        if (C > 1) tile_multiply<3, 5, 7>();
      }
    }
    tile_store<0>(sums, 64);
    if (C > 1) tile_store<1>(sums + after, 64);
    if (N > 1) tile_store<2>(sums + kSums, 64);
    if (N > 1 && C > 1) tile_store<3>(sums + after + kSums, 64);
  }

  // Write a tile of C [16 outputs from n on, 16 rows from `first` on] to out [rows, outputs], with bias.
  static void put(const Matrix& m, const float* c, std::int64_t n, std::int64_t first, std::int64_t rows, bf16* out) {
    const vf bias = m.bias ? load(static_cast<const bf16*>(m.bias) + n) : vf{};
    __m512i block[kTile];
    for (int o = 0; o < kTile; o++) block[o] = load_line(c + o * kTile);
    transpose(block);
    for (std::int64_t r = first; r < std::min<std::int64_t>(rows, first + kTile); r++)
      store(out + r * m.outputs + n, (vf)_mm512_castsi512_ps(block[r - first]) + bias);
  }
};

void attend_bf16(const Attend& a) { attend<TileCore, bf16>(a); }

void gather_bf16(const Gather& a) { gather<TileCore, bf16>(a); }

void select_bf16(const Select& s) { select<TileCore, bf16>(s); }

void linear_bf16(const Matrix& m, const void* x, void* out, std::int64_t rows, int threads) {
  (TileLinear::fits(m) ? linear<TileLinear, bf16> : linear<VectorLinear<bf16>, bf16>)(m, x, out, rows, threads);
}

bool fits(const Block& b) {
  for (const Matrix* m : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down})
    if (!TileLinear::fits(*m)) return false;
  return true;
}

void before_bf16(const Block& b, const void* x, const void* cos, const void* sin, void* q, void* k, void* v,
                 std::int64_t rows, int threads) {
  (fits(b) ? before<TileLinear, bf16> : before<VectorLinear<bf16>, bf16>)(b, x, cos, sin, q, k, v, rows, threads);
}

void after_bf16(const Block& b, const void* x, const void* attention, void* out, std::int64_t rows, int threads) {
  (fits(b) ? after<TileLinear, bf16> : after<VectorLinear<bf16>, bf16>)(b, x, attention, out, rows, threads);
}

}  // namespace

const Level amx = {
    "amx",
    {attend<VectorCore<float>, float>, attend_bf16},
    {gather<VectorCore<float>, float>, gather_bf16},
    {select<VectorCore<float>, float>, select_bf16},
    {linear<VectorLinear<float>, float>, linear_bf16},
    {before<VectorLinear<float>, float>, before_bf16},
    {after<VectorLinear<float>, float>, after_bf16},
};

}  // namespace springtide
