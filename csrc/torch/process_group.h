// backend="hxcomm" for torch.distributed: turns tensors into calls of the communicator, and its errors into Python's.
//
// Knows torch and the communicator's table of functions; nothing of algorithms, transports or shared memory.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <string>
#include <vector>

#include "communicator/api.h"
#include "torch/tensors.h"

namespace hxcomm::torch_glue {

class ProcessGroup final : public c10d::Backend {
 public:
  // `api` and `group` come from the capsules of hxcomm._core; the group is retained.
  ProcessGroup(int rank, int size, const Api* api, void* group, std::chrono::milliseconds timeout);
  ~ProcessGroup() override;

  const std::string getBackendName() const override { return "hxcomm"; }
  void setTimeout(std::chrono::milliseconds timeout) override { timeout_ = timeout; }
  void setSequenceNumberForGroup() override {}  // the group counts from its creation on
  uint64_t getSequenceNumberForGroup() override { return api_->sequence(group_); }
  void abort() override { api_->abort(group_, "abort() was called"); }
  void shutdown() override { api_->leave(group_); }

  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using List = std::vector<at::Tensor>;
  WorkPtr broadcast(List& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr allreduce(List& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr reduce(List& tensors, const c10d::ReduceOptions& options) override;
  WorkPtr allgather(std::vector<List>& outputs, List& inputs, const c10d::AllgatherOptions& options) override;
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
  WorkPtr barrier(const c10d::BarrierOptions& options) override;

 private:
  void refuse_problem(Tensors& tensors, std::chrono::milliseconds timeout);
  void run(Tensors& tensors, std::chrono::milliseconds timeout);
  // Runs the calls now (sync) or posts them. A call with a problem is refused: the peers are told, this rank raises.
  WorkPtr issue(c10d::OpType type, std::vector<Tensors> calls, std::chrono::milliseconds timeout, bool async_op);
  WorkPtr issue(c10d::OpType type, Tensors&& call, std::chrono::milliseconds timeout, bool async_op);
  Tensors all_gather_call(const at::Tensor& output, const at::Tensor& input) const;
  Tensors reduce_scatter_call(const at::Tensor& output, const at::Tensor& input, const c10d::ReduceOp& op) const;
  void add_one_per_rank(Tensors& call, const List& tensors, bool output) const;

  const Api* api_;
  void* group_;
  std::chrono::milliseconds timeout_;
};

}  // namespace hxcomm::torch_glue
