// The Python module: levels that this machine has, and their kernels on tensors. `_cpu.pyi` says what they take.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef SPRINGTIDE_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace springtide;

namespace {

#ifdef SPRINGTIDE_X86
bool has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned bf16 = 1u << 22, tile = 1u << 24;
  // Linux grants the tiles' registers to a process that asks for them.
  constexpr int kRequest = 0x1023, kTileData = 18;
  return (d & bf16) && (d & tile) && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

// Fastest first.
std::vector<const Level*> levels() {
  std::vector<const Level*> found;
#ifdef SPRINGTIDE_X86
  __builtin_cpu_init();
  const bool avx512_here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512_here && __builtin_cpu_supports("avx512bf16") && has_tiles()) found.push_back(&amx);
  if (avx512_here) found.push_back(&avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2);
#endif
  found.push_back(&portable);
  return found;
}

// Let Linux put memory on pages of 2 MB, which are read up to a third faster; what is there already is moved if `now`.
void huge_pages(nb::handle tensor, bool now) {
#ifdef __linux__
  const Tensor x = Tensor("tensor", tensor).contiguous();
  using Address = std::uintptr_t;
  constexpr Address kPage = 2 << 20;
  const Address address = reinterpret_cast<Address>(x.data()), bytes = nb::cast<Address>(tensor.attr("nbytes"));
  nb::gil_scoped_release nogil;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE
  const Address first = (address + kPage - 1) / kPage * kPage, last = (address + bytes) / kPage * kPage;
  if (first >= last) return;
  void* region = reinterpret_cast<void*>(first);
  madvise(region, last - first, MADV_HUGEPAGE);
  if (now) madvise(region, last - first, kCollapse);
#endif
}

// A tensor, or nothing for None.
class Maybe {
 public:
  Maybe(const char* name, nb::handle object) {
    if (!object.is_none()) new (&tensor_) Tensor(name, object), there_ = true;
  }

  explicit operator bool() const { return there_; }
  const Tensor* operator->() const { return &tensor_; }

  template <class P = void>
  P* data() const {
    return there_ ? tensor_.data<P>() : nullptr;
  }

 private:
  union {
    Tensor tensor_;
  };
  bool there_ = false;
};

void require(bool holds, const char* sentence) {
  if (!holds) wrong_value(sentence);
}

// Runs a kernel without Python's lock.
template <class F>
void unlocked(F&& kernel) {
  nb::gil_scoped_release nogil;
  kernel();
}

// One layer's pages [pages, 2, H_kv, kPage, D], which are kept alive.
struct Layout : Pages {
  nb::object tensor;
  Type type;
  Size count;

  explicit Layout(nb::object given) : tensor(std::move(given)) {
    const Tensor x("pages", tensor);
    x.half();
    x.shaped({Tensor::kAny, 2, Tensor::kAny, kPage, Tensor::kAny}).contiguous(3);
    require(x.elements() > 0, "pages are empty.");
    type = x.type(), count = x.size(0);
    k = x.data<char>(), v = x.data<char>() + x.stride(1) * (x.half() ? 2 : 4);
    page = x.stride(0), head = x.stride(2), kv_heads = x.size(2), dim = x.size(4);
  }
};

struct Request : Reads::Request {
  Request(std::vector<Size> pages, Size prefix_, Size length_, nb::handle positions_, nb::handle low_,
          nb::handle tail_) {
    table = std::move(pages), prefix = prefix_, length = length_;
    require(0 < length && length <= static_cast<Size>(table.size()) * kPage,
            "length must be positive, and the table must have a page for every slot.");
    for (Size page : table) require(page >= 0, "page numbers must not be negative.");
    require(0 <= prefix && prefix <= length, "prefix must be between 0 and the number of slots.");
    const Tensor of_rows = Tensor("positions", positions_).of(Type::int32).shaped({Tensor::kAny}).contiguous();
    rows = of_rows.size(0);
    positions.assign(of_rows.data<std::int32_t>(), of_rows.data<std::int32_t>() + rows);
    if (!low_.is_none()) {
      const Tensor x = Tensor("low", low_).of(Type::int32).shaped({rows}).contiguous();
      low.assign(x.data<std::int32_t>(), x.data<std::int32_t>() + rows);
    }
    if (tail_.is_none()) {
      require(prefix + rows <= length, "prefix and rows are more than the slots.");
    } else {
      const Tensor x = Tensor("tail", tail_).of(Type::boolean).shaped({rows, length - prefix}).contiguous();
      tail.assign(x.data<std::uint8_t>(), x.data<std::uint8_t>() + x.elements());
      if (tail.empty()) tail.push_back(0);  // of no slots, but there
    }
  }
};

