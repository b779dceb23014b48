#include "torch/communicator_backend.h"

#include <optional>
#include <utility>

#include "torch/work.h"

namespace hxcomm::torch_glue {
namespace {

using c10d::OpType;
using List = CommunicatorBackend::List;
using WorkPtr = CommunicatorBackend::WorkPtr;

constexpr int kNoPeer = -1;

std::optional<double> seconds(std::chrono::milliseconds timeout) {
  if (timeout.count() <= 0) return std::nullopt;  // c10d: that of the group
  return std::chrono::duration<double>(timeout).count();
}

// c10d's handle of a TorchWork. None stands for a call that has ended.
class PythonWork final : public c10d::Work {
 public:
  PythonWork(int rank, OpType type, py::object work, List results)
      : c10d::Work(rank, type), work_(std::move(work)), results_(std::move(results)) {}
  ~PythonWork() override {
    py::gil_scoped_acquire gil;
    work_ = py::object();
  }

  bool isCompleted() override {
    py::gil_scoped_acquire gil;
    return work_.is_none() || work_.attr("is_completed")().cast<bool>();
  }
  bool isSuccess() const override { return waited_; }
  bool wait(std::chrono::milliseconds) override {
    py::gil_scoped_acquire gil;
    if (!work_.is_none()) work_.attr("wait")();
    waited_ = true;
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }
  List result() override { return results_; }
  // Waits: a TorchWork of somebody's backend may end only in its wait().
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    wait(kNoTimeout);
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    future->markCompleted(c10::IValue(results_));
    return future;
  }

 private:
  py::object work_;
  List results_;
  bool waited_ = false;
};

}  // namespace

// An op that the communicator's hooks see: before() here, after(work) when it was issued well.
struct CommunicatorBackend::Seen {
  Seen(const CommunicatorBackend& backend, const char* op, const List& inputs, const List& outputs, int peer,
       bool async_op) {
    py::gil_scoped_acquire gil;
    if (backend.calls_.attr("hooked").cast<bool>())
      after = backend.calls_.attr("before")(op, inputs, outputs, peer, async_op);
  }
  Seen(const Seen&) = delete;
  Seen& operator=(const Seen&) = delete;
  ~Seen() {
    if (!after) return;
    py::gil_scoped_acquire gil;
    after = py::object();
  }
  WorkPtr issued(WorkPtr work) {
    if (after) {
      py::gil_scoped_acquire gil;
      after(work);
    }
    return work;
  }

  py::object after;
};

CommunicatorBackend::CommunicatorBackend(int rank, int size, std::string name, py::object calls)
    : Backend(rank, size), name_(std::move(name)), calls_(std::move(calls)) {}

CommunicatorBackend::~CommunicatorBackend() {
  if (!Py_IsInitialized()) {
    static_cast<void>(calls_.release());  // the interpreter has gone, and its objects with it
    return;
  }
  py::gil_scoped_acquire gil;
  calls_ = py::object();
}

c10::intrusive_ptr<c10d::Backend> CommunicatorBackend::native() const {
  py::gil_scoped_acquire gil;
  const py::object found = calls_.attr("native");
  return found.is_none() ? c10::intrusive_ptr<Backend>() : found.cast<c10::intrusive_ptr<Backend>>();
}

c10::intrusive_ptr<c10d::Backend> CommunicatorBackend::only_native(const char* what) const {
  auto backend = native();
  TORCH_CHECK_NOT_IMPLEMENTED(backend, what, " is not an operation of a communicator, and backend ", name_,
                              " is reached through one");
  return backend;
}

void CommunicatorBackend::tell(const char* method) const {
  py::gil_scoped_acquire gil;
  calls_.attr(method)();
}

template <class... Arguments>
WorkPtr CommunicatorBackend::ask(OpType type, const char* method, List results, const Arguments&... arguments) const {
  py::gil_scoped_acquire gil;
  return c10::make_intrusive<PythonWork>(getRank(), type, calls_.attr(method)(arguments...), std::move(results));
}

