// A tensor of each rank that all ranks of a communicator may put into.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <mutex>
#include <vector>

#include "torch/process_group.h"

namespace hxcomm::torch_glue {

// Nothing here needs the GIL. Null instead of a Work: the call has ended well. It does not keep the process group: once
// that is destroyed, calls raise.
class Window {
 public:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  // Blocks until every rank of the group has made it. `owning`: it holds the tensor, until no peer touches it any more.
  Window(const c10::intrusive_ptr<ProcessGroup>& group, const at::Tensor& tensor, bool owning, int64_t timeout_ms);
  ~Window();
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  WorkPtr put(const at::Tensor& tensor, int rank, int64_t offset, bool async_op, int64_t timeout_ms);
  WorkPtr signal(int rank, bool async_op, int64_t timeout_ms);
  WorkPtr wait_signal(int rank, bool async_op, int64_t timeout_ms);
  // A view of that rank's tensor. It holds the peer's memory, not what lies there: a peer may end.
  at::Tensor map_remote(int rank) const;
  bool is_mapped(int rank) const;
  bool is_open() const;

  // Blocks until every rank has called it.
  void close(int64_t timeout_ms);
  // Ends it on this rank alone. The tensor is held until every peer has left the group.
  void drop() noexcept;

 private:
  using Handle = std::shared_ptr<void>;
  Handle handle() const;  // throws where it is closed
  ApiWindow part(const Handle& handle, int rank) const;
  WorkPtr issue(Tensors&& call, int64_t offset, bool async_op, int64_t timeout_ms);

  c10::weak_intrusive_ptr<ProcessGroup> process_group_;
  const Api& api_;
  void* const group_;
  const int rank_, size_;
  const c10::Device device_;
  const at::ScalarType dtype_;
  mutable std::mutex mutex_;
  Handle handle_;
  at::Tensor tensor_;  // where it is owned
};

void bind_window(py::module_& m);

}  // namespace hxcomm::torch_glue