std::vector<Reads::Request> requests(const std::vector<const Request*>& given) {
  require(!given.empty(), "there are no requests.");
  std::vector<Reads::Request> copies;
  for (const Request* request : given) {
    require(request, "a request is None.");
    copies.push_back(*request);
  }
  return copies;
}

void fits(const Reads& reads, const Layout& pages) {
  require(reads.pages <= pages.count, "a table names pages that are not there.");
}

// Query heads of all rows [R, H, D].
Tensor queries(nb::handle q, const Reads& reads, const Layout& pages) {
  Tensor x("q", q);
  x.of(pages.type).shaped({Size(reads.rows.size()), Tensor::kAny, pages.dim}).contiguous(2);
  require(x.size(1) > 0 && x.size(1) % pages.kv_heads == 0, "q must have a multiple of the KV heads as heads.");
  return x;
}

Attend attention(nb::handle q, const Layout& pages, const Reads& reads, nb::handle out, nb::handle lse, float scale,
                 float softcap, int threads) {
  fits(reads, pages);
  const Tensor x = queries(q, reads, pages), result("out", out), mass("lse", lse);
  result.of(pages.type).shaped({x.size(0), x.size(1), x.size(2)}).contiguous();
  mass.of(Type::float32).shaped({x.size(0), x.size(1)}).contiguous();
  require(threads > 0, "threads must be positive.");
  return {x.data(), result.data(), mass.data<float>(), x.size(1), x.stride(0), x.stride(1), scale, softcap, &reads,
          pages, threads};
}

void attend(const Level& level, nb::handle q, const Layout& pages, const Reads& reads, nb::handle out, nb::handle lse,
            float scale, float softcap, int threads) {
  const Attend a = attention(q, pages, reads, out, lse, scale, softcap, threads);
  if (!reads.rows.empty()) unlocked([&] { level.attend[pages.type == Type::bfloat16](a); });
}

void gather(const Level& level, nb::handle q, const Layout& pages, const Reads& reads, nb::handle index,
            nb::handle mask, nb::handle mean_k, nb::handle mean_v, float weight, nb::handle out, nb::handle lse,
            float scale, float softcap, int threads) {
  const Size rows = reads.rows.size();
  const Tensor chosen("index", index);
  const Maybe shown("mask", mask), more_k("mean_k", mean_k), more_v("mean_v", mean_v);
  Gather a{attention(q, pages, reads, out, lse, scale, softcap, threads), chosen.data<std::int64_t>(),
           shown.data<std::uint8_t>(), 0, more_k.data(), more_v.data(), 0, 0, 0, weight};
  chosen.of(Type::int64).shaped({rows, pages.kv_heads, Tensor::kAny}).contiguous();
  a.budget = chosen.size(2);
  if (shown) shown->of(Type::boolean).shaped({rows, pages.kv_heads, a.budget}).contiguous();
  const Size own = pages.kv_heads * a.budget;
  bool beyond = false;
  for (Size row = 0; row < rows; row++)
    for (Size i = row * own; i < (row + 1) * own; i++)
      beyond |= static_cast<std::uint64_t>(a.index[i]) >= static_cast<std::uint64_t>(reads.rows[row].length);
  require(!beyond, "index names slots that are not there.");
  require(bool(more_k) == bool(more_v), "mean_k and mean_v come together.");
  if (more_k) {
    a.means = more_k->of(pages.type).shaped({pages.kv_heads, Tensor::kAny, pages.dim}).contiguous(1).size(1);
    more_v->of(pages.type).shaped({pages.kv_heads, a.means, pages.dim}).contiguous(1);
    a.mean_k_head = more_k->stride(0), a.mean_v_head = more_v->stride(0);
    require(weight >= 1, "weight must be at least 1.");
  }
  require(a.budget + a.means > 0, "index is empty.");
  if (rows > 0) unlocked([&] { level.gather[pages.type == Type::bfloat16](a); });
}

