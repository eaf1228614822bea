// Torch tensors as the kernels' Python functions get them. Nothing of a tensor is trusted: what does not fit raises
// TypeError or ValueError, with one sentence, before a pointer is used.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace springtide {

namespace nb = nanobind;
using Size = std::int64_t;

enum class Type { float32, bfloat16, int64, int32, boolean, other };
constexpr const char* kTypeNames[] = {"float32", "bfloat16", "int64", "int32", "bool"};
constexpr int kCodes[] = {2, 4, 0, 0, 6}, kBits[] = {32, 16, 64, 32, 8};  // in DLPack

[[noreturn]] inline void wrong_type(const std::string& what) { throw nb::type_error(what.c_str()); }
[[noreturn]] inline void wrong_value(const std::string& what) { throw nb::value_error(what.c_str()); }

using View = nb::dlpack::dltensor;

// How torch shows its tensors without copying or counting anything: DLPack's table of functions for C, as far as the one
// that is used here. Nothing of it depends on torch's ABI.
class Torch {
 public:
  static const Torch& get() {
    static const Torch torch;
    return torch;
  }

  bool shows(nb::handle tensor, View& out) const {
    if (table_->view(tensor.ptr(), &out) == 0) return true;
    PyErr_Clear();
    return false;
  }

  PyTypeObject* type;

 private:
  struct Table {
    std::uint32_t major, minor;
    void *earlier, *others[3];
    int (*view)(void* tensor, View* out);
  };

  Torch() {
    nb::object tensor = nb::module_::import_("torch").attr("Tensor"), table = tensor.attr("__dlpack_c_exchange_api__");
    type = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());  // it lives as long as the process
    table_ = static_cast<const Table*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
    if (!table_) throw nb::python_error();
    if (table_->major != 1) throw std::runtime_error("this version of torch shows its tensors in a way that is not known");
  }

  const Table* table_;
};

// A tensor on the CPU: where it lies, and how.
class Tensor {
 public:
  static constexpr int kDims = 6;
  static constexpr Size kAny = -1;  // in a shape: whatever it is

  Tensor(const char* name, nb::handle object) : name_(name) {
    if (!PyObject_TypeCheck(object.ptr(), Torch::get().type))
      wrong_type(std::string(name) + " must be a torch tensor, but it is a " + Py_TYPE(object.ptr())->tp_name + ".");
    View own;
    constexpr int kCpu = 1, kPinned = 3;
    if (!Torch::get().shows(object, own) || (own.device.device_type != kCpu && own.device.device_type != kPinned))
      wrong_value(std::string(name) + " must be on the CPU.");
    dims_ = own.ndim;
    if (dims_ > kDims) wrong_value(std::string(name) + " has more than " + std::to_string(kDims) + " dimensions.");
    for (int i = 0; i < dims_; i++) shape_[i] = own.shape[i], strides_[i] = own.strides[i];
    for (int i = 0; i < static_cast<int>(Type::other); i++)
      if (own.dtype.code == kCodes[i] && own.dtype.bits == kBits[i]) type_ = static_cast<Type>(i);
    data_ = static_cast<char*>(own.data) + own.byte_offset;
  }

  // Where a torch tensor on any device lies; nothing for one that lies nowhere.
  static const void* address(nb::handle object) {
    View own;
    return Torch::get().shows(object, own) ? static_cast<const char*>(own.data) + own.byte_offset : nullptr;
  }

  Type type() const { return type_; }
  int dims() const { return dims_; }
  Size size(int dim) const { return shape_[dim]; }
  Size stride(int dim) const { return strides_[dim]; }

  Size elements() const {
    Size product = 1;
    for (int i = 0; i < dims_; i++) product *= shape_[i];
    return product;
  }

  template <class P = void>
  P* data() const {
    return static_cast<P*>(data_);
  }

  const Tensor& of(Type type) const {
    if (type_ != type)
      wrong_type(std::string(name_) + " must be " + kTypeNames[static_cast<int>(type)] + ", but it is " +
                 (type_ == Type::other ? "of another type" : kTypeNames[static_cast<int>(type_)]) + ".");
    return *this;
  }

  // float32 or bfloat16; says which.
  bool half() const {
    if (type_ != Type::float32 && type_ != Type::bfloat16)
      wrong_type(std::string(name_) + " must be float32 or bfloat16.");
    return type_ == Type::bfloat16;
  }

  const Tensor& shaped(std::initializer_list<Size> wanted) const {
    bool fits = dims_ == static_cast<int>(wanted.size());
    for (int i = 0; fits && i < dims_; i++) fits = wanted.begin()[i] == kAny || wanted.begin()[i] == shape_[i];
    if (!fits) {
      std::string text;
      for (Size size : wanted) text += (text.empty() ? "" : ", ") + (size == kAny ? "any" : std::to_string(size));
      wrong_value(std::string(name_) + " must have shape [" + text + "], but it has " + shape() + ".");
    }
    return *this;
  }

  // The elements of the dimensions from `first` on lie one after the other.
  const Tensor& contiguous(int first = 0) const {
    if (elements() == 0) return *this;
    Size step = 1;
    for (int i = dims_ - 1; i >= first; step *= shape_[i--])
      if (shape_[i] > 1 && strides_[i] != step)
        wrong_value(std::string(name_) + " must be contiguous" +
                    (first ? " from dimension " + std::to_string(first) + " on" : std::string()) + ".");
    return *this;
  }

 private:
  std::string shape() const {
    std::string text;
    for (int i = 0; i < dims_; i++) text += (i ? ", " : "") + std::to_string(shape_[i]);
    return "[" + text + "]";
  }

  const char* name_;
  Type type_ = Type::other;
  int dims_ = 0;
  Size shape_[kDims], strides_[kDims];
  void* data_ = nullptr;
};

}  // namespace springtide
