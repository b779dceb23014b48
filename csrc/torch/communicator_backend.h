// A c10d backend over a communicator of hxcomm.torchcomms, so that torch.distributed, DDP, FSDP2 and DTensor run on it.
//
// torch's c10d::Backend cannot be subclassed in Python, hence this class. It knows no communicator: `calls`, an object
// of Python (hxcomm/torchcomms/backend_wrapper.py), says which backend in C++ runs the calls, if any, and whether
// hooks want to see them. Without either, e.g. over a backend that somebody wrote in Python, `calls` runs them itself.
#pragma once

#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <string>
#include <vector>

namespace hxcomm::torch_glue {

class CommunicatorBackend final : public c10d::Backend {
 public:
  CommunicatorBackend(int rank, int size, std::string name, py::object calls);
  ~CommunicatorBackend() override;

  py::object calls() const { return calls_; }  // the GIL is held

  const std::string getBackendName() const override { return name_; }
  void setTimeout(std::chrono::milliseconds timeout) override;
  void setSequenceNumberForGroup() override {}  // a communicator counts from its creation on
  uint64_t getSequenceNumberForGroup() override;
  void abort() override { tell("abort"); }
  void shutdown() override { tell("shutdown"); }
  bool supportsSplitting() const override { return true; }
  bool supportsCoalescing() const override { return true; }
  c10::intrusive_ptr<Options> getBackendOptions() override;
  // Null on ranks that are not among `ranks`.
  c10::intrusive_ptr<Backend> split(const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
                                    const c10::intrusive_ptr<Options>& options) override;

  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using List = std::vector<at::Tensor>;
  WorkPtr broadcast(List& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr allreduce(List& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_coalesced(List& tensors, const c10d::AllreduceCoalescedOptions& options) override;
  WorkPtr allreduce_sparse(List& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr reduce(List& tensors, const c10d::ReduceOptions& options) override;
  WorkPtr allgather(std::vector<List>& outputs, List& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_coalesced(std::vector<List>& outputs, List& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_into_tensor_coalesced(List& outputs, List& inputs, const c10d::AllgatherOptions& options) override;
  WorkPtr gather(std::vector<List>& outputs, List& inputs, const c10d::GatherOptions& options) override;
  WorkPtr scatter(List& outputs, std::vector<List>& inputs, const c10d::ScatterOptions& options) override;
  WorkPtr reduce_scatter(List& outputs, std::vector<List>& inputs, const c10d::ReduceScatterOptions& options) override;
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override;
  WorkPtr reduce_scatter_tensor_coalesced(List& outputs, List& inputs,
                                          const c10d::ReduceScatterOptions& options) override;
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) override;
  WorkPtr alltoall(List& outputs, List& inputs, const c10d::AllToAllOptions& options) override;
  WorkPtr barrier(const c10d::BarrierOptions& options) override;
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override;
  WorkPtr send(List& tensors, int to, int tag) override;
  WorkPtr recv(List& tensors, int from, int tag) override;
  WorkPtr recvAnysource(List& tensors, int tag) override;
  void startCoalescing() override;
  WorkPtr endCoalescing() override;

 private:
  struct Seen;

  // The backend in C++ that runs this communicator's calls now, or null. Others after a reconfigure().
  c10::intrusive_ptr<Backend> native() const;
  // The same, for an op that has no other way.
  c10::intrusive_ptr<Backend> only_native(const char* what) const;
  void tell(const char* method) const;
  template <class... Arguments>
  WorkPtr ask(c10d::OpType type, const char* method, List results, const Arguments&... arguments) const;

  const std::string name_;
  py::object calls_;
};

void bind_communicator_backend(py::module_& m);

}  // namespace hxcomm::torch_glue