void choose(const Level& level, nb::handle q, const Layout& pages, const Reads& reads, nb::handle index, Size sinks,
            Size recent, float scale, float softcap, bool largest, bool joined, int threads) {
  fits(reads, pages);
  const Tensor x = queries(q, reads, pages), chosen("index", index);
  require(reads.requests.size() == 1, "slots are chosen for one request at a time.");
  const Reads::Request& own = reads.requests[0];
  chosen.of(Type::int64).shaped({own.rows, pages.kv_heads, Tensor::kAny}).contiguous();
  require(chosen.size(2) <= own.length, "index has room for more slots than there are.");
  require(own.prefix + own.rows <= own.length, "prefix and rows are more than the slots.");
  require(threads > 0, "threads must be positive.");
  const Select s{x.data(), chosen.data<std::int64_t>(), x.size(1), x.stride(0), x.stride(1), chosen.size(2), sinks,
                 recent, scale, softcap, &reads, pages, largest, joined, threads};
  if (chosen.elements() > 0) unlocked([&] { level.select[pages.type == Type::bfloat16](s); });
}

// Rows of keys and values [H_kv, R, D] go to the slots behind each request's prefix.
void store(const Layout& pages, const Reads& reads, nb::handle keys, nb::handle values) {
  fits(reads, pages);
  const Tensor k("keys", keys), v("values", values);
  const Size rows = reads.rows.size(), size = pages.type == Type::bfloat16 ? 2 : 4;
  for (const Tensor* x : {&k, &v}) x->of(pages.type).shaped({pages.kv_heads, rows, pages.dim}).contiguous(2);
  for (const auto& own : reads.requests)
    require(own.prefix + own.rows <= own.length, "prefix and rows are more than the slots.");
  nb::gil_scoped_release nogil;
  Size row = 0;
  for (const auto& own : reads.requests)
    for (Size slot = own.prefix; slot < own.prefix + own.rows; slot++, row++) {
      const Size place = own.table[slot / kPage] * pages.page + slot % kPage * pages.dim;
      for (Size head = 0; head < pages.kv_heads; head++) {
        const Size to = (place + head * pages.head) * size, bytes = pages.dim * size;
        std::memcpy(static_cast<char*>(pages.k) + to,
                    k.data<char>() + (head * k.stride(0) + row * k.stride(1)) * size, bytes);
        std::memcpy(static_cast<char*>(pages.v) + to,
                    v.data<char>() + (head * v.stride(0) + row * v.stride(1)) * size, bytes);
      }
    }
}

// A projection: its weight [outputs, inputs] and bias.
Matrix matrix(const char* name, nb::handle weight, nb::handle bias) {
  const Tensor w(name, weight);
  w.half();
  w.shaped({Tensor::kAny, Tensor::kAny}).contiguous();
  if (w.elements() == 0) wrong_value(std::string(name) + " is empty.");
  const Maybe b("bias", bias);
  if (b) b->of(w.type()).shaped({w.size(0)}).contiguous();
  return {w.data(), b.data(), w.size(0), w.size(1)};
}

void linear(const Level& level, nb::handle weight, nb::handle bias, nb::handle x, nb::handle out, int threads) {
  const Matrix m = matrix("weight", weight, bias);
  const Tensor input("x", x), result("out", out);
  const Type type = Tensor("weight", weight).type();
  input.of(type).shaped({Tensor::kAny, m.inputs}).contiguous();
  result.of(type).shaped({input.size(0), m.outputs}).contiguous();
  require(threads > 0, "threads must be positive.");
  if (input.size(0) > 0)
    unlocked([&] { level.linear[input.half()](m, input.data(), result.data(), input.size(0), threads); });
}

// What surrounds a layer's attention, and the type of its weights, which are kept alive.
struct Layer : Block {
  Type type;
  std::vector<nb::object> kept;