void CommunicatorBackend::setTimeout(std::chrono::milliseconds timeout) {
  py::gil_scoped_acquire gil;
  calls_.attr("set_timeout")(std::chrono::duration<double>(timeout).count());
}

uint64_t CommunicatorBackend::getSequenceNumberForGroup() {
  return only_native("a sequence number")->getSequenceNumberForGroup();
}

c10::intrusive_ptr<c10d::Backend::Options> CommunicatorBackend::getBackendOptions() {
  if (auto backend = native()) return backend->getBackendOptions();
  return c10::make_intrusive<Options>(name_);
}

c10::intrusive_ptr<c10d::Backend> CommunicatorBackend::split(const c10::intrusive_ptr<c10d::Store>&,
                                                             const std::vector<int>& ranks,
                                                             const c10::intrusive_ptr<Options>& options) {
  py::gil_scoped_acquire gil;
  const py::object part = calls_.attr("split")(ranks, options ? options->group_name : std::string());
  return part.is_none() ? c10::intrusive_ptr<Backend>() : part.cast<c10::intrusive_ptr<Backend>>();
}

WorkPtr CommunicatorBackend::broadcast(List& tensors, const c10d::BroadcastOptions& options) {
  const int root = static_cast<int>(options.rootRank);
  if (auto backend = native()) {
    Seen seen(*this, "broadcast", tensors, tensors, root, options.asyncOp);
    return seen.issued(backend->broadcast(tensors, options));
  }
  return ask(OpType::BROADCAST, "broadcast", tensors, tensors, root, options.asyncOp, seconds(options.timeout));
}

WorkPtr CommunicatorBackend::allreduce(List& tensors, const c10d::AllreduceOptions& options) {
  if (auto backend = native()) {
    Seen seen(*this, "all_reduce", tensors, tensors, kNoPeer, options.asyncOp);
    return seen.issued(backend->allreduce(tensors, options));
  }
  return ask(OpType::ALLREDUCE, "all_reduce", tensors, tensors, options.reduceOp, options.asyncOp,
             seconds(options.timeout));
}

WorkPtr CommunicatorBackend::allreduce_coalesced(List& tensors, const c10d::AllreduceCoalescedOptions& options) {
  if (auto backend = native()) {
    Seen seen(*this, "all_reduce", tensors, tensors, kNoPeer, options.asyncOp);
    return seen.issued(backend->allreduce_coalesced(tensors, options));
  }
  return ask(OpType::COALESCED, "all_reduce", tensors, tensors, options.reduceOp, options.asyncOp,
             seconds(options.timeout));
}

WorkPtr CommunicatorBackend::allreduce_sparse(List& tensors, const c10d::AllreduceOptions& options) {
  return only_native("all_reduce of sparse tensors")->allreduce_sparse(tensors, options);
}

WorkPtr CommunicatorBackend::reduce(List& tensors, const c10d::ReduceOptions& options) {
  const int root = static_cast<int>(options.rootRank);
  if (auto backend = native()) {
    Seen seen(*this, "reduce", tensors, tensors, root, options.asyncOp);
    return seen.issued(backend->reduce(tensors, options));
  }
  return ask(OpType::REDUCE, "reduce", tensors, tensors, root, options.reduceOp, options.asyncOp,
             seconds(options.timeout));
}

WorkPtr CommunicatorBackend::allgather(std::vector<List>& outputs, List& inputs,
                                       const c10d::AllgatherOptions& options) {
  const List all = outputs.empty() ? List() : outputs[0];
  if (auto backend = native()) {
    Seen seen(*this, "all_gather", inputs, all, kNoPeer, options.asyncOp);
    return seen.issued(backend->allgather(outputs, inputs, options));
  }
  return ask(OpType::ALLGATHER, "all_gather", all, outputs, inputs, options.asyncOp, seconds(options.timeout));
}

WorkPtr CommunicatorBackend::allgather_coalesced(std::vector<List>& outputs, List& inputs,
                                                 const c10d::AllgatherOptions& options) {
  return only_native("all_gather of several tensors")->allgather_coalesced(outputs, inputs, options);
}

