// How operations on hx run: as torch's CPU kernels on the same bytes, without copying them.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>

#include <atomic>
#include <optional>
#include <string>
#include <vector>

namespace hxcomm::device {

// What is known of an operator, found once, and how often it ran.
struct Operator {
  std::string name;                     // "aten::add.Tensor"
  bool mixes_cpu = false;               // may take CPU tensors beside those of hx
  std::atomic<bool> has_kernel = true;  // for CPU
  bool changes_arguments = false;
  bool draws_default = false;  // draws random numbers, but takes no generator
  int generator = -1;          // the argument that is one
  std::atomic<uint64_t> boxed{0}, fast{0};
};

// Valid for good; made at the first call.
Operator& operator_of(const c10::OperatorHandle& handle);
Operator& operator_named(const char* name, const char* overload);
std::vector<const Operator*> operators();

// Outputs that had to be copied into a chip's memory, because a kernel allocated them elsewhere. Expected to stay 0.
uint64_t output_copies();
// What an operation without a fast path does: 0 runs, 1 warns once for each operator, 2 raises.
void set_fallback_mode(int mode);
void before_boxed(Operator& op);

constexpr c10::DispatchKeySet kHostKeys(c10::DispatchKey::CPU);

// One operation: its arguments as CPU tensors over the same memory, and its results as tensors of hx.
//
// An argument's stand-in has a storage of its own over the same bytes, because views that a kernel makes take their
// device from the storage. There is one for each storage and tensor, so what overlaps still seems to overlap.
class HostCall {
 public:
  explicit HostCall(Operator& op);
  ~HostCall();
  HostCall(const HostCall&) = delete;
  HostCall& operator=(const HostCall&) = delete;

  at::Tensor enter(const at::Tensor& tensor);
  at::Tensor enter_index(const at::Tensor& tensor);  // of a list of indices: may be on CPU, as on CUDA
  void enter_device(c10::Device device);             // an argument that names where results go
  // After all arguments: throws when tensors of hx and CPU are mixed.
  void check();
  int chip() const { return chip_; }
  const char* first_dtype() const;

  at::Tensor leave(at::Tensor result);
  // What a kernel did to the shape or the storage of arguments (out=, resize_, squeeze_) is done to them.
  void commit();

 private:
  struct Storage {
    c10::StorageImpl* original;
    c10::intrusive_ptr<c10::StorageImpl> standin;
  };
  struct Entry {
    c10::TensorImpl* original;
    at::Tensor standin;
  };
  c10::Storage standin_of(const c10::Storage& storage);
  void relabel(c10::StorageImpl& storage) const;
  at::Tensor view_of(const Storage& storage, const at::Tensor& result) const;
  at::Tensor copied(const at::Tensor& result) const;

  Operator& op_;
  int chip_ = -1;
  int outer_chip_;
  bool on_cpu_ = false;  // a CPU tensor with dimensions is among the arguments
  int other_chip_ = -1;  // a chip other than the first argument's
  c10::impl::ExcludeDispatchKeyGuard below_autograd_;
  c10::SmallVector<Storage, 6> storages_;
  c10::SmallVector<Entry, 6> entries_;
};

// Any operator, by its stack. The kernel of all that have no fast path.
void run_boxed(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack);

void start_kernels();    // boxed.cpp: the fallback
void start_operators();  // operators.cpp: the fast paths
void start_recurrent();  // recurrent.cpp
void start_autocast();   // autocast.cpp

}  // namespace hxcomm::device