  Layer(nb::handle input_norm, nb::handle output_norm, nb::handle q_norm, nb::handle k_norm,
        const std::vector<std::pair<nb::object, nb::object>>& projections, Size head_dim, Size turned, float e) {
    require(projections.size() == 7, "a layer has seven projections: q, k, v, o, gate, up and down.");
    const char* names[] = {"q", "k", "v", "o", "gate", "up", "down"};
    Matrix* matrices[] = {&q, &k, &v, &o, &gate, &up, &down};
    type = Tensor("q", projections[0].first).type();
    for (nb::handle own : {input_norm, output_norm, q_norm, k_norm}) kept.push_back(nb::borrow(own));
    for (int i = 0; i < 7; i++) {
      kept.push_back(projections[i].first);
      kept.push_back(projections[i].second);
      *matrices[i] = matrix(names[i], projections[i].first, projections[i].second);
      Tensor(names[i], projections[i].first).of(type);
    }
    hidden = q.inputs, dim = head_dim, rotary = turned, epsilon = e;
    require(dim > 0 && q.outputs % dim == 0 && k.outputs % dim == 0, "projections do not make up whole heads.");
    heads = q.outputs / dim, kv_heads = k.outputs / dim;
    require(heads % kv_heads == 0, "there must be a multiple of the KV heads as heads.");
    require(0 <= rotary && rotary <= dim && rotary % 2 == 0, "rotary must be even and at most the heads' size.");
    const Size inner = gate.outputs;
    const Size wanted[7][2] = {{q.outputs, hidden}, {k.outputs, hidden}, {k.outputs, hidden}, {hidden, q.outputs},
                               {inner, hidden},     {inner, hidden},     {hidden, inner}};
    for (int i = 0; i < 7; i++) Tensor(names[i], projections[i].first).shaped({wanted[i][0], wanted[i][1]});
    this->input_norm = norm("input_norm", input_norm, hidden);
    this->output_norm = norm("output_norm", output_norm, hidden);
    this->q_norm = q_norm.is_none() ? nullptr : norm("q_norm", q_norm, dim);
    this->k_norm = k_norm.is_none() ? nullptr : norm("k_norm", k_norm, dim);
  }

 private:
  const void* norm(const char* name, nb::handle weight, Size size) const {
    return Tensor(name, weight).of(type).shaped({size}).contiguous().data();
  }
};

// What dictionaries of modules hold, and where their weights lie, to notice when that changes.
class Parts {
 public:
  Parts(std::vector<nb::dict> holders, std::vector<nb::object> weights)
      : holders_(std::move(holders)), weights_(std::move(weights)) {
    for (const nb::dict& holder : holders_) {
      PyObject* value;
      for (Py_ssize_t at = 0; PyDict_Next(holder.ptr(), &at, nullptr, &value);) held_.push_back(nb::borrow(value));
      held_.emplace_back();
    }
    for (const nb::object& weight : weights_) addresses_.push_back(Tensor::address(weight));
  }

  bool same() const {
    std::size_t i = 0;
    for (const nb::dict& holder : holders_) {
      PyObject* value;
      for (Py_ssize_t at = 0; PyDict_Next(holder.ptr(), &at, nullptr, &value); i++)
        if (held_[i].ptr() != value) return false;
      if (held_[i++].is_valid()) return false;
    }
    for (i = 0; i < weights_.size(); i++)
      if (Tensor::address(weights_[i]) != addresses_[i]) return false;
    return true;
  }

 private:
  std::vector<nb::dict> holders_;
  std::vector<nb::object> held_, weights_;  // of each holder, then nothing; kept, so that no other has their place
  std::vector<const void*> addresses_;
};

void before(const Level& level, const Layer& layer, nb::handle x, nb::handle cos, nb::handle sin, nb::handle q,
            nb::handle k, nb::handle v, int threads) {
  const Tensor input("x", x), turn("cos", cos), shift("sin", sin), q_("q", q), k_("k", k), v_("v", v);
  const Size rows = input.of(layer.type).shaped({Tensor::kAny, layer.hidden}).contiguous().size(0);
  if (layer.rotary > 0)
    for (const Tensor* angle : {&turn, &shift}) angle->of(layer.type).shaped({rows, layer.rotary}).contiguous();
  q_.of(layer.type).shaped({rows, layer.heads, layer.dim}).contiguous();
  for (const Tensor* own : {&k_, &v_}) own->of(layer.type).shaped({layer.kv_heads, rows, layer.dim}).contiguous();
  require(threads > 0, "threads must be positive.");
  if (rows > 0)
    unlocked([&] {
      level.before[input.half()](layer, input.data(), turn.data(), shift.data(), q_.data(), k_.data(), v_.data(), rows,
                                 threads);
    });
}