WorkPtr CommunicatorBackend::_allgather_base(at::Tensor& output, at::Tensor& input,
                                             const c10d::AllgatherOptions& options) {
  if (auto backend = native()) {
    Seen seen(*this, "all_gather_single", {input}, {output}, kNoPeer, options.asyncOp);
    return seen.issued(backend->_allgather_base(output, input, options));
  }
  return ask(OpType::_ALLGATHER_BASE, "all_gather_single", {output}, List{output}, List{input}, options.asyncOp,
             seconds(options.timeout));
}

WorkPtr CommunicatorBackend::allgather_into_tensor_coalesced(List& outputs, List& inputs,
                                                             const c10d::AllgatherOptions& options) {
  if (auto backend = native()) {
    Seen seen(*this, "all_gather_single", inputs, outputs, kNoPeer, options.asyncOp);
    return seen.issued(backend->allgather_into_tensor_coalesced(outputs, inputs, options));
  }
  return ask(OpType::COALESCED, "all_gather_single", outputs, outputs, inputs, options.asyncOp,
             seconds(options.timeout));
}

WorkPtr CommunicatorBackend::gather(std::vector<List>& outputs, List& inputs, const c10d::GatherOptions& options) {
  const int root = static_cast<int>(options.rootRank);
  const List all = outputs.empty() ? List() : outputs[0];
  if (auto backend = native()) {
    // torch gives [[]] on the other ranks to communicators of this API, and [] to other backends.
    std::vector<List> none;
    Seen seen(*this, "gather", inputs, all, root, options.asyncOp);
    return seen.issued(backend->gather(all.empty() && getRank() != root ? none : outputs, inputs, options));
  }
  return ask(OpType::GATHER, "gather", all, all, inputs, root, options.asyncOp, seconds(options.timeout));
}

WorkPtr CommunicatorBackend::scatter(List& outputs, std::vector<List>& inputs, const c10d::ScatterOptions& options) {
  const int root = static_cast<int>(options.rootRank);
  const List all = inputs.empty() ? List() : inputs[0];
  if (auto backend = native()) {
    Seen seen(*this, "scatter", all, outputs, root, options.asyncOp);
    return seen.issued(backend->scatter(outputs, inputs, options));
  }
  return ask(OpType::SCATTER, "scatter", outputs, outputs, all, root, options.asyncOp, seconds(options.timeout));
}

WorkPtr CommunicatorBackend::reduce_scatter(List& outputs, std::vector<List>& inputs,
                                            const c10d::ReduceScatterOptions& options) {
  const List all = inputs.empty() ? List() : inputs[0];
  if (auto backend = native()) {
    Seen seen(*this, "reduce_scatter", all, outputs, kNoPeer, options.asyncOp);
    return seen.issued(backend->reduce_scatter(outputs, inputs, options));
  }
  return ask(OpType::REDUCE_SCATTER, "reduce_scatter", outputs, outputs, inputs, options.reduceOp, options.asyncOp,
             seconds(options.timeout));
}

WorkPtr CommunicatorBackend::_reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                  const c10d::ReduceScatterOptions& options) {
  if (auto backend = native()) {
    Seen seen(*this, "reduce_scatter_single", {input}, {output}, kNoPeer, options.asyncOp);
    return seen.issued(backend->_reduce_scatter_base(output, input, options));
  }
  return ask(OpType::_REDUCE_SCATTER_BASE, "reduce_scatter_single", {output}, List{output}, List{input},
             options.reduceOp, options.asyncOp, seconds(options.timeout));
}

WorkPtr CommunicatorBackend::reduce_scatter_tensor_coalesced(List& outputs, List& inputs,
                                                             const c10d::ReduceScatterOptions& options) {
  if (auto backend = native()) {
    Seen seen(*this, "reduce_scatter_single", inputs, outputs, kNoPeer, options.asyncOp);
    return seen.issued(backend->reduce_scatter_tensor_coalesced(outputs, inputs, options));
  }
  return ask(OpType::COALESCED, "reduce_scatter_single", outputs, outputs, inputs, options.reduceOp, options.asyncOp,
             seconds(options.timeout));
}

