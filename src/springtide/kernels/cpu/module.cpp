// The Python module: levels that this machine has, and their kernels on raw addresses. Shapes are checked in Python.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef SPRINGTIDE_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nb = nanobind;
using namespace springtide;
using Address = std::uintptr_t;
using Size = std::int64_t;

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
void huge_pages(Address address, Size bytes, bool now) {
#ifdef __linux__
  constexpr Address kPage = 2 << 20;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE
  const Address first = (address + kPage - 1) / kPage * kPage, last = (address + bytes) / kPage * kPage;
  if (first >= last) return;
  void* region = reinterpret_cast<void*>(first);
  madvise(region, last - first, MADV_HUGEPAGE);
  if (now) madvise(region, last - first, kCollapse);
#endif
}

template <class P>
P* at(Address address) {
  return reinterpret_cast<P*>(address);
}


}  // namespace

NB_MODULE(_cpu, m) {
  nb::set_leak_warnings(false);  // levels live as long as the process
  m.def("levels", [] {
    std::vector<std::string> names;
    for (const Level* level : levels()) names.emplace_back(level->name);
    return names;
  });

  m.def("huge_pages", huge_pages, nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Block>(m, "Block")
      .def("__init__",
           [](Block* b, Address input_norm, Address output_norm, Address q_norm, Address k_norm,
              const std::vector<std::vector<Address>>& matrices, Size heads, Size kv_heads, Size dim, Size hidden,
              Size rotary, float epsilon) {
             auto matrix = [&](int i) {
               const auto& x = matrices.at(i);
               return Matrix{at<void>(x.at(0)), at<void>(x.at(1)), Size(x.at(2)), Size(x.at(3))};
             };
             new (b) Block{at<void>(input_norm), at<void>(output_norm), at<void>(q_norm), at<void>(k_norm),
                           matrix(0), matrix(1), matrix(2), matrix(3), matrix(4), matrix(5), matrix(6),
                           heads, kv_heads, dim, hidden, rotary, epsilon};
           });

  using nogil = nb::call_guard<nb::gil_scoped_release>;
  nb::class_<Level>(m, "Level")
      .def_prop_ro("name", [](const Level& level) { return level.name; })
      .def("attend",
           [](const Level& level, bool half, Address q, Address k, Address v, Address out, Size rows, Size heads,
              Size kv_heads, Size dim, Size length, Size q_row, Size q_head, Size k_head, Size v_head, float scale,
              float softcap, Size prefix, Address low, Address tail, Address index, Address mask, Size budget,
              Address mean_k, Address mean_v, Size means, Size mean_k_head, Size mean_v_head, float weight,
              int threads) {
             level.attend[half]({at<void>(q), at<void>(k), at<void>(v), at<void>(out), rows, heads, kv_heads, dim,
                                 length, q_row, q_head, k_head, v_head, scale, softcap,
                                 {prefix, at<std::int32_t>(low), at<std::uint8_t>(tail)},
                                 at<std::int64_t>(index), at<std::uint8_t>(mask), budget, at<void>(mean_k),
                                 at<void>(mean_v), means, mean_k_head, mean_v_head, weight, threads});
           },
           nogil())
      .def("select",
           [](const Level& level, bool half, Address q, Address k, Address index, Size rows, Size heads, Size kv_heads,
              Size dim, Size length, Size budget, Size sinks, Size recent, Size q_row, Size q_head, Size k_head,
              float scale, float softcap, Size prefix, Address tail, Address positions, bool largest, bool joined,
              int threads) {
             level.select[half]({at<void>(q), at<void>(k), at<std::int64_t>(index), rows, heads, kv_heads, dim, length,
                                 budget, sinks, recent, q_row, q_head, k_head, scale, softcap,
                                 {prefix, nullptr, at<std::uint8_t>(tail)},
                                 at<std::int32_t>(positions), largest, joined, threads});
           },
           nogil())
      .def("linear",
           [](const Level& level, bool half, Address weight, Address bias, Size outputs, Size inputs, Address x,
              Address out, Size rows, int threads) {
             level.linear[half]({at<void>(weight), at<void>(bias), outputs, inputs}, at<void>(x), at<void>(out), rows,
                                threads);
           },
           nogil())
      .def("before",
           [](const Level& level, bool half, const Block& block, Address x, Address cos, Address sin, Address q,
              Address k, Address v, Size rows, int threads) {
             level.before[half](block, at<void>(x), at<void>(cos), at<void>(sin), at<void>(q), at<void>(k), at<void>(v),
                                rows, threads);
           },
           nogil())
      .def("after",
           [](const Level& level, bool half, const Block& block, Address x, Address attention, Address out, Size rows,
              int threads) {
             level.after[half](block, at<void>(x), at<void>(attention), at<void>(out), rows, threads);
           },
           nogil());

  m.def(
      "level",
      [](const std::string& name) {
        for (const Level* level : levels())
          if (name == level->name) return level;
        throw std::invalid_argument("this machine has no level " + name);
      },
      nb::rv_policy::reference);
}
