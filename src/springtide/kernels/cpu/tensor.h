// Torch tensors as the kernels' Python functions get them. Nothing of a tensor is trusted: what does not fit raises
// TypeError or ValueError, with one sentence, before a pointer is used.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace springtide {

namespace nb = nanobind;
using Size = std::int64_t;

enum class Type { float32, bfloat16, int64, int32, boolean, other };
constexpr const char* kTypeNames[] = {"float32", "bfloat16", "int64", "int32", "bool"};

[[noreturn]] inline void wrong_type(const std::string& what) { throw nb::type_error(what.c_str()); }
[[noreturn]] inline void wrong_value(const std::string& what) { throw nb::value_error(what.c_str()); }

// A tensor on the CPU: where it lies, and how. Only attributes are read, so that nothing here depends on torch's ABI.
class Tensor {
 public:
  static constexpr int kDims = 6;
  static constexpr Size kAny = -1;  // in a shape: whatever it is

  Tensor(const char* name, nb::handle object) : name_(name) {
    static const Names names;
    nb::object own = attribute(object, names.dtype);
    for (int i = 0; own.is_valid() && i < 5; i++)
      if (own.is(names.types[i])) type_ = static_cast<Type>(i);
    if (type_ == Type::other && !(own.is_valid() && nb::isinstance(own, names.type)))
      wrong_type(std::string(name) + " must be a torch tensor, but it is a " + Py_TYPE(object.ptr())->tp_name + ".");
    if (!attribute(object, names.is_cpu).is(nb::handle(Py_True)))
      wrong_value(std::string(name) + " must be on the CPU.");
    nb::object shape = attribute(object, names.shape), strides = call(object, names.stride);
    dims_ = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
    if (dims_ > kDims) wrong_value(std::string(name) + " has more than " + std::to_string(kDims) + " dimensions.");
    for (int i = 0; i < dims_; i++) {
      shape_[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
      strides_[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.ptr(), i));
    }
    data_ = reinterpret_cast<void*>(PyLong_AsUnsignedLongLong(call(object, names.data_ptr).ptr()));
    if (PyErr_Occurred()) throw nb::python_error();
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
  struct Names {
    nb::object dtype = text("dtype"), is_cpu = text("is_cpu"), shape = text("shape"), stride = text("stride"),
               data_ptr = text("data_ptr"), types[5], type;

    Names() {
      nb::module_ torch = nb::module_::import_("torch");
      for (int i = 0; i < 5; i++) types[i] = torch.attr(kTypeNames[i]);
      type = torch.attr("dtype");
      // They live as long as the process.
      for (nb::object* x : {&dtype, &is_cpu, &shape, &stride, &data_ptr, &type}) x->inc_ref();
      for (nb::object& x : types) x.inc_ref();
    }

    static nb::object text(const char* name) { return nb::steal(PyUnicode_InternFromString(name)); }
  };

  // Nothing if there is no such attribute.
  static nb::object attribute(nb::handle object, const nb::object& name) {
    PyObject* found = PyObject_GetAttr(object.ptr(), name.ptr());
    if (!found) PyErr_Clear();
    return nb::steal(found);
  }

  static nb::object call(nb::handle object, const nb::object& name) {
    PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), name.ptr());
    if (!result) throw nb::python_error();
    return nb::steal(result);
  }

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