void after(const Level& level, const Layer& layer, nb::handle x, nb::handle attention, nb::handle out, int threads) {
  const Tensor input("x", x), attended("attention", attention), result("out", out);
  const Size rows = input.of(layer.type).shaped({Tensor::kAny, layer.hidden}).contiguous().size(0);
  attended.of(layer.type).shaped({rows, layer.heads, layer.dim}).contiguous();
  result.of(layer.type).shaped({rows, layer.hidden}).contiguous();
  require(threads > 0, "threads must be positive.");
  if (rows > 0)
    unlocked([&] { level.after[input.half()](layer, input.data(), attended.data(), result.data(), rows, threads); });
}

}  // namespace

NB_MODULE(_cpu, m) {
  using namespace nb::literals;
  nb::set_leak_warnings(false);  // levels live as long as the process
  m.def("levels", [] {
    std::vector<std::string> names;
    for (const Level* level : levels()) names.emplace_back(level->name);
    return names;
  });
  m.def("huge_pages", huge_pages, "tensor"_a, "now"_a);

  nb::class_<Layer>(m, "Layer")
      .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle,
                    const std::vector<std::pair<nb::object, nb::object>>&, Size, Size, float>(),
           "input_norm"_a, "output_norm"_a, "q_norm"_a.none(), "k_norm"_a.none(), "projections"_a, "head_dim"_a,
           "rotary"_a, "epsilon"_a);

  nb::class_<Parts>(m, "Parts")
      .def(nb::init<std::vector<nb::dict>, std::vector<nb::object>>(), "holders"_a, "weights"_a)
      .def("same", &Parts::same);

  nb::class_<Layout>(m, "Pages").def(nb::init<nb::object>(), "tensor"_a);
  nb::class_<Request>(m, "Request")
      .def(nb::init<std::vector<Size>, Size, Size, nb::handle, nb::handle, nb::handle>(), "table"_a, "prefix"_a,
           "length"_a, "positions"_a, "low"_a.none(), "tail"_a.none());
  nb::class_<Reads>(m, "Reads")
      .def("__init__",
           [](Reads* own, const std::vector<const Request*>& given) { new (own) Reads(requests(given)); },
           "requests"_a)
      .def_prop_ro("groups", [](const Reads& reads) {
        std::vector<std::pair<std::vector<std::int32_t>, std::pair<Size, Size>>> found;
        for (const Group& g : reads.groups) found.push_back({g.rows, {g.first, g.last}});
        return found;
      });
  m.attr("PAGE") = kPage;
  m.attr("SPAN") = kSpan;
  m.def("write", store, "pages"_a, "reads"_a, "keys"_a, "values"_a);

  nb::class_<Level>(m, "Level")
      .def_prop_ro("name", [](const Level& level) { return level.name; })
      .def("attend", attend, nb::kw_only(), "q"_a, "pages"_a, "reads"_a, "out"_a, "lse"_a, "scale"_a, "softcap"_a,
           "threads"_a)
      .def("gather", gather, nb::kw_only(), "q"_a, "pages"_a, "reads"_a, "index"_a, "mask"_a.none(),
           "mean_k"_a.none(), "mean_v"_a.none(), "weight"_a, "out"_a, "lse"_a, "scale"_a, "softcap"_a, "threads"_a)
      .def("select", choose, nb::kw_only(), "q"_a, "pages"_a, "reads"_a, "index"_a, "sinks"_a, "recent"_a, "scale"_a,
           "softcap"_a, "largest"_a, "joined"_a, "threads"_a)
      .def("linear", linear, nb::kw_only(), "weight"_a, "bias"_a.none(), "x"_a, "out"_a, "threads"_a)
      .def("before", before, "layer"_a, nb::kw_only(), "x"_a, "cos"_a, "sin"_a, "q"_a, "k"_a, "v"_a, "threads"_a)
      .def("after", after, "layer"_a, nb::kw_only(), "x"_a, "attention"_a, "out"_a, "threads"_a);

  m.def(
      "level",
      [](const std::string& name) {
        for (const Level* level : levels())
          if (name == level->name) return level;
        wrong_value("this machine has no level " + name + ".");
      },
      nb::rv_policy::reference, "name"_a);
}
