#include "torch/window.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/ScalarType.h>

#include <sstream>

#include "torch/device/memory.h"
#include "torch/errors.h"

namespace hxcomm::torch_glue {
namespace {

constexpr int64_t kMs = 1'000'000;  // in ns
constexpr int64_t kMaxDims = 8;     // of a window's tensor, whose shape all ranks are told

// What is wrong with a window's tensor, or "".
std::string problem_of(const at::Tensor& tensor) {
  std::ostringstream text;
  text << "a window's tensor, " << c10::toString(tensor.scalar_type()) << tensor.sizes() << " on " << tensor.device()
       << ", ";
  if (tensor.layout() != at::kStrided || !tensor.is_contiguous() || tensor.is_conj() || tensor.is_neg())
    text << "is not contiguous; peers put into it as one range of memory. Take tensor.contiguous().";
  else if (!dtype_of(tensor.scalar_type()))
    text << "has a dtype that hxcomm does not know; view it as another one (tensor.view(torch.uint8)).";
  else if (tensor.dim() > kMaxDims)
    text << "has more than " << kMaxDims << " dimensions; view it with fewer.";
  else if (tensor.numel() > 0 &&
           (!device::is_started() ||
            device::memory().segment_offset(device::memory().arenas, tensor.data_ptr(), tensor.nbytes()) < 0))
    text << "does not lie in memory that peers can map: make it on device hx, or on cpu inside `with "
            "comm.mem_allocator:` (comm.mem_allocator.empty() is torch.empty() there).";
  else
    return "";
  return text.str();
}

}  // namespace

Window::Window(const c10::intrusive_ptr<ProcessGroup>& group, const at::Tensor& tensor, bool owning, int64_t timeout_ms)
    : process_group_(group),
      api_(group->issuer().api()),
      group_(api_.retain(group->issuer().group())),
      rank_(group->getRank()),
      size_(group->getSize()),
      device_(tensor.device()),
      dtype_(tensor.scalar_type()) {
  const std::string problem = problem_of(tensor);
  ApiWindow own{};
  if (problem.empty())
    own = {static_cast<int32_t>(*dtype_of(dtype_)),
           static_cast<int32_t>(device_.is_privateuseone() ? DeviceKind::hx : DeviceKind::cpu),
           tensor.data_ptr(),
           static_cast<uint64_t>(tensor.numel()),
           tensor.sizes().data(),
           tensor.sizes().size(),
           /*on_this_host=*/1};
  void* made = nullptr;
  const int kind = api_.open_window(group_, &own, problem.empty() ? nullptr : problem.c_str(), kMs * timeout_ms, &made);
  if (kind != 0) {
    const std::string message = api_.message();
    api_.release(group_);
    throw_typed(kind, message);
  }
  handle_ = Handle(made, [&api = api_](void* window) { api.release_window(window); });
  if (owning) tensor_ = tensor;
}

Window::~Window() {
  drop();
  api_.release(group_);
}

Window::Handle Window::handle() const {
  const std::lock_guard lock(mutex_);
  if (!handle_) throw_typed(ErrorKind::usage, "the window has been deregistered");
  return handle_;
}

bool Window::is_open() const {
  const std::lock_guard lock(mutex_);
  return handle_ != nullptr;
}

ApiWindow Window::part(const Handle& handle, int rank) const {
  if (rank < 0 || rank >= size_)
    throw_typed(ErrorKind::usage,
                "there is no rank " + std::to_string(rank) + " in a group of " + std::to_string(size_));
  ApiWindow part{};
  api_.window_part(handle.get(), rank, &part);
  return part;
}

Window::WorkPtr Window::issue(Tensors&& call, int64_t offset, bool async_op, int64_t timeout_ms) {
  const Handle held = handle();
  const auto group = process_group_.lock();
  if (!group) throw_typed(ErrorKind::usage, "the group of this window has been destroyed on this rank");
  call.set_window(api_.window_id(held.get()), offset);
  const std::chrono::milliseconds timeout(timeout_ms);
  if (!async_op) {
    group->issuer().carry_out(call, timeout);
    return nullptr;
  }
  std::vector<Tensors> calls;
  calls.push_back(std::move(call));
  return group->issuer().issue(c10d::OpType::UNKNOWN, std::move(calls), timeout, async_op);
}

Window::WorkPtr Window::put(const at::Tensor& tensor, int rank, int64_t offset, bool async_op, int64_t timeout_ms) {
  Tensors call(kPut, "put");
  call.set_peer(rank, /*tag=*/0, size_);
  call.add_input(tensor);
  call.require_count(tensor.numel());
  return issue(std::move(call), offset, async_op, timeout_ms);
}

Window::WorkPtr Window::signal(int rank, bool async_op, int64_t timeout_ms) {
  Tensors call(kSignal, "signal");
  call.set_peer(rank, /*tag=*/0, size_);
  return issue(std::move(call), /*offset=*/0, async_op, timeout_ms);
}

Window::WorkPtr Window::wait_signal(int rank, bool async_op, int64_t timeout_ms) {
  Tensors call(kWaitSignal, "wait_signal");
  call.set_peer(rank, /*tag=*/0, size_);
  return issue(std::move(call), /*offset=*/0, async_op, timeout_ms);
}

at::Tensor Window::map_remote(int rank) const {
  device::check_not_forked();
  const Handle held = handle();
  const ApiWindow there = part(held, rank);
  if (there.on_this_host == 0)
    throw_typed(ErrorKind::usage, "map_remote_tensor: rank " + std::to_string(rank) +
                                      " is on another host, whose memory cannot be mapped; put() reaches it. "
                                      "get_attr(rank).access_type says which ranks can be mapped (UNIFIED)");
  return at::for_blob(there.data, {there.shape, there.n_shape})
      .deleter([held](void*) {})
      .options(at::TensorOptions().dtype(dtype_).device(device_))
      .target_device(device_)
      .make_tensor();
}

bool Window::is_mapped(int rank) const { return part(handle(), rank).on_this_host != 0; }

void Window::close(int64_t timeout_ms) {
  const Handle held = handle();
  const int kind = api_.close_window(held.get(), kMs * timeout_ms);
  if (kind == 0) {
    const std::lock_guard lock(mutex_);
    handle_.reset();
    tensor_.reset();
    return;
  }
  const std::string message = api_.message();
  if (kind != static_cast<int>(ErrorKind::mismatch)) drop();
  throw_typed(kind, message);
}

void Window::drop() noexcept {
  Handle held;
  at::Tensor tensor;
  {
    const std::lock_guard lock(mutex_);
    held.swap(handle_);
    std::swap(tensor, tensor_);
  }
  if (!held) return;
  api_.drop_window(held.get());
  if (!tensor.defined()) return;
  api_.keep(
      group_, [](void* kept) { c10::raw::intrusive_ptr::decref(static_cast<at::TensorImpl*>(kept)); },
      tensor.unsafeReleaseTensorImpl());
}

void bind_window(py::module_& m) {
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<Window, std::shared_ptr<Window>>(m, "Window")
      .def(py::init([](const c10::intrusive_ptr<ProcessGroup>& group, const at::Tensor& tensor, bool owning,
                       int64_t timeout_ms) {
             const py::gil_scoped_release released;
             return std::make_shared<Window>(group, tensor, owning, timeout_ms);
           }),
           py::arg("process_group"), py::arg("tensor"), py::kw_only(), py::arg("owning"), py::arg("timeout_ms"))
      .def("put", &Window::put, Released())
      .def("signal", &Window::signal, Released())
      .def("wait_signal", &Window::wait_signal, Released())
      .def("map_remote", &Window::map_remote, Released())
      .def("is_mapped", &Window::is_mapped, Released())
      .def("close", &Window::close, Released())
      .def("drop", &Window::drop, Released())
      .def_property_readonly("is_open", &Window::is_open);
}

}  // namespace hxcomm::torch_glue