WorkPtr CommunicatorBackend::alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                                           std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) {
  const bool equal = output_splits.empty() && input_splits.empty();
  if (auto backend = native()) {
    Seen seen(*this, equal ? "all_to_all_single" : "all_to_all_v_single", {input}, {output}, kNoPeer, options.asyncOp);
    return seen.issued(backend->alltoall_base(output, input, output_splits, input_splits, options));
  }
  return ask(OpType::ALLTOALL_BASE, "all_to_all_single", {output}, output, input, output_splits, input_splits,
             options.asyncOp, seconds(options.timeout));
}

WorkPtr CommunicatorBackend::alltoall(List& outputs, List& inputs, const c10d::AllToAllOptions& options) {
  if (auto backend = native()) {
    Seen seen(*this, "all_to_all", inputs, outputs, kNoPeer, options.asyncOp);
    return seen.issued(backend->alltoall(outputs, inputs, options));
  }
  return ask(OpType::ALLTOALL, "all_to_all", outputs, outputs, inputs, options.asyncOp, seconds(options.timeout));
}

WorkPtr CommunicatorBackend::barrier(const c10d::BarrierOptions& options) {
  if (auto backend = native()) {
    Seen seen(*this, "barrier", {}, {}, kNoPeer, options.asyncOp);
    return seen.issued(backend->barrier(options));
  }
  return ask(OpType::BARRIER, "barrier", {}, options.asyncOp, seconds(options.timeout));
}

void CommunicatorBackend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  only_native("monitored_barrier")->monitoredBarrier(options, wait_all_ranks);
}

WorkPtr CommunicatorBackend::send(List& tensors, int to, int tag) {
  if (auto backend = native()) {
    Seen seen(*this, "send", tensors, {}, to, true);
    return seen.issued(backend->send(tensors, to, tag));
  }
  return ask(OpType::SEND, "send", tensors, tensors, to, tag);
}

WorkPtr CommunicatorBackend::recv(List& tensors, int from, int tag) {
  if (auto backend = native()) {
    Seen seen(*this, "recv", {}, tensors, from, true);
    return seen.issued(backend->recv(tensors, from, tag));
  }
  return ask(OpType::RECV, "recv", tensors, tensors, from, tag);
}

WorkPtr CommunicatorBackend::recvAnysource(List& tensors, int tag) {
  return only_native("recv from any rank")->recvAnysource(tensors, tag);
}

void CommunicatorBackend::startCoalescing() {
  if (auto backend = native()) return backend->startCoalescing();
  tell("start_coalescing");
}

WorkPtr CommunicatorBackend::endCoalescing() {
  if (auto backend = native()) return backend->endCoalescing();
  return ask(OpType::COALESCED, "end_coalescing", {});
}

void bind_communicator_backend(py::module_& m) {
  py::class_<CommunicatorBackend, c10d::Backend, c10::intrusive_ptr<CommunicatorBackend>>(m, "CommunicatorBackend")
      .def(py::init([](int rank, int size, std::string name, py::object calls) {
             return c10::make_intrusive<CommunicatorBackend>(rank, size, std::move(name), std::move(calls));
           }),
           py::kw_only(), py::arg("rank"), py::arg("size"), py::arg("name"), py::arg("calls"))
      .def_property_readonly("calls", &CommunicatorBackend::calls)
      .def_property_readonly("options", &CommunicatorBackend::getBackendOptions)
      .def("get_comm", [](const CommunicatorBackend& self) { return self.calls().attr("comm"); })
      .def("get_mem_allocator",
           [](const CommunicatorBackend& self) { return self.calls().attr("comm").attr("get_mem_allocator")(); })
      .def("eager_connect_single_device", [](CommunicatorBackend&, const c10::Device&) {})
      // Of ranks that new_group() leaves out of a device-bound group: here they have nothing to do.
      .def("perform_nocolor_split", [](CommunicatorBackend&, const c10::Device&) {});
}

}  // namespace hxcomm::torch_glue
